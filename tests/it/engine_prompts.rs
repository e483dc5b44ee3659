//! Requests with several prompts: each choice is what its own prompt alone would give, and one account holds all.

use obol::engine::sampler::{self, Scratch};
use obol::request::{CacheSalt, NewRequest, Prompts, Sampling, Tier, TokenLogprobs};
use obol::units::{RequestId, Ticket};
use obol_models::fake::FakeModel;

use crate::engine_oracle::{oracle, read_scored};
use crate::engine_sim::{EVERYWHERE, Rng, World, block_on, random_request, tight};
use crate::fake_grammar::grammar_of;

/// How likely a prompt's tokens are, each looked at alone.
fn scored(model: &FakeModel, prompt: &[u32]) -> Vec<TokenLogprobs> {
    let score = |at: usize| {
        let logits = model.logits_after(&prompt[..at]);
        sampler::score(&logits, prompt[at], 2, &mut Scratch::default()).expect("numbers")
    };
    (1..prompt.len()).map(score).collect()
}

#[test]
fn each_choice_continues_its_own_prompt() {
    for on in EVERYWHERE {
        for seed in 0..60u64 {
            let mut rng = Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
            let (vocab, config) = tight(&mut rng);
            let capacity = config.max_model_len as u64;
            let model = || FakeModel::new(vocab, capacity as usize, seed);
            let oracle_model = model();
            let world = World::new(model(), config, on);
            let mut lengths = Vec::new();
            block_on(async {
                let mut streams = Vec::new();
                for ticket in 0..8 {
                    let (prompt, sampling, mut stops) = random_request(&mut rng, capacity, vocab as u64);
                    let mut prompts = vec![prompt];
                    for _ in 0..rng.below(4) {
                        // Sometimes the same one again.
                        let other = random_request(&mut rng, capacity, vocab as u64).0;
                        prompts.push(if rng.below(3) == 0 { prompts[0].clone() } else { other });
                    }
                    let longest = prompts.iter().map(Vec::len).max().expect("a prompt");
                    stops.max_tokens = stops.max_tokens.min((capacity as usize - longest) as u32);
                    stops.min_tokens = stops.min_tokens.min(stops.max_tokens);
                    let each = 1 + rng.below(2) as u32;
                    let score = world.engine.scores_prompts() && rng.below(2) == 0;
                    let sampling = Sampling { logprobs: score.then_some(2), ..sampling };
                    let choices = each * prompts.len() as u32;
                    lengths.push(prompts.iter().map(|prompt| prompt.len() as u64).sum::<u64>());
                    let stream = world.submit_new(NewRequest {
                        allowance: None,
                        grammar: grammar_of(&sampling, &stops),
                        score_prompts: score,
                        vectors: None,
                        tenant: "anonymous".into(),
                        tier: Tier::Default,
                        id: RequestId(format!("r{ticket}")),
                        ticket: Ticket(ticket),
                        prompt: Prompts::new(prompts.clone()),
                        choices,
                        sampling: sampling.clone(),
                        stops: stops.clone(),
                        salt: CacheSalt([0; 32]),
                    });
                    streams.push((stream, prompts, each, sampling, stops));
                }
                for (mut stream, prompts, each, sampling, stops) in streams {
                    let (got, scores) = read_scored(&mut stream, each * prompts.len() as u32).await;
                    for (at, prompt) in prompts.iter().enumerate() {
                        let expected =
                            if sampling.logprobs.is_some() { scored(&oracle_model, prompt) } else { vec![] };
                        let first = at * each as usize;
                        assert_eq!(scores[first], expected, "{on:?}, seed {seed}, prompt {prompt:?}");
                        assert!(scores[first + 1..first + each as usize].iter().all(Vec::is_empty));
                    }
                    for (choice, (tokens, finish)) in got.into_iter().enumerate() {
                        let prompt = &prompts[choice / each as usize];
                        let expected = oracle(&oracle_model, prompt, &sampling, &stops, choice as u32);
                        let got = (tokens, finish.expect("every choice ends"));
                        assert_eq!(got, expected, "{on:?}, seed {seed}, choice {choice} of {prompts:?}");
                    }
                }
            });
            let usages = world.finish();
            assert_eq!(usages.len(), 8, "{on:?}, seed {seed}: one settlement a request");
            for usage in usages {
                assert_eq!(usage.tokens.prompt, lengths[usage.ticket.0 as usize]);
                assert!(usage.tokens.cached < usage.tokens.prompt);
            }
        }
    }
}
