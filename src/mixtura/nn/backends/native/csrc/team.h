// What the threads of a tape share, and what is done once for all instruction sets.
#pragma once
#include "mixtura_decode.h"
#include "plan.h"

enum { MIXTURA_SCORED = 256, MIXTURA_CHUNK = 1024 };

typedef struct {
  int32_t part __attribute__((aligned(64)));        // the next one that is free
  int32_t arrived __attribute__((aligned(64)));     // at the barrier
  int32_t generation __attribute__((aligned(64)));  // barriers that are passed
  int32_t members;
  mixtura_plan plan;  // of the mixture that is computed
} mixtura_team;

typedef void (*mixtura_run_all)(const mixtura_tape *, mixtura_team *);

#ifdef __cplusplus
extern "C" {
#endif
// Of the instruction set in use.
mixtura_run_all mixtura_tape_of_isa(void);

// Places of a call of experts in the workspace, and its slots in order. Returns the code of the call.
int mixtura_prepare(mixtura_plan *plan, const int64_t *indices, char *workspace);

// Chooses experts by logits and makes the call of the experts ready.
void mixtura_route(const mixtura_mixture *mixture, int64_t rows, int threads, mixtura_plan *plan);
#ifdef __cplusplus
}
#endif
