// Attention of one query a head over a cache: the keys are read once for all heads of queries that share them.
//
// A part is a chunk of positions of one head of keys of one row. Chunks do not depend on the number of threads; their
// sums are joined in their order.
//
// B rows, H heads of queries, V heads of keys, G = H / V, P width of a head, R units that are rotated by half.
#pragma once
#include "decode.h"

namespace MIXTURA_ISA {

// x[0 .. R) against x[R .. 2 R), by the angles of one position.
inline void rotate(float *x, const float *cosine, const float *sine, i64 R) {
  for (i64 i = 0; i < R; i += W) {
    const i64 n = R - i;
    const V a = load_some(x + i, n), b = load_some(x + R + i, n);
    const V c = load_some(cosine + i, n), s = load_some(sine + i, n);
    store_some(x + i, a * c - b * s, n);
    store_some(x + R + i, b * c + a * s, n);
  }
}

// The same of x[0] against x[1], x[2] against x[3], and so on.
inline void rotate_neighbors(float *x, const float *cosine, const float *sine, i64 R) {
  for (i64 i = 0; i < R; i++) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cosine[i] - b * sine[i], x[2 * i + 1] = b * cosine[i] + a * sine[i];
  }
}

// sum[m][p .. p + NV W) += sum over s < S of weight[m][s] value[s][p .. p + NV W)
template <class T, int M, int NV>
void weigh_columns(const T *value, i64 P, i64 p, const float *const *weight, i64 S, float *const *sum) {
  V part[M * NV];
#pragma GCC unroll 16
  for (int i = 0; i < M * NV; i++) part[i] = load(sum[i / NV] + p + i % NV * W);
  for (i64 s = 0; s < S; s++) {
    V row[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) row[v] = load(value + s * P + p + v * W);
#pragma GCC unroll 16
    for (int i = 0; i < M * NV; i++) part[i] += weight[i / NV][s] * row[i % NV];
  }
#pragma GCC unroll 16
  for (int i = 0; i < M * NV; i++) store(sum[i / NV] + p + i % NV * W, part[i]);
}

template <class T, int M> void weigh_values(const T *value, i64 P, const float *const *weight, i64 S, float *const *sum) {
  constexpr int NV = W >= 16 ? (M <= 2 ? 8 : 4) : M <= 2 ? 4 : 2;  // vectors that fit into registers
  i64 p = 0;
  for (; p + NV * W <= P; p += NV * W) weigh_columns<T, M, NV>(value, P, p, weight, S, sum);
  for (; p < P; p += W) weigh_columns<T, M, 1>(value, P, p, weight, S, sum);
}

// f of the constant that n is, 1 .. N.
template <int N, class F> inline void up_to(i64 n, F f) {
  if constexpr (N > 1)
    if (n < N) return up_to<N - 1>(n, f);
  f(std::integral_constant<int, N>{});
}

template <class T> struct Attention {
  const Member &me;
  const mixtura_attention &op;
  const i64 B = me.rows(), H = op.heads, G = op.heads / op.groups, P = op.width, L = me.tape.length;
  const i64 seen = op.window && op.window < L ? L - op.window : 0;  // the first position that the window reaches
  const i64 before = seen / CHUNK, chunks = (L + CHUNK - 1) / CHUNK - before;

  void operator()() const {
    me.share(B * op.groups * chunks, [&](i64 i) { part(i / chunks / op.groups, i / chunks % op.groups, i % chunks); });
    me.share(B * op.groups, [&](i64 i) { join(i / op.groups, i % op.groups); });
  }

  // Norm and rotation of a head. A norm over all heads is computed from all of them again by each part.
  void prepare(const mixtura_norm &norm, const float *row, i64 heads, i64 head, i64 b, float *x) const {
    if (op.whole && norm.kind) {
      float *all = x + P;
      normalize<T>(norm, row, heads * P, all);
      std::memcpy(x, all + head * P, sizeof(float) * P);
    } else {
      normalize<T>(norm, row + head * P, P, x);
    }
    if (!op.rotated) return;
    const i64 place = me.tape.positions[b] * op.rotated;
    (op.neighbors ? rotate_neighbors : rotate)(x, op.cosine + place, op.sine + place, op.rotated);
  }

  // Largest score, sum of exponents and weighted values of one chunk, for each of the G heads.
  void part(i64 b, i64 v, i64 chunk) const {
    const i64 lane = (b * op.groups + v) * op.capacity * P;
    T *keys = (T *)op.keys + lane, *values = (T *)op.values + lane;
    float *result = op.parts + ((b * op.groups + v) * chunks + chunk) * G * (P + 2);
    T *query = (T *)me.scratch;  // (G, P)
    float *score = (float *)(me.scratch + (G * P * sizeof(T) + 63) / 64 * 64);  // (G, S)
    float *room = score + G * SCORED;                                           // of prepare
    if (op.key && chunk == chunks - 1) write(b, v, keys, values, room);
    for (i64 g = 0; g < G; g++) {
      prepare(op.query_norm, op.query + b * H * P, H, v * G + g, b, room);
      for (i64 p = 0; p < P; p += W) store(query + g * P + p, load(room + p));
      float *of = result + g * (P + 2);
      of[P] = -__builtin_inff(), of[P + 1] = 0;
      std::memset(of, 0, sizeof(float) * P);
    }
    const i64 begin = most(most(seen, me.tape.starts[b]), (before + chunk) * CHUNK);
    const i64 end = least(L, (before + chunk + 1) * CHUNK);
    for (i64 s = begin; s < end; s += SCORED) {
      const i64 at = (s - op.skipped) * P;
      block(query, keys + at, values + at, least(SCORED, end - s), score, result);
    }
  }

  void write(i64 b, i64 v, T *keys, T *values, float *room) const {
    prepare(op.key_norm, op.key + b * op.groups * P, op.groups, v, b, room);
    const float *value = op.value + (b * op.groups + v) * P;
    const i64 at = (L - 1 - op.skipped) * P;
    for (i64 p = 0; p < P; p += W) {
      store(keys + at + p, load(room + p));
      store(values + at + p, load(value + p));
    }
  }

  void block(const T *query, const T *keys, const T *values, i64 S, float *score, float *result) const {
    constexpr i64 TILE = Tile<T>::M;
    for (i64 g = 0; g < G; g += TILE) {
      const i64 M = least(TILE, G - g);
      const T *a[TILE];
      for (i64 m = 0; m < M; m++) a[m] = query + (g + m) * P;
      up_to<TILE>(M, [&](auto count) { scores<count()>(keys, a, S, score + g * SCORED); });
    }
    for (i64 g = 0; g < G; g++) weights(score + g * SCORED, S, result + g * (P + 2));
    for (i64 g = 0; g < G; g += 4) {
      const i64 M = least(4, G - g);
      const float *w[4];
      float *sum[4];
      for (i64 m = 0; m < M; m++) w[m] = score + (g + m) * SCORED, sum[m] = result + (g + m) * (P + 2);
      up_to<4>(M, [&](auto count) { weigh_values<T, count()>(values, P, w, S, sum); });
    }
  }

  template <int M> void scores(const T *keys, const T *const *a, i64 S, float *score) const {
    for (i64 s = 0; s < S; s += 4) {
      const T *k[4];
      float c[M][4];
      for (i64 j = 0; j < 4; j++) k[j] = keys + least(s + j, S - 1) * P;
      dot_tile<T, M>(k, a, P, c);
      for (int m = 0; m < M; m++) std::memcpy(score + m * SCORED + s, c[m], sizeof(c[m]));
    }
  }

  // From scores to exponents; what was summed before is brought to the new largest score.
  void weights(float *score, i64 S, float *of) const {
    float largest = of[P];
    for (i64 s = 0; s < S; s += W) {
      V x = load_some(score + s, S - s) * op.scale;
      if (op.softcap) x = op.softcap * tanh(x / op.softcap);
      store(score + s, x);
    }
    V best = set(largest);
    for (i64 s = 0; s + W <= S; s += W) best = max(best, load(score + s));
    for (i64 s = S / W * W; s < S; s++) best[0] = score[s] > best[0] ? score[s] : best[0];
    for (int i = 0; i < W; i++) largest = best[i] > largest ? best[i] : largest;
    const V before = exp(set(of[P] - largest));
    V sum = {};
    for (i64 s = 0; s < S; s += W) {
      V x = exp(load(score + s) - largest);
      for (i64 j = S - s; j < W; j++) x[j] = 0;
      store(score + s, x);
      sum += x;
    }
    for (i64 p = 0; p < P; p += W) store(of + p, load(of + p) * before);
    of[P] = largest, of[P + 1] = of[P + 1] * before[0] + total(sum);
  }

  void join(i64 b, i64 v) const {
    for (i64 g = 0; g < G; g++) {
      const float *parts = op.parts + (b * op.groups + v) * chunks * G * (P + 2) + g * (P + 2);
      const float sink = op.sinks ? load1((const T *)op.sinks + v * G + g) : -__builtin_inff();
      float largest = sink, weight = 0;
      for (i64 c = 0; c < chunks; c++) {
        const float x = parts[c * G * (P + 2) + P];
        largest = x > largest ? x : largest;
      }
      for (i64 c = 0; c < chunks; c++) {
        const float *of = parts + c * G * (P + 2);
        weight += exp(set(of[P] - largest))[0] * of[P + 1];
      }
      if (op.sinks) weight += exp(set(sink - largest))[0];
      T *out = (T *)op.out + (b * H + v * G + g) * P;
      for (i64 p = 0; p < P; p += W) {
        V sum = {};
        for (i64 c = 0; c < chunks; c++) {
          const float *of = parts + c * G * (P + 2);
          if (of[P + 1] > 0) sum += exp(set(of[P] - largest)) * load(of + p);
        }
        store(out + p, sum / weight);
      }
    }
  }
};

template <class T> void run_tape(const mixtura_tape *tape, mixtura_team *team) {
#pragma omp parallel num_threads(tape->threads)
  {
    const Member me{*team, *tape, tape->scratch + omp_get_thread_num() * tape->scratch_bytes};
#pragma omp single
    team->members = omp_get_num_threads();
    for (i64 i = 0; i < tape->count; i++) {
      const void *operands = tape->instructions[i].operands;
      switch (tape->instructions[i].op) {
        case MIXTURA_EMBED: embed<T>(me, *(const mixtura_embed *)operands); break;
        case MIXTURA_NORM: norm<T>(me, *(const mixtura_normalize *)operands); break;
        case MIXTURA_LINEARS: linears<T>(me, *(const mixtura_linears *)operands); break;
        case MIXTURA_ATTENTION: Attention<T>{me, *(const mixtura_attention *)operands}(); break;
        case MIXTURA_LINEAR_ADD: linear_add<T>(me, *(const mixtura_linear_add *)operands); break;
        case MIXTURA_FEED_FORWARD: feed_forward<T>(me, *(const mixtura_feed_forward *)operands); break;
        case MIXTURA_MIXTURE: mixture<T>(me, *(const mixtura_mixture *)operands); break;
        case MIXTURA_FOLD: fold<T>(me, *(const mixtura_fold *)operands); break;
      }
    }
  }
}

inline void run(const mixtura_tape *tape, mixtura_team *team) {
  if (tape->dtype == MIXTURA_FLOAT32)
    run_tape<float>(tape, team);
  else
    run_tape<bf16>(tape, team);
}

// Sums what a thread reads, so that nothing is left out.
inline float read(const void *bytes, i64 count, int threads) {
  float sum = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
  {
    const i64 vectors = count / 64, n = omp_get_num_threads(), t = omp_get_thread_num();
    const char *p = (const char *)bytes;
    V parts[8] = {};
    for (i64 i = vectors * t / n; i + 8 <= vectors * (t + 1) / n; i += 8)
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) parts[j] += load((const float *)(p + (i + j) * 64));
    for (int j = 0; j < 8; j++) sum += parts[j][0];
  }
  return sum;
}
}  // namespace MIXTURA_ISA
