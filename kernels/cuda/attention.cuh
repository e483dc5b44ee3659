// Paged attention on tensor cores, for f16 and bf16 activations.
//
// The queries of a kv head are (row, head of its group) pairs, so that a group shares the loads of K and V. A warp
// has 16 of them. Keys are taken in tiles of 32; tiles, and the parts of 256 keys that they make up, are cut at
// absolute positions. Within a part softmax runs on over the tiles in ascending order; parts are merged in
// ascending order by one formula. There are two variants:
//
// - tiles: a block of 4 times 16 queries shares tiles in shared memory and walks over all parts;
// - split: a block has 16 queries and one part, whose sums go to the workspace, and `attention_merge` merges them.
//
// Invariant: both give a row the same bits, whatever other rows are in its tile. Where the compiler might contract
// operations otherwise in one variant than in the other, the operation is named. A tile or part that a row does not
// see changes nothing of the row: its weights are 0, and the factor on what is there is 1. (Only the sign of a zero
// may change; the result's zeros are made positive.)
//
// Heads over 128 would need too many registers: two warps then have the same queries, each half of V's dims, and
// both score all keys.
//
// The products' numbers have the cache's type: q is rounded to it, which is exact for f16 of bf16 within f16's
// range. int8 is widened to f16. Scales of K multiply scores, and scales of V weights, which are then rounded to f16:
// times 64, so that scales from 1e-6 to 1e3 keep their digits.
//
// Roofline. Bytes: each tile of queries reads K and V of what it sees: 2 * context * head_dim * sizeof(KV) for each
// kv head (with 64 / group rows to a tile), q and out count little. Operations: 4 * rows * heads * context *
// head_dim, for the rows of a tile rounded up to 16.
// Llama-3.1-8B (32 heads, 8 kv heads, head_dim 128), f16, on an H100 SXM (3.35 TB/s; some 600 TFLOPS by mma.sync):
// - Decoding 1 sequence at 4,096: 16.8 MB: 5 us by bandwidth. It has 128 blocks for 132 multiprocessors, each with
//   one tile of 17 kB being computed and two on the way: latency (about 1 us a tile, 8 tiles) makes it 8 to 10 us;
//   merging adds 16 partial sums of each head, 0.3 MB, and a launch: 3 us.
// - Decoding 32 sequences at 4,096: 537 MB: 160 us. 4,096 blocks, 4 to a multiprocessor by shared memory: 140 kB on
//   the way on each, more than the 18 kB that latency times bandwidth asks for. Memory limits it. Partial sums: 34 MB
//   written and read again, mostly in the L2 cache: 10 to 15 us more.
// - A prefill of 2,048 rows: 4 * 2,048 * 32 * 1,024 (the mean context) * 128 = 34 GFLOP: 57 us by tensor cores. A
//   warp reads 16 kB of shared memory for 0.26 MFLOP: 2,048 FLOP a clock at 128 bytes a clock, which is 475
//   TFLOPS, and softmax runs beside: expect 80 to 110 us. Shared memory's bandwidth and the issue of
//   instructions limit it. 256 blocks of the longest first.
#pragma once

#include "attention_types.cuh"

struct Attend {
    const void* q;
    void* out;
    size_t q_stride;
    size_t out_stride;
    // Of each span 8 words: first row, rows, position of the first row, start of its block table, first partial
    const uint4* spans;
    // Of each tile: span, and its first query there
    const uint2* tiles;
    const unsigned* block_tables;
    // The workspace: sums (partial, head, head_dim), and the greatest score and total weight (partial, head)
    float* sums;
    float2* ends;
    KvLayer kv;
    unsigned heads;
    unsigned dtype;
    // Positions that a row sees; NO_ROW for all.
    unsigned window;
    // Scores are in powers of 2: a product's factor,
    float scale;
    // or with a cap that of tanh's argument, as 2^ it needs it, and the cap; else 0.
    float slope;
    float cap;
};

constexpr unsigned TILE = 32;
constexpr unsigned PART = 256;
constexpr unsigned WARP_QUERIES = 16;
constexpr unsigned ALL = 0xffffffffu;

// The sizes of a kernel.
template <unsigned KV, unsigned D, bool SPLIT>
struct Sizes {
    static constexpr unsigned ELEMENT = KV == INT8 ? 1 : 2;
    // Warps with the same queries, and the dims of V that each has.
    static constexpr unsigned SHARES = D > 128 ? 2 : 1;
    static constexpr unsigned DIMS = D / SHARES;
    static constexpr unsigned QUERY_WARPS = SPLIT ? 1 : 4;
    static constexpr unsigned THREADS = 32 * QUERY_WARPS * SHARES;
    // As many as the registers allow, 255 to a thread: shared memory does not let more run at once.
    static constexpr unsigned BLOCKS = 65536 / 256 / THREADS;
    // Tiles in shared memory: one being computed, the others on the way. Some devices give a block 99 kB.
    static constexpr unsigned STAGES = SPLIT && D <= 128 ? 3 : 2;
    // 16 bytes each. An odd number of them from row to row keeps 8 rows in different banks.
    static constexpr unsigned CHUNKS = D * ELEMENT / 16;
    static constexpr unsigned ROW = (CHUNKS | 1) * 16;
    static constexpr unsigned SCALES = KV == INT8 ? TILE * 4 : 0;
    static constexpr unsigned STAGE = 2 * (TILE * ROW + SCALES);
    static constexpr unsigned STEPS = D / 16;
    // Queries that do not fit into registers are kept behind the stages.
    static constexpr bool QUERIES_SHARED = SHARES > 1;
    static constexpr unsigned QUERIES = QUERIES_SHARED ? QUERY_WARPS * STEPS * 32 * 16 : 0;
};

// A span, and of it the queries first..end, which see the keys from..to.
struct Queries {
    unsigned row;
    unsigned rows;
    unsigned position;
    unsigned table;
    unsigned partial;
    unsigned group;
    unsigned first;
    unsigned end;
};

__device__ __forceinline__ unsigned first_seen(unsigned position, unsigned window) {
    return position < window ? 0 : position + 1 - window;
}

// Of a tile; without queries (first >= end) where there is nothing to do.
__device__ __forceinline__ Queries tile_queries(const Attend& a, unsigned tile, unsigned most) {
    uint2 of = a.tiles[tile];
    uint4 low = a.spans[2 * of.x], high = a.spans[2 * of.x + 1];
    Queries q;
    q.row = low.x, q.rows = low.y, q.position = low.z, q.table = low.w, q.partial = high.x;
    q.group = a.heads / a.kv.kv_heads;
    q.first = of.y;
    q.end = min(of.y + most, q.rows * q.group);
    return q;
}

// The parts that a span's rows see: from x to before y. The same for all tiles of the span.
__device__ __forceinline__ uint2 span_parts(const Queries& q, unsigned window) {
    return make_uint2(first_seen(q.position, window) / PART, (q.position + q.rows - 1) / PART + 1);
}

// A sum of weights with the greatest score m, and one with m2: their common m, and the factors on both sums.
__device__ __forceinline__ float2 merge_factors(float& m, float m2) {
    float most = fmaxf(m, m2);
    float base = most == -INFINITY ? 0.0f : most;
    float2 factors = make_float2(exp2_fast(__fsub_rn(m, base)), exp2_fast(__fsub_rn(m2, base)));
    m = most;
    return factors;
}

__device__ __forceinline__ float merged(float x, float x2, float2 factors) {
    return __fmaf_rn(x, factors.x, __fmul_rn(x2, factors.y));
}

// The factor on weights of int8, and the greatest f16.
constexpr float LIFT = 64.0f;
constexpr float F16_MOST = 65504.0f;

// The factor that makes sums results.
__device__ __forceinline__ float inverse_of(float total, unsigned dtype) {
    float inverse = __frcp_rn(total);
    return dtype == INT8 ? __fmul_rn(inverse, 1.0f / LIFT) : inverse;
}

// A sum of V, weighted, as the result: with zeros positive.
__device__ __forceinline__ float result(float sum, float inverse) {
    return __fadd_rn(__fmul_rn(sum, inverse), 0.0f);
}

__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// 16 bytes to shared memory; zeros where `there` is false.
__device__ __forceinline__ void copy_async(unsigned to, const void* from, bool there) {
    unsigned bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <unsigned LEFT>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

__device__ __forceinline__ void load_matrices(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_matrices_turned(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

template <bool BRAIN>
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    if constexpr (BRAIN) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                     "{%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                     "{%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// The bytes 0 and 2 of `bytes`, signed, as f16: 1024 + 128 + x is spelled by bits, then 1152 is taken away.
__device__ __forceinline__ unsigned bytes_f16(unsigned bytes) {
    unsigned x = (bytes & 0x00ff00ff) ^ 0x64806480, y;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(0x64806480));
    return y;
}

// What a thread has of a warp's 16 queries: rows lane / 4 and that + 8.
template <unsigned DIMS>
struct Sums {
    float most[2];
    float total[2];
    float dims[DIMS / 8][4];

    __device__ __forceinline__ void clear() {
        most[0] = most[1] = -INFINITY;
        total[0] = total[1] = 0.0f;
#pragma unroll
        for (unsigned n = 0; n < DIMS / 8; n++) {
#pragma unroll
            for (unsigned i = 0; i < 4; i++) dims[n][i] = 0.0f;
        }
    }

    // The lanes of a row share its weights until they are asked for.
    __device__ __forceinline__ void gather() {
#pragma unroll
        for (unsigned r = 0; r < 2; r++) {
            total[r] = __fadd_rn(total[r], __shfl_xor_sync(ALL, total[r], 1));
            total[r] = __fadd_rn(total[r], __shfl_xor_sync(ALL, total[r], 2));
        }
    }

    // Takes up a later part, gathered.
    __device__ __forceinline__ void merge(const Sums& part) {
        float2 factors[2];
#pragma unroll
        for (unsigned r = 0; r < 2; r++) {
            factors[r] = merge_factors(most[r], part.most[r]);
            total[r] = merged(total[r], part.total[r], factors[r]);
        }
#pragma unroll
        for (unsigned n = 0; n < DIMS / 8; n++) {
#pragma unroll
            for (unsigned i = 0; i < 4; i++) dims[n][i] = merged(dims[n][i], part.dims[n][i], factors[i / 2]);
        }
    }
};

template <unsigned KV, unsigned D, bool SPLIT>
struct Attention {
    using S = Sizes<KV, D, SPLIT>;

    const Attend& a;
    char* memory;
    unsigned lane, query_warp, share, kv_head;
    Queries queries;
    // Keys that the block reads.
    unsigned from, to;

    // The slots of a tile's two strips of 16 keys, each of which is in one block.
    struct Strips {
        size_t slot[2];
    };

    __device__ __forceinline__ Strips strips(unsigned tile) const {
        Strips s;
#pragma unroll
        for (unsigned i = 0; i < 2; i++) {
            unsigned key = tile * TILE + i * 16;
            bool there = key < to && key + 16 > from;
            s.slot[i] = there ? slot_of(a.kv, a.block_tables + queries.table, key, kv_head) : 0;
        }
        return s;
    }

    __device__ __forceinline__ char* stage(unsigned tile) const { return memory + tile % S::STAGES * S::STAGE; }

    // Starts to load K and V of a tile.
    __device__ __forceinline__ void load(unsigned tile, const Strips& s) const {
        unsigned k = shared_address(stage(tile)), v = k + TILE * S::ROW;
#pragma unroll
        for (unsigned i = 0; i < (TILE * S::CHUNKS + S::THREADS - 1) / S::THREADS; i++) {
            unsigned chunk = i * S::THREADS + threadIdx.x;
            if (TILE * S::CHUNKS % S::THREADS != 0 && chunk >= TILE * S::CHUNKS) break;
            unsigned row = chunk / S::CHUNKS, at = row * S::ROW + chunk % S::CHUNKS * 16;
            unsigned key = tile * TILE + row;
            bool there = key >= from && key < to;
            // 16 slots of a block are contiguous.
            size_t slot = row < 16 ? s.slot[0] : s.slot[1];
            size_t start = slot * (D * S::ELEMENT) + chunk % (16 * S::CHUNKS) * 16;
            copy_async(k + at, a.kv.k + start, there);
            copy_async(v + at, a.kv.v + start, there);
        }
        if (KV == INT8 && threadIdx.x < 16) {
            unsigned i = threadIdx.x % 8;
            const float* scales = threadIdx.x < 8 ? a.kv.k_scales : a.kv.v_scales;
            // Those of keys that nobody sees are not used, whatever they are.
            size_t slot = i < 4 ? s.slot[0] : s.slot[1];
            copy_async(v + TILE * S::ROW + threadIdx.x * 16, scales + slot + i % 4 * 4, true);
        }
    }

    __device__ __forceinline__ unsigned query(unsigned r) const {
        return queries.first + query_warp * WARP_QUERIES + lane / 4 + r * 8;
    }

    // Where query `i`'s head starts in rows of that stride.
    __device__ __forceinline__ size_t head_of(unsigned i, size_t stride) const {
        unsigned row = i / queries.group, head = kv_head * queries.group + i % queries.group;
        return (queries.row + row) * stride + head * D;
    }

    // The queries' part of a product's step of 16 dims.
    __device__ __forceinline__ void load_queries(unsigned (&x)[4], unsigned step) const {
#pragma unroll
        for (unsigned r = 0; r < 2; r++) {
            unsigned i = query(r);
            x[r] = x[2 + r] = 0;
            if (i >= queries.end) continue;
            size_t at = head_of(i, a.q_stride) + step * 16;
            if constexpr (KV == INT8) {
                // In the order in which K's bytes are widened.
                float2 low = load2(a.q, a.dtype, at + lane % 4 * 4), high = load2(a.q, a.dtype, at + lane % 4 * 4 + 2);
                x[r] = pack_f16(low.x, high.x);
                x[2 + r] = pack_f16(low.y, high.y);
            } else {
                float2 low = load2(a.q, a.dtype, at + lane % 4 * 2), high = load2(a.q, a.dtype, at + lane % 4 * 2 + 8);
                x[r] = KV == F16 ? pack_f16(low.x, low.y) : pack_bf16(low.x, low.y);
                x[2 + r] = KV == F16 ? pack_f16(high.x, high.y) : pack_bf16(high.x, high.y);
            }
        }
    }

    __device__ __forceinline__ uint4* kept_queries(unsigned step) const {
        return (uint4*)(memory + S::STAGES * S::STAGE) + (query_warp * S::STEPS + step) * 32 + lane;
    }

    // Products of the queries and the tile's keys: scores[n][i] of key n * 8 + lane % 4 * 2 + i % 2.
    template <typename GetQueries>
    __device__ __forceinline__ void score(float (&scores)[4][4], unsigned tile, GetQueries get) const {
        unsigned k = shared_address(stage(tile));
#pragma unroll
        for (unsigned n = 0; n < 4; n++) {
#pragma unroll
            for (unsigned i = 0; i < 4; i++) scores[n][i] = 0.0f;
        }
#pragma unroll
        for (unsigned step = 0; step < S::STEPS; step++) {
            unsigned x[4], y[4];
            get(x, step);
            if constexpr (KV == INT8) {
                load_matrices(y, k + lane * S::ROW + step * 16);
#pragma unroll
                for (unsigned n = 0; n < 4; n++) multiply<false>(scores[n], x, bytes_f16(y[n]), bytes_f16(y[n] >> 8));
            } else {
#pragma unroll
                for (unsigned n = 0; n < 4; n += 2) {
                    unsigned row = n * 8 + lane / 16 * 8 + lane % 8;
                    load_matrices(y, k + row * S::ROW + step * 32 + lane / 8 % 2 * 16);
                    multiply<KV == BF16>(scores[n], x, y[0], y[1]);
                    multiply<KV == BF16>(scores[n + 1], x, y[2], y[3]);
                }
            }
        }
    }

    // Scales, caps and masks scores.
    __device__ __forceinline__ void finish_scores(float (&scores)[4][4], unsigned tile) const {
        const float* k_scales = (const float*)(stage(tile) + 2 * TILE * S::ROW);
        // Whether each of the warp's queries sees all keys of the tile. Those past the end may see anything.
        unsigned low = queries.first + query_warp * WARP_QUERIES, high = min(low + WARP_QUERIES, queries.end) - 1;
        unsigned shortest = queries.position + low / queries.group, longest = queries.position + high / queries.group;
        bool all = tile * TILE + TILE - 1 <= shortest && tile * TILE >= first_seen(longest, a.window);
        unsigned positions[2];
#pragma unroll
        for (unsigned r = 0; r < 2; r++) positions[r] = queries.position + query(r) / queries.group;
#pragma unroll
        for (unsigned n = 0; n < 4; n++) {
#pragma unroll
            for (unsigned i = 0; i < 4; i++) {
                float x = scores[n][i];
                unsigned j = n * 8 + lane % 4 * 2 + i % 2;
                if constexpr (KV == INT8) x = __fmul_rn(x, k_scales[j]);
                if (a.cap > 0.0f) {
                    // cap * tanh(y), of which 2 y is the exponent of e
                    float e = __fadd_rn(exp2_fast(__fmul_rn(x, a.slope)), 1.0f);
                    x = __fmaf_rn(__fmul_rn(a.cap, -2.0f), __frcp_rn(e), a.cap);
                } else {
                    x = __fmul_rn(x, a.scale);
                }
                if (!all) {
                    unsigned key = tile * TILE + j, position = positions[i / 2];
                    if (key > position || key < first_seen(position, a.window)) x = -INFINITY;
                }
                scores[n][i] = x;
            }
        }
    }

    // Takes up a tile's scores and values.
    __device__ __forceinline__ void add(Sums<S::DIMS>& sums, float (&scores)[4][4], unsigned tile) const {
        const float* v_scales = (const float*)(stage(tile) + 2 * TILE * S::ROW + S::SCALES);
        float factors[2];
#pragma unroll
        for (unsigned r = 0; r < 2; r++) {
            float most = sums.most[r];
#pragma unroll
            for (unsigned n = 0; n < 4; n++) most = fmaxf(most, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
            most = fmaxf(most, __shfl_xor_sync(ALL, most, 1));
            most = fmaxf(most, __shfl_xor_sync(ALL, most, 2));
            float base = most == -INFINITY ? 0.0f : most;
            factors[r] = exp2_fast(__fsub_rn(sums.most[r], base));
            sums.most[r] = most;
            float total = 0.0f;
#pragma unroll
            for (unsigned n = 0; n < 4; n++) {
#pragma unroll
                for (unsigned i = 0; i < 2; i++) {
                    float weight = exp2_fast(__fsub_rn(scores[n][2 * r + i], base));
                    total = __fadd_rn(total, weight);
                    if constexpr (KV == INT8) {
                        float scale = __fmul_rn(v_scales[n * 8 + lane % 4 * 2 + i], LIFT);
                        // Scales of keys that are not seen may be anything.
                        weight = weight == 0.0f ? 0.0f : fminf(__fmul_rn(weight, scale), F16_MOST);
                    }
                    scores[n][2 * r + i] = weight;
                }
            }
            sums.total[r] = __fmaf_rn(sums.total[r], factors[r], total);
        }
        // A factor of 1 changes nothing, and most are.
        if (__any_sync(ALL, factors[0] != 1.0f || factors[1] != 1.0f)) {
#pragma unroll
            for (unsigned n = 0; n < S::DIMS / 8; n++) {
#pragma unroll
                for (unsigned i = 0; i < 4; i++) sums.dims[n][i] = __fmul_rn(sums.dims[n][i], factors[i / 2]);
            }
        }
        constexpr bool BRAIN = KV == BF16;
        unsigned weights[2][4];
#pragma unroll
        for (unsigned h = 0; h < 2; h++) {
#pragma unroll
            for (unsigned i = 0; i < 4; i++) {
                const float* pair = &scores[2 * h + i / 2][i % 2 * 2];
                weights[h][i] = BRAIN ? pack_bf16(pair[0], pair[1]) : pack_f16(pair[0], pair[1]);
            }
        }
        unsigned v = shared_address(stage(tile)) + TILE * S::ROW + share * S::DIMS * S::ELEMENT;
#pragma unroll
        for (unsigned n = 0; n < S::DIMS / 8; n += 2) {
            unsigned y[4];
            if constexpr (KV == INT8) {
                // All keys of 16 dims, of which the even ones make one product and the odd ones another.
                load_matrices_turned(y, v + lane * S::ROW + n * 8);
#pragma unroll
                for (unsigned h = 0; h < 2; h++) {
                    unsigned y0 = y[2 * h], y1 = y[2 * h + 1];
                    multiply<BRAIN>(sums.dims[n], weights[h], bytes_f16(y0), bytes_f16(y1));
                    multiply<BRAIN>(sums.dims[n + 1], weights[h], bytes_f16(y0 >> 8), bytes_f16(y1 >> 8));
                }
            } else {
#pragma unroll
                for (unsigned h = 0; h < 2; h++) {
                    load_matrices_turned(y, v + (h * 16 + lane % 16) * S::ROW + n * 16 + lane / 16 * 16);
                    multiply<BRAIN>(sums.dims[n], weights[h], y[0], y[1]);
                    multiply<BRAIN>(sums.dims[n + 1], weights[h], y[2], y[3]);
                }
            }
        }
    }

    // Two dims of a thread that follow each other, here as in memory for all types: dims[n][2 r] and what is 1 on.
    template <typename Put>
    __device__ __forceinline__ void each_pair(const Sums<S::DIMS>& sums, unsigned r, Put put) const {
#pragma unroll
        for (unsigned n = 0; n < S::DIMS / 8; n += 2) {
#pragma unroll
            for (unsigned i = 0; i < 2; i++) {
                const float (&d)[4] = sums.dims[n], (&e)[4] = sums.dims[n + 1];
                if constexpr (KV == INT8) {
                    unsigned dim = share * S::DIMS + n * 8 + lane % 4 * 4 + 2 * i;
                    put(dim, make_float2(d[2 * r + i], e[2 * r + i]));
                } else {
                    unsigned dim = share * S::DIMS + (n + i) * 8 + lane % 4 * 2;
                    put(dim, i == 0 ? make_float2(d[2 * r], d[2 * r + 1]) : make_float2(e[2 * r], e[2 * r + 1]));
                }
            }
        }
    }

    __device__ __forceinline__ void write(const Sums<S::DIMS>& sums) const {
#pragma unroll
        for (unsigned r = 0; r < 2; r++) {
            unsigned i = query(r);
            if (i >= queries.end) continue;
            size_t at = head_of(i, a.out_stride);
            float inverse = inverse_of(sums.total[r], KV);
            each_pair(sums, r, [&](unsigned dim, float2 x) {
                store2(a.out, a.dtype, at + dim, make_float2(result(x.x, inverse), result(x.y, inverse)));
            });
        }
    }

    __device__ __forceinline__ void keep(const Sums<S::DIMS>& sums, unsigned part) const {
#pragma unroll
        for (unsigned r = 0; r < 2; r++) {
            unsigned i = query(r);
            if (i >= queries.end) continue;
            size_t partial = queries.partial + part * queries.rows + i / queries.group;
            size_t at = partial * a.heads + kv_head * queries.group + i % queries.group;
            each_pair(sums, r, [&](unsigned dim, float2 x) { *(float2*)(a.sums + at * D + dim) = x; });
            if (lane % 4 == 0 && share == 0) a.ends[at] = make_float2(sums.most[r], sums.total[r]);
        }
    }

    __device__ __forceinline__ void sync() const {
        if constexpr (S::THREADS > 32) {
            __syncthreads();
        } else {
            __syncwarp();
        }
    }

    // Whether any of the warp's queries sees any key of the tile.
    __device__ __forceinline__ bool sees(unsigned tile) const {
        unsigned low = queries.first + query_warp * WARP_QUERIES;
        if (low >= queries.end) return false;
        unsigned high = min(low + WARP_QUERIES, queries.end) - 1;
        unsigned longest = queries.position + high / queries.group;
        return tile * TILE <= longest &&
               tile * TILE + TILE > first_seen(queries.position + low / queries.group, a.window);
    }

    // Calls `tile_done` for each tile of the keys from..to, in order, when its scores are to be taken up.
    template <typename GetQueries, typename TileDone>
    __device__ __forceinline__ void walk(Sums<S::DIMS>& sums, GetQueries get, TileDone done) const {
        unsigned begin = from / TILE, end = (to + TILE - 1) / TILE;
        Strips next = strips(begin);
#pragma unroll
        for (unsigned i = 0; i < S::STAGES - 1; i++) {
            if (begin + i < end) load(begin + i, next);
            copies_commit();
            next = strips(begin + i + 1);
        }
        for (unsigned tile = begin; tile < end; tile++) {
            copies_wait<S::STAGES - 2>();
            // Now the tile is there for all, and nobody reads the one before it any more.
            sync();
            if (tile + S::STAGES - 1 < end) load(tile + S::STAGES - 1, next);
            copies_commit();
            // The block table is asked a step before its answer is needed.
            next = strips(tile + S::STAGES);
            if (sees(tile)) {
                float scores[4][4];
                score(scores, tile, get);
                finish_scores(scores, tile);
                add(sums, scores, tile);
            }
            done(tile, tile + 1 == end);
        }
    }

    // All tiles of from..to, whatever the variant.
    template <typename TileDone>
    __device__ __forceinline__ void walk(Sums<S::DIMS>& sums, TileDone done) const {
        if constexpr (S::QUERIES_SHARED) {
            for (unsigned step = share; step < S::STEPS; step += S::SHARES) {
                unsigned x[4];
                load_queries(x, step);
                *kept_queries(step) = make_uint4(x[0], x[1], x[2], x[3]);
            }
            auto get = [&](unsigned (&x)[4], unsigned step) {
                uint4 kept = *kept_queries(step);
                x[0] = kept.x, x[1] = kept.y, x[2] = kept.z, x[3] = kept.w;
            };
            walk(sums, get, done);
        } else {
            unsigned kept[S::STEPS][4];
#pragma unroll
            for (unsigned step = 0; step < S::STEPS; step++) load_queries(kept[step], step);
            auto get = [&](unsigned (&x)[4], unsigned step) {
#pragma unroll
                for (unsigned i = 0; i < 4; i++) x[i] = kept[step][i];
            };
            walk(sums, get, done);
        }
    }
};

// A tile of queries and a kv head; with SPLIT also one part. Grid: (tiles, kv heads, parts or 1).
template <unsigned KV, unsigned D, bool SPLIT>
__device__ __forceinline__ void attend(const Attend& a) {
    using S = Sizes<KV, D, SPLIT>;
    extern __shared__ __align__(16) char memory[];
    Queries queries = tile_queries(a, blockIdx.x, WARP_QUERIES * S::QUERY_WARPS);
    if (queries.first >= queries.end) return;
    unsigned from = first_seen(queries.position + queries.first / queries.group, a.window);
    unsigned to = queries.position + (queries.end - 1) / queries.group + 1;
    uint2 parts = span_parts(queries, a.window);
    unsigned part = parts.x + blockIdx.z;
    if (SPLIT) {
        if (part >= parts.y) return;
        from = max(from, part * PART);
        to = min(to, part * PART + PART);
    }
    unsigned warp = threadIdx.x / 32;
    Attention<KV, D, SPLIT> attention = {a,          memory,  threadIdx.x % 32, warp / S::SHARES, warp % S::SHARES,
                                         blockIdx.y, queries, from,             to};
    Sums<S::DIMS> sums;
    sums.clear();
    if constexpr (SPLIT) {
        // A tile's rows may see nothing of a part that others of the span see: then its sums are empty.
        if (from < to) attention.walk(sums, [](unsigned, bool) {});
        sums.gather();
        if (parts.y - parts.x == 1) {
            attention.write(sums);
        } else {
            attention.keep(sums, part);
        }
    } else {
        Sums<S::DIMS> whole;
        whole.clear();
        attention.walk(sums, [&](unsigned tile, bool last) {
            if (!last && (tile + 1) % (PART / TILE) != 0) return;
            sums.gather();
            whole.merge(sums);
            sums.clear();
        });
        attention.write(whole);
    }
}

#define ATTENTION_KERNEL(NAME, NUMBER, DIM, VARIANT, SPLIT)                                                          \
    extern "C" __global__ void                                                                                       \
        __launch_bounds__(Sizes<NUMBER, DIM, SPLIT>::THREADS, Sizes<NUMBER, DIM, SPLIT>::BLOCKS)                     \
        attention_##VARIANT##_##NAME##_##DIM(const Attend a) {                                                       \
        attend<NUMBER, DIM, SPLIT>(a);                                                                               \
    }

#define ATTENTION_KERNELS(NAME, NUMBER)                                                                              \
    ATTENTION_KERNEL(NAME, NUMBER, 64, tiles, false)                                                                 \
    ATTENTION_KERNEL(NAME, NUMBER, 80, tiles, false)                                                                 \
    ATTENTION_KERNEL(NAME, NUMBER, 96, tiles, false)                                                                 \
    ATTENTION_KERNEL(NAME, NUMBER, 128, tiles, false)                                                                \
    ATTENTION_KERNEL(NAME, NUMBER, 256, tiles, false)                                                                \
    ATTENTION_KERNEL(NAME, NUMBER, 64, split, true)                                                                  \
    ATTENTION_KERNEL(NAME, NUMBER, 80, split, true)                                                                  \
    ATTENTION_KERNEL(NAME, NUMBER, 96, split, true)                                                                  \
    ATTENTION_KERNEL(NAME, NUMBER, 128, split, true)                                                                 \
    ATTENTION_KERNEL(NAME, NUMBER, 256, split, true)
