#include "../norm.h"

#include <cmath>

#include "vec.h"

namespace megalite::cpu::MEGALITE_ISA {

namespace {

// The sum of term(i) over i < size, in 64 sums side by side: vectors of one sum would each wait for the addition before,
// which is slower than memory. `term` may write too, as long as no i depends on another.
template <class Term>
float sum_of(int64_t size, Term term) {
  constexpr int64_t width = 64;
  float sums[width] = {};
  const int64_t whole = size - size % width;
  for (int64_t i = 0; i < whole; i += width) {
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) sums[j] += term(i + j);
  }
  for (int64_t i = whole; i < size; ++i) sums[i - whole] += term(i);
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < width; ++j) total += sums[j];
  return total;
}

// `centred`: LayerNorm. Its variance is summed in a second pass over the row, which is in L1 by then: the difference of
// mean(x²) and mean(x)² would cancel where the mean is large. `has_unit`: something is added to the weight; without, bf16
// would be 4% slower for it.
template <class T, bool centred, bool has_unit>
void forward(const NormForward& a, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  const int64_t size = a.size;
  const float unit = has_unit ? a.unit : 0.0f;
  const auto scale = [=](int64_t i) { return has_unit ? to_float(weight[i]) + unit : to_float(weight[i]); };
  const auto first = [](float value) { return centred ? value : value * value; };
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * size;
    T* out = static_cast<T*>(a.out) + row * size;
    float total;
    if (a.residual) {
      const T* residual = static_cast<const T*>(a.residual) + row * size;
      T* sum = static_cast<T*>(a.sum) + row * size;
      total = sum_of(size, [=](int64_t i) {
        sum[i] = from_float<T>(to_float(x[i]) + to_float(residual[i]));
        return first(to_float(sum[i]));
      });
      x = sum;
    } else {
      total = sum_of(size, [=](int64_t i) { return first(to_float(x[i])); });
    }
    float mean = 0.0f;
    if (centred) {
      a.mean[row] = mean = total / static_cast<float>(size);
      total = sum_of(size, [=](int64_t i) { return (to_float(x[i]) - mean) * (to_float(x[i]) - mean); });
    }
    const float rstd = 1.0f / std::sqrt(total / static_cast<float>(size) + a.eps);
    a.rstd[row] = rstd;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const float value = (to_float(x[i]) - mean) * rstd * scale(i);
      out[i] = from_float<T>(centred ? value + to_float(bias[i]) : value);
    }
  }
}

// With y = (x - mean) rstd: dx = rstd (g w - mean(g w) - y mean(g w y)), dw = sum of g y and db = sum of g over the rows.
// RMSNorm lacks both means.
template <class T, bool centred, bool has_unit>
void backward(const NormBackward& a, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t size = a.size;
  const float unit = has_unit ? a.unit : 0.0f;
  const auto scale = [=](int64_t i) { return has_unit ? to_float(weight[i]) + unit : to_float(weight[i]); };
  for (int64_t part = begin; part < end; ++part) {
    float* dweight = a.dweight + part * size;
    float* dbias = a.dbias + part * size;
    for (int64_t i = 0; i < size; ++i) dweight[i] = 0.0f;
    if (centred)
      for (int64_t i = 0; i < size; ++i) dbias[i] = 0.0f;
    for (int64_t row = a.rows * part / a.parts; row < a.rows * (part + 1) / a.parts; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * size;
      const T* grad = static_cast<const T*>(a.grad) + row * size;
      T* dx = static_cast<T*>(a.dx) + row * size;
      const float rstd = a.rstd[row], mean = centred ? a.mean[row] : 0.0f;
      const float dot = sum_of(size, [=](int64_t i) {
        const float product = to_float(grad[i]) * (to_float(x[i]) - mean) * rstd;
        dweight[i] += product;
        return product * scale(i);
      });
      const float slope = dot / static_cast<float>(size) * rstd;
      float offset = 0.0f;
      if (centred) {
        offset = sum_of(size, [=](int64_t i) {
          dbias[i] += to_float(grad[i]);
          return to_float(grad[i]) * scale(i);
        });
        offset /= static_cast<float>(size);
      }
      const auto value = [=](int64_t i) {
        return (to_float(grad[i]) * scale(i) - offset - (to_float(x[i]) - mean) * slope) * rstd;
      };
      if (a.grad_sum) {
        const T* grad_sum = static_cast<const T*>(a.grad_sum) + row * size;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) dx[i] = from_float<T>(value(i) + to_float(grad_sum[i]));
      } else {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) dx[i] = from_float<T>(value(i));
      }
    }
  }
}

template <class T>
void forward_of(const NormForward& a, int64_t begin, int64_t end) {
  if (a.bias)
    forward<T, true, false>(a, begin, end);
  else
    a.unit != 0.0f ? forward<T, false, true>(a, begin, end) : forward<T, false, false>(a, begin, end);
}

template <class T>
void backward_of(const NormBackward& a, int64_t begin, int64_t end) {
  if (a.dbias)
    backward<T, true, false>(a, begin, end);
  else
    a.unit != 0.0f ? backward<T, false, true>(a, begin, end) : backward<T, false, false>(a, begin, end);
}

}  // namespace

void norm_forward(const NormForward& a, int64_t begin, int64_t end) {
  MEGALITE_BY_TYPE(a.type, forward_of, a, begin, end);
}

void norm_backward(const NormBackward& a, int64_t begin, int64_t end) {
  MEGALITE_BY_TYPE(a.type, backward_of, a, begin, end);
}

}  // namespace megalite::cpu::MEGALITE_ISA
