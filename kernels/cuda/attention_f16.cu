// Paged attention over a cache of f16; the roofline is in attention.cuh.

#include "attention.cuh"

ATTENTION_KERNELS(f16, F16)
