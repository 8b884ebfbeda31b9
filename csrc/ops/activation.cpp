#include "activation.h"

#include "operator.h"

namespace {

using at::Tensor;
using megalite::check_like;
using megalite::check_shape;
using megalite::type_of;

int64_t rows_of(const Tensor& x, const char* op, const char* name) {
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": ", name, " has no dimension");
  return c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
}

// The shape of one half of the last dimension.
std::vector<int64_t> half_of(const Tensor& gate_up, const char* op) {
  const int64_t size = gate_up.size(-1);
  TORCH_CHECK_VALUE(size % 2 == 0, op, ": gate_up's last dimension is ", size, ", but must be even");
  std::vector<int64_t> shape = gate_up.sizes().vec();
  shape.back() = size / 2;
  return shape;
}

Tensor swiglu(const Tensor& gate_up_in) {
  const char* op = "swiglu";
  const Tensor gate_up = gate_up_in.contiguous();
  const int64_t rows = rows_of(gate_up, op, "gate_up");
  const Tensor out = at::empty(half_of(gate_up, op), gate_up.options());
  megalite::SwigluForward a{type_of(gate_up, op, "gate_up"), gate_up.data_ptr(), out.data_ptr(), rows, out.size(-1)};
  if (out.numel() > 0)
    MEGALITE_LAUNCH(
        out, rows, megalite::grain(2 * a.size), megalite::cpu::swiglu_forward(a, begin, end),
        megalite::cuda::swiglu_forward(a, stream));
  return out;
}

Tensor swiglu_backward(const Tensor& grad_in, const Tensor& gate_up_in) {
  const char* op = "swiglu_backward";
  const Tensor grad = grad_in.contiguous(), gate_up = gate_up_in.contiguous();
  const int64_t rows = rows_of(gate_up, op, "gate_up");
  check_shape(grad, half_of(gate_up, op), op, "grad");
  check_like(grad, gate_up, op, "grad");
  const Tensor d_gate_up = at::empty_like(gate_up);
  megalite::SwigluBackward a{
      type_of(gate_up, op, "gate_up"), grad.data_ptr(), gate_up.data_ptr(), d_gate_up.data_ptr(), rows, grad.size(-1)};
  if (grad.numel() > 0)
    MEGALITE_LAUNCH(
        grad, rows, megalite::grain(2 * a.size), megalite::cpu::swiglu_backward(a, begin, end),
        megalite::cuda::swiglu_backward(a, stream));
  return d_gate_up;
}

Tensor checked_bias(const std::optional<Tensor>& bias_in, const Tensor& x, const char* op) {
  if (!bias_in) return {};
  const Tensor bias = bias_in->contiguous();
  check_shape(bias, {x.size(-1)}, op, "bias");
  check_like(bias, x, op, "bias");
  return bias;
}

Tensor gelu(const Tensor& x_in, const std::optional<Tensor>& bias_in) {
  const char* op = "gelu";
  const Tensor x = x_in.contiguous();
  const int64_t rows = rows_of(x, op, "x");
  const Tensor bias = checked_bias(bias_in, x, op), out = at::empty_like(x);
  megalite::GeluForward a{
      type_of(x, op, "x"), x.data_ptr(), bias.defined() ? bias.data_ptr() : nullptr, out.data_ptr(), rows, x.size(-1)};
  if (x.numel() > 0)
    MEGALITE_LAUNCH(
        x, rows, megalite::grain(a.size), megalite::cpu::gelu_forward(a, begin, end),
        megalite::cuda::gelu_forward(a, stream));
  return out;
}

std::tuple<Tensor, Tensor> gelu_backward(
    const Tensor& grad_in, const Tensor& x_in, const std::optional<Tensor>& bias_in) {
  const char* op = "gelu_backward";
  const Tensor x = x_in.contiguous(), grad = grad_in.contiguous();
  const int64_t rows = rows_of(x, op, "x"), size = x.size(-1);
  check_shape(grad, x.sizes(), op, "grad");
  check_like(grad, x, op, "grad");
  const Tensor bias = checked_bias(bias_in, x, op), dx = at::empty_like(x);
  // As in rms_norm_backward, the number of parts depends on the rows alone. Without a bias nothing is summed.
  const int64_t parts = bias.defined() ? std::clamp<int64_t>(rows / 32, 1, x.is_cuda() ? 512 : 64) : rows;
  Tensor dbias;
  if (bias.defined()) dbias = at::empty({parts, size}, x.options().dtype(at::kFloat));
  megalite::GeluBackward a{
      type_of(x, op, "x"), grad.data_ptr(), x.data_ptr(), bias.defined() ? bias.data_ptr() : nullptr, dx.data_ptr(),
      bias.defined() ? dbias.data_ptr<float>() : nullptr, rows, size, parts};
  if (size > 0 && parts > 0)
    MEGALITE_LAUNCH(
        x, parts, bias.defined() ? 1 : megalite::grain(size), megalite::cpu::gelu_backward(a, begin, end),
        megalite::cuda::gelu_backward(a, stream));
  return {dx, bias.defined() ? dbias.sum(0).to(x.scalar_type()) : at::empty({0}, x.options())};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megalite, m) {
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor");
  m.def("gelu(Tensor x, Tensor? bias) -> Tensor");
  m.def("gelu_backward(Tensor grad, Tensor x, Tensor? bias) -> (Tensor dx, Tensor dbias)");
}

MEGALITE_REGISTER(m) {
  m.impl("swiglu", &swiglu);
  m.impl("swiglu_backward", &swiglu_backward);
  m.impl("gelu", &gelu);
  m.impl("gelu_backward", &gelu_backward);
}
