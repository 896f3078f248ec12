// At the end of each file of an instruction set: what dispatch.cpp calls.
#pragma once
#include "backward.h"
#include "kernels.h"

#define MIXTURA_JOIN_(a, b) a##b
#define MIXTURA_JOIN(a, b) MIXTURA_JOIN_(a, b)
extern "C" void MIXTURA_JOIN(mixtura_forward_, MIXTURA_ISA)(const mixtura_plan *plan) { MIXTURA_ISA::forward(plan); }
extern "C" void MIXTURA_JOIN(mixtura_backward_, MIXTURA_ISA)(const mixtura_plan *plan) { MIXTURA_ISA::backward(plan); }
