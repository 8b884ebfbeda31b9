// Rows of several experts one after another, on the CPU.
#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace megalite {

// Where the rows of each expert begin, and where the last one's end.
inline std::vector<int64_t> first_rows(const at::Tensor& counts, int64_t rows, const char* op) {
  TORCH_CHECK_TYPE(
      counts.scalar_type() == at::kLong, op, ": counts is ", counts.scalar_type(), ", but must be ", at::kLong);
  const at::Tensor known = counts.contiguous();
  std::vector<int64_t> first{0};
  for (int64_t e = 0; e < known.numel(); ++e) {
    const int64_t count = known.const_data_ptr<int64_t>()[e];
    TORCH_CHECK_VALUE(count >= 0, op, ": counts has ", count, ", but must have no number below 0");
    first.push_back(first.back() + count);
  }
  TORCH_CHECK_VALUE(first.back() == rows, op, ": counts add up to ", first.back(), ", but there are ", rows, " rows");
  return first;
}

}  // namespace megalite
