//! The ragged batch of one step, and what every language model does with it.

use std::ops::Range;

pub use obol_kernels::Span;

use crate::queue::{StepLimits, StepQueue};

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
    /// Rows whose hidden states, behind the last norm, are wanted, ascending; of spans that want no logits.
    pub hidden_rows: Vec<usize>,
}

impl Batch {
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.spans.clear();
        self.block_tables.clear();
        self.logit_rows.clear();
        self.hidden_rows.clear();
    }

    /// Becomes equal to `other`, in the memory that it has.
    pub fn copy_from(&mut self, other: &Self) {
        let Self { tokens, positions, spans, block_tables, logit_rows, hidden_rows } = other;
        self.tokens.clone_from(tokens);
        self.positions.clone_from(positions);
        self.spans.clone_from(spans);
        self.block_tables.clone_from(block_tables);
        self.logit_rows.clone_from(logit_rows);
        self.hidden_rows.clone_from(hidden_rows);
    }

    /// Which of the logits' rows belong to a span, as indices into `logit_rows`.
    pub fn logits_of(&self, span: usize) -> Range<usize> {
        self.places(&self.logit_rows, span)
    }

    /// Which of the hidden states' rows belong to a span, as indices into `hidden_rows`.
    pub fn hidden_of(&self, span: usize) -> Range<usize> {
        self.places(&self.hidden_rows, span)
    }

    fn places(&self, wanted: &[usize], span: usize) -> Range<usize> {
        let rows = &self.spans[span].rows;
        let first = wanted.partition_point(|row| *row < rows.start);
        first..first + wanted[first..].partition_point(|row| *row < rows.end)
    }

    /// Gives `each`, as `worker`, what the span asked for, if it did.
    pub fn give(&self, worker: usize, span: usize, made: Made<'_>, each: EachSpan<'_>) {
        let (logits, hidden) = (self.logits_of(span), self.hidden_of(span));
        if !logits.is_empty() {
            let rows = &made.logits[logits.start * made.vocab..logits.end * made.vocab];
            each(worker, span, SpanOutput::Logits(rows));
        }
        if !hidden.is_empty() {
            let rows = &made.hidden[hidden.start * made.width..hidden.end * made.width];
            each(worker, span, SpanOutput::Hidden(rows));
        }
    }

    /// Gives `each`, as worker 0, what each span asked for.
    pub fn give_each(&self, made: Made<'_>, each: EachSpan<'_>) {
        (0..self.spans.len()).for_each(|span| self.give(0, span, made, each));
    }

    /// Whether a model with these limits can run this batch.
    ///
    /// # Errors
    /// When tokens, positions, spans, tables or logit rows contradict each other or the limits. That is a
    /// bug of the caller, but one that must not corrupt other sequences' KV.
    pub fn check(&self, limits: BatchLimits) -> Result<(), ForwardError> {
        let fail = |what: String| Err(ForwardError(format!("inconsistent batch: {what}")));
        if self.tokens.len() != self.positions.len() {
            return fail(format!("{} tokens, {} positions", self.tokens.len(), self.positions.len()));
        }
        if let Some(token) = self.tokens.iter().find(|&&token| token as usize >= limits.vocab_size) {
            return fail(format!("token {token} outside the vocabulary of {}", limits.vocab_size));
        }
        let mut next_row = 0;
        for (index, span) in self.spans.iter().enumerate() {
            let rows = &span.rows;
            if rows.start != next_row || rows.is_empty() || rows.end > self.tokens.len() {
                return fail(format!("span {index} has the rows {rows:?}, expected from {next_row}"));
            }
            next_row = rows.end;
            let positions = &self.positions[rows.clone()];
            if positions.windows(2).any(|pair| pair[0].checked_add(1) != Some(pair[1])) {
                return fail(format!("span {index}: positions are not consecutive"));
            }
            let last = positions[positions.len() - 1] as usize;
            if last >= limits.context_length {
                return fail(format!("position {last} in a context of {}", limits.context_length));
            }
            let Some(table) = self.block_tables.get(span.table.clone()) else {
                return fail(format!("span {index} has the table {:?}", span.table));
            };
            if table.len() <= last / limits.block_size {
                return fail(format!("span {index}: {} blocks for position {last}", table.len()));
            }
            if let Some(block) = table.iter().find(|&&block| block as usize >= limits.blocks) {
                return fail(format!("span {index}: block {block} in a pool of {}", limits.blocks));
            }
        }
        if next_row != self.tokens.len() {
            return fail(format!("{} rows belong to no span", self.tokens.len() - next_row));
        }
        let ascending = self.logit_rows.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || self.logit_rows.last().is_some_and(|&row| row >= self.tokens.len()) {
            return fail(format!("logit rows {:?} of {}", self.logit_rows, self.tokens.len()));
        }
        let ascending = self.hidden_rows.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || self.hidden_rows.last().is_some_and(|&row| row >= self.tokens.len()) {
            return fail(format!("hidden rows {:?} of {}", self.hidden_rows, self.tokens.len()));
        }
        let both = |span: &usize| !self.logits_of(*span).is_empty() && !self.hidden_of(*span).is_empty();
        if let Some(span) = (0..self.spans.len()).find(both) {
            return fail(format!("span {span} wants logits and hidden states"));
        }
        Ok(())
    }
}

/// What a batch is checked against.
#[derive(Debug, Clone, Copy)]
pub struct BatchLimits {
    pub vocab_size: usize,
    pub context_length: usize,
    pub blocks: usize,
    pub block_size: usize,
}

/// A failed forward pass; the KV of the batch's sequences is then undefined.
#[derive(Debug, thiserror::Error)]
#[error("forward pass failed: {0}")]
pub struct ForwardError(pub String);

/// What a step made of one span's rows, those that it asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum SpanOutput<'a> {
    /// (rows, vocab)
    Logits(&'a [f32]),
    /// (rows, hidden), behind the last norm
    Hidden(&'a [f32]),
}

/// What a step made of all rows that were asked for.
#[derive(Debug, Clone, Copy)]
pub struct Made<'a> {
    /// (`logit_rows.len()`, vocab)
    pub logits: &'a [f32],
    pub vocab: usize,
    /// (`hidden_rows.len()`, width)
    pub hidden: &'a [f32],
    pub width: usize,
}

/// Takes what was made of one span: (worker, index of the span, its rows).
pub type EachSpan<'a> = &'a (dyn Fn(usize, usize, SpanOutput<'_>) + Sync);

/// Memory of a device of its own, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    pub free: u64,
    pub total: u64,
}

/// A decoder-only language model with a paged KV cache.
pub trait CausalLm: Send {
    /// Has all memory but the KV pool's for steps up to `limits`, so that no step can fail for want of it.
    ///
    /// # Errors
    /// When the memory cannot be had.
    fn reserve(&mut self, _limits: StepLimits) -> Result<(), ForwardError> {
        Ok(())
    }

    /// What its device has left, where it has memory of its own.
    ///
    /// # Errors
    /// When the device does not answer.
    fn device_memory(&self) -> Result<Option<DeviceMemory>, ForwardError> {
        Ok(None)
    }

    /// The way to run steps beside the host, for a device that can; none for one that computes on the host.
    fn queue(&mut self) -> Option<&mut dyn StepQueue> {
        None
    }

    /// Size of a logits row.
    fn vocab_size(&self) -> usize;

    /// Size of a row's hidden state; none where [`CausalLm::forward_each`] cannot give them.
    fn hidden_size(&self) -> Option<usize> {
        None
    }

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

    /// Threads that call what [`CausalLm::forward_each`] is given: workers are numbered below this.
    fn workers(&self) -> usize {
        1
    }

    /// Whether the calling thread can do something else while the device computes.
    fn overlaps(&self) -> bool {
        false
    }

    /// As [`CausalLm::forward`], but each span's logits or hidden states are given to `each`, on the model's own
    /// threads and in any order; spans that asked for neither are left out.
    ///
    /// `meanwhile` is called on the calling thread, at most once, when the device has been given its work: a
    /// model that [overlaps](CausalLm::overlaps) always calls it, unless it fails before that.
    ///
    /// # Errors
    /// When the computation could not be carried out.
    fn forward_each(
        &mut self,
        batch: &Batch,
        meanwhile: &mut dyn FnMut(),
        each: EachSpan<'_>,
    ) -> Result<(), ForwardError> {
        if !batch.hidden_rows.is_empty() {
            return Err(ForwardError("this model does not give its hidden states".into()));
        }
        meanwhile();
        let vocab = self.vocab_size();
        let logits = self.forward(batch)?;
        batch.give_each(Made { logits, vocab, hidden: &[], width: 0 }, each);
        Ok(())
    }
}
