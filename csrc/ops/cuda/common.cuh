// What CUDA kernels share: elements in packs of 16 bytes, sums over a block, checked launches. No torch in here, so that
// nvcc compiles the kernels on machines that have neither a GPU nor torch's CUDA build.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../types.h"

namespace megalite::cuda {

using bf16 = __nv_bfloat16;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
template <class T> __device__ T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }

// N elements that are read and written at once: 16 bytes, or one element where rows are not aligned to that.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T at[N];
};
template <class T> constexpr int PACK = 16 / sizeof(T);

template <int N, class T>
__device__ inline Pack<T, N> load(const T* from) { return *reinterpret_cast<const Pack<T, N>*>(from); }
template <class T, int N>
__device__ inline void store(T* to, const Pack<T, N>& pack) { *reinterpret_cast<Pack<T, N>*>(to) = pack; }

// Whether rows of `size` elements that begin at these addresses can be read 16 bytes at a time. Null counts as yes.
template <class T, class... Pointers>
inline bool aligned(int64_t size, Pointers... pointers) {
  return size % PACK<T> == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

constexpr int MAX_THREADS = 1024;

__device__ inline float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// The sum over all threads of the block, given to all of them. Calls may follow each other without a barrier between.
__device__ inline float block_sum(float x) {
  __shared__ float sums[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  x = warp_sum(x);
  __syncthreads();
  if (lane == 0) sums[warp] = x;
  __syncthreads();
  return warp_sum(lane < (blockDim.x + 31) / 32 ? sums[lane] : 0.0f);
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

// Threads for a row of `items` packs or elements: whole warps, enough that each has one or a few.
inline int threads_for(int64_t items) {
  int threads = 32;
  while (threads < MAX_THREADS && threads < items) threads *= 2;
  return threads;
}

}  // namespace megalite::cuda

// Calls `function<float>` or `function<bf16>`.
#define MEGALITE_CUDA_BY_TYPE(type, function, ...) \
  ((type) == megalite::Type::f32 ? function<float>(__VA_ARGS__) : function<megalite::cuda::bf16>(__VA_ARGS__))
