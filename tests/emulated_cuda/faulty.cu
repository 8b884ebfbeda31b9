// Small kernels, each with one fault that the emulated device must find, and a few without one. `try_launch` is called
// by faults.py.
#include <cuda_runtime.h>

#include <exception>
#include <string>

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace {

constexpr int N = 64;

__global__ void no_barrier(float* out) {
  __shared__ float x[N];
  x[threadIdx.x] = 0.0f;
  __syncthreads();
  x[threadIdx.x] = 1.0f;
  out[threadIdx.x] = x[N - 1 - threadIdx.x];
}

__global__ void with_barrier(float* out) {
  __shared__ float x[N];
  x[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = x[N - 1 - threadIdx.x];
}

__global__ void read_before_barrier(float* out) {
  __shared__ float x[N];
  x[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = x[N - 1 - threadIdx.x];
  x[threadIdx.x] = 2.0f;
}

__global__ void no_warp_barrier(float* out) {
  __shared__ float x[N];
  x[threadIdx.x] = 0.0f;
  __syncwarp();
  x[threadIdx.x] = 1.0f;
  out[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0) + x[threadIdx.x ^ 1];
}

__global__ void with_warp_barrier(float* out) {
  __shared__ float x[N];
  x[threadIdx.x] = 1.0f;
  __syncwarp();
  out[threadIdx.x] = x[threadIdx.x ^ 1];
  __syncwarp(0xffffffffu);
  x[threadIdx.x ^ 1] = 2.0f;
}

__global__ void warp_barrier_for_a_block(float* out) {
  __shared__ float x[N];
  x[threadIdx.x] = 0.0f;
  __syncthreads();
  x[threadIdx.x] = 1.0f;
  __syncwarp();
  out[threadIdx.x] = x[N - 1 - threadIdx.x];
}

__global__ void never_written(float* out) {
  __shared__ float x[N];
  if (threadIdx.x < 50) x[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void shared_index(float* out) {
  __shared__ float x[N];
  x[threadIdx.x + 1] = 1.0f;
  out[threadIdx.x] = 1.0f;
}

__global__ void past_the_end(float* out) { out[threadIdx.x + 1] = 1.0f; }

__global__ void misaligned(float* out) {
  if (threadIdx.x == 0) *reinterpret_cast<double*>(out + 1) = 1.0;
}

__global__ void barrier_for_some(float* out) {
  if (threadIdx.x < 50) __syncthreads();
  out[threadIdx.x] = 1.0f;
}

__global__ void two_barriers(float* out) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1.0f;
}

__global__ void shuffle_without_all(float* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void shuffle_from_outside(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_down_sync(0xffffu, 1.0f, 8);
}

__global__ void shuffles(float* out) {
  const float x = static_cast<float>(threadIdx.x % 32);
  const float up = __shfl_up_sync(0xffffffffu, x, 1), down = __shfl_down_sync(0xffffffffu, x, 1);
  const float first = __shfl_sync(0xffffffffu, x, 32), across = __shfl_xor_sync(0xffffffffu, x, 31);
  const float wanted_up = x == 0.0f ? 0.0f : x - 1.0f, wanted_down = x == 31.0f ? 31.0f : x + 1.0f;
  const bool right = up == wanted_up && down == wanted_down && first == 0.0f && across == 31.0f - x;
  out[threadIdx.x] = right ? 1.0f : 0.0f;
}

__global__ void barrier_and_shuffle(float* out) {
  if (threadIdx.x < 16) __syncthreads();
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void blocks_write_one_place(float* out) { out[threadIdx.x] = 1.0f; }

__global__ void __launch_bounds__(32) bounded(float* out) { out[threadIdx.x] = 1.0f; }

__global__ void with_dynamic(float* out) {
  extern __shared__ float x[];
  x[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = x[N - 1 - threadIdx.x];
}

void launch(const std::string& name, float* out) {
  cudaStream_t stream;
  aoti_torch_get_current_cuda_stream(0, &stream);
#define LAUNCH(kernel) \
  if (name == #kernel) kernel<<<1, N, 0, stream>>>(out);
  LAUNCH(no_barrier)
  LAUNCH(with_barrier)
  LAUNCH(read_before_barrier)
  LAUNCH(no_warp_barrier)
  LAUNCH(with_warp_barrier)
  LAUNCH(warp_barrier_for_a_block)
  LAUNCH(never_written)
  LAUNCH(shared_index)
  LAUNCH(past_the_end)
  LAUNCH(misaligned)
  LAUNCH(barrier_for_some)
  LAUNCH(two_barriers)
  LAUNCH(shuffle_without_all)
  LAUNCH(shuffle_from_outside)
  LAUNCH(shuffles)
  LAUNCH(barrier_and_shuffle)
  LAUNCH(bounded)
  if (name == "blocks_write_one_place") blocks_write_one_place<<<2, N, 0, stream>>>(out);
  if (name == "with_dynamic") with_dynamic<<<1, N, N * sizeof(float), stream>>>(out);
  if (name == "dynamic_too_small") with_dynamic<<<1, N, 32 * sizeof(float), stream>>>(out);
  if (name == "dynamic_too_large") with_dynamic<<<1, N, 48 * 1024 + 1, stream>>>(out);
  if (name == "another_stream") with_barrier<<<1, N>>>(out);
  if (name == "no_blocks") with_barrier<<<0, N, 0, stream>>>(out);
  if (name == "large_block") with_barrier<<<1, dim3(32, 33), 0, stream>>>(out);
  if (name == "large_grid") with_barrier<<<int64_t{1} << 32 | 1, N, 0, stream>>>(out);
}

}  // namespace

// Launches the kernel of a name; `out` is fp32 [64]. Returns what was found, or nothing.
extern "C" __attribute__((visibility("default"))) const char* try_launch(const char* name, float* out) {
  static std::string found;
  try {
    launch(name, out);
    const cudaError_t error = cudaGetLastError();
    found = error ? cudaGetErrorString(error) : "";
  } catch (const std::exception& error) {
    found = error.what();
  }
  return found.c_str();
}
