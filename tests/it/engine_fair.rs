//! Tenants that share the device by weight. What is submitted, and when, is decided at the beginning of steps, so that
//! every run of a world is the same.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use obol::clock::{Clock, ManualClock};
use obol::config::{Speculative, Weights};
use obol::engine::{EngineConfig, EngineHandle, EventStream};
use obol::request::{CacheSalt, Finish, NewRequest, Sampling, Stops, Tier};
use obol::units::{DeviceNanos, RequestId, Ticket};
use obol::usage::Usage;
use obol_models::fake::FakeModel;

use crate::engine_sim::{EVERYWHERE, On, Rng, World, config, random_request, weights};

/// What a world's script does things with.
#[derive(Default)]
struct Stage {
    engine: OnceLock<(EngineHandle, Arc<ManualClock>)>,
    streams: Mutex<Vec<EventStream>>,
    /// When each step began.
    steps: Mutex<Vec<DeviceNanos>>,
    over: AtomicBool,
}

/// A request: whose it is, how long, when.
#[derive(Debug, Clone)]
struct Asked {
    tenant: String,
    prompt: Vec<u32>,
    sampling: Sampling,
    stops: Stops,
    choices: u32,
    tier: Tier,
}

impl Asked {
    fn new(tenant: &str, rng: &mut Rng, prompt: usize, tokens: u32) -> Self {
        let stops = Stops { max_tokens: tokens, min_tokens: 0, ignore_eos: true, stop_token_ids: Vec::new() };
        let prompt = (0..prompt).map(|_| 1 + rng.below(30) as u32).collect();
        let tenant = tenant.to_owned();
        Self { tenant, prompt, sampling: Sampling::default(), stops, choices: 1, tier: Tier::Default }
    }
}

impl Stage {
    fn now(&self) -> DeviceNanos {
        self.engine.get().expect("the world has begun").1.now()
    }

    fn submit(&self, ticket: u64, asked: Asked) {
        let Asked { tenant, prompt, sampling, stops, choices, tier } = asked;
        let (engine, _) = self.engine.get().expect("the world has begun");
        let stream = engine.reserve().expect("the queue has room").submit(NewRequest {
            id: RequestId(format!("{tenant}-{ticket}")),
            ticket: Ticket(ticket),
            prompt: prompt.into(),
            choices,
            sampling,
            stops,
            salt: CacheSalt(*blake3::hash(tenant.as_bytes()).as_bytes()),
            tenant: tenant.as_str().into(),
            tier,
            allowance: None,
            grammar: None,
            score_prompts: false,
            vectors: None,
        });
        self.streams.lock().unwrap().push(stream);
    }
}

/// A world in which `script` is called at each step's beginning, with the step's number, until it gives `false`:
/// the usage of what was submitted, and when steps began.
fn play(
    config: EngineConfig,
    on: On,
    mut script: impl FnMut(usize, &Stage) -> bool + Send + 'static,
) -> (Vec<Usage>, Vec<DeviceNanos>) {
    let stage = Arc::new(Stage::default());
    let begun = stage.clone();
    let mut step = 0;
    let before = move || {
        // The world may begin before its engine is known here.
        while begun.engine.get().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        begun.steps.lock().unwrap().push(begun.now());
        if !begun.over.load(Ordering::SeqCst) && !script(step, &begun) {
            begun.over.store(true, Ordering::SeqCst);
        }
        step += 1;
    };
    let model = FakeModel::new(32, config.max_model_len, 3);
    let world = World::paced(model, config, on, before);
    stage.engine.set((world.engine.clone(), world.clock.clone())).unwrap_or_else(|_| panic!("set once"));
    // The first step is somebody's who takes part in nothing else.
    stage.submit(u64::MAX, Asked::new("first", &mut Rng(1), 1, 2));
    while !stage.over.load(Ordering::SeqCst) || stage.streams.lock().unwrap().iter().any(|s| s.open() > 0) {
        std::thread::sleep(Duration::from_millis(1));
        read(&mut stage.streams.lock().unwrap());
    }
    let steps = stage.steps.lock().unwrap().clone();
    stage.streams.lock().unwrap().clear();
    let mut usages = world.finish();
    usages.retain(|usage| usage.ticket != Ticket(u64::MAX));
    (usages, steps)
}

fn read(streams: &mut [EventStream]) {
    let mut context = Context::from_waker(Waker::noop());
    for stream in streams {
        while let Poll::Ready(Some(_)) = std::pin::pin!(stream.next()).poll(&mut context) {}
    }
}

fn of(usage: &Usage, tenant: &str) -> bool {
    usage.request.0.starts_with(tenant)
}

fn roomy(weights: Option<Weights>) -> EngineConfig {
    EngineConfig {
        max_model_len: 400,
        max_sequences: 8,
        step_tokens: 32,
        queue_depth: 2_000,
        speculative: Speculative::Off,
        weights,
        ..config(400, 4)
    }
}

#[test]
fn shares_of_the_device_follow_the_weights() {
    for on in EVERYWHERE {
        for (weight, share) in [("1", 0.5), ("3", 0.25), ("0.5", 2.0 / 3.0)] {
            for seed in 0..2 {
                let shared = share_of_a(on, weight, seed);
                assert!(
                    (shared / share - 1.0).abs() < 0.05,
                    "{on:?}, 1:{weight}, seed {seed}: {shared} of the time is not {share}"
                );
            }
        }
    }
}

/// The part of the device time that `a` gets beside `b`, while more waits of both than can run.
fn share_of_a(on: On, weight: &str, seed: u64) -> f64 {
    let mut rng = Rng(seed * 2 + 1);
    let (usages, _) = play(roomy(Some(weights(&[("b", weight)]))), on, move |step, stage| {
        if step == 0 {
            // They ask for different things, and one of them for many more.
            let kinds = [(6 + rng.below(20), 30), (40, 8 + rng.below(20))];
            for ticket in 0..900u64 {
                let (tenant, (prompt, tokens)) =
                    if ticket % 3 == 0 { ("a", kinds[0]) } else { ("b", kinds[1]) };
                let prompt = 1 + prompt + rng.below(prompt);
                let tokens = 1 + rng.below(tokens) as u32;
                let asked = Asked::new(tenant, &mut rng, prompt as usize, tokens);
                stage.submit(ticket, asked);
            }
        }
        let goes_on = step < 600;
        if !goes_on {
            stage.streams.lock().unwrap().clear();
        }
        goes_on
    });
    let unserved = |tenant| usages.iter().filter(|u| of(u, tenant) && u.steps == 0).count();
    assert!(unserved("a") > 10 && unserved("b") > 10, "both wait to the end");
    let total = |tenant| usages.iter().filter(|u| of(u, tenant)).map(|u| u.device().0).sum::<u64>() as f64;
    total("a") / (total("a") + total("b"))
}

/// A small tenant's requests, by what each waited for its first token: nanoseconds, and how many of them for the step
/// that ran when it came.
type Waits = Vec<(u64, u64)>;

fn small(seed: u64) -> Vec<Asked> {
    let mut rng = Rng(seed * 2 + 1);
    // Of a few tokens, and of some steps.
    let prompts: Vec<usize> =
        (0..8).map(|n| [2 + rng.below(30), 100 + rng.below(100)][n % 2] as usize).collect();
    prompts.into_iter().map(|prompt| Asked::new("small", &mut rng, prompt, 4)).collect()
}

fn stepping(weights: Option<Weights>) -> EngineConfig {
    EngineConfig { step_tokens: 64, ..roomy(weights) }
}

fn steps_between(steps: &[DeviceNanos], from: DeviceNanos, to: DeviceNanos) -> usize {
    steps.iter().filter(|step| (from..to).contains(*step)).count()
}

/// With nobody else: from the beginning of the first step that it takes part in.
fn alone(asked: &Asked) -> (u64, u64) {
    let mut asked = Some(asked.clone());
    let (usages, steps) = play(stepping(None), On::Host, move |step, stage| {
        if step == 1 {
            stage.submit(0, asked.take().expect("once"));
        }
        step == 0
    });
    let first = steps[1] + usages[0].ttft.expect("it was answered");
    ((first - steps[2]).0, 0)
}

/// While another tenant has hundreds of requests waiting: from when it was submitted, a whole step included that ran
/// already.
fn flooded(weights: Option<Weights>, seed: u64) -> Waits {
    let mut rng = Rng(seed * 2 + 77);
    let requests = small(seed);
    let count = requests.len();
    let (mut usages, steps) = play(stepping(weights), On::Host, move |step, stage| {
        if step == 0 {
            for ticket in 100..500 {
                let (prompt, tokens) = (20 + rng.below(200), 10 + rng.below(30));
                stage.submit(ticket, Asked::new("flood", &mut rng, prompt as usize, tokens as u32));
            }
        }
        let turn = step.checked_sub(30).filter(|since| since % 25 == 0).map(|since| since / 25);
        if let Some(asked) = turn.and_then(|turn| requests.get(turn)) {
            stage.submit(turn.expect("a turn") as u64, asked.clone());
        }
        step < 30 + 25 * count
    });
    usages.retain(|usage| of(usage, "small"));
    usages.sort_by_key(|usage| usage.ticket.0);
    let waits = usages.iter().enumerate().map(|(turn, usage)| {
        let ran = steps[31 + 25 * turn] - steps[30 + 25 * turn];
        (usage.ttft.expect("it was answered").0, ran.0)
    });
    waits.collect()
}

#[test]
fn a_small_tenant_hardly_notices_another_that_floods() {
    let (mut total, mut total_alone, mut total_fcfs) = (0, 0, 0);
    for seed in 0..3 {
        let alone: Waits = small(seed).iter().map(alone).collect();
        let fair = flooded(Some(Weights::default()), seed);
        assert_eq!(fair.len(), alone.len());
        for (index, ((waited, ran), (alone, _))) in fair.iter().zip(&alone).enumerate() {
            assert!(
                *waited <= alone + ran,
                "seed {seed}, {index}: {waited} ns, {alone} alone, {ran} for a step"
            );
        }
        let sum = |waits: &Waits| waits.iter().map(|(nanos, _)| nanos).sum::<u64>();
        total += sum(&fair);
        total_alone += sum(&alone);
        total_fcfs += sum(&flooded(None, seed));
    }
    println!(
        "time to the first token, ns: {total_alone} alone, {total} fair, {total_fcfs} first come first served"
    );
    assert!(total <= 2 * total_alone, "{total} ns, {total_alone} alone");
    assert!(total_fcfs > 10 * total_alone, "the flood is one: {total_fcfs} ns, {total_alone} alone");
}

#[test]
fn who_is_let_ahead_gets_no_more_than_its_share() {
    // One request after the other, each with a prompt that takes a flood's decodes out of some steps.
    for on in EVERYWHERE {
        for (weight, share) in [("1", 0.5f64), ("0.5", 1.0 / 3.0), ("0.1", 1.0 / 11.0)] {
            let mut rng = Rng(9);
            let (usages, _) = play(roomy(Some(weights(&[("small", weight)]))), on, move |step, stage| {
                if step == 0 {
                    for ticket in 10_000..10_600 {
                        let (prompt, tokens) = (20 + rng.below(60), 10 + rng.below(30));
                        stage.submit(ticket, Asked::new("flood", &mut rng, prompt as usize, tokens as u32));
                    }
                }
                if step % 6 == 5 {
                    stage.submit(step as u64, Asked::new("small", &mut rng, 120, 1));
                }
                let goes_on = step < 600;
                if !goes_on {
                    stage.streams.lock().unwrap().clear();
                }
                goes_on
            });
            let total =
                |tenant| usages.iter().filter(|u| of(u, tenant)).map(|u| u.device().0).sum::<u64>() as f64;
            let got = total("small") / (total("small") + total("flood"));
            assert!(got > 0.8 * share.min(0.4) && got < 1.05 * share, "{on:?}, {weight}: {got} of {share}");
        }
    }
}

#[test]
fn endless_newcomers_do_not_stop_who_was_there() {
    for on in EVERYWHERE {
        // Places for all, so that nobody loses one.
        let config = EngineConfig { max_sequences: 48, ..stepping(Some(Weights::default())) };
        let (usages, steps) = play(config, on, |step, stage| {
            for ticket in 0..if step == 0 { 12 } else { 0 } {
                stage.submit(ticket, Asked::new("flood", &mut Rng(2 * ticket + 1), 9, 40));
            }
            if step > 20 {
                let ticket = 100 + step as u64;
                stage.submit(ticket, Asked::new(&format!("new{step}"), &mut Rng(2 * ticket + 1), 40, 1));
            }
            step < 200
        });
        for usage in usages.iter().filter(|usage| of(usage, "flood")) {
            let took = steps_between(&steps, steps[0] + usage.queue, steps[0] + usage.wall);
            assert!(took as u64 <= 3 * usage.steps, "{on:?}: {} of {took} steps", usage.steps);
            assert_eq!(usage.status, Finish::Length);
        }
    }
}

#[test]
fn a_tenant_takes_the_places_of_its_weight_and_no_more() {
    // Of 8 places that another has, for answers of 80 tokens.
    for on in EVERYWHERE {
        for (weight, places) in [("1", 4), ("3", 6), ("0.5", 2), ("0.01", 0)] {
            let weights = weights(&[("small", weight)]);
            let (usages, steps) = play(roomy(Some(weights)), on, |step, stage| {
                let ask = |tickets: std::ops::Range<u64>, tenant, tokens| {
                    for ticket in tickets {
                        stage.submit(ticket, Asked::new(tenant, &mut Rng(2 * ticket + 1), 4, tokens));
                    }
                };
                match step {
                    0 => ask(0..20, "flood", 80),
                    10 => ask(20..28, "small", 60),
                    _ => {}
                }
                step < 10
            });
            let mut small: Vec<&Usage> = usages.iter().filter(|usage| of(usage, "small")).collect();
            small.sort_by_key(|usage| usage.ticket.0);
            let waited = |usage: &&Usage| steps_between(&steps, steps[10], steps[10] + usage.queue);
            let soon = small.iter().map(waited).filter(|waited| *waited <= 20).count();
            assert_eq!(
                soon,
                places,
                "{on:?}, weight {weight}: {:?}",
                small.iter().map(waited).collect::<Vec<_>>()
            );
        }
    }
}

#[test]
fn a_batch_runs_when_nobody_else_waits() {
    for on in EVERYWHERE {
        for weights in [None, Some(Weights::default())] {
            batch(on, weights);
        }
    }
}

fn batch(on: On, weights: Option<Weights>) {
    let mut rng = Rng(5);
    let (usages, steps) = play(roomy(weights), on, move |step, stage| {
        let mut ask = |tickets: std::ops::Range<u64>, tenant, tokens, tier| {
            for ticket in tickets {
                let asked = Asked::new(tenant, &mut rng, 10, tokens);
                stage.submit(ticket, Asked { tier, ..asked });
            }
        };
        match step {
            0 => ask(0..6, "batch", 80, Tier::Batch),
            8 => ask(10..60, "a", 10, Tier::Default),
            9 => {
                ask(60..70, "a", 5, Tier::Batch);
                ask(70..90, "b", 10, Tier::Default);
            }
            _ => {}
        }
        step < 9
    });
    assert_eq!(usages.len(), 86);
    let submitted = |ticket| {
        steps[match ticket {
            0..10 => 0,
            10..60 => 8,
            _ => 9,
        }]
    };
    let is_batch = |ticket| matches!(ticket, 0..10 | 60..70);
    let began = |usage: &Usage| submitted(usage.ticket.0) + usage.queue;
    let last = usages.iter().filter(|usage| !is_batch(usage.ticket.0)).map(began).max();
    let last = last.expect("there are others");
    for usage in usages.iter().filter(|usage| is_batch(usage.ticket.0)) {
        let ticket = usage.ticket.0;
        // Those of the beginning had nobody beside them, and made room for the others.
        assert!(ticket < 10 && began(usage) < submitted(10) || began(usage) >= last, "{on:?}: {usage:?}");
        assert!(submitted(ticket) + usage.wall > last, "{on:?}: {usage:?}");
    }
}

#[test]
fn tiers_are_served_one_after_another() {
    for on in EVERYWHERE {
        for weights in [None, Some(Weights::default())] {
            let mut rng = Rng(6);
            // Whoever is last in line comes first, and tenants do not matter.
            let tier_of = |ticket: u64| Tier::ALL[3 - (ticket / 20) as usize];
            let (usages, _) = play(roomy(weights), on, move |_, stage| {
                for ticket in 0..80 {
                    let tenant = if ticket % 3 == 0 { "a" } else { "b" };
                    let asked = Asked::new(tenant, &mut rng, 10, 10);
                    stage.submit(ticket, Asked { tier: tier_of(ticket), ..asked });
                }
                false
            });
            let mut waits = Tier::ALL.map(|_| (DeviceNanos(u64::MAX), DeviceNanos(0)));
            for usage in &usages {
                let (first, last) = &mut waits[tier_of(usage.ticket.0) as usize];
                (*first, *last) = ((*first).min(usage.queue), (*last).max(usage.queue));
            }
            assert!(waits.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{on:?}: {waits:?}");
        }
    }
}

#[test]
fn one_tenant_alone_is_served_as_it_comes() {
    for on in EVERYWHERE {
        for seed in 0..40 {
            let [fcfs, fair] =
                [None, Some(weights(&[("a", "2.5")]))].map(|weights| one_tenant(on, weights, seed));
            assert_eq!(fcfs, fair, "{on:?}, seed {seed}");
        }
    }
}

fn one_tenant(on: On, weights: Option<Weights>, seed: u64) -> (Vec<Usage>, Vec<DeviceNanos>) {
    let mut rng = Rng(seed * 2 + 1);
    let (blocks, block_size) = (8 + rng.below(8) as usize, 1 + rng.below(4) as usize);
    let config = EngineConfig { weights, ..config(blocks, block_size) };
    let capacity = config.max_model_len as u64;
    play(config, on, move |step, stage| {
        for index in 0..3 {
            let (prompt, sampling, stops) = random_request(&mut rng, capacity, 30);
            let choices = [1, 1, 3][rng.below(3) as usize];
            let asked = Asked { tenant: "a".into(), prompt, sampling, stops, choices, tier: Tier::Default };
            stage.submit(step as u64 * 3 + index, asked);
        }
        step < 3
    })
}

#[test]
fn whoever_waits_is_served_in_the_end() {
    // Blocks for little more than one of them, and tenants that weigh a thousand times more.
    for on in EVERYWHERE {
        for seed in 0..15 {
            let mut rng = Rng(seed * 2 + 1);
            let weights = weights(&[("light", "0.01"), ("heavy", "10")]);
            let config = EngineConfig { weights: Some(weights), ..config(12, 4) };
            let capacity = config.max_model_len as u64;
            let (usages, _) = play(config, on, move |step, stage| {
                for index in 0..4 {
                    let tenant = ["light", "heavy", "other"][rng.below(3) as usize].to_owned();
                    let (prompt, sampling, stops) = random_request(&mut rng, capacity, 30);
                    let tier = Tier::ALL[rng.below(4) as usize];
                    let asked = Asked { tenant, prompt, sampling, stops, choices: 1, tier };
                    stage.submit(step as u64 * 4 + index, asked);
                }
                step < 11
            });
            assert_eq!(usages.len(), 48);
            let ended = usages.iter().all(|usage| matches!(usage.status, Finish::Stop | Finish::Length));
            assert!(ended, "{on:?}, seed {seed}: everybody is served");
        }
    }
}
