// One token a sequence through a whole decoder: the operations of mixtura_decode.h, for one instruction set.
//
// All threads run all operations; parts of one are handed out by a counter, and a barrier ends it. Every output is
// summed by one thread in a fixed order: the same bits for any number of threads, and for any other rows beside it.
//
// Letters as in mixtura_decode.h; S positions that are scored at once, C positions of a chunk of attention.
#pragma once
#include <sched.h>

#include "kernels.h"
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
      __atomic_store_n(&team.generation, seen + 1, __ATOMIC_RELEASE);
      return;
    }
    for (i64 turns = 0; __atomic_load_n(&team.generation, __ATOMIC_ACQUIRE) == seen; turns++)
      if (turns > 20000) sched_yield();
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
  for (i64 i = 0; i < n; i += W) {
    V v = (load_some(x + i, n - i) - mean) * factor;
    if (norm.weight) v *= load_some((const T *)norm.weight + i, n - i) + norm.offset;
    if (norm.bias) v += load_some((const T *)norm.bias + i, n - i);
    store_some(y + i, v, n - i);
  }
}

// Rows of one input, of the type of the tape and, if a product needs it, in float32.
template <class T> struct Inputs {
  const T *row[MIXTURA_MAX_ROWS];
  const float *wide[MIXTURA_MAX_ROWS];

  // As they are, or normalized into the scratch of the thread.
  Inputs(const Member &me, const void *x, const mixtura_norm &norm, i64 n, bool widen = false) {
    T *narrow = (T *)me.scratch;
    float *floats = (float *)(me.scratch + me.rows() * n * sizeof(T) / 64 * 64 + 64);
    for (i64 b = 0; b < me.rows(); b++) {
      if (norm.kind)
        normalize<T>(norm, (const float *)x + b * n, n, narrow + b * n), row[b] = narrow + b * n;
      else
        row[b] = (const T *)x + b * n;
      if (!widen) continue;
      for (i64 i = 0; i < n; i += W) store_some(floats + b * n + i, load_some(row[b] + i, n - i), n - i);
      wide[b] = floats + b * n;
    }
  }
};

// sink(b, n, c, count) gets the products of row b with rows n .. n + count - 1 of the weights.
template <class T, class F>
void products(const mixtura_linear &linear, i64 from, i64 to, const T *const *a, i64 B, F sink) {
  constexpr i64 TILE = Tile<T>::M;
  const Projection<T> project{(const T *)linear.weight, (const T *)linear.bias, linear.out, linear.in, false};
  for (i64 n = from; n < to; n += 2 * W)
    for (i64 b = 0; b < B; b += TILE) {
      float c[TILE][2 * W] = {};
      const i64 M = least(TILE, B - b), count = least(2 * W, to - n);
      project(n, count, a + b, M, c);
      for (i64 m = 0; m < M; m++) sink(b + m, n, c[m], count);
    }
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

template <class T> void linears(const Member &me, const mixtura_linears &op) {
  bool widen = false;
  i64 parts[5] = {};
  for (i64 i = 0; i < op.count; i++) {
    widen = widen || op.linear[i].float32;
    parts[i + 1] = parts[i] + (op.linear[i].out + ROWS - 1) / ROWS;
  }
  const Inputs<T> inputs(me, op.x, op.norm, op.linear[0].in, widen);
  me.share(parts[op.count], [&](i64 part) {
    i64 i = 0;
    while (part >= parts[i + 1]) i++;
    const mixtura_linear &linear = op.linear[i];
    const i64 from = (part - parts[i]) * ROWS, to = least(linear.out, from + ROWS);
    const auto put = [&](i64 b, i64 n, const float *c, i64 count) {
      std::memcpy(op.out[i] + b * linear.out + n, c, sizeof(float) * count);
    };
    if (linear.float32)
      products<float>(linear, from, to, inputs.wide, me.rows(), put);
    else
      products<T>(linear, from, to, inputs.row, me.rows(), put);
  });
}

template <class T> void linear_add(const Member &me, const mixtura_linear_add &op) {
  const Inputs<T> inputs(me, op.y, mixtura_norm{}, op.linear.in);
  me.share((op.linear.out + ROWS - 1) / ROWS, [&](i64 part) {
    products<T>(op.linear, part * ROWS, least(op.linear.out, (part + 1) * ROWS), inputs.row, me.rows(),
                [&](i64 b, i64 n, const float *c, i64 count) {
                  float *x = op.x + b * op.linear.out + n;
                  for (i64 i = 0; i < count; i += W)
                    store_some(x + i, load_some(x + i, count - i) + load(c + i), count - i);
                });
  });
}

template <class T> void feed_forward(const Member &me, const mixtura_feed_forward &op) {
  const i64 F = op.up.out, D = op.down.out, B = me.rows();
  const Inputs<T> inputs(me, op.h, op.norm, op.up.in);
  T *inner = (T *)op.inner;
  me.share((F + UNITS - 1) / UNITS, [&](i64 part) {
    float gate[MIXTURA_MAX_ROWS][UNITS];
    const i64 from = part * UNITS, to = least(F, from + UNITS);
    if (op.gate.weight)
      products<T>(op.gate, from, to, inputs.row, B, [&](i64 b, i64 n, const float *c, i64 count) {
        for (i64 i = 0; i < count; i += W) store(gate[b] + n - from + i, activate(op.activation, load(c + i)));
      });
    products<T>(op.up, from, to, inputs.row, B, [&](i64 b, i64 n, const float *c, i64 count) {
      for (i64 i = 0; i < count; i += W) {
        const V up = load(c + i);
        const V unit = op.gate.weight ? load(gate[b] + n - from + i) * up : activate(op.activation, up);
        store_some(inner + b * F + n + i, unit, count - i);
      }
    });
  });
  const T *row[MIXTURA_MAX_ROWS];
  for (i64 b = 0; b < B; b++) row[b] = inner + b * F;
  me.share((D + ROWS - 1) / ROWS, [&](i64 part) {
    products<T>(op.down, part * ROWS, least(D, (part + 1) * ROWS), row, B,
                [&](i64 b, i64 n, const float *c, i64 count) {
                  const V weight = op.by_row ? sigmoid(set(op.by_row[b])) : set(1.f);
                  float *x = op.x + b * D + n;
                  for (i64 i = 0; i < count; i += W)
                    store_some(x + i, load_some(x + i, count - i) + weight * load(c + i), count - i);
                });
  });
}

template <class T> void mixture(const Member &me, const mixtura_mixture &op) {
  mixtura_plan &plan = me.team.plan;
  if (me.next() == 0) mixtura_route(&op, me.rows(), me.tape.threads, &plan);
  me.wait();
  const Call<T> call{plan};
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
}  // namespace MIXTURA_ISA
