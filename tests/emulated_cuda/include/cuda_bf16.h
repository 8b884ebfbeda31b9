#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// To the nearest, ties to even; any NaN becomes the device's.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (value != value) return {0x7fff};
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof(value));
  return {static_cast<uint16_t>((wide + 0x7fffu + (wide >> 16 & 1u)) >> 16)};
}
