#include "../fp8.h"

#include "../fp8_format.h"
#include "common.cuh"

namespace megalite::cuda {

namespace {

using megalite::fp8::ABSOLUTE;
using megalite::fp8::Scale;

constexpr int WIDTH = 32;   // columns of a tile whose columns have a scale each
constexpr int THREADS = 256;

__device__ inline uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

__device__ inline uint32_t warp_max(uint32_t x) {
  for (int offset = 16; offset > 0; offset /= 2) x = larger(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

template <class T>
__device__ inline uint32_t absolute_bits(const Fp8& a, int64_t row, int64_t column) {
  return fp8::bits_of(to_float(static_cast<const T*>(a.x)[row * a.columns + column])) & ABSOLUTE;
}

template <class T, int M>
__device__ inline void write(const Fp8& a, int64_t row, int64_t column, Scale by) {
  const int64_t at = row * a.columns + column;
  const float x = to_float(static_cast<const T*>(a.x)[at]);
  if (a.out)
    static_cast<T*>(a.out)[at] = from_float<T>(fp8::value<M>(x, by));
  else
    a.codes[a.transposed ? column * a.rows + row : at] = fp8::code<M>(x, by);
}

__device__ inline void write_scale(const Fp8& a, int64_t strip, int64_t block, Scale by) {
  if (!a.out) a.scales[a.transposed ? block * a.strips() + strip : strip * a.blocks() + block] = by.scale;
}

// Blocks of one row: a warp each. Bytes: reads x once from memory, the second time from L1.
template <class T, int M>
__global__ void rows_kernel(Fp8 a) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
  if (number >= a.rows * a.blocks()) return;  // a whole warp
  const int lane = threadIdx.x % 32;
  const int64_t row = number / a.blocks(), block = number % a.blocks(), begin = block * a.block_columns;
  const int64_t end = begin + a.block_columns < a.columns ? begin + a.block_columns : a.columns;
  uint32_t largest = 0;
  for (int64_t i = begin + lane; i < end; i += 32) largest = larger(largest, absolute_bits<T>(a, row, i));
  const Scale by = fp8::scale_of<M>(warp_max(largest));
  if (lane == 0) write_scale(a, row, block, by);
  for (int64_t i = begin + lane; i < end; i += 32) write<T, M>(a, row, i, by);
}

// Blocks of several rows: a tile of one block, or of WIDTH blocks of one column each. Threads are WIDTH columns by
// THREADS / WIDTH rows of it, so that a warp reads neighbours; where codes are written transposed they are WIDTH rows by
// THREADS / WIDTH columns then, so that it writes neighbours, of numbers that it finds in L1.
template <class T, int M, bool by_column>
__global__ void tiles_kernel(Fp8 a) {
  __shared__ uint32_t found[THREADS];
  __shared__ Scale scales[WIDTH];
  const int column = threadIdx.x % WIDTH, part = threadIdx.x / WIDTH;
  const int64_t width = by_column ? WIDTH : a.block_columns, tiles = (a.columns + width - 1) / width;
  const int64_t strip = blockIdx.x / tiles, left = blockIdx.x % tiles * width;
  const int64_t first = strip * a.block_rows, right = left + width < a.columns ? left + width : a.columns;
  const int64_t last = first + a.block_rows < a.rows ? first + a.block_rows : a.rows;
  uint32_t largest = 0;
  for (int64_t row = first + part; row < last; row += THREADS / WIDTH)
    for (int64_t i = left + column; i < right; i += WIDTH) largest = larger(largest, absolute_bits<T>(a, row, i));
  found[threadIdx.x] = largest;
  __syncthreads();
  // Each thread combines what it needs itself: of its column, or of all.
  largest = 0;
  for (int i = by_column ? column : 0; i < THREADS; i += by_column ? WIDTH : 1) largest = larger(largest, found[i]);
  const Scale by = fp8::scale_of<M>(largest);
  if (by_column ? part == 0 && left + column < right : threadIdx.x == 0)
    write_scale(a, strip, by_column ? left + column : left / width, by);
  if (a.transposed) {
    if (by_column && part == 0) scales[column] = by;
    __syncthreads();
    for (int64_t i = left + part; i < right; i += THREADS / WIDTH) {
      const Scale own = by_column ? scales[i - left] : by;
      for (int64_t row = first + column; row < last; row += WIDTH) write<T, M>(a, row, i, own);
    }
    return;
  }
  for (int64_t row = first + part; row < last; row += THREADS / WIDTH)
    for (int64_t i = left + column; i < right; i += WIDTH) write<T, M>(a, row, i, by);
}

template <class T, int M>
void launch_format(const Fp8& a, cudaStream_t stream) {
  if (a.block_rows == 1) {
    const int64_t warps = a.rows * a.blocks();
    rows_kernel<T, M><<<(warps + THREADS / 32 - 1) / (THREADS / 32), THREADS, 0, stream>>>(a);
  } else if (a.block_columns == 1) {
    tiles_kernel<T, M, true><<<a.strips() * ((a.columns + WIDTH - 1) / WIDTH), THREADS, 0, stream>>>(a);
  } else {
    tiles_kernel<T, M, false><<<a.strips() * a.blocks(), THREADS, 0, stream>>>(a);
  }
  check_launch("fp8");
}

template <class T>
void launch(const Fp8& a, cudaStream_t stream) {
  a.mantissa == 3 ? launch_format<T, 3>(a, stream) : launch_format<T, 2>(a, stream);
}

}  // namespace

void round_to_fp8(const Fp8& a, void* stream) { MEGALITE_CUDA_BY_TYPE(a.type, launch, a, static_cast<cudaStream_t>(stream)); }

}  // namespace megalite::cuda
