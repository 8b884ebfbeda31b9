// Each key is read once, for all query heads that share it. What a row gets does not depend on other rows.
#include "../decode.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "tile.h"

namespace megalite::cpu::MEGALITE_ISA {

namespace {

constexpr int64_t CHUNK = 64;  // cells that stay in the nearest cache while all heads that share them are gone through
constexpr int64_t AHEAD = 32;  // cells that are asked for before they are read

inline vec load_floats(const float* from) { return load_vector<vec>(from); }
inline vec load_floats(const bf16* from) {
  typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));
  return (vec)(__builtin_convertvector(load_vector<halves>(from), bits) << 16);
}

// Through 16 bits on the way to 32: GCC does a conversion of 8 to 32 number by number.
typedef int8_t bytes __attribute__((vector_size(WIDTH)));
typedef int16_t shorts __attribute__((vector_size(2 * WIDTH)));
typedef int32_t integers __attribute__((vector_size(4 * WIDTH)));

using megalite::cpu::MEGALITE_ISA::to_float;  // else the two below would hide it
inline float to_float(int8_t x) { return static_cast<float>(x); }
inline vec load_floats(const int8_t* from) {
  const shorts half = __builtin_convertvector(load_vector<bytes>(from), shorts);
  return __builtin_convertvector(__builtin_convertvector(half, integers), vec);
}

// E4M3 without its NaN: the exponent and mantissa of fp32 where the bias is 7 instead of 127, subnormals too.
struct e4m3 { uint8_t bits; };
constexpr float REBIAS = 0x1p120f;

inline float to_float(e4m3 x) {
  const uint32_t bits = (static_cast<uint32_t>(x.bits & 0x80) << 24) | (static_cast<uint32_t>(x.bits & 0x7f) << 20);
  float value;
  std::memcpy(&value, &bits, 4);
  return value * REBIAS;
}
inline vec load_floats(const e4m3* from) {
  typedef uint8_t codes __attribute__((vector_size(WIDTH)));
  typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));
  const bits wide = __builtin_convertvector(__builtin_convertvector(load_vector<codes>(from), halves), bits);
  return (vec)(((wide & 0x80u) << 24) | ((wide & 0x7fu) << 20)) * REBIAS;
}

inline float sum_of(vec x) {
  float lanes[WIDTH], sum = 0.0f;
  store_vector(lanes, x);
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < WIDTH; ++i) sum += lanes[i];
  return sum;
}

// The machine's own looking ahead begins anew with each page, and a head's cells are a few pages.
template <class T>
inline void fetch_ahead(const T* cell, int64_t size) {
  for (int64_t byte = 0; byte < size * static_cast<int64_t>(sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(cell + AHEAD * size) + byte);
}

// scores[c] = q . keys[c], of V vectors of numbers; V = 0: of any size.
template <int V, class T>
void score(const float* q, const T* keys, int64_t count, int64_t size, float* scores) {
  if constexpr (V == 0) {
    for (int64_t c = 0; c < count; ++c, keys += size) {
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < size; ++i) sum += q[i] * to_float(keys[i]);
      scores[c] = sum;
    }
  } else {
    vec of_q[V];
    for (int v = 0; v < V; ++v) of_q[v] = load_vector<vec>(q + v * WIDTH);
    for (int64_t c = 0; c < count; ++c, keys += V * WIDTH) {
      fetch_ahead(keys, V * WIDTH);
      vec sum = of_q[0] * load_floats(keys);
      for (int v = 1; v < V; ++v) sum += of_q[v] * load_floats(keys + v * WIDTH);
      scores[c] = sum_of(sum);
    }
  }
}

// sums += shares[c] values[c] over all c.
template <int V, class T>
void add_values(const float* shares, const T* values, int64_t count, int64_t size, float* sums) {
  if constexpr (V == 0) {
    for (int64_t c = 0; c < count; ++c, values += size)
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) sums[i] += shares[c] * to_float(values[i]);
  } else {
    vec acc[V];
    for (int v = 0; v < V; ++v) acc[v] = load_vector<vec>(sums + v * WIDTH);
    for (int64_t c = 0; c < count; ++c, values += V * WIDTH) {
      fetch_ahead(values, V * WIDTH);
      for (int v = 0; v < V; ++v) acc[v] += shares[c] * load_floats(values + v * WIDTH);
    }
    for (int v = 0; v < V; ++v) store_vector(sums + v * WIDTH, acc[v]);
  }
}

// numbers[c] *= scales[c] for all heads that share the cells; nothing where cells have no scales.
template <class T>
void scale_cells(float* numbers, const void* scales, int64_t start, int64_t count, int64_t shared) {
  if (!scales) return;
  const T* of_cell = static_cast<const T*>(scales) + start;
  for (int64_t h = 0; h < shared; ++h)
    for (int64_t c = 0; c < count; ++c) numbers[h * count + c] *= to_float(of_cell[c]);
}

// The cells of a chunk as they are read: those of 8 bits are made floats once for all heads that share them.
template <class C>
const C* chunk_of(const C* cells, int64_t, std::vector<float>&) { return cells; }
template <class C>
  requires(sizeof(C) == 1)
const float* chunk_of(const C* cells, int64_t count, std::vector<float>& wide) {
  wide.resize(count);
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) {
    __builtin_prefetch(cells + i + 2048);
    store_vector(&wide[i], load_floats(cells + i));
  }
  for (; i < count; ++i) wide[i] = to_float(cells[i]);
  return wide.data();
}

// T: of queries, scales and outputs; C: of the cells.
template <int V, class T, class C>
void decode_size(const Decode& a, int64_t begin, int64_t end) {
  const int64_t shared = a.heads / a.kv_heads;
  std::vector<float> q(shared * a.size), sums(shared * a.size), scores, wide;
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t row = pair / a.kv_heads, group = pair % a.kv_heads, first = a.first[row];
    const int64_t count = a.last[row] - first + 1, head = row * a.heads + group * shared;
    const int64_t start = row * a.row_stride + group * a.head_stride + first * a.size;
    const C* keys = static_cast<const C*>(a.keys) + start;
    const C* values = static_cast<const C*>(a.values) + start;
    const T* from = static_cast<const T*>(a.q) + head * a.size;
    for (int64_t i = 0; i < shared * a.size; ++i) q[i] = to_float(from[i]) * a.scale;
    scores.resize(shared * count);
    for (int64_t c = 0; c < count; c += CHUNK) {
      const int64_t some = std::min(CHUNK, count - c);
      const auto* cells = chunk_of(keys + c * a.size, some * a.size, wide);
      for (int64_t h = 0; h < shared; ++h) score<V>(&q[h * a.size], cells, some, a.size, &scores[h * count + c]);
    }
    scale_cells<T>(scores.data(), a.key_scales, start / a.size, count, shared);
    for (int64_t h = 0; h < shared; ++h) {
      float* of_head = &scores[h * count];
      if (a.softcap != 0.0f)
        for (int64_t c = 0; c < count; ++c) of_head[c] = std::tanh(of_head[c] / a.softcap) * a.softcap;
      float highest = of_head[0], sum = 0.0f;
#pragma omp simd reduction(max : highest)
      for (int64_t c = 1; c < count; ++c) highest = of_head[c] > highest ? of_head[c] : highest;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < count; ++c) sum += of_head[c] = exp(of_head[c] - highest);
      for (int64_t c = 0; c < count; ++c) of_head[c] /= sum;
    }
    scale_cells<T>(scores.data(), a.value_scales, start / a.size, count, shared);
    sums.assign(shared * a.size, 0.0f);
    for (int64_t c = 0; c < count; c += CHUNK) {
      const int64_t some = std::min(CHUNK, count - c);
      const auto* cells = chunk_of(values + c * a.size, some * a.size, wide);
      for (int64_t h = 0; h < shared; ++h) add_values<V>(&scores[h * count + c], cells, some, a.size, &sums[h * a.size]);
    }
    T* out = static_cast<T*>(a.out) + head * a.size;
    for (int64_t i = 0; i < shared * a.size; ++i) out[i] = from_float<T>(sums[i]);
  }
}

template <class T, class C>
void decode_cells(const Decode& a, int64_t begin, int64_t end) {
  switch (a.size) {
    case 4 * WIDTH: return decode_size<4, T, C>(a, begin, end);
    case 8 * WIDTH: return decode_size<8, T, C>(a, begin, end);
    case 16 * WIDTH: return decode_size<16, T, C>(a, begin, end);
    default: return decode_size<0, T, C>(a, begin, end);
  }
}

template <class T>
void decode(const Decode& a, int64_t begin, int64_t end) {
  switch (a.cell) {
    case Cell::int8: return decode_cells<T, int8_t>(a, begin, end);
    case Cell::e4m3: return decode_cells<T, e4m3>(a, begin, end);
    default: return decode_cells<T, T>(a, begin, end);
  }
}

}  // namespace

void decode_attention(const Decode& a, int64_t begin, int64_t end) { MEGALITE_BY_TYPE(a.type, decode, a, begin, end); }

}  // namespace megalite::cpu::MEGALITE_ISA
