#include "../grouped_product.h"

#include <type_traits>

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

// Columns [column, column + width) of an expert's rows, by a packed panel of its weight.
template <class T>
void columns_of(const GroupedProduct& a, int64_t expert, int64_t column, const T* panel) {
  const int64_t first = a.first[expert], last = a.first[expert + 1];
  const int64_t width = std::min<int64_t>(TILE_COLUMNS, a.columns - column);
  const T* x = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out) + column;
#ifdef MEGALITE_AMX
  if constexpr (std::is_same_v<T, bf16>) {
    if (isa() == amx && a.depth % AMX_DEPTH == 0)
      return amx_product(
          x + first * a.depth, a.depth, last - first, a.depth, panel, width,
          [&](int64_t row, int64_t count, int64_t from, int64_t wanted, const AmxSums& sums) {
            for (int64_t r = 0; r < count; ++r)
              amx_round(sums[r], wanted, out + (first + row + r) * a.columns + from);
          });
  }
#endif
  for (int64_t row = first; row < last; row += TILE_ROWS)
    some_rows(
        std::min<int64_t>(TILE_ROWS, last - row), x + row * a.depth, a.depth, panel, out + row * a.columns, a.columns,
        width);
}

template <class T>
void product(const GroupedProduct& a, int64_t begin, int64_t end) {
  const int64_t steps = (a.depth + STEP<T> - 1) / STEP<T>;
  const Buffer<T> panel(steps * TILE_COLUMNS * STEP<T>);
  // Neighbours among the blocks are of different experts, so that threads share each of them. A thread takes all of its
  // blocks of one expert, whose rows stay in its cache, before the next.
  for (int64_t next = begin; next < std::min(begin + a.experts, end); ++next) {
    const int64_t expert = next % a.experts;
    if (a.first[expert] == a.first[expert + 1]) continue;
    const T* weight = static_cast<const T*>(a.weight) + expert * a.columns * a.depth;
    for (int64_t block = next; block < end; block += a.experts) {
      const int64_t column = block / a.experts * TILE_COLUMNS;
      const int64_t width = std::min<int64_t>(TILE_COLUMNS, a.columns - column);
      if (a.transpose)
        pack_columns(weight + column, a.columns, a.depth, width, panel.at);
      else
        pack_rows(weight + column * a.depth, a.depth, width, panel.at);
      columns_of(a, expert, column, panel.at);
    }
  }
}

}  // namespace

void grouped_product_columns(int64_t& columns) { columns = TILE_COLUMNS; }

void grouped_product(const GroupedProduct& a, int64_t begin, int64_t end) {
  MEGALITE_BY_TYPE(a.type, product, a, begin, end);
}

}  // namespace megalite::cpu::MEGALITE_ISA
