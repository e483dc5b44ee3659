//! The fake behind a queue: the same function of the same prefixes, computed when a step is waited for. How
//! tokens are drawn and when steps run is its test's to say.

use std::collections::VecDeque;

use crate::batch::{Batch, ForwardError};
use crate::queue::{Draw, RowDraw, Seen, Step, StepOutput, StepQueue, StepTime};

use super::{FakeModel, UNWRITTEN};

/// What the fake does not know of the device that it plays.
pub trait FakeDevice: Send {
    /// A step was given to it.
    fn submitted(&mut self, step: &Step);

    /// The host waits for the oldest step in flight, and is told when that ran.
    fn waited(&mut self) -> StepTime;

    fn draw(&mut self, row: DrawnRow<'_>) -> Draw;

    /// A step failed: nothing is in flight any more.
    fn lost(&mut self);
}

/// A row of logits, and what is known of the draw from it.
#[derive(Debug, Clone, Copy)]
pub struct DrawnRow<'a> {
    /// (vocab)
    pub logits: &'a [f32],
    pub draw: &'a RowDraw,
    pub biases: &'a [(u32, f32)],
    pub forbidden: &'a [u32],
    /// Bits of those that may be drawn; empty: all.
    pub allowed: &'a [u32],
    /// The token of a fed row is counted.
    pub seen: &'a [Seen],
}

pub(super) struct Queued {
    depth: usize,
    device: Box<dyn FakeDevice>,
    flights: VecDeque<Step>,
    /// What the last step that was computed drew.
    drawn: Vec<Option<u32>>,
    waits: u64,
    fail_at: Option<u64>,
}

impl FakeModel {
    /// Takes steps through a queue of `depth`.
    #[must_use]
    pub fn queued(mut self, depth: usize, device: impl FakeDevice + 'static) -> Self {
        assert!((1..=2).contains(&depth), "a queue of depth {depth}");
        self.queued = Some(Queued {
            depth,
            device: Box::new(device),
            flights: VecDeque::new(),
            drawn: Vec::new(),
            waits: 0,
            fail_at: None,
        });
        self
    }

    /// The n-th wait (from 1) for a step of the queue fails.
    ///
    /// # Panics
    /// Without a queue.
    #[must_use]
    pub fn fail_at_wait(mut self, wait: u64) -> Self {
        self.parts().0.fail_at = Some(wait);
        self
    }

    fn parts(&mut self) -> (&mut Queued, &mut Vec<u32>) {
        (self.queued.as_mut().expect("the fake was given a queue"), &mut self.slots)
    }

    /// Nothing is in flight any more, and what was is written nowhere.
    fn lose(&mut self, step: Option<&Step>) {
        let queued = self.parts().0;
        queued.device.lost();
        let flights = std::mem::take(&mut queued.flights);
        for step in flights.iter().chain(step) {
            self.scribble(&step.batch);
        }
    }

    fn scribble(&mut self, batch: &Batch) {
        for span in &batch.spans {
            let Some(table) = batch.block_tables.get(span.table.clone()) else { continue };
            for &position in batch.positions.get(span.rows.clone()).into_iter().flatten() {
                let block = table.get(position as usize / self.block_size);
                if block.is_some_and(|block| (*block as usize) < self.blocks()) {
                    let slot = self.slot(table, position as usize);
                    self.slots[slot] = UNWRITTEN;
                }
            }
        }
    }

    fn draw_all(&mut self, step: &Step, output: &mut StepOutput) {
        let (vocab, queued) = (self.vocab, self.queued.as_mut().expect("the fake was given a queue"));
        output.draws.clear();
        for (index, draw) in step.draws.iter().enumerate() {
            let row = step.batch.logit_rows[index];
            let fed = step.feeds.iter().any(|feed| feed.row == row).then(|| step.batch.tokens[row]);
            let mut seen = step.seen[draw.seen.clone()].to_vec();
            if let Some(token) = fed {
                match seen.binary_search_by_key(&token, |seen| seen.token) {
                    Ok(at) => seen[at].times += 1,
                    Err(at) => seen.insert(at, Seen { token, times: 1 }),
                }
            }
            output.draws.push(queued.device.draw(DrawnRow {
                logits: &self.logits[index * vocab..(index + 1) * vocab],
                draw,
                biases: &step.biases[draw.biases.clone()],
                forbidden: &step.forbidden[draw.forbidden.clone()],
                allowed: &step.allowed[draw.allowed.clone()],
                seen: &seen,
            }));
        }
        queued.drawn.clear();
        queued.drawn.extend(output.draws.iter().map(|draw| draw.token));
    }
}

impl StepQueue for FakeModel {
    fn depth(&self) -> usize {
        self.queued.as_ref().map_or(1, |queued| queued.depth)
    }

    fn submit(&mut self, step: &Step) -> Result<(), ForwardError> {
        let limits = self.limits();
        let queued = self.parts().0;
        assert!(queued.flights.len() < queued.depth, "the queue is full");
        let ahead = queued.flights.back().map(|step| step.draws.len());
        queued.device.submitted(step);
        if self.panics_next() {
            self.lose(Some(step));
        }
        if let Err(error) = self.begin(&step.batch).and_then(|()| step.check(limits, ahead)) {
            self.lose(Some(step));
            return Err(error);
        }
        self.parts().0.flights.push_back(step.clone());
        Ok(())
    }

    fn wait(&mut self, output: &mut StepOutput) -> Result<(), ForwardError> {
        let queued = self.parts().0;
        let mut step = queued.flights.pop_front().expect("something is in flight");
        queued.waits += 1;
        output.time = queued.device.waited();
        if queued.fail_at == Some(queued.waits) {
            self.lose(Some(&step));
            return Err(ForwardError("the fake queue fails, as it was told to".into()));
        }
        for feed in &step.feeds {
            step.batch.tokens[feed.row] = queued.drawn[feed.draw].unwrap_or(0);
        }
        self.compute(&step.batch);
        self.draw_all(&step, output);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{CausalLm as _, Span};
    use crate::queue::Feed;

    /// Draws what is most likely, by a clock that ticks with each step.
    struct Greedy;

    impl FakeDevice for Greedy {
        fn submitted(&mut self, _: &Step) {}

        fn waited(&mut self) -> StepTime {
            StepTime { run: 10, since_last_end: None }
        }

        fn draw(&mut self, row: DrawnRow<'_>) -> Draw {
            let best = (0..row.logits.len()).max_by(|a, b| row.logits[*a].total_cmp(&row.logits[*b]));
            let logprob = row.seen.iter().map(|seen| seen.times).sum::<u32>() as f32;
            Draw { token: best.map(|token| token as u32), logprob, top: Vec::new() }
        }

        fn lost(&mut self) {}
    }

    fn step(tokens: &[u32], start: u32, feeds: &[Feed]) -> Step {
        Step {
            batch: Batch {
                tokens: tokens.to_vec(),
                positions: (start..start + tokens.len() as u32).collect(),
                spans: vec![Span { rows: 0..tokens.len(), table: 0..2 }],
                block_tables: vec![1, 0],
                logit_rows: vec![tokens.len() - 1],
                hidden_rows: Vec::new(),
            },
            feeds: feeds.to_vec(),
            draws: vec![RowDraw::GREEDY],
            ..Step::default()
        }
    }

    fn model() -> FakeModel {
        let mut model = FakeModel::new(50, 64, 7).queued(2, Greedy);
        model.allocate_kv(2, 4).expect("a small pool");
        model
    }

    fn best(logits: &[f32]) -> u32 {
        (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap() as u32
    }

    #[test]
    fn a_row_is_fed_by_the_step_ahead() {
        let mut model = model();
        let first = best(&model.logits_after(&[1, 2, 3]));
        let second = best(&model.logits_after(&[1, 2, 3, first]));
        model.submit(&step(&[1, 2, 3], 0, &[])).expect("the first");
        model.submit(&step(&[0], 3, &[Feed { row: 0, draw: 0 }])).expect("the second");
        let mut output = StepOutput::default();
        model.wait(&mut output).expect("the first");
        assert_eq!((output.draws[0].token, output.draws[0].logprob), (Some(first), 0.0));
        model.wait(&mut output).expect("the second");
        assert_eq!((output.draws[0].token, output.draws[0].logprob), (Some(second), 1.0), "the fed was seen");
    }

    #[test]
    fn nothing_is_in_flight_after_an_error() {
        let mut model = model().fail_at_wait(1).fail_at(4);
        let mut output = StepOutput::default();
        let steps = [step(&[1, 2, 3], 0, &[]), step(&[0], 3, &[Feed { row: 0, draw: 0 }])];
        let expected = best(&model.logits_after(&[1, 2, 3]));
        for what in ["a wait", "a submission"] {
            model.submit(&steps[0]).expect("the queue is empty");
            model.submit(&steps[1]).err().or_else(|| model.wait(&mut output).err()).expect(what);
        }
        model.submit(&steps[0]).expect("the queue is empty");
        model.wait(&mut output).expect("it goes on");
        assert_eq!(output.draws[0].token, Some(expected));
    }

    #[test]
    fn inconsistent_steps_are_refused() {
        let good = step(&[1, 2, 3], 0, &[]);
        let check = |what: &str, change: fn(&mut Step)| {
            let mut step = good.clone();
            change(&mut step);
            let error = model().submit(&step).expect_err(what);
            assert!(error.0.contains(what), "{what}: {error}");
        };
        check("position 64", |step| step.batch.positions = vec![62, 63, 64]);
        check("0 draws, 1 logit rows", |step| step.draws.clear());
        check("0 draws ahead", |step| step.feeds.push(Feed { row: 0, draw: 0 }));
        check("not ascending by row", |step| step.feeds = vec![Feed { row: 0, draw: 0 }; 2]);
        check("list of 0", |step| step.draws[0].seen = 0..1);
        check("seen tokens", |step| {
            step.seen = vec![Seen { token: 50, times: 1 }];
            step.draws[0].seen = 0..1;
        });
    }
}
