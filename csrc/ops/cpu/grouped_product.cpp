#include "../grouped_product.h"

#include <algorithm>
#include <memory>

#include "tile.h"

namespace megalite::cpu::MEGALITE_ISA {

namespace {

// Rows for columns, of WIDTH vectors: log2(WIDTH) times the first half is zipped with the second.
inline void transpose(bits (&rows)[WIDTH]) {
  bits low, high;
  for (int i = 0; i < WIDTH; ++i) {
    low[i] = i / 2 + i % 2 * WIDTH;
    high[i] = low[i] + WIDTH / 2;
  }
  for (int round = 1; round < WIDTH; round *= 2) {
    bits zipped[WIDTH];
    for (int i = 0; i < WIDTH / 2; ++i) {
      zipped[2 * i] = __builtin_shuffle(rows[i], rows[i + WIDTH / 2], low);
      zipped[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + WIDTH / 2], high);
    }
    std::copy(zipped, zipped + WIDTH, rows);
  }
}

// Columns [0, width) of W = weight^T as [steps, TILE_COLUMNS, STEP], zeros where the width or the depth end.
template <class T>
void pack_rows(const T* weight, int64_t depth, int64_t width, T* to) {
  const int64_t steps = (depth + STEP<T> - 1) / STEP<T>, whole = depth / STEP<T>;
  if (width < TILE_COLUMNS || whole < steps) std::fill(to, to + steps * TILE_COLUMNS * STEP<T>, T{});
  static_assert(sizeof(T) * STEP<T> == 4, "a step of a column is a number of a vector");
  const int64_t columns = width / WIDTH * WIDTH, squares = whole / WIDTH * WIDTH;
  for (int64_t step = 0; step < squares; step += WIDTH)
    for (int64_t column = 0; column < columns; column += WIDTH) {
      bits square[WIDTH];
      for (int i = 0; i < WIDTH; ++i) square[i] = load_vector<bits>(weight + (column + i) * depth + step * STEP<T>);
      transpose(square);
      for (int i = 0; i < WIDTH; ++i) store_vector(to + ((step + i) * TILE_COLUMNS + column) * STEP<T>, square[i]);
    }
  for (int64_t column = 0; column < width; ++column)
    for (int64_t step = column < columns ? squares : 0; step < whole; ++step)
      std::memcpy(to + (step * TILE_COLUMNS + column) * STEP<T>, weight + column * depth + step * STEP<T>, 4);
  if (whole < steps)
    for (int64_t column = 0; column < width; ++column)
      to[(whole * TILE_COLUMNS + column) * STEP<T>] = weight[column * depth + depth - 1];
}

// Columns [0, width) of W = weight [depth, stride] likewise.
template <class T>
void pack_columns(const T* weight, int64_t stride, int64_t depth, int64_t width, T* to) {
  for (int64_t at = 0; at < depth; at += STEP<T>, to += TILE_COLUMNS * STEP<T>) {
    const T* from = weight + at * stride;
    if (width < TILE_COLUMNS || at + STEP<T> > depth) std::fill(to, to + TILE_COLUMNS * STEP<T>, T{});
    if constexpr (STEP<T> == 2) {
      if (at + 1 < depth) {
        const T* second = from + stride;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
          const uint32_t pair = from[i].bits | static_cast<uint32_t>(second[i].bits) << 16;
          std::memcpy(to + 2 * i, &pair, 4);
        }
        continue;
      }
    }
    for (int64_t i = 0; i < width; ++i) to[i * STEP<T>] = from[i];
  }
}

template <int R, class T>
void rows_of(const T* x, int64_t depth, const T* panel, T* out, int64_t stride, int64_t width) {
  vec acc[R][TILE_VECTORS] = {};
  const int64_t whole = depth / STEP<T>;
  tile<R, TILE_VECTORS>(whole, x, depth, STEP<T>, panel, TILE_COLUMNS * STEP<T>, acc);
  if (whole * STEP<T> < depth) {  // the last of an odd number of bf16, and a zero
    T last[R][STEP<T>] = {};
    for (int r = 0; r < R; ++r) last[r][0] = x[r * depth + depth - 1];
    tile<R, TILE_VECTORS>(1, last[0], STEP<T>, STEP<T>, panel + whole * TILE_COLUMNS * STEP<T>, 0, acc);
  }
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

template <class T>
void product(const GroupedProduct& a, int64_t begin, int64_t end) {
  const int64_t steps = (a.depth + STEP<T> - 1) / STEP<T>;
  std::unique_ptr<T[]> panel(new T[std::max<int64_t>(1, steps * TILE_COLUMNS * STEP<T>)]);
  for (int64_t at = begin; at < end; ++at) {
    // Neighbours in this order are of different experts, so that threads share each of them.
    const int64_t expert = at % a.experts, column = at / a.experts * TILE_COLUMNS;
    const int64_t first = a.first[expert], last = a.first[expert + 1];
    if (first == last) continue;
    const int64_t width = std::min<int64_t>(TILE_COLUMNS, a.columns - column);
    const T* weight = static_cast<const T*>(a.weight) + expert * a.columns * a.depth;
    if (a.transpose)
      pack_columns(weight + column, a.columns, a.depth, width, panel.get());
    else
      pack_rows(weight + column * a.depth, a.depth, width, panel.get());
    for (int64_t row = first; row < last; row += TILE_ROWS)
      some_rows(
          std::min<int64_t>(TILE_ROWS, last - row), static_cast<const T*>(a.x) + row * a.depth, a.depth, panel.get(),
          static_cast<T*>(a.out) + row * a.columns + column, a.columns, width);
  }
}

}  // namespace

void grouped_product_columns(int64_t& columns) { columns = TILE_COLUMNS; }

void grouped_product(const GroupedProduct& a, int64_t begin, int64_t end) {
  MEGALITE_BY_TYPE(a.type, product, a, begin, end);
}

}  // namespace megalite::cpu::MEGALITE_ISA
