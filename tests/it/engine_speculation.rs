//! Speculation changes how many steps an answer takes, and nothing else.

use obol::config::Speculative;
use obol::engine::EngineConfig;
use obol::request::{Event, Finish, Sampling, Stops, TokenLogprobs};
use obol::usage::Usage;
use obol_models::fake::FakeModel;

use crate::engine_sim::{On, World, block_on, config, oracle, read};

/// Two of its tokens decide what it says next: a greedy answer soon repeats.
fn model(vocab: usize, context: usize, seed: u64) -> FakeModel {
    FakeModel::new(vocab, context, seed).remembering(2)
}

fn greedy() -> Sampling {
    Sampling { temperature: 0.0, ..Sampling::default() }
}

fn stops(max_tokens: u32) -> Stops {
    Stops { max_tokens, min_tokens: 0, ignore_eos: true, stop_token_ids: Vec::new() }
}

/// What one request gets that is alone in its engine, and what it used.
fn alone(
    model: FakeModel,
    config: EngineConfig,
    prompt: &[u32],
    sampling: &Sampling,
    stops: &Stops,
) -> (Vec<(u32, Option<TokenLogprobs>)>, Usage) {
    let world = World::new(model, config, On::Host);
    let tokens = block_on(async {
        let mut stream = world.submit(0, prompt, sampling.clone(), stops.clone(), 1, 0);
        let mut tokens = Vec::new();
        while let Some(event) = stream.next().await {
            if let Event::Token { token, logprobs, .. } = event {
                tokens.push((token, logprobs));
            }
        }
        tokens
    });
    (tokens, world.finish().remove(0))
}

#[test]
fn a_text_that_repeats_takes_fewer_steps_and_is_the_same() {
    for (sampling, at_least) in [
        (greedy(), 3),
        (Sampling { logprobs: Some(2), ..greedy() }, 3),
        (Sampling { temperature: 0.3, seed: 5, ..Sampling::default() }, 1),
    ] {
        let run = |speculative| {
            let config = EngineConfig { speculative, step_tokens: 32, ..config(40, 4) };
            alone(model(6, 160, 4), config, &[1, 2, 3], &sampling, &stops(120))
        };
        let ((plain, before), (speculated, after)) = (run(Speculative::Off), run(Speculative::Ngram));
        assert_eq!(plain, speculated);
        assert_eq!((before.tokens.draft_accepted, before.tokens.draft_rejected), (0, 0));
        assert_eq!(after.tokens.completion, 120, "only tokens of the answer are completion");
        assert!(after.steps * at_least < before.steps, "{} steps, {} before", after.steps, before.steps);
        assert!(after.device() < before.device(), "it pays less");
        // Each step draws one token, and those that held before it.
        assert_eq!(after.steps + after.tokens.draft_accepted, before.steps);
    }
}

#[test]
fn borders_ends_and_tight_pools_change_no_token() {
    let mut accepted = 0;
    for seed in 0..160u64 {
        let (block_size, blocks) = (1 + seed as usize % 5, 8 + seed as usize % 7);
        let mut config = EngineConfig { step_tokens: 24, max_sequences: 3, ..config(blocks, block_size) };
        config.prefix_caching = seed % 4 != 1;
        let capacity = config.max_model_len;
        let sampling = Sampling {
            temperature: [0.0, 0.0, 0.5][seed as usize % 3],
            repetition_penalty: [1.0, 1.0, 1.0, 1.2][seed as usize % 4],
            seed,
            ..Sampling::default()
        };
        let prompt: Vec<u32> = (0..3 + seed % 3).map(|i| (i % 2 + 1) as u32).collect();
        // To the last position of the context, or not quite.
        let stops = Stops {
            max_tokens: (capacity - prompt.len()) as u32 - [0, 0, 1][seed as usize % 3],
            min_tokens: [0, 4][seed as usize % 2],
            ignore_eos: seed % 5 < 3,
            stop_token_ids: if seed % 6 == 0 { vec![2] } else { Vec::new() },
        };
        let world = World::new(model(4, capacity, seed), config, On::Host);
        let choices = [1, 1, 3][seed as usize % 3];
        block_on(async {
            // Side by side, then once more over cached prefixes.
            let submit = |ticket| world.submit(ticket, &prompt, sampling.clone(), stops.clone(), choices, 0);
            let mut streams = [submit(0), submit(1)];
            let mut got = Vec::new();
            for stream in &mut streams {
                got.push(read(stream, choices).await);
            }
            got.push(read(&mut submit(2), choices).await);
            for (choice, answer) in got.iter().flat_map(|answers| answers.iter().enumerate()) {
                let expected = oracle(&model(4, capacity, seed), &prompt, &sampling, &stops, choice as u32);
                assert_eq!(*answer, (expected.0, Some(expected.1)), "seed {seed}, choice {choice}");
            }
        });
        accepted += world.engine.stats().draft_tokens_accepted;
        world.finish();
    }
    assert!(accepted > 300, "only {accepted} proposed tokens held");
}

#[test]
fn nobody_loses_blocks_to_a_proposal() {
    // Two answers fill the pool to its last block.
    let config = EngineConfig { step_tokens: 64, ..config(20, 2) };
    let world = World::new(model(5, 40, 4), config, On::Host);
    block_on(async {
        let mut streams = [0, 1].map(|ticket| {
            world.submit(ticket, &[ticket as u32 + 1, 2, 3], greedy(), stops(17), 1, ticket as u8)
        });
        for stream in &mut streams {
            assert_eq!(read(stream, 1).await[0].1, Some(Finish::Length));
        }
    });
    let stats = world.engine.stats();
    assert!(stats.draft_tokens_accepted > 0);
    assert_eq!(stats.preemptions, 0);
    for usage in world.finish() {
        assert!(usage.kv_peak_blocks <= 10, "{} blocks", usage.kv_peak_blocks);
    }
}

#[test]
fn who_never_repeats_pays_next_to_nothing_for_trying() {
    // Pairs of tokens come again all the time, and what follows them is another token each time.
    let stops = stops(400);
    let run = |speculative| {
        let config = EngineConfig { speculative, step_tokens: 32, ..config(110, 4) };
        alone(FakeModel::new(8, 440, 2), config, &[1, 2, 3], &greedy(), &stops)
    };
    let ((plain, before), (speculated, after)) = (run(Speculative::Off), run(Speculative::Ngram));
    assert_eq!(plain, speculated);
    assert!(after.tokens.draft_rejected > 0, "it was tried");
    assert!(after.device().0 * 100 < before.device().0 * 102, "{:?}, {:?}", after.device(), before.device());
}
