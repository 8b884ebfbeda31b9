#include "../optimizer.h"

#include "common.cuh"

namespace megalite::cuda {

namespace {

constexpr int THREADS = 256;

// Reads 16 bytes an element and writes 12, or 14 with weights.
template <int N>
__global__ void update(AdamW a) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * N;
  const float divisor = a.factors[0];
  if (i >= a.size || divisor <= 0.0f) return;
  const float step_size = a.lr / a.factors[1], root_correction = sqrtf(a.factors[2]);
  const Pack<float, N> grad = load<N>(a.grad + i);
  Pack<float, N> master = load<N>(a.master + i), m = load<N>(a.exp_avg + i), v = load<N>(a.exp_avg_sq + i);
  Pack<bf16, N> weights;
  for (int j = 0; j < N; ++j) {
    const float g = grad.at[j] / divisor;
    m.at[j] += a.rest1 * (g - m.at[j]);
    v.at[j] = a.beta2 * v.at[j] + a.rest2 * g * g;
    const float decayed = master.at[j] - a.decay * master.at[j];
    master.at[j] = decayed - step_size * m.at[j] / (sqrtf(v.at[j]) / root_correction + a.eps);
    weights.at[j] = from_float<bf16>(master.at[j]);
  }
  store(a.master + i, master);
  store(a.exp_avg + i, m);
  store(a.exp_avg_sq + i, v);
  if (a.weights) store(static_cast<bf16*>(a.weights) + i, weights);
}

// Reads 8 bytes an element and writes 8, or 6 where T is bf16.
template <int N, class T>
__global__ void average(Momentum a) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * N;
  if (i >= a.size) return;
  const float divisor = a.divisor[0], rest = 1.0f - a.momentum, share = a.nesterov ? a.momentum : 1.0f;
  Pack<T, N> out;
  if (divisor <= 0.0f) {
    for (int j = 0; j < N; ++j) out.at[j] = from_float<T>(0.0f);
    store(static_cast<T*>(a.out) + i, out);
    return;
  }
  const Pack<float, N> grad = load<N>(a.grad + i);
  Pack<float, N> m = load<N>(a.buffer + i);
  for (int j = 0; j < N; ++j) {
    const float g = grad.at[j] / divisor;
    m.at[j] += rest * (g - m.at[j]);
    out.at[j] = from_float<T>(g + share * (m.at[j] - g));
  }
  store(a.buffer + i, m);
  store(static_cast<T*>(a.out) + i, out);
}

// Reads 8 bytes an element, or 6 where T is bf16, and writes 4, or 6 with weights.
template <int N, class T>
__global__ void take_step(DecayedStep a) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * N;
  if (i >= a.size || a.divisor[0] <= 0.0f) return;
  const Pack<T, N> step = load<N>(static_cast<const T*>(a.step) + i);
  Pack<float, N> master = load<N>(a.master + i);
  Pack<bf16, N> weights;
  for (int j = 0; j < N; ++j) {
    master.at[j] = master.at[j] - a.decay * master.at[j] - a.lr * to_float(step.at[j]);
    weights.at[j] = from_float<bf16>(master.at[j]);
  }
  store(a.master + i, master);
  if (a.weights) store(static_cast<bf16*>(a.weights) + i, weights);
}

// Given to thread 0.
__device__ double block_sum(double x) {
  __shared__ double sums[MAX_THREADS / 32];
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0.0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < blockDim.x / 32; ++warp) sum += sums[warp];
  return sum;
}

// One block a part; a thread adds up its 64 squares in fp32, all that follows is in double. Reads 4 bytes an element.
template <int N>
__global__ void square_parts(SumOfSquares a) {
  const int64_t begin = blockIdx.x * OPTIMIZER_PART, rest = a.size - begin;
  const int64_t end = begin + (rest < OPTIMIZER_PART ? rest : OPTIMIZER_PART);
  float squares = 0.0f;
  for (int64_t i = begin + threadIdx.x * N; i < end; i += THREADS * N) {
    const Pack<float, N> x = load<N>(a.x + i);
    for (int j = 0; j < N; ++j) squares += x.at[j] * x.at[j];
  }
  const double sum = block_sum(static_cast<double>(squares));
  if (threadIdx.x == 0) a.parts[blockIdx.x] = sum;
}

// One block.
__global__ void add_up(const double* parts, int64_t count, double* out) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += MAX_THREADS) sum += parts[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *out = sum;
}

template <int N>
void launch_update(const AdamW& a, cudaStream_t stream) {
  constexpr int64_t items = THREADS * N;
  update<N><<<(a.size + items - 1) / items, THREADS, 0, stream>>>(a);
  check_launch("adamw_");
}

template <int N, class T>
void launch_average(const Momentum& a, cudaStream_t stream) {
  constexpr int64_t items = THREADS * N;
  average<N, T><<<(a.size + items - 1) / items, THREADS, 0, stream>>>(a);
  check_launch("momentum_");
}

template <int N, class T>
void launch_step(const DecayedStep& a, cudaStream_t stream) {
  constexpr int64_t items = THREADS * N;
  take_step<N, T><<<(a.size + items - 1) / items, THREADS, 0, stream>>>(a);
  check_launch("decayed_step_");
}

// Whether numbers of another type may be read and stored in packs, as the fp32 tensors beside them.
template <class T>
bool aligned_beside(const void* numbers) {
  return reinterpret_cast<uintptr_t>(numbers) % (PACK<float> * sizeof(T)) == 0;
}

template <class T>
void launch_momentum(const Momentum& a, cudaStream_t stream) {
  const bool whole = aligned<float>(a.size, a.buffer, a.grad) && aligned_beside<T>(a.out);
  (whole ? launch_average<PACK<float>, T> : launch_average<1, T>)(a, stream);
}

template <class T>
void launch_decayed_step(const DecayedStep& a, cudaStream_t stream) {
  const bool whole =
      aligned<float>(a.size, a.master) && aligned_beside<T>(a.step) && aligned_beside<bf16>(a.weights);
  (whole ? launch_step<PACK<float>, T> : launch_step<1, T>)(a, stream);
}

}  // namespace

void momentum(const Momentum& a, void* stream) {
  (a.rounds ? launch_momentum<bf16> : launch_momentum<float>)(a, static_cast<cudaStream_t>(stream));
}

void decayed_step(const DecayedStep& a, void* stream) {
  (a.rounded ? launch_decayed_step<bf16> : launch_decayed_step<float>)(a, static_cast<cudaStream_t>(stream));
}

void adamw(const AdamW& a, void* stream) {
  constexpr int N = PACK<float>;
  const bool whole =
      aligned<float>(a.size, a.master, a.exp_avg, a.exp_avg_sq, a.grad) && aligned_beside<bf16>(a.weights);
  (whole ? launch_update<N> : launch_update<1>)(a, static_cast<cudaStream_t>(stream));
}

void sum_of_squares(const SumOfSquares& a, void* stream_) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  const int64_t count = (a.size + OPTIMIZER_PART - 1) / OPTIMIZER_PART;
  if (aligned<float>(a.size, a.x))
    square_parts<PACK<float>><<<count, THREADS, 0, stream>>>(a);
  else
    square_parts<1><<<count, THREADS, 0, stream>>>(a);
  check_launch("sum_of_squares");
}

void sum_parts(const double* parts, int64_t count, double* out, void* stream) {
  add_up<<<1, MAX_THREADS, 0, static_cast<cudaStream_t>(stream)>>>(parts, count, out);
  check_launch("sum_of_squares");
}

}  // namespace megalite::cuda
