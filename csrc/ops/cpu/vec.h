// Arithmetic for CPU kernels: plain loops over these functions are what the compiler turns into vectors. Everything is
// in the namespace of one instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "../types.h"

namespace megalite::cpu::MEGALITE_ISA {

struct bf16 { uint16_t bits; };

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <class T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
// Rounds to nearest, ties to even; NaN stays NaN.
template <> inline bf16 from_float<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}

// e^x to 2 ulp; below 2^-125.5 0, above the largest float infinity; NaN stays NaN. Cody and Waite's reduction to
// |r| <= ln(2)/2, then the Taylor polynomial of degree 7 (its remainder is 1e-8 there). No choice is made after the
// polynomial: the compiler would repeat for each outcome what its caller computes next.
inline float exp(float x) {
  const float above = x < -87.3f ? -87.3f : x;
  const float clamped = above > 89.0f ? 89.0f : above;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded integer
  const float n = shifted - 12582912.0f;
  float r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 2.0f / 5040.0f;  // twice the polynomial, for 2^(n-1): n reaches 128, and at -126 the factor's bits are 0
  p = p * r + 2.0f / 720.0f;
  p = p * r + 2.0f / 120.0f;
  p = p * r + 2.0f / 24.0f;
  p = p * r + 2.0f / 6.0f;
  p = p * r + 1.0f;
  p = p * r + 2.0f;
  p = p * r + 2.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  const int32_t factor_bits = (bits - (0x4b400000 - 126)) << 23;
  float factor;
  std::memcpy(&factor, &factor_bits, 4);
  return p * factor;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace megalite::cpu::MEGALITE_ISA

// Calls `function<float>` or `function<bf16>`.
#define MEGALITE_BY_TYPE(type, function, ...) \
  ((type) == megalite::Type::f32 ? function<float>(__VA_ARGS__) : function<bf16>(__VA_ARGS__))
