//! A device beside the host, played for the fake model: it draws by the engine's own sampler, and runs each step
//! for what it costs on a clock that the test holds.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use obol::clock::{Clock, ManualClock};
use obol::engine::sampler::{self, Bars, History, Scratch};
use obol::request::Sampling;
use obol::units::DeviceNanos;
use obol_models::batch::Batch;
use obol_models::fake::{DrawnRow, FakeDevice};
use obol_models::queue::{Draw, RowDraw, Step, StepTime};

/// What the host and the device take beside the steps themselves, in nanoseconds.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Delays {
    /// Of the host, to give the step.
    pub(crate) submit: u64,
    /// Of the device, to begin it when it has nothing else.
    pub(crate) launch: u64,
    /// Of the host, to hear of its end.
    pub(crate) wake: u64,
}

pub(crate) trait Quirks: Send {
    /// Of the next step.
    fn delays(&mut self) -> Delays;

    /// What the device says of a step's time.
    fn says(&mut self, truth: StepTime) -> StepTime;
}

pub(crate) struct Beside<C, B> {
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) cost: C,
    /// Called when a step is waited for.
    pub(crate) before: B,
    /// What all steps took.
    pub(crate) busy: Arc<AtomicU64>,
    /// None: it is exact, and nothing else takes time.
    pub(crate) quirks: Option<Box<dyn Quirks>>,
    block_size: usize,
    flights: VecDeque<Flying>,
    last_end: Option<DeviceNanos>,
    scratch: Scratch,
}

struct Flying {
    batch: Batch,
    run: u64,
    said: StepTime,
    end: DeviceNanos,
    wake: u64,
}

impl<C, B> Beside<C, B> {
    pub(crate) fn new(clock: Arc<ManualClock>, block_size: usize, cost: C, before: B) -> Self {
        Self {
            clock,
            cost,
            before,
            busy: Arc::default(),
            quirks: None,
            block_size,
            flights: VecDeque::new(),
            last_end: None,
            scratch: Scratch::default(),
        }
    }
}

/// Nothing is written that a step in flight reads, but by the sequence itself: its blocks are the same until there.
fn check_apart(running: &Batch, next: &Batch, block_size: usize) {
    for writer in &next.spans {
        let table = &next.block_tables[writer.table.clone()];
        let first = next.positions[writer.rows.start] as usize / block_size;
        for reader in &running.spans {
            let theirs = &running.block_tables[reader.table.clone()];
            let same = table.iter().zip(theirs).take_while(|(a, b)| a == b).count();
            let apart = table[first.max(same)..].iter().all(|block| !theirs.contains(block));
            assert!(apart, "{table:?} from {first} beside {theirs:?}");
        }
    }
}

impl<C, B> FakeDevice for Beside<C, B>
where
    C: FnMut(&Batch) -> DeviceNanos + Send,
    B: FnMut() + Send,
{
    fn submitted(&mut self, step: &Step) {
        if let Some(running) = self.flights.back() {
            check_apart(&running.batch, &step.batch, self.block_size);
        }
        let delays = self.quirks.as_mut().map_or(Delays::default(), |quirks| quirks.delays());
        self.clock.advance(DeviceNanos(delays.submit));
        let free = self.flights.back().map_or(DeviceNanos::ZERO, |flying| flying.end);
        let run = (self.cost)(&step.batch);
        let end = (self.clock.now() + DeviceNanos(delays.launch)).max(free) + run;
        let truth = StepTime { run: run.0, since_last_end: self.last_end.map(|last| (end - last).0) };
        let said = self.quirks.as_mut().map_or(truth, |quirks| quirks.says(truth));
        self.last_end = Some(end);
        let batch = step.batch.clone();
        self.flights.push_back(Flying { batch, run: run.0, said, end, wake: delays.wake });
    }

    fn waited(&mut self) -> StepTime {
        (self.before)();
        let flying = self.flights.pop_front().expect("a step is in flight");
        self.busy.fetch_add(flying.run, Ordering::SeqCst);
        let now = self.clock.now();
        self.clock.advance(DeviceNanos((flying.end.0 + flying.wake).saturating_sub(now.0)));
        flying.said
    }

    fn draw(&mut self, row: DrawnRow<'_>) -> Draw {
        let sampling = sampling(row.draw, row.biases);
        let prompt: Vec<u32> =
            row.seen.iter().filter(|seen| seen.times == 0).map(|seen| seen.token).collect();
        let mut history = History::new(&prompt, &sampling);
        for seen in row.seen {
            (0..seen.times).for_each(|_| history.push(seen.token));
        }
        let RowDraw { seed, choice, position, .. } = *row.draw;
        let draw = sampler::Draw { seed, choice, position };
        match sampler::sample(
            row.logits,
            &sampling,
            &history,
            Bars { forbidden: row.forbidden, allowed: (!row.allowed.is_empty()).then_some(row.allowed) },
            draw,
            &mut self.scratch,
        ) {
            Ok((token, logprobs)) => {
                let (logprob, top) = logprobs.map_or((0.0, Vec::new()), |of| (of.chosen, of.top));
                Draw { token: Some(token), logprob, top }
            }
            Err(sampler::NotFinite) => Draw::default(),
        }
    }

    fn lost(&mut self) {
        self.flights.clear();
        self.last_end = None;
    }
}

fn sampling(draw: &RowDraw, biases: &[(u32, f32)]) -> Sampling {
    Sampling {
        temperature: draw.temperature,
        top_k: draw.top_k,
        top_p: draw.top_p,
        min_p: draw.min_p,
        presence_penalty: draw.presence_penalty,
        frequency_penalty: draw.frequency_penalty,
        repetition_penalty: draw.repetition_penalty,
        logit_bias: biases.to_vec(),
        seed: draw.seed,
        logprobs: draw.logprobs,
    }
}
