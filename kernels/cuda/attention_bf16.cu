// Paged attention over a cache of bf16; the roofline is in attention.cuh.

#include "attention.cuh"

ATTENTION_KERNELS(bf16, BF16)
