// Attention of one new token of each of several sequences to the keys and values in their caches.
#pragma once

#include "cpu/isa.h"
#include "types.h"

namespace megalite {

struct Decode {
  Type type;
  const void *q, *keys, *values;  // [B, H, K]; [B, G, C, K], whose rows and heads are strides apart
  void* out;                      // [B, H, K]
  const int64_t *first, *last;    // [B]: the cells that a row attends to, both included
  int64_t row_stride, head_stride;
  int64_t batch, heads, kv_heads, size;
  float scale, softcap;  // 0: none
};

}  // namespace megalite

// Pairs [begin, end) of B G.
MEGALITE_CPU_KERNEL(decode_attention, (const Decode& a, int64_t begin, int64_t end), (a, begin, end))
