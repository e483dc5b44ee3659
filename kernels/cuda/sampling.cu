// Draws tokens from rows of logits, by the rules of src/engine/sampler.rs and with its bits.
//
// Weights are summed up in whole units, exactly, so blocks may add them in any order. The passes, each over all draws,
// blocks of a pass over the vocabulary having 2,048 tokens each:
//   peaks    the highest logit of each chunk, plain and adjusted
//   survey   with filters: counts and sums of weights by the leading bits of the weight, 704 bins; with
//            log-probabilities: the plain row's sum of weights and each chunk's most likely
//   narrow   four times, 10 and 9 bits further: the exact weight at which top-k cuts, then that of top-p
//   keep     sums of what is left, by chunk
//   pick     one block a draw: the chunk, then the token at which the sum passes the random number
// A draw takes part in the passes it needs: a greedy one in the first and the last.
//
// Bytes: a pass reads 4 bytes a token: 513 kB for a vocabulary of 128,256. Greedy: once, 64 rows are 33 MB, 10 us on an
// H100 SXM (3.35 TB/s). The later passes find the logits in the second-level cache (50 MB) and compute about 40
// operations a token: 64 rows 8.2 M tokens, 0.33 G operations, 5 us at a tenth of the peak; each is rather limited by
// its launch and its block's start (a lookup of 8 KiB of bins, a few barriers, 3 to 4 us). So a mixed step with top-k and
// top-p takes 30 to 40 us and one with temperature alone 20 us, whatever the number of rows up to some tens. Worst are
// rows whose tokens all fall into one bin: their additions in shared memory then wait for each other, some 10 us a pass.

#include "sampling.cuh"

namespace obol {

// Bins of a level; the first has 704, the last 512.
constexpr unsigned BINS = 1024;
// Passes that count: survey, and narrow's four.
constexpr unsigned COUNTED = 5;

// What a draw's passes leave for those after them.
struct Cut {
    // Whether anything is cut off: else the fields below mean nothing.
    unsigned is_any;
    // The bits so far of the least weight that is kept, as `depth` gives them, others 0.
    unsigned depth;
    // Tokens of a larger weight than those bits say.
    Sum above;
    // Of top-p: what the kept ones reach together.
    uint64_t target;
};

// The kept tokens: those of more than this weight, and the first `ties` of this weight.
struct Kept {
    float least;
    unsigned ties;
};

// One array a field, by draws, then chunks, as sampling/workspace.rs lays them out.
struct Work {
    const float* logits;
    uint64_t stride;
    unsigned vocab, chunks;
    // Tokens of the step, for those that are fed.
    unsigned rows, unused;
    const unsigned* tokens;
    const unsigned* packed;
    uint64_t *peaks, *plain_peaks, *plain_masses, *masses, *tops;
    unsigned* ties;
    uint64_t* bin_masses;
    unsigned* bin_counts;
    Cut* cuts;
    Kept* kept;
    Record* records;
};

// The bits of a weight, 0 for the largest.
__device__ __forceinline__ unsigned depth_of(float weight) {
    const unsigned bits = __float_as_uint(weight);
    return bits < 0x3f800000u ? 0x3f800000u - bits : 0;
}

__device__ __forceinline__ float weight_at(unsigned depth) { return __uint_as_float(0x3f800000u - depth); }

// Levels of narrowing: the bits of a depth below each.
__device__ __forceinline__ unsigned bits_below(unsigned level) { return level == 0 ? 19 : level == 1 ? 9 : 0; }

struct Block {
    // By value, so that it stays in the parameters' memory.
    Work work;
    const Draw& draw;
    unsigned index;
    Chunk chunk;
    Scratch& scratch;

    __device__ __forceinline__ Block(const Work& work, unsigned index, unsigned chunk, Scratch& scratch)
        : work(work), draw(reinterpret_cast<const Draw*>(work.packed)[index]), index(index), scratch(scratch) {
        at_chunk(chunk);
    }

    __device__ __forceinline__ void at_chunk(unsigned at) {
        const unsigned first = at * CHUNK;
        chunk = {first, min(CHUNK, work.vocab - first)};
    }

    __device__ __forceinline__ bool asks(unsigned what) const { return (draw.asks & what) == what; }
    __device__ __forceinline__ const float* row() const { return work.logits + index * work.stride; }
    __device__ __forceinline__ uint64_t chunk_at() const {
        return static_cast<uint64_t>(index) * work.chunks + blockIdx.x;
    }

    __device__ __forceinline__ void load_plain(float (&logits)[CHUNK]) const { load_chunk(row(), chunk, logits); }

    __device__ __forceinline__ void adjust_loaded(float (&logits)[CHUNK]) const {
        if (!asks(ADJUSTED)) return;
        unsigned fed = NONE;
        const bool penalises = draw.repetition != 1.0f || draw.presence != 0.0f || draw.frequency != 0.0f;
        if (penalises && draw.fed < work.rows) fed = work.tokens[draw.fed];
        adjust(draw, work.packed, fed, chunk, logits);
    }

    // The chunk's highest finite logit, as a key; 0: none.
    __device__ __forceinline__ uint64_t peak(const float (&logits)[CHUNK]) const {
        uint64_t best = 0;
#pragma unroll
        for (unsigned i = 0; i < EACH; ++i) {
            const unsigned at = threadIdx.x + i * THREADS;
            // -0 and 0 are equal.
            const float logit = __fadd_rn(logits[at], 0.0f);
            if (fabsf(logit) < INFINITY) {
                const uint64_t found = key(logit, chunk.first + at);
                best = found > best ? found : best;
            }
        }
        return block_max(best, scratch);
    }

    // The best of all chunks' keys.
    __device__ __forceinline__ uint64_t best(const uint64_t* peaks) const {
        uint64_t best = 0;
        for (unsigned at = threadIdx.x; at < work.chunks; at += THREADS) {
            const uint64_t found = peaks[static_cast<uint64_t>(index) * work.chunks + at];
            best = found > best ? found : best;
        }
        return block_max(best, scratch);
    }

    __device__ __forceinline__ Scale scale(uint64_t best) const {
        return {key_logit(best), draw.inverse, draw.floor};
    }

    __device__ __forceinline__ uint64_t bins_at(unsigned counted) const {
        return (static_cast<uint64_t>(index) * COUNTED + counted) * BINS;
    }

    // The first bin with which the count, or the mass, reaches `target` (at least 1), what is before it, and what all
    // bins have. NONE when all do not reach it.
    __device__ __forceinline__ unsigned find(
        unsigned counted, bool by_mass, uint64_t target, Sum& before, Sum& total) const {
        constexpr unsigned OWN = BINS / THREADS;
        const uint64_t at = bins_at(counted) + threadIdx.x * OWN;
        Sum bins[OWN], own = {0, 0};
#pragma unroll
        for (unsigned i = 0; i < OWN; ++i) {
            bins[i] = {work.bin_counts[at + i], work.bin_masses[at + i]};
            own.count += bins[i].count;
            own.mass += bins[i].mass;
        }
        if (threadIdx.x == 0) scratch.found = NONE;
        Sum sum = block_scan(own, scratch, total);
#pragma unroll
        for (unsigned i = 0; i < OWN; ++i) {
            const uint64_t low = by_mass ? sum.mass : sum.count;
            const uint64_t high = low + (by_mass ? bins[i].mass : bins[i].count);
            if (low < target && high >= target) {
                scratch.found = threadIdx.x * OWN + i;
                scratch.before = sum;
            }
            sum.count += bins[i].count;
            sum.mass += bins[i].mass;
        }
        __syncthreads();
        const unsigned found = scratch.found;
        before = scratch.before;
        __syncthreads();
        return found;
    }

    // One level further down from `cut`, of level `level` bins that were counted.
    __device__ __forceinline__ Cut narrowed(Cut cut, unsigned counted, unsigned level, bool by_mass, uint64_t target) {
        Sum before, total;
        const uint64_t left = target - (by_mass ? cut.above.mass : cut.above.count);
        const unsigned bin = find(counted, by_mass, left, before, total);
        if (bin == NONE) return {};
        cut.is_any = 1;
        cut.depth |= bin << bits_below(level);
        cut.above.count += before.count;
        cut.above.mass += before.mass;
        cut.target = target;
        return cut;
    }

    // Where top-k cuts, once all levels are counted.
    __device__ __forceinline__ Cut cut_of_top_k() {
        const Cut cut = work.cuts[index * 4 + 1];
        return cut.is_any ? narrowed(cut, 2, 2, false, draw.top_k) : cut;
    }

    __device__ __forceinline__ Kept kept_of_top_k() {
        const Cut cut = cut_of_top_k();
        if (!cut.is_any) return {0.0f, 0};
        return {weight_at(cut.depth), draw.top_k - cut.above.count};
    }

    __device__ __forceinline__ Kept kept_of_top_p() {
        const Cut before = work.cuts[index * 4 + 3];
        if (!before.is_any) return {0.0f, 0};
        const Cut cut = narrowed(before, 4, 2, true, before.target);
        const float least = weight_at(cut.depth);
        const uint64_t unit = units(least);
        return {least, static_cast<unsigned>((cut.target - cut.above.mass + unit - 1) / unit)};
    }

    // What top-p leaves is to reach this.
    __device__ __forceinline__ uint64_t target_of_top_p() {
        uint64_t total = 0;
        const Cut cut = asks(TOP_K) ? cut_of_top_k() : Cut{};
        if (cut.is_any) {
            total = cut.above.mass + (draw.top_k - cut.above.count) * units(weight_at(cut.depth));
        } else {
            Sum before, all;
            find(0, true, 1, before, all);
            total = all.mass;
        }
        const uint64_t target = share(draw.top_p, total);
        return target > 0 ? target : 1;
    }
};

// Bins of one block.
struct Bins {
    uint64_t masses[BINS];
    unsigned counts[BINS];

    __device__ __forceinline__ void clear() {
        for (unsigned i = threadIdx.x; i < BINS; i += THREADS) {
            masses[i] = 0;
            counts[i] = 0;
        }
        __syncthreads();
    }

    // Counts the chunk's tokens whose depth begins as `depth` does above `level`, by their bits of the level, and
    // adds that to the draw's bins.
    __device__ __forceinline__ void count(
        const Block& block, const Scale& scale, const float (&logits)[CHUNK], unsigned level, unsigned depth,
        unsigned counted) {
        clear();
        const unsigned below = bits_below(level), above = level == 0 ? 31 : bits_below(level - 1);
        const unsigned mask = (1u << (above - below)) - 1;
#pragma unroll
        for (unsigned i = 0; i < EACH; ++i) {
            const float weight = scale.weight(logits[threadIdx.x + i * THREADS]);
            const unsigned at = depth_of(weight);
            if (weight > 0.0f && at >> above == depth >> above) {
                const unsigned bin = at >> below & mask;
                atomicAdd(&counts[bin], 1);
                atomicAdd(
                    reinterpret_cast<unsigned long long*>(&masses[bin]),
                    static_cast<unsigned long long>(units(weight)));
            }
        }
        __syncthreads();
        const uint64_t bins = block.bins_at(counted);
        for (unsigned i = threadIdx.x; i < BINS; i += THREADS) {
            if (counts[i] == 0) continue;
            atomicAdd(&block.work.bin_counts[bins + i], counts[i]);
            atomicAdd(
                reinterpret_cast<unsigned long long*>(&block.work.bin_masses[bins + i]),
                static_cast<unsigned long long>(masses[i]));
        }
    }
};

// The plain row's sum of weights in this chunk, and its most likely.
__device__ __forceinline__ void survey_plain(const Block& block, const float (&logits)[CHUNK]) {
    const Work work = block.work;
    const uint64_t best = block.best(work.plain_peaks);
    // All that is more than nothing in an f32.
    const Scale scale = {key_logit(best), 1.0f, -80.0f};
    Sum own = {0, 0}, total;
#pragma unroll
    for (unsigned i = 0; i < EACH; ++i) own.mass += units(scale.weight(logits[threadIdx.x + i * THREADS]));
    block_scan(own, block.scratch, total);
    if (threadIdx.x == 0) work.plain_masses[block.chunk_at()] = total.mass;
    uint64_t last = ~0ull;
    for (unsigned rank = 0; rank < min(block.draw.top, TOP_MAX); ++rank) {
        uint64_t most = 0;
#pragma unroll
        for (unsigned i = 0; i < EACH; ++i) {
            const unsigned at = threadIdx.x + i * THREADS;
            // No NaN, and no infinity above.
            if (!(logits[at] < INFINITY)) continue;
            const uint64_t found = key(logits[at], block.chunk.first + at);
            if (found < last && found > most) most = found;
        }
        last = block_max(most, block.scratch);
        if (threadIdx.x == 0) work.tops[block.chunk_at() * TOP_MAX + rank] = last;
    }
}

// The token of the chunk at which the kept weights' sum passes `target`, `ties` of the least weight being kept here.
__device__ __forceinline__ unsigned pick_in_chunk(
    Block& block, const Scale& scale, Kept kept, unsigned ties, uint64_t target, float (&logits)[CHUNK]) {
    block.load_plain(logits);
    block.adjust_loaded(logits);
    float weights[EACH];
    Sum own = {0, 0}, total;
#pragma unroll
    for (unsigned i = 0; i < EACH; ++i) {
        weights[i] = scale.weight(logits[threadIdx.x * EACH + i]);
        if (weights[i] == kept.least) ++own.count;
    }
    unsigned tie = block_scan(own, block.scratch, total).count;
#pragma unroll
    for (unsigned i = 0; i < EACH; ++i) {
        const bool is_kept = weights[i] > kept.least || (weights[i] == kept.least && tie < ties);
        if (weights[i] == kept.least) ++tie;
        if (!is_kept) weights[i] = 0.0f;
        own.mass += units(weights[i]);
    }
    uint64_t sum = block_scan(own, block.scratch, total).mass;
#pragma unroll
    for (unsigned i = 0; i < EACH; ++i) {
        const uint64_t next = sum + units(weights[i]);
        if (sum <= target && target < next) block.scratch.found = block.chunk.first + threadIdx.x * EACH + i;
        sum = next;
    }
    __syncthreads();
    return block.scratch.found;
}

// The drawn token; the best where nothing weighs anything.
__device__ __forceinline__ unsigned pick_token(Block& block, uint64_t best, float (&logits)[CHUNK]) {
    const Work work = block.work;
    const Kept kept = work.kept[block.index];
    const Scale scale = block.scale(best);
    const uint64_t unit = units(kept.least), first = static_cast<uint64_t>(block.index) * work.chunks;
    // Consecutive chunks of a thread.
    const unsigned own_len = (work.chunks + THREADS - 1) / THREADS;
    const unsigned begin = min(threadIdx.x * own_len, work.chunks), end = min(begin + own_len, work.chunks);
    Sum own = {0, 0}, total;
    for (unsigned at = begin; at < end; ++at) own.count += work.ties[first + at];
    const unsigned ties_before = block_scan(own, block.scratch, total).count;
    const auto mass_of = [&](unsigned at, unsigned& before) {
        const unsigned here = min(work.ties[first + at], kept.ties - min(before, kept.ties));
        before += work.ties[first + at];
        return work.masses[first + at] + here * unit;
    };
    unsigned ties = ties_before;
    for (unsigned at = begin; at < end; ++at) own.mass += mass_of(at, ties);
    uint64_t sum = block_scan(own, block.scratch, total).mass;
    if (total.mass == 0) return key_token(best);
    const uint64_t target = below(total.mass, random_bits(block.draw));
    ties = ties_before;
    for (unsigned at = begin; at < end; ++at) {
        const unsigned before = ties;
        const uint64_t next = sum + mass_of(at, ties);
        if (sum <= target && target < next) {
            block.scratch.found = at;
            block.scratch.before = {before, sum};
        }
        sum = next;
    }
    __syncthreads();
    const unsigned chunk = block.scratch.found;
    const Sum before = block.scratch.before;
    __syncthreads();
    block.at_chunk(chunk);
    const unsigned left = kept.ties - min(before.count, kept.ties);
    return pick_in_chunk(block, scale, kept, left, target - before.mass, logits);
}

// The log-probability of the token, and the most likely ones.
__device__ __forceinline__ void give_logprobs(const Block& block, unsigned token, Record& record) {
    const Work work = block.work;
    const uint64_t best = block.best(work.plain_peaks), first = static_cast<uint64_t>(block.index) * work.chunks;
    Sum own = {0, 0}, total;
    for (unsigned at = threadIdx.x; at < work.chunks; at += THREADS) own.mass += work.plain_masses[first + at];
    block_scan(own, block.scratch, total);
    const double sum = static_cast<double>(total.mass) / static_cast<double>(1ull << UNIT_BITS);
    const float log_sum = __fadd_rn(key_logit(best), static_cast<float>(log(sum)));
    if (threadIdx.x == 0) record.logprob = __fsub_rn(block.row()[token], log_sum);
    const unsigned top = min(block.draw.top, TOP_MAX);
    uint64_t last = ~0ull;
    unsigned rank = 0;
    for (; rank < top; ++rank) {
        uint64_t most = 0;
        for (unsigned at = threadIdx.x; at < work.chunks * top; at += THREADS) {
            const uint64_t found = work.tops[(first + at / top) * TOP_MAX + at % top];
            if (found < last && found > most) most = found;
        }
        last = block_max(most, block.scratch);
        if (last == 0) break;
        if (threadIdx.x == 0) record.top[rank] = {key_token(last), __fsub_rn(key_logit(last), log_sum)};
    }
    if (threadIdx.x == 0) record.top_len = rank;
}

}  // namespace obol

using namespace obol;

extern "C" __global__ void __launch_bounds__(THREADS) sample_peaks(Work work) {
    __shared__ float logits[CHUNK];
    __shared__ Scratch scratch;
    Block block(work, blockIdx.y, blockIdx.x, scratch);
    if (!block.asks(ACTIVE)) return;
    if (block.asks(TOP_K) || block.asks(TOP_P)) {
        // Nobody counts before the next launch.
        const uint64_t bins = block.bins_at(0);
        for (unsigned i = blockIdx.x * THREADS + threadIdx.x; i < COUNTED * BINS; i += work.chunks * THREADS) {
            work.bin_counts[bins + i] = 0;
            work.bin_masses[bins + i] = 0;
        }
    }
    block.load_plain(logits);
    if (block.asks(LOGPROBS)) {
        const uint64_t peak = block.peak(logits);
        if (threadIdx.x == 0) work.plain_peaks[block.chunk_at()] = peak;
    }
    block.adjust_loaded(logits);
    const uint64_t peak = block.peak(logits);
    if (threadIdx.x == 0) work.peaks[block.chunk_at()] = peak;
}

extern "C" __global__ void __launch_bounds__(THREADS) sample_survey(Work work) {
    __shared__ float logits[CHUNK];
    __shared__ Bins bins;
    __shared__ Scratch scratch;
    Block block(work, blockIdx.y, blockIdx.x, scratch);
    const bool filters = block.asks(TOP_K) || block.asks(TOP_P);
    if (!block.asks(ACTIVE) || !(filters || block.asks(LOGPROBS))) return;
    const uint64_t best = block.best(work.peaks);
    if (best == 0) return;
    block.load_plain(logits);
    if (block.asks(LOGPROBS)) survey_plain(block, logits);
    if (!filters) return;
    block.adjust_loaded(logits);
    bins.count(block, block.scale(best), logits, 0, 0, 0);
}

// Stages 0 and 1: levels 1 and 2 of top-k; 2 and 3: of top-p.
extern "C" __global__ void __launch_bounds__(THREADS) sample_narrow(Work work, unsigned stage) {
    __shared__ float logits[CHUNK];
    __shared__ Bins bins;
    __shared__ Scratch scratch;
    Block block(work, blockIdx.y, blockIdx.x, scratch);
    const bool by_mass = stage >= 2, is_first = stage % 2 == 0;
    if (!block.asks(ACTIVE | (by_mass ? TOP_P : TOP_K))) return;
    const uint64_t best = block.best(work.peaks);
    if (best == 0) return;
    Cut cut = {};
    if (is_first) {
        const uint64_t target = by_mass ? block.target_of_top_p() : block.draw.top_k;
        cut = block.narrowed(cut, 0, 0, by_mass, target);
    } else {
        cut = work.cuts[block.index * 4 + stage - 1];
        if (cut.is_any) cut = block.narrowed(cut, stage, 1, by_mass, cut.target);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) work.cuts[block.index * 4 + stage] = cut;
    if (!cut.is_any) return;
    block.load_plain(logits);
    block.adjust_loaded(logits);
    bins.count(block, block.scale(best), logits, is_first ? 1 : 2, cut.depth, stage + 1);
}

extern "C" __global__ void __launch_bounds__(THREADS) sample_keep(Work work) {
    __shared__ float logits[CHUNK];
    __shared__ Scratch scratch;
    Block block(work, blockIdx.y, blockIdx.x, scratch);
    if (!block.asks(ACTIVE | SAMPLED)) return;
    const uint64_t best = block.best(work.peaks);
    if (best == 0) return;
    Kept kept = {0.0f, 0};
    if (block.asks(TOP_P)) {
        kept = block.kept_of_top_p();
    } else if (block.asks(TOP_K)) {
        kept = block.kept_of_top_k();
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) work.kept[block.index] = kept;
    block.load_plain(logits);
    block.adjust_loaded(logits);
    const Scale scale = block.scale(best);
    Sum own = {0, 0}, total;
#pragma unroll
    for (unsigned i = 0; i < EACH; ++i) {
        const float weight = scale.weight(logits[threadIdx.x + i * THREADS]);
        if (weight > kept.least) own.mass += units(weight);
        if (weight == kept.least) ++own.count;
    }
    block_scan(own, scratch, total);
    if (threadIdx.x == 0) {
        work.masses[block.chunk_at()] = total.mass;
        work.ties[block.chunk_at()] = total.count;
    }
}

// One block a draw: registers matter more than blocks side by side.
extern "C" __global__ void __launch_bounds__(THREADS, 2) sample_pick(Work work) {
    __shared__ float logits[CHUNK];
    __shared__ Scratch scratch;
    Block block(work, blockIdx.x, 0, scratch);
    Record& record = work.records[blockIdx.x];
    const uint64_t best = block.asks(ACTIVE) ? block.best(work.peaks) : 0;
    if (threadIdx.x == 0) {
        record.token = NONE;
        record.logprob = 0.0f;
        record.top_len = 0;
        record.unused = 0;
    }
    if (best == 0) return;
    const unsigned token = block.asks(SAMPLED) ? pick_token(block, best, logits) : key_token(best);
    if (threadIdx.x == 0) record.token = token;
    if (block.asks(LOGPROBS)) give_logprobs(block, token, record);
}
