// Experts with weights of 8 or 4 bits, for one token and for many: codes are multiplied as integers, as they lie.
//
// Letters as in kernels.h. Tokens are rounded in blocks of 32 inputs to whole numbers of at most `levels`, times a scale;
// products of a block with codes are exact sums of integers. So a token comes out the same to the bit whatever is
// computed beside it, for any number of threads, and, but for fused roundings, for any instruction set.
#pragma once
#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace MIXTURA_ISA {

constexpr i64 PANEL = 16, BLOCK_INPUTS = 32;  // rows of weights that lie side by side; inputs that have one scale
constexpr i64 STREAM = 4096;                  // bytes of weights that are fetched ahead of their use
constexpr int NV = PANEL / W;                 // vectors that hold one number for each row of a panel

inline i64 blocks_of(i64 K) { return (K + BLOCK_INPUTS - 1) / BLOCK_INPUTS; }
inline i64 panels_of(i64 N) { return (N + PANEL - 1) / PANEL; }

// 32 inputs of a token: value = scale * values. A is int8_t where the processor multiplies bytes, else int16_t; then the
// second and third of every four have changed places, so that pairs lie as codes do when they are spread to 16 bits.
template <class A> struct Block {
  A values[BLOCK_INPUTS];
  float scale;
  int32_t start;  // of a sum of products: what codes of 0 add up to, or minus the sum of values if those differ
};

template <std::size_t... I> inline Vi swap(Vi v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, ((I & ~3) | (I & 1) << 1 | (I & 2) >> 1)...);
}

inline void store_values(int8_t *p, Vi v) {
  typedef int8_t Narrow __attribute__((vector_size(W)));
  const Narrow narrow = __builtin_convertvector(v, Narrow);
  std::memcpy(p, &narrow, sizeof(narrow));
}
inline void store_values(int16_t *p, Vi v) {
  typedef int16_t Narrow __attribute__((vector_size(2 * W)));
  const Narrow narrow = __builtin_convertvector(swap(v, std::make_index_sequence<W>{}), Narrow);
  std::memcpy(p, &narrow, sizeof(narrow));
}

template <int B, class X, std::size_t... I> inline X turn(X v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (I ^ B)...);
}
// f over all lanes, in the first one.
template <class X, class F, int B = W / 2> inline auto across(X v, F f) {
  if constexpr (B == 0)
    return v[0];
  else
    return across<X, F, B / 2>(f(v, turn<B>(v, std::make_index_sequence<W>{})), f);
}

// Rounds 32 floats; start is minus their sum, times 2^shift. What is not finite makes the scale, and so all that it is
// multiplied with, NaN.
template <class A> void round_block(const float *x, float levels, int shift, Block<A> &block) {
  V largest = {}, finite = {};
  for (int i = 0; i < BLOCK_INPUTS; i += W) {
    const V v = load(x + i);
    largest = max(largest, max(v, -v));
    finite += v * 0.f;
  }
  const auto add = [](auto a, auto b) { return a + b; };
  const float most = across(largest, [](V a, V b) { return max(a, b); });
  const float factor = most > 1e-30f ? levels / most : 0.f;
  Vi sum = {};
  for (int i = 0; i < BLOCK_INPUTS; i += W) {
    const Vi whole = (Vi)(load(x + i) * factor + 12582912.f) - 0x4b400000;
    sum += whole;
    store_values(block.values + i, whole);
  }
  block.scale = most / levels + across(finite, add);
  block.start = -across(sum, add) * (1 << shift);
}

// sum + the products of two codes, spread to 16 bits, with two inputs.
inline Vi dot_pair(Vi sum, Vi codes, const int16_t *x) {
  int32_t both;
  std::memcpy(&both, x, 4);
#if MIXTURA_LANES == 16 && defined(__AVX512VNNI__)
  return (Vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(both));
#elif MIXTURA_LANES == 16
  return sum + (Vi)_mm512_madd_epi16((__m512i)codes, _mm512_set1_epi32(both));
#elif MIXTURA_LANES == 8
  return sum + (Vi)_mm256_madd_epi16((__m256i)codes, _mm256_set1_epi32(both));
#elif defined(__SSE2__)
  return sum + (Vi)_mm_madd_epi16((__m128i)codes, _mm_set1_epi32(both));
#else
  return sum + (codes & 0xffff) * (int32_t)x[0] + (codes >> 16) * (int32_t)x[1];
#endif
}

// Four codes of each row, ready to be multiplied.
template <class A> struct Quad;
template <> struct Quad<int16_t> {
  Vi even, odd;
  explicit Quad(Vi bytes) : even(bytes & 0x00ff00ff), odd((Vi)((Vu)bytes >> 8) & 0x00ff00ff) {}
  Vi dot(Vi sum, const int16_t *x) const { return dot_pair(dot_pair(sum, even, x), odd, x + 2); }
};
#if MIXTURA_LANES == 16 && defined(__AVX512VNNI__)
template <> struct Quad<int8_t> {
  Vi bytes;
  explicit Quad(Vi b) : bytes(b) {}
  Vi dot(Vi sum, const int8_t *x) const {
    int32_t four;
    std::memcpy(&four, x, 4);
    return (Vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, _mm512_set1_epi32(four));
  }
};
#endif

inline V load_half(const uint16_t *p) {  // finite ones
#if MIXTURA_LANES == 16
  return (V)_mm512_cvtph_ps(load_as<__m256i>(p));
#else
  const Vu bits = __builtin_convertvector(load_as<Vh>(p), Vu);
  const V size = (V)((bits & 0x7fff) << 13) * 0x1p112f;
  return (V)((Vu)size | (bits & 0x8000) << 16);
#endif
}

// The weights of one projection of one expert.
template <int BITS> struct Codes {
  const uint8_t *codes, *zeros;
  const char *scales;
  i64 K, group;  // inputs; blocks of a group
  bool half_scales;
  static constexpr i64 BYTES = PANEL * BLOCK_INPUTS * BITS / 8;  // of a block of a panel

  Codes(const mixtura_codes &all, const mixtura_quantized &q, i64 x, i64 N, i64 K)
      : K(K), group(q.group / BLOCK_INPUTS), half_scales(q.half_scales) {
    const i64 panels = x * N;
    codes = all.codes + panels * blocks_of(K) * BYTES;
    scales = (const char *)all.scales + panels * groups() * PANEL * (half_scales ? 2 : 4);
    zeros = all.zeros ? all.zeros + panels * groups() * PANEL : nullptr;
  }

  i64 groups() const { return (blocks_of(K) + group - 1) / group; }

  // c[m][i] = the product of row i of the panel with token a[m].
  template <class A> void operator()(i64 panel, const Block<A> *const *a, i64 M, float (*c)[PANEL]) const {
    zeros ? choose<A, true>(panel, a, M, c) : choose<A, false>(panel, a, M, c);
  }

  template <class A, bool ZEROS>
  void choose(i64 panel, const Block<A> *const *a, i64 M, float (*c)[PANEL]) const {
    switch (M) {
      case 1: return rows<A, ZEROS, 1>(panel, a, c);
      case 2: return rows<A, ZEROS, 2>(panel, a, c);
#if MIXTURA_LANES == 16
      case 3: return rows<A, ZEROS, 3>(panel, a, c);
      case 4: return rows<A, ZEROS, 4>(panel, a, c);
      case 5: return rows<A, ZEROS, 5>(panel, a, c);
      case 6: return rows<A, ZEROS, 6>(panel, a, c);
      case 7: return rows<A, ZEROS, 7>(panel, a, c);
      default: return rows<A, ZEROS, 8>(panel, a, c);
#endif
    }
  }

  V scale(i64 at) const {
    return half_scales ? load_half((const uint16_t *)scales + at) : load((const float *)scales + at);
  }
  Vi zero(i64 at) const {
    return __builtin_convertvector(__builtin_convertvector(load_as<Vb>(zeros + at), Vh), Vi);
  }

  template <class A, bool ZEROS, int M> void rows(i64 panel, const Block<A> *const *a, float (*c)[PANEL]) const {
    const i64 blocks = blocks_of(K), first = panel * groups() * PANEL;
    const uint8_t *block = codes + panel * blocks * BYTES;
    V total[M * NV] = {};
    for (i64 g = 0; g < groups(); g++) {
      V scales[NV];
      Vi zeros[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        scales[v] = scale(first + g * PANEL + v * W);
        if (ZEROS) zeros[v] = zero(first + g * PANEL + v * W);
      }
      for (i64 b = g * group; b < least(blocks, (g + 1) * group); b++, block += BYTES) {
        Vi sum[M * NV];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
          for (int v = 0; v < NV; v++)
            sum[m * NV + v] = ZEROS ? zeros[v] * a[m][b].start : Vi{} + a[m][b].start;
        dots<A, M>(block, a, b, sum);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
          for (int v = 0; v < NV; v++)
            total[m * NV + v] += __builtin_convertvector(sum[m * NV + v], V) * (scales[v] * a[m][b].scale);
      }
    }
    for (int m = 0; m < M; m++)
      for (int v = 0; v < NV; v++) store(c[m] + v * W, total[m * NV + v]);
  }

  template <class A, int M>
  static void dots(const uint8_t *block, const Block<A> *const *a, i64 b, Vi *sum) {
#pragma GCC unroll 8
    for (int i = 0; i < BLOCK_INPUTS; i += 32 / BITS)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        const uint8_t *at = block + i * PANEL * BITS / 8 + v * 4 * W;
        __builtin_prefetch(at + STREAM, 0, 2);
        const Vi bytes = load_as<Vi>(at);
#pragma GCC unroll 2
        for (int half = 0; half < 8 / BITS; half++) {
          const Quad<A> quad(BITS == 8 ? bytes : (Vi)((Vu)bytes >> (4 * half)) & 0x0f0f0f0f);
#pragma GCC unroll 8
          for (int m = 0; m < M; m++) sum[m * NV + v] = quad.dot(sum[m * NV + v], a[m][b].values + i + 4 * half);
        }
      }
  }
};

// A call: rounding of tokens, and the two phases of kernels.h.
template <class T, int BITS, class A> struct QuantizedCall {
  const mixtura_plan &plan;
  const mixtura_quantized &q = *plan.quantized;
  const mixtura_experts &e = q.experts;
  const i64 D = e.dim, F = e.width, width = panels_of(F), height = panels_of(D);  // panels
  static constexpr i64 TILE = MIXTURA_LANES == 16 ? 8 : 2;

  Block<A> *tokens(i64 t) const { return (Block<A> *)plan.rounded + t * blocks_of(D); }
  Block<A> *inner(i64 s) const { return (Block<A> *)plan.inner + s * blocks_of(F); }

  void round(const float *x, const mixtura_codes &codes, Block<A> &block) const {
    round_block(x, (float)q.levels, codes.zeros ? 0 : BITS - 1, block);
  }

  void round_token(i64 t) const {
    const T *x = (const T *)plan.hidden + t * D;
    for (i64 d = 0; d < D; d += BLOCK_INPUTS) {
      float wide[BLOCK_INPUTS] = {};
      const i64 n = least(BLOCK_INPUTS, D - d), whole = n / W * W;
      for (i64 i = 0; i < whole; i += W) store(wide + i, load(x + d + i));
      for (i64 i = whole; i < n; i++) wide[i] = load1(x + d + i);
      round(wide, q.first, tokens(t)[d / BLOCK_INPUTS]);
    }
  }

  // Hidden units from .. to of expert x for all of its tokens; from is a multiple of 32. Of few tokens the panels of the
  // gate are read one after the other, and then those of the up projection; of many a pair of both stays in the cache.
  void first_phase(i64 x, i64 from, i64 to) const {
    const Codes<BITS> codes(q.first, q, x, e.gated ? 2 * width : width, D);
    const i64 begin = plan.first[x], end = plan.first[x + 1];
    const i64 block = most(TILE, BLOCK / (blocks_of(D) * (i64)sizeof(Block<A>)) / TILE * TILE);
    const i64 step = end - begin <= TILE ? UNITS : BLOCK_INPUTS;
    for (i64 b = begin; b < end; b += block)
      for (i64 f = from; f < to; f += step)
        for (i64 s = b; s < least(end, b + block); s += TILE) {
          const Block<A> *a[TILE];
          const i64 M = least(TILE, least(end, b + block) - s);
          for (i64 m = 0; m < M; m++) a[m] = tokens(plan.order[s + m] / plan.K);
          units(codes, x, a, M, f, least(to, f + step), s);
        }
  }

  void units(const Codes<BITS> &codes, i64 x, const Block<A> *const *a, i64 M, i64 from, i64 to, i64 s) const {
    float gate[UNITS / PANEL][TILE][PANEL], up[UNITS / PANEL][TILE][PANEL], unit[TILE][UNITS] = {};
    const i64 first = from / PANEL, n = panels_of(to) - first;
    for (i64 p = 0; p < n; p++) codes(first + p, a, M, gate[p]);
    if (e.gated)
      for (i64 p = 0; p < n; p++) codes(width + first + p, a, M, up[p]);
    for (i64 p = 0; p < n; p++) {
      add_bias(x, first + p, M, gate[p], up[p]);
      for (i64 m = 0; m < M; m++)
        for (i64 i = 0; i < PANEL; i += W) {
          const V v = load(gate[p][m] + i);
          store(unit[m] + p * PANEL + i, e.gated ? combine(e, v, load(up[p][m] + i)) : activate(e.activation, v));
        }
    }
    for (i64 f = from; f < to; f += BLOCK_INPUTS)
      for (i64 m = 0; m < M; m++) round(unit[m] + f - from, q.down, inner(s + m)[f / BLOCK_INPUTS]);
  }

  void add_bias(i64 x, i64 p, i64 M, float (*gate)[PANEL], float (*up)[PANEL]) const {
    if (!e.first_bias) return;
    const T *bias = (const T *)e.first_bias + x * (e.gated ? 2 * F : F);
    for (i64 i = 0; i < least(PANEL, F - p * PANEL); i++) {
      const i64 f = p * PANEL + i;
      for (i64 m = 0; m < M; m++) {
        gate[m][i] += load1(bias + (e.interleaved ? 2 * f : f));
        if (e.gated) up[m][i] += load1(bias + (e.interleaved ? 2 * f + 1 : F + f));
      }
    }
  }

  // Output columns from .. to of all tokens; from is a multiple of 16.
  void second_phase(i64 from, i64 to, float *sum) const {
    for (i64 i = 0; i < plan.T * MIXTURA_COLUMNS; i++) sum[i] = 0;
    for (i64 i = 0; i < plan.num_active; i++) {
      const i64 x = plan.active[i], end = plan.first[x + 1];
      const Codes<BITS> codes(q.down, q, x, height, F);
      for (i64 s = plan.first[x]; s < end; s += TILE) {
        const Block<A> *a[TILE];
        const i64 M = least(TILE, end - s);
        for (i64 m = 0; m < M; m++) a[m] = inner(s + m);
        for (i64 d = from; d < to; d += PANEL) weigh(codes, x, a, M, s, d, least(PANEL, to - d), sum + d - from);
      }
    }
    for (i64 t = 0; t < plan.T; t++)
      for (i64 d = from; d < to; d += W)
        store_some((T *)plan.out + t * D + d, load(sum + t * MIXTURA_COLUMNS + d - from), least(W, to - d));
  }

  void weigh(const Codes<BITS> &codes, i64 x, const Block<A> *const *a, i64 M, i64 s, i64 d, i64 n, float *sum) const {
    float c[TILE][PANEL];
    codes(d / PANEL, a, M, c);
    const T *bias = e.down_bias ? (const T *)e.down_bias + x * D + d : nullptr;
    for (i64 m = 0; m < M; m++) {
      const i64 slot = plan.order[s + m];
      float *row = sum + slot / plan.K * MIXTURA_COLUMNS;
      if (bias)
        for (i64 i = 0; i < n; i++) c[m][i] += load1(bias + i);
      for (i64 i = 0; i < PANEL; i += W) store(row + i, load(row + i) + set(plan.weights[slot]) * load(c[m] + i));
    }
  }

  void operator()() const {
    const i64 parts = (F + UNITS - 1) / UNITS, columns = (D + MIXTURA_COLUMNS - 1) / MIXTURA_COLUMNS;
    i64 token = 0, next = 0, column = 0;
#pragma omp parallel num_threads(plan.threads)
    {
      for (i64 t; (t = __atomic_fetch_add(&token, 1, __ATOMIC_RELAXED)) < plan.T;) round_token(t);
#pragma omp barrier
      for (i64 i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < parts * plan.num_active;)
        first_phase(plan.active[i / parts], i % parts * UNITS, least(F, (i % parts + 1) * UNITS));
#pragma omp barrier
      float *sum = plan.sums + omp_get_thread_num() * plan.T * MIXTURA_COLUMNS;
      for (i64 i; (i = __atomic_fetch_add(&column, 1, __ATOMIC_RELAXED)) < columns;)
        second_phase(i * MIXTURA_COLUMNS, least(D, (i + 1) * MIXTURA_COLUMNS), sum);
    }
  }
};

template <class T, int BITS> void run_quantized(const mixtura_plan &plan) {
#if MIXTURA_LANES == 16 && defined(__AVX512VNNI__)
  if (plan.quantized->levels <= 127) return QuantizedCall<T, BITS, int8_t>{plan}();
#endif
  QuantizedCall<T, BITS, int16_t>{plan}();
}

inline void forward_quantized(const mixtura_plan *plan) {
  const bool wide = plan->experts.dtype == MIXTURA_FLOAT32, eight = plan->quantized->bits == 8;
  if (wide)
    eight ? run_quantized<float, 8>(*plan) : run_quantized<float, 4>(*plan);
  else
    eight ? run_quantized<bf16, 8>(*plan) : run_quantized<bf16, 4>(*plan);
}
}  // namespace MIXTURA_ISA
