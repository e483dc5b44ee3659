//! In a steady state the engine's thread allocates nothing.
//!
//! A binary of its own, for its allocator counts. Counted on the engine's thread alone, from the end of one
//! forward's beginning to the beginning of the next: all that the engine does for a step lies between.

#[path = "../models/tests/counting/mod.rs"]
mod counting;

use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Poll, Waker};

use obol::clock::ManualClock;
use obol::config::Speculative;
use obol::engine::{EngineConfig, EngineHandle, EventStream, Parts};
use obol::meter::calibration::Calibration;
use obol::meter::partition::Partition;
use obol::meter::share::Coefficients;
use obol::request::{CacheSalt, Event, Finish, NewRequest, Sampling, Stops};
use obol::units::{DeviceNanos, RequestId, Ticket, UnixNanos};
use obol_models::batch::CausalLm;
use obol_models::fake::FakeModel;

use counting::ALLOCATIONS;

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

#[test]
fn two_hundred_steps_of_32_sequences_allocate_nothing() {
    let streams: Arc<Mutex<Vec<EventStream>>> = Arc::default();
    let (steps, allocated) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let clock = Arc::new(ManualClock::at_wall(UnixNanos(1_000_000_000_000)));
    let mut model = FakeModel::new(16, 4096, 3).on_forward({
        let (streams, steps, allocated, clock) =
            (streams.clone(), steps.clone(), allocated.clone(), clock.clone());
        let mut before = 0;
        move |batch| {
            let since = ALLOCATIONS.get() - before;
            let together = batch.spans.len() == SEQUENCES && batch.logit_rows.len() >= SEQUENCES;
            if together && STEADY.contains(&steps.fetch_add(1, Ordering::Relaxed)) {
                allocated.fetch_add(since, Ordering::Relaxed);
            }
            clock.advance(DeviceNanos(1_000));
            read(&mut streams.lock().unwrap());
            before = ALLOCATIONS.get();
        }
    });
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
        end_tokens: vec![0],
    };
    model.allocate_kv(config.blocks, config.block_size).expect("a small pool");
    let (reports, _kept) = mpsc::channel();
    let engine = EngineHandle::start(Parts {
        model: Box::new(model),
        config,
        calibration: Calibration::uniform(Coefficients { step: 1000, token: 10, attention: 1, logits: 5 }),
        clock,
        partition: Partition::default(),
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
    assert!(steps.load(Ordering::Relaxed) > STEADY.end, "the sequences ran together");
    assert_eq!(allocated.load(Ordering::Relaxed), 0, "allocations on the engine's thread");
}
