#include "router.h"

#include "operator.h"

namespace {

using at::Tensor;
using megalite::check_like;
using megalite::check_shape;
using megalite::type_of;

// A contiguous matrix.
Tensor matrix(const Tensor& x, const char* op, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": ", name, " has shape ", x.sizes(), ", but must have two dimensions");
  return x.contiguous();
}

Tensor of_logits(const Tensor& grad, const char* op) {
  TORCH_CHECK_TYPE(grad.scalar_type() == at::kFloat, op, ": grad is ", grad.scalar_type(), ", but must be float32");
  return matrix(grad, op, "grad");
}

// Tokens of a task, which makes floats of the weight once.
constexpr int64_t TOKENS = 256;

Tensor router_logits(const Tensor& x_in, const Tensor& weight_in) {
  const char* op = "router_logits";
  const Tensor x = matrix(x_in, op, "x"), weight = matrix(weight_in, op, "weight");
  const megalite::Type type = type_of(x, op, "x");
  check_like(weight, x, op, "weight");
  check_shape(weight, {weight.size(0), x.size(1)}, op, "weight");
  const Tensor logits = at::empty({x.size(0), weight.size(0)}, x.options().dtype(at::kFloat));
  const megalite::RouterLogits a{
      type, x.data_ptr(), weight.data_ptr(), logits.data_ptr<float>(), x.size(0), x.size(1), weight.size(0)};
  at::parallel_for(0, a.tokens, TOKENS, [&](int64_t begin, int64_t end) {
    megalite::cpu::router_logits(a, begin, end);
  });
  return logits;
}

Tensor router_input_gradient(const Tensor& grad_in, const Tensor& weight_in, const Tensor& before_in) {
  const char* op = "router_input_gradient";
  const Tensor grad = of_logits(grad_in, op), weight = matrix(weight_in, op, "weight");
  const Tensor before = matrix(before_in, op, "before");
  const megalite::Type type = type_of(weight, op, "weight");
  check_like(before, weight, op, "before");
  check_shape(before, {grad.size(0), weight.size(1)}, op, "before");
  check_shape(grad, {grad.size(0), weight.size(0)}, op, "grad");
  const Tensor out = at::empty_like(before);
  const megalite::RouterInputGradient a{
      type, grad.data_ptr<float>(), weight.data_ptr(), before.data_ptr(), out.data_ptr(), weight.size(1),
      weight.size(0)};
  at::parallel_for(0, grad.size(0), TOKENS, [&](int64_t begin, int64_t end) {
    megalite::cpu::router_input_gradient(a, begin, end);
  });
  return out;
}

Tensor router_weight_gradient(const Tensor& grad_in, const Tensor& x_in) {
  const char* op = "router_weight_gradient";
  const Tensor grad = of_logits(grad_in, op), x = matrix(x_in, op, "x");
  const megalite::Type type = type_of(x, op, "x");
  check_shape(grad, {x.size(0), grad.size(1)}, op, "grad");
  const Tensor out = at::empty({grad.size(1), x.size(1)}, grad.options());
  const megalite::RouterWeightGradient a{
      type, grad.data_ptr<float>(), x.data_ptr(), out.data_ptr<float>(), x.size(0), x.size(1), grad.size(1)};
  at::parallel_for(0, a.size, 64, [&](int64_t begin, int64_t end) {
    megalite::cpu::router_weight_gradient(a, begin, end);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megalite, m) {
  m.def("router_logits(Tensor x, Tensor weight) -> Tensor");
  m.def("router_input_gradient(Tensor grad, Tensor weight, Tensor before) -> Tensor");
  m.def("router_weight_gradient(Tensor grad, Tensor x) -> Tensor");
}

TORCH_LIBRARY_IMPL(megalite, CPU, m) {
  m.impl("router_logits", &router_logits);
  m.impl("router_input_gradient", &router_input_gradient);
  m.impl("router_weight_gradient", &router_weight_gradient);
}
