// What the products share: tensor-core operations, copies into shared memory, output types, and the law of slices.
//
// Law of slices: k is cut into slices of whole blocks of 256, as many as k alone decides (`slice` in products.rs).
// A slice's sum starts at zero and runs in ascending order; y starts at zero, adds the slices in ascending order
// and then the bias. The variant for few rows gives each slice a warp, the one for many rows walks through all
// slices in one warp; the numbers are the same.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace obol {

// Weights' rows (output features) of a tensor-core operation: a panel. And its rows of activations: a tile.
constexpr unsigned PANEL = 16;
constexpr unsigned TILE = 8;

constexpr unsigned WARP = 32;

// Types of activations, as `Dtype` in mod.rs counts them.
enum Dtype : unsigned { F32, F16, BF16 };

// Rows of y at a fixed distance.
struct Out {
    void* start;
    uint64_t stride;
    unsigned dtype;

    __device__ __forceinline__ void store(unsigned row, unsigned column, float value) const {
        const uint64_t at = row * stride + column;
        if (dtype == F32) {
            static_cast<float*>(start)[at] = value;
        } else if (dtype == F16) {
            static_cast<__half*>(start)[at] = __float2half_rn(value);
        } else {
            static_cast<__nv_bfloat16*>(start)[at] = __float2bfloat16_rn(value);
        }
    }
};

// Rows that a product is of: all, or those of an expert. `ends[e]` is where expert e's rows end; past `rows` are none.
struct Range {
    unsigned begin;
    unsigned end;

    __device__ __forceinline__ Range(const unsigned* ends, unsigned expert, unsigned rows) {
        begin = ends == nullptr || expert == 0 ? 0 : min(ends[expert - 1], rows);
        end = ends == nullptr ? rows : min(ends[expert], rows);
    }
};

__device__ __forceinline__ float half_low(uint32_t pair) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair)));
}

__device__ __forceinline__ float half_high(uint32_t pair) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
}

// 16 bytes that are read once: not kept in the first-level cache.
__device__ __forceinline__ uint4 load_once(const uint4* from) { return __ldcs(from); }

// Copies 16 bytes to shared memory behind the threads' back; zeros where not `there`.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    const unsigned bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most LEFT of the newest groups of copies are under way.
template <int LEFT> __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Writes a warp's part of its slice: `sums` of NT tiles and P panels, as the tensor cores lay them out, to `part`
// (rows, PART_STRIDE).
template <int P> constexpr unsigned PART_STRIDE = P * PANEL + 4;

template <int P, int NT>
__device__ __forceinline__ void put_part(float* part, const float (&sums)[P][NT][4], unsigned lane) {
    const unsigned g = lane / 4, t = lane % 4;
#pragma unroll
    for (int p = 0; p < P; ++p)
#pragma unroll
        for (int nt = 0; nt < NT; ++nt)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                part[(nt * TILE + 2 * t + i % 2) * PART_STRIDE<P> + p * PANEL + g + i / 2 * 8] = sums[p][nt][i];
}

// Adds up the slices' parts and writes y: the whole block's work. `first_row` is the parts' first row.
template <int P, int NT>
__device__ __forceinline__ void merge_parts(
    const float* parts, unsigned slices, Range range, unsigned first_row, unsigned first_column, unsigned n,
    const float* bias, const Out& y
) {
    constexpr unsigned COLUMNS = P * PANEL, ROWS = NT * TILE;
    for (unsigned at = threadIdx.x; at < ROWS * COLUMNS; at += blockDim.x) {
        const unsigned row = first_row + at / COLUMNS, column = first_column + at % COLUMNS;
        if (row < range.begin || row >= range.end || column >= n) continue;
        const float* part = parts + at / COLUMNS * PART_STRIDE<P> + at % COLUMNS;
        float total = 0.0f;
        for (unsigned slice = 0; slice < slices; ++slice)
            total = __fadd_rn(total, part[slice * ROWS * PART_STRIDE<P>]);
        if (bias != nullptr) total = __fadd_rn(total, bias[column]);
        y.store(row, column, total);
    }
}

// Writes what one lane holds of a panel and a tile.
__device__ __forceinline__ void store_tile(
    const float (&totals)[4], Range range, unsigned first_row, unsigned first_column, unsigned n, const float* bias,
    const Out& y, unsigned lane
) {
    const unsigned g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const unsigned row = first_row + 2 * t + i % 2, column = first_column + g + i / 2 * 8;
        if (row < range.begin || row >= range.end || column >= n) continue;
        y.store(row, column, bias == nullptr ? totals[i] : __fadd_rn(totals[i], bias[column]));
    }
}

}  // namespace obol
