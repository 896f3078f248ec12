// At the end of each file of an instruction set: what dispatch.cpp calls.
#pragma once
#include "attend.h"
#include "backward.h"
#include "forward.h"
#include "kernels.h"
#include "quantized.h"

#define MIXTURA_JOIN_(a, b) a##b
#define MIXTURA_JOIN(a, b) MIXTURA_JOIN_(a, b)
extern "C" void MIXTURA_JOIN(mixtura_forward_, MIXTURA_ISA)(const mixtura_plan *plan) { MIXTURA_ISA::forward(plan); }
extern "C" void MIXTURA_JOIN(mixtura_backward_, MIXTURA_ISA)(const mixtura_plan *plan) { MIXTURA_ISA::backward(plan); }
extern "C" void MIXTURA_JOIN(mixtura_quantized_, MIXTURA_ISA)(const mixtura_plan *plan) {
  MIXTURA_ISA::forward_quantized(plan);
}
extern "C" void MIXTURA_JOIN(mixtura_tape_, MIXTURA_ISA)(const mixtura_tape *tape, mixtura_team *team) {
  MIXTURA_ISA::run(tape, team);
}
extern "C" float MIXTURA_JOIN(mixtura_read_, MIXTURA_ISA)(const void *bytes, int64_t count, int threads) {
  return MIXTURA_ISA::read(bytes, count, threads);
}
