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

// One product: what is summed over its tokens, and where.
struct Product {
  megalite::Type type;
  const char *grad, *x;
  float* into;
  int64_t grad_stride, x_stride, tokens, rows, columns;
  bool add;

  int64_t bytes() const { return type == megalite::Type::f32 ? 4 : 2; }
};

// How a product's tokens are cut into parts, and the rows of its result into blocks.
struct Cut {
  megalite::TileShape tile{};
  int64_t panels = 0, part = 0, block = 0;

  // `shares` get as many blocks each, of one size.
  Cut(const Product& p, int64_t shares) {
    megalite::cpu::tile_shape(p.type, tile);
    panels = divide_up(p.columns, tile.columns);
    const int64_t parts = std::max<int64_t>(1, divide_up(p.tokens, BLOCK_TOKENS));
    part = divide_up(divide_up(p.tokens, parts), tile.step) * tile.step;
    const int64_t wanted = divide_up(divide_up(p.rows, BLOCK_ROWS), shares) * shares;
    block = divide_up(divide_up(p.rows, wanted), tile.rows) * tile.rows;
  }
  int64_t blocks(const Product& p) const { return divide_up(p.rows, block); }
  int64_t packed_size() const { return panels * tile.columns * part; }
};

// Calls take(pack, product) for each part of the tokens; `packed` has room for Cut::packed_size() elements.
template <class Take>
void each_part(const Product& p, const Cut& cut, void* packed, Take take) {
  for (int64_t begin = 0; begin < p.tokens; begin += cut.part) {
    const int64_t size = std::min(cut.part, p.tokens - begin);
    take(
        megalite::PackPanels{p.type, p.x + begin * p.x_stride * p.bytes(), p.x_stride, size, p.columns, packed},
        megalite::WeightGradient{
            p.type, p.grad + begin * p.grad_stride * p.bytes(), packed, p.into, p.grad_stride, size, p.rows, p.columns,
            cut.block, p.add || begin > 0});
  }
}

// All threads share the product.
void together(const Product& p, const at::TensorOptions& options) {
  if (p.tokens == 0 && !p.add) std::fill(p.into, p.into + p.rows * p.columns, 0.0f);
  if (p.tokens == 0 || p.rows * p.columns == 0) return;
  const Cut cut(p, at::get_num_threads());
  const Tensor packed = at::empty({cut.packed_size()}, options);
  each_part(p, cut, packed.data_ptr(), [&](const megalite::PackPanels& pack, const megalite::WeightGradient& product) {
    at::parallel_for(0, cut.panels, 1, [&](int64_t first, int64_t last) { megalite::cpu::pack_panels(pack, first, last); });
    at::parallel_for(0, cut.blocks(p), 1, [&](int64_t first, int64_t last) {
      megalite::cpu::weight_gradient(product, first, last);
    });
  });
}

// Each thread has its share of all products' blocks, by their tokens, and packs for itself: it waits for no other.
void in_shares(const std::vector<Product>& products, const at::TensorOptions& options) {
  if (products.empty() || products[0].rows * products[0].columns == 0) return;
  const int64_t shares = at::get_num_threads();
  std::vector<Cut> cuts;
  int64_t work = 0, room = 0;
  for (const Product& p : products) {
    cuts.emplace_back(p, 1);
    work += cuts.back().blocks(p) * p.tokens;
    room = std::max(room, cuts.back().packed_size());
  }
  const Tensor packed = at::empty({shares, room}, options);
  at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    const int64_t from = work * begin / shares, to = work * end / shares;
    int64_t at = 0;  // work before a product's blocks
    for (size_t i = 0; i < products.size(); ++i) {
      const Product& p = products[i];
      const int64_t blocks = cuts[i].blocks(p);
      // A block is of the share in which it begins.
      const int64_t first = std::clamp<int64_t>(divide_up(from - at, p.tokens), 0, blocks);
      const int64_t last = std::clamp<int64_t>(divide_up(to - at, p.tokens), 0, blocks);
      at += blocks * p.tokens;
      if (first < last)
        each_part(p, cuts[i], packed[begin].data_ptr(), [&](const auto& pack, const auto& product) {
          megalite::cpu::pack_panels(pack, 0, cuts[i].panels);
          megalite::cpu::weight_gradient(product, first, last);
        });
    }
  });
}

Product product_of(const Tensor& into, const Tensor& grad, const Tensor& x, bool add, const char* op) {
  return {
      megalite::type_of(x, op, "x"), static_cast<const char*>(grad.const_data_ptr()),
      static_cast<const char*>(x.const_data_ptr()), into.data_ptr<float>(), grad.stride(0), x.stride(0), x.size(0),
      grad.size(1), x.size(1), add};
}

void weight_gradient_(const Tensor& into, const Tensor& grad, const Tensor& x, bool add) {
  const char* op = "weight_gradient_";
  check(into, grad, x, op);
  megalite::check_shape(into, {grad.size(1), x.size(1)}, op, "into");
  together(product_of(into, rows_contiguous(grad), rows_contiguous(x), add, op), x.options());
}

void grouped_weight_gradient_(
    const Tensor& into, const Tensor& grad_in, const Tensor& x_in, const Tensor& counts, bool add) {
  const char* op = "grouped_weight_gradient_";
  check(into, grad_in, x_in, op);
  megalite::check_shape(into, {counts.numel(), grad_in.size(1), x_in.size(1)}, op, "into");
  const Tensor grad = rows_contiguous(grad_in), x = rows_contiguous(x_in);
  const std::vector<int64_t> first = megalite::first_rows(counts, x.size(0), op);
  std::vector<Product> shared;
  for (int64_t e = 0; e < counts.numel(); ++e) {
    Product p = product_of(into, grad, x, add, op);
    p.grad += first[e] * p.grad_stride * p.bytes();
    p.x += first[e] * p.x_stride * p.bytes();
    p.into += e * p.rows * p.columns;
    p.tokens = first[e + 1] - first[e];
    // Several threads would pack the same for an expert that is more than two shares.
    if (p.tokens == 0 || p.tokens * at::get_num_threads() > 2 * x.size(0))
      together(p, x.options());
    else
      shared.push_back(p);
  }
  in_shares(shared, x.options());
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
