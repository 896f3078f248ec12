#define MIXTURA_ISA avx512
#define MIXTURA_LANES 16
#define MIXTURA_TILE_M 6
#define MIXTURA_TILE_PACKED 12
#define MIXTURA_TILE_M_WIDENED 4
#include "entry.h"
