// What the kernels of attention share: numbers of all types, and the batch's description.
#pragma once

// As `Dtype` and `KvDtype` are numbered in attention/kv.rs.
enum Number : unsigned { F32 = 0, F16 = 1, BF16 = 2, INT8 = 3 };

__device__ __forceinline__ float widen_f16(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

__device__ __forceinline__ float widen_bf16(unsigned short bits) {
    return __uint_as_float((unsigned)bits << 16);
}

__device__ __forceinline__ unsigned short round_f16(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// Two numbers rounded to a half type; the first is the lower one.
__device__ __forceinline__ unsigned pack_f16(float low, float high) {
    unsigned bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
    unsigned bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

__device__ __forceinline__ unsigned short round_bf16(float x) { return (unsigned short)pack_bf16(x, 0.0f); }

// Element `at` of activations of type `dtype`.
__device__ __forceinline__ float load(const void* x, unsigned dtype, size_t at) {
    switch (dtype) {
        case F32: return ((const float*)x)[at];
        case F16: return widen_f16(((const unsigned short*)x)[at]);
        default: return widen_bf16(((const unsigned short*)x)[at]);
    }
}

__device__ __forceinline__ void store(void* x, unsigned dtype, size_t at, float value) {
    switch (dtype) {
        case F32: ((float*)x)[at] = value; return;
        case F16: ((unsigned short*)x)[at] = round_f16(value); return;
        default: ((unsigned short*)x)[at] = round_bf16(value); return;
    }
}

// Elements `at` and `at + 1`, of which `at` is even and the address aligned to the pair.
__device__ __forceinline__ float2 load2(const void* x, unsigned dtype, size_t at) {
    if (dtype == F32) return *(const float2*)((const float*)x + at);
    unsigned bits = *(const unsigned*)((const unsigned short*)x + at);
    if (dtype == F16) return make_float2(widen_f16(bits & 0xffff), widen_f16(bits >> 16));
    return make_float2(widen_bf16(bits & 0xffff), widen_bf16(bits >> 16));
}

__device__ __forceinline__ void store2(void* x, unsigned dtype, size_t at, float2 value) {
    if (dtype == F32) {
        *(float2*)((float*)x + at) = value;
        return;
    }
    unsigned bits = dtype == F16 ? pack_f16(value.x, value.y) : pack_bf16(value.x, value.y);
    *(unsigned*)((unsigned short*)x + at) = bits;
}

// 2^x, to 2 units in the last place; 0 for -inf.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The pool's part of one layer: K and V (block, kv head, slot, head_dim), the scales of int8 (block, kv head, slot).
struct KvLayer {
    char* k;
    char* v;
    float* k_scales;
    float* v_scales;
    unsigned kv_heads;
    unsigned head_dim;
    unsigned block_size;
    unsigned dtype;
};

// Of each row: its position, or NO_ROW where no sequence has it; where its sequence's block table starts.
struct BatchRows {
    const unsigned* positions;
    const unsigned* tables;
    const unsigned* block_tables;
};

constexpr unsigned NO_ROW = 0xffffffffu;

// Where the scale, and by `head_dim` the elements, of a position of a kv head lie in a layer.
__device__ __forceinline__ size_t slot_of(const KvLayer& kv, const unsigned* table, unsigned position,
                                          unsigned kv_head) {
    unsigned block = table[position / kv.block_size];
    return ((size_t)block * kv.kv_heads + kv_head) * kv.block_size + position % kv.block_size;
}
