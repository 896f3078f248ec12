// Chooses the instruction set when the library is loaded, and makes calls ready.
#include <omp.h>
#include <pthread.h>

#include <cstring>

#include "plan.h"
#include "team.h"

#define DECLARE(isa)                                       \
  extern "C" void mixtura_forward_##isa(const mixtura_plan *); \
  extern "C" void mixtura_backward_##isa(const mixtura_plan *); \
  extern "C" void mixtura_quantized_##isa(const mixtura_plan *); \
  extern "C" void mixtura_tape_##isa(const mixtura_tape *, mixtura_team *); \
  extern "C" float mixtura_read_##isa(const void *, int64_t, int);
DECLARE(portable)
#if defined(MIXTURA_X86)
DECLARE(avx2)
DECLARE(avx512)
DECLARE(avx512_bf16)
#endif

namespace {

struct Isa {
  const char *name;
  bool pairs;  // whether backward packs pairs of bfloat16
  mixtura_run forward, backward, quantized;
  mixtura_run_all tape;
  float (*read)(const void *, int64_t, int);
  bool (*there)();
};

#if defined(MIXTURA_X86)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
bool always() { return true; }

const Isa ISAS[] = {
#if defined(MIXTURA_X86)
    {"avx512_bf16", true, mixtura_forward_avx512_bf16, mixtura_backward_avx512_bf16, mixtura_quantized_avx512_bf16, mixtura_tape_avx512_bf16, mixtura_read_avx512_bf16, has_avx512_bf16},
    {"avx512", false, mixtura_forward_avx512, mixtura_backward_avx512, mixtura_quantized_avx512, mixtura_tape_avx512, mixtura_read_avx512, has_avx512},
    {"avx2", false, mixtura_forward_avx2, mixtura_backward_avx2, mixtura_quantized_avx2, mixtura_tape_avx2, mixtura_read_avx2, has_avx2},
#endif
    {"portable", false, mixtura_forward_portable, mixtura_backward_portable, mixtura_quantized_portable, mixtura_tape_portable, mixtura_read_portable, always},
};

const Isa *best() {
  const Isa *isa = ISAS;
  while (!isa->there()) isa++;
  return isa;
}

const Isa *current = best();

// A process that was forked has this thread alone, but OpenMP would wait for those that it had before, for ever. If there
// are such, the thread computes by itself from then on. Threads that are started in the new process have their own.
thread_local bool computed = false;
void after_fork() {
  if (computed) omp_set_max_active_levels(0);
}
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, after_fork);

const Isa *compute() {
  computed = true;
  return current;
}

constexpr int64_t WIDEST = 32;  // columns of a packed panel, at most

int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t up_to_line(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Parts of the workspace, each at the start of a cache line.
struct Parts {
  int64_t inner, sums, order, first, active, next, inner_gradient, packed, weight_gradients, scratch, scratch_size, end;

  Parts(const mixtura_experts &e, int64_t T, int64_t K, int threads, bool backward) {
    const int64_t bytes = e.dtype == MIXTURA_FLOAT32 ? 4 : 2, S = T * K, C = (e.gated ? 2 : 1) * e.width;
    // words are floats, or pairs of bfloat16 on some processors
    const int64_t word = current->pairs && bytes == 2 ? 2 : 1, CW = (C + word - 1) / word, DW = (e.dim + word - 1) / word;
    const int64_t FW = (e.width + word - 1) / word, tokens = least(S, mixtura_block(DW));
    inner = 0;
    sums = inner + up_to_line(S * FW * 4);
    order = sums + up_to_line(threads * T * MIXTURA_COLUMNS * 4);
    first = order + up_to_line(S * 4);
    active = first + up_to_line((e.num_experts + 1) * 8);
    next = active + up_to_line(e.num_experts * 8);
    inner_gradient = scratch = next + up_to_line(e.num_experts * 8);
    scratch_size = S >= MIXTURA_MANY && e.width ? up_to_line(most((tokens + 2 * WIDEST) * DW, WIDEST * FW) * 4) / 4 : 0;
    if (backward) {
      packed = inner_gradient + up_to_line(S * C * bytes);
      weight_gradients = packed + up_to_line(S * CW * 4);
      scratch = weight_gradients + up_to_line((e.width + MIXTURA_PART - 1) / MIXTURA_PART * S * 4);
      const int64_t slots = (S + word - 1) / word;
      const int64_t activation = (MIXTURA_TOKENS + WIDEST) * DW, outer = (MIXTURA_ROWS + WIDEST) * slots;
      scratch_size = up_to_line(most(most(activation, outer), WIDEST * CW) * 4) / 4;
    }
    end = scratch + threads * scratch_size * 4;
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

mixtura_plan call(const mixtura_experts *experts, const void *hidden, const float *weights, int64_t T, int64_t K,
                  int threads) {
  mixtura_plan plan;
  std::memset(&plan, 0, sizeof(plan));
  plan.experts = *experts, plan.hidden = hidden, plan.weights = weights;
  plan.T = T, plan.K = K, plan.threads = threads;
  return plan;
}

// Places of the workspace, and the slots in order. Returns the code of the call.
int prepare(mixtura_plan &plan, const int64_t *indices, char *base) {
  const mixtura_experts &e = plan.experts;
  if (e.dtype < MIXTURA_FLOAT32 || e.dtype > MIXTURA_BFLOAT16) return 2;
  if (e.activation < MIXTURA_IDENTITY || e.activation > MIXTURA_CLAMPED_SWIGLU) return 2;
  const Parts parts(e, plan.T, plan.K, plan.threads, plan.gradients != nullptr);
  int32_t *order = (int32_t *)(base + parts.order);
  int64_t *first = (int64_t *)(base + parts.first), *active = (int64_t *)(base + parts.active);
  plan.order = order, plan.first = first, plan.active = active;
  plan.inner = base + parts.inner, plan.sums = (float *)(base + parts.sums);
  plan.scratch = (float *)(base + parts.scratch), plan.scratch_size = parts.scratch_size;
  plan.inner_gradient = base + parts.inner_gradient;
  if (plan.gradients) {
    plan.packed = (float *)(base + parts.packed);
    plan.weight_gradients = (float *)(base + parts.weight_gradients);
  }
  return sort(plan, indices, order, first, active, (int64_t *)(base + parts.next));
}

// Places before those of `Parts`, for tokens and hidden units as blocks of whole numbers; the largest are of 72 bytes.
struct RoundedParts {
  int64_t inner, rest;

  RoundedParts(const mixtura_quantized &q, int64_t T, int64_t K) {
    inner = up_to_line(T * ((q.experts.dim + 31) / 32) * 72);
    rest = inner + up_to_line(T * K * ((q.experts.width + 31) / 32) * 72);
  }
};

mixtura_experts without_inner(const mixtura_quantized *q) {
  mixtura_experts experts = q->experts;
  experts.width = 0;
  return experts;
}
}  // namespace

extern "C" {

const char *mixtura_interface(void) { return MIXTURA_INTERFACE; }

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

mixtura_run_all mixtura_tape_of_isa(void) { return compute()->tape; }

int mixtura_prepare(mixtura_plan *plan, const int64_t *indices, char *workspace) {
  if (!plan->quantized) return prepare(*plan, indices, workspace);
  const RoundedParts parts(*plan->quantized, plan->T, plan->K);
  plan->experts = without_inner(plan->quantized);
  if (int code = prepare(*plan, indices, workspace + parts.rest)) return code;
  plan->rounded = workspace, plan->inner = workspace + parts.inner;
  return 0;
}

double mixtura_read_bandwidth(const void *bytes, int64_t count, int threads) {
  static volatile float kept;
  const double begin = omp_get_wtime();
  kept = compute()->read(bytes, count, threads);
  return count / (omp_get_wtime() - begin);
}

int64_t mixtura_workspace(const mixtura_experts *experts, int64_t T, int64_t K, int threads, int backward) {
  return Parts(*experts, T, K, threads, backward).end;
}

int mixtura_experts_forward(const mixtura_experts *experts, const void *hidden, const int64_t *indices,
                            const float *weights, void *out, void *kept, void *workspace, int64_t T, int64_t K,
                            int threads) {
  mixtura_plan plan = call(experts, hidden, weights, T, K, threads);
  plan.out = out, plan.kept = kept;
  if (int code = prepare(plan, indices, (char *)workspace)) return code;
  if (kept) {  // rows of empty slots
    const int64_t row = (experts->gated ? 2 : 1) * experts->width * (experts->dtype == MIXTURA_FLOAT32 ? 4 : 2);
    const int64_t filled = plan.first[experts->num_experts];
    std::memset((char *)kept + filled * row, 0, (T * K - filled) * row);
  }
  compute()->forward(&plan);
  return 0;
}

int64_t mixtura_quantized_workspace(const mixtura_quantized *experts, int64_t T, int64_t K, int threads) {
  return RoundedParts(*experts, T, K).rest + Parts(without_inner(experts), T, K, threads, false).end;
}

int mixtura_quantized_forward(const mixtura_quantized *experts, const void *hidden, const int64_t *indices,
                              const float *weights, void *out, void *workspace, int64_t T, int64_t K, int threads) {
  if ((experts->bits != 4 && experts->bits != 8) || experts->group < 32 || experts->group % 32) return 2;
  if (experts->levels != 127 && experts->levels != 32767) return 2;
  mixtura_plan plan = call(&experts->experts, hidden, weights, T, K, threads);
  plan.out = out, plan.quantized = experts;
  if (int code = mixtura_prepare(&plan, indices, (char *)workspace)) return code;
  compute()->quantized(&plan);
  return 0;
}

int mixtura_experts_backward(const mixtura_experts *experts, const void *hidden, const int64_t *indices,
                             const float *weights, const void *kept, const mixtura_gradients *gradients,
                             void *workspace, int64_t T, int64_t K, int threads) {
  mixtura_plan plan = call(experts, hidden, weights, T, K, threads);
  plan.gradients = gradients, plan.kept = (void *)kept;
  if (int code = prepare(plan, indices, (char *)workspace)) return code;
  for (int64_t s = 0; s < T * K; s++) gradients->weights[s] = 0;
  compute()->backward(&plan);
  return 0;
}
}
