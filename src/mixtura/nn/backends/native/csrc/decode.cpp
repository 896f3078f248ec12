// What decoding does once for all instruction sets: choosing experts, sizes of workspaces, and the run of a tape.
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#include <cmath>
#include <cstring>

#include "team.h"

namespace {

int64_t up_to_line(int64_t bytes) { return (bytes + 63) / 64 * 64; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The K best of E by falling score, ties to the lowest index.
void best(const float *choice, int64_t E, int64_t K, int64_t *indices) {
  for (int64_t k = 0; k < K; k++) {
    int64_t chosen = -1;
    for (int64_t e = 0; e < E; e++) {
      bool taken = false;
      for (int64_t j = 0; j < k; j++) taken = taken || indices[j] == e;
      if (!taken && (chosen < 0 || choice[e] > choice[chosen])) chosen = e;
    }
    indices[k] = chosen;
  }
}

void softmax(const float *x, int64_t n, float *y) {
  float largest = x[0], sum = 0;
  for (int64_t i = 1; i < n; i++) largest = x[i] > largest ? x[i] : largest;
  for (int64_t i = 0; i < n; i++) sum += y[i] = std::exp(x[i] - largest);
  for (int64_t i = 0; i < n; i++) y[i] /= sum;
}

void scores(const mixtura_mixture &op, const float *x, int64_t n, float *y) {
  if (!op.sigmoid) return softmax(x, n, y);
  for (int64_t i = 0; i < n; i++) y[i] = 1 / (1 + std::exp(-x[i]));
}

// Experts and weights of one row; room for 2 E floats.
void choose(const mixtura_mixture &op, const float *logits, int64_t *indices, float *weights, float *room) {
  const int64_t E = op.experts.num_experts, K = op.slots;
  float *score = room, *choice = room + E;
  if (!op.choose_by_logits) scores(op, logits, E, score);
  for (int64_t e = 0; e < E; e++) choice[e] = (op.choose_by_logits ? logits : score)[e] + (op.bias ? op.bias[e] : 0);
  best(choice, E, K, indices);
  if (op.choose_by_logits) {
    for (int64_t k = 0; k < K; k++) score[k] = logits[indices[k]];
    scores(op, score, K, weights);
  } else {
    for (int64_t k = 0; k < K; k++) weights[k] = score[indices[k]];
  }
  float sum = 0;
  for (int64_t k = 0; k < K; k++) sum += weights[k];
  for (int64_t k = 0; k < K; k++) weights[k] = (op.renormalize && sum ? weights[k] / sum : weights[k]) * op.scale;
}

int64_t scratch_of(const mixtura_attention &a) {
  return up_to_line(4 * (a.heads / a.groups * (a.width + MIXTURA_SCORED) + a.width * (1 + a.heads)) + 128);
}

void run_one(int64_t kind, void *operands, char *scratch, int64_t scratch_bytes, const int64_t *starts, int64_t rows,
             int64_t length, int32_t dtype, int threads) {
  const mixtura_instruction instruction = {kind, operands};
  mixtura_tape tape = {};
  tape.instructions = &instruction, tape.count = 1, tape.dtype = dtype, tape.threads = threads;
  tape.rows = rows, tape.length = length, tape.starts = starts;
  tape.scratch = scratch, tape.scratch_bytes = scratch_bytes;
  mixtura_run_tape(&tape);
}

int64_t of_experts(const mixtura_mixture &op, int64_t rows, int threads) {
  return up_to_line(op.quantized ? mixtura_quantized_workspace(op.quantized, rows, op.slots, threads)
                                 : mixtura_workspace(&op.experts, rows, op.slots, threads, 0));
}
}  // namespace

extern "C" {

int64_t mixtura_mixture_workspace(const mixtura_mixture *op, int64_t rows, int threads) {
  return of_experts(*op, rows, threads) + up_to_line(rows * op->slots * 8) +
         up_to_line(rows * op->slots * 4) + up_to_line(op->experts.num_experts * 8);
}

void mixtura_route(const mixtura_mixture *op, int64_t rows, int threads, mixtura_plan *plan) {
  const int64_t K = op->slots, E = op->experts.num_experts;
  char *base = (char *)op->workspace;
  int64_t *indices = (int64_t *)(base + of_experts(*op, rows, threads));
  float *weights = (float *)((char *)indices + up_to_line(rows * K * 8));
  float *room = (float *)((char *)weights + up_to_line(rows * K * 4));
  for (int64_t b = 0; b < rows; b++) choose(*op, op->logits + b * E, indices + b * K, weights + b * K, room);
  std::memset(plan, 0, sizeof(*plan));
  plan->experts = op->experts, plan->hidden = op->h, plan->weights = weights, plan->out = op->out;
  plan->T = rows, plan->K = K, plan->threads = threads, plan->quantized = op->quantized;
  mixtura_prepare(plan, indices, base);
}

int64_t mixtura_tape_scratch(const mixtura_tape *tape, int64_t rows) {
  int64_t bytes = 64;
  for (int64_t i = 0; i < tape->count; i++) {
    const void *operands = tape->instructions[i].operands;
    int64_t widest = 0, attention = 0;
    switch (tape->instructions[i].op) {
      case MIXTURA_LINEARS: widest = ((const mixtura_linears *)operands)->linear[0].in; break;
      case MIXTURA_LINEAR_ADD: widest = ((const mixtura_linear_add *)operands)->linear.in; break;
      case MIXTURA_FEED_FORWARD: {
        const mixtura_feed_forward &f = *(const mixtura_feed_forward *)operands;
        widest = most(f.up.in, f.down.in);
        break;
      }
      case MIXTURA_ATTENTION: {
        attention = scratch_of(*(const mixtura_attention *)operands);
      }
    }
    // of the type of the tape, in float32, and as blocks of 32, of 72 bytes
    bytes = most(bytes, most(rows * (widest * 8 + (widest + 31) / 32 * 72) + 256, attention));
  }
  return up_to_line(bytes);
}

int64_t mixtura_attention_parts(const mixtura_attention *a, int64_t rows, int64_t capacity) {
  int64_t chunks = (capacity + MIXTURA_CHUNK - 1) / MIXTURA_CHUNK;
  if (a->window) chunks = least(chunks, (a->window + MIXTURA_CHUNK - 2) / MIXTURA_CHUNK + 1);
  return rows * a->heads * chunks * (a->width + 2);
}

void mixtura_linear_rows(const mixtura_linear *linear, const void *x, void *out, int64_t rows, int32_t dtype, int threads) {
  char nothing[64];  // a product of what is there as it is needs no scratch
  mixtura_linears op = {};
  op.x = x, op.count = 1, op.linear[0] = *linear, op.out[0] = out, op.narrow = 1;
  run_one(MIXTURA_LINEARS, &op, nothing, 0, nullptr, rows, 1, dtype, threads);
}

int64_t mixtura_attend_workspace(const mixtura_attention *attention, int64_t rows, int64_t length, int threads) {
  return up_to_line(4 * mixtura_attention_parts(attention, rows, length)) + threads * scratch_of(*attention);
}

void mixtura_attend(const mixtura_attention *attention, const int64_t *starts, char *workspace, int64_t rows, int64_t length,
                    int32_t dtype, int threads) {
  mixtura_attention op = *attention;
  op.parts = (float *)workspace;
  char *scratch = workspace + up_to_line(4 * mixtura_attention_parts(attention, rows, length));
  run_one(MIXTURA_ATTENTION, &op, scratch, scratch_of(op), starts, rows, length, dtype, threads);
}

void mixtura_sleep(mixtura_team *team, int32_t seen) {
#if defined(__linux__)
  __atomic_add_fetch(&team->sleepers, 1, __ATOMIC_SEQ_CST);
  syscall(SYS_futex, &team->generation, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);  // returns if it is another
  __atomic_sub_fetch(&team->sleepers, 1, __ATOMIC_SEQ_CST);
#else
  if (__atomic_load_n(&team->generation, __ATOMIC_ACQUIRE) == seen) sched_yield();
#endif
}

void mixtura_wake(mixtura_team *team) {
#if defined(__linux__)
  syscall(SYS_futex, &team->generation, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#else
  (void)team;
#endif
}

int mixtura_run_tape(const mixtura_tape *tape) {
  if (tape->rows > MIXTURA_MAX_ROWS) return 1;
  mixtura_team team;
  std::memset(&team, 0, sizeof(team));
  mixtura_tape_of_isa()(tape, &team);
  return 0;
}
}
