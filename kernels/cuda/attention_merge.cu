// Merges the sums of a context's parts into results.
//
// Roofline. Of each query head it reads (head_dim + 2) * 4 bytes a part, and does 3 operations a dim: for
// Llama-3.1-8B (32 heads of 128) at 4,096 positions 16 parts, 266 kB a row: for 32 rows 8.5 MB, out of the L2 cache
// 2 to 3 us. Latency limits it: parts are read 4 at a time.

#include "attention.cuh"

constexpr unsigned WARPS = 4;
constexpr unsigned HEAD_DIM_MOST = 256;
constexpr unsigned LANE_DIMS = HEAD_DIM_MOST / 32;
constexpr unsigned AT_ONCE = 4;

// A warp has one query. Grid: (split tiles, kv heads, WARP_QUERIES / WARPS).
extern "C" __global__ void __launch_bounds__(32 * WARPS) attention_merge(const Attend a) {
    unsigned lane = threadIdx.x % 32, head_dim = a.kv.head_dim;
    Queries queries = tile_queries(a, blockIdx.x, WARP_QUERIES);
    unsigned query = queries.first + blockIdx.z * WARPS + threadIdx.x / 32;
    if (query >= queries.end) return;
    uint2 parts = span_parts(queries, a.window);
    // One part has been written as the result.
    if (parts.y - parts.x == 1) return;
    unsigned row = query / queries.group, head = blockIdx.y * queries.group + query % queries.group;
    float most = -INFINITY, total = 0.0f, sums[LANE_DIMS] = {};
    for (unsigned first = parts.x; first < parts.y; first += AT_ONCE) {
        float2 ends[AT_ONCE];
        float part_sums[AT_ONCE][LANE_DIMS];
#pragma unroll
        for (unsigned i = 0; i < AT_ONCE; i++) {
            bool there = first + i < parts.y;
            size_t at = (queries.partial + (size_t)(first + i) * queries.rows + row) * a.heads + head;
            ends[i] = there ? a.ends[at] : make_float2(-INFINITY, 0.0f);
#pragma unroll
            for (unsigned j = 0; j < LANE_DIMS; j++) {
                unsigned d = lane + 32 * j;
                part_sums[i][j] = there && d < head_dim ? a.sums[at * head_dim + d] : 0.0f;
            }
        }
#pragma unroll
        for (unsigned i = 0; i < AT_ONCE; i++) {
            if (first + i >= parts.y) break;
            float2 factors = merge_factors(most, ends[i].x);
            total = merged(total, ends[i].y, factors);
#pragma unroll
            for (unsigned j = 0; j < LANE_DIMS; j++) sums[j] = merged(sums[j], part_sums[i][j], factors);
        }
    }
    float inverse = inverse_of(total, a.kv.dtype);
    size_t at = (queries.row + row) * a.out_stride + head * head_dim;
#pragma unroll
    for (unsigned j = 0; j < LANE_DIMS; j++) {
        unsigned d = lane + 32 * j;
        if (d < head_dim) store(a.out, a.dtype, at + d, result(sums[j], inverse));
    }
}
