//! The memory that sampling needs between its passes, and their launches.

use super::{DrawLayout, RECORD_BYTES, SamplingPasses, TOP_MAX};
use crate::cuda::gpu::{Shape, arguments};
use crate::cuda::{Buffer, DeviceRows, Dtype, Gpu, GpuError};

/// Tokens of a block in the passes over the vocabulary, and its threads, as in sampling.cuh.
const CHUNK: usize = 2048;
const THREADS: u32 = 256;

/// Sums of weights over a larger vocabulary would not fit in 64 bits.
const VOCAB_MAX: usize = 1 << 20;

/// Bytes of a draw's bins of one counting pass, and its counting passes, as in sampling.cu.
const BINS: usize = 1024;
const COUNTED: usize = 5;
/// Bytes of `Cut` and `Kept` in sampling.cu, and a draw's cuts.
const CUT_BYTES: usize = 32;
const CUTS: usize = 4;
const KEPT_BYTES: usize = 8;

/// Working memory for steps of up to `draws` draws over a vocabulary.
pub struct DeviceSampler {
    draws: usize,
    vocab: usize,
    memory: Buffer,
}

/// Draws that [`DrawLayout::pack`] packed, copied to byte `start` of a buffer.
#[derive(Clone, Copy)]
pub struct PackedDraws<'a> {
    pub layout: DrawLayout,
    pub buffer: &'a Buffer,
    /// A multiple of 8.
    pub start: usize,
}

/// The tokens of a step's rows, u32, which fed rows' penalties look at.
#[derive(Clone, Copy)]
pub struct StepTokens<'a> {
    pub buffer: &'a Buffer,
    pub rows: usize,
}

/// As the kernels take it.
#[repr(C)]
struct Work {
    logits: u64,
    stride: u64,
    vocab: u32,
    chunks: u32,
    rows: u32,
    unused: u32,
    tokens: u64,
    packed: u64,
    peaks: u64,
    plain_peaks: u64,
    plain_masses: u64,
    masses: u64,
    tops: u64,
    ties: u64,
    bin_masses: u64,
    bin_counts: u64,
    cuts: u64,
    kept: u64,
    records: u64,
}

/// Bytes of a draw in each of the memory's arrays, those of 8-byte numbers first.
fn parts(vocab: usize) -> [usize; 10] {
    let chunks = vocab.div_ceil(CHUNK);
    let of_chunks = 8 * chunks;
    [
        of_chunks,
        of_chunks,
        of_chunks,
        of_chunks,
        of_chunks * TOP_MAX,
        COUNTED * BINS * 8,
        CUTS * CUT_BYTES,
        KEPT_BYTES,
        COUNTED * BINS * 4,
        4 * chunks,
    ]
}

impl Gpu {
    /// Working memory for steps of up to `draws` draws over `vocab` tokens.
    ///
    /// # Errors
    /// When the device has no memory for it.
    ///
    /// # Panics
    /// When the vocabulary is empty or has more than 2^20 tokens.
    pub fn sampler(&self, draws: usize, vocab: usize) -> Result<DeviceSampler, GpuError> {
        assert!((1..=VOCAB_MAX).contains(&vocab), "a vocabulary of {vocab} tokens");
        assert!(draws <= 65_535, "{draws} draws are too many");
        let memory = self.allocate(draws * parts(vocab).iter().sum::<usize>())?;
        Ok(DeviceSampler { draws, vocab, memory })
    }

    /// Draws from each row of `logits` (layout.draws, vocab), f32, as `packed` says, and leaves a record of
    /// [`RECORD_BYTES`] for each at the beginning of `records`. Places without a draw leave a record without a token.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When shapes do not fit each other or the sampler.
    pub fn sample(
        &self,
        sampler: &DeviceSampler,
        logits: DeviceRows<'_>,
        packed: PackedDraws<'_>,
        tokens: StepTokens<'_>,
        passes: SamplingPasses,
        records: &Buffer,
    ) -> Result<(), GpuError> {
        let (draws, vocab) = (packed.layout.draws, sampler.vocab);
        assert!(draws <= sampler.draws, "{draws} draws; the sampler is for {}", sampler.draws);
        assert_eq!(logits.dtype, Dtype::F32, "sampling: logits are f32");
        logits.check("sampling: logits", draws, vocab);
        let room = packed.buffer.bytes().checked_sub(packed.start);
        assert!(
            packed.start.is_multiple_of(8) && room >= Some(packed.layout.bytes()),
            "sampling: the draws do not fit"
        );
        assert!(tokens.buffer.bytes() >= tokens.rows * 4, "sampling: tokens are not ({})", tokens.rows);
        assert!(records.bytes() >= draws * RECORD_BYTES, "sampling: no room for {draws} records");

        let work = work(sampler, logits, packed, tokens, records);
        let kernels = &self.kernels().sampling;
        let count = draws as u32;
        let chunks = Shape::new([work.chunks, count, 1], THREADS);
        // SAFETY: these are the kernels' arguments: all arrays are as long as the draws need, and what the packed
        // draws name is inside their lists: both checked when packed. Tokens and rows are checked by the kernels.
        unsafe {
            self.launch(kernels.peaks, chunks, &mut arguments![work])?;
            if passes.top_k || passes.top_p || passes.logprobs {
                self.launch(kernels.survey, chunks, &mut arguments![work])?;
            }
            for (stage, asked) in
                [passes.top_k, passes.top_k, passes.top_p, passes.top_p].into_iter().enumerate()
            {
                if asked {
                    let stage = stage as u32;
                    self.launch(kernels.narrow, chunks, &mut arguments![work, stage])?;
                }
            }
            if passes.sampled {
                self.launch(kernels.keep, chunks, &mut arguments![work])?;
            }
            self.launch(kernels.pick, Shape::new([count, 1, 1], THREADS), &mut arguments![work])
        }
    }
}

fn work(
    sampler: &DeviceSampler,
    logits: DeviceRows<'_>,
    packed: PackedDraws<'_>,
    tokens: StepTokens<'_>,
    records: &Buffer,
) -> Work {
    let mut at = sampler.memory.address();
    let [peaks, plain_peaks, plain_masses, masses, tops, bin_masses, cuts, kept, bin_counts, ties] =
        parts(sampler.vocab).map(|bytes| {
            let start = at;
            at += (sampler.draws * bytes) as u64;
            start
        });
    Work {
        logits: logits.address(),
        stride: logits.stride as u64,
        vocab: sampler.vocab as u32,
        chunks: sampler.vocab.div_ceil(CHUNK) as u32,
        rows: tokens.rows as u32,
        unused: 0,
        tokens: tokens.buffer.address(),
        packed: packed.buffer.address() + packed.start as u64,
        peaks,
        plain_peaks,
        plain_masses,
        masses,
        tops,
        ties,
        bin_masses,
        bin_counts,
        cuts,
        kept,
        records: records.address(),
    }
}
