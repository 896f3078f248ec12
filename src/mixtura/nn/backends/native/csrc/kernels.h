// Experts on rows as they lie in memory: nothing is packed, nothing is held twice.
//
// T tokens, D width, E experts, K slots a token, F expert width. A task of the first phase is some hidden units of one
// expert for all of its tokens; a task of the second is some output columns of all experts, so that every output is
// summed by one thread in the order of the experts: the same bits for any number of threads.
//
// A tile is 4 rows of weights times up to M rows of tokens. Both run along the same axis in memory, so a tile needs 4 + M
// loads for 4 M products of vectors, without packing either.
#pragma once
#include <omp.h>

#include "plan.h"
#include "products.h"

namespace MIXTURA_ISA {

using i64 = int64_t;
constexpr i64 UNITS = MIXTURA_UNITS;
constexpr i64 BLOCK = 256 << 10;  // bytes of tokens that stay in the second-level cache
constexpr i64 AHEAD = 2048;       // bytes of a row of weights that are asked for ahead of their use
constexpr i64 WIDE = 2048;        // bytes of a token; of wider ones only a few fit into the first-level cache

inline i64 least(i64 a, i64 b) { return a < b ? a : b; }
inline i64 most(i64 a, i64 b) { return a > b ? a : b; }

// f(from, count) for pieces of nearly equal length, none longer than longest.
template <class F> inline void split(i64 from, i64 to, i64 longest, F f) {
  for (i64 pieces = (to - from + longest - 1) / longest; pieces; pieces--) {
    const i64 count = (to - from + pieces - 1) / pieces;
    f(from, count);
    from += count;
  }
}

template <class T> struct Tile {
  static constexpr int M = MIXTURA_TILE_M;
  static constexpr int TALL = 2 * M;  // tokens of a call, in two halves at most: rows of weights are then in the cache
};
#if !defined(MIXTURA_BF16_PAIRS)
template <> struct Tile<bf16> {
  static constexpr int M = MIXTURA_TILE_M_WIDENED;
  static constexpr int TALL = 2 * M;
};
#endif

// c[m][n] = sum over k of a[m][k] b[n][k]. FAR: rows come from memory, and are asked for in time.
template <class T, int M, bool FAR = false, int N>
void dot_tile(const T *const *b, const T *const *a, i64 K, float (*c)[N]) {
  V sum[4 * M] = {};
  i64 k = 0;
  for (; k + Pack<T>::STEP <= K; k += Pack<T>::STEP) {
    Pack<T> b0(b[0] + k), b1(b[1] + k), b2(b[2] + k), b3(b[3] + k);
    if (FAR)
      for (int n = 0; n < 4; n++) __builtin_prefetch((const char *)(b[n] + k) + AHEAD, 0, 2);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      Pack<T> x(a[m] + k);
      sum[4 * m] = Pack<T>::mac(sum[4 * m], x, b0);
      sum[4 * m + 1] = Pack<T>::mac(sum[4 * m + 1], x, b1);
      sum[4 * m + 2] = Pack<T>::mac(sum[4 * m + 2], x, b2);
      sum[4 * m + 3] = Pack<T>::mac(sum[4 * m + 3], x, b3);
    }
  }
  constexpr int ROWS = M >= 4 && W >= 16 ? 4 : M >= 2 && W >= 8 ? 2 : 1;  // of c, whose sums fit into a vector
#pragma GCC unroll 8
  for (int m = 0; m < M; m += ROWS) {
    V part[4 * ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < 4 * ROWS; i++) part[i] = 4 * m + i < 4 * M ? sum[4 * m + i] : V{};
    V total = sums<4 * ROWS>(part);
    for (int i = 0; i < ROWS && m + i < M; i++) std::memcpy(c[m + i], (float *)&total + 4 * i, 4 * sizeof(float));
  }
  for (; k < K; k++)
    for (int m = 0; m < M; m++)
      for (int n = 0; n < 4; n++) c[m][n] += load1(a[m] + k) * load1(b[n] + k);
}

template <class T, bool FAR, int N> void dots(const T *const *b, const T *const *a, i64 M, i64 K, float (*c)[N]) {
  constexpr int FULL = Tile<T>::M;
  if (M > FULL) {
    dots<T, FAR>(b, a, M - M / 2, K, c);
    return dots<T, false>(b, a + M - M / 2, M / 2, K, c + M - M / 2);
  }
  switch (M) {
    case 1: return dot_tile<T, 1, FAR>(b, a, K, c);
    case 2: return dot_tile<T, 2, FAR>(b, a, K, c);
    case 3: return dot_tile<T, (FULL < 3 ? FULL : 3), FAR>(b, a, K, c);
    case 4: return dot_tile<T, (FULL < 4 ? FULL : 4), FAR>(b, a, K, c);
    case 5: return dot_tile<T, (FULL < 5 ? FULL : 5), FAR>(b, a, K, c);
    default: return dot_tile<T, FULL, FAR>(b, a, K, c);
  }
}

// c[m][0 .. NV W) = sum over k of a[m][k] b[k][0 .. NV W), for weights that are stored (in, out)
template <class T, int M, int NV> void spread_tile(const T *b, i64 stride, const T *const *a, i64 K, float (*c)[2 * W]) {
  V sum[NV * M] = {};
  for (i64 k = 0; k < K; k++) {
    V row[NV];
    for (int v = 0; v < NV; v++) row[v] = load(b + k * stride + v * W);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      V x = set(load1(a[m] + k));
      for (int v = 0; v < NV; v++) sum[NV * m + v] += x * row[v];
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < NV; v++) store(c[m] + v * W, sum[NV * m + v]);
}

// The weights of one expert's projection: row n of (N, K), or column n of (K, N).
template <class T> struct Projection {
  const T *weight, *bias;
  i64 N, K;
  bool transposed, far = false;  // far: rows come from memory

  // c[m][i] = bias[n + i] + sum over k of a[m][k] weight[n + i][k], for i < count <= 2W
  void operator()(i64 n, i64 count, const T *const *a, i64 M, float (*c)[2 * W]) const {
    if (transposed)
      columns(n, count, a, M, c);
    else
      rows(n, count, a, M, c);
    if (bias)
      for (i64 m = 0; m < M; m++)
        for (i64 i = 0; i < count; i++) c[m][i] += load1(bias + n + i);
  }

  void rows(i64 n, i64 count, const T *const *a, i64 M, float (*c)[2 * W]) const {
    if (far && count == 2 * W) return streams(n, a, M, c);
    for (i64 i = 0; i < count; i += 4) {
      const T *b[4];
      for (i64 j = 0; j < 4; j++) b[j] = weight + (n + least(i + j, count - 1)) * K;  // beyond the end: the last again
      if (far)
        dots<T, true>(b, a, M, K, (float(*)[2 * W])(c[0] + i));
      else
        dots<T, false>(b, a, M, K, (float(*)[2 * W])(c[0] + i));
    }
  }

  // All 2W rows, the four of a tile W / 2 apart: memory is read as four streams.
  void streams(i64 n, const T *const *a, i64 M, float (*c)[2 * W]) const {
    for (i64 i = 0; i < W / 2; i++) {
      const T *b[4];
      float part[Tile<T>::TALL][4];
      for (i64 j = 0; j < 4; j++) b[j] = weight + (n + j * (W / 2) + i) * K;
      dots<T, true>(b, a, M, K, part);
      for (i64 m = 0; m < M; m++)
        for (i64 j = 0; j < 4; j++) c[m][j * (W / 2) + i] = part[m][j];
    }
  }

  void columns(i64 n, i64 count, const T *const *a, i64 M, float (*c)[2 * W]) const {
    i64 done = 0;
    if (count == 2 * W)
      spread<2>(n, a, M, c), done = count;
    else if (count >= W)
      spread<1>(n, a, M, c), done = W;
    for (i64 m = 0; m < M; m++)
      for (i64 i = done; i < count; i++) {
        c[m][i] = 0;
        for (i64 k = 0; k < K; k++) c[m][i] += load1(a[m] + k) * load1(weight + k * N + n + i);
      }
  }

  template <int NV> void spread(i64 n, const T *const *a, i64 M, float (*c)[2 * W]) const {
    i64 m = 0;
    for (; m + Tile<T>::M <= M; m += Tile<T>::M) spread_tile<T, Tile<T>::M, NV>(weight + n, N, a + m, K, c + m);
    for (; m + 2 <= M; m += 2) spread_tile<T, 2, NV>(weight + n, N, a + m, K, c + m);
    if (m < M) spread_tile<T, 1, NV>(weight + n, N, a + m, K, c + m);
  }
};

MIXTURA_INLINE V activate(int kind, V x) {
  switch (kind) {
    case MIXTURA_SILU: return x * sigmoid(x);
    case MIXTURA_GELU: return .5f * x * (1.f + erf(x * .707106781f));
    case MIXTURA_GELU_TANH: return .5f * x * (1.f + tanh(.797884561f * (x + .044715f * x * x * x)));
    case MIXTURA_QUICK_GELU: return x * sigmoid(1.702f * x);
    case MIXTURA_RELU: return max(x, V{});
    case MIXTURA_RELU2: return max(x, V{}) * max(x, V{});
    default: return x;
  }
}

MIXTURA_INLINE V combine(const mixtura_experts &e, V gate, V up) {
  if (e.activation != MIXTURA_CLAMPED_SWIGLU) return activate(e.activation, gate) * up;
  gate = min(gate, set(e.limit));
  up = min(max(up, set(-e.limit)), set(e.limit));
  return (up + 1.f) * gate * sigmoid(e.alpha * gate);
}

template <class T> struct Call {
  const mixtura_plan &plan;
  const mixtura_experts &e = plan.experts;
  const i64 D = e.dim, F = e.width, C = e.gated ? 2 * F : F;
  static constexpr i64 TILE = Tile<T>::TALL;

  Projection<T> first(i64 x) const {
    const T *bias = e.first_bias ? (const T *)e.first_bias + x * C : nullptr;
    return {(const T *)e.first + x * C * D, bias, C, D, e.transposed != 0};
  }

  T *inner(i64 s) const { return (T *)((float *)plan.inner + s * words<T>(F)); }

  Projection<T> down(i64 x) const {
    const T *bias = e.down_bias ? (const T *)e.down_bias + x * D : nullptr;
    return {(const T *)e.down + x * D * F, bias, D, F, e.transposed != 0};
  }

  // Tokens of a tile: of wide ones only as many as the first-level cache holds beside rows of weights.
  i64 tall(i64 K) const { return K * (i64)sizeof(T) > WIDE ? Tile<T>::M : TILE; }

  // Hidden units from .. to of expert x for all of its tokens; blocks of tokens stay in the cache.
  void first_phase(i64 x, i64 from, i64 to) const {
    Projection<T> project = first(x);
    const i64 begin = plan.first[x], end = plan.first[x + 1], longest = tall(D);
    split(begin, end, most(longest, BLOCK / (D * (i64)sizeof(T))), [&](i64 b, i64 block) {
      for (i64 f = from; f < to; f += 2 * W)
        split(b, b + block, longest, [&](i64 m, i64 M) {
          const T *a[TILE];
          for (i64 i = 0; i < M; i++) a[i] = (const T *)plan.hidden + plan.order[m + i] / plan.K * D;
          project.far = m == b;
          units(project, a, M, m, f, least(2 * W, to - f));
        });
    });
  }

  // What enters the activation, of n <= 2W units; up only of gated experts.
  void preactivations(const Projection<T> &project, const T *const *a, i64 M, i64 f, i64 n, float (*gate)[2 * W],
                      float (*up)[2 * W]) const {
    if (!e.gated || !e.interleaved) {
      project(f, n, a, M, gate);
      if (e.gated) project(F + f, n, a, M, up);
      return;
    }
    float both[TILE][2 * W];
    for (i64 i = 0; i < n; i += W) {
      const i64 units = least(W, n - i);
      project(2 * (f + i), 2 * units, a, M, both);
      for (i64 m = 0; m < M; m++)
        for (i64 j = 0; j < units; j++) gate[m][i + j] = both[m][2 * j], up[m][i + j] = both[m][2 * j + 1];
    }
  }

  void units(const Projection<T> &project, const T *const *a, i64 M, i64 s, i64 f, i64 n) const {
    float gate[TILE][2 * W] = {}, up[TILE][2 * W] = {};
    preactivations(project, a, M, f, n, gate, up);
    for (i64 m = 0; m < M; m++) {
      for (i64 i = 0; i < n; i += W) {
        V x = e.gated ? combine(e, load(gate[m] + i), load(up[m] + i)) : activate(e.activation, load(gate[m] + i));
        store_some(inner(s + m) + f + i, x, n - i);
      }
      if (plan.kept) put(gate[m], up[m], f, n, (T *)plan.kept + (s + m) * C);
    }
  }

  // n units from f on into a row of C, in the order of the weights' rows; and back.
  void put(const float *gate, const float *up, i64 f, i64 n, T *row) const {
    if (e.gated && e.interleaved)
      for (i64 i = 0; i < n; i++) store1(row + 2 * (f + i), gate[i]), store1(row + 2 * (f + i) + 1, up[i]);
    else
      for (i64 i = 0; i < n; i += W) {
        store_some(row + f + i, load(gate + i), n - i);
        if (e.gated) store_some(row + F + f + i, load(up + i), n - i);
      }
  }

  // Output columns from .. to of all tokens.
  void second_phase(i64 from, i64 to, float *sum) const {
    std::memset(sum, 0, plan.T * MIXTURA_COLUMNS * sizeof(float));
    for (i64 i = 0; i < plan.num_active; i++) add_expert(plan.active[i], from, to, sum);
    put_sums(from, to, sum);
  }

  void add_expert(i64 x, i64 from, i64 to, float *sum) const {
    const i64 longest = tall(F);
    Projection<T> project = down(x);
    for (i64 d = from; d < to; d += 2 * W)
      split(plan.first[x], plan.first[x + 1], longest, [&](i64 m, i64 M) {
        const T *a[TILE];
        for (i64 j = 0; j < M; j++) a[j] = inner(m + j);
        project.far = m == plan.first[x];
        weigh(project, a, M, m, d, least(2 * W, to - d), sum + d - from);
      });
  }

  void put_sums(i64 from, i64 to, const float *sum) const {
    for (i64 t = 0; t < plan.T; t++)
      for (i64 d = from; d < to; d += W)
        store_some((T *)plan.out + t * D + d, load(sum + t * MIXTURA_COLUMNS + d - from), least(W, to - d));
  }

  void weigh(const Projection<T> &project, const T *const *a, i64 M, i64 m, i64 d, i64 n, float *sum) const {
    float c[TILE][2 * W] = {};
    project(d, n, a, M, c);
    for (i64 j = 0; j < M; j++) {
      const i64 slot = plan.order[m + j];
      float *row = sum + slot / plan.K * MIXTURA_COLUMNS;
      const V w = set(plan.weights[slot]);
      store(row, load(row) + w * load(c[j]));
      store(row + W, load(row + W) + w * load(c[j] + W));
    }
  }

  static i64 next(i64 &counter) { return __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED); }
};
}  // namespace MIXTURA_ISA
