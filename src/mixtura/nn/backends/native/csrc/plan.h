// A call of the experts, made ready by dispatch.cpp and carried out by the kernels of one instruction set.
//
// The files of an instruction set use nothing of the standard library that has a body: the linker keeps one copy of an
// inline function, and that of a newer instruction set would then run on every processor.
#pragma once
#include "mixtura_native.h"

typedef struct {
  mixtura_experts experts;
  const void *hidden;
  const float *weights;
  void *out;
  int64_t T, K;
  int threads;
  // Filled slots sorted by expert: those of expert e are order[first[e]] .. order[first[e + 1] - 1].
  const int32_t *order;
  const int64_t *first, *active;  // active: experts that have slots
  int64_t num_active;
  void *inner;  // (filled slots, words of F), hidden units in the order of the slots, in tiles where there are many; backward,
                // (filled slots, F), each times its slot's weight
  void *kept;   // (filled slots, C), what enters the activation, in the order of the weights' rows; or null
  float *sums;  // (threads, T, MIXTURA_COLUMNS)
  // Of weights of few bits alone:
  const mixtura_quantized *quantized;
  void *rounded;  // (T, blocks of D), tokens as blocks of whole numbers; inner is made of such blocks, too
  float *scratch;  // (threads, scratch_size)
  int64_t scratch_size;
  // Of backward alone:
  const mixtura_gradients *gradients;
  void *inner_gradient;     // (filled slots, C), of what enters the activation, in the order of the weights' rows
  float *packed;            // the same, in tiles of slots
  float *weight_gradients;  // (parts of F, filled slots), summands of the gradients of the weights
} mixtura_plan;

enum { MIXTURA_COLUMNS = 64 };  // output columns that a thread sums up at once
enum { MIXTURA_UNITS = 64 };    // hidden units of a task
enum { MIXTURA_PART = 256 };    // hidden units of a task of backward
enum { MIXTURA_TOKENS = 192 };  // tokens that it packs at once
enum { MIXTURA_ROWS = 96 };     // rows of a gradient of weights, in a task
enum { MIXTURA_MANY = 96 };     // tokens of an expert from which on it pays to pack its weights
enum { MIXTURA_BLOCK = 1 << 18 };  // words of tokens that are packed at once

// Tokens of as many words that are packed at once.
static inline int64_t mixtura_block(int64_t words) {
  const int64_t tokens = MIXTURA_BLOCK / (words > 0 ? words : 1);
  return tokens > 1 ? tokens : 1;
}

typedef void (*mixtura_run)(const mixtura_plan *);
