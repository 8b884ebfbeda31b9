#include "../norm.h"

#include "common.cuh"

namespace megalite::cuda {

namespace {

// One block a row. Bytes a row: reads x (and residual), writes out (and sum); later passes find the row in L1. `centred`:
// LayerNorm, whose variance has a pass of its own: the difference of mean(x²) and mean(x)² would cancel where the mean is
// large.
template <class T, int N, bool centred>
__global__ void norm_forward_kernel(NormForward a) {
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(a.x) + row * a.size;
  const T* residual = static_cast<const T*>(a.residual) + row * a.size;
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  T* out = static_cast<T*>(a.out) + row * a.size;
  T* sum = static_cast<T*>(a.sum) + row * a.size;
  const float unit = centred ? 0.0f : a.unit;
  float total = 0.0f;
  for (int64_t i = threadIdx.x * N; i < a.size; i += blockDim.x * N) {
    Pack<T, N> values = load<N>(x + i);
    if (a.residual) {
      const Pack<T, N> more = load<N>(residual + i);
      for (int j = 0; j < N; ++j) values.at[j] = from_float<T>(to_float(values.at[j]) + to_float(more.at[j]));
      store(sum + i, values);
    }
    for (int j = 0; j < N; ++j) total += to_float(values.at[j]) * (centred ? 1.0f : to_float(values.at[j]));
  }
  const T* normalised = a.residual ? sum : x;  // each thread reads again only what it wrote itself
  float mean = 0.0f;
  if (centred) {
    mean = block_sum(total) / static_cast<float>(a.size);
    total = 0.0f;
    for (int64_t i = threadIdx.x * N; i < a.size; i += blockDim.x * N) {
      const Pack<T, N> values = load<N>(normalised + i);
      for (int j = 0; j < N; ++j) total += (to_float(values.at[j]) - mean) * (to_float(values.at[j]) - mean);
    }
  }
  const float rstd = rsqrtf(block_sum(total) / static_cast<float>(a.size) + a.eps);
  if (threadIdx.x == 0) {
    if (centred) a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
  for (int64_t i = threadIdx.x * N; i < a.size; i += blockDim.x * N) {
    Pack<T, N> values = load<N>(normalised + i), shift;
    const Pack<T, N> scale = load<N>(weight + i);
    if (centred) shift = load<N>(bias + i);
    for (int j = 0; j < N; ++j) {
      float value = (to_float(values.at[j]) - mean) * rstd * (to_float(scale.at[j]) + unit);
      if (centred) value += to_float(shift.at[j]);
      values.at[j] = from_float<T>(value);
    }
    store(out + i, values);
  }
}

// One block a part of the rows; each thread sums its columns' share of the gradients of weight and bias. `in_registers`:
// the block has a thread for every pack of a row, so that the sums of its one pack stay in registers; else they are kept
// in memory, which costs L1 a read and a write of fp32 per element.
// Bytes a row: reads grad, x (and grad_sum), writes dx; the second pass over grad and x finds them in L1.
template <class T, int N, bool centred, bool in_registers>
__global__ void norm_backward_kernel(NormBackward a) {
  const int64_t part = blockIdx.x;
  const T* weight = static_cast<const T*>(a.weight);
  float* dweight = a.dweight + part * a.size;
  float* dbias = a.dbias + part * a.size;
  const float unit = centred ? 0.0f : a.unit;
  float own_dweight[N] = {}, own_dbias[N] = {};
  const auto write_sums = [&](int64_t i) {
    for (int j = 0; j < N; ++j) {
      dweight[i + j] = own_dweight[j];
      if (centred) dbias[i + j] = own_dbias[j];
    }
  };
  if (!in_registers)
    for (int64_t i = threadIdx.x * N; i < a.size; i += blockDim.x * N) write_sums(i);
  for (int64_t row = a.rows * part / a.parts; row < a.rows * (part + 1) / a.parts; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.size;
    const T* grad = static_cast<const T*>(a.grad) + row * a.size;
    const T* grad_sum = static_cast<const T*>(a.grad_sum) + row * a.size;
    T* dx = static_cast<T*>(a.dx) + row * a.size;
    const float rstd = a.rstd[row], mean = centred ? a.mean[row] : 0.0f;
    float dot = 0.0f, total = 0.0f;
    for (int64_t i = threadIdx.x * N; i < a.size; i += blockDim.x * N) {
      const Pack<T, N> values = load<N>(x + i), grads = load<N>(grad + i), scale = load<N>(weight + i);
      for (int j = 0; j < N; ++j) {
        const float g = to_float(grads.at[j]), product = g * (to_float(values.at[j]) - mean) * rstd;
        (in_registers ? own_dweight[j] : dweight[i + j]) += product;
        dot += product * (to_float(scale.at[j]) + unit);
        if (centred) {
          (in_registers ? own_dbias[j] : dbias[i + j]) += g;
          total += g * to_float(scale.at[j]);
        }
      }
    }
    const float slope = block_sum(dot) / static_cast<float>(a.size) * rstd;
    const float offset = centred ? block_sum(total) / static_cast<float>(a.size) : 0.0f;
    for (int64_t i = threadIdx.x * N; i < a.size; i += blockDim.x * N) {
      const Pack<T, N> values = load<N>(x + i), grads = load<N>(grad + i), scale = load<N>(weight + i);
      Pack<T, N> result, more;
      if (a.grad_sum) more = load<N>(grad_sum + i);
      for (int j = 0; j < N; ++j) {
        float value = to_float(grads.at[j]) * (to_float(scale.at[j]) + unit) - offset;
        value = (value - (to_float(values.at[j]) - mean) * slope) * rstd;
        if (a.grad_sum) value += to_float(more.at[j]);
        result.at[j] = from_float<T>(value);
      }
      store(dx + i, result);
    }
  }
  if (in_registers && threadIdx.x * N < a.size) write_sums(threadIdx.x * N);
}

template <class T, int N, bool centred>
void launch_backward(const NormBackward& a, cudaStream_t stream) {
  const int threads = threads_for(a.size / N);
  if (a.size <= threads * N)
    norm_backward_kernel<T, N, centred, true><<<a.parts, threads, 0, stream>>>(a);
  else
    norm_backward_kernel<T, N, centred, false><<<a.parts, threads, 0, stream>>>(a);
}

template <class T, bool centred>
void forward(const NormForward& a, cudaStream_t stream) {
  if (aligned<T>(a.size, a.x, a.residual, a.weight, a.bias, a.out, a.sum))
    norm_forward_kernel<T, PACK<T>, centred><<<a.rows, threads_for(a.size / PACK<T>), 0, stream>>>(a);
  else
    norm_forward_kernel<T, 1, centred><<<a.rows, threads_for(a.size), 0, stream>>>(a);
  check_launch(centred ? "layer_norm" : "rms_norm");
}

template <class T, bool centred>
void backward(const NormBackward& a, cudaStream_t stream) {
  if (aligned<T>(a.size, a.x, a.grad, a.grad_sum, a.weight, a.dx))
    launch_backward<T, PACK<T>, centred>(a, stream);
  else
    launch_backward<T, 1, centred>(a, stream);
  check_launch(centred ? "layer_norm_backward" : "rms_norm_backward");
}

template <class T>
void forward_of(const NormForward& a, cudaStream_t stream) {
  a.bias ? forward<T, true>(a, stream) : forward<T, false>(a, stream);
}

template <class T>
void backward_of(const NormBackward& a, cudaStream_t stream) {
  a.dbias ? backward<T, true>(a, stream) : backward<T, false>(a, stream);
}

}  // namespace

void norm_forward(const NormForward& a, void* stream) {
  MEGALITE_CUDA_BY_TYPE(a.type, forward_of, a, static_cast<cudaStream_t>(stream));
}

void norm_backward(const NormBackward& a, void* stream) {
  MEGALITE_CUDA_BY_TYPE(a.type, backward_of, a, static_cast<cudaStream_t>(stream));
}

}  // namespace megalite::cuda
