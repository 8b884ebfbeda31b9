#include <math_constants.h>

#include "../loss.h"

#include "common.cuh"

namespace megalite::cuda {

namespace {

// The largest over all threads of the block, given to all of them.
__device__ inline float block_max(float x) {
  __shared__ float tops[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  __syncthreads();
  if (lane == 0) tops[warp] = x;
  __syncthreads();
  x = lane < (blockDim.x + 31) / 32 ? tops[lane] : -CUDART_INF_F;
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// What e^x is computed relative to. As long as there was nothing but -inf (or NaN, which then shows), any finite number
// gives the right sum.
__device__ inline float shift_of(float largest) { return largest == -CUDART_INF_F ? 0.0f : largest; }

// One block a row. Bytes a row: reads the valid logits, once; each thread keeps the largest and the sum of its own.
template <class T, int N>
__global__ void forward(CrossEntropyForward a) {
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(a.logits) + row * a.size;
  float largest = -CUDART_INF_F, sum = 0.0f;
  for (int64_t i = threadIdx.x * N; i < a.valid; i += blockDim.x * N) {
    const Pack<T, N> pack = load<N>(x + i);
    float values[N], top = largest;
    for (int j = 0; j < N; ++j) {
      values[j] = i + j < a.valid ? to_float(pack.at[j]) : -CUDART_INF_F;
      top = fmaxf(top, values[j]);
    }
    const float shift = shift_of(top);
    sum *= __expf(largest - shift);
    for (int j = 0; j < N; ++j) sum += __expf(values[j] - shift);
    largest = top;
  }
  const float shift = shift_of(block_max(largest));
  sum = block_sum(sum * __expf(largest - shift));
  if (threadIdx.x != 0) return;
  a.lse[row] = shift + logf(sum);
  const int64_t column = a.labels[row] - a.first;
  a.target[row] = column >= 0 && column < a.valid ? to_float(x[column]) : 0.0f;
}

// One block a row. Bytes a row: reads and writes the logits; where the gradient is 0, only writes.
template <class T, int N>
__global__ void backward(CrossEntropyBackward a) {
  const int64_t row = blockIdx.x, column = a.labels[row] - a.first;
  T* x = static_cast<T*>(a.logits) + row * a.size;
  const float lse = a.lse[row], grad = a.grad[row];
  const int64_t valid = grad == 0.0f ? 0 : a.valid;
  for (int64_t i = threadIdx.x * N; i < a.size; i += blockDim.x * N) {
    Pack<T, N> pack;
    if (i < valid) pack = load<N>(x + i);
    for (int j = 0; j < N; ++j) {
      const float hit = i + j == column ? 1.0f : 0.0f;
      pack.at[j] = from_float<T>(i + j < valid ? (__expf(to_float(pack.at[j]) - lse) - hit) * grad : 0.0f);
    }
    store(x + i, pack);
  }
}

template <class T>
void launch(const CrossEntropyForward& a, cudaStream_t stream) {
  if (aligned<T>(a.size, a.logits))
    forward<T, PACK<T>><<<a.rows, threads_for(a.size / PACK<T>), 0, stream>>>(a);
  else
    forward<T, 1><<<a.rows, threads_for(a.size), 0, stream>>>(a);
  check_launch("cross_entropy_forward");
}

template <class T>
void launch(const CrossEntropyBackward& a, cudaStream_t stream) {
  if (aligned<T>(a.size, a.logits))
    backward<T, PACK<T>><<<a.rows, threads_for(a.size / PACK<T>), 0, stream>>>(a);
  else
    backward<T, 1><<<a.rows, threads_for(a.size), 0, stream>>>(a);
  check_launch("cross_entropy_backward_");
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& a, void* stream) {
  MEGALITE_CUDA_BY_TYPE(a.type, launch, a, static_cast<cudaStream_t>(stream));
}

void cross_entropy_backward(const CrossEntropyBackward& a, void* stream) {
  MEGALITE_CUDA_BY_TYPE(a.type, launch, a, static_cast<cudaStream_t>(stream));
}

}  // namespace megalite::cuda
