// Each key is read once, for all query heads that share it. What a row gets does not depend on other rows.
#include "../decode.h"

#include <cmath>
#include <vector>

#include "vec.h"

namespace megalite::cpu::MEGALITE_ISA {

namespace {

template <class T>
float dot(const float* a, const T* b, int64_t size) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += a[i] * to_float(b[i]);
  return sum;
}

template <class T>
void decode(const Decode& a, int64_t begin, int64_t end) {
  const int64_t shared = a.heads / a.kv_heads;
  std::vector<float> q(shared * a.size), sums(shared * a.size), scores;
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t row = pair / a.kv_heads, group = pair % a.kv_heads, first = a.first[row];
    const int64_t count = a.last[row] - first + 1, head = row * a.heads + group * shared;
    const int64_t start = row * a.row_stride + group * a.head_stride + first * a.size;
    const T* keys = static_cast<const T*>(a.keys) + start;
    const T* values = static_cast<const T*>(a.values) + start;
    const T* from = static_cast<const T*>(a.q) + head * a.size;
    for (int64_t i = 0; i < shared * a.size; ++i) q[i] = to_float(from[i]) * a.scale;
    scores.resize(shared * count);
    for (int64_t c = 0; c < count; ++c)
      for (int64_t h = 0; h < shared; ++h)
        scores[h * count + c] = dot(&q[h * a.size], keys + c * a.size, a.size);
    for (int64_t h = 0; h < shared; ++h) {
      float* of_head = &scores[h * count];
      if (a.softcap != 0.0f)
        for (int64_t c = 0; c < count; ++c) of_head[c] = std::tanh(of_head[c] / a.softcap) * a.softcap;
      float highest = of_head[0], sum = 0.0f;
      for (int64_t c = 1; c < count; ++c) highest = of_head[c] > highest ? of_head[c] : highest;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < count; ++c) sum += of_head[c] = exp(of_head[c] - highest);
      for (int64_t c = 0; c < count; ++c) of_head[c] /= sum;
    }
    sums.assign(shared * a.size, 0.0f);
    for (int64_t c = 0; c < count; ++c)
      for (int64_t h = 0; h < shared; ++h) {
        const float share = scores[h * count + c];
        const T* value = values + c * a.size;
        float* into = &sums[h * a.size];
#pragma omp simd
        for (int64_t i = 0; i < a.size; ++i) into[i] += share * to_float(value[i]);
      }
    T* out = static_cast<T*>(a.out) + head * a.size;
    for (int64_t i = 0; i < shared * a.size; ++i) out[i] = from_float<T>(sums[i]);
  }
}

}  // namespace

void decode_attention(const Decode& a, int64_t begin, int64_t end) { MEGALITE_BY_TYPE(a.type, decode, a, begin, end); }

}  // namespace megalite::cpu::MEGALITE_ISA
