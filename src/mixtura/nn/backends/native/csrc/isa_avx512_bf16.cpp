#define MIXTURA_ISA avx512_bf16
#define MIXTURA_LANES 16
#define MIXTURA_TILE_M 6
#define MIXTURA_TILE_M_WIDENED 4
#define MIXTURA_BF16_PAIRS
#include "entry.h"
