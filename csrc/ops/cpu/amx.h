// Products of bf16 rows and a panel on AMX, whose tiles are registers of 16 rows of 64 bytes: a tile of fp32 sums gets
// 16 rows of 32 bf16 times 32 rows of 16 columns, which a panel holds as it wants them, in pairs of the depth.
//
// Four tiles of sums at a time, of 32 rows and 32 columns, so that each tile that is read is multiplied twice. A row is
// summed in the order of the depth, whatever rows are beside it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "isa.h"
#include "tile.h"

#if defined(__AVX512BF16__) && defined(__linux__)
#define MEGALITE_AMX __attribute__((target("amx-tile,amx-bf16")))  // beside what the file is compiled for
#endif

namespace megalite::cpu::MEGALITE_ISA {

constexpr int64_t AMX_ROWS = 16, AMX_COLUMNS = 16, AMX_DEPTH = 32;

typedef float AmxSums[2 * AMX_ROWS][2 * AMX_COLUMNS];

// Whether products of numbers of type T, over so large a depth, run on AMX here.
template <class T>
inline bool on_amx([[maybe_unused]] int64_t depth) {
#ifdef MEGALITE_AMX
  return std::is_same_v<T, bf16> && isa() == amx && depth % AMX_DEPTH == 0;
#else
  return false;
#endif
}

// In the place of the functions below, which are of bf16, for what `on_amx` says no to: they are compiled, and not called.
template <class T>
inline void amx_round(const float*, int64_t, T*) {}
template <class T, class Write>
inline void amx_product(const T*, int64_t, int64_t, int64_t, const T*, int64_t, Write) {}

#ifdef MEGALITE_AMX

// What ldtilecfg reads.
struct alignas(64) AmxShape {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3: sums of two times two; 4 and 5: rows of x; 6 and 7: columns of the panel. `rows` are 1 to 32.
MEGALITE_AMX inline void amx_configure(int64_t rows) {
  AmxShape shape;
  const int64_t first = std::min(rows, AMX_ROWS);
  const int64_t of_tile[] = {first, first, rows - first, rows - first, first, rows - first, AMX_ROWS, AMX_ROWS};
  for (int i = 0; i < 8; ++i) {
    shape.rows[i] = static_cast<uint8_t>(of_tile[i]);
    shape.row_bytes[i] = of_tile[i] ? 64 : 0;  // a tile without rows is none, and is not touched
  }
  asm volatile("" : : "r"(&shape) : "memory");  // GCC takes it that only the first eight bytes are read
  _tile_loadconfig(&shape);
}

// Sums [rows, 32] of x [rows, depth], whose rows lie `stride` apart, and 32 columns of a panel, by the tiles that
// `amx_configure(rows)` made.
MEGALITE_AMX inline void amx_sums(
    const bf16* x, int64_t stride, int64_t rows, int64_t depth, const bf16* panel, AmxSums& sums) {
  constexpr int64_t PANEL_ROW = TILE_COLUMNS * STEP<bf16>;  // elements
  // GCC does not know that loading a tile reads memory: what was written is to be there.
  asm volatile("" ::: "memory");
  const bool is_two = rows > AMX_ROWS;
  _tile_zero(0);
  _tile_zero(1);
  if (is_two) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t at = 0; at < depth; at += AMX_DEPTH) {
    const bf16* columns = panel + at / STEP<bf16> * PANEL_ROW;
    _tile_loadd(6, columns, PANEL_ROW * sizeof(bf16));
    _tile_loadd(7, columns + AMX_COLUMNS * STEP<bf16>, PANEL_ROW * sizeof(bf16));
    _tile_loadd(4, x + at, stride * sizeof(bf16));
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (is_two) {
      _tile_loadd(5, x + AMX_ROWS * stride + at, stride * sizeof(bf16));
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums[0], sizeof sums[0]);
  _tile_stored(1, sums[0] + AMX_COLUMNS, sizeof sums[0]);
  if (!is_two) return;
  _tile_stored(2, sums[AMX_ROWS], sizeof sums[0]);
  _tile_stored(3, sums[AMX_ROWS] + AMX_COLUMNS, sizeof sums[0]);
}

// The first `count` of a row of sums as bf16.
inline void amx_round(const float* sums, int64_t count, bf16* to) {
  static_assert(2 * AMX_COLUMNS == 32);
  const __mmask32 some = static_cast<__mmask32>((uint64_t{1} << count) - 1);
  const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_load_ps(sums + AMX_COLUMNS), _mm512_load_ps(sums));
  _mm512_mask_storeu_epi16(to, some, (__m512i)rounded);
}

// Calls write(row, count, column, width, sums) for the sums of blocks of x [rows, depth], whose rows lie `stride` apart, and
// `width` columns of panels that follow one another; `depth` is a multiple of AMX_DEPTH.
template <class Write>
MEGALITE_AMX inline void amx_product(
    const bf16* x, int64_t stride, int64_t rows, int64_t depth, const bf16* panels, int64_t width, Write write) {
  alignas(64) AmxSums sums;
  int64_t configured = 0;
  // A block of rows stays in the nearest cache while the panels pass by, and its results are written side by side: row
  // after row of one column would wait for memory three times as long.
  for (int64_t row = 0; row < rows; row += 2 * AMX_ROWS) {
    const int64_t here = std::min(2 * AMX_ROWS, rows - row);
    if (here != configured) amx_configure(configured = here);
    for (int64_t column = 0; column < width; column += 2 * AMX_COLUMNS) {
      const bf16* panel = panels + column / TILE_COLUMNS * TILE_COLUMNS * depth;
      amx_sums(x + row * stride, stride, here, depth, panel + column % TILE_COLUMNS * STEP<bf16>, sums);
      write(row, here, column, std::min(2 * AMX_COLUMNS, width - column), sums);
    }
  }
  _tile_release();  // oneDNN's kernels make tiles of their own
}

#endif

}  // namespace megalite::cpu::MEGALITE_ISA
