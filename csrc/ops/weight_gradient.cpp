#include "weight_gradient.h"

#include "groups.h"
#include "operator.h"

namespace {

using at::Tensor;

// Rows and tokens of a block of the gradient that is packed and stays in a core's L2 beside a panel of x.
constexpr int64_t BLOCK_ROWS = 96, BLOCK_TOKENS = 2048;

Tensor rows_contiguous(const Tensor& x) { return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous(); }

int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }

void check(const Tensor& into, const Tensor& grad, const Tensor& x, const char* op) {
  megalite::type_of(x, op, "x");
  megalite::check_like(grad, x, op, "grad");
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": x has shape ", x.sizes(), ", but must have two dimensions");
  TORCH_CHECK_VALUE(grad.dim() == 2, op, ": grad has shape ", grad.sizes(), ", but must have two dimensions");
  TORCH_CHECK_TYPE(into.scalar_type() == at::kFloat, op, ": into is ", into.scalar_type(), ", but must be float32");
  TORCH_CHECK_VALUE(into.is_contiguous(), op, ": into must be contiguous");
  megalite::check_shape(grad, {x.size(0), grad.size(1)}, op, "grad");
}

void accumulate(const Tensor& into, const Tensor& grad_in, const Tensor& x_in, bool add) {
  const char* op = "weight_gradient_";
  const megalite::Type type = megalite::type_of(x_in, op, "x");
  const int64_t tokens = x_in.size(0), rows = grad_in.size(1), columns = x_in.size(1);
  if (tokens == 0 && !add) into.zero_();
  if (tokens == 0 || into.numel() == 0) return;

  const Tensor grad = rows_contiguous(grad_in), x = rows_contiguous(x_in);
  megalite::TileShape tile{};
  megalite::cpu::tile_shape(type, tile);
  const int64_t parts = divide_up(tokens, BLOCK_TOKENS);
  const int64_t part = divide_up(divide_up(tokens, parts), tile.step) * tile.step;
  const int64_t panels = divide_up(columns, tile.columns);
  const Tensor packed = at::empty({panels, part / tile.step, tile.columns * tile.step}, x.options());
  // Blocks of one size, as many for each thread.
  const int64_t threads = at::get_num_threads();
  const int64_t wanted = divide_up(divide_up(rows, BLOCK_ROWS), threads) * threads;
  const int64_t block = divide_up(divide_up(rows, wanted), tile.rows) * tile.rows;
  for (int64_t begin = 0; begin < tokens; begin += part) {
    const int64_t size = std::min(part, tokens - begin);
    const Tensor x_part = x.narrow(0, begin, size), grad_part = grad.narrow(0, begin, size);
    const megalite::PackPanels pack{type, x_part.data_ptr(), x.stride(0), size, columns, packed.data_ptr()};
    at::parallel_for(0, panels, 1, [&](int64_t first, int64_t last) { megalite::cpu::pack_panels(pack, first, last); });
    const megalite::WeightGradient product{
        type, grad_part.data_ptr(), packed.data_ptr(), into.data_ptr<float>(), grad.stride(0), size, rows, columns,
        block, add || begin > 0};
    at::parallel_for(0, divide_up(rows, block), 1, [&](int64_t first, int64_t last) {
      megalite::cpu::weight_gradient(product, first, last);
    });
  }
}

void weight_gradient_(const Tensor& into, const Tensor& grad, const Tensor& x, bool add) {
  const char* op = "weight_gradient_";
  check(into, grad, x, op);
  megalite::check_shape(into, {grad.size(1), x.size(1)}, op, "into");
  accumulate(into, grad, x, add);
}

void grouped_weight_gradient_(const Tensor& into, const Tensor& grad, const Tensor& x, const Tensor& counts, bool add) {
  const char* op = "grouped_weight_gradient_";
  check(into, grad, x, op);
  megalite::check_shape(into, {counts.numel(), grad.size(1), x.size(1)}, op, "into");
  const std::vector<int64_t> first = megalite::first_rows(counts, x.size(0), op);
  for (int64_t e = 0; e < counts.numel(); ++e) {
    const int64_t rows = first[e + 1] - first[e];
    accumulate(into[e], grad.narrow(0, first[e], rows), x.narrow(0, first[e], rows), add);
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megalite, m) {
  m.def("grouped_weight_gradient_(Tensor(a!) into, Tensor grad, Tensor x, Tensor counts, bool add) -> ()");
  m.def("weight_gradient_(Tensor(a!) into, Tensor grad, Tensor x, bool add) -> ()");
}

TORCH_LIBRARY_IMPL(megalite, CPU, m) {
  m.impl("weight_gradient_", &weight_gradient_);
  m.impl("grouped_weight_gradient_", &grouped_weight_gradient_);
}
