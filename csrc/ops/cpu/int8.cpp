#include "../int8.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "vec.h"

namespace megalite::cpu::MEGALITE_ISA {

namespace {

template <class T>
void round_rows(const Int8Rows& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.columns;
    uint8_t* to = a.numbers + row * a.columns;
    float largest = 0.0f;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < a.columns; ++i) {
      const float size = std::fabs(to_float(x[i]));
      largest = size > largest ? size : largest;
    }
    const float scale = std::max(largest / 127.5f, FLT_MIN);
    a.scales[row] = scale;
#pragma omp simd
    for (int64_t i = 0; i < a.columns; ++i) {
      const float steps = to_float(x[i]) / scale;  // from -127.5 to 127.5: what is added rounds them, ties to even
      const float rounded = steps + 12582912.0f - 12582912.0f;
      to[i] = static_cast<uint8_t>(static_cast<int32_t>(rounded < 127.0f ? rounded : 127.0f) + 128);
    }
  }
}

}  // namespace

void int8_rows(const Int8Rows& a, int64_t begin, int64_t end) { MEGALITE_BY_TYPE(a.type, round_rows, a, begin, end); }

}  // namespace megalite::cpu::MEGALITE_ISA
