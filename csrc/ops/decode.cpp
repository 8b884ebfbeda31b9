#include "decode.h"

#include "operator.h"

namespace {

using at::Tensor;

const int64_t* cells(const Tensor& x, int64_t batch, const char* op, const char* name) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kLong, op, ": ", name, " is ", x.scalar_type(), ", but must be int64");
  TORCH_CHECK_VALUE(x.device().is_cpu() && x.is_contiguous(), op, ": ", name, " must be contiguous, on cpu");
  megalite::check_shape(x, {batch}, op, name);
  return x.const_data_ptr<int64_t>();
}

megalite::Cell cell_of(const Tensor& keys, const char* op) {
  if (keys.scalar_type() == at::kChar) return megalite::Cell::int8;
  TORCH_CHECK_TYPE(
      keys.scalar_type() == at::kFloat8_e4m3fn, op, ": keys with scales are ", keys.scalar_type(),
      ", but must be int8 or float8_e4m3fn");
  return megalite::Cell::e4m3;
}

// Scales of the cells of `numbers`, which lie as these do.
const void* scales_of(const Tensor& scales, const Tensor& numbers, const Tensor& q, const char* op, const char* name) {
  megalite::check_like(scales, q, op, name);
  megalite::check_shape(scales, numbers.sizes().slice(0, 3), op, name);
  const int64_t size = numbers.size(3);
  TORCH_CHECK_VALUE(
      scales.stride(2) == 1 && scales.stride(1) * size == numbers.stride(1) &&
          scales.stride(0) * size == numbers.stride(0),
      op, ": ", name, " must lie as the cells do that they scale");
  return scales.const_data_ptr();
}

// Scales are null where keys and values are numbers of the queries' type.
Tensor decode(
    const char* op, const Tensor& q_in, const Tensor& keys, const Tensor& values, const Tensor* key_scales,
    const Tensor* value_scales, const Tensor& first, const Tensor& last, double scale, double softcap) {
  const Tensor q = q_in.contiguous();
  const megalite::Type type = megalite::type_of(q, op, "q");
  TORCH_CHECK_VALUE(q.dim() == 3, op, ": q has shape ", q.sizes(), ", but must have [batch, heads, head size]");
  TORCH_CHECK_VALUE(
      keys.dim() == 4, op, ": keys have shape ", keys.sizes(), ", but must have [batch, heads, cells, head size]");
  const int64_t batch = q.size(0), heads = q.size(1), size = q.size(2), groups = keys.size(1), num_cells = keys.size(2);
  const megalite::Cell cell = key_scales ? cell_of(keys, op) : megalite::Cell::plain;
  if (!key_scales) megalite::check_like(keys, q, op, "keys");
  megalite::check_like(values, keys, op, "values");
  TORCH_CHECK_VALUE(groups > 0 && heads % groups == 0, op, ": ", heads, " heads cannot share ", groups, " of keys");
  megalite::check_shape(keys, {batch, groups, num_cells, size}, op, "keys");
  megalite::check_shape(values, keys.sizes(), op, "values");
  TORCH_CHECK_VALUE(
      keys.strides() == values.strides() && keys.stride(3) == 1 && keys.stride(2) == size, op,
      ": cells of keys and of values must lie next to each other, and both alike");
  const int64_t *from = cells(first, batch, op, "first"), *to = cells(last, batch, op, "last");
  for (int64_t row = 0; row < batch; ++row)
    TORCH_CHECK_VALUE(
        0 <= from[row] && from[row] <= to[row] && to[row] < num_cells, op, ": row ", row, " has cells ", from[row],
        " to ", to[row], " of ", num_cells);
  const Tensor out = at::empty_like(q);
  const void* of_keys = key_scales ? scales_of(*key_scales, keys, q, op, "key_scales") : nullptr;
  const void* of_values = value_scales ? scales_of(*value_scales, values, q, op, "value_scales") : nullptr;
  const megalite::Decode a{
      type, cell, q.const_data_ptr(), keys.const_data_ptr(), values.const_data_ptr(), of_keys, of_values,
      out.data_ptr(), from, to, keys.stride(0), keys.stride(1), batch, heads, groups, size, static_cast<float>(scale),
      static_cast<float>(softcap)};
  at::parallel_for(0, batch * groups, megalite::grain(num_cells * size), [&](int64_t begin, int64_t end) {
    megalite::cpu::decode_attention(a, begin, end);
  });
  return out;
}

Tensor decode_attention(
    const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& first, const Tensor& last, double scale,
    double softcap) {
  return decode("decode_attention", q, keys, values, nullptr, nullptr, first, last, scale, softcap);
}

Tensor decode_quantised(
    const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& key_scales, const Tensor& value_scales,
    const Tensor& first, const Tensor& last, double scale, double softcap) {
  return decode("decode_quantised", q, keys, values, &key_scales, &value_scales, first, last, scale, softcap);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megalite, m) {
  m.def(
      "decode_attention(Tensor q, Tensor keys, Tensor values, Tensor first, Tensor last, float scale, float softcap) "
      "-> Tensor");
  m.def(
      "decode_quantised(Tensor q, Tensor keys, Tensor values, Tensor key_scales, Tensor value_scales, Tensor first, "
      "Tensor last, float scale, float softcap) -> Tensor");
}

TORCH_LIBRARY_IMPL(megalite, CPU, m) {
  m.impl("decode_attention", &decode_attention);
  m.impl("decode_quantised", &decode_quantised);
}
