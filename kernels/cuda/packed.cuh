// The product of int8 rows and packed int4 or int8 weights on tensor cores; packed4.cu and packed8.cu make kernels of
// it, one for each kind of scales.
//
// Layouts, all in the order in which lanes want them (products/packed.rs and quantize.cu write them). A pair is two
// groups of 32 along k; k is padded to whole pairs with zeros. In a panel and a tile lane l = 4 g + t.
// - quants: 4 bits (panels, pairs, 32 lanes, 16 bytes), 8 bits (panels, pairs, 2 groups, 32 lanes, 16 bytes).
// - scales: (panels, pairs, 8 g, words): those of rows g and g + 8 of the panel side by side.
// - factors of two-step scales: (panels, pairs / 4, 8 g, 1 or 2 words).
// - activations: integers (tiles, pairs, 32 lanes, 16 bytes), scales and sums (tiles, pairs, 8 rows, 2 groups),
//   half sums (tiles, pairs, 8 rows, 2 groups, 2).
//
// Without minima weights are kept signed (q - centre), 4-bit ones in the upper halves of bytes, times 16.
//
// Bytes: n k (b / 8 + s) of weights, with b bits and s bytes of scales a weight (f16 1/16, f16 and min 1/8, f32 1/4,
// two-step 0.07 to 0.14), read once by the variant for few rows and m / 64 times (mostly from the second-level
// cache) by the other; m k (1 + 1/8 + 1/8) of activations; m n t of results. Operations: 2 m n k on tensor cores,
// and for each 16 x 8 x 32 of them 12 (16 with minima) multiplications and additions in a lane.
//
// Llama-3.1-8B's gate_up (28,672 x 4,096) with 4 bits and f16 scales on an H100 SXM (3.35 TB/s):
// - m = 1: 66 MB, 20 us; bound by memory. A warp has up to 2 KiB of weights under way, the 24 of a multiprocessor
//   48 KiB, where 18 KiB would hide 700 ns. Rows of activations come from the first-level cache.
// - m = 32: the same 66 MB; each 32 outputs read the rows' 160 kB from the second-level cache, 140 MB in all, about
//   as long as the weights take: 25 to 30 us.
// - m = 512: 120 Gop. The tensor cores could do that in 0.1 ms (about 60 % of 1,979 TOPS by mma.sync); but a warp
//   gives 16 or so instructions to scales for each one of theirs, which bounds the kernel at 0.3 to 0.35 ms.
#pragma once

#include "products.cuh"

namespace obol {

enum class Kind { CENTRED, F16_MIN, F32_MIN, SUPER_MIN, SUPER_HALVES, SUPER_HALVES_MIN };

__host__ __device__ constexpr bool has_min(Kind kind) { return kind != Kind::CENTRED && kind != Kind::SUPER_HALVES; }
__host__ __device__ constexpr bool has_halves(Kind kind) { return kind == Kind::SUPER_HALVES || kind == Kind::SUPER_HALVES_MIN; }

// Words of a pair's scales that a lane reads, and of a super-block's factors.
__host__ __device__ constexpr int scale_words(Kind kind) {
    return kind == Kind::F32_MIN ? 8 : kind == Kind::F16_MIN || kind == Kind::SUPER_HALVES_MIN ? 4 : 2;
}
__host__ __device__ constexpr int factor_words(Kind kind) {
    return kind == Kind::SUPER_HALVES ? 1 : kind == Kind::SUPER_MIN || kind == Kind::SUPER_HALVES_MIN ? 2 : 0;
}

// A weight matrix, or several of the same shape one after the other.
struct Weights {
    const uint8_t* quants;
    const uint8_t* scales;
    const uint8_t* factors;
    unsigned panels;
    unsigned pairs;
};

struct Acts {
    const uint8_t* quants;
    const uint8_t* scales;
    const uint8_t* sums;
    const uint8_t* half_sums;
};

// What one lane holds of a panel's pair.
template <int BITS, Kind KIND> struct PanelPair {
    uint4 quants[BITS / 4];
    uint32_t scales[scale_words(KIND)];
    uint32_t factors[factor_words(KIND) + 1];

    // ONCE: nobody else will read it soon.
    template <bool ONCE>
    __device__ __forceinline__ void load(const Weights& w, uint64_t panel, unsigned pair, unsigned lane) {
        const uint64_t tile = panel * w.pairs + pair;
        const uint4* from = reinterpret_cast<const uint4*>(w.quants) + tile * (BITS / 4) * WARP + lane;
#pragma unroll
        for (int i = 0; i < BITS / 4; ++i) quants[i] = ONCE ? load_once(from + i * WARP) : from[i * WARP];
        constexpr int WORDS = scale_words(KIND);
        const uint8_t* at = w.scales + (tile * 8 + lane / 4) * WORDS * 4;
        if constexpr (WORDS == 2) {
            const uint2 s = *reinterpret_cast<const uint2*>(at);
            scales[0] = s.x, scales[1] = s.y;
        } else {
#pragma unroll
            for (int i = 0; i < WORDS / 4; ++i) {
                const uint4 s = reinterpret_cast<const uint4*>(at)[i];
                scales[4 * i] = s.x, scales[4 * i + 1] = s.y, scales[4 * i + 2] = s.z, scales[4 * i + 3] = s.w;
            }
        }
        constexpr int FACTORS = factor_words(KIND);
        const uint64_t super = panel * ((w.pairs + 3) / 4) + pair / 4;
        const uint8_t* factor = w.factors + (super * 8 + lane / 4) * FACTORS * 4;
        if constexpr (FACTORS == 1) factors[0] = *reinterpret_cast<const uint32_t*>(factor);
        if constexpr (FACTORS == 2) {
            const uint2 f = *reinterpret_cast<const uint2*>(factor);
            factors[0] = f.x, factors[1] = f.y;
        }
    }

    // The weights of a group as the tensor cores want them: words 0 and 1 are its first half, 2 and 3 the last.
    __device__ __forceinline__ void unpack(int group, uint32_t (&a)[4]) const {
        if constexpr (BITS == 8) {
            a[0] = quants[group].x, a[1] = quants[group].y, a[2] = quants[group].z, a[3] = quants[group].w;
        } else {
            const uint32_t low = group == 0 ? quants[0].x : quants[0].z;
            const uint32_t high = group == 0 ? quants[0].y : quants[0].w;
            if constexpr (has_min(KIND)) {
                a[0] = low & 0x0f0f0f0f, a[1] = high & 0x0f0f0f0f;
                a[2] = low >> 4 & 0x0f0f0f0f, a[3] = high >> 4 & 0x0f0f0f0f;
            } else {
                a[0] = low << 4 & 0xf0f0f0f0, a[1] = high << 4 & 0xf0f0f0f0;
                a[2] = low & 0xf0f0f0f0, a[3] = high & 0xf0f0f0f0;
            }
        }
    }

    // What an integer of `unpack` is of a weight's q.
    static constexpr float UNIT = BITS == 4 && !has_min(KIND) ? 0.0625f : 1.0f;

    // Scales and minima of rows g and g + 8 of the panel, in a half of a group.
    __device__ __forceinline__ void scale_min(int group, int half, float (&s)[2], float (&min)[2]) const {
        min[0] = min[1] = 0.0f;
        if constexpr (KIND == Kind::CENTRED) {
            s[0] = half_low(scales[group]) * UNIT, s[1] = half_high(scales[group]) * UNIT;
        } else if constexpr (KIND == Kind::F16_MIN) {
            s[0] = half_low(scales[2 * group]), s[1] = half_high(scales[2 * group]);
            min[0] = half_low(scales[2 * group + 1]), min[1] = half_high(scales[2 * group + 1]);
        } else if constexpr (KIND == Kind::F32_MIN) {
            s[0] = __uint_as_float(scales[4 * group]), s[1] = __uint_as_float(scales[4 * group + 1]);
            min[0] = __uint_as_float(scales[4 * group + 2]), min[1] = __uint_as_float(scales[4 * group + 3]);
        } else {
            constexpr bool TWO = KIND == Kind::SUPER_HALVES;
            const uint32_t word = scales[KIND == Kind::SUPER_HALVES_MIN ? 2 * group + half : group];
            const uint32_t bytes = TWO && half == 1 ? word >> 16 : word;
            s[0] = __fmul_rn(half_low(factors[0]) * UNIT, float(static_cast<int8_t>(bytes)));
            s[1] = __fmul_rn(half_high(factors[0]) * UNIT, float(static_cast<int8_t>(bytes >> 8)));
            if constexpr (!TWO) {
                min[0] = __fmul_rn(half_low(factors[1]), float(bytes >> 16 & 0xff));
                min[1] = __fmul_rn(half_high(factors[1]), float(bytes >> 24));
            }
        }
    }
};

// What one lane holds of a tile's pair.
template <Kind KIND> struct TilePair {
    uint4 quants;
    // Of rows 2 t and 2 t + 1, two groups each.
    float4 scales;
    // Of row 2 t and of row 2 t + 1: without halves the first has both rows'.
    float4 sums[has_halves(KIND) ? 2 : 1];

    // From the three places' starts of this pair.
    __device__ __forceinline__ void
    load(const uint8_t* quants_at, const uint8_t* scales_at, const uint8_t* sums_at, unsigned lane) {
        const unsigned t = lane % 4;
        quants = reinterpret_cast<const uint4*>(quants_at)[lane];
        scales = reinterpret_cast<const float4*>(scales_at)[t];
        if constexpr (has_min(KIND) && has_halves(KIND)) {
            sums[0] = reinterpret_cast<const float4*>(sums_at)[2 * t];
            sums[1] = reinterpret_cast<const float4*>(sums_at)[2 * t + 1];
        } else if constexpr (has_min(KIND)) {
            sums[0] = reinterpret_cast<const float4*>(sums_at)[t];
        }
    }

    __device__ __forceinline__ float scale(int group, int row) const {
        return row == 0 ? (group == 0 ? scales.x : scales.y) : (group == 0 ? scales.z : scales.w);
    }

    __device__ __forceinline__ float sum(int group, int half, int row) const {
        if constexpr (has_halves(KIND)) {
            const float4& both = sums[row];
            return group == 0 ? (half == 0 ? both.x : both.y) : (half == 0 ? both.z : both.w);
        } else {
            return row == 0 ? (group == 0 ? sums[0].x : sums[0].y) : (group == 0 ? sums[0].z : sums[0].w);
        }
    }
};

// Bytes of a tile's pair.
constexpr unsigned QUANT_BYTES = 512;
constexpr unsigned SCALE_BYTES = 64;
__host__ __device__ constexpr unsigned sum_bytes(Kind kind) { return has_halves(kind) ? 128 : 64; }

// 1.5 * 2^23: an integer under 2^22 that is added to its bits is added to its value, so that sums that start there
// need no conversion.
constexpr uint32_t MAGIC_BITS = 0x4b400000;
constexpr float MAGIC = 12582912.0f;

// Integer dots of 16 weights' rows and 8 activations' rows over a group, as floats.
template <bool SIGNED>
__device__ __forceinline__ void dot_group(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    uint32_t c[4];
    if constexpr (SIGNED) {
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%10, %10, %10, %10};"
            : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(MAGIC_BITS));
    } else {
        asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%10, %10, %10, %10};"
            : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(MAGIC_BITS));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] = __fsub_rn(__uint_as_float(c[i]), MAGIC);
}

// The same over half a group.
template <bool SIGNED>
__device__ __forceinline__ void dot_half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
    uint32_t c[4];
    if constexpr (SIGNED) {
        asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
            : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
            : "r"(a0), "r"(a1), "r"(b0), "r"(MAGIC_BITS));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
            : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
            : "r"(a0), "r"(a1), "r"(b0), "r"(MAGIC_BITS));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] = __fsub_rn(__uint_as_float(c[i]), MAGIC);
}

// sums += scales * dots + minima * sums of activations, all of one (half) group.
template <int BITS, Kind KIND>
__device__ __forceinline__ void add_scaled(
    float (&sums)[4], const float (&d)[4], const float (&s)[2], const float (&min)[2], const TilePair<KIND>& x,
    int group, int half
) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sums[i] = __fmaf_rn(__fmul_rn(s[i / 2], x.scale(group, i % 2)), d[i], sums[i]);
        if constexpr (has_min(KIND)) sums[i] = __fmaf_rn(min[i / 2], x.sum(group, half, i % 2), sums[i]);
    }
}

// sums += one pair's products.
template <int BITS, Kind KIND>
__device__ __forceinline__ void
multiply_pair(float (&sums)[4], const PanelPair<BITS, KIND>& w, const TilePair<KIND>& x) {
    constexpr bool SIGNED = !has_min(KIND);
    const uint4& q = x.quants;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
        const uint32_t b[2] = {group == 0 ? q.x : q.z, group == 0 ? q.y : q.w};
        uint32_t a[4];
        w.unpack(group, a);
        float d[4], s[2], min[2];
        if constexpr (has_halves(KIND)) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                w.scale_min(group, half, s, min);
                dot_half<SIGNED>(d, a[2 * half], a[2 * half + 1], b[half]);
                add_scaled<BITS, KIND>(sums, d, s, min, x, group, half);
            }
        } else {
            w.scale_min(group, 0, s, min);
            dot_group<SIGNED>(d, a, b[0], b[1]);
            add_scaled<BITS, KIND>(sums, d, s, min, x, group, 0);
        }
    }
}

// Pairs of P panels whose weights are under way together in a warp: 1 to 2 KiB, as registers allow.
__host__ __device__ constexpr int depth(int bits, Kind kind, int p) {
    const int words = bits + scale_words(kind) + factor_words(kind);
    return words * p <= 8 ? 4 : words * p <= 16 ? 2 : 1;
}

// For few rows: a block has P panels, each warp a slice of k, and NT tiles of rows at a time.
template <int BITS, Kind KIND, int P, int NT>
__device__ __forceinline__ void multiply_few(
    Weights w, const Acts& x, unsigned slice_pairs, unsigned n, const float* bias, const Out& y, Range range
) {
    extern __shared__ float parts[];
    constexpr int DEPTH = depth(BITS, KIND, P);
    const unsigned lane = threadIdx.x % WARP, slice = threadIdx.x / WARP, slices = blockDim.x / WARP;
    const unsigned first = slice * slice_pairs, last = min(first + slice_pairs, w.pairs);
    const unsigned panel = blockIdx.x * P;
    float* part = parts + slice * NT * TILE * PART_STRIDE<P>;
    for (unsigned tile = range.begin / TILE; tile * TILE < range.end; tile += NT) {
        const int tiles = min(NT, int((range.end + TILE - 1) / TILE - tile));
        float sums[P][NT][4] = {};
        for (unsigned pair = first; pair < last; pair += DEPTH) {
            PanelPair<BITS, KIND> weights[DEPTH][P];
#pragma unroll
            for (int d = 0; d < DEPTH; ++d) {
                if (pair + d >= last) break;
#pragma unroll
                for (int p = 0; p < P; ++p) weights[d][p].template load<true>(w, min(panel + p, w.panels - 1), pair + d, lane);
            }
#pragma unroll
            for (int d = 0; d < DEPTH; ++d) {
                if (pair + d >= last) break;
#pragma unroll
                for (int nt = 0; nt < NT; ++nt) {
                    if (nt >= tiles) continue;
                    const uint64_t at = uint64_t(tile + nt) * w.pairs + pair + d;
                    const uint8_t* sums_at = has_halves(KIND) ? x.half_sums : x.sums;
                    TilePair<KIND> rows;
                    rows.load(
                        x.quants + at * QUANT_BYTES, x.scales + at * SCALE_BYTES, sums_at + at * sum_bytes(KIND), lane
                    );
#pragma unroll
                    for (int p = 0; p < P; ++p) multiply_pair<BITS, KIND>(sums[p][nt], weights[d][p], rows);
                }
            }
        }
        put_part<P, NT>(part, sums, lane);
        __syncthreads();
        merge_parts<P, NT>(parts, slices, range, tile * TILE, panel * PANEL, n, bias, y);
        __syncthreads();
    }
}

// For many rows: a block has 8 panels and 8 tiles, a warp 2 panels and 4 tiles and all of k.
constexpr unsigned MANY_PANELS = 8;
constexpr unsigned MANY_TILES = 8;
constexpr unsigned MANY_THREADS = 256;

template <int BITS, Kind KIND>
__device__ __forceinline__ void multiply_many(
    const Weights& w, const Acts& x, unsigned slice_pairs, unsigned n, const float* bias, const Out& y, Range range
) {
    constexpr int P = 2, NT = 4;
    // Pairs in shared memory: one is computed with, the others are on their way.
    constexpr unsigned STAGES = 4;
    constexpr unsigned SUMS = has_min(KIND) ? sum_bytes(KIND) : 0;
    constexpr unsigned SCALES_AT = MANY_TILES * QUANT_BYTES, SUMS_AT = SCALES_AT + MANY_TILES * SCALE_BYTES;
    constexpr unsigned STAGE_BYTES = SUMS_AT + MANY_TILES * SUMS;
    __shared__ alignas(16) uint8_t staged[STAGES * STAGE_BYTES];
    const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const unsigned first_tile = range.begin / TILE + blockIdx.x * MANY_TILES;
    const unsigned tiles_end = (range.end + TILE - 1) / TILE;
    if (first_tile * TILE >= range.end) return;
    const unsigned block_tiles = min(MANY_TILES, tiles_end - first_tile);
    const unsigned panel = blockIdx.y * MANY_PANELS + warp % 4 * P, warp_tile = warp / 4 * NT;
    const int tiles = min(NT, max(int(block_tiles) - int(warp_tile), 0));

    const auto stage = [&](unsigned pair) {
        uint8_t* to = staged + pair % STAGES * STAGE_BYTES;
        const uint64_t at = uint64_t(first_tile) * w.pairs + pair;
        for (unsigned i = threadIdx.x; i < MANY_TILES * QUANT_BYTES / 16; i += MANY_THREADS) {
            const unsigned tile = i / (QUANT_BYTES / 16), piece = i % (QUANT_BYTES / 16);
            if (tile < block_tiles)
                copy_async(to + i * 16, x.quants + (at + tile * w.pairs) * QUANT_BYTES + piece * 16, true);
        }
        // The other pieces are few: other warps' each.
        constexpr unsigned SCALE_PIECES = SCALE_BYTES / 16, SUM_PIECES = SUMS / 16;
        if (threadIdx.x < MANY_TILES * SCALE_PIECES) {
            const unsigned tile = threadIdx.x / SCALE_PIECES, piece = threadIdx.x % SCALE_PIECES;
            if (tile < block_tiles) {
                const uint8_t* from = x.scales + (at + tile * w.pairs) * SCALE_BYTES + piece * 16;
                copy_async(to + SCALES_AT + threadIdx.x * 16, from, true);
            }
        } else if constexpr (SUMS > 0) {
            const unsigned i = threadIdx.x - MANY_TILES * SCALE_PIECES;
            const unsigned tile = i / SUM_PIECES, piece = i % SUM_PIECES;
            if (tile < block_tiles) {
                const uint8_t* sums = has_halves(KIND) ? x.half_sums : x.sums;
                copy_async(to + SUMS_AT + i * 16, sums + (at + tile * w.pairs) * SUMS + piece * 16, true);
            }
        }
    };

    for (unsigned pair = 0; pair < STAGES - 1; ++pair) {
        if (pair < w.pairs) stage(pair);
        commit_copies();
    }
    float totals[P][NT][4] = {}, sums[P][NT][4] = {};
    PanelPair<BITS, KIND> weights[P];
#pragma unroll
    for (int p = 0; p < P; ++p) weights[p].template load<false>(w, min(panel + p, w.panels - 1), 0, lane);
    unsigned left = slice_pairs;
    for (unsigned pair = 0; pair < w.pairs; ++pair) {
        wait_copies<STAGES - 2>();
        __syncthreads();
        if (pair + STAGES - 1 < w.pairs) stage(pair + STAGES - 1);
        commit_copies();
        PanelPair<BITS, KIND> next[P];
#pragma unroll
        for (int p = 0; p < P; ++p)
            next[p].template load<false>(w, min(panel + p, w.panels - 1), min(pair + 1, w.pairs - 1), lane);
        const uint8_t* from = staged + pair % STAGES * STAGE_BYTES;
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            if (nt >= tiles) continue;
            TilePair<KIND> rows;
            const unsigned tile = warp_tile + nt;
            rows.load(
                from + tile * QUANT_BYTES, from + SCALES_AT + tile * SCALE_BYTES, from + SUMS_AT + tile * SUMS, lane
            );
#pragma unroll
            for (int p = 0; p < P; ++p) multiply_pair<BITS, KIND>(sums[p][nt], weights[p], rows);
        }
#pragma unroll
        for (int p = 0; p < P; ++p) weights[p] = next[p];
        if (--left == 0 || pair + 1 == w.pairs) {
            left = slice_pairs;
#pragma unroll
            for (int p = 0; p < P; ++p)
#pragma unroll
                for (int nt = 0; nt < NT; ++nt)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        totals[p][nt][i] = __fadd_rn(totals[p][nt][i], sums[p][nt][i]);
                        sums[p][nt][i] = 0.0f;
                    }
        }
    }
#pragma unroll
    for (int p = 0; p < P; ++p) {
        if (panel + p >= w.panels) break;
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            if (nt >= tiles) continue;
            const unsigned row = (first_tile + warp_tile + nt) * TILE;
            store_tile(totals[p][nt], range, row, (panel + p) * PANEL, n, bias, y, lane);
        }
    }
}

// Expert e = blockIdx.z has the e-th of the matrices and biases; without experts there is one.
template <int BITS, Kind KIND>
__device__ __forceinline__ void to_expert(Weights& w, const float*& bias, unsigned n) {
    const uint64_t before = uint64_t(blockIdx.z) * w.panels;
    w.quants += before * w.pairs * (BITS / 4) * 512;
    w.scales += before * w.pairs * scale_words(KIND) * 32;
    w.factors += before * ((w.pairs + 3) / 4) * factor_words(KIND) * 32;
    if (bias != nullptr) bias += uint64_t(blockIdx.z) * n;
}

}  // namespace obol

// As `PackedArguments` in products/packed.rs.
struct PackedArguments {
    obol::Weights w;
    obol::Acts x;
    const float* bias;
    // Where experts' rows end; null without experts.
    const unsigned* ends;
    obol::Out y;
    unsigned n;
    unsigned slice_pairs;
    unsigned rows;
};

#define OBOL_PACKED_BODY(BITS, KIND, CALL)                                                                           \
    obol::Weights w = arguments.w;                                                                                   \
    const float* bias = arguments.bias;                                                                              \
    obol::to_expert<BITS, KIND>(w, bias, arguments.n);                                                               \
    CALL(                                                                                                            \
        w, arguments.x, arguments.slice_pairs, arguments.n, bias, arguments.y,                                       \
        obol::Range(arguments.ends, blockIdx.z, arguments.rows)                                                      \
    );

// Blocks of the first two: (panels / P, 1, experts), slices warps; of the last: (row blocks, panel blocks, experts).
#define OBOL_PACKED_KERNELS(BITS, NAME, KIND)                                                                        \
    extern "C" __global__ void __launch_bounds__(256, 3)                                                             \
        packed##BITS##_##NAME##_8(const PackedArguments arguments) {                                                 \
        OBOL_PACKED_BODY(BITS, KIND, (obol::multiply_few<BITS, KIND, 1, 1>))                                         \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256, 2)                                                             \
        packed##BITS##_##NAME##_32(const PackedArguments arguments) {                                                \
        OBOL_PACKED_BODY(BITS, KIND, (obol::multiply_few<BITS, KIND, 2, 4>))                                         \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(obol::MANY_THREADS, 1)                                              \
        packed##BITS##_##NAME##_many(const PackedArguments arguments) {                                              \
        OBOL_PACKED_BODY(BITS, KIND, (obol::multiply_many<BITS, KIND>))                                              \
    }

#define OBOL_PACKED_ALL(BITS)                                                                                        \
    OBOL_PACKED_KERNELS(BITS, centred, obol::Kind::CENTRED)                                                          \
    OBOL_PACKED_KERNELS(BITS, f16_min, obol::Kind::F16_MIN)                                                          \
    OBOL_PACKED_KERNELS(BITS, f32_min, obol::Kind::F32_MIN)                                                          \
    OBOL_PACKED_KERNELS(BITS, super_min, obol::Kind::SUPER_MIN)                                                      \
    OBOL_PACKED_KERNELS(BITS, super_halves, obol::Kind::SUPER_HALVES)                                                \
    OBOL_PACKED_KERNELS(BITS, super_halves_min, obol::Kind::SUPER_HALVES_MIN)
