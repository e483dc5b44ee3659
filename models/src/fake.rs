//! A tiny deterministic model for tests of the engine.
//!
//! Its logits are a hash of the sequence's whole token prefix as read back through the block table, so a
//! wrong table, a freed and reused block or a missing prefill changes the output (of the last tokens of it, for
//! a model told to forget the others). It knows no weights and needs no files. Invariant: equal prefixes give equal logits, whatever else is in the batch, however the
//! prefix was cut into steps and in whichever blocks it lies.

mod queue;

use crate::batch::{Batch, BatchLimits, CausalLm, EachSpan, ForwardError, Made};
use crate::queue::StepQueue;

pub use queue::{DrawnRow, FakeDevice};

use queue::Queued;

/// What a slot holds before anything was written to it; no token has this id.
const UNWRITTEN: u32 = u32::MAX;

/// Size of its hidden states.
const HIDDEN: usize = 4;

type OnForward = Box<dyn FnMut(&Batch) + Send>;

/// The fake; see the module's head.
pub struct FakeModel {
    vocab: usize,
    context_length: usize,
    seed: u64,
    /// How many of a prefix's last tokens its logits depend on.
    memory: usize,
    block_size: usize,
    /// (blocks * block_size) the token written at each slot.
    slots: Vec<u32>,
    logits: Vec<f32>,
    hidden: Vec<f32>,
    forwards: u64,
    fail_at: Option<u64>,
    fail_from: Option<u64>,
    panic_at: Option<u64>,
    on_forward: Option<OnForward>,
    queued: Option<Queued>,
}

impl FakeModel {
    /// A model of `vocab` tokens and `context_length` positions; `seed` chooses its function.
    pub fn new(vocab: usize, context_length: usize, seed: u64) -> Self {
        assert!(vocab > 0 && vocab < UNWRITTEN as usize, "a vocabulary of {vocab}");
        Self {
            vocab,
            context_length,
            seed,
            memory: usize::MAX,
            block_size: 1,
            slots: Vec::new(),
            logits: Vec::new(),
            hidden: Vec::new(),
            forwards: 0,
            fail_at: None,
            fail_from: None,
            panic_at: None,
            on_forward: None,
            queued: None,
        }
    }

    /// Its logits depend on the last `tokens` of a prefix only, so that what it says repeats.
    #[must_use]
    pub fn remembering(mut self, tokens: usize) -> Self {
        self.memory = tokens;
        self
    }

    /// The n-th forward or submission (from 1) fails.
    #[must_use]
    pub fn fail_at(mut self, forward: u64) -> Self {
        self.fail_at = Some(forward);
        self
    }

    /// The n-th forward or submission (from 1) and all after it fail, as those of a device that was lost.
    #[must_use]
    pub fn fail_from(mut self, forward: u64) -> Self {
        self.fail_from = Some(forward);
        self
    }

    /// The n-th forward or submission (from 1) panics.
    #[must_use]
    pub fn panic_at(mut self, forward: u64) -> Self {
        self.panic_at = Some(forward);
        self
    }

    /// Called at the start of each forward, or when a step is submitted, with its batch: to advance a clock by what the step costs, or to
    /// watch what the engine does.
    #[must_use]
    pub fn on_forward(mut self, hook: impl FnMut(&Batch) + Send + 'static) -> Self {
        self.on_forward = Some(Box::new(hook));
        self
    }

    /// The logits after `prefix`, computed without a pool: a test's oracle.
    pub fn logits_after(&self, prefix: &[u32]) -> Vec<f32> {
        let state = self.state_after(prefix);
        (0..self.vocab).map(|token| logit(state, token)).collect()
    }

    /// The hidden state after `prefix`, computed without a pool: a test's oracle.
    pub fn hidden_after(&self, prefix: &[u32]) -> Vec<f32> {
        hidden(self.state_after(prefix)).collect()
    }

    fn state_after(&self, prefix: &[u32]) -> u64 {
        let forgotten = prefix.len().saturating_sub(self.memory);
        prefix[forgotten..].iter().fold(self.seed, |state, &token| absorb(state, token))
    }

    fn blocks(&self) -> usize {
        self.slots.len() / self.block_size
    }

    fn slot(&self, table: &[u32], position: usize) -> usize {
        table[position / self.block_size] as usize * self.block_size + position % self.block_size
    }

    /// Counts the forward and does what it was told to do at its start.
    fn begin(&mut self, batch: &Batch) -> Result<(), ForwardError> {
        self.forwards += 1;
        if let Some(hook) = &mut self.on_forward {
            hook(batch);
        }
        assert!(self.panic_at != Some(self.forwards), "the fake model panics, as it was told to");
        if self.fail_at == Some(self.forwards) || self.fail_from.is_some_and(|from| self.forwards >= from) {
            return Err(ForwardError("the fake model fails, as it was told to".into()));
        }
        batch.check(self.limits())
    }

    fn panics_next(&self) -> bool {
        self.panic_at == Some(self.forwards + 1)
    }

    fn limits(&self) -> BatchLimits {
        BatchLimits {
            vocab_size: self.vocab,
            context_length: self.context_length,
            blocks: self.blocks(),
            block_size: self.block_size,
        }
    }

    /// Writes the batch's tokens, then makes its logits and hidden states from what its tables lead to.
    fn compute(&mut self, batch: &Batch) {
        for span in &batch.spans {
            let table = &batch.block_tables[span.table.clone()];
            for row in span.rows.clone() {
                let slot = self.slot(table, batch.positions[row] as usize);
                self.slots[slot] = batch.tokens[row];
            }
        }
        self.logits.clear();
        self.hidden.clear();
        for (index, span) in batch.spans.iter().enumerate() {
            let table = &batch.block_tables[span.table.clone()];
            for &row in &batch.logit_rows[batch.logits_of(index)] {
                let state = self.state_at(table, batch.positions[row]);
                self.logits.extend((0..self.vocab).map(|token| logit(state, token)));
            }
            for &row in &batch.hidden_rows[batch.hidden_of(index)] {
                let state = self.state_at(table, batch.positions[row]);
                self.hidden.extend(hidden(state));
            }
        }
    }

    /// What was written up to a position.
    fn state_at(&self, table: &[u32], position: u32) -> u64 {
        let length = position as usize + 1;
        (length.saturating_sub(self.memory)..length)
            .fold(self.seed, |state, position| absorb(state, self.slots[self.slot(table, position)]))
    }
}

impl CausalLm for FakeModel {
    fn queue(&mut self) -> Option<&mut dyn StepQueue> {
        self.queued.is_some().then_some(self as &mut dyn StepQueue)
    }

    fn vocab_size(&self) -> usize {
        self.vocab
    }

    fn hidden_size(&self) -> Option<usize> {
        self.queued.is_none().then_some(HIDDEN)
    }

    fn context_length(&self) -> usize {
        self.context_length
    }

    fn kv_bytes_per_token(&self) -> u64 {
        size_of::<u32>() as u64
    }

    fn allocate_kv(&mut self, blocks: usize, block_size: usize) -> Result<(), ForwardError> {
        assert!(block_size > 0, "a block holds a token at least");
        let slots = blocks
            .checked_mul(block_size)
            .ok_or_else(|| ForwardError(format!("{blocks} blocks of {block_size} tokens are too many")))?;
        self.slots = Vec::new();
        self.slots
            .try_reserve_exact(slots)
            .map_err(|_| ForwardError(format!("no memory for {blocks} KV blocks")))?;
        self.slots.resize(slots, UNWRITTEN);
        self.block_size = block_size;
        Ok(())
    }

    fn forward(&mut self, batch: &Batch) -> Result<&[f32], ForwardError> {
        self.begin(batch)?;
        self.compute(batch);
        Ok(&self.logits)
    }

    fn overlaps(&self) -> bool {
        true
    }

    fn forward_each(
        &mut self,
        batch: &Batch,
        meanwhile: &mut dyn FnMut(),
        each: EachSpan<'_>,
    ) -> Result<(), ForwardError> {
        self.begin(batch)?;
        meanwhile();
        self.compute(batch);
        let Self { logits, vocab, hidden, .. } = &*self;
        batch.give_each(Made { logits, vocab: *vocab, hidden, width: HIDDEN }, each);
        Ok(())
    }
}

fn absorb(state: u64, token: u32) -> u64 {
    mix(state ^ (u64::from(token) + 1))
}

/// Between -8 and 8, as a logit is.
fn hidden(state: u64) -> impl Iterator<Item = f32> {
    let state = mix(!state);
    (0..HIDDEN).map(move |at| logit(state, at))
}

/// Between -8 and 8: a spread like a trained model's, so that temperature and top-p have something to do.
fn logit(state: u64, token: usize) -> f32 {
    let random = mix(state.wrapping_add(token as u64 + 1)) >> 40;
    random as f32 * (16.0 / (1 << 24) as f32) - 8.0
}

/// The finaliser of splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Span, SpanOutput};

    /// One step of one sequence: `tokens` from `start` on, the last row's logits.
    fn step(model: &mut FakeModel, tokens: &[u32], start: u32, table: &[u32]) -> Vec<f32> {
        let batch = Batch {
            tokens: tokens.to_vec(),
            positions: (start..start + tokens.len() as u32).collect(),
            spans: vec![Span { rows: 0..tokens.len(), table: 0..table.len() }],
            block_tables: table.to_vec(),
            logit_rows: vec![tokens.len() - 1],
            hidden_rows: Vec::new(),
        };
        model.forward(&batch).expect("forward").to_vec()
    }

    fn model() -> FakeModel {
        let mut model = FakeModel::new(50, 64, 7);
        model.allocate_kv(8, 4).expect("a small pool");
        model
    }

    #[test]
    fn chunks_blocks_and_neighbours_do_not_matter() {
        let prefix: Vec<u32> = (0..10).map(|i| i * 3 % 50).collect();
        let expected = model().logits_after(&prefix);
        assert_eq!(step(&mut model(), &prefix, 0, &[0, 1, 2]), expected, "one chunk");
        assert_eq!(step(&mut model(), &prefix, 0, &[5, 0, 3]), expected, "other blocks");
        let mut chunked = model();
        step(&mut chunked, &prefix[..3], 0, &[5, 0, 3]);
        step(&mut chunked, &[49, 49, 49, 49], 0, &[1]);
        step(&mut chunked, &prefix[3..9], 3, &[5, 0, 3]);
        assert_eq!(step(&mut chunked, &prefix[9..], 9, &[5, 0, 3]), expected, "chunks and a neighbour");
    }

    #[test]
    fn mistakes_of_the_engine_change_the_output() {
        let prefix: Vec<u32> = (10..20).collect();
        let expected = model().logits_after(&prefix);
        let mut reused = model();
        step(&mut reused, &prefix[..9], 0, &[0, 1, 2]);
        step(&mut reused, &[1], 0, &[1]);
        assert_ne!(step(&mut reused, &prefix[9..], 9, &[0, 1, 2]), expected, "a block that another took");
        let mut skipped = model();
        step(&mut skipped, &prefix[..8], 0, &[0, 1, 2]);
        assert_ne!(step(&mut skipped, &prefix[9..], 9, &[0, 1, 2]), expected, "a token never prefilled");
        let mut swapped = model();
        step(&mut swapped, &prefix[..9], 0, &[0, 1, 2]);
        assert_ne!(step(&mut swapped, &prefix[9..], 9, &[1, 0, 2]), expected, "a wrong table");
        assert_ne!(FakeModel::new(50, 64, 8).logits_after(&prefix), expected, "another seed");
    }

    #[test]
    fn each_span_gets_the_rows_that_it_asked_for() {
        let batch = Batch {
            tokens: vec![1, 2, 3, 4],
            positions: vec![0, 1, 0, 0],
            spans: [0..2, 2..3, 3..4]
                .into_iter()
                .map(|rows| Span { table: rows.end - 1..rows.end, rows })
                .collect(),
            block_tables: vec![9, 0, 1, 2],
            logit_rows: vec![0, 1],
            hidden_rows: vec![3],
        };
        let expected = [[1].as_slice(), &[1, 2]].map(|prefix| model().logits_after(prefix)).concat();
        let expected = [(0, Some(expected), None), (2, None, Some(model().hidden_after(&[4])))];
        let without = Batch { hidden_rows: Vec::new(), ..batch.clone() };
        let models: [(Box<dyn CausalLm>, &Batch, usize); 2] =
            [(Box::new(model()), &batch, 2), (Box::new(Plain(model())), &without, 1)];
        for (mut model, batch, spans) in models {
            let got = std::sync::Mutex::new(Vec::new());
            let mut calls = 0;
            let each = |worker: usize, span: usize, made: SpanOutput<'_>| {
                assert_eq!(worker, 0);
                got.lock().unwrap().push(match made {
                    SpanOutput::Logits(rows) => (span, Some(rows.to_vec()), None),
                    SpanOutput::Hidden(rows) => (span, None, Some(rows.to_vec())),
                });
            };
            model.forward_each(batch, &mut || calls += 1, &each).expect("forward");
            assert_eq!((calls, model.workers()), (1, 1));
            assert_eq!(got.into_inner().unwrap(), expected[..spans]);
        }
        let refused = Plain(model()).forward_each(&batch, &mut || {}, &|_, _, _| {});
        assert!(refused.expect_err("it has none to give").0.contains("hidden states"));
    }

    /// A model that says no more than it must.
    struct Plain(FakeModel);

    impl CausalLm for Plain {
        fn vocab_size(&self) -> usize {
            self.0.vocab_size()
        }

        fn context_length(&self) -> usize {
            self.0.context_length()
        }

        fn kv_bytes_per_token(&self) -> u64 {
            self.0.kv_bytes_per_token()
        }

        fn allocate_kv(&mut self, blocks: usize, block_size: usize) -> Result<(), ForwardError> {
            self.0.allocate_kv(blocks, block_size)
        }

        fn forward(&mut self, batch: &Batch) -> Result<&[f32], ForwardError> {
            self.0.forward(batch)
        }
    }

    #[test]
    fn it_fails_and_panics_when_told_to() {
        let mut model = FakeModel::new(4, 8, 0).fail_at(2).panic_at(3);
        model.allocate_kv(1, 8).expect("a small pool");
        let batch = Batch {
            tokens: vec![1],
            positions: vec![0],
            spans: vec![Span { rows: 0..1, table: 0..1 }],
            block_tables: vec![0],
            logit_rows: vec![0],
            hidden_rows: Vec::new(),
        };
        model.forward(&batch).expect("the first");
        model.forward(&batch).expect_err("the second");
        let third = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            model.forward(&batch).expect("not reached");
        }));
        third.expect_err("the third");
    }

    #[test]
    fn inconsistent_batches_are_refused() {
        let good = Batch {
            tokens: vec![1, 2],
            positions: vec![3, 4],
            spans: vec![Span { rows: 0..2, table: 0..2 }],
            block_tables: vec![0, 1],
            logit_rows: vec![1],
            hidden_rows: Vec::new(),
        };
        let check = |what: &str, change: fn(&mut Batch)| {
            let mut batch = good.clone();
            change(&mut batch);
            let error = model().forward(&batch).map(<[f32]>::to_vec).expect_err(what);
            assert!(error.0.contains(what), "{what}: {error}");
        };
        model().forward(&good).expect("the unchanged one");
        check("token 50", |batch| batch.tokens[0] = 50);
        check("1 positions", |batch| batch.positions.truncate(1));
        check("not consecutive", |batch| batch.positions[1] = 9);
        check("position 64", |batch| batch.positions = vec![63, 64]);
        check("blocks for position", |batch| batch.spans[0].table = 0..1);
        check("has the table", |batch| batch.spans[0].table = 0..3);
        check("block 8", |batch| batch.block_tables[1] = 8);
        check("has the rows", |batch| batch.spans[0].rows = 1..2);
        check("belong to no span", |batch| batch.spans[0].rows = 0..1);
        check("logit rows", |batch| batch.logit_rows = vec![2]);
        check("logit rows", |batch| batch.logit_rows = vec![1, 0]);
        check("hidden rows", |batch| batch.hidden_rows = vec![2]);
        check("hidden rows", |batch| batch.hidden_rows = vec![1, 0]);
        check("wants logits and hidden states", |batch| batch.hidden_rows = vec![0]);
    }
}
