// The matrix products of a Newton-Schulz step on the CPU, for one matrix.
#pragma once

#include "cpu/isa.h"
#include "types.h"

namespace megalite {

// out[rows, columns] = alpha a b + beta add, with a[rows, depth] and contiguous tensors of one type; `add` is like `out`,
// or null. Each number of the result is summed in the order of the depth.
struct AddedProduct {
  Type type;
  const void *a, *b;  // b[depth, columns]; in a symmetric product null: a transposed
  const void* add;
  void* out;
  int64_t rows, columns, depth;
  float alpha, beta;
};

}  // namespace megalite

// Tiles of columns [begin, end).
MEGALITE_CPU_KERNEL(added_product, (const AddedProduct& a, int64_t begin, int64_t end), (a, begin, end))
// The same of a a^T + add, which is symmetric: below the diagonal it is computed, and copied from there.
MEGALITE_CPU_KERNEL(symmetric_product, (const AddedProduct& a, int64_t begin, int64_t end), (a, begin, end))
// Columns of a tile.
MEGALITE_CPU_KERNEL(added_product_columns, (int64_t& columns), (columns))
