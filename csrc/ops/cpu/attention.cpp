// Attention by tiles, softmax and all (Dao et al. 2022): scores exist for a few queries and keys at a time, and the
// backward pass computes them again. Every product is of a strip of rows of a result at once, by vectors or on AMX: rows
// are queries or keys, and no strip straddles a block. With bf16, probabilities and the gradients of scores are rounded to
// it for the products that follow; all sums are fp32.
#include "../attention.h"

#include <cmath>
#include <type_traits>

#include "amx.h"
#include "tile.h"

namespace megalite::cpu::MEGALITE_ISA {

namespace {

constexpr int64_t QUERIES = ATTENTION_QUERIES;
// Keys that a strip of queries meets at once. Forward: few, so that they stay near. Backward: more, because
// the sums over them are read and written once a block.
constexpr int64_t FORWARD_KEYS = 128, BACKWARD_KEYS = 192;
static_assert(QUERIES % TILE_ROWS == 0 && BACKWARD_KEYS % TILE_ROWS == 0 && TILE_ROWS % 2 == 0);
static_assert(FORWARD_KEYS % TILE_COLUMNS == 0 && BACKWARD_KEYS % TILE_COLUMNS == 0);
static_assert(ATTENTION_KEYS % TILE_COLUMNS == 0 && ATTENTION_SIZE % WIDTH == 0);

constexpr float LOG2E = 1.44269504f;
constexpr float LOWEST = -1e38f;  // below every score, yet its product with log2(e) is finite

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_down(int64_t x, int64_t multiple) { return x / multiple * multiple; }

// 2^x to 2e-7 for x < 1; 0 below -126. A polynomial for the fraction in [0, 1], exact at both of its ends.
inline vec exp2(vec x) {
#ifdef __AVX512F__
  const vec r = (vec)_mm512_reduce_ps((__m512)x, 1);  // x - floor(x)
#else
  constexpr float shift = 12582912.0f + 127.0f;  // 1.5 * 2^23: the sum's low bits are the rounded integer
  const vec clamped = x < -126.0f ? vec{} - 126.0f : x;
  const vec shifted = (clamped - 0.5f) + shift;
  const vec r = clamped - (shifted - shift);
#endif
  vec p = r * 1.8793186e-3f + 8.9909956e-3f;
  p = p * r + 5.5818677e-2f;
  p = p * r + 2.4015927e-1f;
  p = p * r + 6.9315171e-1f;
  p = p * r + 1.0f;
#ifdef __AVX512F__
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  return x < -126.0f ? vec{} : p * (vec)((bits)shifted << 23);
#endif
}

inline float largest(vec x) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)x);
#else
  float value = x[0];
  for (int i = 1; i < WIDTH; ++i) value = x[i] > value ? x[i] : value;
  return value;
#endif
}

inline float total(vec x) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)x);
#else
  float value = x[0];
  for (int i = 1; i < WIDTH; ++i) value += x[i];
  return value;
#endif
}

// Rounded to bf16, in the upper half of each element; NaN stays NaN.
inline bits rounded(vec x) {
  const bits raw = (bits)x, up = raw + 0x7fffu + ((raw >> 16) & 1u);
  return x == x ? up : raw | 0x400000u;
}

typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));

inline vec load_row(const float* from) { return load_vector<vec>(from); }
inline vec load_row(const bf16* from) {
  return (vec)(__builtin_convertvector(load_vector<halves>(from), bits) << 16);
}

inline void store_row(float* to, vec x) { store_vector(to, x); }
inline void store_row(bf16* to, vec x) {
#ifdef __AVX512BF16__
  store_vector(to, _mm512_cvtneps_pbh((__m512)x));
#else
  store_vector(to, __builtin_convertvector(rounded(x) >> 16, halves));
#endif
}

template <class T>
void write_row(T* to, const float* from, int64_t size, float factor) {
  int64_t i = 0;
  for (; i + WIDTH <= size; i += WIDTH) store_row(to + i, load_vector<vec>(from + i) * factor);
  for (; i < size; ++i) to[i] = from_float<T>(from[i] * factor);
}

template <class T>
float dot(const T* x, const T* y, int64_t size) {
  vec sum{};
  int64_t i = 0;
  for (; i + WIDTH <= size; i += WIDTH) sum += load_row(x + i) * load_row(y + i);
  float value = total(sum);
  for (; i < size; ++i) value += to_float(x[i]) * to_float(y[i]);
  return value;
}

// Two rows as steps of a product's depth: bf16 in pairs, fp32 one after the other, `row` elements apart.
inline void store_steps(float* to, int64_t row, vec even, vec odd) {
  store_vector(to, even);
  store_vector(to + row, odd);
}
inline void store_steps(bf16* to, int64_t, vec even, vec odd) {
#ifdef __AVX512BF16__
  const __m512i order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
      16, 0);
  store_vector(to, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even)));
#else
  store_vector(to, rounded(even) >> 16 | (rounded(odd) & 0xffff0000u));
#endif
}

// Rows one after the other, each filled up with zeros to `padded` elements: operand a with rows along the tile's rows.
template <class T>
void copy_rows(const T* from, int64_t from_row, int64_t rows, int64_t size, T* to, int64_t padded) {
  for (int64_t r = 0; r < rows; ++r, from += from_row, to += padded) {
    std::memcpy(to, from, size * sizeof(T));
    for (int64_t i = size; i < padded; ++i) to[i] = T{};
  }
}

// Rows as steps of the depth, columns next to each other: [rows / STEP, padded, STEP].
template <class T>
void pack_rows(const T* from, int64_t from_row, int64_t rows, int64_t size, T* to, int64_t padded) {
  for (int64_t r = 0; r < rows; r += STEP<T>, from += STEP<T> * from_row, to += STEP<T> * padded) {
    if constexpr (STEP<T> == 1) {
      std::memcpy(to, from, size * sizeof(T));
    } else if (r + 1 < rows) {
      const T *even = from, *odd = from + from_row;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        const uint32_t pair = even[i].bits | static_cast<uint32_t>(odd[i].bits) << 16;
        std::memcpy(to + 2 * i, &pair, 4);
      }
    } else {
      for (int64_t i = 0; i < size; ++i) to[2 * i] = from[i], to[2 * i + 1] = T{};
    }
    for (int64_t i = STEP<T> * size; i < STEP<T> * padded; ++i) to[i] = T{};
  }
}

// A square of WIDTH vectors, its rows made its columns: blocks of half the size change places, then within them.
inline void transpose(bits (&square)[WIDTH]) {
  bits lanes;
  for (int i = 0; i < WIDTH; ++i) lanes[i] = i;
#pragma GCC unroll 4
  for (int half = WIDTH / 2; half > 0; half /= 2) {
    const bits left = lanes + ((lanes & half) != 0 & (WIDTH - half)), right = left + half;
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; ++i)
      if (!(i & half)) {
        const bits upper = square[i], lower = square[i + half];
        square[i] = __builtin_shuffle(upper, lower, left);
        square[i + half] = __builtin_shuffle(upper, lower, right);
      }
  }
}

// Rows as columns, in panels of as many as a tile is wide: [rows / TILE_COLUMNS, steps, TILE_COLUMNS, STEP].
template <class T>
void pack_columns(const T* from, int64_t from_row, int64_t rows, int64_t size, T* to) {
  const int64_t steps = (size + STEP<T> - 1) / STEP<T>, to_step = TILE_COLUMNS * STEP<T>;
  for (int64_t column = 0; column < round_up(rows, TILE_COLUMNS); column += WIDTH) {
    T* at = to + column / TILE_COLUMNS * steps * to_step + column % TILE_COLUMNS * STEP<T>;
    int64_t step = 0;
    if (column + WIDTH <= rows)
      for (; (step + WIDTH) * STEP<T> <= size; step += WIDTH) {
        bits square[WIDTH];
        for (int i = 0; i < WIDTH; ++i) square[i] = load_vector<bits>(from + (column + i) * from_row + step * STEP<T>);
        transpose(square);
        for (int i = 0; i < WIDTH; ++i) store_vector(at + (step + i) * to_step, square[i]);
      }
    for (; step < steps; ++step)
      for (int64_t i = 0; i < WIDTH * STEP<T>; ++i) {
        const int64_t row = column + i / STEP<T>, element = step * STEP<T> + i % STEP<T>;
        at[step * to_step + i] = row < rows && element < size ? from[row * from_row + element] : T{};
      }
  }
}

template <int C, class T>
void multiply_columns(
    int64_t steps, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step, float* c, int64_t c_row,
    const float* keep) {
  if constexpr (C <= TILE_VECTORS) {
    // Unrolled early, or else the sums would go through memory on their way in and out.
    vec acc[TILE_ROWS][C];
#pragma GCC unroll 6
    for (int r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < C; ++v) acc[r][v] = vec{};
    tile(steps, a, a_row, a_step, b, b_step, acc);
#pragma GCC unroll 6
    for (int r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < C; ++v) {
        float* to = c + r * c_row + v * WIDTH;
        store_vector(to, keep ? load_vector<vec>(to) * keep[r] + acc[r][v] : acc[r][v]);
      }
  }
}

// ByVectors::multiply.
template <class T>
void multiply_strip(
    int64_t steps, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step, int64_t vectors, float* c,
    int64_t c_row, const float* keep) {
  for (int64_t v = 0, count; v < vectors; v += count) {
    const int64_t rest = vectors - v;
    count = rest <= TILE_VECTORS ? rest : (rest < 2 * TILE_VECTORS ? (rest + 1) / 2 : TILE_VECTORS);
    const T* columns = b + v * WIDTH * STEP<T>;
    float* to = c + v * WIDTH;
    switch (count) {
      case 1: multiply_columns<1>(steps, a, a_row, a_step, columns, b_step, to, c_row, keep); break;
      case 2: multiply_columns<2>(steps, a, a_row, a_step, columns, b_step, to, c_row, keep); break;
      case 3: multiply_columns<3>(steps, a, a_row, a_step, columns, b_step, to, c_row, keep); break;
      default: multiply_columns<4>(steps, a, a_row, a_step, columns, b_step, to, c_row, keep);
    }
  }
}

// How a strip is multiplied: by vectors, six rows at a time, which are what a tile holds.
template <class T>
struct ByVectors {
  typedef T Number;
  static constexpr int64_t ROWS = TILE_ROWS;
  // Strips that go together from one product to the next step: while the first waits for a result, others have work.
  static constexpr int64_t GROUP = 4 * ROWS;
  static constexpr int64_t SPAN = WIDTH;  // what the keys of a strip are rounded to
  static constexpr int64_t FILLED = ROWS;  // what the queries of a block are filled up to
  static constexpr bool IS_WHOLE = false;  // whether products read all that is in a span, and not up to its last key
  static constexpr bool TURNED = false;    // whether gradients of keys are summed as columns
  static constexpr float ADD[ROWS] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};  // c += a b

  // c = keep c + a b for ROWS rows and `vectors` vectors of columns. `keep` has a factor a row; null: c is not read.
  static void multiply(
      int64_t steps, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step, int64_t vectors, float* c,
      int64_t c_row, const float* keep) {
    multiply_strip<T>(steps, a, a_row, a_step, b, b_step, vectors, c, c_row, keep);
  }
};

#ifdef MEGALITE_AMX

// The same on AMX's tiles, sixteen rows at a time; the head size is a multiple of AMX_DEPTH.
struct ByTiles {
  typedef bf16 Number;
  static constexpr int64_t ROWS = AMX_ROWS, GROUP = 2 * ROWS, SPAN = AMX_DEPTH, FILLED = AMX_DEPTH;
  static constexpr bool IS_WHOLE = true, TURNED = true;
  static constexpr float ADD[ROWS] = {};

  MEGALITE_AMX ByTiles() { amx_configure(2 * AMX_ROWS); }
  MEGALITE_AMX ~ByTiles() { _tile_release(); }

  static void multiply(
      int64_t steps, const bf16* a, int64_t a_row, int64_t, const bf16* b, int64_t b_step, int64_t vectors, float* c,
      int64_t c_row, const float* keep) {
    if (keep && keep != ADD)
      for (int64_t r = 0; r < ROWS; ++r)
        for (int64_t v = 0; v < vectors; ++v) {
          float* at = c + r * c_row + v * WIDTH;
          store_vector(at, load_vector<vec>(at) * keep[r]);
        }
    for (; vectors > 0; vectors -= 4, b += 4 * WIDTH * STEP<bf16>, c += 4 * WIDTH) {
      switch (smaller(vectors, 4)) {
        case 1: multiply_tiles<1>(steps, a, a_row, b, b_step, c, c_row, keep); break;
        case 2: multiply_tiles<2>(steps, a, a_row, b, b_step, c, c_row, keep); break;
        case 3: multiply_tiles<3>(steps, a, a_row, b, b_step, c, c_row, keep); break;
        default: multiply_tiles<4>(steps, a, a_row, b, b_step, c, c_row, keep);
      }
    }
  }

 private:
  template <int C>
  static void multiply_tiles(
      int64_t steps, const bf16* a, int64_t a_row, const bf16* b, int64_t b_step, float* c, int64_t c_row,
      bool is_added) {
    const int64_t c_bytes = c_row * sizeof(float), a_bytes = a_row * sizeof(bf16), b_bytes = b_step * sizeof(bf16);
    constexpr int64_t NEXT = AMX_COLUMNS * STEP<bf16>;
    asm volatile("" ::: "memory");  // as in amx_sums
    if (is_added) {
      _tile_loadd(0, c, c_bytes);
      if constexpr (C > 1) _tile_loadd(1, c + AMX_COLUMNS, c_bytes);
      if constexpr (C > 2) _tile_loadd(2, c + 2 * AMX_COLUMNS, c_bytes);
      if constexpr (C > 3) _tile_loadd(3, c + 3 * AMX_COLUMNS, c_bytes);
    } else {
      _tile_zero(0);
      if constexpr (C > 1) _tile_zero(1);
      if constexpr (C > 2) _tile_zero(2);
      if constexpr (C > 3) _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; step += AMX_DEPTH / STEP<bf16>) {
      const bf16* columns = b + step * b_step;
      _tile_loadd(4, a + step * STEP<bf16>, a_bytes);
      _tile_loadd(5, columns, b_bytes);
      _tile_dpbf16ps(0, 4, 5);
      if constexpr (C > 1) {
        _tile_loadd(6, columns + NEXT, b_bytes);
        _tile_dpbf16ps(1, 4, 6);
      }
      if constexpr (C > 2) {
        _tile_loadd(7, columns + 2 * NEXT, b_bytes);
        _tile_dpbf16ps(2, 4, 7);
      }
      if constexpr (C > 3) {
        _tile_loadd(5, columns + 3 * NEXT, b_bytes);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
    _tile_stored(0, c, c_bytes);
    if constexpr (C > 1) _tile_stored(1, c + AMX_COLUMNS, c_bytes);
    if constexpr (C > 2) _tile_stored(2, c + 2 * AMX_COLUMNS, c_bytes);
    if constexpr (C > 3) _tile_stored(3, c + 3 * AMX_COLUMNS, c_bytes);
  }
};
static_assert(QUERIES % ByTiles::FILLED == 0 && FORWARD_KEYS % AMX_DEPTH == 0 && BACKWARD_KEYS % AMX_DEPTH == 0);
static_assert(ATTENTION_KEYS % AMX_DEPTH == 0);

#endif

// Sizes and strides of one call, in elements.
template <class T>
struct Layout {
  explicit Layout(const Attention& a)
      : padded(a.padded_size),
        length(a.padded_length),
        steps((a.size + STEP<T> - 1) / STEP<T>),
        vectors((a.size + WIDTH - 1) / WIDTH),
        group(a.heads / a.kv_heads) {}
  const int64_t padded, length;  // of packed heads
  const int64_t steps;           // of the depth of products over the head size
  const int64_t vectors;         // of a head
  const int64_t group;           // query heads of a key/value head
};

// Keys of a block: [first, end) are those that a strip of queries reaches. `first` is rounded down to what a product takes
// at once, and `last` is `end` rounded up. Empty where first >= last.
struct Span { int64_t first, end, last; };

// Who attends to whom, in one row of the batch. Queries beyond the last one, which fill up a strip, are as the last.
struct Reach {
  Reach(const Attention& a, int64_t b)
      : firsts(a.first ? a.first + b * a.length : nullptr), ends(a.end ? a.end + b * a.length : nullptr),
        length(a.length) {}
  const int64_t *firsts, *ends;
  int64_t length;
  int64_t first(int64_t query) const { return firsts ? firsts[smaller(query, length - 1)] : 0; }
  int64_t end(int64_t query) const {
    const int64_t last = smaller(query, length - 1);
    return ends ? ends[last] : last + 1;
  }
  // Of the strip that begins with `query`, in the `keys` keys from `begin` on.
  template <class S>
  Span span(int64_t query, int64_t begin, int64_t keys) const {
    const int64_t from = larger(round_down(first(query), S::SPAN) - begin, 0);
    const int64_t to = larger(smaller(end(query + S::ROWS - 1) - begin, keys), 0);
    return {smaller(from, keys), to, round_up(to, S::SPAN)};
  }
};

// Scores of keys that a strip of queries, the first of them `query`, does not reach become -infinity. `scores` are of
// keys [begin, end).
template <class S>
inline void hide(const Reach& reach, int64_t query, float* scores, int64_t row, int64_t begin, int64_t end) {
  if (reach.first(query + S::ROWS - 1) <= begin && reach.end(query) >= end) return;
  for (int r = 0; r < S::ROWS; ++r, scores += row) {
    const int64_t first = reach.first(query + r), last = reach.end(query + r);
    for (int64_t key = begin; key < end && key < first; ++key) scores[key - begin] = -INFINITY;
    for (int64_t key = end; key-- > begin && key >= last;) scores[key - begin] = -INFINITY;
  }
}

// The biases of one head. Scores are scaled later, so that what is added to them is divided by the scale.
struct Bias {
  Bias(const Attention& a, int64_t b, int64_t h)
      : from(a.bias ? a.bias + b * a.bias_batch + h * a.bias_head : nullptr), row(a.bias_row), length(a.length),
        sources(a.sources), factor(1.0f / a.scale) {}
  const float* from;
  int64_t row, length, sources;
  float factor;
  // To the scores of a strip of queries, the first of them `query`, and keys [begin, end).
  template <class S>
  void add(int64_t query, float* scores, int64_t scores_row, int64_t begin, int64_t end) const {
    if (!from) return;
    for (int64_t r = 0; r < S::ROWS && query + r < length; ++r, scores += scores_row) {
      const float* bias = from + (query + r) * row + begin;
      const int64_t count = smaller(end, sources) - begin;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) scores[i] += bias[i] * factor;
    }
  }
};

// Zeros for the keys that fill up the last block of what `pack_rows` made: products on tiles read them.
template <class T>
void fill_up(T* packed, const Layout<T>& at, int64_t keys) {
  std::fill(packed + round_up(keys, STEP<T>) * at.padded, packed + at.length * at.padded, T{});
}

// Steps of the depth of a product over the keys of a span.
template <class S>
int64_t steps_of(const Span& span) {
  constexpr int64_t step = STEP<typename S::Number>;
  return ((S::IS_WHOLE ? span.last : span.end) - span.first + step - 1) / step;
}

template <class T>
void pack(const AttentionForward& a, int64_t begin, int64_t end) {
  const Layout<T> at(a);
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t b = pair / a.kv_heads, g = pair % a.kv_heads;
    const int64_t from = b * a.sources * a.k_token + g * a.size;
    T* packed = static_cast<T*>(a.packed) + pair * 2 * at.length * at.padded;
    pack_columns(static_cast<const T*>(a.k) + from, a.k_token, a.sources, a.size, packed);
    pack_rows(
        static_cast<const T*>(a.v) + from, a.k_token, a.sources, a.size, packed + at.length * at.padded, at.padded);
    fill_up(packed + at.length * at.padded, at, a.sources);
  }
}

// One strip's softmax over scores[begin..end), which lie in rows of FORWARD_KEYS: their e^(score - largest) go to
// `probabilities`, and `largest`, `sum` take them in. `keep` gets the factors of what was summed up before.
template <class S>
inline void take_in(
    const float* scores, int64_t begin, int64_t end, float scale, float* top, vec* sum,
    typename S::Number* probabilities, float* keep) {
  for (int r = 0; r < S::ROWS; ++r) {
    const float* row = scores + r * FORWARD_KEYS;
    vec high = load_vector<vec>(row + begin);
    for (int64_t i = begin + WIDTH; i < end; i += WIDTH) {
      const vec x = load_vector<vec>(row + i);
      high = x > high ? x : high;
    }
    const float highest = largest(high), before = top[r];
    top[r] = highest > before ? highest : before;
    keep[r] = exp2(vec{} + (before - top[r]) * scale)[0];
  }
  for (int r = 0; r < S::ROWS; ++r) {
    const float* row = scores + r * FORWARD_KEYS;
    const float offset = top[r] * scale;
    vec added = sum[r] * keep[r];
    for (int64_t i = begin; i < end; i += WIDTH) {
      const vec p = exp2(load_vector<vec>(row + i) * scale - offset);
      added += p;
      store_row(probabilities + r * FORWARD_KEYS + i, p);
    }
    sum[r] = added;
  }
}

template <class S>
void forward(const AttentionForward& a, int64_t begin, int64_t end) {
  typedef typename S::Number T;
  [[maybe_unused]] const S strips{};
  const Layout<T> at(a);
  const int64_t blocks = (a.length + QUERIES - 1) / QUERIES, panel = at.steps * TILE_COLUMNS * STEP<T>;
  const float scale = a.scale * LOG2E;
  const Buffer<T> q(QUERIES * at.padded), probabilities(S::GROUP * FORWARD_KEYS);
  const Buffer<float> out(QUERIES * at.padded), top(QUERIES), scores(S::GROUP * FORWARD_KEYS), keep(S::GROUP);
  const Buffer<vec> sum(QUERIES);

  for (int64_t item = begin; item < end; ++item) {
    // Early and late blocks take turns, so that any run of items is as much work as any other.
    const int64_t turn = item % blocks, block = turn % 2 ? blocks - 1 - turn / 2 : turn / 2;
    const int64_t h = item / blocks % a.heads, b = item / blocks / a.heads, g = h / at.group;
    const Reach reach(a, b);
    const Bias bias(a, b, h);
    const int64_t q0 = block * QUERIES, rows = smaller(QUERIES, a.length - q0), padded_rows = round_up(rows, S::FILLED);
    const T* from = static_cast<const T*>(a.q) + (b * a.length + q0) * a.q_token + h * a.size;
    const T* k = static_cast<const T*>(a.packed) + (b * a.kv_heads + g) * 2 * at.length * at.padded;
    const T* v = k + at.length * at.padded;
    copy_rows<T>(from, a.q_token, rows, a.size, q, at.padded);
    for (int64_t i = rows * at.padded; i < padded_rows * at.padded; ++i) q[i] = T{};
    for (int64_t r = 0; r < padded_rows; ++r) top[r] = LOWEST, sum[r] = vec{};

    const int64_t k_end = reach.end(q0 + rows - 1);
    for (int64_t k0 = round_down(reach.first(q0), FORWARD_KEYS); k0 < k_end; k0 += FORWARD_KEYS) {
      for (int64_t g0 = 0; g0 < padded_rows; g0 += S::GROUP) {
        const int64_t g1 = smaller(g0 + S::GROUP, padded_rows);
        for (int64_t r0 = g0; r0 < g1; r0 += S::ROWS) {
          const Span span = reach.span<S>(q0 + r0, k0, FORWARD_KEYS);
          for (int64_t c = round_down(span.first, TILE_COLUMNS); c < span.last; c += TILE_COLUMNS) {
            const int64_t from_column = larger(span.first, c), to_column = smaller(span.last, c + TILE_COLUMNS);
            S::multiply(
                at.steps, q + r0 * at.padded, at.padded, STEP<T>,
                k + (k0 + c) / TILE_COLUMNS * panel + (from_column - c) * STEP<T>, TILE_COLUMNS * STEP<T>,
                (to_column - from_column) / WIDTH, scores + (r0 - g0) * FORWARD_KEYS + from_column, FORWARD_KEYS,
                nullptr);
          }
        }
        for (int64_t r0 = g0; r0 < g1; r0 += S::ROWS) {
          const Span span = reach.span<S>(q0 + r0, k0, FORWARD_KEYS);
          if (span.first >= span.last) continue;
          const int64_t place = (r0 - g0) * FORWARD_KEYS;
          bias.add<S>(q0 + r0, scores + place + span.first, FORWARD_KEYS, k0 + span.first, k0 + span.last);
          hide<S>(reach, q0 + r0, scores + place + span.first, FORWARD_KEYS, k0 + span.first, k0 + span.last);
          take_in<S>(
              scores + place, span.first, span.last, scale, top + r0, sum + r0, probabilities + place, keep + r0 - g0);
        }
        for (int64_t r0 = g0; r0 < g1; r0 += S::ROWS) {
          const Span span = reach.span<S>(q0 + r0, k0, FORWARD_KEYS);
          if (span.first >= span.last) continue;
          S::multiply(
              steps_of<S>(span), probabilities + (r0 - g0) * FORWARD_KEYS + span.first,
              FORWARD_KEYS, STEP<T>, v + (k0 + span.first) * at.padded, at.padded * STEP<T>, at.vectors,
              out + r0 * at.padded, at.padded, k0 <= reach.first(q0 + r0) ? nullptr : keep + (r0 - g0));
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float weight = total(sum[r]);
      const bool is_empty = reach.first(q0 + r) >= reach.end(q0 + r);
      a.lse[(b * a.heads + h) * a.length + q0 + r] = is_empty ? 0.0f : top[r] * a.scale + std::log(weight);
      T* to = static_cast<T*>(a.out) + ((b * a.length + q0 + r) * a.heads + h) * a.size;
      if (is_empty)
        for (int64_t i = 0; i < a.size; ++i) to[i] = T{};
      else
        write_row(to, out + r * at.padded, a.size, 1.0f / weight);
    }
  }
}

// A block of queries of one head, as the products of the backward pass read it, and its gradient.
template <class S>
struct Queries {
  typedef typename S::Number T;
  explicit Queries(const Layout<T>& at)
      : q(QUERIES * at.padded), grad(QUERIES * at.padded), q_steps(QUERIES * at.padded),
        grad_steps(QUERIES * at.padded), q_columns(S::TURNED ? QUERIES * at.padded : 0),
        grad_columns(S::TURNED ? QUERIES * at.padded : 0), lse(QUERIES), delta(QUERIES), dq(QUERIES * at.padded) {}
  const Buffer<T> q, grad, q_steps, grad_steps;
  const Buffer<T> q_columns, grad_columns;  // [padded_size, QUERIES]
  const Buffer<float> lse, delta;  // log2 of the sum of e^score; grad . out
  const Buffer<float> dq;
};

// Keys and values of one head, the same, and the sums of their gradients so far.
template <class S>
struct Keys {
  typedef typename S::Number T;
  explicit Keys(const Layout<T>& at)
      : k_columns(at.length * at.padded), v_columns(at.length * at.padded), k_steps(at.length * at.padded),
        dk(round_up(at.length, S::ROWS) * at.padded), dv(round_up(at.length, S::ROWS) * at.padded) {}
  const Buffer<T> k_columns, v_columns, k_steps;
  const Buffer<float> dk, dv;  // [length, padded_size], or turned
};

// Scores of a block of queries and a block of keys, in rows of BACKWARD_KEYS: probabilities and gradients.
template <class S>
struct Scores {
  typedef typename S::Number T;
  Scores()
      : p(QUERIES * BACKWARD_KEYS), ds(QUERIES * BACKWARD_KEYS),
        ds_rows_of_bf16(STEP<T> == 1 ? 0 : QUERIES * BACKWARD_KEYS), raw(S::GROUP * TILE_COLUMNS),
        dp(S::GROUP * TILE_COLUMNS) {}
  const Buffer<T> p, ds;             // queries as steps of the depth
  const Buffer<T> ds_rows_of_bf16;   // the same as ds, with keys as steps of the depth; fp32 reads ds itself
  const Buffer<float> raw, dp;       // what the first two are made of, for a few strips
  T* ds_rows() const { return STEP<T> == 1 ? ds : ds_rows_of_bf16; }
};

// Pairs [steps, columns] as [columns, steps], whose rows lie `to_row` numbers apart; both are multiples of WIDTH.
inline void turn_pairs(const bf16* from, int64_t steps, int64_t columns, bf16* to, int64_t to_row) {
  for (int64_t step = 0; step < steps; step += WIDTH)
    for (int64_t column = 0; column < columns; column += WIDTH) {
      bits square[WIDTH];
      for (int i = 0; i < WIDTH; ++i) square[i] = load_vector<bits>(from + ((step + i) * columns + column) * 2);
      transpose(square);
      for (int i = 0; i < WIDTH; ++i) store_vector(to + (column + i) * to_row + step * 2, square[i]);
    }
}

template <class S, class T>
void load_queries(
    const AttentionBackward& a, const Layout<T>& at, int64_t b, int64_t h, int64_t q0, int64_t rows,
    const Queries<S>& to) {
  const int64_t out_row = a.heads * a.size, place = ((b * a.length + q0) * a.heads + h) * a.size;
  const T* q = static_cast<const T*>(a.q) + (b * a.length + q0) * a.q_token + h * a.size;
  const T* grad = static_cast<const T*>(a.grad) + place;
  const T* out = static_cast<const T*>(a.out) + place;
  copy_rows<T>(q, a.q_token, rows, a.size, to.q, at.padded);
  copy_rows<T>(grad, out_row, rows, a.size, to.grad, at.padded);
  for (int64_t r = 0; r < rows; ++r) {
    to.delta[r] = dot(grad + r * out_row, out + r * out_row, a.size);
    to.lse[r] = a.lse[(b * a.heads + h) * a.length + q0 + r] * LOG2E;
  }
  // Rows that fill up the last strip are zeros: they add nothing.
  const int64_t padded_rows = round_up(rows, S::FILLED);
  for (int64_t i = rows * at.padded; i < padded_rows * at.padded; ++i) to.q[i] = to.grad[i] = T{};
  std::memset(to.dq, 0, padded_rows * at.padded * sizeof(float));
  for (int64_t r = rows; r < padded_rows; ++r) to.lse[r] = to.delta[r] = 0.0f;
  pack_rows<T>(to.q, at.padded, padded_rows, at.padded, to.q_steps, at.padded);
  pack_rows<T>(to.grad, at.padded, padded_rows, at.padded, to.grad_steps, at.padded);
  if constexpr (S::TURNED) {
    turn_pairs(to.q_steps, padded_rows / STEP<T>, at.padded, to.q_columns, QUERIES);
    turn_pairs(to.grad_steps, padded_rows / STEP<T>, at.padded, to.grad_columns, QUERIES);
  }
}

// From raw scores and dP of one strip, in rows of TILE_COLUMNS, the columns of `span`: P = e^(score - lse) and
// dS = P (dP - delta), which also takes the place of dP if KEEPS.
template <bool KEEPS, class S, class T>
inline void differentiate(
    const float* raw, float* dp, Span span, float scale, const float* lse, const float* delta, T* p, T* ds,
    T* ds_rows) {
  for (int r = 0; r < S::ROWS; r += 2)
    for (int64_t i = span.first; i < span.last; i += WIDTH) {
      vec probability[2], gradient[2];
      for (int j = 0; j < 2; ++j) {
        const int64_t from = (r + j) * TILE_COLUMNS + i;
        probability[j] = exp2(load_vector<vec>(raw + from) * scale - lse[r + j]);
        gradient[j] = probability[j] * (load_vector<vec>(dp + from) - delta[r + j]);
        if constexpr (KEEPS) store_vector(dp + from, gradient[j]);
        if constexpr (STEP<T> == 2) store_row(ds_rows + (r + j) * BACKWARD_KEYS + i, gradient[j]);
      }
      store_steps(p + r * BACKWARD_KEYS + i * STEP<T>, BACKWARD_KEYS, probability[0], probability[1]);
      store_steps(ds + r * BACKWARD_KEYS + i * STEP<T>, BACKWARD_KEYS, gradient[0], gradient[1]);
    }
}

// That the strip at r0 does not reach the keys [begin, end) of a block.
template <class S>
inline void clear(const Scores<S>& to, int64_t r0, int64_t begin, int64_t end) {
  typedef typename S::Number T;
  for (int64_t r = r0; r < r0 + S::ROWS; r += STEP<T>)
    for (int64_t i = r * BACKWARD_KEYS + begin * STEP<T>; i < r * BACKWARD_KEYS + end * STEP<T>; ++i)
      to.p[i] = to.ds[i] = T{};
  for (int64_t r = r0; r < r0 + S::ROWS; ++r)
    for (int64_t i = begin; i < end; ++i) to.ds_rows()[r * BACKWARD_KEYS + i] = T{};
}

// Queries [q0, q0 + rows) and keys [k0, k0 + keys) of one head, both rounded up to strips.
struct Pair { int64_t q0, rows, k0, keys; };

// The gradient of the biases of one head: of a strip's keys [begin, end), += dS.
struct BiasGradient {
  BiasGradient(const AttentionBackward& a, int64_t b, int64_t h)
      : to(a.dbias ? a.dbias + b * a.dbias_batch + h * a.length * a.sources : nullptr), length(a.length),
        sources(a.sources) {}
  float* to;
  int64_t length, sources;
  template <class S>
  void add(int64_t query, const float* ds, int64_t begin, int64_t end) const {
    for (int64_t r = 0; r < S::ROWS && query + r < length; ++r, ds += TILE_COLUMNS) {
      float* row = to + (query + r) * sources + begin;
      const int64_t count = smaller(end, sources) - begin;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) row[i] += ds[i];
    }
  }
};

// P and dS of a block.
template <class S, class T>
void score(
    const Layout<T>& at, const Reach& reach, const Bias& bias, const BiasGradient& dbias, const Pair& pair, float scale,
    const Queries<S>& queries, const Keys<S>& keys, const Scores<S>& to) {
  constexpr int64_t columns_step = TILE_COLUMNS * STEP<T>;
  for (int64_t c = 0; c < pair.keys; c += TILE_COLUMNS) {
    const int64_t k0 = pair.k0 + c, panel = k0 * at.steps * STEP<T>;
    for (int64_t g0 = 0; g0 < pair.rows; g0 += S::GROUP) {
      const int64_t g1 = smaller(g0 + S::GROUP, pair.rows);
      for (int64_t r0 = g0; r0 < g1; r0 += S::ROWS) {
        const Span span = reach.span<S>(pair.q0 + r0, k0, TILE_COLUMNS);
        const int64_t columns = panel + span.first * STEP<T>, vectors = (span.last - span.first) / WIDTH;
        const int64_t from = r0 * at.padded, place = (r0 - g0) * TILE_COLUMNS + span.first;
        S::multiply(
            at.steps, queries.q + from, at.padded, STEP<T>, keys.k_columns + columns, columns_step, vectors,
            to.raw + place, TILE_COLUMNS, nullptr);
        S::multiply(
            at.steps, queries.grad + from, at.padded, STEP<T>, keys.v_columns + columns, columns_step, vectors,
            to.dp + place, TILE_COLUMNS, nullptr);
      }
      for (int64_t r0 = g0; r0 < g1; r0 += S::ROWS) {
        const Span span = reach.span<S>(pair.q0 + r0, k0, TILE_COLUMNS);
        const bool is_empty = span.first >= span.last;
        // Of causal attention, no product of vectors reads what lies behind the span.
        if (reach.ends || S::IS_WHOLE) clear(to, r0, c + (is_empty ? 0 : span.last), c + TILE_COLUMNS);
        if (span.first > 0) clear(to, r0, c, c + span.first);
        if (is_empty) continue;
        const int64_t from = (r0 - g0) * TILE_COLUMNS, place = r0 * BACKWARD_KEYS + c * STEP<T>;
        float* raw = to.raw + from + span.first;
        bias.add<S>(pair.q0 + r0, raw, TILE_COLUMNS, k0 + span.first, k0 + span.last);
        hide<S>(reach, pair.q0 + r0, raw, TILE_COLUMNS, k0 + span.first, k0 + span.last);
        const auto run = [&](auto keeps) {
          differentiate<keeps.value, S, T>(
              to.raw + from, to.dp + from, span, scale, queries.lse + r0, queries.delta + r0, to.p + place,
              to.ds + place, to.ds_rows() + r0 * BACKWARD_KEYS + c);
        };
        if (!dbias.to) {
          run(std::false_type());
          continue;
        }
        run(std::true_type());
        dbias.add<S>(pair.q0 + r0, to.dp + from + span.first, k0 + span.first, k0 + span.last);
      }
    }
  }
}

// dV^T += dO^T P and dK^T += Q^T dS. A block of keys is reached by the queries from `begin` on, and until `done`.
template <class S, class T>
void add_to_turned_keys(
    const Layout<T>& at, const Reach& reach, const Pair& pair, const Queries<S>& queries, const Scores<S>& scores,
    const Keys<S>& to) {
  constexpr int64_t step = BACKWARD_KEYS * STEP<T>;
  for (int64_t c = 0, begin = 0, done = 0; c < pair.keys; c += TILE_COLUMNS) {
    const int64_t key = pair.k0 + c, columns = smaller(TILE_COLUMNS, pair.keys - c);
    while (begin < pair.rows && reach.end(pair.q0 + begin + S::FILLED - 1) <= key) begin += S::FILLED;
    while (done < pair.rows && reach.first(pair.q0 + done) < key + columns) ++done;
    if (begin >= done) continue;
    const int64_t steps = (round_up(done, S::FILLED) - begin) / STEP<T>, from = begin * BACKWARD_KEYS + c * STEP<T>;
    for (int64_t row = 0; row < at.padded; row += S::ROWS) {
      const int64_t rows = row * QUERIES + begin, place = row * at.length + key;
      S::multiply(
          steps, queries.grad_columns + rows, QUERIES, STEP<T>, scores.p + from, step, columns / WIDTH, to.dv + place,
          at.length, S::ADD);
      S::multiply(
          steps, queries.q_columns + rows, QUERIES, STEP<T>, scores.ds + from, step, columns / WIDTH, to.dk + place,
          at.length, S::ADD);
    }
  }
}

// dV += P^T dO and dK += dS^T Q. A strip of keys is reached by the strips of queries from `begin` on, and until `done`.
template <class S, class T>
void add_to_keys(
    const Layout<T>& at, const Reach& reach, const Pair& pair, const Queries<S>& queries, const Scores<S>& scores,
    const Keys<S>& to) {
  if constexpr (S::TURNED) return add_to_turned_keys(at, reach, pair, queries, scores, to);
  constexpr int64_t step = BACKWARD_KEYS * STEP<T>;
  for (int64_t s = 0, begin = 0, done = 0; s < pair.keys; s += S::ROWS) {
    const int64_t key = pair.k0 + s;
    while (begin < pair.rows && reach.end(pair.q0 + begin + S::ROWS - 1) <= key) begin += S::ROWS;
    while (done < pair.rows && reach.first(pair.q0 + done) < key + S::ROWS) ++done;
    if (begin >= done) continue;
    const int64_t steps = (done - begin + STEP<T> - 1) / STEP<T>, from = begin * BACKWARD_KEYS + s * STEP<T>;
    const int64_t columns = begin * at.padded, columns_step = at.padded * STEP<T>, place = key * at.padded;
    S::multiply(
        steps, scores.p + from, STEP<T>, step, queries.grad_steps + columns, columns_step, at.vectors, to.dv + place,
        at.padded, S::ADD);
    S::multiply(
        steps, scores.ds + from, STEP<T>, step, queries.q_steps + columns, columns_step, at.vectors, to.dk + place,
        at.padded, S::ADD);
  }
}

// dQ += dS K.
template <class S, class T>
void add_to_queries(
    const Layout<T>& at, const Reach& reach, const Pair& pair, const Keys<S>& keys, const Scores<S>& scores,
    const Queries<S>& to) {
  for (int64_t r0 = 0; r0 < pair.rows; r0 += S::ROWS) {
    const Span span = reach.span<S>(pair.q0 + r0, pair.k0, BACKWARD_KEYS);
    if (span.first >= span.end) continue;
    S::multiply(
        steps_of<S>(span), scores.ds_rows() + r0 * BACKWARD_KEYS + span.first,
        BACKWARD_KEYS, STEP<T>, keys.k_steps + (pair.k0 + span.first) * at.padded, at.padded * STEP<T>, at.vectors,
        to.dq + r0 * at.padded, at.padded, S::ADD);
  }
}

template <class S, class T>
void load_keys(const AttentionBackward& a, const Layout<T>& at, int64_t b, int64_t g, const Keys<S>& to) {
  const int64_t from = b * a.sources * a.k_token + g * a.size;
  const T *k = static_cast<const T*>(a.k) + from, *v = static_cast<const T*>(a.v) + from;
  pack_columns<T>(k, a.k_token, a.sources, a.size, to.k_columns);
  pack_columns<T>(v, a.k_token, a.sources, a.size, to.v_columns);
  pack_rows<T>(k, a.k_token, a.sources, a.size, to.k_steps, at.padded);
  fill_up<T>(to.k_steps, at, a.sources);
  const int64_t rows = round_up(at.length, S::ROWS);
  std::memset(to.dk, 0, rows * at.padded * sizeof(float));
  std::memset(to.dv, 0, rows * at.padded * sizeof(float));
}

// WIDTH columns of [size, from_row] as rows [WIDTH, size].
inline void turn_back(const float* from, int64_t from_row, int64_t size, float* to) {
  for (int64_t row = 0; row < size; row += WIDTH) {
    bits square[WIDTH];
    for (int i = 0; i < WIDTH; ++i) square[i] = load_vector<bits>(from + (row + i) * from_row);
    transpose(square);
    for (int i = 0; i < WIDTH; ++i) store_vector(to + i * size + row, square[i]);
  }
}

// The gradients of keys and values, from one of the parts.
template <class S, class T>
void write_keys(
    const AttentionBackward& a, const Layout<T>& at, int64_t b, int64_t g, int64_t part, const Keys<S>& keys) {
  const int64_t place = b * a.sources * a.k_token + g * a.size;
  const Buffer<float> dk_rows(S::TURNED ? WIDTH * at.padded : 0), dv_rows(S::TURNED ? WIDTH * at.padded : 0);
  for (int64_t t = 0; t < a.sources; ++t) {
    const float *dk = keys.dk + t * at.padded, *dv = keys.dv + t * at.padded;
    if constexpr (S::TURNED) {
      if (t % WIDTH == 0) {
        turn_back(keys.dk + t, at.length, at.padded, dk_rows);
        turn_back(keys.dv + t, at.length, at.padded, dv_rows);
      }
      dk = dk_rows + t % WIDTH * at.padded;
      dv = dv_rows + t % WIDTH * at.padded;
    }
    if (a.partial) {
      float* to = a.partial + (((b * a.kv_heads + g) * a.parts + part) * 2 * a.sources + t) * a.size;
      write_row(to, dk, a.size, a.scale);
      write_row(to + a.sources * a.size, dv, a.size, 1.0f);
    } else {
      write_row(static_cast<T*>(a.dk) + place + t * a.k_token, dk, a.size, a.scale);
      write_row(static_cast<T*>(a.dv) + place + t * a.k_token, dv, a.size, 1.0f);
    }
  }
}

template <class S>
void backward(const AttentionBackward& a, int64_t begin, int64_t end) {
  typedef typename S::Number T;
  [[maybe_unused]] const S strips{};
  const Layout<T> at(a);
  const int64_t heads = at.group / a.parts;
  const Queries<S> queries(at);
  const Keys<S> keys(at);
  const Scores<S> scores;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item % a.batch, part = item / a.batch % a.parts, g = item / a.batch / a.parts;
    const int64_t h0 = g * at.group + part * heads;
    const Reach reach(a, b);
    load_keys(a, at, b, g, keys);
    for (int64_t h = h0; h < h0 + heads; ++h) {
      const Bias bias(a, b, h);
      const BiasGradient dbias(a, b, h);
      for (int64_t q0 = 0; q0 < a.length; q0 += QUERIES) {
        const int64_t rows = smaller(QUERIES, a.length - q0), k_end = reach.end(q0 + rows - 1);
        load_queries(a, at, b, h, q0, rows, queries);
        for (int64_t k0 = round_down(reach.first(q0), BACKWARD_KEYS); k0 < k_end; k0 += BACKWARD_KEYS) {
          const int64_t count = smaller(BACKWARD_KEYS, round_up(k_end - k0, S::TURNED ? S::SPAN : S::ROWS));
          const Pair pair{q0, round_up(rows, S::FILLED), k0, count};
          score(at, reach, bias, dbias, pair, a.scale * LOG2E, queries, keys, scores);
          add_to_keys(at, reach, pair, queries, scores, keys);
          add_to_queries(at, reach, pair, keys, scores, queries);
        }
        T* to = static_cast<T*>(a.dq) + (b * a.length + q0) * a.q_token + h * a.size;
        for (int64_t r = 0; r < rows; ++r) write_row(to + r * a.q_token, queries.dq + r * at.padded, a.size, a.scale);
      }
    }
    write_keys(a, at, b, g, part, keys);
  }
}

template <class T>
void add_parts(const AttentionBackward& a, int64_t begin, int64_t end) {
  const int64_t next = 2 * a.sources * a.size;
  for (int64_t pair = begin; pair < end; ++pair)
    for (int64_t kind = 0; kind < 2; ++kind) {
      const int64_t b = pair / a.kv_heads, g = pair % a.kv_heads;
      float* sum = a.partial + pair * a.parts * next + kind * a.sources * a.size;
      T* to = static_cast<T*>(kind ? a.dv : a.dk) + b * a.sources * a.k_token + g * a.size;
      for (int64_t t = 0; t < a.sources; ++t, sum += a.size, to += a.k_token) {
        for (int64_t part = 1; part < a.parts; ++part) {
          const float* more = sum + part * next;
#pragma omp simd
          for (int64_t i = 0; i < a.size; ++i) sum[i] += more[i];
        }
        write_row(to, sum, a.size, 1.0f);
      }
    }
}

#ifdef MEGALITE_AMX
bool takes_tiles(const Attention& a) { return a.type == Type::bf16 && on_amx<bf16>(a.size); }
#endif

}  // namespace

void attention_pack(const AttentionForward& a, int64_t begin, int64_t end) {
  MEGALITE_BY_TYPE(a.type, pack, a, begin, end);
}

void attention_forward(const AttentionForward& a, int64_t begin, int64_t end) {
#ifdef MEGALITE_AMX
  if (takes_tiles(a)) return forward<ByTiles>(a, begin, end);
#endif
  a.type == Type::f32 ? forward<ByVectors<float>>(a, begin, end) : forward<ByVectors<bf16>>(a, begin, end);
}

void attention_backward(const AttentionBackward& a, int64_t begin, int64_t end) {
#ifdef MEGALITE_AMX
  if (takes_tiles(a)) return backward<ByTiles>(a, begin, end);
#endif
  a.type == Type::f32 ? backward<ByVectors<float>>(a, begin, end) : backward<ByVectors<bf16>>(a, begin, end);
}

void attention_add_parts(const AttentionBackward& a, int64_t begin, int64_t end) {
  MEGALITE_BY_TYPE(a.type, add_parts, a, begin, end);
}

}  // namespace megalite::cpu::MEGALITE_ISA
