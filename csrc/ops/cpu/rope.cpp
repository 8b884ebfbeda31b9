#include "../rope.h"

#include "vec.h"

namespace megalite::cpu::MEGALITE_ISA {

namespace {

// Asks for the cache lines of a head some heads ahead. The hardware's own look-ahead ends with a page of 4 KiB, and work
// on so few bytes at a time does not bridge the wait: without this bf16 takes twice as long.
template <class T>
void prefetch_head(const T* x, int64_t size) {
  constexpr int64_t ahead = 4096 / sizeof(T), line = 64 / sizeof(T);
  for (int64_t i = 0; i < size; i += line) __builtin_prefetch(x + ahead + i, 1);
}

template <class T>
void rotate(const Rope& a, int64_t begin, int64_t end) {
  const int64_t pairs = a.pairs;
  const float sign = a.sign;
  for (int64_t token = begin; token < end; ++token) {
    const float* cos = a.cos + token % a.angles * pairs;
    const float* sin = a.sin + token % a.angles * pairs;
    for (int64_t head = 0; head < a.turned; ++head) {
      T* x = static_cast<T*>(a.qkv) + (token * a.heads + head) * a.head_size;
      T* y = x + pairs;
      prefetch_head(x, 2 * pairs);
#pragma omp simd
      for (int64_t i = 0; i < pairs; ++i) {
        const float first = to_float(x[i]), second = to_float(y[i]), turn = sign * sin[i];
        x[i] = from_float<T>(first * cos[i] - second * turn);
        y[i] = from_float<T>(second * cos[i] + first * turn);
      }
    }
  }
}

}  // namespace

void rope(const Rope& a, int64_t begin, int64_t end) { MEGALITE_BY_TYPE(a.type, rotate, a, begin, end); }

}  // namespace megalite::cpu::MEGALITE_ISA
