// Sums, copies and single elements of rows, and tokens fed from one step to the next.
//
// Bytes a row of width w, elements of t bytes: add 8 w + t w, and t w more where the sum is also given as T; cast 4 w +
// t w; scale 2 t w, softcap 8 w; gather 2 t w. An operation or two an element (softcap about 20): the bandwidth limits.
// Softcap of 64 rows of 256,000 logits is 131 MB, 39 us on an H100 SXM (3.35 TB/s); the others are of the size of a
// residual, 4,096 wide 16 to 40 KiB a row, under 13 us for 1,024 rows. Feeding is one thread a row: the launch, 2 us.

#include "rows.cuh"

namespace obol {

template <typename T> constexpr unsigned WIDE = 16 / sizeof(T);

// Of the elements of a row, this thread's first.
template <unsigned N> __device__ __forceinline__ unsigned this_element() {
    return (blockIdx.y * blockDim.x + threadIdx.x) * N;
}

template <typename T>
__device__ __forceinline__ void add(unsigned width, Rows<float> xs, Rows<const T> deltas, Rows<T> outs) {
    constexpr unsigned N = 4;
    const uint64_t row = blockIdx.x;
    const unsigned at = this_element<N>();
    if (at >= width) return;
    const unsigned left = width - at;
    float* x = xs.row(row) + at;
    float sum[N];
    load(sum, x, left, is_aligned<N>(x));
    if (deltas.start != nullptr) {
        const T* delta = deltas.row(row) + at;
        float d[N];
        load(d, delta, left, is_aligned<N>(delta));
#pragma unroll
        for (unsigned i = 0; i < N; ++i) sum[i] = __fadd_rn(sum[i], d[i]);
        store(x, sum, left, is_aligned<N>(x));
    }
    if (outs.start != nullptr) {
        T* out = outs.row(row) + at;
        store(out, sum, left, is_aligned<N>(out));
    }
}

template <typename T, typename F> __device__ __forceinline__ void in_place(unsigned width, Rows<T> xs, F of) {
    constexpr unsigned N = WIDE<T>;
    const unsigned at = this_element<N>();
    if (at >= width) return;
    T* x = xs.row(blockIdx.x) + at;
    float v[N];
    load(v, x, width - at, is_aligned<N>(x));
#pragma unroll
    for (unsigned i = 0; i < N; ++i) v[i] = of(v[i]);
    store(x, v, width - at, is_aligned<N>(x));
}

// E: an unsigned integer of an element's size.
template <typename E>
__device__ __forceinline__ void gather(
    unsigned width, unsigned rows, const unsigned* list, Rows<const E> xs, Rows<E> outs) {
    constexpr unsigned N = WIDE<E>;
    const unsigned at = this_element<N>();
    if (at >= width) return;
    const unsigned from = list[blockIdx.x];
    E* out = outs.row(blockIdx.x) + at;
    Pack<E, N> pack = {};
    if (from < rows) {
        const E* x = xs.row(from) + at;
        if (is_aligned<N>(x) && width - at >= N) {
            pack = *reinterpret_cast<const Pack<E, N>*>(x);
        } else {
#pragma unroll
            for (unsigned i = 0; i < N; ++i)
                if (at + i < width) pack.at[i] = x[i];
        }
    }
    if (is_aligned<N>(out) && width - at >= N) {
        *reinterpret_cast<Pack<E, N>*>(out) = pack;
    } else {
#pragma unroll
        for (unsigned i = 0; i < N; ++i)
            if (at + i < width) out[i] = pack.at[i];
    }
}

}  // namespace obol

using namespace obol;

// x += delta, if there is one; out = x, if it is asked for.
#define ROWS(T, name)                                                                                         \
    extern "C" __global__ void __launch_bounds__(128)                                                         \
        add_##name(unsigned width, Rows<float> x, Rows<const T> delta, Rows<T> out) {                         \
        add(width, x, delta, out);                                                                            \
    }                                                                                                         \
    extern "C" __global__ void __launch_bounds__(128) scale_##name(unsigned width, Rows<T> x, float factor) { \
        in_place(width, x, [=](float v) { return __fmul_rn(v, factor); });                                    \
    }

ROWS(float, f32)
ROWS(__half, f16)
ROWS(__nv_bfloat16, bf16)

// x = cap * tanh(x / cap)
extern "C" __global__ void __launch_bounds__(128) softcap(unsigned width, Rows<float> x, float cap) {
    in_place(width, x, [=](float v) { return __fmul_rn(tanhf(__fdiv_rn(v, cap)), cap); });
}

// out[i] = x[list[i]]; zeros where there is no such row.
extern "C" __global__ void __launch_bounds__(128)
    gather_2(unsigned width, unsigned rows, const unsigned* list, Rows<const uint16_t> x, Rows<uint16_t> out) {
    gather(width, rows, list, x, out);
}

extern "C" __global__ void __launch_bounds__(128)
    gather_4(unsigned width, unsigned rows, const unsigned* list, Rows<const uint32_t> x, Rows<uint32_t> out) {
    gather(width, rows, list, x, out);
}

// tokens[row] = the token of record `draw`, for each (row, draw) of `feeds` that there is; 0 for none drawn. The token
// is a record's first word, and a record has `words`.
extern "C" __global__ void __launch_bounds__(128) feed(
    unsigned count, const uint2* feeds, unsigned rows, unsigned* tokens, unsigned draws, unsigned words,
    const unsigned* records) {
    const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    const uint2 feed = feeds[at];
    if (feed.x >= rows || feed.y >= draws) return;
    const unsigned token = records[static_cast<uint64_t>(feed.y) * words];
    tokens[feed.x] = token == ~0u ? 0 : token;
}
