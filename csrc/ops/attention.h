// Arguments of the attention kernels of the CPU. Letters: B batch, T queries, S keys, H query heads, G key/value heads,
// K head size.
#pragma once

#include "cpu/isa.h"
#include "types.h"

namespace megalite {

constexpr int64_t ATTENTION_QUERIES = 96;  // of one head that are worked on together
constexpr int64_t ATTENTION_KEYS = 64;     // what padded_length is a multiple of
constexpr int64_t ATTENTION_SIZE = 16;     // what padded_size is a multiple of

struct Attention {
  Type type;
  const void *q, *k, *v;                // [B, T, H, K], and [B, S, G, K] twice; tokens lie q_token or k_token apart
  int64_t q_token, k_token;             // elements from one token to the next
  const int64_t *first, *end;           // [B, T], both ascending: a query reaches keys [first, end); where null, it
                                        // reaches from 0, and to itself
  const float* bias;                    // [1 or B, H, T, S], added to the scaled scores; null: none
  int64_t bias_batch, bias_head, bias_row;  // its strides
  float scale;                          // of the scores, above 0
  int64_t batch, length, sources, heads, kv_heads, size;
  int64_t padded_length, padded_size;   // of packed keys and values
};

struct AttentionForward : Attention {
  void* packed;  // [B, G, 2, padded_length, padded_size]: keys and values as matrix products read them
  void* out;     // [B, T, H K]
  float* lse;    // [B, H, T]: log of the sum of e^score; 0 for a query that reaches no key
};

struct AttentionBackward : Attention {
  const void *grad, *out;  // [B, T, H K]
  const float* lse;
  void *dq, *dk, *dv;      // as q, k, v
  float* partial;  // [B, G, parts, 2, S, K]: gradients of keys and values from a part of the heads; null for one part
  int64_t parts;   // the query heads of a key/value head are cut into so many, each a task of its own
  float* dbias;    // [1 or B, H, T, S], zeros at first; null: not asked for
  int64_t dbias_batch;
};

}  // namespace megalite

// Keys and values [begin, end) of B G: `packed` from `qkv`.
MEGALITE_CPU_KERNEL(attention_pack, (const AttentionForward& a, int64_t begin, int64_t end), (a, begin, end))
// Blocks [begin, end) of B H ceil(T / ATTENTION_QUERIES).
MEGALITE_CPU_KERNEL(attention_forward, (const AttentionForward& a, int64_t begin, int64_t end), (a, begin, end))
// Parts [begin, end) of G parts B: the rows of a batch come one after another, as they add to one gradient of the bias.
MEGALITE_CPU_KERNEL(attention_backward, (const AttentionBackward& a, int64_t begin, int64_t end), (a, begin, end))
// Keys and values [begin, end) of B G: `dqkv` from `partial`.
MEGALITE_CPU_KERNEL(attention_add_parts, (const AttentionBackward& a, int64_t begin, int64_t end), (a, begin, end))
