#include "../experts.h"

#include <algorithm>
#include <memory>

#include "vec.h"

namespace megalite::cpu::MEGALITE_ISA {

namespace {

// What sorts as scores do, NaN above all, and among equal ones the lower expert first. No two experts have the same.
inline uint64_t order_of(float score, int64_t expert) {
  uint32_t bits;
  score += 0.0f;  // -0 is 0
  std::memcpy(&bits, &score, 4);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  if (score != score) bits = 0xfffffffeu;  // below what is larger than all
  return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(expert));
}

template <class T>
void gather(const GatherRows& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    std::memcpy(
        static_cast<T*>(a.out) + row * a.size, static_cast<const T*>(a.x) + a.token[row] * a.size, sizeof(T) * a.size);
}

constexpr int64_t COLUMNS = 64;  // of which sums are held in registers

template <class T>
void sum(const SumRows& a, int64_t begin, int64_t end) {
  const T* rows = static_cast<const T*>(a.rows);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t* row = a.row + token * a.slots;
    T* out = static_cast<T*>(a.out) + token * a.size;
    for (int64_t first = 0; first < a.size; first += COLUMNS) {
      const int64_t columns = std::min(COLUMNS, a.size - first);
      float total[COLUMNS] = {};
      for (int64_t slot = 0; slot < a.slots; ++slot) {
        const T* from = rows + row[slot] * a.size + first;
        const float weight = a.weight ? a.weight[token * a.slots + slot] : 1.0f;
#pragma omp simd
        for (int64_t i = 0; i < columns; ++i) total[i] += weight * to_float(from[i]);
      }
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) out[first + i] = from_float<T>(total[i]);
    }
  }
}

template <class T>
void sum_gradient(const SumRowsBackward& a, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const T* grad = static_cast<const T*>(a.grad) + token * a.size;
    for (int64_t visit = token * a.slots; visit < (token + 1) * a.slots; ++visit) {
      const T* row = static_cast<const T*>(a.rows) + a.row[visit] * a.size;
      T* d_row = static_cast<T*>(a.d_rows) + a.row[visit] * a.size;
      const float weight = a.weight[visit];
      float product = 0.0f;
#pragma omp simd reduction(+ : product)
      for (int64_t i = 0; i < a.size; ++i) {
        const float value = to_float(grad[i]);
        product += value * to_float(row[i]);
        d_row[i] = from_float<T>(value * weight);
      }
      a.d_weight[visit] = product;
    }
  }
}

}  // namespace

void top_k(const TopK& a, int64_t begin, int64_t end) {
  std::unique_ptr<uint64_t[]> order(new uint64_t[a.experts]);
  for (int64_t token = begin; token < end; ++token) {
    const float* scores = a.scores + token * a.experts;
    int64_t* index = a.index + token * a.slots;
    for (int64_t e = 0; e < a.experts; ++e) order[e] = order_of(scores[e], e);
    uint64_t last = ~uint64_t{0};
    for (int64_t slot = 0; slot < a.slots; ++slot) {
      uint64_t best = 0;
      for (int64_t e = 0; e < a.experts; ++e) best = order[e] < last && order[e] > best ? order[e] : best;
      index[slot] = 0xffffffffu - static_cast<uint32_t>(best);
      last = best;
    }
    std::sort(index, index + a.slots);
  }
}

void count_rows(const CountRows& a) {
  std::fill(a.counts, a.counts + a.experts, 0);
  for (int64_t visit = 0; visit < a.visits; ++visit) ++a.counts[a.index[visit]];
}

void sort_by_expert(const SortByExpert& a) {
  std::unique_ptr<int64_t[]> next(new int64_t[a.experts]);
  for (int64_t e = 0, first = 0; e < a.experts; first += a.counts[e++]) next[e] = first;
  for (int64_t visit = 0; visit < a.visits; ++visit) {
    const int64_t row = next[a.index[visit]]++;
    a.row[visit] = row;
    a.token[row] = visit / a.slots;
  }
}

void gather_rows(const GatherRows& a, int64_t begin, int64_t end) { MEGALITE_BY_TYPE(a.type, gather, a, begin, end); }

void sum_rows(const SumRows& a, int64_t begin, int64_t end) { MEGALITE_BY_TYPE(a.type, sum, a, begin, end); }

void sum_rows_backward(const SumRowsBackward& a, int64_t begin, int64_t end) {
  MEGALITE_BY_TYPE(a.type, sum_gradient, a, begin, end);
}

}  // namespace megalite::cpu::MEGALITE_ISA
