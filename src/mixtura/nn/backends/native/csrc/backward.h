// Gradients of the experts. What enters the activations was kept by forward.
//
// S filled slots, in the order of the experts; x_s, y_s token and gradient of its output, w_s weight of slot s.
//
//     n = down^T y_s,  h = hidden units,  dw_s = n . h + y_s . bias,  dz = gradient of the activation at w_s n
//     dx_t += first^T dz,   dfirst += dz x_s^T,   ddown += y_s (w_s h)^T
//
// Every sum is taken by one thread, in an order that does not depend on their number.
#pragma once
#include "kernels.h"
#include "products.h"

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
  using Base::C, Base::D, Base::e, Base::F, Base::next, Base::plan;
  const mixtura_gradients &g = *plan.gradients;
  const i64 CW = words<T>(C), DW = words<T>(D);

  const T *token(i64 s) const { return (const T *)plan.hidden + plan.order[s] / plan.K * D; }
  const T *given(i64 s) const { return (const T *)g.out + plan.order[s] / plan.K * D; }
  T *inner(i64 s) const { return (T *)plan.inner + s * F; }
  T *inner_gradient(i64 s) const { return (T *)plan.inner_gradient + s * C; }

  // Hidden units from .. to of expert x: times their weight, and the gradients of what enters the activation.
  void through_activation(i64 x, i64 from, i64 to, float *scratch) const {
    float *part = plan.weight_gradients + from / MIXTURA_PART * plan.first[e.num_experts];
    float *y = scratch, *panel = scratch + MIXTURA_TOKENS * DW;
    for (i64 s = plan.first[x]; s < plan.first[x + 1]; s++) part[s] = 0;
    split(plan.first[x], plan.first[x + 1], MIXTURA_TOKENS, [&](i64 b, i64 block) {
      split(b, b + block, HEIGHT, [&](i64 m, i64 M) {
        pack_along<T>([&](i64 i) { return given(m + i); }, M, M, D, y + (m - b) * DW);
      });
      for (i64 f = from; f < to; f += 2 * W) {
        pack_down(x, f, panel);
        split(b, b + block, HEIGHT, [&](i64 m, i64 M) {
          float n[HEIGHT][2 * W];
          product<T>(M, y + (m - b) * DW, panel, DW, n);
          for (i64 i = 0; i < M; i++) part[m + i] += keep(m + i, f, least(2 * W, to - f), n[i]);
        });
      }
    });
  }

  // Columns f .. f + 2W - 1 of the second projection's transpose.
  void pack_down(i64 x, i64 f, float *panel) const {
    const T *down = (const T *)e.down + x * D * F;
    if (e.transposed)
      pack_along<T>([&](i64 i) { return down + (f + i) * D; }, F - f, 2 * W, D, panel);
    else
      pack_across<T>([&](i64 k) { return down + k * F + f; }, 2 * W, F - f, D, panel);
  }

  // Columns d .. d + 2W - 1 of the first projection's transpose.
  void pack_first(i64 x, i64 d, float *panel) const {
    const T *first = (const T *)e.first + x * C * D;
    if (e.transposed)
      pack_along<T>([&](i64 i) { return first + (d + i) * C; }, D - d, 2 * W, C, panel);
    else
      pack_across<T>([&](i64 k) { return first + k * D + d; }, 2 * W, D - d, C, panel);
  }

  // Stores n units of a slot and their gradients; returns the part of the gradient of its weight.
  float keep(i64 s, i64 f, i64 n, const float *given) const {
    float gate[2 * W] = {}, up[2 * W] = {};
    const float w = plan.weights[plan.order[s]];
    take((const T *)plan.kept + s * C, f, n, gate, up);
    V sum[1] = {};
    for (i64 i = 0; i < n; i += W) {
      V by_gate, by_up, n_f = load(given + i);
      if (n - i < W)
        for (i64 j = n - i; j < W; j++) n_f[j] = 0;
      V h = differentiate(e, load(gate + i), load(up + i), by_gate, by_up);
      sum[0] += n_f * h;
      store(gate + i, w * n_f * by_gate);
      store(up + i, w * n_f * by_up);
      store_some(inner(s) + f + i, w * h, n - i);
    }
    Base::put(gate, up, f, n, inner_gradient(s));
    return sums<1>(sum)[0];
  }

  void take(const T *row, i64 f, i64 n, float *gate, float *up) const {
    if (n == 2 * W && !e.interleaved)
      for (i64 i = 0; i < n; i += W) {
        store(gate + i, load(row + f + i));
        if (e.gated) store(up + i, load(row + F + f + i));
      }
    else
      for (i64 i = 0; i < n; i++) {
        gate[i] = load1(row + (e.gated && e.interleaved ? 2 * (f + i) : f + i));
        if (e.gated) up[i] = load1(row + (e.interleaved ? 2 * (f + i) + 1 : F + f + i));
      }
  }

  void pack_gradients(i64 x) const {
    split(plan.first[x], plan.first[x + 1], HEIGHT, [&](i64 m, i64 M) {
      pack_along<T>([&](i64 i) { return inner_gradient(m + i); }, M, M, C, plan.packed + m * CW);
    });
  }

  // Columns from .. to of the gradient of all tokens.
  void to_tokens(i64 from, i64 to, float *sum, float *panel) const {
    std::memset(sum, 0, plan.T * MIXTURA_COLUMNS * sizeof(float));
    for (i64 i = 0; i < plan.num_active; i++)
      for (i64 d = from; d < to; d += 2 * W) {
        const i64 x = plan.active[i];
        pack_first(x, d, panel);
        split(plan.first[x], plan.first[x + 1], HEIGHT, [&](i64 m, i64 M) {
          float c[HEIGHT][2 * W];
          product<T>(M, plan.packed + m * CW, panel, CW, c);
          for (i64 j = 0; j < M; j++) {
            float *row = sum + plan.order[m + j] / plan.K * MIXTURA_COLUMNS + d - from;
            store(row, load(row) + load(c[j]));
            store(row + W, load(row + W) + load(c[j] + W));
          }
        });
      }
    for (i64 t = 0; t < plan.T; t++)
      for (i64 d = from; d < to; d += W)
        store_some((T *)g.hidden + t * D + d, load(sum + t * MIXTURA_COLUMNS + d - from), least(W, to - d));
  }

  // out[i][j] = sum over the slots of expert x of a(s)[i] b(s)[j], for rows i from .. to and all columns
  template <class A, class B>
  void outer(i64 x, i64 from, i64 to, i64 rows, i64 columns, A a, B b, T *out, float *scratch) const {
    const i64 begin = plan.first[x], n = plan.first[x + 1] - begin, steps = words<T>(n);
    float *left = scratch, *panel = scratch + MIXTURA_ROWS * steps;
    split(from, to, HEIGHT, [&](i64 i, i64 M) {
      pack_across<T>([&](i64 s) { return a(begin + s) + i; }, M, rows - i, n, left + (i - from) * steps);
    });
    for (i64 j = 0; j < columns; j += 2 * W) {
      pack_across<T>([&](i64 s) { return b(begin + s) + j; }, 2 * W, columns - j, n, panel);
      split(from, to, HEIGHT, [&](i64 i, i64 M) {
        float c[HEIGHT][2 * W];
        product<T>(M, left + (i - from) * steps, panel, steps, c);
        for (i64 m = 0; m < M; m++)
          for (i64 k = 0; k < least(2 * W, columns - j); k += W)
            store_some(out + (i + m) * columns + j + k, load(c[m] + k), columns - j - k);
      });
    }
  }

  // Rows from .. to of the gradient of the first projection of expert x, and of the second.
  void to_first(i64 x, i64 from, i64 to, float *scratch) const {
    T *out = (T *)g.first + x * C * D;
    auto z = [this](i64 s) { return (const T *)inner_gradient(s); };
    auto t = [this](i64 s) { return token(s); };
    if (e.transposed)
      outer(x, from, to, D, C, t, z, out, scratch);
    else
      outer(x, from, to, C, D, z, t, out, scratch);
  }

  void to_down(i64 x, i64 from, i64 to, float *scratch) const {
    T *out = (T *)g.down + x * D * F;
    auto h = [this](i64 s) { return (const T *)inner(s); };
    auto y = [this](i64 s) { return given(s); };
    if (e.transposed)
      outer(x, from, to, F, D, h, y, out, scratch);
    else
      outer(x, from, to, D, F, y, h, out, scratch);
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

  // Experts without a slot are not computed, their gradients are zeros all the same.
  bool is_idle(i64 x) const { return plan.first[x] == plan.first[x + 1]; }

  void weights_of(i64 x, i64 part, i64 parts_first, i64 parts_down, i64 parts, float *scratch) const {
    const i64 rows_first = e.transposed ? D : C, rows_down = e.transposed ? F : D;
    if (part < parts_first) {
      const i64 from = part * MIXTURA_ROWS, to = least(rows_first, from + MIXTURA_ROWS), n = C * D / rows_first;
      if (!is_idle(x)) return to_first(x, from, to, scratch);
      std::memset((T *)g.first + x * C * D + from * n, 0, (to - from) * n * sizeof(T));
    } else if (part < parts_first + parts_down) {
      const i64 from = (part - parts_first) * MIXTURA_ROWS, to = least(rows_down, from + MIXTURA_ROWS);
      const i64 n = D * F / rows_down;
      if (!is_idle(x)) return to_down(x, from, to, scratch);
      std::memset((T *)g.down + x * D * F + from * n, 0, (to - from) * n * sizeof(T));
    } else {
      to_biases(x), to_weights(x, parts);
    }
  }

  void operator()() const {
    const i64 parts = (F + MIXTURA_PART - 1) / MIXTURA_PART, columns = (D + MIXTURA_COLUMNS - 1) / MIXTURA_COLUMNS;
    const i64 parts_first = g.first ? ((e.transposed ? D : C) + MIXTURA_ROWS - 1) / MIXTURA_ROWS : 0;
    const i64 parts_down = g.down ? ((e.transposed ? F : D) + MIXTURA_ROWS - 1) / MIXTURA_ROWS : 0;
    const i64 each = parts_first + parts_down + 1;
    i64 unit = 0, expert = 0, column = 0, row = 0;
#pragma omp parallel num_threads(plan.threads)
    {
      float *scratch = plan.scratch + omp_get_thread_num() * plan.scratch_size;
      float *sum = plan.sums + omp_get_thread_num() * plan.T * MIXTURA_COLUMNS;
      for (i64 i; (i = next(unit)) < parts * plan.num_active;)
        through_activation(plan.active[i / parts], i % parts * MIXTURA_PART, least(F, (i % parts + 1) * MIXTURA_PART),
                           scratch);
#pragma omp barrier
      if (g.hidden) {
        for (i64 i; (i = next(expert)) < plan.num_active;) pack_gradients(plan.active[i]);
#pragma omp barrier
        for (i64 i; (i = next(column)) < columns;)
          to_tokens(i * MIXTURA_COLUMNS, least(D, (i + 1) * MIXTURA_COLUMNS), sum, scratch);
      }
      for (i64 i; (i = next(row)) < each * e.num_experts;)
        weights_of(i / each, i % each, parts_first, parts_down, parts, scratch);
    }
  }
};

inline void backward(const mixtura_plan *plan) {
  if (plan->experts.dtype == MIXTURA_FLOAT32)
    Gradients<float>{{*plan}}();
  else
    Gradients<bf16>{{*plan}}();
}
}  // namespace MIXTURA_ISA
