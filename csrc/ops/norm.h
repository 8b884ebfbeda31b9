// Arguments of the norm kernels, the same for the CPU and CUDA. RMSNorm is LayerNorm without a mean and a bias: one struct
// serves both, and the pointers that RMSNorm lacks are null. All tensors are contiguous [rows, size].
#pragma once

#include "cpu/isa.h"
#include "types.h"

namespace megalite {

struct NormForward {
  Type type;
  const void *x, *residual, *weight, *bias;  // residual may be null
  void *out, *sum;                           // sum = x + residual, rounded to the type; null without residual
  float *mean, *rstd;                        // [rows]
  int64_t rows, size;
  float eps, unit;  // unit is added to every weight: RMSNorm only
};

struct NormBackward {
  Type type;
  const void *grad, *grad_sum, *x, *weight;  // x: what was normalised; grad_sum may be null
  const float *mean, *rstd;
  void* dx;
  float *dweight, *dbias;  // [parts, size], summed over a part's rows
  int64_t rows, size, parts;
  float unit;
};

}  // namespace megalite

// Rows [begin, end). LayerNorm if there is a bias, else RMSNorm.
MEGALITE_CPU_KERNEL(norm_forward, (const NormForward& a, int64_t begin, int64_t end), (a, begin, end))
// Parts [begin, end) of the rows. LayerNorm if there is dbias (the mean of no rows is null, too).
MEGALITE_CPU_KERNEL(norm_backward, (const NormBackward& a, int64_t begin, int64_t end), (a, begin, end))

namespace megalite::cuda {
void norm_forward(const NormForward& a, void* stream);
void norm_backward(const NormBackward& a, void* stream);
}  // namespace megalite::cuda
