//! Random small worlds for the engine: tiny vocabularies, few blocks, several tenants, clients that
//! vanish, steps that fail. A dumb model of what each request must get stands beside the real thing.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};

use obol::clock::{Clock, ManualClock};
use obol::config::{Speculative, Weights};
use obol::engine::{EngineConfig, EngineHandle, EventStream, Parts};
use obol::meter::calibration::Calibration;
use obol::meter::energy::EnergyMeter;
use obol::meter::partition::Partition;
use obol::meter::share::{Coefficients, Work};
use obol::request::{CacheSalt, Event, Finish, NewRequest, Sampling, Stops, Tier};
use obol::units::{BlockNanos, DeviceNanos, RequestId, Ticket, UnixNanos};
use obol::usage::{HouseTime, MeterReport, Usage};
use obol_models::batch::{Batch, CausalLm};
use obol_models::encoder::TextEncoder;
use obol_models::fake::FakeModel;

pub(crate) use crate::engine_oracle::{oracle, read};
use crate::fake_device::{Beside, Quirks};
use crate::fake_grammar::grammar_of;

pub(crate) const COST: Coefficients =
    Coefficients { step: 5_000_000, token: 1_000_000, attention: 3_000, logits: 200_000 };

pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n
    }
}

/// What a step costs on the simulated device: exactly the cost game that shares are derived from.
pub(crate) fn step_cost(batch: &Batch) -> DeviceNanos {
    let own: u128 = batch
        .spans
        .iter()
        .map(|span| {
            let context = u64::from(batch.positions[span.rows.start]);
            let logits = batch.logit_rows.iter().filter(|row| span.rows.contains(row)).count() as u64;
            COST.own(Work { tokens: span.rows.len() as u64, context, logits })
        })
        .sum();
    DeviceNanos(u64::try_from((u128::from(COST.step) + own) / 1000).unwrap())
}

/// What runs the steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum On {
    Host,
    /// Beside the host, with so many steps in flight.
    Queue(usize),
}

pub(crate) const EVERYWHERE: [On; 3] = [On::Host, On::Queue(1), On::Queue(2)];

pub(crate) struct World {
    pub(crate) engine: EngineHandle,
    reports: mpsc::Receiver<MeterReport>,
    pub(crate) clock: Arc<ManualClock>,
    busy: Arc<AtomicU64>,
    /// Time that passed by itself; it may fall into a step or between steps.
    passed: u64,
    /// The device's clock is right.
    exact: bool,
    energy: Arc<Readings>,
}

/// What an energy meter showed first and last.
#[derive(Debug, Default)]
struct Readings {
    first: AtomicU64,
    last: AtomicU64,
}

/// A meter that changes every few microseconds, and does not answer at once.
struct Joules {
    clock: Arc<ManualClock>,
    readings: Arc<Readings>,
}

impl EnergyMeter for Joules {
    fn millijoules(&self) -> Option<u64> {
        let now = self.clock.now().0;
        if now < 9_000 {
            return None;
        }
        let shown = 1_000_000 + now / 4_000 * 31;
        let Readings { first, last } = &*self.readings;
        // The engine's thread reads it, and the test when that has ended.
        first.compare_exchange(0, shown, Ordering::SeqCst, Ordering::SeqCst).ok();
        last.store(shown, Ordering::SeqCst);
        Some(shown)
    }

    fn pause(&self) -> DeviceNanos {
        DeviceNanos(6_000)
    }
}

/// Weights of the tenants `t0`, `t1`, ...
pub(crate) fn weights(of: &[(&str, &str)]) -> Weights {
    Weights::new(of.iter().map(|(tenant, weight)| ((*tenant).into(), weight.parse().expect("a weight"))))
}

pub(crate) fn config(blocks: usize, block_size: usize) -> EngineConfig {
    EngineConfig {
        blocks,
        block_size,
        bytes_per_block: 8,
        max_model_len: blocks * block_size,
        max_sequences: 4,
        step_tokens: 6,
        queue_depth: 64,
        prefix_caching: true,
        speculative: Speculative::Ngram,
        weights: Some(Weights::default()),
        end_tokens: vec![0],
    }
}

impl World {
    pub(crate) fn new(model: FakeModel, config: EngineConfig, on: On) -> Self {
        Self::paced(model, config, on, || {})
    }

    /// `before` is called before each step is over.
    pub(crate) fn paced(
        model: FakeModel,
        config: EngineConfig,
        on: On,
        mut before: impl FnMut() + Send + 'static,
    ) -> Self {
        let block_size = config.block_size;
        Self::with(config, |clock, busy| match on {
            On::Host => model.on_forward(move |batch| {
                before();
                clock.advance(step_cost(batch));
                busy.fetch_add(step_cost(batch).0, Ordering::SeqCst);
            }),
            On::Queue(depth) => {
                let mut device = Beside::new(clock, block_size, step_cost, before);
                device.busy = busy;
                model.queued(depth, device)
            }
        })
    }

    /// Beside a device that is not exact. What it and the host do takes time of its own.
    pub(crate) fn beside(
        model: FakeModel,
        config: EngineConfig,
        depth: usize,
        quirks: impl Quirks + 'static,
        fail_at_wait: Option<u64>,
    ) -> Self {
        let block_size = config.block_size;
        let world = Self::with(config, |clock, busy| {
            let mut device = Beside::new(clock, block_size, step_cost, || {});
            device.busy = busy;
            device.quirks = Some(Box::new(quirks));
            let model = model.queued(depth, device);
            match fail_at_wait {
                Some(wait) => model.fail_at_wait(wait),
                None => model,
            }
        });
        Self { exact: false, ..world }
    }

    fn with(config: EngineConfig, build: impl FnOnce(Arc<ManualClock>, Arc<AtomicU64>) -> FakeModel) -> Self {
        Self::with_encoder(config, build, |_, _| None)
    }

    /// As `build` makes the model, and `encoder` what is beside it, with the clock and what the steps cost.
    pub(crate) fn with_encoder(
        config: EngineConfig,
        build: impl FnOnce(Arc<ManualClock>, Arc<AtomicU64>) -> FakeModel,
        encoder: impl FnOnce(Arc<ManualClock>, Arc<AtomicU64>) -> Option<Box<dyn TextEncoder>>,
    ) -> Self {
        let clock = Arc::new(ManualClock::at_wall(UnixNanos(1_000_000_000_000)));
        let busy = Arc::new(AtomicU64::new(0));
        let mut model = build(clock.clone(), busy.clone());
        model.allocate_kv(config.blocks, config.block_size).expect("memory for a tiny pool");
        let mut partition = Partition::default();
        clock.advance(DeviceNanos(777));
        partition.book(HouseTime::Load, clock.now());
        let (sender, reports) = mpsc::channel();
        let energy = Arc::new(Readings::default());
        let meter = Joules { clock: clock.clone(), readings: energy.clone() };
        let engine = EngineHandle::start(Parts {
            model: Box::new(model),
            encoder: encoder(clock.clone(), busy.clone()),
            config,
            calibration: Calibration { embed: Some(COST), ..Calibration::uniform(COST) },
            clock: clock.clone(),
            partition,
            energy: Some(Box::new(meter)),
            reports: sender,
        });
        Self { engine, reports, clock, busy, passed: 0, exact: true, energy }
    }

    pub(crate) fn submit(
        &self,
        ticket: u64,
        prompt: &[u32],
        sampling: Sampling,
        stops: Stops,
        choices: u32,
        tenant: u8,
    ) -> EventStream {
        self.submit_new(NewRequest {
            allowance: None,
            grammar: grammar_of(&sampling, &stops),
            score_prompts: false,
            vectors: None,
            tenant: format!("t{tenant}").into(),
            tier: Tier::Default,
            id: RequestId(format!("r{ticket}")),
            ticket: Ticket(ticket),
            prompt: prompt.into(),
            choices,
            sampling,
            stops,
            salt: CacheSalt([tenant; 32]),
        })
    }

    pub(crate) fn submit_new(&self, request: NewRequest) -> EventStream {
        self.engine.reserve().expect("the queue has room").submit(request)
    }

    /// Stops the engine and checks everything that must hold for any history.
    pub(crate) fn finish(self) -> Vec<Usage> {
        self.finish_with_books().0
    }

    /// As [`World::finish`], and the house's time.
    pub(crate) fn finish_with_books(self) -> (Vec<Usage>, [DeviceNanos; HouseTime::ALL.len()]) {
        self.engine.shutdown();
        let reports: Vec<MeterReport> = self.reports.try_iter().collect();
        let mut usages: Vec<Usage> = Vec::new();
        for report in reports.iter() {
            report.snapshot.check().expect("conservation in every report");
            usages.extend(report.finished.iter().cloned());
            let device: DeviceNanos = usages.iter().map(Usage::device).sum();
            let kv: BlockNanos = usages.iter().map(|u| u.kv).sum();
            assert_eq!((report.snapshot.settled_device, report.snapshot.settled_kv), (device, kv));
        }
        let last = &reports.last().expect("a last report").snapshot;
        let [first_mj, last_mj] =
            [&self.energy.first, &self.energy.last].map(|reading| reading.load(Ordering::SeqCst));
        let settled_mj = usages.iter().filter_map(|u| u.energy_mj).sum();
        let energy = last.energy.as_deref().copied().unwrap_or_default();
        assert_eq!((energy.settled_mj, energy.open_mj, energy.total_mj), (settled_mj, 0, last_mj - first_mj));
        assert!(last.open.is_empty(), "everything is settled at the end");
        assert_eq!(last.now, self.clock.now(), "the last report is as of the end");
        let preempted = last.house_time[HouseTime::Preemption as usize];
        let (paid, busy) = ((last.settled_device + preempted).0, self.busy.load(Ordering::SeqCst));
        // What passes while a step is under way seems to be a part of it, or of what came before.
        let steps = busy.saturating_sub(self.passed)..=busy + self.passed;
        let right = !self.exact || steps.contains(&paid);
        assert!(right, "requests and recompute pay for exactly the steps: {paid}, {steps:?}");
        let stats = self.engine.stats();
        assert_eq!((stats.running, stats.waiting, stats.blocks.held), (0, 0, 0), "all blocks are back");
        assert_eq!(stats.blocks.cached + stats.blocks.free, stats.blocks_total);
        let accepted: u64 = usages.iter().map(|u| u.tokens.draft_accepted).sum();
        let rejected: u64 = usages.iter().map(|u| u.tokens.draft_rejected).sum();
        assert_eq!((stats.draft_tokens_accepted, stats.draft_tokens), (accepted, accepted + rejected));
        (usages, last.house_time)
    }
}

pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

pub(crate) fn random_request(rng: &mut Rng, capacity: u64, vocab: u64) -> (Vec<u32>, Sampling, Stops) {
    let prompt_len = 1 + rng.below(capacity - 1);
    // Few different prompts, so that prefixes collide.
    let pattern = rng.below(3);
    let prompt = (0..prompt_len).map(|i| (i * pattern % (vocab - 1) + 1) as u32).collect();
    let sampling = Sampling {
        temperature: [0.0, 1.0, 0.7][rng.below(3) as usize],
        top_p: [1.0, 0.8][rng.below(2) as usize],
        presence_penalty: [0.0, 0.5][rng.below(2) as usize],
        repetition_penalty: [1.0, 1.3][rng.below(2) as usize],
        seed: rng.below(5),
        ..Sampling::default()
    };
    let stops = Stops {
        max_tokens: 1 + rng.below(capacity - prompt_len) as u32,
        min_tokens: rng.below(3) as u32,
        ignore_eos: rng.below(2) == 0,
        stop_token_ids: if rng.below(4) == 0 { vec![1] } else { Vec::new() },
    };
    (prompt, sampling, stops)
}

/// A small vocabulary, and an engine in which requests are in each other's way.
pub(crate) fn tight(rng: &mut Rng) -> (usize, EngineConfig) {
    let vocab = 3 + rng.below(3) as usize;
    let (blocks, block_size) = (5 + rng.below(8) as usize, 1 + rng.below(4) as usize);
    let mut config = config(blocks, block_size);
    config.max_sequences = 1 + rng.below(4) as usize;
    config.prefix_caching = rng.below(5) > 0;
    (vocab, config)
}

#[test]
fn random_worlds_give_each_request_its_own_tokens_and_conserve_everything() {
    for on in EVERYWHERE {
        random_worlds(on, None);
        random_worlds(on, Some(weights(&[("t1", "3")])));
    }
}

fn random_worlds(on: On, weights: Option<Weights>) {
    let (mut preemptions, mut hits, mut drafts, mut held) = (0, 0, 0, 0);
    for seed in 0..250u64 {
        let mut rng = Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        let (vocab, mut config) = tight(&mut rng);
        config.weights.clone_from(&weights);
        config.speculative = if seed % 4 == 0 { Speculative::Off } else { Speculative::Ngram };
        let capacity = config.max_model_len as u64;
        // Those that forget say the same again, as texts do.
        let memory = [usize::MAX, 2, 1][seed as usize % 3];
        let model = || FakeModel::new(vocab, capacity as usize, seed).remembering(memory);
        let oracle_model = model();
        let mut world = World::new(model(), config, on);
        let count = 12;
        let mut kept = 0;
        block_on(async {
            let mut streams = Vec::new();
            for ticket in 0..count {
                let (prompt, sampling, stops) = random_request(&mut rng, capacity, vocab as u64);
                let choices = [1, 1, 1, 3][rng.below(4) as usize];
                let tenant = rng.below(3) as u8;
                let stream = world.submit(ticket, &prompt, sampling.clone(), stops.clone(), choices, tenant);
                if rng.below(5) == 0 {
                    drop(stream);
                } else {
                    streams.push((stream, prompt, sampling, stops, choices));
                }
                if rng.below(3) == 0 {
                    let passing = rng.below(500);
                    world.passed += passing;
                    world.clock.advance(DeviceNanos(passing));
                    tokio::task::yield_now().await;
                }
            }
            for (mut stream, prompt, sampling, stops, choices) in streams {
                let got = read(&mut stream, choices).await;
                for (choice, (tokens, finish)) in got.into_iter().enumerate() {
                    let expected = oracle(&oracle_model, &prompt, &sampling, &stops, choice as u32);
                    assert_eq!(
                        (tokens, finish),
                        (expected.0, Some(expected.1)),
                        "{on:?}, seed {seed}, prompt {prompt:?}"
                    );
                }
                kept += 1;
            }
        });
        let stats = world.engine.stats();
        preemptions += stats.preemptions;
        hits += stats.prefix_hits;
        drafts += stats.draft_tokens;
        held += stats.draft_tokens_accepted;
        let usages = world.finish();
        assert_eq!(usages.len(), count as usize, "seed {seed}: one settlement a request, cancelled ones too");
        let finished = usages.iter().filter(|u| u.status != Finish::Cancelled).count();
        assert!(finished >= kept, "seed {seed}");
    }
    assert!(preemptions > 100 && hits > 500, "the worlds are tight: {preemptions} preemptions, {hits} hits");
    match on {
        On::Host => assert!(held > 500 && drafts > held + 500, "proposals hold and fail: {held} of {drafts}"),
        On::Queue(_) => assert_eq!(drafts, 0, "nothing is proposed to a device that is ahead"),
    }
}

#[test]
fn alone_in_the_engine_a_request_pays_the_sum_of_its_steps() {
    EVERYWHERE.into_iter().for_each(alone);
}

fn alone(on: On) {
    let world = World::new(FakeModel::new(5, 40, 1), config(10, 4), on);
    let stops = Stops { max_tokens: 6, min_tokens: 0, ignore_eos: true, stop_token_ids: vec![] };
    block_on(async {
        let mut stream = world.submit(0, &[1, 2, 3, 1, 2, 3, 1], Sampling::default(), stops, 1, 0);
        read(&mut stream, 1).await;
    });
    let busy = world.busy.load(Ordering::SeqCst);
    let usages = world.finish();
    assert_eq!(usages[0].device(), DeviceNanos(busy));
    assert_eq!((usages[0].steps, usages[0].tokens.completion), (7, 6), "two prefill chunks, five decodes");
    assert_eq!(usages[0].saved_by_batching, DeviceNanos::ZERO);
    // 7 tokens: 2 blocks at once; the third when the 9th token is computed; 12 are computed at the end.
    assert_eq!(usages[0].kv_peak_blocks, 3);
}

#[test]
fn a_shared_prefix_costs_no_device_time_the_second_time() {
    EVERYWHERE.into_iter().for_each(shared_prefix);
}

fn shared_prefix(on: On) {
    let world = World::new(FakeModel::new(5, 80, 1), config(20, 4), on);
    let prompt: Vec<u32> = (0..33).map(|i| i % 4 + 1).collect();
    let stops = Stops { max_tokens: 1, min_tokens: 0, ignore_eos: true, stop_token_ids: vec![] };
    block_on(async {
        for (ticket, tenant) in [(0, 0), (1, 0), (2, 1)] {
            let mut stream = world.submit(ticket, &prompt, Sampling::default(), stops.clone(), 1, tenant);
            read(&mut stream, 1).await;
        }
    });
    let usages = world.finish();
    let cached: Vec<u64> = usages.iter().map(|u| u.tokens.cached).collect();
    assert_eq!(cached, [0, 32, 0], "the same tenant hits, another does not");
    assert!(usages[1].prefill.0 * 3 < usages[0].prefill.0);
    assert!(usages[1].saved_by_prefix_cache > DeviceNanos::ZERO);
    assert_eq!(usages[2].prefill, usages[0].prefill);
}

#[test]
fn who_is_cancelled_before_running_pays_nothing_and_is_still_settled() {
    EVERYWHERE.into_iter().for_each(cancelled_early);
}

fn cancelled_early(on: On) {
    let mut config = config(10, 4);
    config.max_sequences = 1;
    let world = World::new(FakeModel::new(5, 40, 1), config, on);
    let stops = Stops { max_tokens: 30, min_tokens: 0, ignore_eos: true, stop_token_ids: vec![] };
    block_on(async {
        let mut first = world.submit(0, &[1; 8], Sampling::default(), stops.clone(), 1, 0);
        first.next().await;
        drop(world.submit(1, &[1; 8], Sampling::default(), stops, 1, 0));
        read(&mut first, 1).await;
    });
    let usages = world.finish();
    let second = usages.iter().find(|u| u.ticket == Ticket(1)).expect("settled");
    assert_eq!(
        (second.status, second.device(), second.kv),
        (Finish::Cancelled, DeviceNanos(0), BlockNanos(0))
    );
}

#[test]
fn a_failing_step_ends_what_took_part_and_the_engine_goes_on() {
    EVERYWHERE.into_iter().for_each(failing);
}

fn failing(on: On) {
    for (panics, model) in
        [(false, FakeModel::new(5, 40, 1).fail_at(3)), (true, FakeModel::new(5, 40, 1).panic_at(3))]
    {
        let world = World::new(model, config(10, 4), on);
        let stops = Stops { max_tokens: 6, min_tokens: 0, ignore_eos: true, stop_token_ids: vec![] };
        block_on(async {
            let mut first = world.submit(0, &[1; 8], Sampling::default(), stops.clone(), 1, 0);
            assert_eq!(read(&mut first, 1).await[0].1, Some(Finish::Error), "panics: {panics}");
            let mut second = world.submit(1, &[1; 8], Sampling::default(), stops.clone(), 1, 0);
            assert_eq!(read(&mut second, 1).await[0].1, Some(Finish::Length));
            assert!(world.engine.ping(std::time::Duration::from_secs(5)).await);
        });
        let usages = world.finish();
        assert_eq!(usages[0].status, Finish::Error);
        assert!(usages[0].device() > DeviceNanos::ZERO, "what it used stays on its receipt");
    }
}

#[test]
fn a_device_that_is_lost_ends_the_engine_and_every_request_is_settled() {
    for on in EVERYWHERE {
        let world = World::new(FakeModel::new(5, 40, 1).fail_from(3), config(10, 4), on);
        let stops = Stops { max_tokens: 6, min_tokens: 0, ignore_eos: true, stop_token_ids: vec![] };
        block_on(async {
            for ticket in 0..20 {
                let Ok(seat) = world.engine.reserve() else { break };
                let mut stream = seat.submit(NewRequest {
                    allowance: None,
                    grammar: None,
                    score_prompts: false,
                    vectors: None,
                    tenant: "anonymous".into(),
                    tier: Tier::Default,
                    id: RequestId(format!("r{ticket}")),
                    ticket: Ticket(ticket),
                    prompt: [1; 8].as_slice().into(),
                    choices: 1,
                    sampling: Sampling::default(),
                    stops: stops.clone(),
                    salt: CacheSalt([0; 32]),
                });
                assert_ne!(read(&mut stream, 1).await[0].1, Some(Finish::Length), "{on:?}");
            }
            assert!(!world.engine.ping(std::time::Duration::from_secs(5)).await, "{on:?}");
        });
        assert!(world.engine.is_dead(), "{on:?}");
        let usages = world.finish();
        assert!(usages.len() >= 5 && usages.iter().all(|usage| usage.status == Finish::Error), "{on:?}");
    }
}

#[test]
fn a_stop_string_ends_one_choice_and_a_full_queue_refuses() {
    EVERYWHERE.into_iter().for_each(stop_string);
}

fn stop_string(on: On) {
    let mut config = config(10, 4);
    config.queue_depth = 2;
    // After three steps, with both choices under way, the engine waits for the stop: it could be done before.
    let (go, gate) = std::sync::mpsc::channel::<()>();
    let world = World::paced(FakeModel::new(5, 40, 1), config, on, move || {
        let _go = gate.recv();
    });
    (0..3).for_each(|_| go.send(()).expect("the model is there"));
    let mut go = Some(go);
    let stops = Stops { max_tokens: 30, min_tokens: 0, ignore_eos: true, stop_token_ids: vec![] };
    let seats = (world.engine.reserve(), world.engine.reserve());
    assert!(world.engine.reserve().is_err(), "two places are taken");
    drop(seats);
    block_on(async {
        let mut stream = world.submit(0, &[1; 4], Sampling::default(), stops, 2, 0);
        let mut ends = Vec::new();
        while let Some(event) = stream.next().await {
            match event {
                Event::Prompt { .. } | Event::Vector { .. } => {
                    unreachable!("prompts are only continued here")
                }
                Event::Token { choice: 1, .. } if go.is_some() => {
                    stream.stop_choice(1);
                    go = None;
                }
                Event::Token { .. } => {}
                Event::Finished { choice, finish } => ends.push((choice, finish)),
            }
        }
        ends.sort_by_key(|(choice, _)| *choice);
        assert_eq!(ends, [(0, Finish::Length), (1, Finish::Stop)]);
    });
    world.engine.drain();
    assert!(world.engine.reserve().is_err());
    world.finish();
}
