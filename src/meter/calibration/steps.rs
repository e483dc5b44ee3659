//! Steps to measure: batches of made-up sequences on the model's own forward pass and KV pool. What they
//! compute does not matter and overwrites what the pool held; what they cost is what a real step costs. A device
//! beside the host says itself how long it ran.
//!
//! Does not know what the times are for.

use std::time::{Duration, Instant};

use obol_models::batch::{CausalLm, ForwardError, Span};
use obol_models::queue::{RowDraw, Step, StepOutput};

use crate::meter::share::{StepClass, Work};

/// Blocks written in one go: few enough that a slow model stops in time.
const WRITE_AT_ONCE: usize = 16;

/// Sampling as most requests ask for it, of a made-up one.
const DRAW: RowDraw = RowDraw { temperature: 1.0, seed: 1, position: 1, ..RowDraw::GREEDY };

/// Sequences of a step that are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    pub sequences: usize,
    /// New tokens of each.
    pub tokens: usize,
    /// Positions before them.
    pub context: usize,
}

impl Group {
    #[must_use]
    pub const fn new(sequences: usize, tokens: usize, context: usize) -> Self {
        Self { sequences, tokens, context }
    }

    /// What each of its sequences computes.
    #[must_use]
    pub fn work(&self) -> Work {
        Work { tokens: self.tokens as u64, context: self.context as u64, logits: 1 }
    }
}

/// The class of a step of these groups, and what its sequences compute.
#[must_use]
pub fn works(groups: &[Group]) -> (StepClass, Vec<Work>) {
    let of = |decoding| {
        let alike = groups.iter().filter(move |group| (group.tokens == 1) == decoding);
        alike.map(|group| group.sequences).sum()
    };
    let works = groups.iter().flat_map(|group| vec![group.work(); group.sequences]);
    (StepClass::of(of(true), of(false)), works.collect())
}

/// A model with its KV pool.
pub struct Steps<'a> {
    model: &'a mut dyn CausalLm,
    blocks: usize,
    block_size: usize,
    step: Step,
    output: StepOutput,
    /// Blocks from the first on in which something was written.
    written: usize,
}

impl<'a> Steps<'a> {
    /// The model's pool has `blocks` blocks of `block_size` tokens.
    pub fn new(model: &'a mut dyn CausalLm, blocks: usize, block_size: usize) -> Self {
        let (step, output) = (Step::default(), StepOutput::default());
        Self { model, blocks, block_size, step, output, written: 0 }
    }

    /// Whether a first step of a kind may take longer than the next ones, and the device grows faster with work.
    #[must_use]
    pub fn warms_up(&mut self) -> bool {
        self.model.queue().is_some()
    }

    fn blocks_of(&self, group: &Group) -> usize {
        (group.context + group.tokens).div_ceil(self.block_size)
    }

    /// Blocks that a step of these groups uses.
    #[must_use]
    pub fn needed(&self, groups: &[Group]) -> usize {
        groups.iter().map(|group| group.sequences * self.blocks_of(group)).sum()
    }

    /// Whether the model's context and its pool are large enough for these groups.
    #[must_use]
    pub fn fit(&self, groups: &[Group]) -> bool {
        let longest = groups.iter().map(|group| group.context + group.tokens).max().unwrap_or(0);
        longest <= self.model.context_length() && self.needed(groups) <= self.blocks
    }

    /// Writes something in the first `blocks` blocks, if that can be done by `end`. Memory that was never
    /// written is all one page of zeros to the machine, and reading it costs next to nothing.
    ///
    /// Returns whether all are written.
    ///
    /// # Errors
    /// When a forward pass fails.
    pub fn write(&mut self, blocks: usize, end: Option<Instant>) -> Result<bool, ForwardError> {
        let mut took = Duration::ZERO;
        while self.written < blocks {
            let turns = (blocks - self.written).div_ceil(WRITE_AT_ONCE) as u32;
            if end.is_some_and(|end| Instant::now() + took * turns > end) {
                return Ok(false);
            }
            // A token in each block, as a sequence of its own: K and V of one position touch every page.
            let upto = (self.written + WRITE_AT_ONCE).min(blocks);
            self.step.clear();
            let batch = &mut self.step.batch;
            for (row, block) in (self.written..upto).enumerate() {
                batch.tokens.push(0);
                batch.positions.push(0);
                batch.block_tables.push(block as u32);
                batch.spans.push(Span { rows: row..row + 1, table: row..row + 1 });
            }
            let start = Instant::now();
            self.run()?;
            took = start.elapsed();
            self.written = upto;
        }
        Ok(true)
    }

    /// Makes ready to run steps of these groups, which fit.
    pub fn prepare(&mut self, groups: &[Group]) {
        self.step.clear();
        let mut next_block = 0;
        for group in groups {
            let needed = self.blocks_of(group);
            let Step { batch, draws, .. } = &mut self.step;
            for _ in 0..group.sequences {
                let rows = batch.tokens.len()..batch.tokens.len() + group.tokens;
                batch.tokens.extend((0..group.tokens).map(|i| (i % 97) as u32));
                batch.positions.extend((group.context..group.context + group.tokens).map(|p| p as u32));
                let table = batch.block_tables.len()..batch.block_tables.len() + needed;
                batch.block_tables.extend((next_block..next_block + needed).map(|b| b as u32));
                next_block += needed;
                batch.logit_rows.push(rows.end - 1);
                draws.push(DRAW);
                batch.spans.push(Span { rows, table });
            }
        }
    }

    /// Runs one step of the groups that were prepared, and says how long the device took.
    ///
    /// # Errors
    /// When the forward pass fails.
    pub fn run(&mut self) -> Result<Duration, ForwardError> {
        if let Some(queue) = self.model.queue() {
            queue.submit(&self.step)?;
            queue.wait(&mut self.output)?;
            return Ok(Duration::from_nanos(self.output.time.run));
        }
        let start = Instant::now();
        self.model.forward(&self.step.batch)?;
        Ok(start.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use obol_models::fake::{DrawnRow, FakeDevice, FakeModel};
    use obol_models::queue::{Draw, StepTime};

    use super::*;

    fn model() -> FakeModel {
        let mut model = FakeModel::new(100, 64, 1);
        model.allocate_kv(8, 16).expect("a small pool");
        model
    }

    #[test]
    fn steps_fit_where_context_and_pool_are_large_enough() {
        let mut model = model();
        let context = model.context_length();
        let mut steps = Steps::new(&mut model, 8, 16);
        assert!(steps.fit(&[Group::new(4, 1, 31)]) && !steps.fit(&[Group::new(4, 1, 32)]));
        assert!(!steps.fit(&[Group::new(1, 1, context)]));
        let groups = [Group::new(2, 1, 20), Group::new(1, 5, 0)];
        assert_eq!(steps.needed(&groups), 5);
        assert_eq!(works(&groups).0, StepClass::Mixed);
        assert_eq!(works(&groups).1.iter().map(|work| work.tokens).collect::<Vec<_>>(), [1, 1, 5]);
        assert!(steps.write(8, None).expect("the batch is consistent"));
        steps.prepare(&groups);
        steps.run().expect("the batch is consistent");
    }

    /// A device on which each row takes a microsecond, and each step ten.
    struct Rows(VecDeque<u64>);

    impl FakeDevice for Rows {
        fn submitted(&mut self, step: &Step) {
            self.0.push_back(10_000 + 1_000 * step.batch.tokens.len() as u64);
        }

        fn waited(&mut self) -> StepTime {
            let run = self.0.pop_front().expect("a step is in flight");
            StepTime { run, since_last_end: None }
        }

        fn draw(&mut self, _: DrawnRow<'_>) -> Draw {
            Draw { token: Some(0), ..Draw::default() }
        }

        fn lost(&mut self) {}
    }

    #[test]
    fn a_device_beside_the_host_says_how_long_it_ran() {
        let mut model = FakeModel::new(100, 64, 1).queued(2, Rows(VecDeque::new()));
        model.allocate_kv(8, 16).expect("a small pool");
        let mut steps = Steps::new(&mut model, 8, 16);
        assert!(steps.warms_up() && steps.write(8, None).expect("the batch is consistent"));
        steps.prepare(&[Group::new(2, 1, 20), Group::new(1, 5, 0)]);
        for _ in 0..2 {
            assert_eq!(steps.run().expect("the batch is consistent"), Duration::from_nanos(17_000));
        }
        let budget = Duration::from_millis(200);
        let coefficients =
            crate::meter::calibration::measure(&mut model, 8, 16, budget).expect("it runs").prefill;
        assert_eq!((coefficients.step, coefficients.attention), (10_000_000, 0), "{coefficients:?}");
        assert_eq!(coefficients.token + coefficients.logits, 1_000_000, "{coefficients:?}");
    }

    #[test]
    fn writing_stops_in_time() {
        let mut model = model();
        let mut steps = Steps::new(&mut model, 8, 16);
        let past = Instant::now().checked_sub(Duration::from_secs(1));
        assert!(!steps.write(8, past).expect("nothing is run"));
    }
}
