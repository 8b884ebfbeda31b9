#include "newton_schulz.h"

#include "operator.h"

namespace {

using at::Tensor;

using Kernel = void (*)(const megalite::AddedProduct& a, int64_t begin, int64_t end);

Tensor run(
    const char* op, Kernel kernel, const Tensor& a, const Tensor& b, int64_t columns, const Tensor& add, double alpha,
    double beta) {
  const Tensor out = at::empty({a.size(0), columns}, a.options());
  int64_t tile = 0;
  megalite::cpu::added_product_columns(tile);
  const megalite::AddedProduct product{
      megalite::type_of(a, op, "x"),
      a.data_ptr(),
      b.defined() ? b.data_ptr() : nullptr,
      add.defined() ? add.data_ptr() : nullptr,
      out.data_ptr(),
      a.size(0),
      columns,
      a.size(1),
      static_cast<float>(alpha),
      static_cast<float>(beta)};
  at::parallel_for(
      0, (columns + tile - 1) / tile, 1, [&](int64_t begin, int64_t end) { kernel(product, begin, end); });
  return out;
}

void check_matrix(const Tensor& x, const char* op, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": ", name, " has shape ", x.sizes(), ", but must have two dimensions");
}

// alpha x x^T + beta add.
Tensor symmetric_product(const Tensor& x, const std::optional<Tensor>& add, double alpha, double beta) {
  const char* op = "symmetric_product";
  check_matrix(x, op, "x");
  const int64_t rows = x.size(0);
  if (add) {
    megalite::check_like(*add, x, op, "add");
    megalite::check_shape(*add, {rows, rows}, op, "add");
  }
  const Tensor added = add ? add->contiguous() : Tensor();
  return run(op, &megalite::cpu::symmetric_product, x.contiguous(), Tensor(), rows, added, alpha, beta);
}

// matrix x + beta x.
Tensor polynomial_product(const Tensor& matrix, const Tensor& x_in, double beta) {
  const char* op = "polynomial_product";
  const Tensor x = x_in.contiguous();
  check_matrix(x, op, "x");
  megalite::check_like(matrix, x, op, "matrix");
  megalite::check_shape(matrix, {x.size(0), x.size(0)}, op, "matrix");
  return run(op, &megalite::cpu::added_product, matrix.contiguous(), x, x.size(1), x, 1.0, beta);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megalite, m) {
  m.def("symmetric_product(Tensor x, Tensor? add, float alpha, float beta) -> Tensor");
  m.def("polynomial_product(Tensor matrix, Tensor x, float beta) -> Tensor");
}

TORCH_LIBRARY_IMPL(megalite, CPU, m) {
  m.impl("symmetric_product", &symmetric_product);
  m.impl("polynomial_product", &polynomial_product);
}
