#include "../activation.h"

#include "vec.h"

namespace megalite::cpu::MEGALITE_ISA {

namespace {

template <class T>
void swiglu(const SwigluForward& a, int64_t begin, int64_t end) {
  const int64_t size = a.size;
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(a.gate_up) + row * 2 * size;
    const T* up = gate + size;
    T* out = static_cast<T*>(a.out) + row * size;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const float x = to_float(gate[i]);
      out[i] = from_float<T>(x * sigmoid(x) * to_float(up[i]));
    }
  }
}

// silu' = s (1 + x (1 - s)), s being the sigmoid.
template <class T>
void swiglu_gradient(const SwigluBackward& a, int64_t begin, int64_t end) {
  const int64_t size = a.size;
  for (int64_t row = begin; row < end; ++row) {
    const T* grad = static_cast<const T*>(a.grad) + row * size;
    const T* gate = static_cast<const T*>(a.gate_up) + row * 2 * size;
    const T* up = gate + size;
    T* d_gate = static_cast<T*>(a.d_gate_up) + row * 2 * size;
    T* d_up = d_gate + size;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const float x = to_float(gate[i]), s = sigmoid(x), g = to_float(grad[i]);
      d_gate[i] = from_float<T>(g * to_float(up[i]) * s * (1.0f + x * (1.0f - s)));
      d_up[i] = from_float<T>(g * x * s);
    }
  }
}

// x/2 (1 + tanh(u)) = x sigmoid(2u), with u = sqrt(2/pi) (x + 0.044715 x^3).
inline float twice_u(float x) { return x * (1.59576912f + 0.0713548163f * x * x); }

inline float gelu(float x) { return x * sigmoid(twice_u(x)); }

inline float gelu_slope(float x) {
  const float s = sigmoid(twice_u(x));
  return s + x * s * (1.0f - s) * (1.59576912f + 0.214064449f * x * x);
}

template <class T>
void gelu_rows(const GeluForward& a, int64_t begin, int64_t end) {
  const T* bias = static_cast<const T*>(a.bias);
  const int64_t size = a.size;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * size;
    T* out = static_cast<T*>(a.out) + row * size;
    if (bias) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) out[i] = from_float<T>(gelu(to_float(x[i]) + to_float(bias[i])));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) out[i] = from_float<T>(gelu(to_float(x[i])));
    }
  }
}

template <class T>
void gelu_gradient(const GeluBackward& a, int64_t begin, int64_t end) {
  const T* bias = static_cast<const T*>(a.bias);
  const int64_t size = a.size;
  for (int64_t part = begin; part < end; ++part) {
    float* dbias = a.dbias + part * size;
    if (bias)
      for (int64_t i = 0; i < size; ++i) dbias[i] = 0.0f;
    for (int64_t row = a.rows * part / a.parts; row < a.rows * (part + 1) / a.parts; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * size;
      const T* grad = static_cast<const T*>(a.grad) + row * size;
      T* dx = static_cast<T*>(a.dx) + row * size;
      if (bias) {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
          const float value = to_float(grad[i]) * gelu_slope(to_float(x[i]) + to_float(bias[i]));
          dbias[i] += value;
          dx[i] = from_float<T>(value);
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) dx[i] = from_float<T>(to_float(grad[i]) * gelu_slope(to_float(x[i])));
      }
    }
  }
}

}  // namespace

void swiglu_forward(const SwigluForward& a, int64_t begin, int64_t end) {
  MEGALITE_BY_TYPE(a.type, swiglu, a, begin, end);
}

void swiglu_backward(const SwigluBackward& a, int64_t begin, int64_t end) {
  MEGALITE_BY_TYPE(a.type, swiglu_gradient, a, begin, end);
}

void gelu_forward(const GeluForward& a, int64_t begin, int64_t end) {
  MEGALITE_BY_TYPE(a.type, gelu_rows, a, begin, end);
}

void gelu_backward(const GeluBackward& a, int64_t begin, int64_t end) {
  MEGALITE_BY_TYPE(a.type, gelu_gradient, a, begin, end);
}

}  // namespace megalite::cpu::MEGALITE_ISA
