// What the passes of sampling share: draws as the host packs them, weights and their sums, the vocabulary's chunks.
#pragma once

#include <stdint.h>

#include "rows.cuh"

namespace obol {

constexpr unsigned THREADS = 256;
constexpr unsigned WARPS = THREADS / 32;
// Tokens of a block in the passes over the vocabulary, and of a thread.
constexpr unsigned CHUNK = 2048;
constexpr unsigned EACH = CHUNK / THREADS;
constexpr unsigned NONE = ~0u;
constexpr unsigned TOP_MAX = 20;

// What a draw asks for.
constexpr unsigned ACTIVE = 1, SAMPLED = 2, TOP_K = 4, TOP_P = 8, LOGPROBS = 16, ADJUSTED = 32;

// As sampling/draws.rs packs it. Lists begin at words of the packed bytes.
struct Draw {
    uint64_t seed, position;
    unsigned choice, asks;
    float inverse, floor;
    unsigned top_k;
    float top_p;
    float repetition, presence, frequency;
    unsigned top;
    // The row of the tokens whose token counts as generated once more.
    unsigned fed;
    // Pairs (token, f32); tokens; pairs (token, times), ascending; bits of tokens, 32 a word.
    unsigned biases, biases_len, forbidden, forbidden_len, seen, seen_len, allowed, allowed_len;
    unsigned unused;
};

struct Record {
    unsigned token;
    float logprob;
    unsigned top_len, unused;
    struct {
        unsigned token;
        float logprob;
    } top[TOP_MAX];
};

// ---- weights: as src/engine/sampler/weigh.rs, bit for bit ----

// e^x to about 1 unit in the last place, for x in -87..=88. (Cody-Waite reduction and the polynomial of Moshier's
// Cephes `expf`.) Without fused operations, which would change the last bit.
__device__ __forceinline__ float exp_plain(float x) {
    constexpr float ROUND = 12582912.0f;
    const float shifted = __fadd_rn(__fmul_rn(x, 1.44269504088896340736f), ROUND);
    const float n = __fsub_rn(shifted, ROUND);
    float r = __fsub_rn(x, __fmul_rn(n, 0.6933594f));
    r = __fadd_rn(r, __fmul_rn(n, 2.1219444e-4f));
    float p = 1.9875691e-4f;
    p = __fadd_rn(__fmul_rn(p, r), 1.3981999e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 8.333452e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.1665796e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 1.6666665e-1f);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    const float y = __fadd_rn(__fmul_rn(p, __fmul_rn(r, r)), __fadd_rn(r, 1.0f));
    const unsigned exponent = __float_as_uint(shifted) - __float_as_uint(ROUND) + 127;
    return __fmul_rn(y, __uint_as_float(exponent << 23));
}

struct Scale {
    float best, inverse, floor;

    // 1 for the best logit; 0 for one under the floor or not a number.
    __device__ __forceinline__ float weight(float logit) const {
        const float exponent = __fmul_rn(__fsub_rn(logit, best), inverse);
        return exponent >= floor && exponent <= 0.0f ? exp_plain(exponent) : 0.0f;
    }
};

constexpr int UNIT_BITS = 44;

// A weight, 0 to 1, in units of 2^-44, to nearest, ties to even. In integers, since few devices are fast in f64.
__device__ __forceinline__ uint64_t units(float weight) {
    const unsigned bits = __float_as_uint(weight);
    const int shift = static_cast<int>(bits >> 23) - (127 + 23 - UNIT_BITS);
    const unsigned mantissa = (bits & 0x7fffff) | 0x800000;
    if (shift >= 0) return static_cast<uint64_t>(mantissa) << shift;
    if (shift < -24) return 0;
    const unsigned whole = mantissa >> -shift, rest = mantissa << (32 + shift);
    return whole + (rest > 0x80000000u || (rest == 0x80000000u && whole % 2 == 1));
}

// What top-p keeps of a total, in units.
__device__ __forceinline__ uint64_t share(float top_p, uint64_t total) {
    return __double2ull_rz(__dmul_rn(static_cast<double>(top_p), __ull2double_rn(total)));
}

// Uniform in 0..total, of 53 random bits.
__device__ __forceinline__ uint64_t below(uint64_t total, uint64_t bits) {
    return __umul64hi(total, bits) << 11 | total * bits >> 53;
}

// 53 random bits: Philox4x32-10 (Salmon et al., SC'11).
__device__ __forceinline__ uint64_t random_bits(const Draw& draw) {
    unsigned c0 = static_cast<unsigned>(draw.position), c1 = static_cast<unsigned>(draw.position >> 32);
    unsigned c2 = draw.choice, c3 = 0;
    unsigned k0 = static_cast<unsigned>(draw.seed), k1 = static_cast<unsigned>(draw.seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned low = c0 * 0xD2511F53u, low_high = __umulhi(c0, 0xD2511F53u);
        const unsigned high = c2 * 0xCD9E8D57u, high_high = __umulhi(c2, 0xCD9E8D57u);
        c0 = high_high ^ c1 ^ k0;
        c1 = high;
        c2 = low_high ^ c3 ^ k1;
        c3 = low;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (static_cast<uint64_t>(c0) << 32 | c1) >> 11;
}

// ---- keys: (logit, token) as numbers whose largest is the highest logit, ties to the lower token ----

// Larger for a larger number; more than 0 for all but a NaN of negative sign.
__device__ __forceinline__ unsigned order(float x) {
    const unsigned bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float ordered(unsigned order) {
    return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order);
}

__device__ __forceinline__ uint64_t key(float logit, unsigned token) {
    return static_cast<uint64_t>(order(logit)) << 32 | static_cast<unsigned>(~token);
}

__device__ __forceinline__ unsigned key_token(uint64_t key) { return ~static_cast<unsigned>(key); }
__device__ __forceinline__ float key_logit(uint64_t key) { return ordered(static_cast<unsigned>(key >> 32)); }

// ---- a block's sums ----

struct Sum {
    unsigned count;
    uint64_t mass;
};

struct Scratch {
    uint64_t keys[WARPS];
    uint64_t masses[WARPS];
    unsigned counts[WARPS];
    // A bin, chunk or token that one thread finds for all.
    unsigned found;
    Sum before;
};

__device__ __forceinline__ uint64_t block_max(uint64_t x, Scratch& scratch) {
#pragma unroll
    for (unsigned distance = 16; distance > 0; distance /= 2) {
        const uint64_t other = __shfl_xor_sync(~0u, x, distance);
        x = other > x ? other : x;
    }
    if (threadIdx.x % 32 == 0) scratch.keys[threadIdx.x / 32] = x;
    __syncthreads();
#pragma unroll
    for (unsigned warp = 0; warp < WARPS; ++warp) x = scratch.keys[warp] > x ? scratch.keys[warp] : x;
    __syncthreads();
    return x;
}

// What the threads before this one have, and what all have.
__device__ __forceinline__ Sum block_scan(Sum x, Scratch& scratch, Sum& total) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Sum up = x;
#pragma unroll
    for (unsigned distance = 1; distance < 32; distance *= 2) {
        const unsigned count = __shfl_up_sync(~0u, up.count, distance);
        const uint64_t mass = __shfl_up_sync(~0u, up.mass, distance);
        if (lane >= distance) {
            up.count += count;
            up.mass += mass;
        }
    }
    if (lane == 31) {
        scratch.counts[warp] = up.count;
        scratch.masses[warp] = up.mass;
    }
    __syncthreads();
    Sum before = {up.count - x.count, up.mass - x.mass};
    total = {0, 0};
#pragma unroll
    for (unsigned other = 0; other < WARPS; ++other) {
        if (other < warp) {
            before.count += scratch.counts[other];
            before.mass += scratch.masses[other];
        }
        total.count += scratch.counts[other];
        total.mass += scratch.masses[other];
    }
    __syncthreads();
    return before;
}

// ---- a chunk of a row ----

struct Chunk {
    unsigned first, len;
};

// The chunk's logits as they are; what is past the vocabulary is no number.
__device__ __forceinline__ void load_chunk(const float* row, Chunk chunk, float (&logits)[CHUNK]) {
    const float* from = row + chunk.first;
    const bool aligned = is_aligned<4>(from);
#pragma unroll
    for (unsigned at = threadIdx.x * 4; at < CHUNK; at += THREADS * 4) {
        float v[4];
        load(v, from + at, chunk.len > at ? chunk.len - at : 0, aligned);
#pragma unroll
        for (unsigned i = 0; i < 4; ++i)
            logits[at + i] = at + i < chunk.len ? v[i] : __uint_as_float(0x7fffffffu);
    }
    __syncthreads();
}

// The first of `len` pairs, ascending by token, whose token is at least this one.
__device__ __forceinline__ unsigned lower_bound(const uint2* pairs, unsigned len, unsigned token) {
    unsigned low = 0;
    while (len > 0) {
        const unsigned half = len / 2;
        if (pairs[low + half].x < token) {
            low += half + 1;
            len -= half + 1;
        } else {
            len = half;
        }
    }
    return low;
}

__device__ __forceinline__ float penalised(const Draw& draw, float logit, unsigned times) {
    if (draw.repetition != 1.0f)
        logit = logit > 0.0f ? __fdiv_rn(logit, draw.repetition) : __fmul_rn(logit, draw.repetition);
    if (times > 0 && (draw.presence != 0.0f || draw.frequency != 0.0f))
        logit = __fsub_rn(logit, __fadd_rn(draw.presence, __fmul_rn(draw.frequency, static_cast<float>(times))));
    return logit;
}

// Changes the logits of the chunk that bias, penalties and the lists of what may be drawn are about. `fed`: a token that counts as
// generated once more than the list of seen ones says, or NONE.
__device__ __forceinline__ void adjust(
    const Draw& draw, const unsigned* packed, unsigned fed, Chunk chunk, float (&logits)[CHUNK]) {
    const uint2* biases = reinterpret_cast<const uint2*>(packed + draw.biases);
    for (unsigned i = threadIdx.x; i < draw.biases_len; i += THREADS) {
        const unsigned token = biases[i].x, at = token - chunk.first;
        if (at >= chunk.len) continue;
        // The thread of a token's first bias adds all of them, in their order.
        float logit = logits[at];
        bool is_first = true;
        for (unsigned j = 0; j < draw.biases_len && is_first; ++j) {
            if (biases[j].x != token) continue;
            is_first = j >= i;
            logit = __fadd_rn(logit, __uint_as_float(biases[j].y));
        }
        if (is_first) logits[at] = logit;
    }
    __syncthreads();
    const uint2* seen = reinterpret_cast<const uint2*>(packed + draw.seen);
    for (unsigned i = lower_bound(seen, draw.seen_len, chunk.first) + threadIdx.x; i < draw.seen_len; i += THREADS) {
        const unsigned token = seen[i].x, at = token - chunk.first;
        if (at >= chunk.len) break;
        logits[at] = penalised(draw, logits[at], seen[i].y + (token == fed));
    }
    if (threadIdx.x == 0 && fed != NONE && fed - chunk.first < chunk.len) {
        const unsigned i = lower_bound(seen, draw.seen_len, fed), at = fed - chunk.first;
        if (i == draw.seen_len || seen[i].x != fed) logits[at] = penalised(draw, logits[at], 1);
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < draw.forbidden_len; i += THREADS) {
        const unsigned at = packed[draw.forbidden + i] - chunk.first;
        if (at < chunk.len) logits[at] = -INFINITY;
    }
    // Each thread bars the tokens of its own part of the chunk.
    if (draw.allowed_len > 0) {
        __syncthreads();
        for (unsigned at = threadIdx.x; at < chunk.len; at += THREADS) {
            const unsigned token = chunk.first + at, word = token / 32;
            const unsigned bits = word < draw.allowed_len ? packed[draw.allowed + word] : 0;
            if ((bits >> token % 32 & 1) == 0) logits[at] = -INFINITY;
        }
    }
    __syncthreads();
}

}  // namespace obol
