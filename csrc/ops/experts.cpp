#include "experts.h"

#include <algorithm>
#include <vector>

#include "operator.h"

namespace {

using at::Tensor;
using megalite::check_like;
using megalite::check_shape;
using megalite::type_of;

// A contiguous tensor of one dtype that lies where `like` does.
Tensor checked(const Tensor& x, at::ScalarType dtype, const Tensor& like, const char* op, const char* name) {
  TORCH_CHECK_TYPE(x.scalar_type() == dtype, op, ": ", name, " is ", x.scalar_type(), ", but must be ", dtype);
  TORCH_CHECK_VALUE(
      x.device() == like.device(), op, ": ", name, " is on ", x.device(), ", but must be on ", like.device());
  return x.contiguous();
}

void check_matrix(const Tensor& x, const char* op, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": ", name, " has shape ", x.sizes(), ", but must have two dimensions");
}

// Of a CPU's numbers, which a kernel takes for places in memory; a GPU's are not looked at.
void check_range(const Tensor& index, int64_t size, const char* op, const char* name) {
  if (!index.is_cpu()) return;
  const int64_t* at = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.numel(); ++i)
    TORCH_CHECK_INDEX(0 <= at[i] && at[i] < size, op, ": ", name, " has ", at[i], ", but must be from 0 to ", size - 1);
}

Tensor top_k(const Tensor& scores_in, int64_t k) {
  const char* op = "top_k";
  const Tensor scores = checked(scores_in, at::kFloat, scores_in, op, "scores");
  TORCH_CHECK_VALUE(scores.dim() >= 1, op, ": scores has no dimension");
  const int64_t experts = scores.size(-1), tokens = c10::multiply_integers(scores.sizes().slice(0, scores.dim() - 1));
  TORCH_CHECK_VALUE(1 <= k && k <= experts, op, ": k is ", k, ", but must be from 1 to ", experts);
  std::vector<int64_t> shape = scores.sizes().vec();
  shape.back() = k;
  const Tensor index = at::empty(shape, scores.options().dtype(at::kLong));
  megalite::TopK a{scores.data_ptr<float>(), index.data_ptr<int64_t>(), tokens, experts, k};
  if (tokens > 0)
    MEGALITE_LAUNCH(
        scores, tokens, megalite::grain(k * experts), megalite::cpu::top_k(a, begin, end),
        megalite::cuda::top_k(a, stream));
  return index;
}

Tensor count_rows(const Tensor& index_in, int64_t num_experts) {
  const char* op = "count_rows";
  const Tensor index = checked(index_in, at::kLong, index_in, op, "index");
  check_range(index, num_experts, op, "index");
  const Tensor counts = at::empty({num_experts}, index.options());
  megalite::CountRows a{index.data_ptr<int64_t>(), counts.data_ptr<int64_t>(), index.numel(), num_experts};
  if (num_experts > 0)
    MEGALITE_LAUNCH(index, 1, 1, megalite::cpu::count_rows(a), megalite::cuda::count_rows(a, stream));
  return counts;
}

std::tuple<Tensor, Tensor> sort_by_expert(const Tensor& index_in, const Tensor& counts_in) {
  const char* op = "sort_by_expert";
  const Tensor index = checked(index_in, at::kLong, index_in, op, "index");
  const Tensor counts = checked(counts_in, at::kLong, index, op, "counts");
  TORCH_CHECK_VALUE(index.dim() >= 1, op, ": index has no dimension");
  TORCH_CHECK_VALUE(counts.dim() == 1, op, ": counts has shape ", counts.sizes(), ", but must have one dimension");
  TORCH_CHECK_VALUE(
      !index.is_cpu() || count_rows(index, counts.size(0)).equal(counts), op, ": counts are not those of index");
  const int64_t visits = index.numel(), slots = index.size(-1);
  const Tensor token = at::empty({visits}, index.options()), row = at::empty({slots ? visits / slots : 0, slots}, index.options());
  megalite::SortByExpert a{
      index.data_ptr<int64_t>(), counts.data_ptr<int64_t>(), token.data_ptr<int64_t>(), row.data_ptr<int64_t>(),
      visits, slots, counts.size(0)};
  if (visits > 0)
    MEGALITE_LAUNCH(index, 1, 1, megalite::cpu::sort_by_expert(a), megalite::cuda::sort_by_expert(a, stream));
  return {token, row};
}

Tensor gather_rows(const Tensor& x_in, const Tensor& token_in) {
  const char* op = "gather_rows";
  const Tensor x = x_in.contiguous();
  check_matrix(x, op, "x");
  const Tensor token = checked(token_in, at::kLong, x, op, "token");
  TORCH_CHECK_VALUE(token.dim() == 1, op, ": token has shape ", token.sizes(), ", but must have one dimension");
  check_range(token, x.size(0), op, "token");
  const Tensor out = at::empty({token.size(0), x.size(1)}, x.options());
  megalite::GatherRows a{
      type_of(x, op, "x"), x.data_ptr(), token.data_ptr<int64_t>(), out.data_ptr(), out.size(0), out.size(1)};
  if (out.numel() > 0)
    MEGALITE_LAUNCH(
        x, a.rows, megalite::grain(a.size), megalite::cpu::gather_rows(a, begin, end),
        megalite::cuda::gather_rows(a, stream));
  return out;
}

Tensor sum_rows(const Tensor& rows_in, const Tensor& row_in, const std::optional<Tensor>& weight_in) {
  const char* op = "sum_rows";
  const Tensor rows = rows_in.contiguous();
  check_matrix(rows, op, "rows");
  const Tensor row = checked(row_in, at::kLong, rows, op, "row");
  check_matrix(row, op, "row");
  check_range(row, rows.size(0), op, "row");
  Tensor weight;
  if (weight_in) {
    weight = checked(*weight_in, at::kFloat, rows, op, "weight");
    check_shape(weight, row.sizes(), op, "weight");
  }
  const Tensor out = at::empty({row.size(0), rows.size(1)}, rows.options());
  megalite::SumRows a{
      type_of(rows, op, "rows"), rows.data_ptr(), row.data_ptr<int64_t>(),
      weight.defined() ? weight.data_ptr<float>() : nullptr, out.data_ptr(), row.size(0), row.size(1), rows.size(1)};
  if (out.numel() > 0)
    MEGALITE_LAUNCH(
        rows, a.tokens, megalite::grain(a.slots * a.size), megalite::cpu::sum_rows(a, begin, end),
        megalite::cuda::sum_rows(a, stream));
  return out;
}

std::tuple<Tensor, Tensor> sum_rows_backward(
    const Tensor& grad_in, const Tensor& rows_in, const Tensor& row_in, const Tensor& weight_in) {
  const char* op = "sum_rows_backward";
  const Tensor rows = rows_in.contiguous(), grad = grad_in.contiguous();
  check_matrix(rows, op, "rows");
  const Tensor row = checked(row_in, at::kLong, rows, op, "row");
  check_matrix(row, op, "row");
  check_range(row, rows.size(0), op, "row");
  TORCH_CHECK_VALUE(
      row.numel() == rows.size(0), op, ": row has ", row.numel(), " elements, but must have one for each of ",
      rows.size(0), " rows");
  check_like(grad, rows, op, "grad");
  check_shape(grad, {row.size(0), rows.size(1)}, op, "grad");
  const Tensor weight = checked(weight_in, at::kFloat, rows, op, "weight");
  check_shape(weight, row.sizes(), op, "weight");
  const Tensor d_rows = at::empty_like(rows), d_weight = at::empty_like(weight);
  megalite::SumRowsBackward a{
      type_of(rows, op, "rows"), grad.data_ptr(), rows.data_ptr(), row.data_ptr<int64_t>(), weight.data_ptr<float>(),
      d_rows.data_ptr(), d_weight.data_ptr<float>(), row.size(0), row.size(1), rows.size(1)};
  if (row.numel() > 0)
    MEGALITE_LAUNCH(
        rows, a.tokens, megalite::grain(a.slots * a.size), megalite::cpu::sum_rows_backward(a, begin, end),
        megalite::cuda::sum_rows_backward(a, stream));
  return {d_rows, d_weight};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megalite, m) {
  m.def("top_k(Tensor scores, int k) -> Tensor");
  m.def("count_rows(Tensor index, int num_experts) -> Tensor");
  m.def("sort_by_expert(Tensor index, Tensor counts) -> (Tensor token, Tensor row)");
  m.def("gather_rows(Tensor x, Tensor token) -> Tensor");
  m.def("sum_rows(Tensor rows, Tensor row, Tensor? weight) -> Tensor");
  m.def("sum_rows_backward(Tensor grad, Tensor rows, Tensor row, Tensor weight) -> (Tensor d_rows, Tensor d_weight)");
}

MEGALITE_REGISTER(m) {
  m.impl("top_k", &top_k);
  m.impl("count_rows", &count_rows);
  m.impl("sort_by_expert", &sort_by_expert);
  m.impl("gather_rows", &gather_rows);
  m.impl("sum_rows", &sum_rows);
  m.impl("sum_rows_backward", &sum_rows_backward);
}
