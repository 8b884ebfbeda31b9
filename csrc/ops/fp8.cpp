#include "fp8.h"

#include "operator.h"

namespace {

using at::Tensor;
using megalite::type_of;

// The arguments for a matrix, without where the results go.
megalite::Fp8 arguments(const Tensor& x, int64_t block_rows, int64_t block_columns, bool e5m2, const char* op) {
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": x has shape ", x.sizes(), ", but must have two dimensions");
  TORCH_CHECK_VALUE(
      block_rows > 0 && block_columns > 0, op, ": blocks of ", block_rows, " x ", block_columns,
      " numbers, which must be positive");
  megalite::Fp8 a{};
  a.type = type_of(x, op, "x");
  a.x = x.data_ptr();
  a.rows = x.size(0);
  a.columns = x.size(1);
  a.block_rows = block_rows;
  a.block_columns = block_columns;
  a.mantissa = e5m2 ? 2 : 3;
  return a;
}

void launch(const megalite::Fp8& a, const Tensor& x) {
  if (x.numel() > 0)
    MEGALITE_LAUNCH(
        x, a.strips(), megalite::grain(a.block_rows * a.columns), megalite::cpu::round_to_fp8(a, begin, end),
        megalite::cuda::round_to_fp8(a, stream));
}

Tensor fp8_round(const Tensor& x_in, int64_t block_rows, int64_t block_columns, bool e5m2) {
  const Tensor x = x_in.contiguous(), out = at::empty_like(x);
  megalite::Fp8 a = arguments(x, block_rows, block_columns, e5m2, "fp8_round");
  a.out = out.data_ptr();
  launch(a, x);
  return out;
}

std::tuple<Tensor, Tensor> fp8_quantise(
    const Tensor& x_in, int64_t block_rows, int64_t block_columns, bool e5m2, bool transposed) {
  const Tensor x = x_in.contiguous();
  megalite::Fp8 a = arguments(x, block_rows, block_columns, e5m2, "fp8_quantise");
  const auto shape = [&](int64_t rows, int64_t columns) {
    return transposed ? std::vector<int64_t>{columns, rows} : std::vector<int64_t>{rows, columns};
  };
  const Tensor codes =
      at::empty(shape(a.rows, a.columns), x.options().dtype(e5m2 ? at::kFloat8_e5m2 : at::kFloat8_e4m3fn));
  const Tensor scales = at::empty(shape(a.strips(), a.blocks()), x.options().dtype(at::kFloat));
  a.codes = static_cast<uint8_t*>(codes.data_ptr());
  a.scales = scales.data_ptr<float>();
  a.transposed = transposed;
  launch(a, x);
  return {codes, scales};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megalite, m) {
  m.def("fp8_round(Tensor x, int block_rows, int block_columns, bool e5m2) -> Tensor");
  m.def("fp8_quantise(Tensor x, int block_rows, int block_columns, bool e5m2, bool transposed) -> (Tensor, Tensor)");
}

MEGALITE_REGISTER(m) {
  m.impl("fp8_round", &fp8_round);
  m.impl("fp8_quantise", &fp8_quantise);
}
