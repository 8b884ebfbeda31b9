// What the wrappers of all operators use: they check tensors by name, allocate results, and hand pointers to a kernel of
// the CPU or of CUDA. A wrapper is registered once and serves both devices.
#pragma once

// Not all of ATen, which takes longer to read than all else in a file.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "types.h"

#ifdef MEGALITE_CUDA
// Of torch_cuda's stable interface: this way no header of CUDA is needed.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

#define MEGALITE_REGISTER(m) \
  static void register_all(torch::Library&); \
  TORCH_LIBRARY_IMPL(megalite, CPU, m) { register_all(m); } \
  TORCH_LIBRARY_IMPL(megalite, CUDA, m) { register_all(m); } \
  static void register_all(torch::Library& m)
// Runs a kernel of either device: `cpu(begin, end)` over ranges of `count` items in parallel, or `cuda(stream)`.
#define MEGALITE_LAUNCH(tensor, count, grain, cpu, cuda) \
  do { \
    if ((tensor).is_cuda()) { \
      c10::DeviceGuard guard((tensor).device()); \
      void* stream = megalite::current_stream((tensor).device()); \
      cuda; \
    } else { \
      at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { cpu; }); \
    } \
  } while (0)
#else
#define MEGALITE_REGISTER(m) TORCH_LIBRARY_IMPL(megalite, CPU, m)
#define MEGALITE_LAUNCH(tensor, count, grain, cpu, cuda) \
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { cpu; })
#endif

namespace megalite {

#ifdef MEGALITE_CUDA
inline void* current_stream(c10::Device device) {
  void* stream = nullptr;
  TORCH_CHECK(aoti_torch_get_current_cuda_stream(device.index(), &stream) == 0, device, " has no current stream");
  return stream;
}
#endif

inline Type type_of(const at::Tensor& x, const char* op, const char* name) {
  if (x.scalar_type() == at::kFloat) return Type::f32;
  TORCH_CHECK_TYPE(
      x.scalar_type() == at::kBFloat16, op, ": ", name, " is ", x.scalar_type(), ", but must be float32 or bfloat16");
  return Type::bf16;
}

inline void check_shape(const at::Tensor& x, at::IntArrayRef shape, const char* op, const char* name) {
  TORCH_CHECK_VALUE(x.sizes() == shape, op, ": ", name, " has shape ", x.sizes(), ", but must have ", shape);
}

// That `x` lies on the device of `like` and has its dtype.
inline void check_device(const at::Tensor& x, const at::Tensor& like, const char* op, const char* name) {
  TORCH_CHECK_VALUE(
      x.device() == like.device(), op, ": ", name, " is on ", x.device(), ", but must be on ", like.device());
}

inline void check_like(const at::Tensor& x, const at::Tensor& like, const char* op, const char* name) {
  check_device(x, like, op, name);
  TORCH_CHECK_TYPE(
      x.scalar_type() == like.scalar_type(), op, ": ", name, " is ", x.scalar_type(), ", but must be ",
      like.scalar_type());
}

// Rows of a task for parallel_for, so that a task has about 16 thousand elements.
inline int64_t grain(int64_t row_size) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, row_size)); }

}  // namespace megalite
