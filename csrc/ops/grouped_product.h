// The products of a mixture of experts on the CPU: each expert's matrix with the rows of its tokens.
#pragma once

#include "cpu/isa.h"
#include "types.h"

namespace megalite {

// out[rows, columns] = x[rows, depth] · W, where W is weight[columns, depth] transposed or, if `transpose`, weight[depth,
// columns]. Every row is summed in the order of the depth, whatever the other rows are.
struct GroupedProduct {
  Type type;
  const void *x, *weight;  // rows of all experts one after another; [experts, columns, depth] or [experts, depth, columns]
  void* out;
  const int64_t* first;  // [experts + 1]: the first row of each expert, and the end
  int64_t experts, columns, depth;
  bool transpose;
};

}  // namespace megalite

// A part of the work, which is all results one after another: an expert's block of columns is computed, for all of its
// rows, by the part in which it begins.
MEGALITE_CPU_KERNEL(grouped_product, (const GroupedProduct& a, int64_t begin, int64_t end), (a, begin, end))
