#include "../norm.h"

#include "common.cuh"

namespace megalite::cuda {

namespace {

// One block a row. Bytes a row: reads x (and residual), writes out (and sum); the second pass finds the row in L1.
template <class T, int N>
__global__ void rms_forward(NormForward a) {
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(a.x) + row * a.size;
  const T* residual = static_cast<const T*>(a.residual) + row * a.size;
  const T* weight = static_cast<const T*>(a.weight);
  T* out = static_cast<T*>(a.out) + row * a.size;
  T* sum = static_cast<T*>(a.sum) + row * a.size;
  float squares = 0.0f;
  for (int64_t i = threadIdx.x * N; i < a.size; i += blockDim.x * N) {
    Pack<T, N> values = load<N>(x + i);
    if (a.residual) {
      const Pack<T, N> more = load<N>(residual + i);
      for (int j = 0; j < N; ++j) values.at[j] = from_float<T>(to_float(values.at[j]) + to_float(more.at[j]));
      store(sum + i, values);
    }
    for (int j = 0; j < N; ++j) squares += to_float(values.at[j]) * to_float(values.at[j]);
  }
  const float rstd = rsqrtf(block_sum(squares) / static_cast<float>(a.size) + a.eps);
  if (threadIdx.x == 0) a.rstd[row] = rstd;
  const T* normalised = a.residual ? sum : x;  // each thread reads again only what it wrote itself
  for (int64_t i = threadIdx.x * N; i < a.size; i += blockDim.x * N) {
    Pack<T, N> values = load<N>(normalised + i);
    const Pack<T, N> scale = load<N>(weight + i);
    for (int j = 0; j < N; ++j) values.at[j] = from_float<T>(to_float(values.at[j]) * rstd * to_float(scale.at[j]));
    store(out + i, values);
  }
}

// One block a part of the rows; a thread keeps its columns' share of the weight's gradient in `dweight`, which stays in
// L1. Bytes a row: reads grad, x (and grad_sum), writes dx; the second pass over grad and x finds them in L1.
template <class T, int N>
__global__ void rms_backward(NormBackward a) {
  const int64_t part = blockIdx.x;
  const T* weight = static_cast<const T*>(a.weight);
  float* dweight = a.dweight + part * a.size;
  for (int64_t i = threadIdx.x * N; i < a.size; i += blockDim.x * N)
    for (int j = 0; j < N; ++j) dweight[i + j] = 0.0f;
  for (int64_t row = a.rows * part / a.parts; row < a.rows * (part + 1) / a.parts; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.size;
    const T* grad = static_cast<const T*>(a.grad) + row * a.size;
    const T* grad_sum = static_cast<const T*>(a.grad_sum) + row * a.size;
    T* dx = static_cast<T*>(a.dx) + row * a.size;
    const float rstd = a.rstd[row];
    float dot = 0.0f;
    for (int64_t i = threadIdx.x * N; i < a.size; i += blockDim.x * N) {
      const Pack<T, N> values = load<N>(x + i), grads = load<N>(grad + i), scale = load<N>(weight + i);
      for (int j = 0; j < N; ++j) {
        const float product = to_float(grads.at[j]) * to_float(values.at[j]) * rstd;
        dweight[i + j] += product;
        dot += product * to_float(scale.at[j]);
      }
    }
    const float mean = block_sum(dot) / static_cast<float>(a.size) * rstd;
    for (int64_t i = threadIdx.x * N; i < a.size; i += blockDim.x * N) {
      const Pack<T, N> values = load<N>(x + i), grads = load<N>(grad + i), scale = load<N>(weight + i);
      Pack<T, N> result, more;
      if (a.grad_sum) more = load<N>(grad_sum + i);
      for (int j = 0; j < N; ++j) {
        float value = (to_float(grads.at[j]) * to_float(scale.at[j]) - to_float(values.at[j]) * mean) * rstd;
        if (a.grad_sum) value += to_float(more.at[j]);
        result.at[j] = from_float<T>(value);
      }
      store(dx + i, result);
    }
  }
}

template <class T>
void forward(const NormForward& a, cudaStream_t stream) {
  if (aligned<T>(a.size, a.x, a.residual, a.weight, a.out, a.sum))
    rms_forward<T, PACK<T>><<<a.rows, threads_for(a.size / PACK<T>), 0, stream>>>(a);
  else
    rms_forward<T, 1><<<a.rows, threads_for(a.size), 0, stream>>>(a);
  check_launch("rms_norm");
}

template <class T>
void backward(const NormBackward& a, cudaStream_t stream) {
  if (aligned<T>(a.size, a.x, a.grad, a.grad_sum, a.weight, a.dx))
    rms_backward<T, PACK<T>><<<a.parts, threads_for(a.size / PACK<T>), 0, stream>>>(a);
  else
    rms_backward<T, 1><<<a.parts, threads_for(a.size), 0, stream>>>(a);
  check_launch("rms_norm_backward");
}

}  // namespace

void rms_norm_forward(const NormForward& a, void* stream) {
  MEGALITE_CUDA_BY_TYPE(a.type, forward, a, static_cast<cudaStream_t>(stream));
}

void rms_norm_backward(const NormBackward& a, void* stream) {
  MEGALITE_CUDA_BY_TYPE(a.type, backward, a, static_cast<cudaStream_t>(stream));
}

}  // namespace megalite::cuda
