#include "../optimizer.h"

#include <cmath>

#include "vec.h"

namespace megalite::cpu::MEGALITE_ISA {

namespace {

// Where a part begins, and the one before it ends.
inline int64_t bound(int64_t part, int64_t size) {
  const int64_t begin = part * OPTIMIZER_PART;
  return begin < size ? begin : size;
}

template <bool COPIES>
void update(const AdamW& a, int64_t begin, int64_t end) {
  float *const master = a.master, *const exp_avg = a.exp_avg, *const exp_avg_sq = a.exp_avg_sq;
  bf16* const weights = static_cast<bf16*>(a.weights);
  const float* const grad = a.grad;
  const float divisor = a.factors[0], decay = a.decay, rest1 = a.rest1, beta2 = a.beta2, rest2 = a.rest2;
  const float step_size = a.lr / a.factors[1], root_correction = std::sqrt(a.factors[2]), eps = a.eps;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float g = grad[i] / divisor;
    const float m = exp_avg[i] + rest1 * (g - exp_avg[i]);
    const float v = beta2 * exp_avg_sq[i] + rest2 * g * g;
    const float decayed = master[i] - decay * master[i];
    const float value = decayed - step_size * m / (std::sqrt(v) / root_correction + eps);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    master[i] = value;
    if (COPIES) weights[i] = from_float<bf16>(value);
  }
}

}  // namespace

void adamw(const AdamW& a, int64_t begin, int64_t end) {
  if (a.factors[0] <= 0.0f) return;
  for (int64_t part = begin; part < end; ++part)
    (a.weights ? update<true> : update<false>)(a, bound(part, a.size), bound(part + 1, a.size));
}

namespace {

template <typename T>
void average(const Momentum& a, int64_t begin, int64_t end) {
  const float divisor = a.divisor[0], rest = 1.0f - a.momentum, share = a.nesterov ? a.momentum : 1.0f;
  float* const buffer = a.buffer;
  T* const out = static_cast<T*>(a.out);
  const float* const grad = a.grad;
  if (divisor <= 0.0f) {
    for (int64_t i = begin; i < end; ++i) out[i] = from_float<T>(0.0f);
    return;
  }
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float g = grad[i] / divisor;
    const float m = buffer[i] + rest * (g - buffer[i]);
    buffer[i] = m;
    out[i] = from_float<T>(g + share * (m - g));
  }
}

template <bool COPIES, typename T>
void take_step(const DecayedStep& a, int64_t begin, int64_t end) {
  float* const master = a.master;
  bf16* const weights = static_cast<bf16*>(a.weights);
  const T* const step = static_cast<const T*>(a.step);
  const float decay = a.decay, lr = a.lr;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float value = master[i] - decay * master[i] - lr * to_float(step[i]);
    master[i] = value;
    if (COPIES) weights[i] = from_float<bf16>(value);
  }
}

}  // namespace

void momentum(const Momentum& a, int64_t begin, int64_t end) {
  for (int64_t part = begin; part < end; ++part)
    (a.rounds ? average<bf16> : average<float>)(a, bound(part, a.size), bound(part + 1, a.size));
}

void decayed_step(const DecayedStep& a, int64_t begin, int64_t end) {
  if (a.divisor[0] <= 0.0f) return;
  const auto rounded = a.weights ? take_step<true, bf16> : take_step<false, bf16>;
  const auto exact = a.weights ? take_step<true, float> : take_step<false, float>;
  for (int64_t part = begin; part < end; ++part)
    (a.rounded ? rounded : exact)(a, bound(part, a.size), bound(part + 1, a.size));
}

// In fp32 over short runs, then in double: in fp32 alone, the sum of millions of squares is off by up to 5e-4.
void sum_of_squares(const SumOfSquares& a, int64_t begin, int64_t end) {
  constexpr int64_t RUN = 512;
  for (int64_t part = begin; part < end; ++part) {
    const int64_t stop = bound(part + 1, a.size);
    double sum = 0.0;
    for (int64_t first = bound(part, a.size); first < stop; first += RUN) {
      const float* x = a.x + first;
      const int64_t count = stop - first < RUN ? stop - first : RUN;
      float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < count; ++i) squares += x[i] * x[i];
      sum += squares;
    }
    a.parts[part] = sum;
  }
}

}  // namespace megalite::cpu::MEGALITE_ISA
