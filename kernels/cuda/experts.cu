// A mixture of experts: which experts a row takes, the rows in the experts' order, and their outputs added up.
//
// Bytes, for m rows of e experts of which u are used, width w, elements of t bytes: route t m e, and 8 m u; sort reads
// the 4 m u of choices twice for each expert, from the second-level cache; combine (u + 1) t w a row. Operations: route
// about 10 m e and u warp reductions a row. At m = 1,024, e = 128, u = 8, w = 2,048 in bf16 on an H100 SXM (3.35 TB/s):
// route 0.3 MB and 8 reductions of 5 shuffles, under 5 us; sort 8 MB of the cache, 5 us; combine 38 MB, 11 us. A decode
// step of some rows is three launches of 2 to 3 us, limited by latency.

#include "rows.cuh"

namespace obol {

constexpr unsigned ALL = ~0u;
// Rows of a block of `route`, one warp each.
constexpr unsigned ROUTE_ROWS = 4;
constexpr unsigned SORT_THREADS = 256;

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (unsigned distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, distance));
    return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (unsigned distance = 16; distance > 0; distance /= 2) x = __fadd_rn(x, __shfl_xor_sync(ALL, x, distance));
    return x;
}

__device__ __forceinline__ uint64_t warp_max(uint64_t x) {
#pragma unroll
    for (unsigned distance = 16; distance > 0; distance /= 2) {
        const uint64_t other = __shfl_xor_sync(ALL, x, distance);
        x = other > x ? other : x;
    }
    return x;
}

// A probability and its expert as a number whose largest is the most likely, ties to the lower expert; what is no
// number comes last.
__device__ __forceinline__ uint64_t choice(float probability, unsigned expert) {
    const unsigned order = probability >= 0.0f ? __float_as_uint(probability) + 1 : 0;
    return static_cast<uint64_t>(order) << 32 | static_cast<unsigned>(~expert);
}

// The `used` most likely experts of each row, ascending, and their weights. Shared memory: `count` f32 a row.
template <typename T>
__device__ __forceinline__ void route(
    Rows<const T> logits, unsigned rows, unsigned count, unsigned used, bool is_normalized, unsigned* experts,
    float* weights, float* shared) {
    const unsigned lane = threadIdx.x, row = blockIdx.x * ROUTE_ROWS + threadIdx.y;
    if (row >= rows) return;
    float* probabilities = shared + threadIdx.y * count;
    const T* from = logits.row(row);
    float largest = -INFINITY;
    for (unsigned expert = lane; expert < count; expert += 32) {
        const float logit = to_f32(from[expert]);
        probabilities[expert] = logit;
        largest = fmaxf(largest, logit);
    }
    largest = warp_max(largest);
    float total = 0.0f;
    for (unsigned expert = lane; expert < count; expert += 32) {
        const float weight = expf(probabilities[expert] - largest);
        probabilities[expert] = weight;
        total = __fadd_rn(total, weight);
    }
    total = warp_sum(total);
    // Lane i keeps choice i.
    uint64_t last = ~0ull, own = 0;
    for (unsigned rank = 0; rank < used; ++rank) {
        uint64_t most = 0;
        for (unsigned expert = lane; expert < count; expert += 32) {
            const uint64_t found = choice(probabilities[expert], expert);
            if (found < last && found > most) most = found;
        }
        last = warp_max(most);
        if (lane == rank) own = last;
    }
    const unsigned expert = ~static_cast<unsigned>(own);
    __syncwarp();
    float weight = lane < used ? __fdiv_rn(probabilities[expert], total) : 0.0f;
    float kept = 0.0f;
    unsigned before = 0;
    for (unsigned rank = 0; rank < used; ++rank) {
        kept = __fadd_rn(kept, __shfl_sync(ALL, weight, rank));
        before += __shfl_sync(ALL, expert, rank) < expert;
    }
    if (is_normalized) weight = __fdiv_rn(weight, kept);
    if (lane < used) {
        const uint64_t at = static_cast<uint64_t>(row) * used + before;
        experts[at] = expert;
        weights[at] = weight;
    }
}

// out = the sum of weight * y over a row's choices, in their order. y has `len` rows.
template <typename T>
__device__ __forceinline__ void combine(
    unsigned width, unsigned used, unsigned len, const unsigned* places, const float* weights, Rows<const T> ys,
    Rows<T> outs) {
    constexpr unsigned N = 16 / sizeof(T);
    const uint64_t row = blockIdx.x;
    const unsigned at = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (at >= width) return;
    float sum[N] = {};
    for (unsigned i = 0; i < used; ++i) {
        const unsigned place = places[row * used + i];
        // Only where the rows were not routed.
        if (place >= len) continue;
        const T* y = ys.row(place) + at;
        const float weight = weights[row * used + i];
        float v[N];
        load(v, y, width - at, is_aligned<N>(y));
#pragma unroll
        for (unsigned j = 0; j < N; ++j) sum[j] = __fadd_rn(sum[j], __fmul_rn(weight, v[j]));
    }
    T* out = outs.row(row) + at;
    store(out, sum, width - at, is_aligned<N>(out));
}

}  // namespace obol

using namespace obol;

#define EXPERTS(T, name)                                                                                      \
    extern "C" __global__ void __launch_bounds__(128) route_##name(                                           \
        Rows<const T> logits, unsigned rows, unsigned count, unsigned used, unsigned is_normalized,           \
        unsigned* experts, float* weights) {                                                                  \
        extern __shared__ float shared[];                                                                     \
        route(logits, rows, count, used, is_normalized != 0, experts, weights, shared);                       \
    }                                                                                                         \
    extern "C" __global__ void __launch_bounds__(128) combine_##name(                                         \
        unsigned width, unsigned used, unsigned len, const unsigned* places, const float* weights,            \
        Rows<const T> y, Rows<T> out) {                                                                       \
        combine(width, used, len, places, weights, y, out);                                                   \
    }

EXPERTS(float, f32)
EXPERTS(__half, f16)
EXPERTS(__nv_bfloat16, bf16)

// Places of all choices, sorted by (expert, row): block e finds those of expert e. `ends[e]`: the first place after
// them; `rows_of`: the row of each place.
extern "C" __global__ void __launch_bounds__(SORT_THREADS)
    sort_choices(unsigned len, unsigned used, const unsigned* experts, unsigned* places, unsigned* rows_of, unsigned* ends) {
    constexpr unsigned WARPS = SORT_THREADS / 32;
    __shared__ unsigned sums[WARPS];
    const unsigned expert = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned lower = 0;
    for (unsigned i = threadIdx.x; i < len; i += SORT_THREADS) lower += experts[i] < expert;
    lower = __reduce_add_sync(ALL, lower);
    if (lane == 0) sums[warp] = lower;
    __syncthreads();
    unsigned place = 0;
#pragma unroll
    for (unsigned other = 0; other < WARPS; ++other) place += sums[other];
    for (unsigned start = 0; start < len; start += SORT_THREADS) {
        const unsigned i = start + threadIdx.x;
        const bool is_own = i < len && experts[i] == expert;
        const unsigned owners = __ballot_sync(ALL, is_own);
        // The sums before may still be read.
        __syncthreads();
        if (lane == 0) sums[warp] = __popc(owners);
        __syncthreads();
        unsigned own = place + __popc(owners & ((1u << lane) - 1));
#pragma unroll
        for (unsigned other = 0; other < WARPS; ++other) {
            if (other < warp) own += sums[other];
            place += sums[other];
        }
        if (is_own) {
            places[i] = own;
            rows_of[own] = i / used;
        }
    }
    if (threadIdx.x == 0) ends[expert] = place;
}
