//! Inputs that become vectors, among requests that generate: each is what its own rows give, and one account holds all
//! of a request's.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use obol::clock::ManualClock;
use obol::config::Pooling;
use obol::engine::{EngineConfig, EventStream};
use obol::meter::share::Work;
use obol::request::{CacheSalt, Event, Finish, NewRequest, Prompts, Sampling, Stops, Tier, Vectors};
use obol::units::{DeviceNanos, RequestId, Ticket};
use obol::usage::Usage;
use obol_models::fake::FakeModel;

use crate::engine_oracle::{oracle, read};
use crate::engine_sim::{
    COST, EVERYWHERE, On, Rng, World, block_on, config, random_request, step_cost, tight,
};
use crate::fake_device::Beside;
use crate::fake_encoder::{FakeEncoder, TEXT_TOKENS, encoded};

const POOLINGS: [Pooling; 2] = [Pooling::Last, Pooling::Mean];

/// What an input must become, computed one prefix after another.
fn vector_of(model: &FakeModel, input: &[u32], pooling: Pooling) -> Vec<f32> {
    let from = if pooling == Pooling::Last { input.len() } else { 1 };
    let rows: Vec<Vec<f32>> = (from..=input.len()).map(|end| model.hidden_after(&input[..end])).collect();
    let sum: Vec<f64> =
        (0..rows[0].len()).map(|at| rows.iter().map(|row| f64::from(row[at])).sum()).collect();
    let length = sum.iter().map(|value| value * value).sum::<f64>().sqrt();
    sum.into_iter().map(|value| (value / length) as f32).collect()
}

fn request(ticket: u64, inputs: Vec<Vec<u32>>, pooling: Pooling, tenant: u8) -> NewRequest {
    of(ticket, inputs, Vectors::Pooled(pooling), tenant)
}

fn of(ticket: u64, inputs: Vec<Vec<u32>>, vectors: Vectors, tenant: u8) -> NewRequest {
    NewRequest {
        allowance: None,
        grammar: None,
        score_prompts: false,
        vectors: Some(vectors),
        tenant: format!("t{tenant}").into(),
        tier: Tier::Default,
        id: RequestId(format!("r{ticket}")),
        ticket: Ticket(ticket),
        choices: inputs.len() as u32,
        prompt: Prompts::new(inputs),
        sampling: Sampling::default(),
        stops: Stops { max_tokens: 0, min_tokens: 0, ignore_eos: false, stop_token_ids: Vec::new() },
        salt: CacheSalt([tenant; 32]),
    }
}

/// Each input's vector; every input ends once, and after its vector.
async fn vectors(stream: &mut EventStream, inputs: usize) -> Vec<Vec<f32>> {
    let mut out = vec![(Vec::new(), false); inputs];
    while let Some(event) = stream.next().await {
        match event {
            Event::Vector { choice, vector } => {
                let (place, ended) = &mut out[choice as usize];
                assert!(place.is_empty() && !*ended, "one vector an input");
                *place = vector;
            }
            Event::Finished { choice, finish } => {
                assert_eq!(finish, Finish::Stop);
                assert!(!std::mem::replace(&mut out[choice as usize].1, true), "an input ends once");
            }
            Event::Token { .. } | Event::Prompt { .. } => unreachable!("nothing is generated or scored"),
        }
    }
    assert!(out.iter().all(|(vector, ended)| *ended && !vector.is_empty()));
    out.into_iter().map(|(vector, _)| vector).collect()
}

/// What waits for an answer, and what that must be.
enum Asked {
    Vectors(Vec<Vec<u32>>, Pooling),
    Tokens(Vec<u32>, Sampling, Stops),
}

#[test]
fn random_worlds_give_each_input_its_own_vector_and_conserve_everything() {
    let (mut preemptions, mut hits, mut recomputed) = (0, 0, 0);
    for seed in 0..250u64 {
        let mut rng = Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        let (vocab, config) = tight(&mut rng);
        let capacity = config.max_model_len as u64;
        let model = || FakeModel::new(vocab, capacity as usize, seed);
        let oracle_model = model();
        let world = World::new(model(), config, On::Host);
        let mut lengths = Vec::new();
        block_on(async {
            let mut streams = Vec::new();
            for ticket in 0..12 {
                let (prompt, sampling, stops) = random_request(&mut rng, capacity, vocab as u64);
                let tenant = rng.below(3) as u8;
                let (stream, asked) = if rng.below(2) == 0 {
                    lengths.push(prompt.len() as u64);
                    let stream = world.submit(ticket, &prompt, sampling.clone(), stops.clone(), 1, tenant);
                    (stream, Asked::Tokens(prompt, sampling, stops))
                } else {
                    let mut inputs = vec![prompt];
                    for _ in 0..rng.below(4) {
                        let mut other = random_request(&mut rng, capacity, vocab as u64).0;
                        // Sometimes all that there is room for.
                        other.resize(if rng.below(4) == 0 { capacity as usize } else { other.len() }, 1);
                        inputs.push(other);
                    }
                    lengths.push(inputs.iter().map(|input| input.len() as u64).sum());
                    let pooling = POOLINGS[rng.below(2) as usize];
                    let stream = world.submit_new(request(ticket, inputs.clone(), pooling, tenant));
                    (stream, Asked::Vectors(inputs, pooling))
                };
                if rng.below(6) > 0 {
                    streams.push((stream, asked));
                }
                if rng.below(3) == 0 {
                    tokio::task::yield_now().await;
                }
            }
            for (mut stream, asked) in streams {
                match asked {
                    Asked::Vectors(inputs, pooling) => {
                        let got = vectors(&mut stream, inputs.len()).await;
                        for (input, got) in inputs.iter().zip(got) {
                            let expected = vector_of(&oracle_model, input, pooling);
                            assert_eq!(got, expected, "seed {seed}, {pooling:?} of {input:?}");
                        }
                    }
                    Asked::Tokens(prompt, sampling, stops) => {
                        let got = read(&mut stream, 1).await.remove(0);
                        let (tokens, finish) = oracle(&oracle_model, &prompt, &sampling, &stops, 0);
                        assert_eq!(got, (tokens, Some(finish)), "seed {seed}, prompt {prompt:?}");
                    }
                }
            }
        });
        let stats = world.engine.stats();
        preemptions += stats.preemptions;
        hits += stats.prefix_hits;
        let (usages, house) = world.finish_with_books();
        recomputed += house[obol::usage::HouseTime::Preemption as usize].0;
        assert_eq!(usages.len(), 12, "seed {seed}: one settlement a request");
        for usage in usages {
            assert_eq!(usage.tokens.prompt, lengths[usage.ticket.0 as usize]);
        }
    }
    assert!(preemptions > 30 && hits > 300 && recomputed > 0, "{preemptions} preemptions, {hits} hits");
}

fn alone(inputs: Vec<Vec<u32>>, pooling: Pooling) -> Usage {
    let world = World::new(FakeModel::new(5, 80, 1), config(20, 4), On::Host);
    block_on(async {
        let count = inputs.len();
        let mut stream = world.submit_new(request(0, inputs, pooling, 0));
        vectors(&mut stream, count).await;
    });
    let [usage] = world.finish().try_into().expect("one settlement");
    usage
}

#[test]
fn an_input_is_paid_as_a_prefill_and_no_token_is_drawn() {
    for pooling in POOLINGS {
        let usage = alone(vec![vec![1, 2, 3, 1, 2, 3, 1]], pooling);
        // Steps of 6 tokens: two, the second of one token.
        assert_eq!((usage.steps, usage.tokens.completion, usage.decode), (2, 0, DeviceNanos::ZERO));
        let costs = [(6, 0), (1, 6)].map(|(tokens, context)| {
            crate::engine_sim::COST.alone(obol::meter::share::Work { tokens, context, logits: 0 })
        });
        assert_eq!(usage.prefill, costs[0] + costs[1], "{pooling:?}");
        assert_eq!((usage.kv_peak_blocks, usage.status), (2, Finish::Stop));
        assert_eq!((usage.ttft, usage.saved_by_batching), (None, DeviceNanos::ZERO));
    }
}

#[test]
fn the_last_rows_vector_takes_from_the_prefix_cache_and_a_mean_needs_all_rows() {
    let input: Vec<u32> = (0..33).map(|i| i % 4 + 1).collect();
    for (pooling, cached) in [(Pooling::Last, 32), (Pooling::Mean, 0)] {
        let world = World::new(FakeModel::new(5, 80, 1), config(20, 4), On::Host);
        let twice = block_on(async {
            let mut twice = Vec::new();
            for ticket in 0..2 {
                let mut stream = world.submit_new(request(ticket, vec![input.clone()], pooling, 0));
                twice.push(vectors(&mut stream, 1).await);
            }
            twice
        });
        assert_eq!(twice[0], twice[1], "{pooling:?}");
        let usages = world.finish();
        assert_eq!((usages[0].tokens.cached, usages[1].tokens.cached), (0, cached), "{pooling:?}");
    }
}

#[test]
fn a_device_that_keeps_its_hidden_states_says_so() {
    for (on, size) in [(On::Host, Some(4)), (On::Queue(1), None), (On::Queue(2), None)] {
        let world = World::new(FakeModel::new(5, 80, 1), config(20, 4), on);
        assert_eq!(world.engine.hidden_size(), size, "{on:?}");
        world.finish();
    }
}

/// What a step of the encoder costs.
fn text_cost(texts: &[&[u32]]) -> DeviceNanos {
    let own = |text: &&[u32]| COST.own(Work { tokens: text.len() as u64, context: 0, logits: 0 });
    let own: u128 = texts.iter().map(own).sum();
    DeviceNanos(u64::try_from((u128::from(COST.step) + own) / 1000).expect("a short time"))
}

/// With an encoder beside the model, and what both cost.
fn encoding(
    model: FakeModel,
    config: EngineConfig,
    on: On,
    encoder: impl FnOnce(FakeEncoder) -> FakeEncoder,
) -> World {
    let block_size = config.block_size;
    let model = |clock: Arc<ManualClock>, busy: Arc<AtomicU64>| match on {
        On::Host => model.on_forward(move |batch| {
            clock.advance(step_cost(batch));
            busy.fetch_add(step_cost(batch).0, Ordering::SeqCst);
        }),
        On::Queue(depth) => {
            let mut device = Beside::new(clock, block_size, step_cost, || {});
            device.busy = busy;
            model.queued(depth, device)
        }
    };
    World::with_encoder(config, model, |clock, busy| {
        let fake = FakeEncoder::new(move |texts| {
            clock.advance(text_cost(texts));
            busy.fetch_add(text_cost(texts).0, Ordering::SeqCst);
        });
        Some(Box::new(encoder(fake)))
    })
}

/// As [`encoding`], with a model whose steps take no time, and `before` each of the encoder's.
fn watched(model: FakeModel, before: impl FnMut(&[&[u32]]) + Send + 'static) -> World {
    let mut before = before;
    World::with_encoder(
        config(20, 4),
        |_, _| model,
        |clock, busy| {
            Some(Box::new(FakeEncoder::new(move |texts| {
                before(texts);
                clock.advance(text_cost(texts));
                busy.fetch_add(text_cost(texts).0, Ordering::SeqCst);
            })))
        },
    )
}

/// Random texts.
fn texts(rng: &mut Rng) -> Vec<Vec<u32>> {
    (0..1 + rng.below(9))
        .map(|_| (0..1 + rng.below(TEXT_TOKENS as u64)).map(|_| rng.below(5) as u32).collect())
        .collect()
}

#[test]
fn random_worlds_with_an_encoder_conserve_everything() {
    for on in EVERYWHERE {
        let (mut cut, mut failed) = (0, 0);
        for seed in 0..200u64 {
            let mut rng = Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
            let (vocab, config) = tight(&mut rng);
            let capacity = config.max_model_len as u64;
            let model = || FakeModel::new(vocab, capacity as usize, seed);
            let oracle_model = model();
            let breaks = seed % 5 == 0;
            let world = encoding(model(), config, on, |mut encoder| {
                encoder.fail_at = (breaks && seed % 10 == 0).then_some(2);
                encoder.panic_at = (breaks && seed % 10 == 5).then_some(2);
                encoder
            });
            let mut lengths = Vec::new();
            block_on(async {
                let mut streams = Vec::new();
                for ticket in 0..12 {
                    let tenant = rng.below(3) as u8;
                    let (stream, asked) = if rng.below(2) == 0 {
                        let (prompt, sampling, stops) = random_request(&mut rng, capacity, vocab as u64);
                        lengths.push(prompt.len());
                        let stream =
                            world.submit(ticket, &prompt, sampling.clone(), stops.clone(), 1, tenant);
                        (stream, Asked::Tokens(prompt, sampling, stops))
                    } else {
                        let inputs = texts(&mut rng);
                        lengths.push(inputs.iter().map(Vec::len).sum());
                        let new = of(ticket, inputs.clone(), Vectors::Encoded, tenant);
                        (world.submit_new(new), Asked::Vectors(inputs, Pooling::Last))
                    };
                    match rng.below(6) {
                        0 => drop(stream),
                        1 => {
                            tokio::task::yield_now().await;
                            drop(stream);
                        }
                        _ => streams.push((stream, asked)),
                    }
                }
                for (mut stream, asked) in streams {
                    match asked {
                        Asked::Vectors(inputs, _) if breaks => {
                            while let Some(event) = stream.next().await {
                                if let Event::Vector { choice, vector } = event {
                                    assert_eq!(vector, encoded(&inputs[choice as usize]));
                                }
                            }
                        }
                        Asked::Vectors(inputs, _) => {
                            let got = vectors(&mut stream, inputs.len()).await;
                            let expected: Vec<Vec<f32>> = inputs.iter().map(|input| encoded(input)).collect();
                            assert_eq!(got, expected, "{on:?}, seed {seed}");
                        }
                        Asked::Tokens(prompt, sampling, stops) => {
                            let got = read(&mut stream, 1).await.remove(0);
                            let (tokens, finish) = oracle(&oracle_model, &prompt, &sampling, &stops, 0);
                            assert_eq!(got, (tokens, Some(finish)), "{on:?}, seed {seed}");
                        }
                    }
                }
            });
            let usages = world.finish();
            assert_eq!(usages.len(), 12, "{on:?}, seed {seed}: one settlement a request");
            for usage in usages {
                assert_eq!(usage.tokens.prompt, lengths[usage.ticket.0 as usize] as u64);
                cut += usize::from(usage.status == Finish::Cancelled && usage.device() > DeviceNanos::ZERO);
                failed += usize::from(usage.status == Finish::Error);
            }
        }
        assert!(failed > 10, "{on:?}: {cut} were cancelled at work, {failed} failed");
    }
}

#[test]
fn alone_a_text_pays_its_steps_and_no_memory() {
    let world = encoding(FakeModel::new(5, 80, 1), config(20, 4), On::Host, |encoder| encoder);
    let inputs = vec![vec![1, 2, 3], vec![4; 2], vec![1; 9], vec![2]];
    block_on(async {
        let mut stream = world.submit_new(of(0, inputs.clone(), Vectors::Encoded, 0));
        vectors(&mut stream, 4).await;
    });
    let [usage] = world.finish().try_into().expect("one settlement");
    // Steps of 6 tokens, or of one text: the first two, the long one, the last.
    let costs = [text_cost(&[&inputs[0], &inputs[1]]), text_cost(&[&inputs[2]]), text_cost(&[&inputs[3]])];
    assert_eq!((usage.prefill, usage.steps), (costs.into_iter().sum(), 3));
    assert_eq!((usage.decode, usage.kv.0, usage.kv_peak_blocks), (DeviceNanos::ZERO, 0, 0));
    assert_eq!((usage.tokens.prompt, usage.tokens.cached, usage.tokens.completion), (15, 0, 0));
}

#[test]
fn the_model_and_the_encoder_take_turns_while_both_have_work() {
    // Steps as they came: `m` of the model, `e` of the encoder.
    let seen = Arc::new(Mutex::new(String::new()));
    let (of_model, of_encoder) = (Arc::clone(&seen), Arc::clone(&seen));
    let (go, gate) = mpsc::channel::<()>();
    let mut waited = false;
    let model = FakeModel::new(5, 80, 1).on_forward(move |_| {
        // The first step waits until the texts have come.
        if !std::mem::replace(&mut waited, true) {
            gate.recv().expect("the test goes on");
        }
        of_model.lock().expect("no panic").push('m');
    });
    let world = watched(model, move |_| of_encoder.lock().expect("no panic").push('e'));
    let stops = Stops { max_tokens: 6, min_tokens: 0, ignore_eos: true, stop_token_ids: vec![] };
    block_on(async {
        let mut tokens = world.submit(0, &[1, 2], Sampling::default(), stops, 1, 0);
        let mut texts = world.submit_new(of(1, vec![vec![1; 6]; 4], Vectors::Encoded, 1));
        go.send(()).expect("the model waits");
        read(&mut tokens, 1).await;
        vectors(&mut texts, 4).await;
    });
    world.finish();
    let order = seen.lock().expect("no panic").clone();
    assert!(!order.contains("ee") || order.ends_with("ee"), "{order}");
    assert_eq!((order.matches('e').count(), order.matches('m').count() >= 5), (4, true), "{order}");
    assert!(order.find('e').expect("a step") <= 2, "no text waits for more than a step: {order}");
}

#[test]
fn texts_of_who_was_charged_least_go_first() {
    let seen = Arc::new(Mutex::new(Vec::<u32>::new()));
    let of_encoder = Arc::clone(&seen);
    let (go, gate) = mpsc::channel::<()>();
    let mut waited = false;
    let world = watched(FakeModel::new(5, 80, 1), move |texts| {
        if !std::mem::replace(&mut waited, true) {
            gate.recv().expect("the test goes on");
        }
        of_encoder.lock().expect("no panic").extend(texts.iter().map(|text| text[0]));
    });
    block_on(async {
        let mut flood = world.submit_new(of(0, vec![vec![1; 6]; 8], Vectors::Encoded, 1));
        let mut one = world.submit_new(of(1, vec![vec![2; 6]], Vectors::Encoded, 2));
        go.send(()).expect("the encoder waits");
        vectors(&mut flood, 8).await;
        vectors(&mut one, 1).await;
    });
    world.finish();
    let order = seen.lock().expect("no panic").clone();
    assert!(order.iter().position(|tenant| *tenant == 2).expect("its text") <= 2, "{order:?}");
}
