// Arguments of the kernels that round matrices to fp8, the same for the CPU and CUDA.
#pragma once

#include "cpu/isa.h"
#include "fp8_format.h"
#include "types.h"

namespace megalite {

struct Fp8 {
  Type type;
  const void* x;  // [rows, columns], contiguous
  int64_t rows, columns;
  int64_t block_rows, block_columns;  // which share a scale
  int mantissa;                       // bits: 3 is e4m3, 2 is e5m2
  void* out;                          // what x stands for, rounded, of x's type; or null, and codes and scales instead
  uint8_t* codes;                     // [rows, columns], or [columns, rows] where `transposed`
  float* scales;                      // a number a block, likewise
  bool transposed;

  MEGALITE_BOTH int64_t strips() const { return (rows + block_rows - 1) / block_rows; }
  MEGALITE_BOTH int64_t blocks() const { return (columns + block_columns - 1) / block_columns; }
};

}  // namespace megalite

// Strips [begin, end) of `block_rows` rows.
MEGALITE_CPU_KERNEL(round_to_fp8, (const Fp8& a, int64_t begin, int64_t end), (a, begin, end))

namespace megalite::cuda {
void round_to_fp8(const Fp8& a, void* stream);
}  // namespace megalite::cuda
