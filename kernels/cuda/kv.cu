// Rotary embedding of q and k, and K and V written into the paged cache.
//
// Roofline. A row has (heads + 2 * kv_heads) * head_dim elements, each read once; q is written back, K and V go to
// the cache: bytes = rows * head_dim * ((2 * heads + 2 * kv_heads) * sizeof(T) + 2 * kv_heads * sizeof(KV)), and
// rows * rotary_dim * 4 of angles, which the heads of a row share in the cache. Arithmetic does not count.
// Llama-3.1-8B (32 heads, 8 kv heads, head_dim 128), f16 throughout: 25 kB a row. On an H100 SXM (3.35 TB/s) 32
// decoded rows move 0.8 MB: 0.3 us, less than the launch itself (2 to 3 us); a prefill of 2,048 rows moves 50 MB:
// 15 us. Memory limits it, or the launch.

#include "attention_types.cuh"

struct Write {
    void* q;
    const void* k;
    const void* v;
    size_t q_stride;
    size_t k_stride;
    size_t v_stride;
    // (position, rotary_dim / 2) of cosine and sine
    const float2* angles;
    BatchRows batch;
    KvLayer kv;
    unsigned heads;
    unsigned dtype;
    // rotary_dim / 2; 0 where nothing is rotated
    unsigned half;
    // Whether pairs are (i, i + half); else (2 i, 2 i + 1).
    unsigned halves;
};

constexpr unsigned WARPS = 8;
constexpr unsigned HEAD_DIM_MOST = 256;
constexpr unsigned PAIRS = HEAD_DIM_MOST / 64;

// Element `d` of a head after its rotation.
__device__ __forceinline__ float rotated(const float* x, unsigned d, unsigned half, unsigned halves,
                                         const float2* angles) {
    if (d >= 2 * half) return x[d];
    unsigned i = halves ? (d < half ? d : d - half) : d / 2;
    bool first = halves ? d < half : d % 2 == 0;
    unsigned other = halves ? (first ? d + half : d - half) : d ^ 1;
    float2 angle = angles[i];
    float along = __fmul_rn(x[d], angle.x);
    float across = __fmul_rn(x[other], angle.y);
    return first ? __fsub_rn(along, across) : __fadd_rn(across, along);
}

// Rounds a head that the lanes of a warp hold, elements 2 * lane + 64 * i and the one after, to the cache's type.
__device__ __forceinline__ void write_head(const float2* x, const KvLayer& kv, char* data, float* scales,
                                           size_t slot, unsigned lane) {
    size_t start = slot * kv.head_dim;
    if (kv.dtype != INT8) {
        for (unsigned i = 0; i < PAIRS; i++) {
            unsigned d = 2 * lane + 64 * i;
            if (d < kv.head_dim) store2(data, kv.dtype, start + d, x[i]);
        }
        return;
    }
    float most = 0.0f;
    for (unsigned i = 0; i < PAIRS; i++) {
        if (2 * lane + 64 * i < kv.head_dim) most = fmaxf(most, fmaxf(fabsf(x[i].x), fabsf(x[i].y)));
    }
    for (unsigned distance = 16; distance > 0; distance /= 2) {
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, distance));
    }
    // Below 128 of the smallest normal number the inverse would overflow.
    float inverse = most < 0x1p-119f ? 0.0f : __fdiv_rn(127.0f, most);
    if (lane == 0) scales[slot] = inverse == 0.0f ? 0.0f : __fdiv_rn(most, 127.0f);
    for (unsigned i = 0; i < PAIRS; i++) {
        unsigned d = 2 * lane + 64 * i;
        if (d >= kv.head_dim) continue;
        int low = __float2int_rn(__fmul_rn(x[i].x, inverse));
        int high = __float2int_rn(__fmul_rn(x[i].y, inverse));
        *(unsigned short*)(data + start + d) = (unsigned short)((low & 0xff) | (high & 0xff) << 8);
    }
}

// A warp has one head of one row: of q, then of k, then of v. Grid: (rows, heads / WARPS).
extern "C" __global__ void __launch_bounds__(32 * WARPS) rope_kv_write(const Write w) {
    __shared__ float staged[WARPS][HEAD_DIM_MOST];
    unsigned row = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned head = blockIdx.y * WARPS + warp;
    unsigned position = w.batch.positions[row];
    unsigned kv_heads = w.kv.kv_heads, head_dim = w.kv.head_dim;
    if (position == NO_ROW || head >= w.heads + 2 * kv_heads) return;
    bool is_q = head < w.heads, is_v = head >= w.heads + kv_heads;
    if (is_q && w.half == 0) return;
    unsigned kv_head = is_q ? 0 : head - w.heads - (is_v ? kv_heads : 0);
    const void* from = is_q ? w.q : is_v ? w.v : w.k;
    size_t start = is_q ? row * w.q_stride + head * head_dim
                        : row * (is_v ? w.v_stride : w.k_stride) + kv_head * head_dim;
    float2 x[PAIRS];
#pragma unroll
    for (unsigned i = 0; i < PAIRS; i++) {
        unsigned d = 2 * lane + 64 * i;
        x[i] = d < head_dim ? load2(from, w.dtype, start + d) : make_float2(0.0f, 0.0f);
        if (d < head_dim) *(float2*)&staged[warp][d] = x[i];
    }
    if (!is_v && w.half > 0) {
        __syncwarp();
        const float2* angles = w.angles + (size_t)position * w.half;
#pragma unroll
        for (unsigned i = 0; i < PAIRS; i++) {
            unsigned d = 2 * lane + 64 * i;
            if (d >= head_dim) continue;
            x[i].x = rotated(staged[warp], d, w.half, w.halves, angles);
            x[i].y = rotated(staged[warp], d + 1, w.half, w.halves, angles);
        }
    }
    if (is_q) {
#pragma unroll
        for (unsigned i = 0; i < PAIRS; i++) {
            unsigned d = 2 * lane + 64 * i;
            if (d < 2 * w.half) store2(w.q, w.dtype, start + d, x[i]);
        }
        return;
    }
    size_t slot = slot_of(w.kv, w.batch.block_tables + w.batch.tables[row], position, kv_head);
    write_head(x, w.kv, is_v ? w.kv.v : w.kv.k, is_v ? w.kv.v_scales : w.kv.k_scales, slot, lane);
}
