// What the threads of a tape share, and what is done once for all instruction sets.
#pragma once
#include "mixtura_decode.h"
#include "plan.h"

enum { MIXTURA_SCORED = 256, MIXTURA_CHUNK = 1024 };
enum { MIXTURA_TURNS = 5000 };  // of waiting for the others before sleep: some 100 microseconds, as a part takes at most

typedef struct {
  int32_t part __attribute__((aligned(64)));        // the next one that is free
  int32_t arrived __attribute__((aligned(64)));     // at the barrier
  int32_t generation __attribute__((aligned(64)));  // barriers that are passed
  int32_t sleepers;                                 // who waits for the next one and has given its processor away
  int32_t members;
  mixtura_plan plan;  // of the mixture that is computed
} mixtura_team;

typedef void (*mixtura_run_all)(const mixtura_tape *, mixtura_team *);

#ifdef __cplusplus
extern "C" {
#endif
// Of the instruction set in use.
mixtura_run_all mixtura_tape_of_isa(void);

// Waits until the generation is not the one that was seen, without a processor, and ends that for all who do. Where more
// threads run than there are processors, those that are waited for get on then.
void mixtura_sleep(mixtura_team *team, int32_t seen);
void mixtura_wake(mixtura_team *team);

// Places of a call of experts in the workspace, and its slots in order. Returns the code of the call.
int mixtura_prepare(mixtura_plan *plan, const int64_t *indices, char *workspace);

// Chooses experts by logits and makes the call of the experts ready.
void mixtura_route(const mixtura_mixture *mixture, int64_t rows, int threads, mixtura_plan *plan);
#ifdef __cplusplus
}
#endif
