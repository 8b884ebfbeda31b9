// Arguments of the optimizer's kernels, the same for the CPU and CUDA. All tensors are flat and contiguous.
#pragma once

#include "cpu/isa.h"
#include "types.h"

namespace megalite {

// Elements of one task. Where tasks begin depends on nothing else, so that neither does a result.
constexpr int64_t OPTIMIZER_PART = 16384;

struct AdamW {
  float *master, *exp_avg, *exp_avg_sq;
  void* weights;  // bf16; may be null
  const float* grad;
  const float* factors;  // divisor of the gradient, 1 - beta1^step, 1 - beta2^step
  int64_t size;
  float decay;         // lr * weight_decay
  float rest1;         // 1 - beta1
  float beta2, rest2;  // rest2: 1 - beta2
  float lr, eps;
};

struct Momentum {
  float* buffer;
  const float* grad;
  const float* divisor;  // of the gradient
  void* out;             // fp32, or bf16 where `rounds`
  int64_t size;
  float momentum;
  bool nesterov, rounds;
};

struct DecayedStep {
  float* master;
  void* weights;  // bf16; may be null
  const void* step;  // fp32, or bf16 where `rounded`
  const float* divisor;
  int64_t size;
  float decay;  // lr * weight_decay
  float lr;
  bool rounded;
};

struct SumOfSquares {
  const float* x;
  int64_t size;
  double* parts;  // one number for each part of x
};

}  // namespace megalite

// Parts [begin, end).
MEGALITE_CPU_KERNEL(adamw, (const AdamW& a, int64_t begin, int64_t end), (a, begin, end))
MEGALITE_CPU_KERNEL(momentum, (const Momentum& a, int64_t begin, int64_t end), (a, begin, end))
MEGALITE_CPU_KERNEL(decayed_step, (const DecayedStep& a, int64_t begin, int64_t end), (a, begin, end))
MEGALITE_CPU_KERNEL(sum_of_squares, (const SumOfSquares& a, int64_t begin, int64_t end), (a, begin, end))

namespace megalite::cuda {
void adamw(const AdamW& a, void* stream);
void momentum(const Momentum& a, void* stream);
void decayed_step(const DecayedStep& a, void* stream);
void sum_of_squares(const SumOfSquares& a, void* stream);
// out: one number.
void sum_parts(const double* parts, int64_t count, double* out, void* stream);
}  // namespace megalite::cuda
