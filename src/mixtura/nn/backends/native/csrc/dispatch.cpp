// Chooses the instruction set when the library is loaded, and makes calls ready.
#include <cstring>

#include "plan.h"

#define DECLARE(isa) extern "C" void mixtura_forward_##isa(const mixtura_plan *);
DECLARE(portable)
#if defined(MIXTURA_X86)
DECLARE(avx2)
DECLARE(avx512)
DECLARE(avx512_bf16)
#endif

namespace {

struct Isa {
  const char *name;
  mixtura_forward forward;
  bool (*there)();
};

#if defined(MIXTURA_X86)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
bool always() { return true; }

const Isa ISAS[] = {
#if defined(MIXTURA_X86)
    {"avx512_bf16", mixtura_forward_avx512_bf16, has_avx512_bf16},
    {"avx512", mixtura_forward_avx512, has_avx512},
    {"avx2", mixtura_forward_avx2, has_avx2},
#endif
    {"portable", mixtura_forward_portable, always},
};

const Isa *best() {
  const Isa *isa = ISAS;
  while (!isa->there()) isa++;
  return isa;
}

const Isa *current = best();

int64_t up_to_line(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Parts of the workspace, each at the start of a cache line.
struct Parts {
  int64_t inner, sums, order, first, active, next, end;

  Parts(const mixtura_experts &e, int64_t T, int64_t K, int threads) {
    inner = 0;
    sums = inner + up_to_line(T * K * e.width * (e.dtype == MIXTURA_FLOAT32 ? 4 : 2));
    order = sums + up_to_line(threads * T * MIXTURA_COLUMNS * 4);
    first = order + up_to_line(T * K * 4);
    active = first + up_to_line((e.num_experts + 1) * 8);
    next = active + up_to_line(e.num_experts * 8);
    end = next + up_to_line(e.num_experts * 8);
  }
};

// Counting sort of the slots by expert. Returns 1 for a negative index.
int sort(mixtura_plan &plan, const int64_t *indices, int32_t *order, int64_t *first, int64_t *active, int64_t *next) {
  const int64_t E = plan.experts.num_experts, S = plan.T * plan.K;
  std::memset(first, 0, (E + 1) * 8);
  for (int64_t s = 0; s < S; s++) {
    if (indices[s] < 0) return 1;
    if (indices[s] < E) first[indices[s] + 1]++;
  }
  for (int64_t e = 0; e < E; e++) {
    if (first[e + 1]) active[plan.num_active++] = e;
    next[e] = first[e];
    first[e + 1] += first[e];
  }
  for (int64_t s = 0; s < S; s++)
    if (indices[s] < E) order[next[indices[s]]++] = (int32_t)s;
  return 0;
}
}  // namespace

extern "C" {

const char *mixtura_isa(void) { return current->name; }

const char *mixtura_isas(void) {
  static char names[64];
  if (!names[0])
    for (const Isa &isa : ISAS)
      if (isa.there()) {
        if (names[0]) std::strcat(names, " ");
        std::strcat(names, isa.name);
      }
  return names;
}

int mixtura_use_isa(const char *name) {
  for (const Isa &isa : ISAS)
    if (!std::strcmp(isa.name, name) && isa.there()) {
      current = &isa;
      return 0;
    }
  return 1;
}

int64_t mixtura_workspace(const mixtura_experts *experts, int64_t T, int64_t K, int threads) {
  return Parts(*experts, T, K, threads).end;
}

int mixtura_experts_forward(const mixtura_experts *experts, const void *hidden, const int64_t *indices,
                            const float *weights, void *out, void *workspace, int64_t T, int64_t K, int threads) {
  if (experts->dtype < MIXTURA_FLOAT32 || experts->dtype > MIXTURA_BFLOAT16) return 2;
  if (experts->activation < MIXTURA_IDENTITY || experts->activation > MIXTURA_CLAMPED_SWIGLU) return 2;
  const Parts parts(*experts, T, K, threads);
  char *base = (char *)workspace;
  int32_t *order = (int32_t *)(base + parts.order);
  int64_t *first = (int64_t *)(base + parts.first), *active = (int64_t *)(base + parts.active);
  mixtura_plan plan{*experts, hidden, weights, out, T, K, threads, order, first, active, 0, base + parts.inner,
                    (float *)(base + parts.sums)};
  if (sort(plan, indices, order, first, active, (int64_t *)(base + parts.next))) return 1;
  current->forward(&plan);
  return 0;
}
}
