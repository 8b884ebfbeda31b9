#include "loss.h"

#include "operator.h"

namespace {

using at::Tensor;
using megalite::check_shape;

void check(const Tensor& logits, const Tensor& labels, int64_t num_valid, const char* op) {
  TORCH_CHECK_VALUE(logits.dim() == 2, op, ": logits has shape ", logits.sizes(), ", but must have [rows, columns]");
  check_shape(labels, {logits.size(0)}, op, "labels");
  TORCH_CHECK_TYPE(
      labels.scalar_type() == at::kLong, op, ": labels is ", labels.scalar_type(), ", but must be int64");
  TORCH_CHECK_VALUE(
      labels.device() == logits.device(), op, ": labels is on ", labels.device(), ", but must be on ", logits.device());
  TORCH_CHECK_VALUE(
      num_valid >= 0 && num_valid <= logits.size(1), op, ": num_valid is ", num_valid, ", but must be from 0 to ",
      logits.size(1));
}

Tensor one_float_a_row(const Tensor& x, const Tensor& logits, const char* op, const char* name) {
  check_shape(x, {logits.size(0)}, op, name);
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, op, ": ", name, " is ", x.scalar_type(), ", but must be float32");
  TORCH_CHECK_VALUE(
      x.device() == logits.device(), op, ": ", name, " is on ", x.device(), ", but must be on ", logits.device());
  return x.contiguous();
}

std::tuple<Tensor, Tensor> cross_entropy_forward(
    const Tensor& logits_in, const Tensor& labels_in, int64_t first, int64_t num_valid) {
  const char* op = "cross_entropy_forward";
  const Tensor logits = logits_in.contiguous(), labels = labels_in.contiguous();
  check(logits, labels, num_valid, op);
  const int64_t rows = logits.size(0), size = logits.size(1);
  const Tensor lse = at::empty({rows}, logits.options().dtype(at::kFloat)), target = at::empty_like(lse);
  megalite::CrossEntropyForward a{
      megalite::type_of(logits, op, "logits"), logits.data_ptr(), labels.data_ptr<int64_t>(), lse.data_ptr<float>(),
      target.data_ptr<float>(), rows, size, first, num_valid};
  if (rows > 0)
    MEGALITE_LAUNCH(
        logits, rows, megalite::grain(size), megalite::cpu::cross_entropy_forward(a, begin, end),
        megalite::cuda::cross_entropy_forward(a, stream));
  return {lse, target};
}

void cross_entropy_backward(
    Tensor& logits, const Tensor& labels_in, const Tensor& lse_in, const Tensor& grad_in, int64_t first,
    int64_t num_valid) {
  const char* op = "cross_entropy_backward_";
  const Tensor labels = labels_in.contiguous();
  check(logits, labels, num_valid, op);
  TORCH_CHECK_VALUE(logits.is_contiguous(), op, ": logits must be contiguous, because they are overwritten");
  const Tensor lse = one_float_a_row(lse_in, logits, op, "lse"), grad = one_float_a_row(grad_in, logits, op, "grad");
  megalite::CrossEntropyBackward a{
      megalite::type_of(logits, op, "logits"), logits.data_ptr(), labels.data_ptr<int64_t>(), lse.data_ptr<float>(),
      grad.data_ptr<float>(), logits.size(0), logits.size(1), first, num_valid};
  if (logits.numel() > 0)
    MEGALITE_LAUNCH(
        logits, a.rows, megalite::grain(a.size), megalite::cpu::cross_entropy_backward(a, begin, end),
        megalite::cuda::cross_entropy_backward(a, stream));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megalite, m) {
  m.def("cross_entropy_forward(Tensor logits, Tensor labels, int first, int num_valid) -> (Tensor lse, Tensor target)");
  m.def(
      "cross_entropy_backward_(Tensor(a!) logits, Tensor labels, Tensor lse, Tensor grad, int first, int num_valid) "
      "-> ()");
}

MEGALITE_REGISTER(m) {
  m.impl("cross_entropy_forward", &cross_entropy_forward);
  m.impl("cross_entropy_backward_", &cross_entropy_backward);
}
