// An MLP's activation: gated of two rows, or in place.
//
// Bytes a row of width w, elements of t bytes: gated 3 t w, in place 2 t w. Operations: about 15 an element for SiLU, 20
// for the tanh form of GELU, 40 for the erf form, all in f32. 16-byte loads and stores; the bandwidth limits: width
// 14,336 in bf16 takes 84 KiB a row, 26 us for 1,024 rows on an H100 SXM (3.35 TB/s); even the erf form stays at a
// fifth of the 67 TFLOP/s. Of few rows it is the launch, about 2 us.

#include "rows.cuh"

namespace obol {

enum class Act { Silu, GeluTanh, Gelu };

template <Act ACT> __device__ __forceinline__ float act(float x) {
    switch (ACT) {
        case Act::Silu:
            return x / (1.0f + expf(-x));
        case Act::GeluTanh: {
            // (1 + tanh(u)) / 2 = 1 / (1 + e^(-2 u))
            const float factor = fmaf(x * x, 2.0f * 0.7978845608f * 0.044715f, 2.0f * 0.7978845608f);
            return x / (1.0f + expf(-x * factor));
        }
        default:
            // erfc keeps the tail's digits, which 1 + erf would cancel.
            return 0.5f * x * erfcf(-0.70710678118f * x);
    }
}

// The elements of a thread: 16 bytes of them.
template <typename T> constexpr unsigned WIDE = 16 / sizeof(T);

template <Act ACT, typename T>
__device__ __forceinline__ void act_mul(unsigned width, Rows<const T> gates, Rows<const T> ups, Rows<T> outs) {
    constexpr unsigned N = WIDE<T>;
    const uint64_t row = blockIdx.x;
    const unsigned at = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (at >= width) return;
    const T *gate = gates.row(row) + at, *up = ups.row(row) + at;
    T* out = outs.row(row) + at;
    float g[N], u[N];
    load(g, gate, width - at, is_aligned<N>(gate));
    load(u, up, width - at, is_aligned<N>(up));
#pragma unroll
    for (unsigned i = 0; i < N; ++i) g[i] = __fmul_rn(act<ACT>(g[i]), u[i]);
    store(out, g, width - at, is_aligned<N>(out));
}

template <Act ACT, typename T> __device__ __forceinline__ void act_in_place(unsigned width, Rows<T> xs) {
    constexpr unsigned N = WIDE<T>;
    const unsigned at = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (at >= width) return;
    T* x = xs.row(blockIdx.x) + at;
    float v[N];
    load(v, x, width - at, is_aligned<N>(x));
#pragma unroll
    for (unsigned i = 0; i < N; ++i) v[i] = act<ACT>(v[i]);
    store(x, v, width - at, is_aligned<N>(x));
}

}  // namespace obol

using namespace obol;

#define ACT(T, name, FUNCTION, function)                                                                      \
    extern "C" __global__ void __launch_bounds__(128)                                                         \
        function##_mul_##name(unsigned width, Rows<const T> gate, Rows<const T> up, Rows<T> out) {            \
        act_mul<Act::FUNCTION, T>(width, gate, up, out);                                                      \
    }                                                                                                         \
    extern "C" __global__ void __launch_bounds__(128) function##_##name(unsigned width, Rows<T> x) {          \
        act_in_place<Act::FUNCTION, T>(width, x);                                                             \
    }

#define ACTS(T, name)                      \
    ACT(T, name, Silu, silu)               \
    ACT(T, name, GeluTanh, gelu_tanh)      \
    ACT(T, name, Gelu, gelu)

ACTS(float, f32)
ACTS(__half, f16)
ACTS(__nv_bfloat16, bf16)
