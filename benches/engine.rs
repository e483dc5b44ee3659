//! What the host does for a step: the whole engine over a device that takes no time, `cargo bench --bench engine`.
//!
//! With a queue, by policy: what fair scheduling costs is what a step takes over the same step in order of arrival.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use obol::clock::{Clock, SystemClock};
use obol::config::{Speculative, Weights};
use obol::engine::{EngineConfig, EngineHandle, EventStream, Parts};
use obol::meter::calibration::Calibration;
use obol::meter::partition::Partition;
use obol::meter::share::Coefficients;
use obol::request::{CacheSalt, NewRequest, Sampling, Stops, Tier};
use obol::units::{RequestId, Ticket};
use obol::usage::MeterReport;
use obol_models::batch::{Batch, CausalLm, EachSpan, ForwardError, SpanOutput};
use obol_models::queue::{Draw, Step, StepOutput, StepQueue, StepTime};

const COST: Coefficients =
    Coefficients { step: 3_000_000_000, token: 800_000_000, attention: 2_000, logits: 0 };
const SEQUENCES: [usize; 3] = [1, 32, 256];

/// A device that takes no time: the same logits for every row.
struct Instantly {
    logits: [f32; 4],
    /// Draws of the steps in flight, where it is given steps ahead.
    ahead: Option<VecDeque<usize>>,
    /// So many were computed, where it is not.
    steps: Arc<AtomicUsize>,
}

impl StepQueue for Instantly {
    fn depth(&self) -> usize {
        2
    }

    fn submit(&mut self, step: &Step) -> Result<(), ForwardError> {
        self.ahead.as_mut().expect("a queue").push_back(step.draws.len());
        Ok(())
    }

    fn wait(&mut self, output: &mut StepOutput) -> Result<(), ForwardError> {
        let draws = self.ahead.as_mut().expect("a queue").pop_front().expect("a step in flight");
        output.draws.resize(draws, Draw::default());
        output.draws.iter_mut().for_each(|draw| draw.token = Some(1));
        output.time = StepTime { run: 1, since_last_end: Some(1) };
        Ok(())
    }
}

impl CausalLm for Instantly {
    fn queue(&mut self) -> Option<&mut dyn StepQueue> {
        self.ahead.is_some().then_some(self as &mut dyn StepQueue)
    }

    fn vocab_size(&self) -> usize {
        self.logits.len()
    }

    fn context_length(&self) -> usize {
        1 << 20
    }

    fn kv_bytes_per_token(&self) -> u64 {
        1
    }

    fn allocate_kv(&mut self, _: usize, _: usize) -> Result<(), ForwardError> {
        Ok(())
    }

    fn forward(&mut self, _: &Batch) -> Result<&[f32], ForwardError> {
        Err(ForwardError("only spans are asked for".into()))
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
        meanwhile();
        self.steps.fetch_add(1, Ordering::Release);
        for span in 0..batch.spans.len() {
            if !batch.logits_of(span).is_empty() {
                each(0, span, SpanOutput::Logits(&self.logits));
            }
        }
        Ok(())
    }
}

fn config(sequences: usize, tokens: usize) -> EngineConfig {
    EngineConfig {
        blocks: sequences * (tokens + 32).div_ceil(16),
        block_size: 16,
        bytes_per_block: 16,
        max_model_len: tokens + 32,
        max_sequences: sequences,
        step_tokens: 512.max(sequences),
        queue_depth: sequences,
        prefix_caching: true,
        speculative: Speculative::Off,
        weights: Some(Weights::default()),
        end_tokens: vec![0],
    }
}

/// The engine, and the reports that nobody reads.
fn start(
    config: EngineConfig,
    ahead: bool,
    steps: Arc<AtomicUsize>,
) -> (EngineHandle, mpsc::Receiver<MeterReport>) {
    let (reports, kept) = mpsc::channel();
    let (logits, ahead) = ([0.0, 1.0, 0.5, 0.2], ahead.then(VecDeque::new));
    let engine = EngineHandle::start(Parts {
        model: Box::new(Instantly { logits, ahead, steps }),
        encoder: None,
        config,
        calibration: Calibration::uniform(COST),
        clock: Arc::new(SystemClock::start()) as Arc<dyn Clock>,
        partition: Partition::default(),
        energy: None,
        reports,
    });
    (engine, kept)
}

/// A greedy request of `tokens` tokens.
fn submit(engine: &EngineHandle, index: usize, tenant: &str, tokens: usize) -> EventStream {
    engine.reserve().expect("room").submit(NewRequest {
        allowance: None,
        grammar: None,
        score_prompts: false,
        vectors: None,
        tenant: tenant.into(),
        tier: Tier::Default,
        id: RequestId(format!("r{index}")),
        ticket: Ticket(index as u64),
        prompt: [1, 2, 3, 1].into(),
        choices: 1,
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        stops: Stops { max_tokens: tokens as u32, min_tokens: 0, ignore_eos: true, stop_token_ids: vec![] },
        salt: CacheSalt([0; 32]),
    })
}

/// `sequences` greedy requests of `tokens` tokens each, from the first submission to the last token.
fn run(sequences: usize, tokens: usize, ahead: bool) {
    let (engine, _kept) = start(config(sequences, tokens), ahead, Arc::default());
    let mut streams: Vec<_> =
        (0..sequences).map(|index| submit(&engine, index, "anonymous", tokens)).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        for stream in &mut streams {
            while stream.next().await.is_some() {}
        }
    });
    engine.shutdown();
}

/// What so many steps of 32 sequences take while as many requests wait as are given, of so many tenants by turns.
fn queued(steps: usize, queued: usize, tenants: usize, weights: Option<Weights>) -> Duration {
    const RUNNING: usize = 32;
    // A request keeps room for all its tokens, so long runs are many engines'.
    const STEPS: usize = 2_000;
    let (mut left, mut taken) = (steps, Duration::ZERO);
    while left > 0 {
        let (some, computed) = (left.min(STEPS), Arc::new(AtomicUsize::new(0)));
        let tokens = some + 10_000;
        let queue_depth = RUNNING + queued;
        let (engine, _kept) = start(
            EngineConfig { queue_depth, weights: weights.clone(), ..config(RUNNING, tokens) },
            false,
            computed.clone(),
        );
        let request = |index: usize| submit(&engine, index, &format!("t{}", index % tenants), tokens);
        let streams: Vec<_> = (0..RUNNING + queued).map(request).collect();
        // All are known, and places were shared, some steps after the last was submitted.
        let steps = |from: usize, count: usize| {
            while computed.load(Ordering::Acquire) < from + count {
                std::thread::sleep(Duration::from_micros(20));
            }
            computed.load(Ordering::Acquire)
        };
        let from = steps(computed.load(Ordering::Acquire), 200);
        let begin = Instant::now();
        let upto = steps(from, some);
        taken += begin.elapsed().mul_f64(some as f64 / (upto - from) as f64);
        drop(streams);
        engine.shutdown();
        left -= some;
    }
    taken
}

fn policies(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("engine step of 32");
    for (waiting, tenants) in [(0, 1), (1_000, 1), (1_000, 8), (1_000, 64), (1_000, 1_000)] {
        for (policy, weights) in [("fcfs", None), ("fair", Some(Weights::default()))] {
            let name = format!("{waiting} queued of {tenants} tenants, {policy}");
            group.bench_function(name, |bencher| {
                bencher.iter_custom(|steps| {
                    let steps = usize::try_from(steps).expect("few steps");
                    queued(steps, waiting, tenants, weights.clone())
                });
            });
        }
    }
    group.finish();
}

fn steps(criterion: &mut Criterion) {
    for (name, ahead) in [("engine step", false), ("engine step, given ahead", true)] {
        let mut group = criterion.benchmark_group(name);
        for sequences in SEQUENCES {
            group.bench_function(BenchmarkId::from_parameter(sequences), |bencher| {
                bencher.iter_custom(|steps| {
                    let begin = Instant::now();
                    run(sequences, usize::try_from(steps).expect("few steps").max(2), ahead);
                    begin.elapsed()
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, steps, policies);
criterion_main!(benches);
