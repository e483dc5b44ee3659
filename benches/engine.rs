//! What the host does for a step: the whole engine over a device that takes no time, `cargo bench --bench engine`.

use std::collections::VecDeque;
use std::sync::{Arc, mpsc};
use std::time::Instant;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use obol::clock::{Clock, SystemClock};
use obol::config::{Speculative, Weights};
use obol::engine::{EngineConfig, EngineHandle, Parts};
use obol::meter::calibration::Calibration;
use obol::meter::partition::Partition;
use obol::meter::share::Coefficients;
use obol::request::{CacheSalt, NewRequest, Sampling, Stops};
use obol::units::{RequestId, Ticket};
use obol_models::batch::{Batch, CausalLm, EachSpan, ForwardError};
use obol_models::queue::{Draw, Step, StepOutput, StepQueue, StepTime};

const COST: Coefficients =
    Coefficients { step: 3_000_000_000, token: 800_000_000, attention: 2_000, logits: 0 };
const SEQUENCES: [usize; 3] = [1, 32, 256];

/// A device that takes no time: the same logits for every row.
struct Instantly {
    logits: [f32; 4],
    /// Draws of the steps in flight, where it is given steps ahead.
    ahead: Option<VecDeque<usize>>,
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
        for span in 0..batch.spans.len() {
            if !batch.logits_of(span).is_empty() {
                each(0, span, &self.logits);
            }
        }
        Ok(())
    }
}

/// `sequences` greedy requests of `tokens` tokens each, from the first submission to the last token.
fn run(sequences: usize, tokens: usize, ahead: bool) {
    let config = EngineConfig {
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
    };
    let (reports, _kept) = mpsc::channel();
    let engine = EngineHandle::start(Parts {
        model: Box::new(Instantly { logits: [0.0, 1.0, 0.5, 0.2], ahead: ahead.then(VecDeque::new) }),
        config,
        calibration: Calibration::uniform(COST),
        clock: Arc::new(SystemClock::start()) as Arc<dyn Clock>,
        partition: Partition::default(),
        energy: None,
        reports,
    });
    let mut streams: Vec<_> = (0..sequences)
        .map(|index| {
            engine.reserve().expect("room").submit(NewRequest {
                allowance: None,
                grammar: None,
                tenant: "anonymous".into(),
                throttled: false,
                id: RequestId(format!("r{index}")),
                ticket: Ticket(index as u64),
                prompt: [1, 2, 3, 1].into(),
                choices: 1,
                sampling: Sampling { temperature: 0.0, ..Sampling::default() },
                stops: Stops {
                    max_tokens: tokens as u32,
                    min_tokens: 0,
                    ignore_eos: true,
                    stop_token_ids: vec![],
                },
                salt: CacheSalt([0; 32]),
            })
        })
        .collect();
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        for stream in &mut streams {
            while stream.next().await.is_some() {}
        }
    });
    engine.shutdown();
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

criterion_group!(benches, steps);
criterion_main!(benches);
