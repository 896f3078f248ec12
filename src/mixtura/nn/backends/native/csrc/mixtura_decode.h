// The C interface of decoding: one token a sequence through a whole decoder, as a list of operations that one call runs
// in one parallel region.
//
// B rows (sequences), D width, L positions in the cache after this step, R positions that a rotation has, H heads of
// queries, V heads of keys and values, P width of a head. Weights and caches have the type of the tape; what is summed
// over the layers is float32.
#pragma once
#include "mixtura_native.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { MIXTURA_MAX_ROWS = 64 };

enum mixtura_norm_kind { MIXTURA_NO_NORM = 0, MIXTURA_RMS_NORM = 1, MIXTURA_LAYER_NORM = 2 };

// weight * (x - mean) / deviation + bias; of RMS (weight + offset) * x / root mean square. float32: weight and bias are,
// whatever the type of the tape is.
typedef struct {
  const void *weight, *bias;
  float eps, offset;
  int32_t kind, float32;
} mixtura_norm;

// y = weight x + bias, weight (out, in). float32: weight and bias are, whatever the type of the tape is. quantized: codes
// of one matrix as its `first`, in place of a weight, or null.
typedef struct {
  const void *weight, *bias;
  const mixtura_quantized *quantized;
  int64_t out, in;
  int32_t float32, unused;
} mixtura_linear;

enum mixtura_op {
  MIXTURA_EMBED = 0,
  MIXTURA_NORM = 1,
  MIXTURA_LINEARS = 2,
  MIXTURA_ATTENTION = 3,
  MIXTURA_LINEAR_ADD = 4,
  MIXTURA_FEED_FORWARD = 5,
  MIXTURA_MIXTURE = 6,
  MIXTURA_FOLD = 7
};

typedef struct {
  const void *table;  // (vocabulary, D)
  int64_t dim;
  float *x;  // (B, D)
  float scale;
  int32_t unused;
} mixtura_embed;

typedef struct {
  const float *x;  // (B, D)
  int64_t dim;
  mixtura_norm norm;
  void *out;  // (B, D), of the type of the tape
} mixtura_normalize;

// Up to 4 products of one input, which is float32 with a norm, and of the type of the tape without. They are float32, or
// if narrow of the type of the tape.
typedef struct {
  const void *x;
  mixtura_norm norm;
  int64_t count;
  mixtura_linear linear[4];
  void *out[4];  // (B, out)
  int32_t narrow, unused;
} mixtura_linears;

// Rotates (the first 2 R of P units, halves against halves or neighbors against each other), writes to the cache, attends.
// Norms are over a head or, if whole, over all heads together. A cache may begin later than the sequence: positions that
// no window reaches are gone.
typedef struct {
  const float *query, *key;  // (B, H P), (B, V P); a null key if the cache is written already
  const float *value;        // (B, V P)
  void *out;           // (B, H P), of the type of the tape
  mixtura_norm query_norm, key_norm;
  const float *cosine, *sine;  // (positions, R)
  const void *sinks;           // (H,), scores of no position, which take their share of the weights; or null
  void *keys, *values;         // (B, V, capacity, P), of positions from `skipped` on; at L - 1 this step's
  float *parts;                // workspace, (B, V, chunks, H / V, P + 2)
  int64_t capacity, skipped, heads, groups, width, rotated, window;  // window: positions seen at most, 0 for all
  float scale, softcap;                                     // softcap: 0 for none
  int32_t whole, neighbors;
} mixtura_attention;

typedef struct {
  const void *y;  // (B, in)
  mixtura_linear linear;
  float *x;  // (B, out), added to
} mixtura_linear_add;

// x += down(act(gate h) up h), times sigmoid(by_row) if that is given; h is normalized x, or of the type of the tape.
typedef struct {
  const void *h;
  mixtura_norm norm;
  mixtura_linear gate, up, down;  // gate: null weight for none, then act(up h)
  const float *by_row;            // (B,), or null
  void *inner;                    // workspace, (B, F)
  float *x;                       // (B, D)
  int32_t activation, unused;
} mixtura_feed_forward;

// x += sum of the K best experts of h, by logits; what select() of mixtura.core does, without groups.
typedef struct {
  const void *h;        // (B, D), of the type of the tape
  const float *logits;  // (B, E)
  const float *bias;    // (E,), chooses and never weighs, or null
  mixtura_experts experts;
  const mixtura_quantized *quantized;  // experts with weights of few bits, or null
  float *x;         // (B, D)
  void *out;        // workspace, (B, D)
  void *workspace;  // of mixtura_mixture_workspace
  int64_t slots;    // K
  int32_t sigmoid, choose_by_logits, renormalize, unused;
  float scale, unused_too;
} mixtura_mixture;

// x += factor * norm(sum), and the sum is zeros again: what other operations added to it comes in behind a norm.
typedef struct {
  float *sum;  // (B, D)
  int64_t dim;
  mixtura_norm norm;
  float *x;  // (B, D)
  float factor;
  int32_t unused;
} mixtura_fold;

typedef struct {
  int64_t op;  // of mixtura_op
  void *operands;
} mixtura_instruction;

typedef struct {
  const mixtura_instruction *instructions;
  int64_t count;
  int32_t dtype, threads;
  int64_t rows, length;      // B; L
  const int64_t *ids;        // (B,)
  const int64_t *positions;  // (B,), of the rotation
  const int64_t *starts;     // (B,), first position that is not padding
  char *scratch;             // a part for each thread
  int64_t scratch_bytes;     // of one part, see mixtura_tape_scratch
} mixtura_tape;

int64_t mixtura_mixture_workspace(const mixtura_mixture *mixture, int64_t rows, int threads);

// Bytes of scratch that one thread needs for that many rows, and floats of workspace of an attention.
int64_t mixtura_tape_scratch(const mixtura_tape *tape, int64_t rows);
int64_t mixtura_attention_parts(const mixtura_attention *attention, int64_t rows, int64_t capacity);

// Returns 0; 1 if there are more rows than MIXTURA_MAX_ROWS.
int mixtura_run_tape(const mixtura_tape *tape);

// One operation alone, of up to MIXTURA_MAX_ROWS rows: out (B, out) of the type of x; and attention of a query of the type of
// the cache, which is written already, with workspace for mixtura_attend_workspace bytes.
void mixtura_linear_rows(const mixtura_linear *linear, const void *x, void *out, int64_t rows, int32_t dtype, int threads);
int64_t mixtura_attend_workspace(const mixtura_attention *attention, int64_t rows, int64_t length, int threads);
void mixtura_attend(const mixtura_attention *attention, const int64_t *starts, char *workspace, int64_t rows, int64_t length,
                    int32_t dtype, int threads);

// Bytes a second that all threads together read; the limit of decoding at this moment.
double mixtura_read_bandwidth(const void *bytes, int64_t count, int threads);

#ifdef __cplusplus
}
#endif
