// Products with weights that are not quantised: 16-bit ones on tensor cores, f32 ones by multiplying and adding.
//
// Layout of 16-bit weights (products/dense.rs writes it): (panels, blocks of 32 along k, 2, 32 lanes, 16 bytes), padded
// with zeros. Lane 4 g + t has of rows g and g + 8 of the panel the elements 8 t to 8 t + 7 of the block, the first
// four in its first 16 bytes. So it reads the same 8 elements of a row of x at once; that the tensor cores take them
// for others of the 32 does not matter to a sum. f32 weights are as on the host, (n, k).
//
// Bytes: n k t of weights with t bytes each, read once by the variant for few rows and m / 128 times (mostly from the
// second-level cache) by that for many, which reads x n / 128 times. Operations: 2 m n k on tensor cores.
//
// Llama-3.1-8B's gate_up (28,672 x 4,096) in bf16 on an H100 SXM (3.35 TB/s):
// - m = 1: 235 MB, 70 us; bound by memory. A warp has 4 KiB of weights under way, a multiprocessor 96 KiB.
// - m = 32: the same, and 235 MB of x from the second-level cache: 75 to 90 us.
// - m = 512: 120 GFLOP. At 60 % of 990 TFLOPS, which mma.sync can reach, 0.2 ms; tiles of 128 x 128 need 1.9 GB from
//   the second-level cache, about 0.35 ms, which bounds the kernel.
// f32 is there to check the others: 2 m n k operations, each weight read m / 8 times.

#include "products.cuh"

namespace obol {

// Elements along k of a block of 16-bit weights, and bytes of a panel's.
constexpr unsigned BLOCK = 32;
constexpr unsigned BLOCK_BYTES = 1024;

struct Dense {
    const uint8_t* data;
    unsigned panels;
    // Blocks of a row.
    unsigned blocks;
};

struct Rows16 {
    const uint16_t* start;
    uint64_t stride;
    unsigned k;
};

template <bool BRAIN>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
    if constexpr (BRAIN) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
    }
}

template <bool BRAIN>
__device__ __forceinline__ void multiply_block(float (&sums)[4], const uint4 (&w)[2], const uint4& x) {
    multiply_add<BRAIN>(sums, w[0], x.x, x.y);
    multiply_add<BRAIN>(sums, w[1], x.z, x.w);
}

// For few rows: a block has P panels, each warp a slice of k, and NT tiles of rows at a time.
template <bool BRAIN, int P, int NT, int DEPTH>
__device__ __forceinline__ void multiply_few(
    const Dense& w, const Rows16& x, unsigned slice_blocks, unsigned n, const float* bias, const Out& y, Range range
) {
    extern __shared__ float parts[];
    const unsigned lane = threadIdx.x % WARP, slice = threadIdx.x / WARP, slices = blockDim.x / WARP;
    const unsigned first = slice * slice_blocks, last = min(first + slice_blocks, w.blocks);
    const unsigned panel = blockIdx.x * P, g = lane / 4, t = lane % 4;
    const uint8_t* panels[P];
#pragma unroll
    for (int p = 0; p < P; ++p)
        panels[p] = w.data + uint64_t(min(panel + p, w.panels - 1)) * w.blocks * BLOCK_BYTES + lane * 16;
    for (unsigned row = range.begin; row < range.end; row += NT * TILE) {
        const unsigned tiles = min(unsigned(NT), (range.end - row + TILE - 1) / TILE);
        float sums[P][NT][4] = {};
        for (unsigned block = first; block < last; block += DEPTH) {
            uint4 weights[DEPTH][P][2];
#pragma unroll
            for (int d = 0; d < DEPTH; ++d) {
                if (block + d >= last) break;
#pragma unroll
                for (int p = 0; p < P; ++p) {
                    const uint8_t* from = panels[p] + uint64_t(block + d) * BLOCK_BYTES;
                    weights[d][p][0] = load_once(reinterpret_cast<const uint4*>(from));
                    weights[d][p][1] = load_once(reinterpret_cast<const uint4*>(from + 512));
                }
            }
#pragma unroll
            for (int d = 0; d < DEPTH; ++d) {
                if (block + d >= last) break;
                const unsigned at = (block + d) * BLOCK + 8 * t;
#pragma unroll
                for (int nt = 0; nt < NT; ++nt) {
                    if (nt >= tiles) continue;
                    const unsigned own = row + nt * TILE + g;
                    uint4 values = make_uint4(0, 0, 0, 0);
                    if (own < range.end && at < x.k)
                        values = *reinterpret_cast<const uint4*>(x.start + own * x.stride + at);
#pragma unroll
                    for (int p = 0; p < P; ++p) multiply_block<BRAIN>(sums[p][nt], weights[d][p], values);
                }
            }
        }
        put_part<P, NT>(parts + slice * NT * TILE * PART_STRIDE<P>, sums, lane);
        __syncthreads();
        merge_parts<P, NT>(parts, slices, range, row, panel * PANEL, n, bias, y);
        __syncthreads();
    }
}

// For many rows: a block has 8 panels and 16 tiles, a warp 2 panels and 8 tiles and all of k.
constexpr unsigned MANY_PANELS = 8;
constexpr unsigned MANY_TILES = 16;
constexpr unsigned MANY_THREADS = 256;
// Blocks of k in shared memory: one is computed with, the others are on their way.
constexpr unsigned STAGES = 3;
constexpr unsigned TILE_BYTES = 512;
constexpr unsigned X_BYTES = MANY_TILES * TILE_BYTES;
constexpr unsigned STAGE_BYTES = X_BYTES + MANY_PANELS * BLOCK_BYTES;

template <bool BRAIN>
__device__ __forceinline__ void multiply_many(
    const Dense& w, const Rows16& x, unsigned slice_blocks, unsigned n, const float* bias, const Out& y, Range range
) {
    constexpr int P = 2, NT = 8;
    __shared__ alignas(16) uint8_t staged[STAGES * STAGE_BYTES];
    const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const unsigned first_row = range.begin + blockIdx.x * MANY_TILES * TILE;
    if (first_row >= range.end) return;
    const unsigned block_tiles = min(MANY_TILES, (range.end - first_row + TILE - 1) / TILE);
    const unsigned first_panel = blockIdx.y * MANY_PANELS, block_panels = min(MANY_PANELS, w.panels - first_panel);
    const unsigned warp_panel = warp % 4 * P, warp_tile = warp / 4 * NT;
    const int tiles = min(NT, max(int(block_tiles) - int(warp_tile), 0));

    const auto stage = [&](unsigned block) {
        uint8_t* to = staged + block % STAGES * STAGE_BYTES;
        for (unsigned i = threadIdx.x; i < block_tiles * TILE_BYTES / 16; i += MANY_THREADS) {
            const unsigned row = first_row + i / 4, at = block * BLOCK + i % 4 * 8;
            const bool there = row < range.end && at < x.k;
            copy_async(to + i * 16, there ? x.start + row * x.stride + at : x.start, there);
        }
        for (unsigned i = threadIdx.x; i < block_panels * BLOCK_BYTES / 16; i += MANY_THREADS) {
            const unsigned panel = i / (BLOCK_BYTES / 16), piece = i % (BLOCK_BYTES / 16);
            const uint64_t from = (uint64_t(first_panel + panel) * w.blocks + block) * BLOCK_BYTES + piece * 16;
            copy_async(to + X_BYTES + i * 16, w.data + from, true);
        }
    };

    for (unsigned block = 0; block < STAGES - 1; ++block) {
        if (block < w.blocks) stage(block);
        commit_copies();
    }
    float totals[P][NT][4] = {}, sums[P][NT][4] = {};
    unsigned left = slice_blocks;
    for (unsigned block = 0; block < w.blocks; ++block) {
        wait_copies<STAGES - 2>();
        __syncthreads();
        if (block + STAGES - 1 < w.blocks) stage(block + STAGES - 1);
        commit_copies();
        const uint8_t* from = staged + block % STAGES * STAGE_BYTES;
        uint4 weights[P][2];
#pragma unroll
        for (int p = 0; p < P; ++p)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                weights[p][i] = *reinterpret_cast<const uint4*>(
                    from + X_BYTES + (warp_panel + p) * BLOCK_BYTES + i * 512 + lane * 16
                );
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            if (nt >= tiles) continue;
            const uint4 values = *reinterpret_cast<const uint4*>(from + (warp_tile + nt) * TILE_BYTES + lane * 16);
#pragma unroll
            for (int p = 0; p < P; ++p) multiply_block<BRAIN>(sums[p][nt], weights[p], values);
        }
        if (--left == 0 || block + 1 == w.blocks) {
            left = slice_blocks;
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
        if (warp_panel + p >= block_panels) break;
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
            if (nt >= tiles) continue;
            const unsigned row = first_row + (warp_tile + nt) * TILE;
            store_tile(totals[p][nt], range, row, (first_panel + warp_panel + p) * PANEL, n, bias, y, lane);
        }
    }
}

// A warp's output of up to 8 rows: lane l adds up k = l, l + 32 and so on, then the lanes are added in a butterfly.
__device__ __forceinline__ void multiply_f32(
    const float* w, const float* x, uint64_t x_stride, unsigned n, unsigned k, const float* bias, const Out& y,
    Range range
) {
    constexpr unsigned ROWS = 8;
    const unsigned lane = threadIdx.x % WARP, column = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    const unsigned first = range.begin + blockIdx.y * ROWS;
    if (column >= n || first >= range.end) return;
    const unsigned rows = min(ROWS, range.end - first);
    const float* weights = w + uint64_t(column) * k;
    const float* from = x + first * x_stride;
    float sums[ROWS] = {};
    for (unsigned at = lane; at < k; at += WARP) {
        const float weight = weights[at];
#pragma unroll
        for (int row = 0; row < ROWS; ++row)
            if (row < rows) sums[row] = __fmaf_rn(from[row * x_stride + at], weight, sums[row]);
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
        float sum = sums[row];
#pragma unroll
        for (unsigned distance = WARP / 2; distance > 0; distance /= 2)
            sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, distance));
        if (row < rows && lane == 0)
            y.store(first + row, column, bias == nullptr ? sum : __fadd_rn(sum, bias[column]));
    }
}

}  // namespace obol

// As `DenseArguments` in products/dense.rs.
struct DenseArguments {
    const uint8_t* weights;
    const void* x;
    uint64_t x_stride;
    const float* bias;
    // Where experts' rows end; null without experts.
    const unsigned* ends;
    obol::Out y;
    unsigned n;
    unsigned k;
    unsigned slice_blocks;
    unsigned rows;
};

// Expert e = blockIdx.z has the e-th of the matrices and biases; without experts there is one.
#define OBOL_DENSE_BODY(CALL)                                                                                        \
    const unsigned n = arguments.n, k = arguments.k;                                                                 \
    const unsigned panels = (n + obol::PANEL - 1) / obol::PANEL, blocks = (k + obol::BLOCK - 1) / obol::BLOCK;       \
    const uint64_t before = uint64_t(blockIdx.z) * panels * blocks * obol::BLOCK_BYTES;                              \
    const obol::Dense w{arguments.weights + before, panels, blocks};                                                 \
    const obol::Rows16 from{static_cast<const uint16_t*>(arguments.x), arguments.x_stride, k};                       \
    const float* bias = arguments.bias == nullptr ? nullptr : arguments.bias + uint64_t(blockIdx.z) * n;             \
    CALL(                                                                                                            \
        w, from, arguments.slice_blocks, n, bias, arguments.y, obol::Range(arguments.ends, blockIdx.z, arguments.rows) \
    );

// Blocks of the first two: (panels / P, 1, experts), slices warps; of the last: (row blocks, panel blocks, experts).
#define OBOL_DENSE_KERNELS(NAME, BRAIN)                                                                              \
    extern "C" __global__ void __launch_bounds__(256, 3) dense_##NAME##_8(const DenseArguments arguments) {          \
        OBOL_DENSE_BODY((obol::multiply_few<BRAIN, 1, 1, 4>))                                                        \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256, 2) dense_##NAME##_32(const DenseArguments arguments) {         \
        OBOL_DENSE_BODY((obol::multiply_few<BRAIN, 2, 4, 2>))                                                        \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(obol::MANY_THREADS, 1)                                              \
        dense_##NAME##_many(const DenseArguments arguments) {                                                        \
        OBOL_DENSE_BODY((obol::multiply_many<BRAIN>))                                                                \
    }

OBOL_DENSE_KERNELS(f16, false)
OBOL_DENSE_KERNELS(bf16, true)

// Blocks: (outputs / 8, row blocks of 8, experts) of 8 warps.
extern "C" __global__ void __launch_bounds__(256) dense_f32(const DenseArguments arguments) {
    const uint64_t expert = blockIdx.z;
    const unsigned n = arguments.n, k = arguments.k;
    obol::multiply_f32(
        reinterpret_cast<const float*>(arguments.weights) + expert * n * k, static_cast<const float*>(arguments.x),
        arguments.x_stride, n, k, arguments.bias == nullptr ? nullptr : arguments.bias + expert * n, arguments.y,
        obol::Range(arguments.ends, blockIdx.z, arguments.rows)
    );
}
