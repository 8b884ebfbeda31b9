// The product of weight gradients on the CPU: into[rows, columns] = or += grad^T x, summed over tokens.
#pragma once

#include "cpu/isa.h"
#include "types.h"

namespace megalite {

struct TileShape {
  int64_t rows, columns, bf16_step;
};

// Panels of a tile's columns of x: [panels, steps, columns * step], filled up with zeros.
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

MEGALITE_CPU_KERNEL(tile_shape, (TileShape& shape), (shape))
MEGALITE_CPU_KERNEL(pack_panels, (const PackPanels& a, int64_t begin, int64_t end), (a, begin, end))
// Blocks of `block` rows [begin, end); `block` is a multiple of the tile's rows.
MEGALITE_CPU_KERNEL(weight_gradient, (const WeightGradient& a, int64_t begin, int64_t end), (a, begin, end))
