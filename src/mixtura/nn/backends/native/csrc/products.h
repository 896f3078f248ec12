// Products of matrices for many rows: both operands are packed first, into words in the order in which the loop over the
// sum reads them, [K][rows]. A word is a float, or a pair of bfloat16 that follow each other in the sum where the
// processor multiplies such pairs.
//
// The order of a sum is that of its terms, whatever the sizes of tiles and the number of threads.
#pragma once
#include "vectors.h"

namespace MIXTURA_ISA {

constexpr int HEIGHT = MIXTURA_TILE_PACKED;  // rows of a tile
constexpr int PANEL_WIDTH = 2 * W;           // its columns
constexpr int LINE = 64;                     // bytes of a line of the caches

template <class T> struct Words {
  static constexpr int PER = 1;  // entries of a word
  static V of(const T *first, const T *) { return load(first); }  // words of W columns, from one or two rows
  static V along(const T *p) { return load(p); }                  // W words of a row
  static V mac(V sum, V a, V b) { return sum + a * b; }
};
#if defined(MIXTURA_BF16_PAIRS)
template <> struct Words<bf16> {
  static constexpr int PER = 2;
  static V of(const bf16 *first, const bf16 *second) {
    return (V)(__builtin_convertvector(load_as<Vh>(first), Vu) | __builtin_convertvector(load_as<Vh>(second), Vu) << 16);
  }
  static V along(const bf16 *p) { return load_as<V>(p); }
  static V mac(V sum, V a, V b) { return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
};
#endif

template <class T> constexpr int64_t words(int64_t K) { return (K + Words<T>::PER - 1) / Words<T>::PER; }

template <int B, std::size_t... I> MIXTURA_INLINE void exchange(V &x, V &y, std::index_sequence<I...>) {
  const V low = __builtin_shufflevector(x, y, (I & B ? W + I - B : I)...);
  y = __builtin_shufflevector(x, y, (I & B ? W + I : I + B)...);
  x = low;
}
template <int B = 1> MIXTURA_INLINE void transpose(V *v) {
  if constexpr (B < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
      if (!(i & B)) exchange<B>(v[i], v[i + B], std::make_index_sequence<W>{});
    transpose<2 * B>(v);
  }
}

template <class T> inline const T *padded(T *whole, const T *p, int64_t count, int64_t most) {
  std::memset(whole, 0, sizeof(T) * most);
  if (p && count > 0) std::memcpy(whole, p, sizeof(T) * (count < most ? count : most));
  return whole;
}

// The first `count` of W steps, of `rows` words each. Of narrow steps whole vectors are written where the next steps, which
// overwrite the rest, are long enough.
MIXTURA_INLINE void put_words(const V *v, int64_t rows, int64_t count, int64_t width, float *out) {
  if (rows == W && count >= W) {
#pragma GCC unroll 16
    for (int j = 0; j < W; j++) store(out + j * width, v[j]);
    return;
  }
  const int64_t last = (count < W ? count : W) - 1;
  for (int64_t j = 0; j <= last; j++)
    if (rows == W || (width <= W && (last - j) * width + rows >= W))
      store(out + j * width, v[j]);
    else
      std::memcpy(out + j * width, v + j, sizeof(float) * rows);
}

// out[k][i] for terms k < K of a sum and rows i < width, from row(i) with terms side by side; from n on the last one again.
template <class T, class Row> void pack_along(Row row, int64_t n, int64_t width, int64_t K, float *out) {
  constexpr int64_t PER = Words<T>::PER;
  const int64_t steps = words<T>(K);
  for (int64_t i = 0; i < width; i += W) {
    const T *p[W];
    for (int64_t j = 0; j < W; j++) p[j] = row(i + j < n ? i + j : n - 1);
    const int64_t rows = width - i < W ? width - i : W;
    for (int64_t k = 0; k < steps; k += W) {
      V v[W];
      if (K - k * PER >= W * PER) {
#pragma GCC unroll 16
        for (int j = 0; j < W; j++) v[j] = Words<T>::along(p[j] + k * PER);
      } else {
        T whole[W * PER];
        for (int j = 0; j < W; j++) v[j] = Words<T>::along(padded(whole, p[j] + k * PER, K - k * PER, W * PER));
      }
      transpose(v);
      put_words(v, rows, steps - k, width, out + k * width + i);
    }
  }
}

// The same from row(k) with columns side by side, of which `readable` are there.
template <class T, class Row> void pack_across(Row row, int64_t width, int64_t readable, int64_t K, float *out) {
  constexpr int64_t PER = Words<T>::PER;
  for (int64_t k = 0; k < K; k += PER, out += width) {
    const T *first = row(k), *second = PER == 2 && k + 1 < K ? row(k + 1) : nullptr;
    for (int64_t i = 0; i < width; i += W) {
      T one[W], other[W];
      const bool whole = i + W <= readable;
      const T *p = whole ? first + i : padded(one, first + (i < readable ? i : 0), readable - i, W);
      const T *q = PER == 1 ? p : whole && second ? second + i : padded(other, second ? second + (i < readable ? i : 0) : nullptr, readable - i, W);
      const V v = Words<T>::of(p, q);
      if (i + W <= width)
        store(out + i, v);
      else
        std::memcpy(out + i, &v, sizeof(float) * (width - i));
    }
  }
}

// Lanes 0, 2, 4 .. of x and then of y, or 1, 3, 5 ..
template <int ODD, std::size_t... I> MIXTURA_INLINE V every_other(V x, V y, std::index_sequence<I...>) {
  return __builtin_shufflevector(x, y, (2 * I + ODD)...);
}

// c[m][0 .. 2W) = sum over steps of a[step][m] b[step][0 .. 2W). Meanwhile a line for each step is asked for from `ahead` on.
template <class T, int M>
void product_tile(const float *a, const float *b, int64_t steps, float (*c)[PANEL_WIDTH], const char *ahead) {
  V sum[2 * M] = {};
  for (int64_t k = 0; k < steps; k++) {
    const V b0 = load(b + k * PANEL_WIDTH), b1 = load(b + k * PANEL_WIDTH + W);
    __builtin_prefetch(ahead + k * LINE, 0, 2);
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) {
      const V x = repeat(a + k * M + m);
      sum[2 * m] = Words<T>::mac(sum[2 * m], x, b0);
      sum[2 * m + 1] = Words<T>::mac(sum[2 * m + 1], x, b1);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; m++) store(c[m], sum[2 * m]), store(c[m] + W, sum[2 * m + 1]);
}

template <class T, int M = HEIGHT>
inline void product(int64_t rows, const float *a, const float *b, int64_t steps, float (*c)[PANEL_WIDTH],
                    const void *ahead = nullptr) {
  if constexpr (M > 1)
    if (rows < M) return product<T, M - 1>(rows, a, b, steps, c, ahead);
  product_tile<T, M>(a, b, steps, c, (const char *)(ahead ? ahead : a));
}
}  // namespace MIXTURA_ISA
