// The C interface of the native experts: no torch, no C++ types. All tensors are contiguous.
//
// T tokens, D width, E experts, K slots a token, F expert width, C = 2F gated or F plain.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum mixtura_dtype { MIXTURA_FLOAT32 = 0, MIXTURA_BFLOAT16 = 1 };

enum mixtura_activation {
  MIXTURA_IDENTITY = 0,
  MIXTURA_SILU = 1,
  MIXTURA_GELU = 2,
  MIXTURA_GELU_TANH = 3,
  MIXTURA_QUICK_GELU = 4,
  MIXTURA_RELU = 5,
  MIXTURA_RELU2 = 6,
  MIXTURA_CLAMPED_SWIGLU = 7  // gpt-oss: (u + 1) g sigmoid(alpha g), g at most limit, u in -limit .. limit
};

typedef struct {
  int64_t num_experts, dim, width;
  const void *first;       // (E, C, D), or (E, D, C) transposed
  const void *first_bias;  // (E, C), or null
  const void *down;        // (E, D, F), or (E, F, D) transposed
  const void *down_bias;   // (E, D), or null
  int32_t dtype, activation, gated, transposed, interleaved;
  float alpha, limit;
} mixtura_experts;

// Weights of 8 or 4 bits: scale * (code - zero), with a scale and a zero for each row and group of inputs. Rows lie in
// panels of 16, those of the gate before those of the up projection; inputs in blocks of 32, and within a block
//   8 bits: [8][16][4] bytes, four inputs of a row side by side
//   4 bits: [4][16][4] bytes, inputs 8 i .. 8 i + 3 in the low halves, 8 i + 4 .. 8 i + 7 in the high ones
// What fills up rows and blocks must have the code of zero.
typedef struct {
  const uint8_t *codes;  // (E, panels, blocks, bytes)
  const void *scales;    // (E, panels, groups, 16), float16 or float32
  const uint8_t *zeros;  // the same, or null: all are 128, or 8
} mixtura_codes;

typedef struct {
  mixtura_experts experts;  // sizes, biases, activation, and the dtype of tokens; its weights are not read
  mixtura_codes first, down;
  int32_t bits, group;    // inputs of a group, a multiple of 32; the last one may be shorter
  int32_t half_scales;    // whether scales are float16
  int32_t levels;         // tokens are rounded to -levels .. levels in blocks of 32 inputs: 127, or 32767
} mixtura_quantized;

// Where gradients go, in the shapes and types of what they are of; a null pointer where none is wanted, but for those of
// the slots' weights. Experts without a slot are not computed; theirs are zeros.
typedef struct {
  const void *out;  // (T, D), the gradient that is given
  void *hidden;     // (T, D)
  float *weights;   // (T, K)
  void *first, *first_bias, *down, *down_bias;
} mixtura_gradients;

// Bytes of workspace that a call needs, forward or backward.
int64_t mixtura_workspace(const mixtura_experts *experts, int64_t T, int64_t K, int threads, int backward);

// out (T, D) = sum over slots of weight times expert. Slots whose index is E or more are empty.
// kept (T K, C): what backward needs, in the type of the tokens; or null.
// Returns 0; 1 for a negative index, 2 for a dtype or activation that is not known; out is then as it was.
int mixtura_experts_forward(const mixtura_experts *experts, const void *hidden, const int64_t *indices,
                            const float *weights, void *out, void *kept, void *workspace, int64_t T, int64_t K,
                            int threads);

// The same for weights of few bits. Returns 2 for bits, group or levels that are not known, too.
int64_t mixtura_quantized_workspace(const mixtura_quantized *experts, int64_t T, int64_t K, int threads);
int mixtura_quantized_forward(const mixtura_quantized *experts, const void *hidden, const int64_t *indices,
                              const float *weights, void *out, void *workspace, int64_t T, int64_t K, int threads);

// Gradients of all inputs of a forward call, which kept what is needed. Returns as forward does.
int mixtura_experts_backward(const mixtura_experts *experts, const void *hidden, const int64_t *indices,
                             const float *weights, const void *kept, const mixtura_gradients *gradients,
                             void *workspace, int64_t T, int64_t K, int threads);

// Which headers it was built from: sixteen digits, see build.py.
const char *mixtura_interface(void);

// The instruction set in use; and all that this processor has, the best first, separated by spaces.
const char *mixtura_isa(void);
const char *mixtura_isas(void);

// Use another one from now on. Returns 0, or 1 if this processor does not have it.
int mixtura_use_isa(const char *name);

#ifdef __cplusplus
}
#endif
