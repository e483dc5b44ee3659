//! In a steady state the engine's thread allocates nothing.
//!
//! A binary of its own, for its allocator counts. Counted on the engine's thread alone. Where the host computes: from
//! the end of one forward's beginning to the beginning of the next, as all that the engine does for a step lies
//! between. Beside a device that is given steps: all that is not the fake device's own.

#[path = "../models/tests/counting/mod.rs"]
mod counting;
#[path = "it/fake_device.rs"]
mod fake_device;

use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Poll, Waker};

use obol::clock::ManualClock;
use obol::config::{Speculative, Weights};
use obol::engine::{EngineConfig, EngineHandle, EventStream, Parts};
use obol::meter::calibration::Calibration;
use obol::meter::partition::Partition;
use obol::meter::share::Coefficients;
use obol::request::{CacheSalt, Event, Finish, NewRequest, Sampling, Stops, Tier};
use obol::units::{DeviceNanos, RequestId, Ticket, UnixNanos};
use obol_models::batch::{Batch, CausalLm, EachSpan, ForwardError};
use obol_models::fake::FakeModel;
use obol_models::queue::{Step, StepOutput, StepQueue};

use counting::ALLOCATIONS;
use fake_device::Beside;

const SEQUENCES: usize = 32;
const TOKENS: usize = 400;
/// Steps after which all buffers have their size, and up to which allocations are counted.
const STEADY: std::ops::Range<usize> = 100..300;

/// Reads all that is there, as clients do that keep up. Returns how many choices have ended.
fn read(streams: &mut [EventStream]) -> usize {
    let mut context = Context::from_waker(Waker::noop());
    let mut ended = 0;
    for stream in streams {
        while let Poll::Ready(Some(event)) = pin!(stream.next()).poll(&mut context) {
            if let Event::Finished { finish, .. } = event {
                assert_eq!(finish, Finish::Length);
                ended += 1;
            }
        }
    }
    ended
}

type Streams = Arc<Mutex<Vec<EventStream>>>;

/// Counts what was allocated before steps of all sequences together.
#[derive(Clone, Default)]
struct Counter {
    steps: Arc<AtomicUsize>,
    allocated: Arc<AtomicUsize>,
}

impl Counter {
    fn step(&self, batch: &Batch, allocated: usize) {
        let together = batch.spans.len() == SEQUENCES && batch.logit_rows.len() >= SEQUENCES;
        if together && STEADY.contains(&self.steps.fetch_add(1, Ordering::Relaxed)) {
            self.allocated.fetch_add(allocated, Ordering::Relaxed);
        }
    }
}

/// A model whose own allocations are not the engine's.
struct Apart {
    model: FakeModel,
    counter: Counter,
    streams: Streams,
    /// Of the engine, since the last step was given.
    allocated: usize,
    /// On this thread, when the engine was last left alone.
    before: usize,
}

impl Apart {
    fn new(model: FakeModel, counter: Counter, streams: Streams) -> Self {
        Self { model, counter, streams, allocated: 0, before: 0 }
    }

    fn apart<T>(&mut self, call: impl FnOnce(&mut Self) -> T) -> T {
        self.allocated += ALLOCATIONS.get() - self.before;
        let outcome = call(self);
        self.before = ALLOCATIONS.get();
        outcome
    }
}

impl StepQueue for Apart {
    fn depth(&self) -> usize {
        StepQueue::depth(&self.model)
    }

    fn submit(&mut self, step: &Step) -> Result<(), ForwardError> {
        self.apart(|apart| {
            apart.counter.step(&step.batch, std::mem::take(&mut apart.allocated));
            read(&mut apart.streams.lock().unwrap());
            apart.model.submit(step)
        })
    }

    fn wait(&mut self, output: &mut StepOutput) -> Result<(), ForwardError> {
        self.apart(|apart| apart.model.wait(output))
    }
}

impl CausalLm for Apart {
    fn queue(&mut self) -> Option<&mut dyn StepQueue> {
        Some(self)
    }

    fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }

    fn context_length(&self) -> usize {
        self.model.context_length()
    }

    fn kv_bytes_per_token(&self) -> u64 {
        self.model.kv_bytes_per_token()
    }

    fn allocate_kv(&mut self, blocks: usize, block_size: usize) -> Result<(), ForwardError> {
        self.model.allocate_kv(blocks, block_size)
    }

    fn forward(&mut self, batch: &Batch) -> Result<&[f32], ForwardError> {
        self.model.forward(batch)
    }

    fn workers(&self) -> usize {
        self.model.workers()
    }

    fn overlaps(&self) -> bool {
        self.model.overlaps()
    }

    fn forward_each(
        &mut self,
        batch: &Batch,
        meanwhile: &mut dyn FnMut(),
        each: EachSpan<'_>,
    ) -> Result<(), ForwardError> {
        self.model.forward_each(batch, meanwhile, each)
    }
}

#[test]
fn two_hundred_steps_of_32_sequences_allocate_nothing() {
    for depth in [None, Some(1), Some(2)] {
        steady(depth);
    }
}

/// With a queue of that depth, or on the host.
fn steady(depth: Option<usize>) {
    let (streams, counter) = (Streams::default(), Counter::default());
    let clock = Arc::new(ManualClock::at_wall(UnixNanos(1_000_000_000_000)));
    let model = FakeModel::new(16, 4096, 3);
    let mut model: Box<dyn CausalLm> = match depth {
        None => Box::new(model.on_forward({
            let (streams, counter, clock) = (streams.clone(), counter.clone(), clock.clone());
            let mut before = 0;
            move |batch| {
                counter.step(batch, ALLOCATIONS.get() - before);
                clock.advance(DeviceNanos(1_000));
                read(&mut streams.lock().unwrap());
                before = ALLOCATIONS.get();
            }
        })),
        Some(depth) => {
            let device = Beside::new(clock.clone(), 4, |_: &Batch| DeviceNanos(1_000), || {});
            Box::new(Apart::new(model.queued(depth, device), counter.clone(), streams.clone()))
        }
    };
    let config = EngineConfig {
        blocks: 4096,
        block_size: 4,
        bytes_per_block: 16,
        max_model_len: 4096,
        max_sequences: SEQUENCES,
        step_tokens: 512,
        queue_depth: 64,
        prefix_caching: true,
        speculative: Speculative::Ngram,
        weights: Some(Weights::default()),
        end_tokens: vec![0],
    };
    model.allocate_kv(config.blocks, config.block_size).expect("a small pool");
    let (reports, _kept) = mpsc::channel();
    let engine = EngineHandle::start(Parts {
        model,
        encoder: None,
        config,
        calibration: Calibration::uniform(Coefficients { step: 1000, token: 10, attention: 1, logits: 5 }),
        clock,
        partition: Partition::default(),
        energy: None,
        reports,
    });
    for ticket in 0..SEQUENCES {
        // Penalties, cached prefixes, forbidden tokens and draws take part.
        let sampling = Sampling {
            presence_penalty: [0.0, 0.5][ticket % 2],
            temperature: [0.0, 0.8, 1.0][ticket % 3],
            seed: ticket as u64,
            ..Sampling::default()
        };
        let tokens = TOKENS as u32;
        let stops =
            Stops { max_tokens: tokens, min_tokens: tokens, ignore_eos: false, stop_token_ids: vec![5] };
        let stream = engine.reserve().expect("room").submit(NewRequest {
            allowance: None,
            grammar: None,
            score_prompts: false,
            vectors: None,
            tenant: "anonymous".into(),
            tier: Tier::Default,
            id: RequestId(format!("r{ticket}")),
            ticket: Ticket(ticket as u64),
            prompt: (0..9).map(|i| i * 5 % 16).collect(),
            choices: 1,
            sampling,
            stops,
            salt: CacheSalt([(ticket % 3) as u8; 32]),
        });
        streams.lock().unwrap().push(stream);
    }
    let mut ended = 0;
    while ended < SEQUENCES {
        std::thread::sleep(std::time::Duration::from_millis(5));
        let mut streams = streams.lock().unwrap();
        read(&mut streams);
        ended = streams.iter().filter(|stream| stream.open() == 0).count();
    }
    engine.shutdown();
    assert!(counter.steps.load(Ordering::Relaxed) > STEADY.end, "the sequences ran together");
    assert_eq!(counter.allocated.load(Ordering::Relaxed), 0, "allocations on the engine's thread: {depth:?}");
}
