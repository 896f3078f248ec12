// One token a sequence through a whole decoder: the operations of mixtura_decode.h, for one instruction set.
//
// All threads run all operations; parts of one are handed out by a counter, and a barrier ends it. Every output is
// summed by one thread in a fixed order: the same bits for any number of threads, and for any other rows beside it.
//
// Letters as in mixtura_decode.h; S positions that are scored at once, C positions of a chunk of attention.
#pragma once
#include "quantized.h"
#include "team.h"

namespace MIXTURA_ISA {

constexpr i64 ROWS = 128;                  // of weights, in a part
constexpr i64 SCORED = MIXTURA_SCORED;     // S
constexpr i64 CHUNK = MIXTURA_CHUNK;       // C

// One of the threads that run a tape.
struct Member {
  mixtura_team &team;
  const mixtura_tape &tape;
  char *scratch;

  i64 rows() const { return tape.rows; }
  i64 next() const { return __atomic_fetch_add(&team.part, 1, __ATOMIC_RELAXED); }

  // The last one to come gives out parts from 0 again.
  void wait() const {
    const int seen = __atomic_load_n(&team.generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&team.arrived, 1, __ATOMIC_ACQ_REL) == team.members) {
      team.arrived = 0, team.part = 0;
      __atomic_store_n(&team.generation, seen + 1, __ATOMIC_SEQ_CST);
      if (__atomic_load_n(&team.sleepers, __ATOMIC_SEQ_CST)) mixtura_wake(&team);
      return;
    }
    for (int turns = 0; __atomic_load_n(&team.generation, __ATOMIC_ACQUIRE) == seen; turns++)
      turns < MIXTURA_TURNS ? pause() : mixtura_sleep(&team, seen);
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
  }

  // f(i) for each i below n, by whoever is free, and then the barrier.
  template <class F> void share(i64 n, F f) const {
    for (i64 i; (i = next()) < n;) f(i);
    wait();
  }
};

inline float total(V v) { return sums<1>(&v)[0]; }

template <class T> inline V load_some(const T *p, i64 n) {
  if (n >= W) return load(p);
  T whole[W] = {};
  std::memcpy(whole, p, sizeof(T) * n);
  return load(whole);
}

// y = norm(x), of n units; x and y may be the same.
template <class T, class Out> void normalize(const mixtura_norm &norm, const float *x, i64 n, Out *y) {
  float mean = 0;
  if (norm.kind == MIXTURA_LAYER_NORM) {
    V sum = {};
    for (i64 i = 0; i < n; i += W) sum += load_some(x + i, n - i);
    mean = total(sum) / n;
  }
  V squares = {};
  for (i64 i = 0; i < n; i += W) {
    V v = load_some(x + i, n - i) - mean;
    if (n - i < W)
      for (i64 j = n - i; j < W; j++) v[j] = 0;
    squares += v * v;
  }
  const float factor = norm.kind ? 1.f / __builtin_sqrtf(total(squares) / n + norm.eps) : 1.f;
  const auto at = [&](const void *p, i64 i) {
    return norm.float32 ? load_some((const float *)p + i, n - i) : load_some((const T *)p + i, n - i);
  };
  for (i64 i = 0; i < n; i += W) {
    V v = (load_some(x + i, n - i) - mean) * factor;
    if (norm.weight) v *= at(norm.weight, i) + norm.offset;
    if (norm.bias) v += at(norm.bias, i);
    store_some(y + i, v, n - i);
  }
}

// Rows of one input: of the type of the tape and, if a product needs it, in float32 or as blocks of whole numbers.
template <class T> struct Inputs {
  const T *row[MIXTURA_MAX_ROWS];
  const float *wide[MIXTURA_MAX_ROWS];
  const i64 B, n;
  float *floats;
  char *blocks;
  const mixtura_quantized *rounded = nullptr;  // what the blocks are made for

  // As they are, or normalized into the scratch of the thread.
  Inputs(const Member &me, const void *x, const mixtura_norm &norm, i64 n) : B(me.rows()), n(n) {
    T *narrow = (T *)me.scratch;
    floats = (float *)(me.scratch + (B * n * sizeof(T) / 64 + 1) * 64);
    blocks = (char *)(floats + (B * n / 16 + 1) * 16);
    wide[0] = nullptr;
    for (i64 b = 0; b < B; b++) {
      if (norm.kind)
        normalize<T>(norm, (const float *)x + b * n, n, narrow + b * n), row[b] = narrow + b * n;
      else
        row[b] = (const T *)x + b * n;
    }
  }

  const float *const *widened() {
    if (!wide[0])
      for (i64 b = 0; b < B; b++) {
        for (i64 i = 0; i < n; i += W) store_some(floats + b * n + i, load_some(row[b] + i, n - i), n - i);
        wide[b] = floats + b * n;
      }
    return wide;
  }

  template <int BITS, class A> void round(const mixtura_quantized &q, const Block<A> **a) {
    for (i64 b = 0; b < B; b++) a[b] = (const Block<A> *)blocks + b * blocks_of(n);
    if (rounded == &q) return;
    for (i64 b = 0; b < B; b++)
      for (i64 k = 0; k < n; k += BLOCK_INPUTS) {
        float x[BLOCK_INPUTS] = {};
        for (i64 i = 0; i < least(BLOCK_INPUTS, n - k); i++) x[i] = load1(row[b] + k + i);
        round_block(x, (float)q.levels, q.first.zeros ? 0 : BITS - 1, *const_cast<Block<A> *>(a[b] + k / BLOCK_INPUTS));
      }
    rounded = &q;
  }
};

// sink(b, n, c, count) gets the products of row b with rows n .. n + count - 1 of the weights.
template <class T, class F>
void plain_products(const mixtura_linear &linear, i64 from, i64 to, const T *const *a, i64 B, F sink) {
  constexpr i64 TILE = Tile<T>::M;
  Projection<T> project{(const T *)linear.weight, (const T *)linear.bias, linear.out, linear.in, false};
  for (i64 n = from; n < to; n += 2 * W)
    for (i64 b = 0; b < B; b += TILE) {
      float c[TILE][2 * W] = {};
      const i64 M = least(TILE, B - b), count = least(2 * W, to - n);
      project.far = b == 0;
      project(n, count, a + b, M, c);
      for (i64 m = 0; m < M; m++) sink(b + m, n, c[m], count);
    }
}

// The same of weights of few bits; from is a multiple of 16.
template <int BITS, class A, class T, class F>
void rounded_products(const mixtura_linear &linear, i64 from, i64 to, Inputs<T> &inputs, F sink) {
  constexpr i64 TILE = MIXTURA_LANES == 16 ? 8 : 2;
  const mixtura_quantized &q = *linear.quantized;
  const Codes<BITS> codes(q.first, q, 0, 0, linear.in);
  const Block<A> *a[MIXTURA_MAX_ROWS];
  inputs.template round<BITS, A>(q, a);
  for (i64 n = from; n < to; n += PANEL)
    for (i64 b = 0; b < inputs.B; b += TILE) {
      float c[TILE][PANEL];
      const i64 M = least(TILE, inputs.B - b), count = least(PANEL, to - n);
      codes(n / PANEL, a + b, M, c);
      for (i64 m = 0; m < M; m++) {
        if (linear.bias)
          for (i64 i = 0; i < count; i++) c[m][i] += load1((const T *)linear.bias + n + i);
        sink(b + m, n, c[m], count);
      }
    }
}

template <class T, class F> void products(const mixtura_linear &linear, i64 from, i64 to, Inputs<T> &inputs, F sink) {
  if (linear.float32) return plain_products<float>(linear, from, to, inputs.widened(), inputs.B, sink);
  if (!linear.quantized) return plain_products<T>(linear, from, to, inputs.row, inputs.B, sink);
  const bool eight = linear.quantized->bits == 8;
#if MIXTURA_LANES == 16 && defined(__AVX512VNNI__)
  if (linear.quantized->levels <= 127)
    return eight ? rounded_products<8, int8_t>(linear, from, to, inputs, sink)
                 : rounded_products<4, int8_t>(linear, from, to, inputs, sink);
#endif
  eight ? rounded_products<8, int16_t>(linear, from, to, inputs, sink)
        : rounded_products<4, int16_t>(linear, from, to, inputs, sink);
}

template <class T> void embed(const Member &me, const mixtura_embed &op) {
  me.share(me.rows(), [&](i64 b) {
    const T *row = (const T *)op.table + me.tape.ids[b] * op.dim;
    for (i64 i = 0; i < op.dim; i += W)
      store_some(op.x + b * op.dim + i, load_some(row + i, op.dim - i) * op.scale, op.dim - i);
  });
}

template <class T> void norm(const Member &me, const mixtura_normalize &op) {
  me.share(me.rows(),
           [&](i64 b) { normalize<T>(op.norm, op.x + b * op.dim, op.dim, (T *)op.out + b * op.dim); });
}

template <class T> void fold(const Member &me, const mixtura_fold &op) {
  me.share(me.rows(), [&](i64 b) {
    float *sum = op.sum + b * op.dim, *x = op.x + b * op.dim;
    normalize<T>(op.norm, sum, op.dim, sum);
    for (i64 i = 0; i < op.dim; i += W) {
      const i64 n = op.dim - i;
      store_some(x + i, load_some(x + i, n) + load_some(sum + i, n) * op.factor, n);
    }
    std::memset(sum, 0, sizeof(float) * op.dim);
  });
}

template <class T> void linears(const Member &me, const mixtura_linears &op) {
  i64 parts[5] = {};
  for (i64 i = 0; i < op.count; i++) parts[i + 1] = parts[i] + (op.linear[i].out + ROWS - 1) / ROWS;
  Inputs<T> inputs(me, op.x, op.norm, op.linear[0].in);
  me.share(parts[op.count], [&](i64 part) {
    i64 i = 0;
    while (part >= parts[i + 1]) i++;
    const mixtura_linear &linear = op.linear[i];
    const i64 from = (part - parts[i]) * ROWS, to = least(linear.out, from + ROWS);
    products<T>(linear, from, to, inputs, [&](i64 b, i64 n, const float *c, i64 count) {
      if (!op.narrow) std::memcpy((float *)op.out[i] + b * linear.out + n, c, sizeof(float) * count);
      T *narrow = (T *)op.out[i] + b * linear.out + n;
      for (i64 j = 0; op.narrow && j < count; j += W) store_some(narrow + j, load(c + j), count - j);
    });
  });
}

template <class T> void linear_add(const Member &me, const mixtura_linear_add &op) {
  Inputs<T> inputs(me, op.y, mixtura_norm{}, op.linear.in);
  me.share((op.linear.out + ROWS - 1) / ROWS, [&](i64 part) {
    products<T>(op.linear, part * ROWS, least(op.linear.out, (part + 1) * ROWS), inputs,
                [&](i64 b, i64 n, const float *c, i64 count) {
                  float *x = op.x + b * op.linear.out + n;
                  for (i64 i = 0; i < count; i += W)
                    store_some(x + i, load_some(x + i, count - i) + load(c + i), count - i);
                });
  });
}

template <class T> void feed_forward(const Member &me, const mixtura_feed_forward &op) {
  const i64 F = op.up.out, D = op.down.out;
  const bool gated = op.gate.out != 0;
  T *inner = (T *)op.inner;
  {
    Inputs<T> inputs(me, op.h, op.norm, op.up.in);
    me.share((F + UNITS - 1) / UNITS, [&](i64 part) {
      float gate[MIXTURA_MAX_ROWS][UNITS];
      const i64 from = part * UNITS, to = least(F, from + UNITS);
      if (gated)
        products<T>(op.gate, from, to, inputs, [&](i64 b, i64 n, const float *c, i64 count) {
          for (i64 i = 0; i < count; i += W) store(gate[b] + n - from + i, activate(op.activation, load(c + i)));
        });
      products<T>(op.up, from, to, inputs, [&](i64 b, i64 n, const float *c, i64 count) {
        for (i64 i = 0; i < count; i += W) {
          const V up = load(c + i);
          const V unit = gated ? load(gate[b] + n - from + i) * up : activate(op.activation, up);
          store_some(inner + b * F + n + i, unit, count - i);
        }
      });
    });
  }
  Inputs<T> inputs(me, inner, mixtura_norm{}, F);
  me.share((D + ROWS - 1) / ROWS, [&](i64 part) {
    products<T>(op.down, part * ROWS, least(D, (part + 1) * ROWS), inputs,
                [&](i64 b, i64 n, const float *c, i64 count) {
                  const V weight = op.by_row ? sigmoid(set(op.by_row[b])) : set(1.f);
                  float *x = op.x + b * D + n;
                  for (i64 i = 0; i < count; i += W)
                    store_some(x + i, load_some(x + i, count - i) + weight * load(c + i), count - i);
                });
  });
}

// Both phases of a call of experts, and what comes out of it added to x.
template <class T, class C> void phases(const Member &me, const mixtura_mixture &op, const C &call) {
  const mixtura_plan &plan = me.team.plan;
  const i64 F = op.experts.width, D = op.experts.dim, parts = (F + UNITS - 1) / UNITS;
  me.share(parts * plan.num_active, [&](i64 i) {
    call.first_phase(plan.active[i / parts], i % parts * UNITS, least(F, (i % parts + 1) * UNITS));
  });
  float *sum = plan.sums + omp_get_thread_num() * me.rows() * MIXTURA_COLUMNS;
  me.share((D + MIXTURA_COLUMNS - 1) / MIXTURA_COLUMNS, [&](i64 i) {
    const i64 from = i * MIXTURA_COLUMNS, to = least(D, from + MIXTURA_COLUMNS);
    call.second_phase(from, to, sum);
    for (i64 b = 0; b < me.rows(); b++)
      for (i64 d = from; d < to; d += W) {
        float *x = op.x + b * D + d;
        store_some(x, load_some(x, to - d) + load_some((const T *)op.out + b * D + d, to - d), to - d);
      }
  });
}

template <class T, int BITS, class A> void rounded_phases(const Member &me, const mixtura_mixture &op) {
  const QuantizedCall<T, BITS, A> call{me.team.plan};
  me.share(me.rows(), [&](i64 b) { call.round_token(b); });
  phases<T>(me, op, call);
}

template <class T> void mixture(const Member &me, const mixtura_mixture &op) {
  if (me.next() == 0) mixtura_route(&op, me.rows(), me.tape.threads, &me.team.plan);
  me.wait();
  if (!op.quantized) return phases<T>(me, op, Call<T>{me.team.plan});
  const bool eight = op.quantized->bits == 8;
#if MIXTURA_LANES == 16 && defined(__AVX512VNNI__)
  if (op.quantized->levels <= 127)
    return eight ? rounded_phases<T, 8, int8_t>(me, op) : rounded_phases<T, 4, int8_t>(me, op);
#endif
  eight ? rounded_phases<T, 8, int16_t>(me, op) : rounded_phases<T, 4, int16_t>(me, op);
}
}  // namespace MIXTURA_ISA
