// What operations on single rows share: an element's type, loads and stores of several at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace obol {

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_f32(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest, ties to even.
template <typename T> __device__ __forceinline__ T from_f32(float x);
template <> __device__ __forceinline__ float from_f32<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_f32<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 from_f32<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

template <typename T, unsigned N> struct alignas(sizeof(T) * N) Pack {
    T at[N];
};

// Whether N elements at a time may be loaded from here on.
template <unsigned N, typename T> __device__ __forceinline__ bool is_aligned(const T* start) {
    return reinterpret_cast<uintptr_t>(start) % (N * sizeof(T)) == 0;
}

// N elements of which `left` are there, then zeros. `aligned`: is_aligned<N>(from).
template <unsigned N, typename T>
__device__ __forceinline__ void load(float (&x)[N], const T* from, unsigned left, bool aligned) {
    if (aligned && left >= N) {
        const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
        for (unsigned i = 0; i < N; ++i) x[i] = to_f32(pack.at[i]);
    } else {
#pragma unroll
        for (unsigned i = 0; i < N; ++i) x[i] = i < left ? to_f32(from[i]) : 0.0f;
    }
}

// The first `left` of N elements.
template <unsigned N, typename T>
__device__ __forceinline__ void store(T* to, const float (&x)[N], unsigned left, bool aligned) {
    if (aligned && left >= N) {
        Pack<T, N> pack;
#pragma unroll
        for (unsigned i = 0; i < N; ++i) pack.at[i] = from_f32<T>(x[i]);
        *reinterpret_cast<Pack<T, N>*>(to) = pack;
    } else {
#pragma unroll
        for (unsigned i = 0; i < N; ++i)
            if (i < left) to[i] = from_f32<T>(x[i]);
    }
}

// Rows at a fixed distance.
template <typename T> struct Rows {
    T* start;
    uint64_t stride;

    __device__ __forceinline__ T* row(uint64_t row) const { return start + row * stride; }
};

}  // namespace obol
