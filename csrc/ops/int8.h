// Rows rounded to int8 on the CPU, as the inputs of layers in w8a8 are.
#pragma once

#include "cpu/isa.h"
#include "types.h"

namespace megalite {

struct Int8Rows {
  Type type;
  const void* x;     // [rows, columns], contiguous
  uint8_t* numbers;  // likewise; 128 stands for 0
  float* scales;     // [rows]
  int64_t columns;
};

}  // namespace megalite

// Rows [begin, end).
MEGALITE_CPU_KERNEL(int8_rows, (const Int8Rows& a, int64_t begin, int64_t end), (a, begin, end))
