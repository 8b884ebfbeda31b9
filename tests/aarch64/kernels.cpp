// Runs the CPU kernels on made-up numbers and prints every result, a line each: its name, then its numbers. Compiled for
// two processors, which must say the same (compare.py). There is no torch in here, so it takes seconds to build.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "../../csrc/ops/activation.h"
#include "../../csrc/ops/attention.h"
#include "../../csrc/ops/cpu/vec.h"
#include "../../csrc/ops/experts.h"
#include "../../csrc/ops/fp8.h"
#include "../../csrc/ops/loss.h"
#include "../../csrc/ops/norm.h"
#include "../../csrc/ops/optimizer.h"
#include "../../csrc/ops/rope.h"
#include "../../csrc/ops/weight_gradient.h"

namespace {

using namespace megalite;
using megalite::cpu::MEGALITE_ISA::bf16;
using megalite::cpu::MEGALITE_ISA::from_float;
using megalite::cpu::MEGALITE_ISA::to_float;

uint32_t seed = 1;

float random_number() {
  seed = seed * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(seed >> 8) - (1 << 23)) / static_cast<float>(1 << 22);
}

template <class T>
std::vector<T> numbers(int64_t size) {
  std::vector<T> found(size);
  for (T& each : found) each = from_float<T>(random_number());
  return found;
}

double number_of(bf16 x) { return to_float(x); }
template <class N> double number_of(N x) { return static_cast<double>(x); }

template <class T>
void say(const std::string& name, const std::vector<T>& values) {
  std::printf("%s.%s", name.c_str(), std::is_same_v<T, bf16> ? "bf16" : "fp32");
  for (const T& each : values) std::printf(" %.9g", number_of(each));
  std::printf("\n");
}

// Sizes that leave something over after whole vectors and tiles.
constexpr int64_t ROWS = 7, SIZE = 131;

template <class T>
void norms(Type type) {
  const auto x = numbers<T>(ROWS * SIZE), more = numbers<T>(ROWS * SIZE), weight = numbers<T>(SIZE), bias = numbers<T>(SIZE);
  const auto grad = numbers<T>(ROWS * SIZE);
  for (const bool centred : {false, true}) {
    const std::string name = centred ? "layer_norm" : "rms_norm";
    std::vector<T> out(ROWS * SIZE), sum(ROWS * SIZE), dx(ROWS * SIZE);
    std::vector<float> mean(ROWS), rstd(ROWS), dweight(2 * SIZE), dbias(2 * SIZE);
    cpu::norm_forward({type, x.data(), centred ? nullptr : more.data(), weight.data(), centred ? bias.data() : nullptr, out.data(),
                       centred ? nullptr : sum.data(), centred ? mean.data() : nullptr, rstd.data(), ROWS, SIZE, 1e-5f, 0.0f}, 0, ROWS);
    say(name, out);
    cpu::norm_backward({type, grad.data(), nullptr, centred ? x.data() : sum.data(), weight.data(), centred ? mean.data() : nullptr,
                        rstd.data(), dx.data(), dweight.data(), centred ? dbias.data() : nullptr, ROWS, SIZE, 2, 0.0f}, 0, 2);
    say(name + "_dx", dx);
    say(name + "_dweight", dweight);
  }
}

template <class T>
void activations(Type type) {
  const auto gate_up = numbers<T>(ROWS * 2 * SIZE), grad = numbers<T>(ROWS * SIZE), bias = numbers<T>(SIZE);
  std::vector<T> out(ROWS * SIZE), d_gate_up(ROWS * 2 * SIZE), dx(ROWS * SIZE);
  std::vector<float> dbias(2 * SIZE);
  cpu::swiglu_forward({type, gate_up.data(), out.data(), ROWS, SIZE}, 0, ROWS);
  say("swiglu", out);
  cpu::swiglu_backward({type, grad.data(), gate_up.data(), d_gate_up.data(), ROWS, SIZE}, 0, ROWS);
  say("swiglu_dx", d_gate_up);
  cpu::gelu_forward({type, gate_up.data(), bias.data(), out.data(), ROWS, SIZE}, 0, ROWS);
  say("gelu", out);
  cpu::gelu_backward({type, grad.data(), gate_up.data(), bias.data(), dx.data(), dbias.data(), ROWS, SIZE, 2}, 0, 2);
  say("gelu_dx", dx);
  say("gelu_dbias", dbias);
}

template <class T>
void rotations(Type type) {
  constexpr int64_t tokens = 6, heads = 5, size = 18;
  auto qkv = numbers<T>(tokens * heads * size);
  qkv.resize(qkv.size() + 4096);  // the kernel asks for lines ahead
  const auto cos = numbers<float>(tokens / 2 * size / 2), sin = numbers<float>(tokens / 2 * size / 2);
  cpu::rope({type, qkv.data(), cos.data(), sin.data(), tokens, heads, size, 4, size / 2, tokens / 2, 1.0f}, 0, tokens);
  say("rope", qkv);
}

template <class T>
void losses(Type type) {
  auto logits = numbers<T>(ROWS * SIZE);
  const std::vector<int64_t> labels{3, 0, 99, 128, -100, 500, 64};
  std::vector<float> lse(ROWS), target(ROWS);
  const auto grad = numbers<float>(ROWS);
  cpu::cross_entropy_forward({type, logits.data(), labels.data(), lse.data(), target.data(), ROWS, SIZE, 0, SIZE - 2}, 0, ROWS);
  say("lse", lse);
  cpu::cross_entropy_backward({type, logits.data(), labels.data(), lse.data(), grad.data(), ROWS, SIZE, 0, SIZE - 2}, 0, ROWS);
  say("d_logits", logits);
}

template <class T>
void attention(Type type) {
  constexpr int64_t B = 1, T_ = 101, H = 4, G = 2, K = 24;
  const auto qkv = numbers<T>(B * T_ * (H + 2 * G) * K), grad = numbers<T>(B * T_ * H * K);
  std::vector<int64_t> start(T_);
  for (int64_t t = 0; t < T_; ++t) start[t] = t < 37 ? 0 : 37;
  std::vector<T> packed(B * G * 2 * 128 * 32), out(B * T_ * H * K), dqkv(qkv.size());
  std::vector<float> lse(B * H * T_), partial(B * G * 2 * 2 * T_ * K);
  constexpr int64_t token = (H + 2 * G) * K, k = H * K, v = k + G * K;  // queries, keys and values of a token
  Attention a{};
  a.type = type, a.q = qkv.data(), a.k = qkv.data() + k, a.v = qkv.data() + v, a.q_token = a.k_token = token;
  a.first = start.data(), a.scale = 1.0f / std::sqrt(static_cast<float>(K));
  a.batch = B, a.length = a.sources = T_, a.heads = H, a.kv_heads = G, a.size = K;
  a.padded_length = 128, a.padded_size = 32;
  AttentionForward forward{a};
  forward.packed = packed.data(), forward.out = out.data(), forward.lse = lse.data();
  cpu::attention_pack(forward, 0, B * G);
  cpu::attention_forward(forward, 0, B * H * 2);
  say("attention", out);
  AttentionBackward backward{a};
  backward.grad = grad.data(), backward.out = out.data(), backward.lse = lse.data();
  backward.dq = dqkv.data(), backward.dk = dqkv.data() + k, backward.dv = dqkv.data() + v;
  backward.partial = partial.data(), backward.parts = 2;
  cpu::attention_backward(backward, 0, B * G * 2);
  cpu::attention_add_parts(backward, 0, B * G);
  say("attention_dqkv", dqkv);
}

template <class T>
void weight_gradients(Type type) {
  constexpr int64_t tokens = 26, rows = 19, columns = 41;
  const auto x = numbers<T>(tokens * columns), grad = numbers<T>(tokens * rows);
  TileShape tile{};
  cpu::tile_shape(type, tile);
  const int64_t panels = (columns + tile.columns - 1) / tile.columns;
  std::vector<T> packed(panels * tokens * tile.columns);
  auto into = numbers<float>(rows * columns);
  cpu::pack_panels({type, x.data(), columns, tokens, columns, packed.data()}, 0, panels);
  cpu::weight_gradient({type, grad.data(), packed.data(), into.data(), rows, tokens, rows, columns, 4 * tile.rows, true}, 0, 1);
  say("weight_gradient", into);
}

template <class T>
void experts(Type type) {
  constexpr int64_t tokens = 9, count = 6, slots = 2, visits = tokens * slots;
  const auto scores = numbers<float>(tokens * count), weight = numbers<float>(visits);
  const auto x = numbers<T>(tokens * SIZE);
  std::vector<int64_t> index(visits), counts(count), token(visits), row(visits);
  std::vector<T> rows(visits * SIZE), out(tokens * SIZE);
  cpu::top_k({scores.data(), index.data(), tokens, count, slots}, 0, tokens);
  cpu::count_rows({index.data(), counts.data(), visits, count});
  cpu::sort_by_expert({index.data(), counts.data(), token.data(), row.data(), visits, slots, count});
  cpu::gather_rows({type, x.data(), token.data(), rows.data(), visits, SIZE}, 0, visits);
  cpu::sum_rows({type, rows.data(), row.data(), weight.data(), out.data(), tokens, slots, SIZE}, 0, tokens);
  say("row_of_visit", std::vector<float>(row.begin(), row.end()));
  say("sum_rows", out);
}

template <class T>
void rounding(Type type) {
  const auto x = numbers<T>(ROWS * SIZE);
  for (const int mantissa : {3, 2}) {
    std::vector<T> out(ROWS * SIZE);
    cpu::round_to_fp8({type, x.data(), ROWS, SIZE, 4, 32, mantissa, out.data(), nullptr, nullptr, false}, 0, 2);
    say("fp8", out);
  }
}

void optimizers() {
  constexpr int64_t size = 1003;
  auto master = numbers<float>(size), mean = numbers<float>(size), square = numbers<float>(size);
  const auto grad = numbers<float>(size);
  for (float& each : square) each *= each;
  std::vector<bf16> weights(size);
  const float factors[] = {2.0f, 0.19f, 0.0975f};
  cpu::adamw({master.data(), mean.data(), square.data(), weights.data(), grad.data(), factors, size, 1e-3f, 0.1f, 0.95f, 0.05f,
              1e-2f, 1e-8f}, 0, 1);
  say("adamw", master);
  say("adamw", weights);
  std::vector<double> parts(1);
  cpu::sum_of_squares({grad.data(), size, parts.data()}, 0, 1);
  say("sum_of_squares", parts);
}

template <class T>
void all(Type type) {
  norms<T>(type);
  activations<T>(type);
  rotations<T>(type);
  losses<T>(type);
  attention<T>(type);
  weight_gradients<T>(type);
  experts<T>(type);
  rounding<T>(type);
}

}  // namespace

int main() {
  all<float>(Type::f32);
  all<bf16>(Type::bf16);
  optimizers();
}
