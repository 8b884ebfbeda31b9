#include "../fp8.h"

#include <algorithm>
#include <vector>

#include "../fp8_format.h"
#include "vec.h"

namespace megalite::cpu::MEGALITE_ISA {

namespace {

using fp8::Scale;

// Bits of the largest absolute value of each block of a strip: NaN, as an integer, is above all others.
template <class T>
void find_largest(const Fp8& a, int64_t first, int64_t last, uint32_t* largest) {
  std::fill(largest, largest + a.blocks(), 0u);
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.columns;
    if (a.block_columns == 1) {
#pragma omp simd
      for (int64_t i = 0; i < a.columns; ++i)
        largest[i] = std::max(largest[i], fp8::bits_of(to_float(x[i])) & fp8::ABSOLUTE);
      continue;
    }
    for (int64_t block = 0; block < a.blocks(); ++block) {
      const int64_t end = std::min(a.columns, (block + 1) * a.block_columns);
      uint32_t found = largest[block];
#pragma omp simd reduction(max : found)
      for (int64_t i = block * a.block_columns; i < end; ++i)
        found = std::max(found, fp8::bits_of(to_float(x[i])) & fp8::ABSOLUTE);
      largest[block] = found;
    }
  }
}

// Scales of a strip's blocks, and their inverses: apart, so that columns with one each are read as vectors.
struct Scales {
  std::vector<float> scale, inverse;

  Scale at(int64_t i) const { return {scale[i], inverse[i]}; }
};

// Elements [begin, end) of a row that share a scale.
template <class T, int M>
void round_block(const T* x, T* out, int64_t begin, int64_t end, Scale by) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) out[i] = from_float<T>(fp8::value<M>(to_float(x[i]), by));
}

// A row whose elements have a scale each.
template <class T, int M>
void round_columns(const T* x, T* out, int64_t size, const float* scale, const float* inverse) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) out[i] = from_float<T>(fp8::value<M>(to_float(x[i]), {scale[i], inverse[i]}));
}

template <class T, int M>
void round_strip(const Fp8& a, int64_t first, int64_t last, const Scales& by) {
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.columns;
    T* out = static_cast<T*>(a.out) + row * a.columns;
    if (a.block_columns == 1)
      round_columns<T, M>(x, out, a.columns, by.scale.data(), by.inverse.data());
    else
      for (int64_t block = 0, begin = 0; begin < a.columns; ++block, begin += a.block_columns)
        round_block<T, M>(x, out, begin, std::min(a.columns, begin + a.block_columns), by.at(block));
  }
}

template <class T, int M>
void write_codes(const Fp8& a, int64_t strip, int64_t first, int64_t last, const Scales& by) {
  for (int64_t block = 0; block < a.blocks(); ++block)
    a.scales[a.transposed ? block * a.strips() + strip : strip * a.blocks() + block] = by.scale[block];
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.columns;
    for (int64_t i = 0; i < a.columns; ++i)
      a.codes[a.transposed ? i * a.rows + row : row * a.columns + i] =
          fp8::code<M>(to_float(x[i]), by.at(i / a.block_columns));
  }
}

template <class T, int M>
void strips_of_format(const Fp8& a, int64_t begin, int64_t end) {
  std::vector<uint32_t> largest(a.blocks());
  Scales by{std::vector<float>(a.blocks()), std::vector<float>(a.blocks())};
  for (int64_t strip = begin; strip < end; ++strip) {
    const int64_t first = strip * a.block_rows, last = std::min(a.rows, first + a.block_rows);
    find_largest<T>(a, first, last, largest.data());
    for (int64_t block = 0; block < a.blocks(); ++block) {
      const Scale found = fp8::scale_of<M>(largest[block]);
      by.scale[block] = found.scale;
      by.inverse[block] = found.inverse;
    }
    a.out ? round_strip<T, M>(a, first, last, by) : write_codes<T, M>(a, strip, first, last, by);
  }
}

template <class T>
void strips(const Fp8& a, int64_t begin, int64_t end) {
  a.mantissa == 3 ? strips_of_format<T, 3>(a, begin, end) : strips_of_format<T, 2>(a, begin, end);
}

}  // namespace

void round_to_fp8(const Fp8& a, int64_t begin, int64_t end) { MEGALITE_BY_TYPE(a.type, strips, a, begin, end); }

}  // namespace megalite::cpu::MEGALITE_ISA
