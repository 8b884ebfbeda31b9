#include "attention.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "operator.h"

namespace {

using at::Tensor;
using megalite::Attention;
using megalite::AttentionBackward;
using megalite::AttentionForward;
using megalite::check_like;
using megalite::check_shape;

// What is asked for, as the operators take it. Keys and values are those of `kv`, or else of the fused projection `q`.
struct Asked {
  const char* op;
  Tensor q, kv;  // [B, T, H (+ 2 G), K] and [B, S, 2 G, K]
  int64_t heads, kv_heads;
  Tensor document, source;  // numbers of documents, of queries and of keys: [B, T] and [B, S]
  bool causal;
  std::optional<int64_t> window;
  std::optional<double> scale;
  Tensor bias;  // [1 or B, H, T, S], fp32
};

Asked asked(
    const char* op, const Tensor& q, const std::optional<Tensor>& kv, int64_t heads, int64_t kv_heads,
    const std::optional<Tensor>& document, const std::optional<Tensor>& source, bool causal,
    std::optional<int64_t> window, std::optional<double> scale, const std::optional<Tensor>& bias) {
  const auto contiguous = [](const std::optional<Tensor>& x) { return x ? x->contiguous() : Tensor(); };
  Tensor rows = bias.value_or(Tensor());
  if (rows.defined() && rows.dim() == 4 && rows.stride(3) != 1) rows = rows.contiguous();
  return {
      op, q.contiguous(), contiguous(kv), heads, kv_heads, contiguous(document), contiguous(source), causal, window,
      scale, rows};
}

// Describes all but who attends to whom.
Attention describe(const Asked& x) {
  const char* op = x.op;
  const bool fused = !x.kv.defined();
  TORCH_CHECK_VALUE(
      x.q.dim() == 4, op, ": qkv has shape ", x.q.sizes(), ", but must have [batch, tokens, heads, head size]");
  TORCH_CHECK_VALUE(
      x.kv_heads > 0 && x.heads > 0 && x.heads % x.kv_heads == 0, op, ": num_heads ", x.heads,
      " must be a positive multiple of num_kv_heads ", x.kv_heads);
  TORCH_CHECK_VALUE(
      x.q.size(2) == x.heads + (fused ? 2 * x.kv_heads : 0), op, ": qkv has ", x.q.size(2), " heads, but must have ",
      x.heads, fused ? " + 2 * " + std::to_string(x.kv_heads) : std::string());
  TORCH_CHECK_VALUE(x.q.size(3) > 0, op, ": qkv has heads of size 0");
  const int64_t batch = x.q.size(0), length = x.q.size(1), size = x.q.size(3);
  const int64_t sources = fused || x.kv.dim() < 2 ? length : x.kv.size(1);
  if (!fused) {
    check_shape(x.kv, {batch, sources, 2 * x.kv_heads, size}, op, "kv");
    check_like(x.kv, x.q, op, "kv");
    TORCH_CHECK_VALUE(!x.causal && !x.window, op, ": attention to kv must be neither causal nor windowed");
  }
  const double scale = x.scale.value_or(1.0 / std::sqrt(static_cast<double>(size)));
  TORCH_CHECK_VALUE(scale > 0, op, ": scale is ", scale, ", but must be above 0");
  const auto type = megalite::type_of(x.q, op, "qkv");
  const auto after = [&](const Tensor& t, int64_t heads) {
    return static_cast<const char*>(t.data_ptr()) + heads * size * t.element_size();
  };
  const auto round_up = [](int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; };
  Attention a{};
  a.type = type;
  a.q = x.q.data_ptr();
  a.k = fused ? after(x.q, x.heads) : x.kv.data_ptr();
  a.v = fused ? after(x.q, x.heads + x.kv_heads) : after(x.kv, x.kv_heads);
  a.q_token = x.q.size(2) * size;
  a.k_token = fused ? a.q_token : 2 * x.kv_heads * size;
  a.scale = static_cast<float>(scale);
  a.batch = batch, a.length = length, a.sources = sources;
  a.heads = x.heads, a.kv_heads = x.kv_heads, a.size = size;
  a.padded_length = round_up(sources, megalite::ATTENTION_KEYS);
  a.padded_size = round_up(size, megalite::ATTENTION_SIZE);
  if (x.bias.defined()) {
    TORCH_CHECK_TYPE(
        x.bias.scalar_type() == at::kFloat, op, ": bias is ", x.bias.scalar_type(), ", but must be float32");
    check_shape(x.bias, {x.bias.dim() && x.bias.size(0) == 1 ? 1 : batch, x.heads, length, sources}, op, "bias");
    a.bias = x.bias.const_data_ptr<float>();
    a.bias_batch = x.bias.size(0) == 1 ? 0 : x.bias.stride(0);
    a.bias_head = x.bias.stride(1), a.bias_row = x.bias.stride(2);
  }
  return a;
}

void check_documents(const Tensor& document, int64_t batch, int64_t length, const char* op, const char* name) {
  check_shape(document, {batch, length}, op, name);
  TORCH_CHECK_TYPE(
      document.scalar_type() == at::kLong, op, ": ", name, " is ", document.scalar_type(), ", but must be int64");
  TORCH_CHECK_VALUE(document.device().is_cpu(), op, ": ", name, " is on ", document.device(), ", but must be on cpu");
  const int64_t* number = document.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < batch; ++b, number += length)
    for (int64_t t = 1; t < length; ++t)
      TORCH_CHECK_VALUE(
          number[t] >= number[t - 1], op, ": ", name, " falls from ", number[t - 1], " to ", number[t], " at token ", t,
          " of row ", b, ", but its numbers must ascend");
}

// Sets which keys each query reaches, in the tensor [2, B, T] that is returned: from where, and to where.
Tensor set_reach(const Asked& x, Attention& a) {
  const bool has_source = x.source.defined();
  if (x.document.defined()) check_documents(x.document, a.batch, a.length, x.op, "document");
  if (has_source) check_documents(x.source, a.batch, a.sources, x.op, "source");
  TORCH_CHECK_VALUE(
      has_source == (x.kv.defined() && x.document.defined()), x.op,
      ": give document and source with kv, or neither, and no source without kv");
  TORCH_CHECK_VALUE(!x.window || *x.window > 0, x.op, ": window is ", x.window.value_or(0), ", but must be above 0");
  if (x.causal && !x.window && !x.document.defined()) return {};  // what the kernel takes for granted
  const Tensor reach = at::empty({2, a.batch, a.length}, at::kLong);
  int64_t *first = reach.data_ptr<int64_t>(), *end = first + a.batch * a.length;
  a.first = first;
  if (!x.causal || x.window) a.end = end;
  const int64_t window = x.window.value_or(a.sources + a.length);
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t* number = x.document.defined() ? x.document.const_data_ptr<int64_t>() + b * a.length : nullptr;
    const int64_t* key = has_source ? x.source.const_data_ptr<int64_t>() + b * a.sources : number;
    for (int64_t t = 0, from = 0, to = number ? 0 : a.sources; t < a.length; ++t, ++first, ++end) {
      while (number && from < a.sources && key[from] < number[t]) ++from;
      while (number && to < a.sources && key[to] <= number[t]) ++to;
      *first = std::max(from, t - window + 1);
      *end = std::min(to, x.causal ? t + 1 : t + window);
    }
  }
  return reach;
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& qkv, int64_t heads, int64_t kv_heads, const std::optional<Tensor>& document,
    const std::optional<Tensor>& kv, const std::optional<Tensor>& source, bool causal, std::optional<int64_t> window,
    std::optional<double> scale, const std::optional<Tensor>& bias) {
  const Asked x =
      asked("attention_forward", qkv, kv, heads, kv_heads, document, source, causal, window, scale, bias);
  AttentionForward a{describe(x)};
  const Tensor reach = set_reach(x, a);
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

// Gradients of qkv, or of q and kv, and of the bias; what there is none of is empty.
std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_in, const Tensor& qkv, const Tensor& out_in, const Tensor& lse_in, int64_t heads,
    int64_t kv_heads, const std::optional<Tensor>& document, const std::optional<Tensor>& kv,
    const std::optional<Tensor>& source, bool causal, std::optional<int64_t> window, std::optional<double> scale,
    const std::optional<Tensor>& bias) {
  const char* op = "attention_backward";
  const Asked x = asked(op, qkv, kv, heads, kv_heads, document, source, causal, window, scale, bias);
  const Tensor grad = grad_in.contiguous(), out = out_in.contiguous(), lse = lse_in.contiguous();
  AttentionBackward a{describe(x)};
  for (const auto& [name, each] : {std::pair("grad", grad), std::pair("out", out)}) {
    check_shape(each, {a.batch, a.length, heads * a.size}, op, name);
    check_like(each, x.q, op, name);
  }
  check_shape(lse, {a.batch, heads, a.length}, op, "lse");
  TORCH_CHECK_TYPE(lse.scalar_type() == at::kFloat, op, ": lse is ", lse.scalar_type(), ", but must be float32");
  const Tensor reach = set_reach(x, a);
  // One task a key/value head adds up the gradients of its keys and values by itself. Where that would leave processors
  // without work, each query head is a task. The shapes alone decide, so that the result does not depend on the number
  // of threads.
  const int64_t pairs = a.batch * a.kv_heads;
  a.parts = pairs < 16 ? heads / kv_heads : 1;
  const Tensor dq = at::empty_like(x.q), dkv = x.kv.defined() ? at::empty_like(x.kv) : at::empty({0}, x.q.options());
  Tensor partial, dbias = at::empty({0}, lse.options());
  if (a.parts > 1) partial = at::empty({pairs, a.parts, 2, a.sources, a.size}, lse.options());
  if (x.bias.defined()) {
    dbias = at::zeros(x.bias.sizes(), lse.options());
    a.dbias = dbias.data_ptr<float>();
    a.dbias_batch = dbias.size(0) == 1 ? 0 : dbias.stride(0);
  }
  // The gradients lie as the tensors themselves do.
  char* const gradient = static_cast<char*>(x.kv.defined() ? dkv.data_ptr() : dq.data_ptr());
  const void* const beginning = x.kv.defined() ? a.k : a.q;
  const auto like = [&](const void* at) {
    return gradient + (static_cast<const char*>(at) - static_cast<const char*>(beginning));
  };
  a.grad = grad.data_ptr();
  a.out = out.data_ptr();
  a.lse = lse.const_data_ptr<float>();
  a.dq = dq.data_ptr(), a.dk = like(a.k), a.dv = like(a.v);
  a.partial = partial.defined() ? partial.data_ptr<float>() : nullptr;
  // With one gradient of the bias for all rows of the batch, one task takes them all.
  const int64_t together = a.dbias && a.dbias_batch == 0 ? a.batch : 1, items = kv_heads * a.parts * a.batch;
  at::parallel_for(0, together ? items / together : 0, 1, [&](int64_t begin, int64_t end) {
    megalite::cpu::attention_backward(a, begin * together, end * together);
  });
  if (a.partial)
    at::parallel_for(
        0, pairs, 1, [&](int64_t begin, int64_t end) { megalite::cpu::attention_add_parts(a, begin, end); });
  return {dq, dkv, dbias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(megalite, m) {
  m.def(
      "attention_forward(Tensor qkv, int num_heads, int num_kv_heads, Tensor? document, Tensor? kv=None, "
      "Tensor? source=None, bool causal=True, int? window=None, float? scale=None, Tensor? bias=None) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, int num_heads, int num_kv_heads, "
      "Tensor? document, Tensor? kv=None, Tensor? source=None, bool causal=True, int? window=None, "
      "float? scale=None, Tensor? bias=None) -> (Tensor dqkv, Tensor dkv, Tensor dbias)");
}

// On CUDA attention goes through torch.
TORCH_LIBRARY_IMPL(megalite, CPU, m) {
  m.impl("attention_forward", &forward);
  m.impl("attention_backward", &backward);
}
