// The part of CUDA that csrc/ops/cuda uses, for a device that is emulated on one CPU thread (../runtime.cpp). What is not
// here does not compile: declare it here, and give it to the runtime, when a kernel first needs it.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

namespace emulated {

// Of the thread that runs.
struct Indices {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern Indices here;

// A size of a launch. CUDA cuts what it is given to 32 bits without a word; the runtime refuses what does not fit.
struct Extent {
  int64_t x, y = 1, z = 1;
  template <class Integer> Extent(Integer x) : x(static_cast<int64_t>(x)) {}
  Extent(dim3 size) : x(size.x), y(size.y), z(size.z) {}
};

// A kernel that some code can launch, known from the time its library is loaded.
struct Kernel {
  const char* signature;
  long launches = 0;
  explicit Kernel(const char* signature);
};
template <auto function> constexpr const char* signature() { return __PRETTY_FUNCTION__; }
template <auto function> struct Known {
  static inline Kernel kernel{signature<function>()};
};

void run(Kernel&, Extent grid, Extent block, size_t shared, cudaStream_t, const std::function<void()>& thread);

// kernel<<<grid, block, shared, stream>>>(arguments) is translated to launch<kernel>(grid, …)(arguments).
template <auto kernel> auto launch(Extent grid, Extent block, size_t shared = 0, cudaStream_t stream = nullptr) {
  return [=](auto... arguments) {
    run(Known<kernel>::kernel, grid, block, shared, stream, [&] { kernel(arguments...); });
  };
}

// __shared__ variables are static ones, because blocks run one after another. Their first thread calls this for each,
// which fills it with NaN.
void share(void* variable, size_t bytes);
void* dynamic_shared();
void check_launch_bounds(int most_threads);

void sync_threads(const char* line);
void sync_warp(unsigned mask, const char* line);
// Returns `value` of lane `from(own lane)` of the warp.
uint64_t shuffle(unsigned mask, uint64_t value, int from, const char* line);
int lane();

template <class T> T shuffle_from(unsigned mask, T x, int from, const char* line) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "the device shuffles 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  bits = shuffle(mask, bits, from, line);
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}

}  // namespace emulated

#define threadIdx (emulated::here.thread)
#define blockIdx (emulated::here.block)
#define blockDim (emulated::here.block_size)
#define gridDim (emulated::here.grid_size)
#define warpSize 32

#define EMULATED_TEXT_(x) #x
#define EMULATED_TEXT(x) EMULATED_TEXT_(x)
#define EMULATED_LINE __FILE__ ":" EMULATED_TEXT(__LINE__)
#define EMULATED_FIRST(mask, ...) mask
#define __syncthreads() emulated::sync_threads(EMULATED_LINE)
#define __syncwarp(...) emulated::sync_warp(EMULATED_FIRST(__VA_ARGS__ __VA_OPT__(, ) 0xffffffffu), EMULATED_LINE)
#define __shfl_sync(mask, x, from) emulated::shuffle_from(mask, x, (from) & 31, EMULATED_LINE)
#define __shfl_xor_sync(mask, x, offset) emulated::shuffle_from(mask, x, emulated::lane() ^ (offset), EMULATED_LINE)
#define __shfl_up_sync(mask, x, offset) \
  emulated::shuffle_from( \
      mask, x, emulated::lane() < static_cast<int>(offset) ? emulated::lane() : emulated::lane() - (offset), \
      EMULATED_LINE)
#define __shfl_down_sync(mask, x, offset) \
  emulated::shuffle_from( \
      mask, x, emulated::lane() + static_cast<int>(offset) > 31 ? emulated::lane() : emulated::lane() + (offset), \
      EMULATED_LINE)

// The device computes 2^(x log2 e), with the product rounded. As macros: some C libraries have functions of these names.
#define __expf(x) exp2f((x) * 1.4426950408889634f)
#define rsqrtf(x) (1.0f / sqrtf(x))
