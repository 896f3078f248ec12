// The experts' forward: those with many tokens by products of packed matrices, the others by dot products.
//
// Packed are the tokens of an expert, in tiles of at most HEIGHT, and 2W rows of its weights at a time. Hidden units are
// packed as they come out of the activation: they lie in plan.inner as the tiles of the second projection.
//
// Sums are taken in another order than by dot products, so that the last bits of a token depend on whether its expert has
// many; never on the number of threads.
#pragma once
#include "kernels.h"

namespace MIXTURA_ISA {

template <class T> struct Forward : Call<T> {
  using Base = Call<T>;
  using Base::C, Base::D, Base::e, Base::F, Base::next, Base::plan;
  const i64 DW = words<T>(D), FW = words<T>(F);

  bool is_many(i64 x) const { return plan.first[x + 1] - plan.first[x] >= MIXTURA_MANY; }
  float *hidden_tile(i64 m) const { return (float *)Base::inner(m); }

  // f(m, M) for tiles of the slots from .. to of an expert: the same tiles whatever is computed of them.
  template <class Do> static void tiles(i64 from, i64 to, Do f) { split(from, to, HEIGHT, f); }

  // Slots of an expert whose tokens are packed at once.
  template <class Do> void blocks(i64 x, Do f) const {
    split(plan.first[x], plan.first[x + 1], mixtura_block(DW), f);
  }

  // Columns n .. n + 2W - 1 of a projection, of which `count` are there.
  static void pack(const Projection<T> &of, i64 n, i64 count, float *panel) {
    if (of.transposed)
      pack_across<T>([&](i64 k) { return of.weight + k * of.N + n; }, 2 * W, count, of.K, panel);
    else
      pack_along<T>([&](i64 i) { return of.weight + (n + i) * of.K; }, count, 2 * W, of.K, panel);
  }

  // What the product with the tile at m asks for of the panel at n, which comes next: the first two tiles ask for all.
  static const void *ahead(const Projection<T> &of, i64 n, i64 begin, i64 m) {
    if (of.transposed || m > begin + HEIGHT) return nullptr;
    return (const char *)(of.weight + n * of.K) + (m > begin) * words<T>(of.K) * LINE;
  }

  static void multiply(const Projection<T> &of, i64 n, i64 count, i64 M, const float *a, const float *panel, i64 steps,
                       float (*c)[2 * W], const void *ask) {
    product<T>(M, a, panel, steps, c, ask);
    if (!of.bias) return;
    T whole[2 * W];
    const T *bias = count >= 2 * W ? of.bias + n : padded(whole, of.bias + n, count, 2 * W);
    const V b0 = load(bias), b1 = load(bias + W);
    for (i64 m = 0; m < M; m++) store(c[m], load(c[m]) + b0), store(c[m] + W, load(c[m] + W) + b1);
  }

  // 2W hidden units from f on, as two panels of columns of the first projection; of plain experts there is one.
  struct Columns {
    i64 start[2], count[2], step;
  };
  Columns columns_of(i64 f, i64 n) const {
    if (!e.gated) return {{f, 0}, {n, 0}, 2 * W};
    if (!e.interleaved) return {{f, F + f}, {n, n}, 2 * W};
    return {{2 * f, 2 * f + 2 * W}, {least(2 * W, 2 * n), most(0, 2 * n - 2 * W)}, 4 * W};
  }

  // Hidden units from .. to of expert x for all of its tokens.
  void first_packed(i64 x, i64 from, i64 to, float *scratch) const {
    const Projection<T> project = Base::first(x);
    float *panels[] = {scratch, scratch + 2 * W * DW}, *tokens = scratch + 4 * W * DW;
    blocks(x, [&](i64 b, i64 block) {
      tiles(b, b + block, [&](i64 m, i64 M) {
        auto row = [&](i64 i) { return (const T *)plan.hidden + plan.order[m + i] / plan.K * D; };
        pack_along<T>(row, M, M, D, tokens + (m - b) * DW);
      });
      for (i64 f = from; f < to; f += 2 * W) {
        const i64 n = least(2 * W, to - f);
        const Columns of = columns_of(f, n);
        for (int i = 0; i < 2; i++)
          if (of.count[i]) pack(project, of.start[i], of.count[i], panels[i]);
        tiles(b, b + block, [&](i64 m, i64 M) {
          float c[2][HEIGHT][2 * W] = {};
          for (int i = 0; i < 2; i++)
            if (of.count[i])
              multiply(project, of.start[i], of.count[i], M, tokens + (m - b) * DW, panels[i], DW, c[i],
                       ahead(project, of.start[i] + of.step, b, m));
          if (e.gated && e.interleaved) separate(M, c[0], c[1]);
          activate_tile(m, M, f, n, c[0], c[1]);
        });
      }
    });
  }

  // Gates and up projections that lie one beside the other.
  static void separate(i64 M, float (*gate)[2 * W], float (*up)[2 * W]) {
    constexpr auto lanes = std::make_index_sequence<W>{};
    for (i64 m = 0; m < M; m++) {
      const V a = load(gate[m]), b = load(gate[m] + W), c = load(up[m]), d = load(up[m] + W);
      store(gate[m], every_other<0>(a, b, lanes)), store(gate[m] + W, every_other<0>(c, d, lanes));
      store(up[m], every_other<1>(a, b, lanes)), store(up[m] + W, every_other<1>(c, d, lanes));
    }
  }

  void activate_tile(i64 m, i64 M, i64 f, i64 n, float (*gate)[2 * W], float (*up)[2 * W]) const {
    T unit[HEIGHT][2 * W];
    for (i64 i = 0; i < M; i++) {
      for (i64 j = 0; j < 2 * W; j += W) {
        const V x = load(gate[i] + j);
        store(unit[i] + j, e.gated ? combine(e, x, load(up[i] + j)) : activate(e.activation, x));
      }
      if (plan.kept) Base::put(gate[i], up[i], f, n, (T *)plan.kept + (m + i) * C);
    }
    pack_along<T>([&](i64 i) { return unit[i]; }, M, M, n, hidden_tile(m) + f / Words<T>::PER * M);
  }

  // Adds output columns d .. d + n - 1 of expert x; those of `after` at next come then.
  void second_packed(i64 x, i64 d, i64 n, float *sum, float *panel, i64 after, i64 next) const {
    const Projection<T> project = Base::down(x), then = Base::down(after);
    pack(project, d, n, panel);
    blocks(x, [&](i64 b, i64 block) {
      tiles(b, b + block, [&](i64 m, i64 M) {
        float c[HEIGHT][2 * W], *row[HEIGHT];
        for (i64 j = 0; j < M; j++) {
          row[j] = sum + plan.order[m + j] / plan.K * MIXTURA_COLUMNS;
          for (i64 i = 0; i < 2 * W; i += W) __builtin_prefetch(row[j] + i, 1, 3);
        }
        multiply(project, d, n, M, hidden_tile(m), panel, FW, c, ahead(then, next, plan.first[x], m));
        for (i64 j = 0; j < M; j++) {
          const V w = set(plan.weights[plan.order[m + j]]);
          for (i64 i = 0; i < 2 * W; i += W) store(row[j] + i, load(row[j] + i) + w * load(c[j] + i));
        }
      });
    });
  }

  void second_phase(i64 from, i64 to, float *sum, float *scratch) const {
    std::memset(sum, 0, plan.T * MIXTURA_COLUMNS * sizeof(float));
    for (i64 i = 0; i < plan.num_active; i++) {
      const i64 x = plan.active[i], after = plan.active[least(i + 1, plan.num_active - 1)];
      if (!is_many(x)) {
        Base::add_expert(x, from, to, sum);
        continue;
      }
      for (i64 d = from; d < to; d += 2 * W) {
        const bool last = d + 2 * W >= to;
        second_packed(x, d, least(2 * W, to - d), sum + d - from, scratch, last ? after : x, last ? from : d + 2 * W);
      }
    }
    Base::put_sums(from, to, sum);
  }

  void operator()() const {
    const i64 parts = (F + UNITS - 1) / UNITS, columns = (D + MIXTURA_COLUMNS - 1) / MIXTURA_COLUMNS;
    i64 unit = 0, column = 0;
#pragma omp parallel num_threads(plan.threads)
    {
      float *sum = plan.sums + omp_get_thread_num() * plan.T * MIXTURA_COLUMNS;
      float *scratch = plan.scratch + omp_get_thread_num() * plan.scratch_size;
      for (i64 i; (i = next(unit)) < parts * plan.num_active;)
        first_task(plan.active[i / parts], i % parts * UNITS, scratch);
#pragma omp barrier
      for (i64 i; (i = next(column)) < columns;)
        second_phase(i * MIXTURA_COLUMNS, least(D, (i + 1) * MIXTURA_COLUMNS), sum, scratch);
    }
  }

  // Of many tokens more units at once, because each task packs them anew.
  void first_task(i64 x, i64 from, float *scratch) const {
    if (!is_many(x)) return Base::first_phase(x, from, least(F, from + UNITS));
    if (from % MIXTURA_PART == 0) first_packed(x, from, least(F, from + MIXTURA_PART), scratch);
  }
};

inline void forward(const mixtura_plan *plan) {
  if (plan->experts.dtype == MIXTURA_FLOAT32)
    Forward<float>{{*plan}}();
  else
    Forward<bf16>{{*plan}}();
}
}  // namespace MIXTURA_ISA
