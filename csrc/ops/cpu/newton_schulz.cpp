#include "../newton_schulz.h"

#include "amx.h"
#include "panel.h"

namespace megalite::cpu::MEGALITE_ISA {

namespace {

// A row of the result in the columns [column, column + width), of the sums of its products.
template <class T>
void write_row(const AddedProduct& a, int64_t row, int64_t column, int64_t width, const float* sums) {
  const int64_t first = row * a.columns + column;
  T* const out = static_cast<T*>(a.out) + first;
  if (a.add) {
    const T* const add = static_cast<const T*>(a.add) + first;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) out[i] = from_float<T>(a.alpha * sums[i] + a.beta * to_float(add[i]));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) out[i] = from_float<T>(a.alpha * sums[i]);
  }
}

// R rows of the result from `row` on, in the columns [column, column + width) of a panel: C vectors at most.
template <int R, int C, class T>
void rows_of(const AddedProduct& a, const T* panel, int64_t row, int64_t column, int64_t width) {
  vec acc[R][C] = {};
  multiply_rows(static_cast<const T*>(a.a) + row * a.depth, a.depth, panel, acc);
  for (int r = 0; r < R; ++r) {
    float sums[C * WIDTH];
    std::memcpy(sums, acc[r], sizeof sums);
    write_row<T>(a, row + r, column, width, sums);
  }
}

template <class T>
void some_rows(const AddedProduct& a, const T* panel, int64_t row, int64_t column, int64_t width) {
  static_assert(TILE_ROWS == 6);
  switch (std::min<int64_t>(TILE_ROWS, a.rows - row)) {
    case 1: return rows_of<1, TILE_VECTORS>(a, panel, row, column, width);
    case 2: return rows_of<2, TILE_VECTORS>(a, panel, row, column, width);
    case 3: return rows_of<3, TILE_VECTORS>(a, panel, row, column, width);
    case 4: return rows_of<4, TILE_VECTORS>(a, panel, row, column, width);
    case 5: return rows_of<5, TILE_VECTORS>(a, panel, row, column, width);
    default: return rows_of<6, TILE_VECTORS>(a, panel, row, column, width);
  }
}

// Rows [from, a.rows) of the result on AMX.
template <class T>
void rows_on_tiles(const AddedProduct& a, const T* panel, int64_t from, int64_t column, int64_t width) {
  amx_product(
      static_cast<const T*>(a.a) + from * a.depth, a.depth, a.rows - from, a.depth, panel, width,
      [&](int64_t row, int64_t count, int64_t first, int64_t wanted, const AmxSums& sums) {
        for (int64_t r = 0; r < count; ++r) write_row<T>(a, from + row + r, column + first, wanted, sums[r]);
      });
}

template <class T>
void product(const AddedProduct& a, int64_t begin, int64_t end) {
  const Buffer<T> panel(panel_size<T>(a.depth));
  for (int64_t column = begin * TILE_COLUMNS; column < std::min(end * TILE_COLUMNS, a.columns); column += TILE_COLUMNS) {
    const int64_t width = std::min<int64_t>(TILE_COLUMNS, a.columns - column);
    pack_columns(static_cast<const T*>(a.b) + column, a.columns, a.depth, width, panel.at);
    if (on_amx<T>(a.depth))
      rows_on_tiles(a, panel.at, 0, column, width);
    else
      for (int64_t row = 0; row < a.rows; row += TILE_ROWS) some_rows(a, panel.at, row, column, width);
  }
}

// WIDTH numbers of T as the low bits of a vector's, and back.
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));
inline bits load_numbers(const float* from) { return load_vector<bits>(from); }
inline bits load_numbers(const bf16* from) { return __builtin_convertvector(load_vector<halves>(from), bits); }
inline void store_numbers(float* to, bits numbers) { store_vector(to, numbers); }
inline void store_numbers(bf16* to, bits numbers) { store_vector(to, __builtin_convertvector(numbers, halves)); }

// Copies what is below the diagonal, in a panel's columns from `column` on, to above it.
template <class T>
void mirror(T* out, int64_t size, int64_t column) {
  const int64_t end = column + TILE_COLUMNS, whole = column + (size - column) / WIDTH * WIDTH;
  for (int64_t row = column; row < whole; row += WIDTH)
    for (int64_t first = column; first < std::min(end, row); first += WIDTH) {
      bits square[WIDTH];
      for (int i = 0; i < WIDTH; ++i) square[i] = load_numbers(out + (row + i) * size + first);
      transpose(square);
      for (int i = 0; i < WIDTH; ++i) store_numbers(out + (first + i) * size + row, square[i]);
    }
  for (int64_t row = whole; row < size; ++row)
    for (int64_t i = column; i < std::min(end, row); ++i) out[i * size + row] = out[row * size + i];
}

// A tile's rows in the first C vectors of a panel, or in as many more as it takes to come to the diagonal.
template <int C, class T>
void up_to_diagonal(const AddedProduct& a, const T* panel, int64_t row, int64_t column, int64_t width) {
  if constexpr (C < TILE_VECTORS) {
    if (row + TILE_ROWS > column + C * WIDTH) return up_to_diagonal<C + 1>(a, panel, row, column, width);
  }
  rows_of<TILE_ROWS, C>(a, panel, row, column, std::min<int64_t>(width, C * WIDTH));
}

template <class T>
void symmetric(const AddedProduct& a, int64_t begin, int64_t end) {
  const Buffer<T> panel(panel_size<T>(a.depth));
  const int64_t panels = (a.columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
  for (int64_t at = begin; at < end; ++at) {
    // A panel goes from the diagonal down: long ones and short ones by turns, so that threads have as much to do.
    const int64_t column = (at % 2 ? panels - 1 - at / 2 : at / 2) * TILE_COLUMNS;
    const int64_t width = std::min<int64_t>(TILE_COLUMNS, a.columns - column);
    pack_rows(static_cast<const T*>(a.a) + column * a.depth, a.depth, width, panel.at);
    // On tiles what is above the diagonal of a panel's first rows is computed, too.
    if (on_amx<T>(a.depth))
      rows_on_tiles(a, panel.at, column, column, width);
    else
      for (int64_t row = column; row < a.rows; row += TILE_ROWS) {
        if (row + TILE_ROWS <= a.rows)
          up_to_diagonal<1>(a, panel.at, row, column, width);
        else
          some_rows(a, panel.at, row, column, width);
      }
    mirror(static_cast<T*>(a.out), a.rows, column);
  }
}

}  // namespace

void added_product_columns(int64_t& columns) { columns = TILE_COLUMNS; }

void added_product(const AddedProduct& a, int64_t begin, int64_t end) {
  MEGALITE_BY_TYPE(a.type, product, a, begin, end);
}

void symmetric_product(const AddedProduct& a, int64_t begin, int64_t end) {
  MEGALITE_BY_TYPE(a.type, symmetric, a, begin, end);
}

}  // namespace megalite::cpu::MEGALITE_ISA
