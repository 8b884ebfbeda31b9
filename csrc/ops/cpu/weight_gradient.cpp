#include "../weight_gradient.h"

#include <algorithm>

#include "amx.h"
#include "panel.h"

namespace megalite::cpu::MEGALITE_ISA {

namespace {

// Steps of the depth, as many as what computes here wants.
template <class T>
int64_t steps_of(int64_t tokens) {
  const int64_t at_once = on_amx<T>(0) ? AMX_DEPTH : STEP<T>;
  return (tokens + at_once - 1) / at_once * (at_once / STEP<T>);
}

template <class T>
void pack(const PackPanels& a, int64_t begin, int64_t end) {
  const int64_t steps = steps_of<T>(a.tokens), step_size = TILE_COLUMNS * STEP<T>;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * TILE_COLUMNS;
    const T* x = static_cast<const T*>(a.x) + first;
    T* to = static_cast<T*>(a.to) + panel * steps * step_size;
    for (int64_t step = 0; step < steps; ++step, to += step_size) {
      const int64_t token = step * STEP<T>;
      if (token < a.tokens)
        interleave<TILE_COLUMNS>(x + token * a.stride, a.stride, a.tokens - token, a.columns - first, to);
      else
        std::fill(to, to + step_size, T{});
    }
  }
}

// Rows [0, width) of the result, the columns of [tokens, width], as tiles [steps, TILE_ROWS * STEP]. GROUP of them at a
// time, so that whole cache lines are read.
template <class T>
void pack_tiles(const T* grad, int64_t stride, int64_t tokens, int64_t width, T* to) {
  constexpr int64_t GROUP = 8, TILE = TILE_ROWS * STEP<T>;
  const int64_t steps = steps_of<T>(tokens);
  for (int64_t first = 0; first < width; first += GROUP * TILE_ROWS) {
    const int64_t tiles = std::min((width - first + TILE_ROWS - 1) / TILE_ROWS, GROUP);
    T* group = to + first / TILE_ROWS * steps * TILE;
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t token = step * STEP<T>;
      const T* from = grad + token * stride + first;
      // The hardware does not foresee rows that lie pages apart.
      for (int s = 0; s < STEP<T>; ++s)
        for (int64_t i = 0; i < GROUP * TILE_ROWS; i += 64 / sizeof(T))
          __builtin_prefetch(from + (12 * STEP<T> + s) * stride + i);
      T line[GROUP * TILE];
      interleave<GROUP * TILE_ROWS>(from, stride, tokens - token, width - first, line);
      for (int64_t i = 0; i < tiles; ++i)
        std::memcpy(group + (i * steps + step) * TILE, line + i * TILE, sizeof(T) * TILE);
    }
  }
}

template <int R, class T>
void tile_of(int64_t steps, const T* a, const T* b, float* into, int64_t stride, int64_t columns, bool add) {
  vec acc[R][TILE_VECTORS] = {};
  tile<R, TILE_VECTORS>(steps, a, STEP<T>, TILE_ROWS * STEP<T>, b, TILE_COLUMNS * STEP<T>, acc);
  for (int r = 0; r < R; ++r, into += stride) {
    float row[TILE_COLUMNS];
    std::memcpy(row, acc[r], sizeof row);
    if (columns == TILE_COLUMNS) {
#pragma omp simd
      for (int i = 0; i < TILE_COLUMNS; ++i) into[i] = add ? into[i] + row[i] : row[i];
    } else {
      for (int64_t i = 0; i < columns; ++i) into[i] = add ? into[i] + row[i] : row[i];
    }
  }
}

template <class T>
void tile_of_rows(
    int64_t rows, int64_t steps, const T* a, const T* b, float* into, int64_t stride, int64_t columns, bool add) {
  static_assert(TILE_ROWS == 6);
  switch (rows) {
    case 1: return tile_of<1>(steps, a, b, into, stride, columns, add);
    case 2: return tile_of<2>(steps, a, b, into, stride, columns, add);
    case 3: return tile_of<3>(steps, a, b, into, stride, columns, add);
    case 4: return tile_of<4>(steps, a, b, into, stride, columns, add);
    case 5: return tile_of<5>(steps, a, b, into, stride, columns, add);
    default: return tile_of<6>(steps, a, b, into, stride, columns, add);
  }
}

#ifdef MEGALITE_AMX

// Rows [0, width) of the result, the columns of [tokens, width], as rows of `depth` tokens, filled up with zeros, that lie
// `to_stride` apart. Squares of 16 pairs of tokens are transposed.
void pack_transposed(
    const bf16* grad, int64_t stride, int64_t tokens, int64_t depth, int64_t width, bf16* to, int64_t to_stride) {
  static_assert(WIDTH == AMX_ROWS);
  for (int64_t token = 0; token < depth; token += AMX_DEPTH)
    for (int64_t row = 0; row < width; row += WIDTH) {
      bits square[WIDTH];
      for (int64_t step = 0; step < WIDTH; ++step) {
        const int64_t at = token + step * STEP<bf16>;
        bf16 pairs[WIDTH * STEP<bf16>] = {};
        if (at < tokens) interleave<WIDTH>(grad + at * stride + row, stride, tokens - at, width - row, pairs);
        square[step] = load_vector<bits>(pairs);
      }
      transpose(square);
      for (int64_t r = 0; r < std::min<int64_t>(WIDTH, width - row); ++r)
        store_vector(to + (row + r) * to_stride + token, square[r]);
    }
}

void product_by_amx(const WeightGradient& a, int64_t begin, int64_t end) {
  const int64_t depth = steps_of<bf16>(a.tokens) * STEP<bf16>;
  const int64_t at_once = panels_at_once(depth * TILE_COLUMNS * sizeof(bf16)) * TILE_COLUMNS;
  const int64_t stride = depth + AMX_DEPTH;  // rows a power of two apart would share a line of the cache
  const Buffer<bf16> rows_of_grad(a.block * stride);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * a.block, rows = std::min(a.block, a.rows - first);
    pack_transposed(
        static_cast<const bf16*>(a.grad) + first, a.grad_stride, a.tokens, depth, rows, rows_of_grad.at, stride);
    for (int64_t column = 0; column < a.columns; column += at_once) {
      float* into = a.into + first * a.columns + column;
      amx_product(
          rows_of_grad.at, stride, rows, depth, static_cast<const bf16*>(a.panels) + column * depth,
          std::min(at_once, a.columns - column),
          [&](int64_t row, int64_t count, int64_t from, int64_t wanted, const AmxSums& sums) {
            for (int64_t r = 0; r < count; ++r) {
              float* to = into + (row + r) * a.columns + from;
#pragma omp simd
              for (int64_t i = 0; i < wanted; ++i) to[i] = a.add ? to[i] + sums[r][i] : sums[r][i];
            }
          });
    }
  }
}

#endif

template <class T>
void product(const WeightGradient& a, int64_t begin, int64_t end) {
#ifdef MEGALITE_AMX
  if (on_amx<T>(0)) return product_by_amx(a, begin, end);
#endif
  const int64_t steps = steps_of<T>(a.tokens);
  const int64_t tile_size = steps * STEP<T> * TILE_ROWS;
  const Buffer<T> tiles(a.block / TILE_ROWS * tile_size);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * a.block, rows = std::min(a.block, a.rows - first);
    pack_tiles(static_cast<const T*>(a.grad) + first, a.grad_stride, a.tokens, rows, tiles.at);
    for (int64_t column = 0; column < a.columns; column += TILE_COLUMNS) {
      const T* panel = static_cast<const T*>(a.panels) + column / TILE_COLUMNS * panel_size<T>(a.tokens);
      for (int64_t row = 0; row < rows; row += TILE_ROWS)
        tile_of_rows(
            std::min<int64_t>(TILE_ROWS, rows - row), steps, tiles.at + row / TILE_ROWS * tile_size, panel,
            a.into + (first + row) * a.columns + column, a.columns,
            std::min<int64_t>(TILE_COLUMNS, a.columns - column), a.add);
    }
  }
}

}  // namespace

void tile_shape(Type type, TileShape& shape) {
  shape = {TILE_ROWS, TILE_COLUMNS, type == Type::f32 ? STEP<float> : STEP<bf16>};
  if (type != Type::f32 && on_amx<bf16>(0)) shape = {2 * AMX_ROWS, TILE_COLUMNS, AMX_DEPTH};
}

void pack_panels(const PackPanels& a, int64_t begin, int64_t end) { MEGALITE_BY_TYPE(a.type, pack, a, begin, end); }

void weight_gradient(const WeightGradient& a, int64_t begin, int64_t end) {
  MEGALITE_BY_TYPE(a.type, product, a, begin, end);
}

}  // namespace megalite::cpu::MEGALITE_ISA
