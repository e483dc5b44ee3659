//! What the host does for a step: the whole engine over a device that takes no time, `cargo bench --bench engine`.

use std::sync::{Arc, mpsc};
use std::time::Instant;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use obol::clock::{Clock, SystemClock};
use obol::config::Speculative;
use obol::engine::{EngineConfig, EngineHandle, Parts};
use obol::meter::calibration::Calibration;
use obol::meter::partition::Partition;
use obol::meter::share::Coefficients;
use obol::request::{CacheSalt, NewRequest, Sampling, Stops};
use obol::units::{RequestId, Ticket};
use obol_models::batch::{Batch, CausalLm, EachSpan, ForwardError};

const COST: Coefficients =
    Coefficients { step: 3_000_000_000, token: 800_000_000, attention: 2_000, logits: 0 };
const SEQUENCES: [usize; 3] = [1, 32, 256];

/// A device that takes no time: the same logits for every row.
struct Instantly([f32; 4]);

impl CausalLm for Instantly {
    fn vocab_size(&self) -> usize {
        self.0.len()
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

    fn workers(&self) -> usize {
        1
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
                each(0, span, &self.0);
            }
        }
        Ok(())
    }
}

/// `sequences` greedy requests of `tokens` tokens each, from the first submission to the last token.
fn run(sequences: usize, tokens: usize) {
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
        end_tokens: vec![0],
    };
    let (reports, _kept) = mpsc::channel();
    let engine = EngineHandle::start(Parts {
        model: Box::new(Instantly([0.0, 1.0, 0.5, 0.2])),
        config,
        calibration: Calibration::uniform(COST),
        clock: Arc::new(SystemClock::start()) as Arc<dyn Clock>,
        partition: Partition::default(),
        reports,
    });
    let mut streams: Vec<_> = (0..sequences)
        .map(|index| {
            engine.reserve().expect("room").submit(NewRequest {
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
    let mut group = criterion.benchmark_group("engine step");
    for sequences in SEQUENCES {
        group.bench_function(BenchmarkId::from_parameter(sequences), |bencher| {
            bencher.iter_custom(|steps| {
                let begin = Instant::now();
                run(sequences, usize::try_from(steps).expect("few steps").max(2));
                begin.elapsed()
            });
        });
    }
}

criterion_group!(benches, steps);
criterion_main!(benches);
