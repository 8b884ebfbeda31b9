// The product of weight gradients on the CPU: into[rows, columns] = or += grad^T x, summed over tokens.
#pragma once

#include "cpu/isa.h"
#include "types.h"

namespace megalite {

// Of a tile of the result; its depth is a whole number of steps of so many tokens.
struct TileShape {
  int64_t rows, columns, step;
};

// Panels of a tile's columns of x: [panels, steps, columns * step], filled up with zeros to whole steps.
struct PackPanels {
  Type type;
  const void* x;
  int64_t stride, tokens, columns;
  void* to;
};

struct WeightGradient {
  Type type;
  const void *grad, *panels;
  float* into;  // [rows, columns], contiguous
  int64_t grad_stride, tokens, rows, columns, block;
  bool add;
};

}  // namespace megalite

MEGALITE_CPU_KERNEL(tile_shape, (Type type, TileShape& shape), (type, shape))
MEGALITE_CPU_KERNEL(pack_panels, (const PackPanels& a, int64_t begin, int64_t end), (a, begin, end))
// Blocks of `block` rows [begin, end); `block` is a multiple of the tile's rows.
MEGALITE_CPU_KERNEL(weight_gradient, (const WeightGradient& a, int64_t begin, int64_t end), (a, begin, end))
