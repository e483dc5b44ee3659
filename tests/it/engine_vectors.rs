//! Inputs that become vectors, among requests that generate: each is what its own rows give, and one account holds all
//! of a request's.

use obol::config::Pooling;
use obol::engine::EventStream;
use obol::request::{CacheSalt, Event, Finish, NewRequest, Prompts, Sampling, Stops, Tier, Vectors};
use obol::units::{DeviceNanos, RequestId, Ticket};
use obol::usage::Usage;
use obol_models::fake::FakeModel;

use crate::engine_oracle::{oracle, read};
use crate::engine_sim::{On, Rng, World, block_on, config, random_request, tight};

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
    NewRequest {
        allowance: None,
        grammar: None,
        score_prompts: false,
        vectors: Some(Vectors::Pooled(pooling)),
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
