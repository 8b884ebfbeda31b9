#include "../norm.h"

#include <cmath>

#include "vec.h"

namespace megalite::cpu::MEGALITE_ISA {

namespace {

template <class T>
void forward(const NormForward& a, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t size = a.size;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * size;
    T* out = static_cast<T*>(a.out) + row * size;
    float squares = 0.0f;
    if (a.residual) {
      const T* residual = static_cast<const T*>(a.residual) + row * size;
      T* sum = static_cast<T*>(a.sum) + row * size;
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < size; ++i) {
        sum[i] = from_float<T>(to_float(x[i]) + to_float(residual[i]));
        const float value = to_float(sum[i]);
        squares += value * value;
      }
      x = sum;
    } else {
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < size; ++i) squares += to_float(x[i]) * to_float(x[i]);
    }
    const float rstd = 1.0f / std::sqrt(squares / static_cast<float>(size) + a.eps);
    a.rstd[row] = rstd;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) out[i] = from_float<T>(to_float(x[i]) * rstd * to_float(weight[i]));
  }
}

// With y = x rstd: dx = rstd (g w - y mean(g w y)), dw = sum of g y over the rows.
template <class T>
void backward(const NormBackward& a, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t size = a.size;
  for (int64_t part = begin; part < end; ++part) {
    float* dweight = a.dweight + part * size;
    for (int64_t i = 0; i < size; ++i) dweight[i] = 0.0f;
    for (int64_t row = a.rows * part / a.parts; row < a.rows * (part + 1) / a.parts; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * size;
      const T* grad = static_cast<const T*>(a.grad) + row * size;
      T* dx = static_cast<T*>(a.dx) + row * size;
      const float rstd = a.rstd[row];
      float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
      for (int64_t i = 0; i < size; ++i) {
        const float product = to_float(grad[i]) * to_float(x[i]) * rstd;
        dweight[i] += product;
        dot += product * to_float(weight[i]);
      }
      const float mean = dot / static_cast<float>(size) * rstd;
      if (a.grad_sum) {
        const T* grad_sum = static_cast<const T*>(a.grad_sum) + row * size;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
          const float value = to_float(grad[i]) * to_float(weight[i]) - to_float(x[i]) * mean;
          dx[i] = from_float<T>(value * rstd + to_float(grad_sum[i]));
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
          const float value = to_float(grad[i]) * to_float(weight[i]) - to_float(x[i]) * mean;
          dx[i] = from_float<T>(value * rstd);
        }
      }
    }
  }
}

}  // namespace

void rms_norm_forward(const NormForward& a, int64_t begin, int64_t end) {
  MEGALITE_BY_TYPE(a.type, forward, a, begin, end);
}

void rms_norm_backward(const NormBackward& a, int64_t begin, int64_t end) {
  MEGALITE_BY_TYPE(a.type, backward, a, begin, end);
}

}  // namespace megalite::cpu::MEGALITE_ISA
