// Numbers of 8 bits and their scales, by the same integers on the CPU and in CUDA.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MEGALITE_BOTH __host__ __device__
#else
#define MEGALITE_BOTH
#endif

namespace megalite::fp8 {

// Of a format with M bits of mantissa the exponents of its least normal number and of its largest one, which is
// 1.75 · 2^TOP. Functions are static: each set of instructions must have its own.
template <int M> struct Format;
template <> struct Format<3> { static constexpr int LEAST = -6, TOP = 8; };    // e4m3
template <> struct Format<2> { static constexpr int LEAST = -14, TOP = 15; };  // e5m2

constexpr uint32_t ABSOLUTE = 0x7fffffffu, INFINITE = 0x7f800000u, NOT_A_NUMBER = 0x7fc00000u;

MEGALITE_BOTH static inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

MEGALITE_BOTH static inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

struct Scale {
  float scale, inverse;
};

// The least power of two, 2^-126 at least, by which a block fits whose largest absolute value has these bits; NaN for one
// that is not finite.
template <int M>
MEGALITE_BOTH static inline Scale scale_of(uint32_t largest) {
  if (largest >= INFINITE) return {float_of(NOT_A_NUMBER), float_of(NOT_A_NUMBER)};
  // 1.75: a larger mantissa needs the next power.
  int exponent = static_cast<int>(largest >> 23) - 127 - Format<M>::TOP + ((largest & 0x7fffffu) > 0x600000u ? 1 : 0);
  exponent = exponent < -126 ? -126 : exponent;
  return {
      float_of(static_cast<uint32_t>(exponent + 127) << 23), float_of(static_cast<uint32_t>(127 - exponent) << 23)};
}

// A number of the format that is nearest to |x| / scale, ties to even: its code, and the number itself.
struct Nearest {
  uint32_t code;
  float number;
};

template <int M>
MEGALITE_BOTH static inline Nearest nearest(float x, float inverse) {
  // One unit of a subnormal is one of MAGIC's last bits: the sum rounds.
  constexpr uint32_t MAGIC = static_cast<uint32_t>(Format<M>::LEAST - M + 23 + 127) << 23;
  constexpr uint32_t LEAST = static_cast<uint32_t>(Format<M>::LEAST + 127) << 23;
  constexpr int SHIFT = 23 - M;
  const uint32_t bits = bits_of(x * inverse) & ABSOLUTE;
  const float sum = float_of(bits) + float_of(MAGIC);
  const uint32_t up = bits + ((1u << (SHIFT - 1)) - 1) + ((bits >> SHIFT) & 1u);
  // Codes of normal numbers begin at 2^M.
  const uint32_t normal = (up >> SHIFT) - (LEAST >> SHIFT) + (1u << M);
  const bool small = bits < LEAST;
  return {
      small ? bits_of(sum) - MAGIC : normal,
      small ? sum - float_of(MAGIC) : float_of(up & ~((1u << SHIFT) - 1))};
}

// What x stands for once it is rounded. A scale that is NaN makes it NaN.
template <int M>
MEGALITE_BOTH static inline float value(float x, Scale by) {
  const float found = nearest<M>(x, by.inverse).number * by.scale;
  return float_of(bits_of(found) | (bits_of(x) & ~ABSOLUTE));
}

// Its code.
template <int M>
MEGALITE_BOTH static inline uint8_t code(float x, Scale by) {
  const uint32_t sign = (bits_of(x) & ~ABSOLUTE) >> 24;
  return by.scale == by.scale ? static_cast<uint8_t>(nearest<M>(x, by.inverse).code | sign) : 0x7f;
}

}  // namespace megalite::fp8
