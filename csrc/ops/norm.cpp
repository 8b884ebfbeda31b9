#include "norm.h"

#include "operator.h"

namespace {

using at::Tensor;
using megalite::NormBackward;
using megalite::NormForward;
using megalite::check_like;
using megalite::check_shape;

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& x_in, const std::optional<Tensor>& residual_in, const Tensor& weight_in, double eps, const char* op) {
  const Tensor x = x_in.contiguous(), weight = weight_in.contiguous();
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x has no dimension to normalise");
  const int64_t size = x.size(-1);
  check_shape(weight, {size}, op, "weight");
  check_like(weight, x, op, "weight");
  const Tensor out = at::empty_like(x);
  Tensor residual, sum;
  if (residual_in) {
    residual = residual_in->contiguous();
    check_shape(residual, x.sizes(), op, "residual");
    check_like(residual, x, op, "residual");
    sum = at::empty_like(x);
  }
  const Tensor rstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
  NormForward a{
      megalite::type_of(x, op, "x"), x.data_ptr(), residual.defined() ? residual.data_ptr() : nullptr,
      weight.data_ptr(), out.data_ptr(), sum.defined() ? sum.data_ptr() : nullptr, rstd.data_ptr<float>(),
      rstd.numel(), size, static_cast<float>(eps)};
  if (x.numel() > 0)
    MEGALITE_LAUNCH(
        x, a.rows, megalite::grain(size), megalite::cpu::rms_norm_forward(a, begin, end),
        megalite::cuda::rms_norm_forward(a, stream));
  return {out, sum, rstd};
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  auto [out, sum, rstd] = forward(x, std::nullopt, weight, eps, "rms_norm");
  return {out, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(
    const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  return forward(x, residual, weight, eps, "add_rms_norm");
}

std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& grad_in, const std::optional<Tensor>& grad_sum_in, const Tensor& x_in, const Tensor& weight_in,
    const Tensor& rstd) {
  const char* op = "rms_norm_backward";
  const Tensor x = x_in.contiguous(), grad = grad_in.contiguous(), weight = weight_in.contiguous();
  check_shape(grad, x.sizes(), op, "grad");
  check_like(grad, x, op, "grad");
  const Tensor grad_sum = grad_sum_in ? grad_sum_in->contiguous() : Tensor();
  const int64_t size = x.size(-1), rows = rstd.numel();
  // Each part of the rows sums its share of the weight's gradient. Their number depends on the rows alone, so that the
  // result does not depend on the number of threads.
  const int64_t parts = std::clamp<int64_t>(rows / 32, 1, x.is_cuda() ? 512 : 64);
  const Tensor dx = at::empty_like(x), dweight = at::empty({parts, size}, x.options().dtype(at::kFloat));
  NormBackward a{
      megalite::type_of(x, op, "x"), grad.data_ptr(), grad_sum.defined() ? grad_sum.data_ptr() : nullptr, x.data_ptr(),
      weight.data_ptr(), rstd.data_ptr<float>(), dx.data_ptr(), dweight.data_ptr<float>(), rows, size, parts};
  if (size > 0)
    MEGALITE_LAUNCH(
        x, parts, 1, megalite::cpu::rms_norm_backward(a, begin, end), megalite::cuda::rms_norm_backward(a, stream));
  return {dx, dweight.sum(0).to(weight.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megalite, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor out, Tensor rstd)");
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor out, Tensor sum, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, Tensor rstd) "
      "-> (Tensor dx, Tensor dweight)");
}

MEGALITE_REGISTER(m) {
  m.impl("rms_norm", &rms_norm);
  m.impl("add_rms_norm", &add_rms_norm);
  m.impl("rms_norm_backward", &rms_norm_backward);
}
