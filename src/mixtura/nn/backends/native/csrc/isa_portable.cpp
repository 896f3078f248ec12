#define MIXTURA_ISA portable
#define MIXTURA_LANES 4
#define MIXTURA_TILE_M 2
#define MIXTURA_TILE_PACKED 6
#define MIXTURA_TILE_M_WIDENED 2
#include "entry.h"
