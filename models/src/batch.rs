//! The ragged batch of one step, and what every language model does with it.

use std::ops::Range;

/// One sequence's part of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Its rows in `tokens` and `positions`: consecutive positions of one sequence.
    pub rows: Range<usize>,
    /// Its block table in `block_tables`: block `position / block_size` holds `position`.
    /// Covers every position up to the last row's.
    pub table: Range<usize>,
}

/// The work of one step: prefill chunks and decodes mixed, tokens packed in one dimension.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// (rows)
    pub tokens: Vec<u32>,
    /// (rows) position of each token in its sequence; the KV of all earlier positions is in the pool.
    pub positions: Vec<u32>,
    pub spans: Vec<Span>,
    /// All sequences' block tables, one after another.
    pub block_tables: Vec<u32>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: Vec<usize>,
}

impl Batch {
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.spans.clear();
        self.block_tables.clear();
        self.logit_rows.clear();
    }
}

/// A failed forward pass; the KV of the batch's sequences is then undefined.
#[derive(Debug, thiserror::Error)]
#[error("forward pass failed: {0}")]
pub struct ForwardError(pub String);

/// A decoder-only language model with a paged KV cache.
pub trait CausalLm: Send {
    /// Size of a logits row.
    fn vocab_size(&self) -> usize;

    /// Largest number of positions in a sequence.
    fn context_length(&self) -> usize;

    /// Bytes of KV cache that one token takes, all layers.
    fn kv_bytes_per_token(&self) -> u64;

    /// Makes the KV pool, replacing any earlier one.
    ///
    /// # Errors
    /// When the memory cannot be had.
    fn allocate_kv(&mut self, blocks: usize, block_size: usize) -> Result<(), ForwardError>;

    /// Runs one step: writes each row's K and V at its position, and returns the logits
    /// (`logit_rows.len()`, `vocab_size`), row-major.
    ///
    /// A row's logits depend, bit for bit, only on its sequence's tokens up to its position: not on
    /// what else is in the batch, how the prompt was cut into chunks, or the number of threads.
    ///
    /// # Errors
    /// When the computation could not be carried out.
    fn forward(&mut self, batch: &Batch) -> Result<&[f32], ForwardError>;
}
