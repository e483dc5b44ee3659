//! How a token is to be drawn from a row of logits, wherever that is done.

use std::ops::Range;

/// How to draw from one row of logits. The order is: logit bias and penalties, forbidden tokens, allowed
/// tokens, temperature, min-p, top-k, top-p, then one inverse-CDF draw in token order. Lists are those of all draws of a step, one
/// after the other; tokens outside the vocabulary have no effect.
#[derive(Debug, Clone, PartialEq)]
pub struct RowDraw {
    /// Greedy under 1e-5.
    pub temperature: f32,
    /// 0: all.
    pub top_k: u32,
    /// 1: all.
    pub top_p: f32,
    /// 0: all.
    pub min_p: f32,
    /// 1: none.
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// The draw's place in the counter-based generator: seed, choice, and the position of the token to draw.
    pub seed: u64,
    pub choice: u32,
    pub position: u64,
    /// With the log-probability of what is drawn, and of this many of the most likely, at most 20.
    pub logprobs: Option<u32>,
    /// Its part of the biases.
    pub biases: Range<usize>,
    /// Its part of the tokens that are never drawn.
    pub forbidden: Range<usize>,
    /// Its part of the words that say which tokens may be drawn: token t is bit t % 32 of word t / 32, those past the
    /// last word may not. Empty: all may.
    pub allowed: Range<usize>,
    /// Its part of the tokens that were seen, ascending by token; empty where no penalty asks for it. A token that
    /// is fed to the row counts as generated once more than is said here.
    pub seen: Range<usize>,
}

impl RowDraw {
    /// The most likely token, and nothing else.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        seed: 0,
        choice: 0,
        position: 0,
        logprobs: None,
        biases: 0..0,
        forbidden: 0..0,
        allowed: 0..0,
        seen: 0..0,
    };
}
