#include "attention.h"

#include "operator.h"

namespace {

using at::Tensor;
using megalite::Attention;
using megalite::AttentionBackward;
using megalite::AttentionForward;
using megalite::check_like;
using megalite::check_shape;

Attention describe(const Tensor& qkv, int64_t heads, int64_t kv_heads, const char* op) {
  TORCH_CHECK_VALUE(
      qkv.dim() == 4, op, ": qkv has shape ", qkv.sizes(), ", but must have [batch, tokens, heads, head size]");
  TORCH_CHECK_VALUE(
      kv_heads > 0 && heads > 0 && heads % kv_heads == 0, op, ": num_heads ", heads,
      " must be a positive multiple of num_kv_heads ", kv_heads);
  TORCH_CHECK_VALUE(
      qkv.size(2) == heads + 2 * kv_heads, op, ": qkv has ", qkv.size(2), " heads, but must have ", heads, " + 2 * ",
      kv_heads);
  TORCH_CHECK_VALUE(qkv.size(3) > 0, op, ": qkv has heads of size 0");
  const auto round_up = [](int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; };
  return {
      megalite::type_of(qkv, op, "qkv"), qkv.data_ptr(), nullptr, qkv.size(0), qkv.size(1), heads, kv_heads,
      qkv.size(3), round_up(qkv.size(1), megalite::ATTENTION_KEYS), round_up(qkv.size(3), megalite::ATTENTION_SIZE)};
}

// The first token of each token's document.
Tensor starts(const Tensor& document_in, const Attention& a, const char* op) {
  const Tensor document = document_in.contiguous();
  check_shape(document, {a.batch, a.length}, op, "document");
  TORCH_CHECK_TYPE(
      document.scalar_type() == at::kLong, op, ": document is ", document.scalar_type(), ", but must be int64");
  TORCH_CHECK_VALUE(document.device().is_cpu(), op, ": document is on ", document.device(), ", but must be on cpu");
  const Tensor start = at::empty_like(document);
  const int64_t* number = document.const_data_ptr<int64_t>();
  int64_t* first = start.data_ptr<int64_t>();
  for (int64_t b = 0; b < a.batch; ++b, number += a.length, first += a.length)
    for (int64_t t = 0; t < a.length; ++t) {
      TORCH_CHECK_VALUE(
          t == 0 || number[t] >= number[t - 1], op, ": document falls from ", number[t - 1], " to ", number[t],
          " at token ", t, " of row ", b, ", but its numbers must ascend");
      first[t] = t > 0 && number[t] == number[t - 1] ? first[t - 1] : t;
    }
  return start;
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& qkv_in, int64_t heads, int64_t kv_heads, const std::optional<Tensor>& document) {
  const char* op = "attention_forward";
  const Tensor qkv = qkv_in.contiguous();
  AttentionForward a{describe(qkv, heads, kv_heads, op)};
  Tensor start;
  if (document) {
    start = starts(*document, a, op);
    a.start = start.const_data_ptr<int64_t>();
  }
  const int64_t pairs = a.batch * a.kv_heads;
  const int64_t queries = (a.length + megalite::ATTENTION_QUERIES - 1) / megalite::ATTENTION_QUERIES;
  const Tensor out = at::empty({a.batch, a.length, heads * a.size}, qkv.options());
  const Tensor lse = at::empty({a.batch, heads, a.length}, qkv.options().dtype(at::kFloat));
  const Tensor packed = at::empty({pairs, 2, a.padded_length, a.padded_size}, qkv.options());
  a.packed = packed.data_ptr();
  a.out = out.data_ptr();
  a.lse = lse.data_ptr<float>();
  at::parallel_for(0, pairs, 1, [&](int64_t begin, int64_t end) { megalite::cpu::attention_pack(a, begin, end); });
  at::parallel_for(0, a.batch * heads * queries, 1, [&](int64_t begin, int64_t end) {
    megalite::cpu::attention_forward(a, begin, end);
  });
  return {out, lse};
}

Tensor backward(
    const Tensor& grad_in, const Tensor& qkv_in, const Tensor& out_in, const Tensor& lse_in, int64_t heads,
    int64_t kv_heads, const std::optional<Tensor>& document) {
  const char* op = "attention_backward";
  const Tensor qkv = qkv_in.contiguous(), grad = grad_in.contiguous(), out = out_in.contiguous();
  const Tensor lse = lse_in.contiguous();
  AttentionBackward a{describe(qkv, heads, kv_heads, op)};
  for (const auto& [name, x] : {std::pair("grad", grad), std::pair("out", out)}) {
    check_shape(x, {a.batch, a.length, heads * a.size}, op, name);
    check_like(x, qkv, op, name);
  }
  check_shape(lse, {a.batch, heads, a.length}, op, "lse");
  TORCH_CHECK_TYPE(lse.scalar_type() == at::kFloat, op, ": lse is ", lse.scalar_type(), ", but must be float32");
  Tensor start;
  if (document) {
    start = starts(*document, a, op);
    a.start = start.const_data_ptr<int64_t>();
  }
  // One task a key/value head adds up the gradients of its keys and values by itself. Where that would leave processors
  // without work, each query head is a task. The shapes alone decide, so that the result does not depend on the number
  // of threads.
  const int64_t pairs = a.batch * a.kv_heads;
  a.parts = pairs < 16 ? heads / kv_heads : 1;
  const Tensor dqkv = at::empty_like(qkv);
  Tensor partial;
  if (a.parts > 1) partial = at::empty({pairs, a.parts, 2, a.length, a.size}, lse.options());
  a.grad = grad.data_ptr();
  a.out = out.data_ptr();
  a.lse = lse.const_data_ptr<float>();
  a.dqkv = dqkv.data_ptr();
  a.partial = partial.defined() ? partial.data_ptr<float>() : nullptr;
  at::parallel_for(0, pairs * a.parts, 1, [&](int64_t begin, int64_t end) {
    megalite::cpu::attention_backward(a, begin, end);
  });
  if (a.partial)
    at::parallel_for(
        0, pairs, 1, [&](int64_t begin, int64_t end) { megalite::cpu::attention_add_parts(a, begin, end); });
  return dqkv;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megalite, m) {
  m.def("attention_forward(Tensor qkv, int num_heads, int num_kv_heads, Tensor? document) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, int num_heads, int num_kv_heads, "
      "Tensor? document) -> Tensor dqkv");
}

// On CUDA attention goes through torch.
TORCH_LIBRARY_IMPL(megalite, CPU, m) {
  m.impl("attention_forward", &forward);
  m.impl("attention_backward", &backward);
}
