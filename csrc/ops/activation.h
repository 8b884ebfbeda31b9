// Arguments of the activation kernels, the same for the CPU and CUDA. All tensors are contiguous.
#pragma once

#include "cpu/isa.h"
#include "types.h"

namespace megalite {

struct SwigluForward {
  Type type;
  const void* gate_up;  // [rows, 2 size]: a row's gates, then its ups
  void* out;            // [rows, size]
  int64_t rows, size;
};

struct SwigluBackward {
  Type type;
  const void *grad, *gate_up;
  void* d_gate_up;
  int64_t rows, size;
};

struct GeluForward {
  Type type;
  const void *x, *bias;  // [rows, size] and [size]; bias may be null
  void* out;
  int64_t rows, size;
};

struct GeluBackward {
  Type type;
  const void *grad, *x, *bias;
  void* dx;
  float* dbias;  // [parts, size], summed over a part's rows; null without bias
  int64_t rows, size, parts;
};

}  // namespace megalite

// Rows [begin, end).
MEGALITE_CPU_KERNEL(swiglu_forward, (const SwigluForward& a, int64_t begin, int64_t end), (a, begin, end))
MEGALITE_CPU_KERNEL(swiglu_backward, (const SwigluBackward& a, int64_t begin, int64_t end), (a, begin, end))
MEGALITE_CPU_KERNEL(gelu_forward, (const GeluForward& a, int64_t begin, int64_t end), (a, begin, end))
// Parts [begin, end) of the rows.
MEGALITE_CPU_KERNEL(gelu_backward, (const GeluBackward& a, int64_t begin, int64_t end), (a, begin, end))

namespace megalite::cuda {
void swiglu_forward(const SwigluForward& a, void* stream);
void swiglu_backward(const SwigluBackward& a, void* stream);
void gelu_forward(const GeluForward& a, void* stream);
void gelu_backward(const GeluBackward& a, void* stream);
}  // namespace megalite::cuda
