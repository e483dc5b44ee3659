// Rows of a weight matrix by their indices: embeddings of tokens, learned positions.
//
// out = factor * row, or out += factor * row, in f32. Reads every layout that products read (packed.cuh, dense.cu) and
// gives the numbers that the host's `dequantize_row` gives. A row that the matrix does not have is NaN.
//
// Bytes: a row of the matrix and 4 k (8 k with addition) of output; operations: a few for each element. One row of
// k = 4,096 in 4 bits is 2.5 kB of weights in pieces of 16 and 32 bytes, 16 kB of output: a few us of latency on an
// H100 SXM; 512 rows 8 MB of output and 6 MB of sectors, 5 us (3.35 TB/s).

#include "products.cuh"

namespace obol {

// As `Format` in products/embed.rs counts them.
enum Format : unsigned { PACKED4, PACKED8, DENSE16, DENSE_BRAIN, DENSE32 };

// As `Kind` in packed.cuh.
enum ScaleKind : unsigned { CENTRED, F16_MIN, F32_MIN, SUPER_MIN, SUPER_HALVES, SUPER_HALVES_MIN };

struct Table {
    const uint8_t* data;
    const uint8_t* scales;
    const uint8_t* factors;
    unsigned rows;
    unsigned k;
    unsigned format;
    unsigned kind;
    // The q of weight zero, where there are no minima.
    int centre;
};

__device__ __forceinline__ float half_at(const void* from, uint64_t at) {
    return __half2float(static_cast<const __half*>(from)[at]);
}

__device__ __forceinline__ float packed_value(const Table& table, unsigned row, unsigned at) {
    const unsigned panel = row / PANEL, g = row % TILE, high = row % PANEL / TILE;
    const unsigned group = at / 32 % 2, half = at % 32 / 16, lane = g * 4 + at % 16 / 4;
    const unsigned pairs = (table.k + 63) / 64;
    const uint64_t tile = uint64_t(panel) * pairs + at / 64;
    const unsigned kind = table.kind;
    const bool is_signed = kind == CENTRED || kind == SUPER_HALVES;
    int q;
    if (table.format == PACKED4) {
        const uint8_t byte = table.data[tile * 512 + lane * 16 + (group * 2 + high) * 4 + at % 4];
        q = half == 0 ? byte & 15 : byte >> 4;
        if (is_signed) q = (q ^ 8) - 8;
    } else {
        const uint8_t byte = table.data[(tile * 2 + group) * 512 + lane * 16 + (half * 2 + high) * 4 + at % 4];
        q = is_signed ? static_cast<int8_t>(byte) : byte;
    }
    if (is_signed) q += table.centre;
    const uint64_t place = tile * 8 + g;
    float scale, min;
    if (kind == CENTRED) {
        scale = half_at(table.scales, place * 4 + group * 2 + high);
    } else if (kind == F16_MIN) {
        scale = half_at(table.scales, place * 8 + group * 4 + high);
        min = half_at(table.scales, place * 8 + group * 4 + 2 + high);
    } else if (kind == F32_MIN) {
        const float* from = reinterpret_cast<const float*>(table.scales) + place * 8 + group * 4;
        scale = from[high];
        min = from[2 + high];
    } else {
        const uint64_t super = (uint64_t(panel) * ((pairs + 3) / 4) + at / 256) * 8 + g;
        const unsigned bytes = kind == SUPER_HALVES_MIN ? 16 : 8;
        const uint8_t* from = table.scales + place * bytes;
        from += kind == SUPER_MIN ? group * 4 : kind == SUPER_HALVES ? group * 4 + half * 2 : group * 8 + half * 4;
        const unsigned factors = kind == SUPER_HALVES ? 2 : 4;
        scale = __fmul_rn(half_at(table.factors, super * factors + high), float(static_cast<int8_t>(from[high])));
        if (!is_signed) min = __fmul_rn(half_at(table.factors, super * factors + 2 + high), float(from[2 + high]));
    }
    if (is_signed) min = __fmul_rn(scale, -float(table.centre));
    return __fadd_rn(__fmul_rn(scale, float(q)), min);
}

__device__ __forceinline__ float dense_value(const Table& table, unsigned row, unsigned at) {
    if (table.format == DENSE32) return reinterpret_cast<const float*>(table.data)[uint64_t(row) * table.k + at];
    const unsigned panel = row / PANEL, g = row % TILE, high = row % PANEL / TILE;
    const uint64_t block = uint64_t(panel) * ((table.k + 31) / 32) + at / 32;
    const unsigned lane = g * 4 + at % 32 / 8, piece = at % 8 / 4, word = at % 4 / 2 * 2 + high;
    const uint64_t place = (block * 2 + piece) * 256 + lane * 8 + word * 2 + at % 2;
    if (table.format == DENSE16) return half_at(table.data, place);
    return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(table.data)[place]);
}

}  // namespace obol

// As `EmbedArguments` in products/embed.rs.
struct EmbedArguments {
    obol::Table table;
    // Indices of rows.
    const unsigned* indices;
    float* out;
    uint64_t stride;
    float factor;
    unsigned add;
};

// Blocks: (rows, parts of a row).
extern "C" __global__ void __launch_bounds__(256) embed(const EmbedArguments arguments) {
    const obol::Table& table = arguments.table;
    const unsigned at = blockIdx.y * blockDim.x + threadIdx.x, row = arguments.indices[blockIdx.x];
    if (at >= table.k) return;
    float value = __uint_as_float(0x7fc00000);
    if (row < table.rows)
        value = table.format <= obol::PACKED8 ? obol::packed_value(table, row, at) : obol::dense_value(table, row, at);
    value = __fmul_rn(value, arguments.factor);
    float* to = arguments.out + blockIdx.x * arguments.stride + at;
    *to = arguments.add != 0 ? __fadd_rn(*to, value) : value;
}
