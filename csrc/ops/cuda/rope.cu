#include "../rope.h"

#include "common.cuh"

namespace megalite::cuda {

namespace {

// One block a token; a thread turns N pairs of a head at a time. Bytes a token: reads and writes the turned heads; its
// cosines and sines are in L1 after the first head.
template <class T, int N>
__global__ void rotate(Rope a) {
  constexpr int M = N < 4 ? N : 4;  // angles are fp32: 16 bytes hold four
  const int64_t token = blockIdx.x, packs = a.pairs / N;
  const float* cos = a.cos + token % a.angles * a.pairs;
  const float* sin = a.sin + token % a.angles * a.pairs;
  for (int64_t item = threadIdx.x; item < a.turned * packs; item += blockDim.x) {
    const int64_t head = item / packs, i = item % packs * N;
    T* x = static_cast<T*>(a.qkv) + (token * a.heads + head) * a.head_size + i;
    Pack<T, N> firsts = load<N>(x), seconds = load<N>(x + a.pairs);
    for (int from = 0; from < N; from += M) {
      const Pack<float, M> cosines = load<M>(cos + i + from), sines = load<M>(sin + i + from);
      for (int j = 0; j < M; ++j) {
        T &at_first = firsts.at[from + j], &at_second = seconds.at[from + j];
        const float first = to_float(at_first), second = to_float(at_second), turn = a.sign * sines.at[j];
        at_first = from_float<T>(first * cosines.at[j] - second * turn);
        at_second = from_float<T>(second * cosines.at[j] + first * turn);
      }
    }
    store(x, firsts);
    store(x + a.pairs, seconds);
  }
}

template <class T>
void launch(const Rope& a, cudaStream_t stream) {
  if (a.head_size % PACK<T> == 0 && aligned<T>(a.pairs, a.qkv, a.cos, a.sin))
    rotate<T, PACK<T>><<<a.tokens, threads_for(a.turned * a.pairs / PACK<T>), 0, stream>>>(a);
  else
    rotate<T, 1><<<a.tokens, threads_for(a.turned * a.pairs), 0, stream>>>(a);
  check_launch("rope_");
}

}  // namespace

void rope(const Rope& a, void* stream) { MEGALITE_CUDA_BY_TYPE(a.type, launch, a, static_cast<cudaStream_t>(stream)); }

}  // namespace megalite::cuda
