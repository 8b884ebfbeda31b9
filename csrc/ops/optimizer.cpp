#include "optimizer.h"

#include <numeric>

#include "operator.h"

namespace {

using at::Tensor;
using megalite::check_device;
using megalite::check_like;
using megalite::check_shape;
using megalite::type_of;

int64_t parts_of(const Tensor& x) {
  return (x.numel() + megalite::OPTIMIZER_PART - 1) / megalite::OPTIMIZER_PART;
}

void check_fp32(const Tensor& x, const char* op, const char* name) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, op, ": ", name, " is ", x.scalar_type(), ", but must be float32");
}

// What is written in place cannot be copied first.
void check_contiguous(const Tensor& x, const char* op, const char* name) {
  TORCH_CHECK_VALUE(x.is_contiguous(), op, ": ", name, " is updated in place, and must be contiguous for that");
}

// bf16 weights that get the new `master`, rounded.
void check_weights(const std::optional<Tensor>& weights, const Tensor& master, const char* op) {
  if (!weights) return;
  check_shape(*weights, master.sizes(), op, "weights");
  check_contiguous(*weights, op, "weights");
  TORCH_CHECK_TYPE(
      weights->scalar_type() == at::kBFloat16, op, ": weights is ", weights->scalar_type(), ", but must be bfloat16");
  check_device(*weights, master, op, "weights");
}

void check_divisor(const Tensor& divisor, const Tensor& like, const char* op) {
  check_shape(divisor, {}, op, "divisor");
  check_like(divisor, like, op, "divisor");
}

// Whether what travels to the owners of matrices and back is in bf16; otherwise it is in fp32.
bool is_rounded(at::ScalarType type, const char* op, const char* name) {
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kBFloat16, op, ": ", name, " is ", type, ", but must be float32 or bfloat16");
  return type == at::kBFloat16;
}

Tensor momentum_(
    const Tensor& buffer, const Tensor& grad_in, const Tensor& divisor, double momentum, bool nesterov,
    at::ScalarType out_type) {
  const char* op = "momentum_";
  check_fp32(buffer, op, "buffer");
  check_contiguous(buffer, op, "buffer");
  const Tensor grad = grad_in.contiguous();
  check_shape(grad, buffer.sizes(), op, "grad");
  check_like(grad, buffer, op, "grad");
  check_divisor(divisor, buffer, op);
  const bool rounds = is_rounded(out_type, op, "out");
  const Tensor out = at::empty_like(buffer, buffer.options().dtype(out_type));
  const megalite::Momentum a{
      buffer.data_ptr<float>(), grad.data_ptr<float>(),         divisor.data_ptr<float>(), out.data_ptr(),
      buffer.numel(),           static_cast<float>(momentum), nesterov,                  rounds};
  if (a.size > 0)
    MEGALITE_LAUNCH(
        buffer, parts_of(buffer), 1, megalite::cpu::momentum(a, begin, end), megalite::cuda::momentum(a, stream));
  return out;
}

void decayed_step_(
    const Tensor& master, const std::optional<Tensor>& weights, const Tensor& step_in, const Tensor& divisor,
    double lr, double weight_decay) {
  const char* op = "decayed_step_";
  check_fp32(master, op, "master");
  check_contiguous(master, op, "master");
  check_weights(weights, master, op);
  const Tensor step = step_in.contiguous();
  check_shape(step, master.sizes(), op, "step");
  check_device(step, master, op, "step");
  check_divisor(divisor, master, op);
  const megalite::DecayedStep a{
      master.data_ptr<float>(), weights ? weights->data_ptr() : nullptr, step.data_ptr(), divisor.data_ptr<float>(),
      master.numel(), static_cast<float>(lr * weight_decay), static_cast<float>(lr),
      is_rounded(step.scalar_type(), op, "step")};
  if (a.size > 0)
    MEGALITE_LAUNCH(
        master, parts_of(master), 1, megalite::cpu::decayed_step(a, begin, end),
        megalite::cuda::decayed_step(a, stream));
}

void adamw_(
    const Tensor& master, const Tensor& exp_avg, const Tensor& exp_avg_sq, const std::optional<Tensor>& weights,
    const Tensor& grad_in, const Tensor& factors, double lr, double beta1, double beta2, double eps,
    double weight_decay) {
  const char* op = "adamw_";
  check_fp32(master, op, "master");
  check_contiguous(master, op, "master");
  const std::pair<const Tensor*, const char*> states[] = {{&exp_avg, "exp_avg"}, {&exp_avg_sq, "exp_avg_sq"}};
  for (const auto& [state, name] : states) {
    check_shape(*state, master.sizes(), op, name);
    check_like(*state, master, op, name);
    check_contiguous(*state, op, name);
  }
  check_weights(weights, master, op);
  const Tensor grad = grad_in.contiguous();
  check_shape(grad, master.sizes(), op, "grad");
  check_like(grad, master, op, "grad");
  check_shape(factors, {3}, op, "factors");
  check_like(factors, master, op, "factors");
  TORCH_CHECK_VALUE(factors.is_contiguous(), op, ": factors must be contiguous");
  const megalite::AdamW a{
      master.data_ptr<float>(), exp_avg.data_ptr<float>(), exp_avg_sq.data_ptr<float>(),
      weights ? weights->data_ptr() : nullptr, grad.data_ptr<float>(), factors.data_ptr<float>(), master.numel(),
      static_cast<float>(lr * weight_decay), static_cast<float>(1.0 - beta1), static_cast<float>(beta2),
      static_cast<float>(1.0 - beta2), static_cast<float>(lr), static_cast<float>(eps)};
  if (a.size > 0)
    MEGALITE_LAUNCH(
        master, parts_of(master), 1, megalite::cpu::adamw(a, begin, end), megalite::cuda::adamw(a, stream));
}

Tensor sum_of_squares(const std::vector<Tensor>& tensors) {
  const char* op = "sum_of_squares";
  int64_t count = 0;
  for (const Tensor& x : tensors) {
    check_fp32(x, op, "a tensor");
    check_like(x, tensors[0], op, "a tensor");
    count += parts_of(x);
  }
  const Tensor sum = at::empty({}, tensors[0].options().dtype(at::kDouble));
  const Tensor parts = at::empty({count}, sum.options());
  double* part = parts.data_ptr<double>();
  for (const Tensor& x_in : tensors) {
    if (x_in.numel() == 0) continue;
    const Tensor x = x_in.contiguous();
    const megalite::SumOfSquares a{x.data_ptr<float>(), x.numel(), part};
    MEGALITE_LAUNCH(
        x, parts_of(x), 1, megalite::cpu::sum_of_squares(a, begin, end), megalite::cuda::sum_of_squares(a, stream));
    part += parts_of(x);
  }
  double* out = sum.data_ptr<double>();
  const double* first = parts.data_ptr<double>();
  MEGALITE_LAUNCH(
      sum, 1, 1, *out = std::accumulate(first, first + count, 0.0),
      megalite::cuda::sum_parts(first, count, out, stream));
  return sum;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megalite, m) {
  m.def(
      "adamw_(Tensor(a!) master, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? weights, Tensor grad, "
      "Tensor factors, float lr, float beta1, float beta2, float eps, float weight_decay) -> ()");
  m.def("momentum_(Tensor(a!) buffer, Tensor grad, Tensor divisor, float momentum, bool nesterov, "
      "ScalarType out_type) -> Tensor");
  m.def(
      "decayed_step_(Tensor(a!) master, Tensor(b!)? weights, Tensor step, Tensor divisor, float lr, "
      "float weight_decay) -> ()");
  m.def("sum_of_squares(Tensor[] tensors) -> Tensor");
}

MEGALITE_REGISTER(m) {
  m.impl("adamw_", &adamw_);
  m.impl("momentum_", &momentum_);
  m.impl("decayed_step_", &decayed_step_);
  m.impl("sum_of_squares", &sum_of_squares);
}
