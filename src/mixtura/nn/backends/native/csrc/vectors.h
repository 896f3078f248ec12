// Vectors of MIXTURA_LANES floats in the compiler's own vector types: one text for every instruction set. Only products
// of bfloat16 in pairs are written with intrinsics, where the processor has them.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(MIXTURA_BF16_PAIRS)
#include <immintrin.h>
#endif

#define MIXTURA_INLINE inline __attribute__((always_inline))

namespace MIXTURA_ISA {

constexpr int W = MIXTURA_LANES;
typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t Vi __attribute__((vector_size(4 * W)));
typedef uint32_t Vu __attribute__((vector_size(4 * W)));
typedef uint16_t Vh __attribute__((vector_size(2 * W)));
typedef uint8_t Vb __attribute__((vector_size(W)));

struct bf16 {
  uint16_t bits;
};

inline V set(float x) { return x - V{}; }
inline V repeat(const float *p) {  // its bits, which may be two numbers
  int32_t bits;
  std::memcpy(&bits, p, 4);
  return (V)(bits - Vi{});
}
template <class X> inline X load_as(const void *p) {
  X x;
  std::memcpy(&x, p, sizeof(X));
  return x;
}

inline V load(const float *p) { return load_as<V>(p); }
inline V load(const bf16 *p) { return (V)(__builtin_convertvector(load_as<Vh>(p), Vu) << 16); }
inline float load1(const float *p) { return *p; }
inline float load1(const bf16 *p) {
  uint32_t bits = (uint32_t)p->bits << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline void store(float *p, V v) { std::memcpy(p, &v, sizeof(v)); }
#if defined(MIXTURA_BF16_PAIRS)
inline void store(bf16 *p, V v) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)v)); }
#else
inline void store(bf16 *p, V v) {  // to the nearest, ties to even; NaN stays NaN
  Vu bits = (Vu)v;
  Vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Vu nan = (Vu)(v != v);
  Vh half = __builtin_convertvector((nan & ((bits >> 16) | 0x40)) | (~nan & rounded), Vh);
  std::memcpy(p, &half, sizeof(half));
}
#endif

inline void store1(float *p, float x) { *p = x; }
inline void store1(bf16 *p, float x) {
  bf16 whole[W];
  store(whole, set(x));
  *p = whole[0];
}

template <class T> MIXTURA_INLINE void store_some(T *p, V v, int64_t n) {
  if (n >= W) return store(p, v);
  T whole[W];
  store(whole, v);
  std::memcpy(p, whole, sizeof(T) * n);
}

// NaN as the first argument stays.
inline V max(V a, V b) { return a < b ? b : a; }
inline V min(V a, V b) { return b < a ? b : a; }

MIXTURA_INLINE V exp(V x) {
  x = min(max(x, set(-87.3f)), set(88.3f));
  V shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the fraction is rounded away
  V n = shifted - 12582912.f;
  V f = x - n * 0.693145752f - n * 1.42860677e-6f;
  V p = set(1.f / 720);
  p = p * f + 1.f / 120;
  p = p * f + 1.f / 24;
  p = p * f + 1.f / 6;
  p = p * f + .5f;
  p = p * f + 1.f;
  p = p * f + 1.f;
  return p * (V)(((Vi)shifted - 0x4b400000 + 127) << 23);
}
MIXTURA_INLINE V sigmoid(V x) { return 1.f / (1.f + exp(-x)); }
inline V tanh(V x) { return 1.f - 2.f / (exp(x + x) + 1.f); }
inline V erf(V x) {  // Abramowitz and Stegun 7.1.26, 1.5e-7
  V a = x < 0.f ? -x : x;
  V t = 1.f / (1.f + 0.3275911f * a);
  V p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  V y = 1.f - p * exp(-a * a);
  return x < 0.f ? -y : y;
}

// What a dot product loads of a row at once, and how two of them are multiplied into the sums.
template <class T> struct Pack;
template <> struct Pack<float> {
  static constexpr int STEP = W;
  V v;
  explicit Pack(const float *p) : v(load(p)) {}
  static V mac(V sum, const Pack &a, const Pack &b) { return sum + a.v * b.v; }
};
#if defined(MIXTURA_BF16_PAIRS)
template <> struct Pack<bf16> {
  static constexpr int STEP = 2 * W;
  __m512i v;
  explicit Pack(const bf16 *p) : v(_mm512_loadu_si512(p)) {}
  static V mac(V sum, const Pack &a, const Pack &b) {
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a.v, (__m512bh)b.v);
  }
};
#else
template <> struct Pack<bf16> {
  static constexpr int STEP = 2 * W;
  V even, odd;
  explicit Pack(const bf16 *p) {
    Vu both = load_as<Vu>(p);
    even = (V)(both << 16);
    odd = (V)(both & 0xffff0000u);
  }
  static V mac(V sum, const Pack &a, const Pack &b) { return sum + a.even * b.even + a.odd * b.odd; }
};
#endif

// Sums of neighbors at distance B: of x in the lanes without bit B, of y in those with it. Shuffles are what is scarce, so
// the first of the two is a blend.
template <int B, std::size_t... I> MIXTURA_INLINE V fold(V x, V y, std::index_sequence<I...>) {
  return __builtin_shufflevector(x, y, (I & B ? W + I : I)...) + __builtin_shufflevector(x, y, (I & B ? W + I - B : I + B)...);
}

// Sums over the lanes of N vectors, N a power of 2 up to W; they stand in the first N lanes, in their order.
template <int N, int B = 1> MIXTURA_INLINE V sums(V *v) {
  if constexpr (B == W) {
    return v[0];
  } else {
    for (int i = 0; i < (N > 1 ? N / 2 : 1); i++)  // pairs of vectors; the last one with itself
      v[i] = fold<B>(v[2 * i < N ? 2 * i : 0], v[N > 1 ? 2 * i + 1 : 0], std::make_index_sequence<W>{});
    return sums<(N > 1 ? N / 2 : 1), 2 * B>(v);
  }
}
}  // namespace MIXTURA_ISA
