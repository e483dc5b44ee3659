//! A device that is given steps ahead of their tokens: what it answers, what is paid past an end, and what the books
//! say when its clock cannot be trusted.

use obol::config::Speculative;
use obol::engine::{EngineConfig, EventStream};
use obol::request::{Event, Finish, Sampling, Stops, TokenLogprobs};
use obol::units::DeviceNanos;
use obol::usage::{HouseTime, Usage};
use obol_models::fake::FakeModel;
use obol_models::queue::StepTime;

use crate::engine_sim::{EVERYWHERE, On, Rng, World, block_on, config, oracle, random_request, read};
use crate::fake_device::{Delays, Quirks};

fn stops(max_tokens: u32) -> Stops {
    Stops { max_tokens, min_tokens: 0, ignore_eos: true, stop_token_ids: Vec::new() }
}

fn greedy() -> Sampling {
    Sampling { temperature: 0.0, ..Sampling::default() }
}

type Answer = Vec<(u32, Option<TokenLogprobs>)>;

async fn answer(stream: &mut EventStream) -> Answer {
    let mut tokens = Vec::new();
    while let Some(event) = stream.next().await {
        if let Event::Token { token, logprobs, .. } = event {
            tokens.push((token, logprobs));
        }
    }
    tokens
}

#[test]
fn all_that_can_be_asked_of_sampling_is_answered_alike() {
    for seed in 0..20 {
        let answers = EVERYWHERE.map(|on| {
            let mut rng = Rng(seed * 2 + 1);
            let vocab = 70 + rng.below(100) as usize;
            let world = World::new(FakeModel::new(vocab, 80, seed), config(60, 4), on);
            let answers = block_on(async {
                let mut streams: Vec<EventStream> = (0..5)
                    .map(|ticket| {
                        let (prompt, sampling, stops) = random_request(&mut rng, 40, vocab as u64);
                        let sampling = Sampling {
                            top_k: [0, 5][rng.below(2) as usize],
                            min_p: [0.0, 0.05][rng.below(2) as usize],
                            frequency_penalty: [0.0, 0.4][rng.below(2) as usize],
                            logit_bias: vec![(rng.below(90) as u32, 3.5), (9_999, 1.0)],
                            logprobs: [None, Some(0), Some(3)][rng.below(3) as usize],
                            ..sampling
                        };
                        world.submit(ticket, &prompt, sampling, stops, 1, 0)
                    })
                    .collect();
                let mut answers = Vec::new();
                for stream in &mut streams {
                    answers.push(answer(stream).await);
                }
                answers
            });
            world.finish();
            answers
        });
        assert_eq!(answers[0], answers[1], "seed {seed}");
        assert_eq!(answers[0], answers[2], "seed {seed}");
    }
}

/// One request alone that ends by a stop token.
fn stopped(on: On) -> Usage {
    // The first token of the answer that was not there before ends it.
    let model = || FakeModel::new(50, 80, 3);
    let (tokens, _) = oracle(&model(), &[1, 2, 3, 4, 5], &greedy(), &stops(20), 0);
    let at = (4..20).find(|at| !tokens[..*at].contains(&tokens[*at])).expect("not all tokens are the same");
    let stops = Stops { stop_token_ids: vec![tokens[at]], ..stops(20) };
    let world = World::new(model(), config(20, 4), on);
    block_on(async {
        let mut stream = world.submit(0, &[1, 2, 3, 4, 5], greedy(), stops, 1, 0);
        assert_eq!(read(&mut stream, 1).await, [(tokens[..at].to_vec(), Some(Finish::Stop))], "{on:?}");
    });
    world.finish().remove(0)
}

#[test]
fn a_row_past_the_end_is_paid_and_said_to_nobody() {
    let [host, one, two] = EVERYWHERE.map(stopped);
    assert_eq!((one.steps, one.device(), one.kv), (host.steps, host.device(), host.kv));
    assert_eq!(two.steps, host.steps + 1, "the end was not known when the next step was given");
    assert_eq!(two.tokens, host.tokens);
    assert!(two.device() > host.device() && two.kv > host.kv);
}

#[test]
fn an_end_that_can_be_foreseen_costs_nothing_more() {
    let usages = EVERYWHERE.map(|on| {
        let world = World::new(FakeModel::new(50, 80, 3), config(20, 4), on);
        block_on(async {
            let mut stream = world.submit(0, &[1; 9], greedy(), stops(13), 1, 0);
            assert_eq!(read(&mut stream, 1).await[0].1, Some(Finish::Length));
        });
        world.finish().remove(0)
    });
    for usage in &usages {
        let expected = (usages[0].steps, usages[0].device(), usages[0].kv_peak_blocks);
        assert_eq!((usage.steps, usage.device(), usage.kv_peak_blocks), expected);
    }
}

/// Always the same delays, and a clock that is right.
struct Slow(Delays);

impl Quirks for Slow {
    fn delays(&mut self) -> Delays {
        self.0
    }

    fn says(&mut self, truth: StepTime) -> StepTime {
        truth
    }
}

#[test]
fn with_a_step_ahead_the_device_waits_for_nobody() {
    let gap = |depth| {
        let delays = Delays { submit: 300, launch: 20, wake: 50 };
        let config = EngineConfig { speculative: Speculative::Off, ..config(40, 4) };
        let world = World::beside(FakeModel::new(50, 160, 3), config, depth, Slow(delays), None);
        block_on(async {
            let mut stream = world.submit(0, &[1; 3], greedy(), stops(101), 1, 0);
            read(&mut stream, 1).await;
        });
        let (usages, house) = world.finish_with_books();
        assert_eq!(usages[0].steps, 101);
        (house[HouseTime::HostGap as usize], usages[0].device())
    };
    let ((gap_alone, device_alone), (gap_ahead, device_ahead)) = (gap(1), gap(2));
    // Each step but the first waits for the host to hear of the one before; giving it is its own time, as far as
    // anybody can tell who has no clock on the device.
    assert!(gap_alone >= DeviceNanos(100 * 50), "{gap_alone:?}");
    assert!(gap_ahead <= DeviceNanos(400), "{gap_ahead:?}");
    assert_eq!(device_alone, device_ahead, "the same steps");
}

#[test]
fn energy_goes_where_the_time_went() {
    for on in EVERYWHERE {
        let world = World::new(FakeModel::new(50, 160, 3), config(40, 4), on);
        block_on(async {
            for ticket in 0..2 {
                let mut stream = world.submit(ticket, &[1; 3], greedy(), stops(101), 1, 0);
                read(&mut stream, 1).await;
            }
        });
        for usage in world.finish() {
            // The meter counts evenly, and is read every few steps: the first steps are the house's.
            let (given, used) = (usage.energy_mj.expect("there is a meter"), usage.device().0 / 4_000 * 31);
            assert!(given.abs_diff(used) < 31 * 12, "{on:?}: {given} mJ of {used} mJ");
        }
    }
}

/// Delays of any kind, and a clock that drifts, jumps, and knows nothing at times.
struct Wild {
    rng: Rng,
    /// What it shows for a thousand nanoseconds.
    pace: u64,
    jumps: bool,
}

impl Quirks for Wild {
    fn delays(&mut self) -> Delays {
        let mut below = |n| self.rng.below(n);
        Delays { submit: below(9_000), launch: below(500), wake: below(3_000) }
    }

    fn says(&mut self, truth: StepTime) -> StepTime {
        let paced = |nanos: u64| nanos * self.pace / 1_000;
        let mut said = StepTime { run: paced(truth.run), since_last_end: truth.since_last_end.map(paced) };
        if self.jumps {
            match self.rng.below(12) {
                0 => said.since_last_end = None,
                1 => said.since_last_end = Some(self.rng.below(1 << 40)),
                2 => said.run = self.rng.below(1 << 40),
                3 => said = StepTime { run: 0, since_last_end: Some(0) },
                _ => {}
            }
        }
        said
    }
}

/// What a client does with its stream.
enum Client {
    Reads,
    /// Goes away after so many tokens.
    Leaves(u64),
    /// Finds a stop string in a choice after so many tokens.
    Stops(u32, u64),
}

async fn follow(mut stream: EventStream, choices: u32, client: &Client) -> Vec<(Vec<u32>, Option<Finish>)> {
    let mut out = vec![(Vec::new(), None); choices as usize];
    let mut heard = 0;
    while let Some(event) = stream.next().await {
        match event {
            Event::Prompt { .. } | Event::Vector { .. } => unreachable!("prompts are only continued here"),
            Event::Token { choice, token, .. } => {
                out[choice as usize].0.push(token);
                heard += 1;
                match client {
                    Client::Leaves(after) if heard > *after => return out,
                    Client::Stops(choice, after) if heard == *after => stream.stop_choice(*choice),
                    _ => {}
                }
            }
            Event::Finished { choice, finish } => {
                assert!(out[choice as usize].1.replace(finish).is_none(), "a choice ends once");
            }
        }
    }
    assert!(out.iter().all(|(_, finish)| finish.is_some()), "all choices end");
    out
}

/// Each choice says what it must, as far as its client let it; and the laws hold in every report.
fn wild_world(seed: u64, depth: usize) -> (usize, u64) {
    let mut rng = Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let vocab = 3 + rng.below(4) as usize;
    let mut config = config(5 + rng.below(10) as usize, 1 + rng.below(4) as usize);
    config.max_sequences = 1 + rng.below(4) as usize;
    config.prefix_caching = rng.below(5) > 0;
    let capacity = config.max_model_len as u64;
    let model = || FakeModel::new(vocab, capacity as usize, seed);
    let mut faulty = model();
    if rng.below(3) == 0 {
        faulty = match rng.below(2) {
            0 => faulty.fail_at(1 + rng.below(40)),
            _ => faulty.panic_at(1 + rng.below(40)),
        };
    }
    let quirks = Wild { rng: Rng(seed | 1), pace: 700 + rng.below(600), jumps: rng.below(2) == 0 };
    let fail_at_wait = (rng.below(3) == 0).then(|| 1 + rng.below(40));
    let world = World::beside(faulty, config, depth, quirks, fail_at_wait);
    let count = 12;
    let mut errors = 0;
    block_on(async {
        let mut following = Vec::new();
        for ticket in 0..count {
            let (prompt, sampling, stops) = random_request(&mut rng, capacity, vocab as u64);
            let choices = [1, 1, 2, 3][rng.below(4) as usize];
            let tenant = rng.below(2) as u8;
            let stream = world.submit(ticket, &prompt, sampling.clone(), stops.clone(), choices, tenant);
            let client = match rng.below(4) {
                0 => Client::Leaves(rng.below(6)),
                1 => Client::Stops(rng.below(u64::from(choices)) as u32, 1 + rng.below(6)),
                _ => Client::Reads,
            };
            following.push((stream, prompt, sampling, stops, choices, client));
        }
        for (stream, prompt, sampling, stops, choices, client) in following {
            let got = follow(stream, choices, &client).await;
            for (choice, (tokens, finish)) in (0..).zip(got) {
                let (expected, natural) = oracle(&model(), &prompt, &sampling, &stops, choice);
                let whole = match (finish, &client) {
                    (Some(Finish::Error), _) => {
                        errors += 1;
                        false
                    }
                    (None, Client::Leaves(_)) => false,
                    (Some(Finish::Stop), Client::Stops(stopped, _)) if *stopped == choice => false,
                    (finish, _) => {
                        assert_eq!(finish, Some(natural), "seed {seed}, depth {depth}");
                        true
                    }
                };
                assert!(
                    expected.starts_with(&tokens),
                    "seed {seed}, depth {depth}: {tokens:?} of {expected:?}"
                );
                assert!(
                    !whole || tokens == expected,
                    "seed {seed}, depth {depth}: {tokens:?} of {expected:?}"
                );
            }
        }
    });
    let preemptions = world.engine.stats().preemptions;
    let usages = world.finish();
    assert_eq!(usages.len(), count as usize, "seed {seed}: one settlement a request");
    (errors, preemptions)
}

#[test]
fn whatever_fails_ends_or_is_mistaken_answers_are_right_and_the_books_balance() {
    let (mut errors, mut preemptions) = (0, 0);
    for seed in 0..200 {
        for depth in [1, 2] {
            let (failed, preempted) = wild_world(seed, depth);
            errors += failed;
            preemptions += preempted;
        }
    }
    assert!(errors > 100 && preemptions > 100, "{errors} errors, {preemptions} preemptions");
}
