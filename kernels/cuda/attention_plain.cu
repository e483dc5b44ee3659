// Paged attention without tensor cores: for f32, and for head sizes and caches that the others are not made for.
//
// Roofline. Each (row, head) reads its whole context: rows * heads * context * 2 * head_dim elements, of which a
// kv head's group shares the cache at best, and does 4 * rows * heads * context * head_dim operations on one warp.
// Llama-3.1-8B in f32 at 4,096 positions: 32 warps of 32 keys a step, some 3 us each: about 400 us for one row,
// whatever the bandwidth. Latency limits it: it is for checking, and for what is small.

#include "attention_types.cuh"

struct Plain {
    const void* q;
    void* out;
    size_t q_stride;
    size_t out_stride;
    BatchRows batch;
    KvLayer kv;
    unsigned heads;
    unsigned dtype;
    // Positions that a row sees; NO_ROW for all.
    unsigned window;
    float scale;
    // 0 where scores are not capped
    float softcap;
};

constexpr unsigned WARPS = 4;
constexpr unsigned HEAD_DIM_MOST = 256;
constexpr unsigned LANE_DIMS = HEAD_DIM_MOST / 32;
constexpr float LOG2_E = 1.4426950408889634f;

template <unsigned KV>
__device__ __forceinline__ float element(const char* data, size_t at) {
    if constexpr (KV == INT8) return (float)((const signed char*)data)[at];
    if constexpr (KV == F32) return ((const float*)data)[at];
    if constexpr (KV == F16) return widen_f16(((const unsigned short*)data)[at]);
    return widen_bf16(((const unsigned short*)data)[at]);
}

// A warp has one head of one row, and takes keys 32 at a time: a lane scores one key, and sums some dims of V.
template <unsigned KV>
__device__ __forceinline__ void attend(const Plain& a) {
    __shared__ float queries[WARPS][HEAD_DIM_MOST];
    unsigned row = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned head = blockIdx.y * WARPS + warp, head_dim = a.kv.head_dim;
    unsigned position = a.batch.positions[row];
    if (position == NO_ROW || head >= a.heads) return;
    unsigned kv_head = head / (a.heads / a.kv.kv_heads);
    const unsigned* table = a.batch.block_tables + a.batch.tables[row];
    float* q = queries[warp];
    for (unsigned d = lane; d < head_dim; d += 32) {
        q[d] = load(a.q, a.dtype, row * a.q_stride + head * head_dim + d);
    }
    __syncwarp();
    unsigned first = position < a.window ? 0 : position + 1 - a.window;
    float most = -INFINITY, total = 0.0f, sums[LANE_DIMS] = {};
    for (unsigned base = first / 32 * 32; base <= position; base += 32) {
        unsigned key = base + lane;
        bool seen = key >= first && key <= position;
        size_t slot = seen ? slot_of(a.kv, table, key, kv_head) : 0;
        float score = -INFINITY, v_scale = 0.0f;
        if (seen) {
            float dot = 0.0f;
            for (unsigned d = 0; d < head_dim; d++) dot = fmaf(q[d], element<KV>(a.kv.k, slot * head_dim + d), dot);
            v_scale = KV == INT8 ? a.kv.v_scales[slot] : 1.0f;
            score = dot * (KV == INT8 ? a.kv.k_scales[slot] * a.scale : a.scale);
            if (a.softcap > 0.0f) score = a.softcap * tanhf(score / a.softcap);
            score *= LOG2_E;
        }
        float now = score;
        for (unsigned distance = 16; distance > 0; distance /= 2) {
            now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, distance));
        }
        now = fmaxf(most, now);
        float factor = exp2_fast(most - now), weight = exp2_fast(score - now);
        most = now;
        total = fmaf(total, factor, weight);
        weight *= v_scale;
        for (unsigned i = 0; i < LANE_DIMS; i++) sums[i] *= factor;
        unsigned from = max(first, base) - base, to = min(position - base, 31u);
        for (unsigned j = from; j <= to; j++) {
            float w = __shfl_sync(0xffffffffu, weight, j);
            size_t at = __shfl_sync(0xffffffffu, slot, j) * head_dim;
            for (unsigned i = 0; i < LANE_DIMS; i++) {
                unsigned d = lane + 32 * i;
                if (d < head_dim) sums[i] = fmaf(w, element<KV>(a.kv.v, at + d), sums[i]);
            }
        }
    }
    for (unsigned distance = 16; distance > 0; distance /= 2) {
        total += __shfl_xor_sync(0xffffffffu, total, distance);
    }
    for (unsigned i = 0; i < LANE_DIMS; i++) {
        unsigned d = lane + 32 * i;
        if (d < head_dim) store(a.out, a.dtype, row * a.out_stride + head * head_dim + d, sums[i] / total);
    }
}

// Grid: (rows, heads / WARPS).
extern "C" __global__ void __launch_bounds__(32 * WARPS) attention_plain_f32(const Plain a) { attend<F32>(a); }
extern "C" __global__ void __launch_bounds__(32 * WARPS) attention_plain_f16(const Plain a) { attend<F16>(a); }
extern "C" __global__ void __launch_bounds__(32 * WARPS) attention_plain_bf16(const Plain a) { attend<BF16>(a); }
extern "C" __global__ void __launch_bounds__(32 * WARPS) attention_plain_int8(const Plain a) { attend<INT8>(a); }
