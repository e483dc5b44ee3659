// Rows quantised to int8: a scale for each group of 32, rounding half to even, as the CPU does bit for bit.
//
// Written in the order in which the products want them (packed.cuh). k is padded to whole pairs of groups, and rows to
// whole tiles, with zeros. In a group that holds what is no number, scale and sums are NaN, so that it shows.
//
// Bytes: m k (t + 1 + 1/8 + 1/8 + 1/4), with elements of t bytes; operations: about 8 m k. So memory bounds it, and for
// few rows the launch: k = 4,096 in bf16 is 15 kB a row; m = 512 takes 2.4 us on an H100 SXM (3.35 TB/s).

#include "products.cuh"

namespace obol {

// Elements of a lane; of a group's lanes.
constexpr unsigned EACH = 4;
constexpr unsigned GROUP = 32;
constexpr unsigned GROUP_LANES = GROUP / EACH;

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_f32(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> struct alignas(4 * sizeof(T)) Four {
    T at[EACH];
};

// A warp has four groups of a row. Blocks: (rows of whole tiles, parts of a row).
template <typename T>
__device__ __forceinline__ void quantize(
    const T* x, uint64_t stride, unsigned rows, unsigned k, uint8_t* quants, float* scales, float* sums,
    float* half_sums
) {
    const unsigned pairs = (k + 2 * GROUP - 1) / (2 * GROUP);
    const unsigned row = blockIdx.x, at = blockIdx.y * blockDim.x + threadIdx.x;
    const unsigned group = at / GROUP_LANES, lane = at % GROUP_LANES, pair = group / 2;
    // Whole groups leave, but lanes of one warp may differ in that.
    const unsigned mask = __ballot_sync(~0u, pair < pairs);
    if (pair >= pairs) return;
    float v[EACH] = {};
    if (row < rows && group * GROUP < k) {
        const T* from = x + row * stride + group * GROUP + lane * EACH;
        if (reinterpret_cast<uintptr_t>(from) % sizeof(Four<T>) == 0) {
            const Four<T> four = *reinterpret_cast<const Four<T>*>(from);
#pragma unroll
            for (int i = 0; i < EACH; ++i) v[i] = to_f32(four.at[i]);
        } else {
#pragma unroll
            for (int i = 0; i < EACH; ++i) v[i] = to_f32(from[i]);
        }
    }
    float amax = 0.0f;
    bool finite = true;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        amax = fmaxf(amax, fabsf(v[i]));
        finite = finite && fabsf(v[i]) <= 0x1.fffffep127f;
    }
#pragma unroll
    for (unsigned distance = 1; distance < GROUP_LANES; distance *= 2)
        amax = fmaxf(amax, __shfl_xor_sync(mask, amax, distance));
    const unsigned all_finite = __ballot_sync(mask, finite);
    const unsigned group_lanes = 0xffu << (threadIdx.x % WARP / GROUP_LANES * GROUP_LANES);
    // Under this the inverse overflows; such values are zero beside any other.
    const float inverse = amax < 0x1p-119f ? 0.0f : __fdiv_rn(127.0f, amax);
    float scale = inverse == 0.0f ? 0.0f : __fdiv_rn(amax, 127.0f);
    if ((all_finite & group_lanes) != group_lanes) scale = __uint_as_float(0x7fc00000);
    int total = 0;
    uint32_t bytes = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int q = __float2int_rn(__fmul_rn(v[i], inverse));
        total += q;
        bytes |= (uint32_t(q) & 0xff) << 8 * i;
    }
#pragma unroll
    for (unsigned distance = 1; distance < GROUP_LANES / 2; distance *= 2)
        total += __shfl_xor_sync(mask, total, distance);
    const int other = __shfl_xor_sync(mask, total, GROUP_LANES / 2);
    const uint64_t tile_pair = uint64_t(row / TILE) * pairs + pair;
    const unsigned tile_row = row % TILE;
    uint32_t* words = reinterpret_cast<uint32_t*>(quants + tile_pair * 512 + (tile_row * 4 + lane % 4) * 16);
    words[group % 2 * 2 + lane / 4] = bytes;
    const uint64_t place = (tile_pair * TILE + tile_row) * 2 + group % 2;
    if (lane % 4 == 0) half_sums[place * 2 + lane / 4] = __fmul_rn(scale, float(total));
    if (lane == 0) {
        scales[place] = scale;
        sums[place] = __fmul_rn(scale, float(total + other));
    }
}

}  // namespace obol

#define OBOL_QUANTIZE(NAME, T)                                                                                       \
    extern "C" __global__ void __launch_bounds__(256) quantize_##NAME(                                               \
        const T* x, uint64_t stride, unsigned rows, unsigned k, uint8_t* quants, float* scales, float* sums,         \
        float* half_sums                                                                                             \
    ) {                                                                                                              \
        obol::quantize(x, stride, rows, k, quants, scales, sums, half_sums);                                         \
    }

OBOL_QUANTIZE(f32, float)
OBOL_QUANTIZE(f16, __half)
OBOL_QUANTIZE(bf16, __nv_bfloat16)
