// Panels: a tile's columns of a matrix, packed so that the tile reads them one after another along the depth. They are
// multiplied by rows of x, which are read where they lie.
#pragma once

#include <algorithm>

#include "tile.h"

namespace megalite::cpu::MEGALITE_ISA {

// How many packed panels of so many bytes stay in a core's L2 while rows pass by.
inline int64_t panels_at_once(int64_t bytes) { return (1 << 20) / std::clamp<int64_t>(bytes, 1, 1 << 20); }

// Elements of a packed panel.
template <class T>
constexpr int64_t panel_size(int64_t depth) { return round_up(depth, STEP<T>) * TILE_COLUMNS; }

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

// A panel of columns [0, width) of W = weight^T as [steps, TILE_COLUMNS, STEP], zeros where the width or the depth end.
template <class T>
inline void pack_rows_of_panel(const T* weight, int64_t depth, int64_t width, T* to) {
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

// Columns [0, width) of W = weight^T as panels that follow one another.
template <class T>
inline void pack_rows(const T* weight, int64_t depth, int64_t width, T* to) {
  for (int64_t first = 0; first < width; first += TILE_COLUMNS, to += panel_size<T>(depth))
    pack_rows_of_panel(weight + first * depth, depth, std::min<int64_t>(TILE_COLUMNS, width - first), to);
}

template <class T>
inline void interleave_whole(const T* from, int64_t stride, int64_t columns, T* to) {
  if constexpr (STEP<T> == 2) {
    const T* second = from + stride;
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) {
      const uint32_t pair = from[i].bits | static_cast<uint32_t>(second[i].bits) << 16;
      std::memcpy(to + 2 * i, &pair, 4);
    }
  } else {
    std::memcpy(to, from, sizeof(T) * columns);
  }
}

// The next step of a [depth, width], its elements of the depth interleaved; zeros where the depth or the width end.
template <int COLUMNS, class T>
inline void interleave(const T* from, int64_t stride, int64_t depth, int64_t width, T* to) {
  if (width >= COLUMNS && depth >= STEP<T>) return interleave_whole(from, stride, COLUMNS, to);
  std::fill(to, to + COLUMNS * STEP<T>, T{});
  if (depth >= STEP<T>) return interleave_whole(from, stride, width, to);
  for (int64_t i = 0; i < std::min<int64_t>(width, COLUMNS); ++i) to[i * STEP<T>] = from[i];
}

// Columns [0, width) of W = weight [depth, stride] likewise. Whole rows are read, as they lie in memory.
template <class T>
inline void pack_columns(const T* weight, int64_t stride, int64_t depth, int64_t width, T* to) {
  for (int64_t at = 0; at < depth; at += STEP<T>)
    for (int64_t first = 0; first < width; first += TILE_COLUMNS)
      interleave<TILE_COLUMNS>(
          weight + at * stride + first, stride, depth - at, width - first,
          to + first / TILE_COLUMNS * panel_size<T>(depth) + at * TILE_COLUMNS);
}

// acc += R rows of x [rows, depth] times the first C vectors of columns of a panel.
template <int R, int C, class T>
inline void multiply_rows(const T* x, int64_t depth, const T* panel, vec (&acc)[R][C]) {
  const int64_t whole = depth / STEP<T>;
  tile<R, C>(whole, x, depth, STEP<T>, panel, TILE_COLUMNS * STEP<T>, acc);
  if (whole * STEP<T> < depth) {  // the last of an odd number of bf16, and a zero
    T last[R][STEP<T>] = {};
    for (int r = 0; r < R; ++r) last[r][0] = x[r * depth + depth - 1];
    tile<R, C>(1, last[0], STEP<T>, STEP<T>, panel + whole * TILE_COLUMNS * STEP<T>, 0, acc);
  }
}

}  // namespace megalite::cpu::MEGALITE_ISA
