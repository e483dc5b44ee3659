//! What the host tells the device of a batch, besides attention's description.

use obol_kernels::cuda::{Gpu, GpuError, Pinned};

use super::work::Work;
use crate::batch::Batch;

/// Host memory that the device copies from by itself: tokens, positions and logit rows, u32 each, each with room for
/// the most rows of a step.
pub(super) struct Inputs {
    tokens: Pinned,
    positions: Pinned,
    logit_rows: Pinned,
}

impl Inputs {
    pub(super) fn new(gpu: &Gpu, rows: usize) -> Result<Self, GpuError> {
        let words = || gpu.pin(rows * size_of::<u32>());
        Ok(Self { tokens: words()?, positions: words()?, logit_rows: words()? })
    }

    /// Copies a batch to the device, in the stream's order; does not wait, so the inputs stay as they are until the
    /// step has run. `padded` rows, if more than the batch has, get token 0 and their own logits.
    pub(super) fn send(
        &mut self,
        gpu: &Gpu,
        work: &Work,
        batch: &Batch,
        padded: usize,
    ) -> Result<(), GpuError> {
        let rows = batch.tokens.len().max(padded);
        let more = rows - batch.tokens.len();
        let zeros = || std::iter::repeat_n(0, more);
        put(&mut self.tokens, batch.tokens.iter().copied().chain(zeros()));
        put(&mut self.positions, batch.positions.iter().copied().chain(zeros()));
        let own = batch.tokens.len()..rows;
        put(&mut self.logit_rows, batch.logit_rows.iter().copied().chain(own).map(|row| row as u32));
        let logit_rows = batch.logit_rows.len() + more;
        for (from, words, to) in [
            (&self.tokens, rows, &work.tokens),
            (&self.positions, rows, &work.positions),
            (&self.logit_rows, logit_rows, &work.logit_rows),
        ] {
            gpu.send(from, words * size_of::<u32>(), to, 0)?;
        }
        Ok(())
    }
}

/// Writes the words to the start of `to`, which is long enough.
pub(super) fn put(to: &mut Pinned, words: impl Iterator<Item = u32>) {
    for (to, word) in to.bytes_mut().as_chunks_mut::<4>().0.iter_mut().zip(words) {
        *to = word.to_le_bytes();
    }
}
