// Products with packed weights of 8 bits; packed.cuh says how and how fast.

#include "packed.cuh"

OBOL_PACKED_ALL(8)
