// Arguments of a router's kernels on the CPU. All is contiguous and, but for x, its gradients and the weight, fp32; sums are fp32, and
// every row has an order of its own, whatever the other rows are.
#pragma once

#include "cpu/isa.h"
#include "types.h"

namespace megalite {

// logits[tokens, experts] = x · weight^T.
struct RouterLogits {
  Type type;
  const void *x, *weight;  // [tokens, size] and [experts, size]
  float* logits;
  int64_t tokens, size, experts;
};

// out[tokens, size] = before + grad · weight, rounded once.
struct RouterInputGradient {
  Type type;
  const float* grad;             // [tokens, experts]
  const void *weight, *before;   // [experts, size] and [tokens, size]
  void* out;
  int64_t size, experts;
};

// out[experts, size] = grad^T · x.
struct RouterWeightGradient {
  Type type;
  const float* grad;  // [tokens, experts]
  const void* x;      // [tokens, size]
  float* out;
  int64_t tokens, size, experts;
};

}  // namespace megalite

// Tokens [begin, end).
MEGALITE_CPU_KERNEL(router_logits, (const RouterLogits& a, int64_t begin, int64_t end), (a, begin, end))
MEGALITE_CPU_KERNEL(router_input_gradient, (const RouterInputGradient& a, int64_t begin, int64_t end), (a, begin, end))
// Columns [begin, end) of the result.
MEGALITE_CPU_KERNEL(router_weight_gradient, (const RouterWeightGradient& a, int64_t begin, int64_t end), (a, begin, end))
