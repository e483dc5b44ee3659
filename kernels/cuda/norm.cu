// Norms of rows: RMS norms and layer norms, with what is pending added first, and norms of heads in place.
//
// Memory: a row of width w is read once and kept in registers (16,384 elements of a block of 1,024 threads; what is
// past them is read again, from the second-level cache). Bytes a row, with T of t bytes: norm 4 w + t w, with
// addition 8 w + 2 t w; heads 2 t w; the weight, 4 w, stays in the second-level cache. Operations: about 4 w (RMS),
// 7 w (layer). So the bandwidth limits: hidden 4,096 in bf16 takes 48 KiB a row with addition, 15 us for 1,024 rows on
// an H100 SXM (3.35 TB/s). Of few rows it is latency: a launch, a load, two barriers, about 3 us for one row.
//
// Order of sums: lanes of a row are as many as its width says (`row_threads` in rows.rs), each adds up its elements in
// ascending order, then the lanes of a warp are added in a butterfly and then the warps. The number of rows plays no part.

#include "rows.cuh"

namespace obol {

// Elements of a lane's load, and loads that are kept.
constexpr unsigned VECTOR = 4;
constexpr unsigned KEPT = 4;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (unsigned distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

// Of the lanes of a row: a warp's, or all of the block. Every lane gets the same bits. `warps` is shared memory.
__device__ __forceinline__ float row_sum(float x, float (&warps)[32]) {
    x = warp_sum(x);
    if (blockDim.x == 32) return x;
    // The sum before may still be read.
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? warps[threadIdx.x % 32] : 0.0f);
}

struct Norm {
    const float* weight;
    // Of a layer norm; may be null.
    const float* bias;
    float eps;
    unsigned width;
};

// out = the norm of x + delta. The sum goes to `x` where there is a delta. `out` may be `x`.
template <bool LAYER, bool ADD, typename X, typename D, typename T>
__device__ __forceinline__ void norm_row(
    const Norm& norm, X* x, const D* delta, T* out, float (&warps)[32]) {
    const unsigned width = norm.width, step = VECTOR * blockDim.x, first = VECTOR * threadIdx.x;
    const bool x_aligned = is_aligned<VECTOR>(x), out_aligned = is_aligned<VECTOR>(out);
    const bool delta_aligned = ADD && is_aligned<VECTOR>(delta);
    float kept[KEPT][VECTOR];
    float total = 0.0f;
    const auto take = [&](float (&v)[VECTOR], unsigned at) {
        const unsigned left = width - at;
        load(v, x + at, left, x_aligned);
        if (ADD) {
            float d[VECTOR];
            load(d, delta + at, left, delta_aligned);
#pragma unroll
            for (unsigned j = 0; j < VECTOR; ++j) v[j] = __fadd_rn(v[j], d[j]);
            store(x + at, v, left, x_aligned);
        }
#pragma unroll
        for (unsigned j = 0; j < VECTOR; ++j) total = LAYER ? __fadd_rn(total, v[j]) : fmaf(v[j], v[j], total);
    };
#pragma unroll
    for (unsigned k = 0; k < KEPT; ++k)
        if (first + k * step < width) take(kept[k], first + k * step);
    for (unsigned at = first + KEPT * step; at < width; at += step) {
        float v[VECTOR];
        take(v, at);
    }
    total = row_sum(total, warps);

    float mean = 0.0f;
    if (LAYER) {
        mean = __fdiv_rn(total, static_cast<float>(width));
        total = 0.0f;
        const auto deviate = [&](float (&v)[VECTOR], unsigned at) {
#pragma unroll
            for (unsigned j = 0; j < VECTOR; ++j) {
                const float deviation = __fsub_rn(v[j], mean);
                if (at + j < width) total = fmaf(deviation, deviation, total);
            }
        };
#pragma unroll
        for (unsigned k = 0; k < KEPT; ++k)
            if (first + k * step < width) deviate(kept[k], first + k * step);
        for (unsigned at = first + KEPT * step; at < width; at += step) {
            float v[VECTOR];
            load(v, x + at, width - at, x_aligned);
            deviate(v, at);
        }
        total = row_sum(total, warps);
    }

    const float variance = __fadd_rn(__fdiv_rn(total, static_cast<float>(width)), norm.eps);
    const float factor = __fdiv_rn(1.0f, __fsqrt_rn(variance));
    const bool weight_aligned = is_aligned<VECTOR>(norm.weight);
    const bool bias_aligned = LAYER && norm.bias != nullptr && is_aligned<VECTOR>(norm.bias);
    const auto give = [&](float (&v)[VECTOR], unsigned at) {
        const unsigned left = width - at;
        float w[VECTOR], b[VECTOR];
        load(w, norm.weight + at, left, weight_aligned);
        if (LAYER && norm.bias != nullptr) load(b, norm.bias + at, left, bias_aligned);
#pragma unroll
        for (unsigned j = 0; j < VECTOR; ++j) {
            v[j] = __fmul_rn(__fmul_rn(LAYER ? __fsub_rn(v[j], mean) : v[j], factor), w[j]);
            if (LAYER && norm.bias != nullptr) v[j] = __fadd_rn(v[j], b[j]);
        }
        store(out + at, v, left, out_aligned);
    };
#pragma unroll
    for (unsigned k = 0; k < KEPT; ++k)
        if (first + k * step < width) give(kept[k], first + k * step);
    for (unsigned at = first + KEPT * step; at < width; at += step) {
        float v[VECTOR];
        load(v, x + at, width - at, x_aligned);
        give(v, at);
    }
}

// Blocks of (lanes of a row, rows): several rows only where a row has one warp.
__device__ __forceinline__ uint64_t this_row() {
    return static_cast<uint64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}

template <bool LAYER, bool ADD, typename T>
__device__ __forceinline__ void norm_rows(
    Norm norm, uint64_t rows, Rows<float> x, Rows<const T> delta, Rows<T> out, float (&warps)[32]) {
    const uint64_t row = this_row();
    if (row >= rows) return;
    norm_row<LAYER, ADD>(norm, x.row(row), ADD ? delta.row(row) : delta.start, out.row(row), warps);
}

// Head h of row r is at r * stride + h * width.
template <typename T>
__device__ __forceinline__ void norm_heads(
    Norm norm, uint64_t rows, unsigned heads, Rows<T> x, float (&warps)[32]) {
    const uint64_t head = this_row();
    if (head >= rows * heads) return;
    T* start = x.row(head / heads) + head % heads * norm.width;
    norm_row<false, false>(norm, start, static_cast<const T*>(nullptr), start, warps);
}

}  // namespace obol

using namespace obol;

#define NORMS(T, name)                                                                                        \
    extern "C" __global__ void __launch_bounds__(1024)                                                        \
        rms_norm_##name(Norm norm, uint64_t rows, Rows<float> x, Rows<T> out) {                               \
        __shared__ float warps[32];                                                                           \
        norm_rows<false, false, T>(norm, rows, x, {nullptr, 0}, out, warps);                                  \
    }                                                                                                         \
    extern "C" __global__ void __launch_bounds__(1024)                                                        \
        layer_norm_##name(Norm norm, uint64_t rows, Rows<float> x, Rows<T> out) {                             \
        __shared__ float warps[32];                                                                           \
        norm_rows<true, false, T>(norm, rows, x, {nullptr, 0}, out, warps);                                   \
    }                                                                                                         \
    extern "C" __global__ void __launch_bounds__(1024)                                                        \
        add_rms_norm_##name(Norm norm, uint64_t rows, Rows<float> x, Rows<const T> delta, Rows<T> out) {      \
        __shared__ float warps[32];                                                                           \
        norm_rows<false, true, T>(norm, rows, x, delta, out, warps);                                          \
    }                                                                                                         \
    extern "C" __global__ void __launch_bounds__(1024)                                                        \
        add_layer_norm_##name(Norm norm, uint64_t rows, Rows<float> x, Rows<const T> delta, Rows<T> out) {    \
        __shared__ float warps[32];                                                                           \
        norm_rows<true, true, T>(norm, rows, x, delta, out, warps);                                           \
    }                                                                                                         \
    extern "C" __global__ void __launch_bounds__(1024)                                                        \
        norm_heads_##name(Norm norm, uint64_t rows, unsigned heads, Rows<T> x) {                              \
        __shared__ float warps[32];                                                                           \
        norm_heads(norm, rows, heads, x, warps);                                                              \
    }

NORMS(float, f32)
NORMS(__half, f16)
NORMS(__nv_bfloat16, bf16)
