#include "rope.h"

#include "operator.h"

namespace {

using at::Tensor;
using megalite::Rope;

void check_angles(const Tensor& x, const Tensor& qkv, const char* name) {
  TORCH_CHECK_TYPE(
      x.scalar_type() == at::kFloat, "rope_: ", name, " is ", x.scalar_type(), ", but must be ", at::kFloat);
  TORCH_CHECK_VALUE(
      x.device() == qkv.device(), "rope_: ", name, " is on ", x.device(), ", but must be on ", qkv.device());
}

void rope_(const Tensor& qkv, const Tensor& cos_in, const Tensor& sin_in, int64_t num_heads, bool inverse) {
  TORCH_CHECK_VALUE(qkv.dim() == 4, "rope_: qkv has shape ", qkv.sizes(), ", but must be [batch, seq, heads, head size]");
  TORCH_CHECK_VALUE(
      qkv.is_contiguous(), "rope_: qkv has strides ", qkv.strides(), ", but must be contiguous: it is changed in place");
  const auto type = megalite::type_of(qkv, "rope_", "qkv");
  const Tensor cos = cos_in.contiguous(), sin = sin_in.contiguous();
  check_angles(cos, qkv, "cos");
  check_angles(sin, qkv, "sin");
  TORCH_CHECK_VALUE(
      cos.dim() == 3 && (cos.size(0) == qkv.size(0) || cos.size(0) == 1) && cos.size(1) == qkv.size(1) &&
          2 * cos.size(2) <= qkv.size(3),
      "rope_: cos has shape ", cos.sizes(), ", but must have [", qkv.size(0), " or 1, ", qkv.size(1), ", at most ",
      qkv.size(3) / 2, "]");
  megalite::check_shape(sin, cos.sizes(), "rope_", "sin");
  TORCH_CHECK_VALUE(
      0 <= num_heads && num_heads <= qkv.size(2), "rope_: num_heads is ", num_heads, ", but qkv has ", qkv.size(2),
      " heads");
  Rope a{
      type, qkv.data_ptr(), cos.data_ptr<float>(), sin.data_ptr<float>(), qkv.size(0) * qkv.size(1), qkv.size(2),
      qkv.size(3), num_heads, cos.size(2), cos.size(0) * cos.size(1), inverse ? -1.0f : 1.0f};
  if (a.tokens * a.turned * a.pairs > 0)
    MEGALITE_LAUNCH(
        qkv, a.tokens, megalite::grain(2 * a.turned * a.pairs), megalite::cpu::rope(a, begin, end),
        megalite::cuda::rope(a, stream));
  qkv.unsafeGetTensorImpl()->bump_version();  // autograd must refuse values of before that someone saved
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megalite, m) {
  m.def("rope_(Tensor(a!) qkv, Tensor cos, Tensor sin, int num_heads, bool inverse) -> ()");
}

MEGALITE_REGISTER(m) { m.impl("rope_", &rope_); }
