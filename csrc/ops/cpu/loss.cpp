#include "../loss.h"

#include <cmath>

#include "vec.h"

namespace megalite::cpu::MEGALITE_ISA {

namespace {

// Columns whose largest is found before their sum of exponentials: the second look finds them in L1, so that the logits
// come from memory once.
constexpr int64_t BLOCK = 4096;

template <class T>
void forward(const CrossEntropyForward& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.logits) + row * a.size;
    float largest = -INFINITY, sum = 0.0f, shift = 0.0f;  // sum: of e^(x - shift)
    for (int64_t first = 0; first < a.valid; first += BLOCK) {
      const int64_t last = first + BLOCK < a.valid ? first + BLOCK : a.valid;
      float top = largest;
#pragma omp simd reduction(max : top)
      for (int64_t i = first; i < last; ++i) top = to_float(x[i]) > top ? to_float(x[i]) : top;
      // As long as there was nothing but -inf (or NaN, which then shows), any finite shift gives the right sum.
      shift = top == -INFINITY ? 0.0f : top;
      float part = 0.0f;
#pragma omp simd reduction(+ : part)
      for (int64_t i = first; i < last; ++i) part += exp(to_float(x[i]) - shift);
      sum = sum * exp(largest - shift) + part;
      largest = top;
    }
    a.lse[row] = shift + std::log(sum);
    const int64_t column = a.labels[row] - a.first;
    a.target[row] = column >= 0 && column < a.valid ? to_float(x[column]) : 0.0f;
  }
}

template <class T>
void backward(const CrossEntropyBackward& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* x = static_cast<T*>(a.logits) + row * a.size;
    const float lse = a.lse[row], grad = a.grad[row];
    const int64_t column = a.labels[row] - a.first;
    const int64_t valid = grad == 0.0f ? 0 : a.valid;
    const float target = column >= 0 && column < valid ? to_float(x[column]) : 0.0f;
#pragma omp simd
    for (int64_t i = 0; i < valid; ++i) x[i] = from_float<T>(exp(to_float(x[i]) - lse) * grad);
    if (column >= 0 && column < valid) x[column] = from_float<T>((exp(target - lse) - 1.0f) * grad);
    for (int64_t i = valid; i < a.size; ++i) x[i] = from_float<T>(0.0f);
  }
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& a, int64_t begin, int64_t end) {
  MEGALITE_BY_TYPE(a.type, forward, a, begin, end);
}

void cross_entropy_backward(const CrossEntropyBackward& a, int64_t begin, int64_t end) {
  MEGALITE_BY_TYPE(a.type, backward, a, begin, end);
}

}  // namespace megalite::cpu::MEGALITE_ISA
