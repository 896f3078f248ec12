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
  void *inner;  // (filled slots, F), hidden units in the order of the slots
  float *sums;  // (threads, T, MIXTURA_COLUMNS)
} mixtura_plan;

enum { MIXTURA_COLUMNS = 64 };  // output columns that a thread sums up at once

typedef void (*mixtura_forward)(const mixtura_plan *);
