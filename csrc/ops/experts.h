// Arguments of the kernels of a mixture of experts, the same for the CPU and CUDA. All tensors are contiguous. A token has
// `slots` experts; a row is a token at one of them, and rows are sorted by expert.
#pragma once

#include "cpu/isa.h"
#include "types.h"

namespace megalite {

struct TopK {
  const float* scores;  // [tokens, experts]
  int64_t* index;       // [tokens, slots], ascending
  int64_t tokens, experts, slots;
};

struct CountRows {
  const int64_t* index;  // [visits]
  int64_t* counts;       // [experts]
  int64_t visits, experts;
};

struct SortByExpert {
  const int64_t *index, *counts;  // [tokens, slots] and [experts]
  int64_t *token, *row;           // [visits] each: of each row its token, of each visit its row
  int64_t visits, slots, experts;
};

struct GatherRows {
  Type type;
  const void* x;         // [tokens, size]
  const int64_t* token;  // [rows]
  void* out;             // [rows, size]
  int64_t rows, size;
};

struct SumRows {
  Type type;
  const void* rows;     // [rows, size]
  const int64_t* row;   // [tokens, slots]
  const float* weight;  // [tokens, slots]; may be null
  void* out;            // [tokens, size]
  int64_t tokens, slots, size;
};

struct SumRowsBackward {
  Type type;
  const void *grad, *rows;  // [tokens, size] and [rows, size]
  const int64_t* row;       // [tokens, slots]
  const float* weight;      // [tokens, slots]
  void* d_rows;             // [rows, size]
  float* d_weight;          // [tokens, slots]
  int64_t tokens, slots, size;
};

}  // namespace megalite

// Tokens [begin, end).
MEGALITE_CPU_KERNEL(top_k, (const TopK& a, int64_t begin, int64_t end), (a, begin, end))
MEGALITE_CPU_KERNEL(sum_rows, (const SumRows& a, int64_t begin, int64_t end), (a, begin, end))
MEGALITE_CPU_KERNEL(sum_rows_backward, (const SumRowsBackward& a, int64_t begin, int64_t end), (a, begin, end))
// Rows [begin, end).
MEGALITE_CPU_KERNEL(gather_rows, (const GatherRows& a, int64_t begin, int64_t end), (a, begin, end))
// All at once.
MEGALITE_CPU_KERNEL(count_rows, (const CountRows& a), (a))
MEGALITE_CPU_KERNEL(sort_by_expert, (const SortByExpert& a), (a))

namespace megalite::cuda {
void top_k(const TopK& a, void* stream);
void count_rows(const CountRows& a, void* stream);
void sort_by_expert(const SortByExpert& a, void* stream);
void gather_rows(const GatherRows& a, void* stream);
void sum_rows(const SumRows& a, void* stream);
void sum_rows_backward(const SumRowsBackward& a, void* stream);
}  // namespace megalite::cuda
