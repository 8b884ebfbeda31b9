#include "../activation.h"

#include "common.cuh"

namespace megalite::cuda {

namespace {

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// One block a row. Bytes a row: reads gates and ups, writes out.
template <class T, int N>
__global__ void swiglu(SwigluForward a) {
  const int64_t row = blockIdx.x;
  const T* gate = static_cast<const T*>(a.gate_up) + row * 2 * a.size;
  const T* up = gate + a.size;
  T* out = static_cast<T*>(a.out) + row * a.size;
  for (int64_t i = threadIdx.x * N; i < a.size; i += blockDim.x * N) {
    const Pack<T, N> gates = load<N>(gate + i);
    Pack<T, N> values = load<N>(up + i);
    for (int j = 0; j < N; ++j) {
      const float x = to_float(gates.at[j]);
      values.at[j] = from_float<T>(x * sigmoid(x) * to_float(values.at[j]));
    }
    store(out + i, values);
  }
}

// One block a row. Bytes a row: reads grad, gates and ups, writes the gradients of gates and ups.
template <class T, int N>
__global__ void swiglu_gradient(SwigluBackward a) {
  const int64_t row = blockIdx.x;
  const T* grad = static_cast<const T*>(a.grad) + row * a.size;
  const T* gate = static_cast<const T*>(a.gate_up) + row * 2 * a.size;
  const T* up = gate + a.size;
  T* d_gate = static_cast<T*>(a.d_gate_up) + row * 2 * a.size;
  T* d_up = d_gate + a.size;
  for (int64_t i = threadIdx.x * N; i < a.size; i += blockDim.x * N) {
    Pack<T, N> gates = load<N>(gate + i), ups = load<N>(up + i);
    const Pack<T, N> grads = load<N>(grad + i);
    for (int j = 0; j < N; ++j) {
      const float x = to_float(gates.at[j]), s = sigmoid(x), g = to_float(grads.at[j]);
      gates.at[j] = from_float<T>(g * to_float(ups.at[j]) * s * (1.0f + x * (1.0f - s)));
      ups.at[j] = from_float<T>(g * x * s);
    }
    store(d_gate + i, gates);
    store(d_up + i, ups);
  }
}

// x/2 (1 + tanh(u)) = x sigmoid(2u), with u = sqrt(2/pi) (x + 0.044715 x^3).
__device__ inline float twice_u(float x) { return x * (1.59576912f + 0.0713548163f * x * x); }

__device__ inline float gelu_slope(float x) {
  const float s = sigmoid(twice_u(x));
  return s + x * s * (1.0f - s) * (1.59576912f + 0.214064449f * x * x);
}

// `x` with the bias, if there is one, added to it in fp32.
template <class T, int N>
__device__ inline void biased(const Pack<T, N>& x, const T* bias, int64_t i, float (&sum)[N]) {
  for (int j = 0; j < N; ++j) sum[j] = to_float(x.at[j]);
  if (bias) {
    const Pack<T, N> shift = load<N>(bias + i);
    for (int j = 0; j < N; ++j) sum[j] += to_float(shift.at[j]);
  }
}

// One block a row. Bytes a row: reads x, writes out; the bias stays in L2.
template <class T, int N>
__global__ void gelu(GeluForward a) {
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(a.x) + row * a.size;
  const T* bias = static_cast<const T*>(a.bias);
  T* out = static_cast<T*>(a.out) + row * a.size;
  for (int64_t i = threadIdx.x * N; i < a.size; i += blockDim.x * N) {
    Pack<T, N> values = load<N>(x + i);
    float sum[N];
    biased(values, bias, i, sum);
    for (int j = 0; j < N; ++j) values.at[j] = from_float<T>(sum[j] * sigmoid(twice_u(sum[j])));
    store(out + i, values);
  }
}

// One block a part of the rows, which it goes down column by column, so that a thread keeps its share of the bias's
// gradient in registers. Bytes a row: reads grad and x, writes dx.
template <class T, int N>
__global__ void gelu_gradient(GeluBackward a) {
  const int64_t part = blockIdx.x;
  const T* bias = static_cast<const T*>(a.bias);
  const int64_t first = a.rows * part / a.parts, last = a.rows * (part + 1) / a.parts;
  for (int64_t i = threadIdx.x * N; i < a.size; i += blockDim.x * N) {
    float total[N] = {};
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = row * a.size + i;
      const Pack<T, N> grads = load<N>(static_cast<const T*>(a.grad) + at);
      Pack<T, N> values = load<N>(static_cast<const T*>(a.x) + at);
      float sum[N];
      biased(values, bias, i, sum);
      for (int j = 0; j < N; ++j) {
        const float value = to_float(grads.at[j]) * gelu_slope(sum[j]);
        total[j] += value;
        values.at[j] = from_float<T>(value);
      }
      store(static_cast<T*>(a.dx) + at, values);
    }
    if (bias)
      for (int j = 0; j < N; ++j) a.dbias[part * a.size + i + j] = total[j];
  }
}

template <class T>
void launch(const SwigluForward& a, cudaStream_t stream) {
  if (aligned<T>(a.size, a.gate_up, a.out))
    swiglu<T, PACK<T>><<<a.rows, threads_for(a.size / PACK<T>), 0, stream>>>(a);
  else
    swiglu<T, 1><<<a.rows, threads_for(a.size), 0, stream>>>(a);
  check_launch("swiglu");
}

template <class T>
void launch(const SwigluBackward& a, cudaStream_t stream) {
  if (aligned<T>(a.size, a.grad, a.gate_up, a.d_gate_up))
    swiglu_gradient<T, PACK<T>><<<a.rows, threads_for(a.size / PACK<T>), 0, stream>>>(a);
  else
    swiglu_gradient<T, 1><<<a.rows, threads_for(a.size), 0, stream>>>(a);
  check_launch("swiglu_backward");
}

template <class T>
void launch(const GeluForward& a, cudaStream_t stream) {
  if (aligned<T>(a.size, a.x, a.bias, a.out))
    gelu<T, PACK<T>><<<a.rows, threads_for(a.size / PACK<T>), 0, stream>>>(a);
  else
    gelu<T, 1><<<a.rows, threads_for(a.size), 0, stream>>>(a);
  check_launch("gelu");
}

template <class T>
void launch(const GeluBackward& a, cudaStream_t stream) {
  if (aligned<T>(a.size, a.grad, a.x, a.bias, a.dx))
    gelu_gradient<T, PACK<T>><<<a.parts, threads_for(a.size / PACK<T>), 0, stream>>>(a);
  else
    gelu_gradient<T, 1><<<a.parts, threads_for(a.size), 0, stream>>>(a);
  check_launch("gelu_backward");
}

}  // namespace

void swiglu_forward(const SwigluForward& a, void* stream) {
  MEGALITE_CUDA_BY_TYPE(a.type, launch, a, static_cast<cudaStream_t>(stream));
}

void swiglu_backward(const SwigluBackward& a, void* stream) {
  MEGALITE_CUDA_BY_TYPE(a.type, launch, a, static_cast<cudaStream_t>(stream));
}

void gelu_forward(const GeluForward& a, void* stream) {
  MEGALITE_CUDA_BY_TYPE(a.type, launch, a, static_cast<cudaStream_t>(stream));
}

void gelu_backward(const GeluBackward& a, void* stream) {
  MEGALITE_CUDA_BY_TYPE(a.type, launch, a, static_cast<cudaStream_t>(stream));
}

}  // namespace megalite::cuda
