// Arguments of the norm kernels, the same for the CPU and CUDA. All tensors are contiguous [rows, size].
#pragma once

#include "cpu/isa.h"
#include "types.h"

namespace megalite {

struct NormForward {
  Type type;
  const void *x, *residual, *weight;  // residual may be null
  void *out, *sum;                    // sum = x + residual, rounded to the type; null without residual
  float* rstd;                        // [rows]
  int64_t rows, size;
  float eps;
};

struct NormBackward {
  Type type;
  const void *grad, *grad_sum, *x, *weight;  // x: what was normalised; grad_sum may be null
  const float* rstd;
  void* dx;
  float* dweight;  // [parts, size], summed over a part's rows
  int64_t rows, size, parts;
};

}  // namespace megalite

// Rows [begin, end).
MEGALITE_CPU_KERNEL(rms_norm_forward, (const NormForward& a, int64_t begin, int64_t end), (a, begin, end))
// Parts [begin, end) of the rows.
MEGALITE_CPU_KERNEL(rms_norm_backward, (const NormBackward& a, int64_t begin, int64_t end), (a, begin, end))

namespace megalite::cuda {
void rms_norm_forward(const NormForward& a, void* stream);
void rms_norm_backward(const NormBackward& a, void* stream);
}  // namespace megalite::cuda
