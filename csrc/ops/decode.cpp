#include "decode.h"

#include "operator.h"

namespace {

using at::Tensor;

const int64_t* cells(const Tensor& x, int64_t batch, const char* name) {
  const char* op = "decode_attention";
  TORCH_CHECK_TYPE(x.scalar_type() == at::kLong, op, ": ", name, " is ", x.scalar_type(), ", but must be int64");
  TORCH_CHECK_VALUE(x.device().is_cpu() && x.is_contiguous(), op, ": ", name, " must be contiguous, on cpu");
  megalite::check_shape(x, {batch}, op, name);
  return x.const_data_ptr<int64_t>();
}

Tensor decode_attention(
    const Tensor& q_in, const Tensor& keys, const Tensor& values, const Tensor& first, const Tensor& last, double scale,
    double softcap) {
  const char* op = "decode_attention";
  const Tensor q = q_in.contiguous();
  const megalite::Type type = megalite::type_of(q, op, "q");
  TORCH_CHECK_VALUE(q.dim() == 3, op, ": q has shape ", q.sizes(), ", but must have [batch, heads, head size]");
  TORCH_CHECK_VALUE(
      keys.dim() == 4, op, ": keys have shape ", keys.sizes(), ", but must have [batch, heads, cells, head size]");
  const int64_t batch = q.size(0), heads = q.size(1), size = q.size(2), groups = keys.size(1), num_cells = keys.size(2);
  megalite::check_like(keys, q, op, "keys");
  megalite::check_like(values, q, op, "values");
  TORCH_CHECK_VALUE(groups > 0 && heads % groups == 0, op, ": ", heads, " heads cannot share ", groups, " of keys");
  megalite::check_shape(keys, {batch, groups, num_cells, size}, op, "keys");
  megalite::check_shape(values, keys.sizes(), op, "values");
  TORCH_CHECK_VALUE(
      keys.strides() == values.strides() && keys.stride(3) == 1 && keys.stride(2) == size, op,
      ": cells of keys and of values must lie next to each other, and both alike");
  const int64_t *from = cells(first, batch, "first"), *to = cells(last, batch, "last");
  for (int64_t row = 0; row < batch; ++row)
    TORCH_CHECK_VALUE(
        0 <= from[row] && from[row] <= to[row] && to[row] < num_cells, op, ": row ", row, " has cells ", from[row],
        " to ", to[row], " of ", num_cells);
  const Tensor out = at::empty_like(q);
  const megalite::Decode a{
      type, q.const_data_ptr(), keys.const_data_ptr(), values.const_data_ptr(), out.data_ptr(), from, to,
      keys.stride(0), keys.stride(1), batch, heads, groups, size, static_cast<float>(scale),
      static_cast<float>(softcap)};
  at::parallel_for(0, batch * groups, megalite::grain(num_cells * size), [&](int64_t begin, int64_t end) {
    megalite::cpu::decode_attention(a, begin, end);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megalite, m) {
  m.def(
      "decode_attention(Tensor q, Tensor keys, Tensor values, Tensor first, Tensor last, float scale, float softcap) "
      "-> Tensor");
}

TORCH_LIBRARY_IMPL(megalite, CPU, m) { m.impl("decode_attention", &decode_attention); }
