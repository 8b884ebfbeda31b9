#include "grouped_product.h"

#include "groups.h"
#include "operator.h"

namespace {

using at::Tensor;

Tensor grouped_product(const Tensor& x_in, const Tensor& weight_in, const Tensor& counts, bool transpose) {
  const char* op = "grouped_product";
  const Tensor x = x_in.contiguous(), weight = weight_in.contiguous();
  const megalite::Type type = megalite::type_of(x, op, "x");
  megalite::check_like(weight, x, op, "weight");
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": x has shape ", x.sizes(), ", but must have two dimensions");
  TORCH_CHECK_VALUE(weight.dim() == 3, op, ": weight has shape ", weight.sizes(), ", but must have three dimensions");
  const int64_t experts = weight.size(0), rows = x.size(0);
  const int64_t columns = weight.size(transpose ? 2 : 1), depth = weight.size(transpose ? 1 : 2);
  megalite::check_shape(x, {rows, depth}, op, "x");
  megalite::check_shape(counts, {experts}, op, "counts");
  const std::vector<int64_t> first = megalite::first_rows(counts, rows, op);
  const Tensor out = at::empty({rows, columns}, x.options());
  const megalite::GroupedProduct a{
      type, x.data_ptr(), weight.data_ptr(), out.data_ptr(), first.data(), experts, columns, depth, transpose};
  at::parallel_for(0, out.numel(), 1, [&](int64_t begin, int64_t end) {
    megalite::cpu::grouped_product(a, begin, end);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megalite, m) {
  m.def("grouped_product(Tensor x, Tensor weight, Tensor counts, bool transpose) -> Tensor");
}

TORCH_LIBRARY_IMPL(megalite, CPU, m) { m.impl("grouped_product", &grouped_product); }
