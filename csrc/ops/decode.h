// Attention of one new token of each of several sequences to the keys and values in their caches.
#pragma once

#include "cpu/isa.h"
#include "types.h"

namespace megalite {

// What a number of the cache is: of the queries' type, or one of 8 bits that a scale of its cell and head multiplies.
enum class Cell { plain, int8, e4m3 };

struct Decode {
  Type type;
  Cell cell;
  const void *q, *keys, *values;  // [B, H, K]; [B, G, C, K], whose rows and heads are strides apart
  const void *key_scales, *value_scales;  // [B, G, C], of the queries' type, strided as keys are; null for plain cells
  void* out;                      // [B, H, K]
  const int64_t *first, *last;    // [B]: the cells that a row attends to, both included
  int64_t row_stride, head_stride;
  int64_t batch, heads, kv_heads, size;
  float scale, softcap;  // 0: none
};

}  // namespace megalite

// Pairs [begin, end) of B G.
MEGALITE_CPU_KERNEL(decode_attention, (const Decode& a, int64_t begin, int64_t end), (a, begin, end))
