// Gradients of the experts. Nothing is kept from forward: hidden units are computed again.
//
// S filled slots, in the order of the experts; x_s, y_s token and gradient of its output, w_s weight of slot s.
//
//     n = down^T y_s,  h = hidden units,  dw_s = n . h + y_s . bias,  dz = gradient of the activation at w_s n
//     dx_t += first^T dz,   dfirst += dz x_s^T,   ddown += y_s (w_s h)^T
#pragma once
#include "kernels.h"

namespace MIXTURA_ISA {

inline V slope(int kind, V x) {
  switch (kind) {
    case MIXTURA_SILU: {
      V s = sigmoid(x);
      return s * (1.f + x * (1.f - s));
    }
    case MIXTURA_GELU: return .5f * (1.f + erf(x * .707106781f)) + x * .398942280f * exp(-.5f * x * x);
    case MIXTURA_GELU_TANH: {
      V t = tanh(.797884561f * (x + .044715f * x * x * x));
      return .5f * (1.f + t) + .5f * x * (1.f - t * t) * .797884561f * (1.f + 3 * .044715f * x * x);
    }
    case MIXTURA_QUICK_GELU: {
      V s = sigmoid(1.702f * x);
      return s * (1.f + 1.702f * x * (1.f - s));
    }
    case MIXTURA_RELU: return x > 0.f ? set(1.f) : V{};
    case MIXTURA_RELU2: return 2.f * max(x, V{});
    default: return set(1.f);
  }
}

// Hidden unit, and its derivatives by gate and up (of plain experts: by the unit's sum and 0).
inline V differentiate(const mixtura_experts &e, V gate, V up, V &by_gate, V &by_up) {
  if (e.activation == MIXTURA_CLAMPED_SWIGLU) {
    V g = min(gate, set(e.limit)), u = min(max(up, set(-e.limit)), set(e.limit)), s = sigmoid(e.alpha * g);
    by_gate = gate <= e.limit ? (u + 1.f) * (s + e.alpha * g * s * (1.f - s)) : V{};
    by_up = (up >= -e.limit) & (up <= e.limit) ? g * s : V{};
    return (u + 1.f) * g * s;
  }
  V a = activate(e.activation, gate);
  by_up = e.gated ? a : V{};
  by_gate = e.gated ? slope(e.activation, gate) * up : slope(e.activation, gate);
  return e.gated ? a * up : a;
}

template <class T> struct Gradients : Call<T> {
  using Base = Call<T>;
  using Base::C, Base::D, Base::e, Base::F, Base::plan;
  static constexpr i64 TILE = Base::TILE;
  const mixtura_gradients &g = *plan.gradients;

  const T *token(i64 s) const { return (const T *)plan.hidden + plan.order[s] / plan.K * D; }
  const T *given(i64 s) const { return (const T *)g.out + plan.order[s] / plan.K * D; }
  T *inner(i64 s) const { return (T *)plan.inner + s * F; }
  T *inner_gradient(i64 s) const { return (T *)plan.inner_gradient + s * C; }

  // Hidden units from .. to of expert x: what is kept of them for the other phases.
  void through_activation(i64 x, i64 from, i64 to) const {
    const Projection<T> project = Base::first(x);
    const Projection<T> back{Base::down(x).weight, nullptr, F, D, !e.transposed};
    const i64 filled = plan.first[e.num_experts];
    float *part = plan.weight_gradients + from / UNITS * filled;
    for (i64 m = plan.first[x]; m < plan.first[x + 1]; m += TILE) {
      const i64 M = least(TILE, plan.first[x + 1] - m);
      const T *a[TILE], *y[TILE];
      for (i64 i = 0; i < M; i++) a[i] = token(m + i), y[i] = given(m + i), part[m + i] = 0;
      for (i64 f = from; f < to; f += 2 * W) {
        const i64 n = least(2 * W, to - f);
        float gate[TILE][2 * W] = {}, up[TILE][2 * W] = {}, d[TILE][2 * W] = {};
        Base::preactivations(project, a, M, f, n, gate, up);
        back(f, n, y, M, d);
        for (i64 i = 0; i < M; i++) part[m + i] += keep(m + i, f, n, gate[i], up[i], d[i]);
      }
    }
  }

  // Stores n units of a slot and their gradients; returns the part of the gradient of its weight.
  float keep(i64 s, i64 f, i64 n, float *gate, float *up, const float *d) const {
    const float w = plan.weights[plan.order[s]];
    V sum[1] = {};
    for (i64 i = 0; i < n; i += W) {
      V by_gate, by_up, n_f = load(d + i);
      V h = differentiate(e, load(gate + i), load(up + i), by_gate, by_up);
      sum[0] += n_f * h;
      store(gate + i, w * n_f * by_gate);
      store(up + i, w * n_f * by_up);
      store_some(inner(s) + f + i, w * h, n - i);
    }
    T *z = inner_gradient(s);
    if (e.gated && e.interleaved)
      for (i64 i = 0; i < n; i++) store1(z + 2 * (f + i), gate[i]), store1(z + 2 * (f + i) + 1, up[i]);
    else
      for (i64 i = 0; i < n; i += W) {
        store_some(z + f + i, load(gate + i), n - i);
        if (e.gated) store_some(z + F + f + i, load(up + i), n - i);
      }
    return sums<1>(sum)[0];
  }

  // Columns from .. to of the gradient of all tokens.
  void to_tokens(i64 from, i64 to, float *sum) const {
    for (i64 i = 0; i < plan.T * MIXTURA_COLUMNS; i++) sum[i] = 0;
    for (i64 i = 0; i < plan.num_active; i++) {
      const i64 x = plan.active[i], end = plan.first[x + 1];
      const Projection<T> back{Base::first(x).weight, nullptr, D, C, !e.transposed};
      for (i64 m = plan.first[x]; m < end; m += TILE) {
        const i64 M = least(TILE, end - m);
        const T *z[TILE];
        for (i64 j = 0; j < M; j++) z[j] = inner_gradient(m + j);
        for (i64 d = from; d < to; d += 2 * W) {
          float c[TILE][2 * W] = {};
          const i64 n = least(2 * W, to - d);
          back(d, n, z, M, c);
          for (i64 j = 0; j < M; j++)
            for (i64 k = 0; k < n; k++) sum[plan.order[m + j] / plan.K * MIXTURA_COLUMNS + d - from + k] += c[j][k];
        }
      }
    }
    for (i64 t = 0; t < plan.T; t++)
      for (i64 d = from; d < to; d += W)
        store_some((T *)g.hidden + t * D + d, load(sum + t * MIXTURA_COLUMNS + d - from), least(W, to - d));
  }

  // out[i][j] = sum over the slots of expert x of a_s[i] b_s[j], for rows i from .. to and all columns
  template <class A, class B> void outer(i64 x, i64 from, i64 to, i64 columns, A a, B b, T *out) const {
    for (i64 i = from; i < to; i += TILE)
      for (i64 j = 0; j < columns; j += 2 * W) {
        const i64 M = least(TILE, to - i), n = least(2 * W, columns - j);
        if (M == TILE && n == 2 * W)
          outer_tile(x, i, j, a, b, out, columns);
        else
          outer_rest(x, i, j, M, n, a, b, out, columns);
      }
  }

  template <class A, class B> void outer_tile(i64 x, i64 i, i64 j, A a, B b, T *out, i64 columns) const {
    V sum[2 * TILE] = {};
    for (i64 s = plan.first[x]; s < plan.first[x + 1]; s++) {
      const T *left = a(s) + i, *right = b(s) + j;
      V b0 = load(right), b1 = load(right + W);
#pragma GCC unroll 8
      for (int m = 0; m < TILE; m++) {
        V value = set(load1(left + m));
        sum[2 * m] += value * b0;
        sum[2 * m + 1] += value * b1;
      }
    }
    for (int m = 0; m < TILE; m++) {
      store(out + (i + m) * columns + j, sum[2 * m]);
      store(out + (i + m) * columns + j + W, sum[2 * m + 1]);
    }
  }

  template <class A, class B>
  void outer_rest(i64 x, i64 i, i64 j, i64 M, i64 n, A a, B b, T *out, i64 columns) const {
    for (i64 m = 0; m < M; m++)
      for (i64 k = 0; k < n; k += W) {
        const i64 few = least(W, n - k);
        float sum[W] = {};
        for (i64 s = plan.first[x]; s < plan.first[x + 1]; s++)
          for (i64 l = 0; l < few; l++) sum[l] += load1(a(s) + i + m) * load1(b(s) + j + k + l);
        store_some(out + (i + m) * columns + j + k, load(sum), few);
      }
  }

  // Rows from .. to of the gradient of the first projection of expert x, and of the second.
  void to_first(i64 x, i64 from, i64 to) const {
    T *out = (T *)g.first + x * C * D;
    auto z = [this](i64 s) { return (const T *)inner_gradient(s); };
    auto t = [this](i64 s) { return token(s); };
    if (e.transposed)
      outer(x, from, to, C, t, z, out);
    else
      outer(x, from, to, D, z, t, out);
  }

  void to_down(i64 x, i64 from, i64 to) const {
    T *out = (T *)g.down + x * D * F;
    auto h = [this](i64 s) { return (const T *)inner(s); };
    auto y = [this](i64 s) { return given(s); };
    if (e.transposed)
      outer(x, from, to, D, h, y, out);
    else
      outer(x, from, to, F, y, h, out);
  }

  void to_biases(i64 x) const {
    for (i64 c = 0; g.first_bias && c < C; c++) {
      float sum = 0;
      for (i64 s = plan.first[x]; s < plan.first[x + 1]; s++) sum += load1(inner_gradient(s) + c);
      store1((T *)g.first_bias + x * C + c, sum);
    }
    for (i64 d = 0; g.down_bias && d < D; d++) {
      float sum = 0;
      for (i64 s = plan.first[x]; s < plan.first[x + 1]; s++) sum += plan.weights[plan.order[s]] * load1(given(s) + d);
      store1((T *)g.down_bias + x * D + d, sum);
    }
  }

  void to_weights(i64 x, i64 parts) const {
    const i64 filled = plan.first[e.num_experts];
    const T *bias = e.down_bias ? (const T *)e.down_bias + x * D : nullptr;
    for (i64 s = plan.first[x]; s < plan.first[x + 1]; s++) {
      float sum = 0;
      for (i64 p = 0; p < parts; p++) sum += plan.weight_gradients[p * filled + s];
      for (i64 d = 0; bias && d < D; d++) sum += load1(bias + d) * load1(given(s) + d);
      g.weights[plan.order[s]] = sum;
    }
  }

  void operator()() const {
    const i64 parts = (F + UNITS - 1) / UNITS, columns = (D + MIXTURA_COLUMNS - 1) / MIXTURA_COLUMNS;
    const i64 rows_first = e.transposed ? D : C, rows_down = e.transposed ? F : D;
    const i64 parts_first = g.first ? (rows_first + ROWS - 1) / ROWS : 0, parts_down = g.down ? (rows_down + ROWS - 1) / ROWS : 0;
    i64 unit = 0, column = 0, row = 0;
#pragma omp parallel num_threads(plan.threads)
    {
      for (i64 i; (i = take(unit)) < parts * plan.num_active;)
        through_activation(plan.active[i / parts], i % parts * UNITS, least(F, (i % parts + 1) * UNITS));
#pragma omp barrier
      float *sum = plan.sums + omp_get_thread_num() * plan.T * MIXTURA_COLUMNS;
      for (i64 i; g.hidden && (i = take(column)) < columns;)
        to_tokens(i * MIXTURA_COLUMNS, least(D, (i + 1) * MIXTURA_COLUMNS), sum);
      const i64 each = parts_first + parts_down + 1;
      for (i64 i; (i = take(row)) < each * plan.num_active;) {
        const i64 x = plan.active[i / each], part = i % each;
        if (part < parts_first)
          to_first(x, part * ROWS, least(rows_first, (part + 1) * ROWS));
        else if (part < parts_first + parts_down)
          to_down(x, (part - parts_first) * ROWS, least(rows_down, (part - parts_first + 1) * ROWS));
        else
          to_biases(x), to_weights(x, parts);
      }
    }
  }

  static constexpr i64 ROWS = 8 * TILE;  // of a gradient of weights, in a task
  static i64 take(i64 &next) { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }
};

inline void backward(const mixtura_plan *plan) {
  if (plan->experts.dtype == MIXTURA_FLOAT32)
    Gradients<float>{{*plan}}();
  else
    Gradients<bf16>{{*plan}}();
}
}  // namespace MIXTURA_ISA
