//! A dumb model of what each request must get, and how answers are read to be compared with it.

use obol::engine::EventStream;
use obol::engine::sampler::{self, Bars, Draw, History, Scratch};
use obol::request::{Event, Finish, Sampling, Stops, TokenLogprobs};
use obol_models::fake::FakeModel;

use crate::fake_grammar::grammar_of;

/// What a request must produce, computed the dumb way: one token after another, alone.
pub(crate) fn oracle(
    model: &FakeModel,
    prompt: &[u32],
    sampling: &Sampling,
    stops: &Stops,
    choice: u32,
) -> (Vec<u32>, Finish) {
    let mut tokens = prompt.to_vec();
    let mut history = History::new(prompt, sampling);
    let mut shown = Vec::new();
    let mut guide = grammar_of(sampling, stops).map(|grammar| grammar.guide());
    loop {
        let generated = tokens.len() - prompt.len();
        let mut forbidden = Vec::new();
        if generated < stops.min_tokens as usize {
            forbidden.extend(&stops.stop_token_ids);
            if !stops.ignore_eos {
                forbidden.push(0);
            }
        }
        let draw = Draw { seed: sampling.seed, choice, position: tokens.len() as u64 };
        let logits = model.logits_after(&tokens);
        let allowed = guide.as_mut().map(|guide| guide.allowed().expect("a set"));
        let bars = Bars { forbidden: &forbidden, allowed };
        let (token, _) =
            sampler::sample(&logits, sampling, &history, bars, draw, &mut Scratch::default()).unwrap();
        if let Some(guide) = &mut guide {
            guide.drew(token);
        }
        tokens.push(token);
        history.push(token);
        if (token == 0 && !stops.ignore_eos) || stops.stop_token_ids.contains(&token) {
            return (shown, Finish::Stop);
        }
        shown.push(token);
        if generated + 1 == stops.max_tokens as usize {
            return (shown, Finish::Length);
        }
    }
}

/// Each choice's tokens, and how it ended.
type Answers = Vec<(Vec<u32>, Option<Finish>)>;

pub(crate) async fn read(stream: &mut EventStream, choices: u32) -> Answers {
    read_scored(stream, choices).await.0
}

/// As [`read`], and how likely each choice's prompt was.
pub(crate) async fn read_scored(
    stream: &mut EventStream,
    choices: u32,
) -> (Answers, Vec<Vec<TokenLogprobs>>) {
    let mut out = vec![(Vec::new(), None); choices as usize];
    let mut scored = vec![Vec::new(); choices as usize];
    while let Some(event) = stream.next().await {
        match event {
            Event::Token { choice, token, .. } => out[choice as usize].0.push(token),
            Event::Prompt { choice, scores } => {
                assert!(out[choice as usize].0.is_empty(), "the prompt is scored first");
                scored[choice as usize].extend(scores);
            }
            Event::Vector { .. } => unreachable!("no vector is asked for"),
            Event::Finished { choice, finish } => {
                assert!(out[choice as usize].1.replace(finish).is_none(), "a choice ends once");
            }
        }
    }
    (out, scored)
}
