#include "../grouped_product.h"

#include "amx.h"
#include "panel.h"

namespace megalite::cpu::MEGALITE_ISA {

namespace {

template <int R, class T>
void rows_of(const T* x, int64_t depth, const T* panel, T* out, int64_t stride, int64_t width) {
  vec acc[R][TILE_VECTORS] = {};
  multiply_rows(x, depth, panel, acc);
  for (int r = 0; r < R; ++r, out += stride) {
    float row[TILE_COLUMNS];
    std::memcpy(row, acc[r], sizeof row);
    if (width == TILE_COLUMNS) {
#pragma omp simd
      for (int i = 0; i < TILE_COLUMNS; ++i) out[i] = from_float<T>(row[i]);
    } else {
      for (int64_t i = 0; i < width; ++i) out[i] = from_float<T>(row[i]);
    }
  }
}

template <class T>
void some_rows(int64_t rows, const T* x, int64_t depth, const T* panel, T* out, int64_t stride, int64_t width) {
  static_assert(TILE_ROWS == 6);
  switch (rows) {
    case 1: return rows_of<1>(x, depth, panel, out, stride, width);
    case 2: return rows_of<2>(x, depth, panel, out, stride, width);
    case 3: return rows_of<3>(x, depth, panel, out, stride, width);
    case 4: return rows_of<4>(x, depth, panel, out, stride, width);
    case 5: return rows_of<5>(x, depth, panel, out, stride, width);
    default: return rows_of<6>(x, depth, panel, out, stride, width);
  }
}

// Columns [column, column + width) of an expert's rows, by packed panels of its weight.
template <class T>
void columns_of(const GroupedProduct& a, int64_t expert, int64_t column, int64_t width, const T* panels) {
  const int64_t first = a.first[expert], last = a.first[expert + 1];
  const T* x = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out) + column;
  if (on_amx<T>(a.depth))
    return amx_product(
        x + first * a.depth, a.depth, last - first, a.depth, panels, width,
        [&](int64_t row, int64_t count, int64_t from, int64_t wanted, const AmxSums& sums) {
          for (int64_t r = 0; r < count; ++r) amx_round(sums[r], wanted, out + (first + row + r) * a.columns + from);
        });
  for (int64_t at = 0; at < width; at += TILE_COLUMNS, panels += panel_size<T>(a.depth))
    for (int64_t row = first; row < last; row += TILE_ROWS)
      some_rows(
          std::min<int64_t>(TILE_ROWS, last - row), x + row * a.depth, a.depth, panels, out + row * a.columns + at,
          a.columns, std::min<int64_t>(TILE_COLUMNS, width - at));
}

template <class T>
void product(const GroupedProduct& a, int64_t begin, int64_t end) {
  const int64_t size = panel_size<T>(a.depth), blocks = (a.columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
  const int64_t most = panels_at_once(size * sizeof(T));
  const Buffer<T> panels(std::min(most, blocks) * size);
  for (int64_t expert = 0; expert < a.experts; ++expert) {
    const int64_t work = (a.first[expert + 1] - a.first[expert]) * TILE_COLUMNS, before = a.first[expert] * a.columns;
    if (work == 0) continue;
    // The first block that begins at `part` of all work or behind it.
    const auto block_at = [&](int64_t part) { return std::clamp<int64_t>((part - before + work - 1) / work, 0, blocks); };
    const T* weight = static_cast<const T*>(a.weight) + expert * a.columns * a.depth;
    const int64_t stop = std::min(block_at(end) * TILE_COLUMNS, a.columns);
    for (int64_t column = block_at(begin) * TILE_COLUMNS; column < stop; column += most * TILE_COLUMNS) {
      const int64_t width = std::min(most * TILE_COLUMNS, stop - column);
      if (a.transpose)
        pack_columns(weight + column, a.columns, a.depth, width, panels.at);
      else
        pack_rows(weight + column * a.depth, a.depth, width, panels.at);
      columns_of(a, expert, column, width, panels.at);
    }
  }
}

}  // namespace

void grouped_product(const GroupedProduct& a, int64_t begin, int64_t end) {
  MEGALITE_BY_TYPE(a.type, product, a, begin, end);
}

}  // namespace megalite::cpu::MEGALITE_ISA
