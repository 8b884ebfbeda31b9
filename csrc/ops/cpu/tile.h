// The inner loop of matrix products on the CPU: a tile of R rows and C vectors of columns of the result, held in registers while
// it runs along the depth. Everything is in the namespace of one instruction set.
//
// The depth goes in steps: one element of fp32, a pair of bf16 (vdpbf16ps multiplies two and adds both to one fp32).
//   a: the step's element or pair of each row, at a + row * a_row + step * a_step (in elements)
//   b: the step's columns next to each other, pairs of bf16 interleaved: at b + step * b_step
#pragma once

#include <new>

#include "vec.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace megalite::cpu::MEGALITE_ISA {

// A register of floats, and as many columns of a tile as keep 6 rows of sums and a step of b in registers.
#if defined(__AVX512F__)
constexpr int WIDTH = 16, TILE_VECTORS = 4;
#elif defined(__AVX2__)
constexpr int WIDTH = 8, TILE_VECTORS = 2;
#elif defined(__aarch64__)
constexpr int WIDTH = 4, TILE_VECTORS = 4;  // NEON: 32 registers of 4 floats
#else
constexpr int WIDTH = 4, TILE_VECTORS = 2;
#endif
constexpr int TILE_ROWS = 6, TILE_COLUMNS = TILE_VECTORS * WIDTH;

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t bits __attribute__((vector_size(4 * WIDTH)));

constexpr int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

template <class T> constexpr int STEP = 1;  // elements of the depth in a step
template <> constexpr int STEP<bf16> = 2;

// Room for `size` elements that begins with a line of the cache: a register or a tile that lies across two takes twice as long.
template <class T>
struct Buffer {
  explicit Buffer(int64_t size) : at(static_cast<T*>(::operator new(sizeof(T) * size, ALIGNMENT))) {}
  ~Buffer() { ::operator delete(at, ALIGNMENT); }
  Buffer(const Buffer&) = delete;
  operator T*() const { return at; }
  static constexpr std::align_val_t ALIGNMENT{64};
  T* const at;
};

template <class V>
inline V load_vector(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}
template <class V>
inline void store_vector(void* to, V value) { __builtin_memcpy(to, &value, sizeof value); }

// sum + a b of one step.
inline vec multiply_add(vec sum, const float* a, const float* b) { return sum + *a * load_vector<vec>(b); }

inline vec multiply_add(vec sum, const bf16* a, const bf16* b) {
#ifdef __AVX512BF16__
  int32_t pair;
  std::memcpy(&pair, a, 4);
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(b));
#else
  const bits pairs = load_vector<bits>(b);
  return sum + to_float(a[0]) * (vec)(pairs << 16) + to_float(a[1]) * (vec)(pairs & 0xffff0000u);
#endif
}

// acc += A B over `steps` steps.
template <int R, int C, class T>
inline void tile(
    int64_t steps, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step, vec (&acc)[R][C]) {
  for (int64_t step = 0; step < steps; ++step, a += a_step, b += b_step)
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) acc[r][c] = multiply_add(acc[r][c], a + r * a_row, b + c * WIDTH * STEP<T>);
}

}  // namespace megalite::cpu::MEGALITE_ISA
