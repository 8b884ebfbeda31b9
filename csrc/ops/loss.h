// Arguments of the loss kernels, the same for the CPU and CUDA. Logits are contiguous [rows, size] and hold the columns
// first..first + size of the vocabulary, of which only the first `valid` are real: the others take no probability.
#pragma once

#include "cpu/isa.h"
#include "types.h"

namespace megalite {

struct CrossEntropyForward {
  Type type;
  const void* logits;
  const int64_t* labels;  // [rows]
  float *lse, *target;    // [rows]
  int64_t rows, size, first, valid;
};

struct CrossEntropyBackward {
  Type type;
  void* logits;
  const int64_t* labels;
  const float *lse, *grad;  // [rows]; lse over the whole vocabulary
  int64_t rows, size, first, valid;
};

}  // namespace megalite

// Rows [begin, end).
MEGALITE_CPU_KERNEL(cross_entropy_forward, (const CrossEntropyForward& a, int64_t begin, int64_t end), (a, begin, end))
MEGALITE_CPU_KERNEL(cross_entropy_backward, (const CrossEntropyBackward& a, int64_t begin, int64_t end), (a, begin, end))

namespace megalite::cuda {
void cross_entropy_forward(const CrossEntropyForward& a, void* stream);
void cross_entropy_backward(const CrossEntropyBackward& a, void* stream);
}  // namespace megalite::cuda
