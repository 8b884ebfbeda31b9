// Included before each file of csrc/ops/*.cpp that has a CUDA kernel: what it registers then hands CPU tensors to that
// kernel, and takes the place of what the package's _ops has registered for the CPU.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <cstdlib>

#include "cpu/isa.h"

#define is_cuda() is_cpu()

// _ops has defined the operators.
#undef TORCH_LIBRARY_FRAGMENT
#define TORCH_LIBRARY_FRAGMENT(library, m) [[maybe_unused]] static void defined_already(torch::Library& m)

#undef MEGALITE_CPU_KERNEL
#define MEGALITE_CPU_KERNEL(name, parameters, arguments) \
  namespace megalite::cpu { \
  inline void name parameters { std::abort(); } \
  }
