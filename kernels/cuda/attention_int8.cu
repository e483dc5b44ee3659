// Paged attention over a cache of int8; the roofline is in attention.cuh.

#include "attention.cuh"

ATTENTION_KERNELS(int8, INT8)
