#include <cstring>

#include "../experts.h"

#include "common.cuh"

namespace megalite::cuda {

namespace {

constexpr int THREADS = 256;

// What sorts as scores do, NaN above all, and among equal ones the lower expert first. No two experts have the same.
__device__ inline uint64_t order_of(float score, int64_t expert) {
  uint32_t bits;
  score += 0.0f;  // -0 is 0
  memcpy(&bits, &score, 4);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  if (score != score) bits = 0xfffffffeu;  // below what is larger than all
  return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(expert));
}

// One warp a token. Bytes a token: reads its scores, once from memory and then from L1 for each expert that is chosen.
__global__ void choose(TopK a) {
  extern __shared__ int64_t chosen[];
  const float* scores = a.scores + static_cast<int64_t>(blockIdx.x) * a.experts;
  uint64_t last = ~uint64_t{0};
  for (int64_t slot = 0; slot < a.slots; ++slot) {
    uint64_t best = 0;
    for (int64_t e = threadIdx.x; e < a.experts; e += 32) {
      const uint64_t order = order_of(scores[e], e);
      if (order < last && order > best) best = order;
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      const uint64_t other = __shfl_xor_sync(0xffffffffu, best, offset);
      if (other > best) best = other;
    }
    if (threadIdx.x == 0) chosen[slot] = 0xffffffffu - static_cast<uint32_t>(best);
    last = best;
  }
  __syncwarp();
  for (int64_t slot = threadIdx.x; slot < a.slots; slot += 32) {
    int64_t place = 0;
    for (int64_t other = 0; other < a.slots; ++other) place += chosen[other] < chosen[slot];
    a.index[blockIdx.x * a.slots + place] = chosen[slot];
  }
}

// The sum of whole numbers over all threads of the block, given to all of them.
__device__ inline int64_t block_count(int64_t x) {
  __shared__ int64_t counts[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  __syncthreads();
  if (lane == 0) counts[warp] = x;
  __syncthreads();
  int64_t total = 0;
  for (int other = 0; other < THREADS / 32; ++other) total += counts[other];
  return total;
}

// How many of the threads before this one have `is_one`; `all`: how many of the block's have it.
__device__ inline int64_t count_before(bool is_one, int64_t& all) {
  __shared__ int64_t counts[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t up_to = is_one;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffffu, up_to, offset);
    if (lane >= offset) up_to += other;
  }
  __syncthreads();
  if (lane == 31) counts[warp] = up_to;
  __syncthreads();
  int64_t before = up_to - is_one;
  all = 0;
  for (int other = 0; other < THREADS / 32; ++other) {
    if (other < warp) before += counts[other];
    all += counts[other];
  }
  return before;
}

// One block an expert, which reads all visits; they are in L2 after the first.
__global__ void count(CountRows a) {
  const int64_t expert = blockIdx.x;
  int64_t mine = 0;
  for (int64_t visit = threadIdx.x; visit < a.visits; visit += THREADS) mine += a.index[visit] == expert;
  mine = block_count(mine);
  if (threadIdx.x == 0) a.counts[expert] = mine;
}

// One block an expert, which reads all visits and numbers its own in their order.
__global__ void sort(SortByExpert a) {
  const int64_t expert = blockIdx.x;
  int64_t next = 0;
  for (int64_t e = threadIdx.x; e < expert; e += THREADS) next += a.counts[e];
  next = block_count(next);
  for (int64_t first = 0; first < a.visits; first += THREADS) {
    const int64_t visit = first + threadIdx.x;
    const bool is_mine = visit < a.visits && a.index[visit] == expert;
    int64_t all;
    const int64_t row = next + count_before(is_mine, all);
    if (is_mine) {
      a.row[visit] = row;
      a.token[row] = visit / a.slots;
    }
    next += all;
  }
}

// One block a row. Bytes a row: reads it, writes it.
template <class T, int N>
__global__ void gather(GatherRows a) {
  const int64_t row = blockIdx.x;
  const T* from = static_cast<const T*>(a.x) + a.token[row] * a.size;
  T* out = static_cast<T*>(a.out) + row * a.size;
  for (int64_t i = threadIdx.x * N; i < a.size; i += blockDim.x * N) store(out + i, load<N>(from + i));
}

// One block a token. Bytes a token: reads its rows, writes it.
template <class T, int N>
__global__ void sum(SumRows a) {
  const int64_t token = blockIdx.x;
  const int64_t* row = a.row + token * a.slots;
  T* out = static_cast<T*>(a.out) + token * a.size;
  for (int64_t i = threadIdx.x * N; i < a.size; i += blockDim.x * N) {
    float total[N] = {};
    for (int64_t slot = 0; slot < a.slots; ++slot) {
      const Pack<T, N> part = load<N>(static_cast<const T*>(a.rows) + row[slot] * a.size + i);
      const float weight = a.weight ? a.weight[token * a.slots + slot] : 1.0f;
      for (int j = 0; j < N; ++j) total[j] += weight * to_float(part.at[j]);
    }
    Pack<T, N> pack;
    for (int j = 0; j < N; ++j) pack.at[j] = from_float<T>(total[j]);
    store(out + i, pack);
  }
}

// One block a visit. Bytes a visit: reads the gradient of its token, which is in L2 after the first, and its row; writes
// the row's gradient.
template <class T, int N>
__global__ void sum_gradient(SumRowsBackward a) {
  const int64_t visit = blockIdx.x, row = a.row[visit];
  const T* grad = static_cast<const T*>(a.grad) + visit / a.slots * a.size;
  const float weight = a.weight[visit];
  float product = 0.0f;
  for (int64_t i = threadIdx.x * N; i < a.size; i += blockDim.x * N) {
    const Pack<T, N> values = load<N>(static_cast<const T*>(a.rows) + row * a.size + i);
    Pack<T, N> grads = load<N>(grad + i);
    for (int j = 0; j < N; ++j) {
      const float value = to_float(grads.at[j]);
      product += value * to_float(values.at[j]);
      grads.at[j] = from_float<T>(value * weight);
    }
    store(static_cast<T*>(a.d_rows) + row * a.size + i, grads);
  }
  product = block_sum(product);
  if (threadIdx.x == 0) a.d_weight[visit] = product;
}

template <class T>
void launch(const GatherRows& a, cudaStream_t stream) {
  if (aligned<T>(a.size, a.x, a.out))
    gather<T, PACK<T>><<<a.rows, threads_for(a.size / PACK<T>), 0, stream>>>(a);
  else
    gather<T, 1><<<a.rows, threads_for(a.size), 0, stream>>>(a);
  check_launch("gather_rows");
}

template <class T>
void launch(const SumRows& a, cudaStream_t stream) {
  if (aligned<T>(a.size, a.rows, a.out))
    sum<T, PACK<T>><<<a.tokens, threads_for(a.size / PACK<T>), 0, stream>>>(a);
  else
    sum<T, 1><<<a.tokens, threads_for(a.size), 0, stream>>>(a);
  check_launch("sum_rows");
}

template <class T>
void launch(const SumRowsBackward& a, cudaStream_t stream) {
  if (aligned<T>(a.size, a.grad, a.rows, a.d_rows))
    sum_gradient<T, PACK<T>><<<a.tokens * a.slots, threads_for(a.size / PACK<T>), 0, stream>>>(a);
  else
    sum_gradient<T, 1><<<a.tokens * a.slots, threads_for(a.size), 0, stream>>>(a);
  check_launch("sum_rows_backward");
}

}  // namespace

void top_k(const TopK& a, void* stream) {
  choose<<<a.tokens, 32, a.slots * sizeof(int64_t), static_cast<cudaStream_t>(stream)>>>(a);
  check_launch("top_k");
}

void count_rows(const CountRows& a, void* stream) {
  count<<<a.experts, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(a);
  check_launch("count_rows");
}

void sort_by_expert(const SortByExpert& a, void* stream) {
  sort<<<a.experts, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(a);
  check_launch("sort_by_expert");
}

void gather_rows(const GatherRows& a, void* stream) {
  MEGALITE_CUDA_BY_TYPE(a.type, launch, a, static_cast<cudaStream_t>(stream));
}

void sum_rows(const SumRows& a, void* stream) {
  MEGALITE_CUDA_BY_TYPE(a.type, launch, a, static_cast<cudaStream_t>(stream));
}

void sum_rows_backward(const SumRowsBackward& a, void* stream) {
  MEGALITE_CUDA_BY_TYPE(a.type, launch, a, static_cast<cudaStream_t>(stream));
}

}  // namespace megalite::cuda
