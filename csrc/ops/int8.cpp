#include "int8.h"

#include "operator.h"

namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> int8_rows(const Tensor& x_in) {
  const char* op = "int8_rows";
  const Tensor x = x_in.contiguous();
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": x has shape ", x.sizes(), ", but must have two dimensions");
  const int64_t rows = x.size(0), columns = x.size(1);
  const Tensor numbers = at::empty({rows, columns}, x.options().dtype(at::kByte));
  const Tensor scales = at::empty({rows, 1}, x.options().dtype(at::kFloat));
  const megalite::Int8Rows a{
      megalite::type_of(x, op, "x"), x.data_ptr(), numbers.data_ptr<uint8_t>(), scales.data_ptr<float>(), columns};
  at::parallel_for(0, rows, megalite::grain(columns), [&](int64_t begin, int64_t end) {
    megalite::cpu::int8_rows(a, begin, end);
  });
  return {numbers, scales};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megalite, m) { m.def("int8_rows(Tensor x) -> (Tensor numbers, Tensor scales)"); }

TORCH_LIBRARY_IMPL(megalite, CPU, m) { m.impl("int8_rows", &int8_rows); }
