// Arguments of the rotary kernel, the same for the CPU and CUDA. `qkv` is contiguous [tokens, heads, head_size]; the first
// `turned` heads of each token are rotated in place, the pairs (x[i], x[i + pairs]) by the angle i of the token.
#pragma once

#include "cpu/isa.h"
#include "types.h"

namespace megalite {

struct Rope {
  Type type;
  void* qkv;
  const float *cos, *sin;  // [angles, pairs]: token t has row t % angles, so that sequences may share their angles
  int64_t tokens, heads, head_size, turned, pairs, angles;
  float sign;  // -1 turns back
};

}  // namespace megalite

// Tokens [begin, end).
MEGALITE_CPU_KERNEL(rope, (const Rope& a, int64_t begin, int64_t end), (a, begin, end))

namespace megalite::cuda {
void rope(const Rope& a, void* stream);
}  // namespace megalite::cuda
