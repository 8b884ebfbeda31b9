// Arguments of the attention kernels of the CPU. Letters: B batch, T tokens, H query heads, G key/value heads, K head
// size.
#pragma once

#include "cpu/isa.h"
#include "types.h"

namespace megalite {

constexpr int64_t ATTENTION_QUERIES = 96;  // of one head that are worked on together
constexpr int64_t ATTENTION_KEYS = 64;     // what padded_length is a multiple of
constexpr int64_t ATTENTION_SIZE = 16;     // what padded_size is a multiple of

struct Attention {
  Type type;
  const void* qkv;       // [B, T, H + 2 G, K]: queries, keys, values
  const int64_t* start;  // [B, T]: a query reaches keys from here to itself; null: from 0
  int64_t batch, length, heads, kv_heads, size;
  int64_t padded_length, padded_size;  // of packed keys and values
};

struct AttentionForward : Attention {
  void* packed;  // [B, G, 2, padded_length, padded_size]: keys and values as matrix products read them
  void* out;     // [B, T, H K]
  float* lse;    // [B, H, T]: log of the sum of e^score
};

struct AttentionBackward : Attention {
  const void *grad, *out;  // [B, T, H K]
  const float* lse;
  void* dqkv;
  float* partial;  // [B, G, parts, 2, T, K]: gradients of keys and values from a part of the heads; null for one part
  int64_t parts;   // the query heads of a key/value head are cut into so many, each a task of its own
};

}  // namespace megalite

// Keys and values [begin, end) of B G: `packed` from `qkv`.
MEGALITE_CPU_KERNEL(attention_pack, (const AttentionForward& a, int64_t begin, int64_t end), (a, begin, end))
// Blocks [begin, end) of B H ceil(T / ATTENTION_QUERIES).
MEGALITE_CPU_KERNEL(attention_forward, (const AttentionForward& a, int64_t begin, int64_t end), (a, begin, end))
// Parts [begin, end) of B G parts.
MEGALITE_CPU_KERNEL(attention_backward, (const AttentionBackward& a, int64_t begin, int64_t end), (a, begin, end))
// Keys and values [begin, end) of B G: `dqkv` from `partial`.
MEGALITE_CPU_KERNEL(attention_add_parts, (const AttentionBackward& a, int64_t begin, int64_t end), (a, begin, end))
