#include "norm.h"

#include "operator.h"

namespace {

using at::Tensor;
using megalite::NormBackward;
using megalite::NormForward;
using megalite::check_like;
using megalite::check_shape;

// What RMSNorm and LayerNorm give: out, sum (undefined without residual), mean (undefined without bias), rstd.
struct Normed {
  Tensor out, sum, mean, rstd;
};

void* pointer(const Tensor& x) { return x.defined() ? x.data_ptr() : nullptr; }
float* floats(const Tensor& x) { return x.defined() ? x.data_ptr<float>() : nullptr; }

Tensor contiguous(const std::optional<Tensor>& x) { return x ? x->contiguous() : Tensor(); }

void check(const Tensor& x, at::IntArrayRef shape, const Tensor& like, const char* op, const char* name) {
  check_shape(x, shape, op, name);
  check_like(x, like, op, name);
}

// LayerNorm with a bias, RMSNorm without.
Normed forward(
    const Tensor& x_in, const std::optional<Tensor>& residual_in, const Tensor& weight_in,
    const std::optional<Tensor>& bias_in, double eps, double unit, const char* op) {
  const Tensor x = x_in.contiguous(), residual = contiguous(residual_in);
  const Tensor weight = weight_in.contiguous(), bias = contiguous(bias_in);
  const auto type = megalite::type_of(x, op, "x");
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x has no dimension to normalise");
  const int64_t size = x.size(-1);
  check(weight, {size}, x, op, "weight");
  if (bias.defined()) check(bias, {size}, x, op, "bias");
  if (residual.defined()) check(residual, x.sizes(), x, op, "residual");
  Normed result{at::empty_like(x), {}, {}, at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat))};
  if (residual.defined()) result.sum = at::empty_like(x);
  if (bias.defined()) result.mean = at::empty_like(result.rstd);
  NormForward a{
      type, x.data_ptr(), pointer(residual), weight.data_ptr(), pointer(bias), result.out.data_ptr(),
      pointer(result.sum), floats(result.mean), floats(result.rstd), result.rstd.numel(), size,
      static_cast<float>(eps), static_cast<float>(unit)};
  if (x.numel() > 0)
    MEGALITE_LAUNCH(
        x, a.rows, megalite::grain(size), megalite::cpu::norm_forward(a, begin, end),
        megalite::cuda::norm_forward(a, stream));
  return result;
}

// Gradients of x, weight and bias (undefined without mean).
std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_in, const std::optional<Tensor>& grad_sum_in, const Tensor& x_in, const Tensor& weight_in,
    const std::optional<Tensor>& mean_in, const Tensor& rstd_in, double unit, const char* op) {
  const Tensor x = x_in.contiguous(), grad = grad_in.contiguous(), grad_sum = contiguous(grad_sum_in);
  const Tensor weight = weight_in.contiguous(), mean = contiguous(mean_in), rstd = rstd_in.contiguous();
  const auto type = megalite::type_of(x, op, "x");
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x has no dimension that was normalised");
  const int64_t size = x.size(-1), rows = rstd.numel();
  check(grad, x.sizes(), x, op, "grad");
  if (grad_sum.defined()) check(grad_sum, x.sizes(), x, op, "grad_sum");
  check(weight, {size}, x, op, "weight");
  const auto rows_shape = x.sizes().slice(0, x.dim() - 1);
  check_shape(rstd, rows_shape, op, "rstd");
  TORCH_CHECK_TYPE(
      rstd.scalar_type() == at::kFloat, op, ": rstd is ", rstd.scalar_type(), ", but must be ", at::kFloat);
  if (mean.defined()) check(mean, rows_shape, rstd, op, "mean");
  // Each part of the rows sums its share of the weight's gradient. Their number depends on the rows alone, so that the
  // result does not depend on the number of threads.
  const int64_t parts = std::clamp<int64_t>(rows / 32, 1, x.is_cuda() ? 512 : 64);
  const Tensor dx = at::empty_like(x), dweight = at::empty({parts, size}, x.options().dtype(at::kFloat));
  const Tensor dbias = mean.defined() ? at::empty_like(dweight) : Tensor();
  NormBackward a{
      type, grad.data_ptr(), pointer(grad_sum), x.data_ptr(), weight.data_ptr(), floats(mean), floats(rstd),
      dx.data_ptr(), floats(dweight), floats(dbias), rows, size, parts, static_cast<float>(unit)};
  if (size > 0)
    MEGALITE_LAUNCH(
        x, parts, 1, megalite::cpu::norm_backward(a, begin, end), megalite::cuda::norm_backward(a, stream));
  const auto whole = [&](const Tensor& shares) { return shares.sum(0).to(weight.scalar_type()); };
  return {dx, whole(dweight), dbias.defined() ? whole(dbias) : Tensor()};
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, double unit) {
  const Normed result = forward(x, std::nullopt, weight, std::nullopt, eps, unit, "rms_norm");
  return {result.out, result.rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(
    const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, double unit) {
  const Normed result = forward(x, residual, weight, std::nullopt, eps, unit, "add_rms_norm");
  return {result.out, result.sum, result.rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& grad, const std::optional<Tensor>& grad_sum, const Tensor& x, const Tensor& weight,
    const Tensor& rstd, double unit) {
  const auto [dx, dweight, _] = backward(grad, grad_sum, x, weight, std::nullopt, rstd, unit, "rms_norm_backward");
  return {dx, dweight};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  const Normed result = forward(x, std::nullopt, weight, bias, eps, 0.0, "layer_norm");
  return {result.out, result.mean, result.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(
    const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias, double eps) {
  const Normed result = forward(x, residual, weight, bias, eps, 0.0, "add_layer_norm");
  return {result.out, result.sum, result.mean, result.rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& grad, const std::optional<Tensor>& grad_sum, const Tensor& x, const Tensor& weight,
    const Tensor& mean, const Tensor& rstd) {
  return backward(grad, grad_sum, x, weight, mean, rstd, 0.0, "layer_norm_backward");
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megalite, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float unit=0.) -> (Tensor out, Tensor rstd)");
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float unit=0.) "
      "-> (Tensor out, Tensor sum, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, Tensor rstd, float unit=0.) "
      "-> (Tensor dx, Tensor dweight)");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor out, Tensor mean, Tensor rstd)");
  m.def(
      "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) "
      "-> (Tensor out, Tensor sum, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor weight, Tensor mean, Tensor rstd) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias)");
}

MEGALITE_REGISTER(m) {
  m.impl("rms_norm", &rms_norm);
  m.impl("add_rms_norm", &add_rms_norm);
  m.impl("rms_norm_backward", &rms_norm_backward);
  m.impl("layer_norm", &layer_norm);
  m.impl("add_layer_norm", &add_layer_norm);
  m.impl("layer_norm_backward", &layer_norm_backward);
}
