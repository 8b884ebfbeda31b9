// Every operation on tensors of the GPU that is not there: shapes and dtypes come from torch's own "meta" kernels, results
// get memory that is counted and holds nothing. The autograd and composite parts of torch run as they do on a GPU.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <torch/library.h>

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "memory.h"

namespace megalite::dryrun {

namespace {

using c10::IValue;
using torch::jit::Stack;

constexpr int64_t kSmall = 1 << 16;  // elements; what is larger is not filled or remembered

struct Operation {
  explicit Operation(const char* name) : before(current_operation()) { current_operation() = name; }
  ~Operation() { current_operation() = before; }
  const char* before;
};

// A tensor of torch's meta device, with the shape, strides and size of memory of `tensor`.
at::Tensor meta_like(const at::Tensor& tensor) {
  const size_t bytes = tensor.storage().nbytes();
  auto* meta = c10::GetAllocator(c10::DeviceType::Meta);
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, meta->allocate(bytes), meta, true);
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::Meta), tensor.dtype());
  auto* impl = result.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return result;
}

at::Tensor on_storage(c10::Storage storage, const at::Tensor& meta) {
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), meta.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(meta.sizes(), meta.strides(), meta.storage_offset());
  return result;
}

at::Tensor fresh(const at::Tensor& meta) {
  const size_t bytes = meta.storage().nbytes();
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, allocator()->allocate(bytes), allocator(), true);
  return on_storage(std::move(storage), meta);
}

// Gives `tensor` the shape that an operation gave to `meta`, which stood for it.
void take_shape(const at::Tensor& tensor, const at::Tensor& meta) {
  auto* impl = tensor.unsafeGetTensorImpl();
  if (tensor.sizes() == meta.sizes() && tensor.strides() == meta.strides()) return;
  const size_t bytes = meta.storage().nbytes();
  auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  if (bytes > storage->nbytes()) {
    storage->set_data_ptr_noswap(allocator()->allocate(bytes));
    storage->set_nbytes(bytes);
  }
  impl->set_sizes_and_strides(meta.sizes(), meta.strides(), meta.storage_offset());
}

// The tensors of one call and what stands for them on the meta device.
struct Call {
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors;  // (of the call, meta)

  at::Tensor stand_in(const at::Tensor& tensor) {
    // A Python number may be asked for its value.
    if (!tensor.defined() || tensor.is_meta() || tensor.unsafeGetTensorImpl()->is_wrapped_number()) return tensor;
    for (const auto& [real, meta] : tensors) {
      if (real.is_same(tensor)) return meta;
    }
    tensors.emplace_back(tensor, meta_like(tensor));
    return tensors.back().second;
  }

  IValue argument(const IValue& value) {
    if (value.isTensor()) return stand_in(value.toTensor());
    if (value.isDevice()) return c10::Device(c10::DeviceType::Meta);
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& each : value.toTensorVector()) list.push_back(stand_in(each));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& each : value.toOptionalTensorVector()) {
        list.push_back(each ? std::optional<at::Tensor>(stand_in(*each)) : std::nullopt);
      }
      return list;
    }
    return value;
  }

  // What comes back: an argument itself, a view of one, or a new tensor.
  at::Tensor result(const at::Tensor& meta) {
    if (!meta.defined()) return meta;
    for (const auto& [real, stood_in] : tensors) {
      if (stood_in.is_same(meta)) return real;
    }
    for (const auto& [real, stood_in] : tensors) {
      if (stood_in.has_storage() && meta.has_storage() && stood_in.storage().is_alias_of(meta.storage())) {
        return on_storage(real.storage(), meta);
      }
    }
    return fresh(meta);
  }

  IValue result(const IValue& value) {
    if (value.isTensor()) return result(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& each : value.toTensorVector()) list.push_back(result(each));
      return list;
    }
    return value;
  }
};

void compute(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  Operation operation(schema.name().c_str());
  const size_t count = schema.arguments().size();
  Call call;
  Stack meta_stack;
  meta_stack.reserve(count);
  for (const IValue& value : torch::jit::last(*stack, count)) meta_stack.push_back(call.argument(value));
  op.callBoxed(&meta_stack);
  for (const auto& [real, meta] : call.tensors) {
    if (real.is_cuda()) take_shape(real, meta);
  }
  std::vector<IValue> results;
  for (const IValue& value : meta_stack) results.push_back(call.result(value));
  torch::jit::drop(*stack, count);
  for (IValue& value : results) stack->push_back(std::move(value));
}

// Of structured operations, torch has found out the result's shape and made it before it asks a device to compute. The
// last argument is the result. Where another operation (logsumexp) hands one over that is still empty, its shape is to
// be found here.
void computed(const c10::OperatorHandle& op, Stack* stack) {
  IValue out = torch::jit::peek(*stack, op.schema().arguments().size() - 1, op.schema().arguments().size());
  if (out.toTensor().numel() == 0) return compute(op, stack);
  torch::jit::drop(*stack, op.schema().arguments().size());
  stack->push_back(std::move(out));
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, allocator(), c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, allocator(), c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

// The content of a tensor on the host. The device's is not computed: what is not known is zeros.
at::Tensor content_of(const at::Tensor& tensor) {
  const at::Tensor* content = known(tensor);
  if (content && content->numel() == tensor.numel() && content->scalar_type() == tensor.scalar_type()) {
    return content->view(tensor.sizes());
  }
  return at::zeros(tensor.sizes(), tensor.options().device(at::kCPU));
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  Operation operation("aten::copy_");
  if (source.is_cuda() && self.is_cpu()) {
    if (!non_blocking || !self.is_pinned()) where("waits: copy to the host");
    if (self.numel() <= kSmall) self.copy_(content_of(source));
  } else if (self.is_cuda() && source.is_cpu()) {
    if (!non_blocking) where("waits: copy from the host");
    const bool whole = self.numel() == source.numel() && self.storage_offset() == 0 &&
                       self.storage().nbytes() == self.numel() * self.element_size();
    if (whole && self.numel() <= kSmall) know(self, source.detach().to(self.scalar_type()).clone());
  }
  return self;
}

at::Scalar item(const at::Tensor& self) {
  where("waits: a number is read");
  return content_of(self).item();
}

bool equal(const at::Tensor&, const at::Tensor&) {
  where("waits: tensors are compared");
  return true;
}

// How often each expert is chosen: in balance.
at::Tensor bincount(const at::Tensor& self, const std::optional<at::Tensor>&, int64_t length) {
  Operation operation("aten::bincount");
  auto counts = at::full({length}, self.numel() / std::max<int64_t>(length, 1), at::kLong);
  counts.narrow(0, 0, length ? self.numel() % length : 0).add_(1);
  auto result = at::empty({length}, self.options().dtype(at::kLong));
  know(result, counts);
  return result;
}

at::Tensor count_rows(const at::Tensor& index, int64_t num_experts) {
  return megalite::dryrun::bincount(index, std::optional<at::Tensor>(), num_experts);
}

// How many there are, is asked of the device. All of them, which needs most memory.
at::Tensor nonzero(const at::Tensor& self) {
  where("waits: elements are counted");
  Operation operation("aten::nonzero");
  return at::empty({self.numel(), self.dim()}, self.options().dtype(at::kLong));
}

at::Tensor& set_storage(at::Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(size, stride.empty() && !size.empty() ? c10::IntArrayRef(c10::contiguous_strides(size)) : stride, offset);
  return self;
}

void cummax(const at::Tensor&, at::Tensor&, at::Tensor&, int64_t) {}  // into results that are there

// Products in bf16 with fp32 results are CUDA's only: there is no meta kernel.
at::Tensor& mm_out(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype, at::Tensor& out) {
  TORCH_CHECK(out.size(0) == a.size(0) && out.size(1) == b.size(1) && a.size(1) == b.size(0) && out.scalar_type() == dtype,
              "mm: ", a.sizes(), " x ", b.sizes(), " to ", out.sizes());
  return out;
}

at::Tensor& addmm_out(const at::Tensor&, const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype, const at::Scalar&,
                      const at::Scalar&, at::Tensor& out) {
  return mm_out(a, b, dtype, out);
}

// Of rows with a matrix for each group of them, or of columns with rows. Elsewhere torch computes one product a group, for
// which the host waits; a GPU of today has a kernel for all of them.
at::Tensor grouped_mm(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& ends,
                      const std::optional<at::Tensor>&, std::optional<at::ScalarType>) {
  Operation operation("aten::_grouped_mm");
  if (b.dim() == 3) return at::empty({a.size(0), b.size(2)}, a.options());
  return at::empty({ends->size(0), a.size(0), b.size(1)}, a.options());
}

// What torch's choice comes to on a GPU of today: flash attention without a mask and in half precision, otherwise the
// memory-efficient kernel, which has no grouped queries: these end in scores that are written out.
int64_t attention_backend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask,
                          double, bool, std::optional<double>, bool) {
  const bool grouped = q.size(1) != k.size(1);
  const bool half = q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf;
  const bool flash = half && !(mask && mask->defined()) && q.size(-1) == v.size(-1) && q.size(-1) <= 256;
  if (flash) return static_cast<int64_t>(at::SDPBackend::flash_attention);
  return static_cast<int64_t>(grouped ? at::SDPBackend::math : at::SDPBackend::efficient_attention);
}

}  // namespace

void register_attention() {
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&attention_backend);
}

void register_allocator() {
  c10::SetAllocator(c10::DeviceType::CUDA, allocator(), 1);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }

TORCH_LIBRARY_IMPL(megalite, CUDA, m) { m.impl("count_rows", &count_rows); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("view", &at::native::view);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("copy_", &copy_);
  m.impl("_local_scalar_dense", &item);
  m.impl("equal", &equal);
  m.impl("bincount", &bincount);
  m.impl("nonzero", &nonzero);
  m.impl("_cummax_helper", &cummax);
  m.impl("_grouped_mm", &grouped_mm);
  m.impl("mm.dtype_out", &mm_out);
  m.impl("addmm.dtype_out", &addmm_out);
  for (const char* structured :
       {"add.out", "sub.out", "mul.out", "div.out", "cat.out", "sum.IntList_out", "pow.Tensor_Scalar_out", "rsqrt.out",
        "sqrt.out", "exp.out", "log.out", "neg.out", "lerp.Scalar_out", "lerp.Tensor_out", "maximum.out", "mm.out",
        "addmm.out", "bmm.out", "index.Tensor_out", "gather.out", "eq.Scalar_out", "eq.Tensor_out", "ne.Scalar_out",
        "ne.Tensor_out", "lt.Scalar_out", "lt.Tensor_out", "gt.Scalar_out", "gt.Tensor_out", "ge.Scalar_out",
        "ge.Tensor_out", "le.Scalar_out", "le.Tensor_out", "bitwise_and.Tensor_out", "bitwise_or.Tensor_out",
        "bitwise_xor.Tensor_out"}) {
    m.impl(structured, torch::CppFunction::makeFromBoxedFunction<&computed>());
  }
}

}  // namespace megalite::dryrun
