#include "../router.h"

#include "panel.h"

namespace megalite::cpu::MEGALITE_ISA {

namespace {

constexpr int64_t TOKENS = 128;  // whose columns stay in the nearest cache for a weight's gradient

template <class T>
void as_floats(const T* from, int64_t count, float* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

// Logits of the first `width` experts of a panel for `rows` rows of x, of which there are TILE_ROWS.
template <int C>
void logits_of(const float* x, int64_t size, const float* panel, int64_t rows, int64_t width, float* to, int64_t stride) {
  vec acc[TILE_ROWS][C] = {};
  multiply_rows(x, size, panel, acc);
  for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * stride, acc[r], sizeof(float) * width);
}

template <class T>
void logits(const RouterLogits& a, int64_t begin, int64_t end) {
  const Buffer<float> weight(a.experts * a.size), panels(round_up(a.experts, TILE_COLUMNS) * a.size), x(TILE_ROWS * a.size);
  as_floats(static_cast<const T*>(a.weight), a.experts * a.size, weight.at);
  pack_rows(weight.at, a.size, a.experts, panels.at);
  std::fill(x.at, x.at + TILE_ROWS * a.size, 0.0f);
  for (int64_t token = begin; token < end; token += TILE_ROWS) {
    const int64_t rows = std::min<int64_t>(TILE_ROWS, end - token);
    as_floats(static_cast<const T*>(a.x) + token * a.size, rows * a.size, x.at);
    for (int64_t expert = 0; expert < a.experts; expert += TILE_COLUMNS) {
      const int64_t width = std::min<int64_t>(TILE_COLUMNS, a.experts - expert);
      const float* panel = panels.at + expert * a.size;
      float* to = a.logits + token * a.experts + expert;
      static_assert(TILE_VECTORS <= 4);
      switch ((width + WIDTH - 1) / WIDTH) {
        case 1: logits_of<1>(x.at, a.size, panel, rows, width, to, a.experts); break;
        case 2: logits_of<2>(x.at, a.size, panel, rows, width, to, a.experts); break;
        case 3: logits_of<3>(x.at, a.size, panel, rows, width, to, a.experts); break;
        default: logits_of<4>(x.at, a.size, panel, rows, width, to, a.experts);
      }
    }
  }
}

template <class T>
void input_gradient(const RouterInputGradient& a, int64_t begin, int64_t end) {
  const int64_t stride = round_up(a.size, TILE_COLUMNS);
  const Buffer<float> weight(a.experts * stride), grad(TILE_ROWS * a.experts);
  std::fill(weight.at, weight.at + a.experts * stride, 0.0f);
  for (int64_t e = 0; e < a.experts; ++e)
    as_floats(static_cast<const T*>(a.weight) + e * a.size, a.size, weight.at + e * stride);
  std::fill(grad.at, grad.at + TILE_ROWS * a.experts, 0.0f);
  for (int64_t token = begin; token < end; token += TILE_ROWS) {
    const int64_t rows = std::min<int64_t>(TILE_ROWS, end - token);
    as_floats(a.grad + token * a.experts, rows * a.experts, grad.at);
    for (int64_t column = 0; column < a.size; column += TILE_COLUMNS) {
      const int64_t width = std::min<int64_t>(TILE_COLUMNS, a.size - column);
      vec acc[TILE_ROWS][TILE_VECTORS] = {};
      tile<TILE_ROWS, TILE_VECTORS>(a.experts, grad.at, a.experts, 1, weight.at + column, stride, acc);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (token + r) * a.size + column;
        const T* before = static_cast<const T*>(a.before) + at;
        T* out = static_cast<T*>(a.out) + at;
        float row[TILE_COLUMNS];
        std::memcpy(row, acc[r], sizeof row);
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) out[i] = from_float<T>(to_float(before[i]) + row[i]);
      }
    }
  }
}

// Columns [column, column + width), summed over TOKENS at a time: one sum over all would lose digits.
template <class T>
void weight_gradient_columns(const RouterWeightGradient& a, int64_t column, int64_t width) {
  const int64_t experts = round_up(a.experts, TILE_ROWS);
  const Buffer<float> total(experts * TILE_COLUMNS), grad(TOKENS * experts), x(TOKENS * TILE_COLUMNS);
  std::fill(total.at, total.at + experts * TILE_COLUMNS, 0.0f);
  std::fill(grad.at, grad.at + TOKENS * experts, 0.0f);
  std::fill(x.at, x.at + TOKENS * TILE_COLUMNS, 0.0f);
  for (int64_t token = 0; token < a.tokens; token += TOKENS) {
    const int64_t count = std::min(TOKENS, a.tokens - token);
    for (int64_t t = 0; t < count; ++t) {
      as_floats(a.grad + (token + t) * a.experts, a.experts, grad.at + t * experts);
      as_floats(static_cast<const T*>(a.x) + (token + t) * a.size + column, width, x.at + t * TILE_COLUMNS);
    }
    for (int64_t expert = 0; expert < experts; expert += TILE_ROWS) {
      vec acc[TILE_ROWS][TILE_VECTORS] = {};
      tile<TILE_ROWS, TILE_VECTORS>(count, grad.at + expert, 1, experts, x.at, TILE_COLUMNS, acc);
      float sums[TILE_ROWS * TILE_COLUMNS];
      std::memcpy(sums, acc, sizeof sums);
      float* to = total.at + expert * TILE_COLUMNS;
#pragma omp simd
      for (int64_t i = 0; i < TILE_ROWS * TILE_COLUMNS; ++i) to[i] += sums[i];
    }
  }
  for (int64_t e = 0; e < a.experts; ++e)
    std::memcpy(a.out + e * a.size + column, total.at + e * TILE_COLUMNS, sizeof(float) * width);
}

template <class T>
void weight_gradient_of(const RouterWeightGradient& a, int64_t begin, int64_t end) {
  for (int64_t column = begin; column < end; column += TILE_COLUMNS)
    weight_gradient_columns<T>(a, column, std::min<int64_t>(TILE_COLUMNS, end - column));
}

}  // namespace

void router_logits(const RouterLogits& a, int64_t begin, int64_t end) {
  MEGALITE_BY_TYPE(a.type, logits, a, begin, end);
}

void router_input_gradient(const RouterInputGradient& a, int64_t begin, int64_t end) {
  MEGALITE_BY_TYPE(a.type, input_gradient, a, begin, end);
}

void router_weight_gradient(const RouterWeightGradient& a, int64_t begin, int64_t end) {
  MEGALITE_BY_TYPE(a.type, weight_gradient_of, a, begin, end);
}

}  // namespace megalite::cpu::MEGALITE_ISA
