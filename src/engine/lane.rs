//! What sampling needs of one sequence, and what it drew. Lanes are handed to the model's threads for a
//! step: rows of one sequence are sampled in order, rows of different sequences side by side. A device that
//! draws itself is told what to draw, and its draws are taken in.
//!
//! Knows no block, account or channel. Invariant: after a step `drawn` is what drawing one token a step
//! would have given, since a row's logits and its draw depend on the tokens before it only.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use obol_models::queue::{self, RowDraw, Step};

use crate::request::{Guide, GuideError, NewRequest, TokenLogprobs};

use super::draft::DRAFTS_MAX;
use super::pool::Pool;
use super::sampler::{self, Bars, Draw, History, Scratch};

/// A worker's own space to sample in.
#[derive(Default)]
pub(super) struct Desk {
    scratch: Scratch,
    forbidden: Vec<u32>,
}

/// A token, and how likely it was where that was asked for.
pub(super) type Drawn = (u32, Option<TokenLogprobs>);

pub(super) struct Lane {
    new: Arc<NewRequest>,
    choice: u32,
    history: History,
    /// Tokens that the sequence has, those drawn in this step included.
    length: usize,
    /// What the rows after the first were given for the tokens before them.
    drafts: Vec<u32>,
    /// Positions of the prompt's tokens that the step scores, one a row; the other rows come after them.
    asked: Range<usize>,
    /// How likely they were.
    pub(super) scores: Vec<TokenLogprobs>,
    /// Rows whose hidden states the step gives.
    pooled: usize,
    /// What those came to so far.
    pool: Pool,
    /// Tokens drawn in this step, in order.
    pub(super) drawn: Vec<Drawn>,
    /// Of the request's grammar.
    guide: Option<Box<dyn Guide>>,
    /// Why the guide could not say what a device may draw.
    astray: Option<GuideError>,
    /// Nothing could be drawn from a row of logits.
    pub(super) broken: Option<Broken>,
}

/// Why nothing could be drawn.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Broken {
    /// Of those that may be drawn.
    #[error("the model's logits are not numbers")]
    Logits,
    #[error("the model's hidden states have no direction")]
    Hidden,
    #[error("the grammar cannot be followed: {0}")]
    Guide(#[from] GuideError),
}

/// A lane as sequence and device share it: never both at a time, so its lock is never waited for.
pub(super) type SharedLane = Arc<Mutex<Lane>>;

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic in a step ends everything that took part in it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lane {
    pub(super) fn new(new: &Arc<NewRequest>, choice: u32) -> Self {
        let prompt = new.prompt_of(choice);
        Self {
            choice,
            history: History::new(prompt, &new.sampling),
            length: prompt.len(),
            drafts: Vec::new(),
            asked: 0..0,
            scores: Vec::new(),
            pooled: 0,
            pool: Pool::default(),
            drawn: Vec::with_capacity(1),
            guide: new.grammar.as_ref().map(|grammar| grammar.guide()),
            astray: None,
            broken: None,
            new: new.clone(),
        }
    }

    /// Before a step that gives the hidden states of `rows` rows.
    pub(super) fn begin_pooling(&mut self, rows: usize) {
        self.pooled = rows;
    }

    /// Takes in the hidden states (rows, hidden).
    pub(super) fn pool(&mut self, rows: &[f32]) {
        self.pool.add(rows, self.pooled);
    }

    /// The vector of all rows that were pooled.
    pub(super) fn vector(&mut self) -> Result<Vec<f32>, Broken> {
        self.pool.finish().map_err(|_| Broken::Hidden)
    }

    /// Before a step that scores the prompt's tokens at these positions, and then verifies `drafts`.
    pub(super) fn begin(&mut self, scored: Range<usize>, drafts: &[u32]) {
        self.asked = scored;
        self.scores.clear();
        self.drawn.clear();
        self.drafts.clear();
        if !drafts.is_empty() {
            self.drafts.reserve_exact(DRAFTS_MAX);
            self.drawn.reserve_exact(DRAFTS_MAX + 1);
            self.drafts.extend_from_slice(drafts);
        }
        self.broken = None;
    }

    /// Draws from `logits` (rows, vocab): the first row's token, and the next row's while the draft between
    /// them is what was drawn.
    pub(super) fn sample(&mut self, logits: &[f32], vocab: usize, end_tokens: &[u32], desk: &mut Desk) {
        let mut rows = logits.chunks_exact(vocab);
        for (position, row) in self.asked.clone().zip(&mut rows) {
            let token = self.new.prompt_of(self.choice)[position];
            let top = self.new.sampling.logprobs.unwrap_or(0);
            match sampler::score(row, token, top, &mut desk.scratch) {
                Ok(score) => self.scores.push(score),
                Err(sampler::NotFinite) => {
                    self.broken = Some(Broken::Logits);
                    return;
                }
            }
        }
        for (index, row) in rows.enumerate() {
            let (token, logprobs) = match self.draw(row, end_tokens, desk) {
                Ok(drawn) => drawn,
                Err(why) => {
                    self.broken = Some(why);
                    return;
                }
            };
            self.grow(token);
            self.drawn.push((token, logprobs));
            // The next row is of what was proposed: it counts if that is what was drawn.
            if self.drafts.get(index) != Some(&token) {
                return;
            }
        }
    }

    fn draw(&mut self, row: &[f32], end_tokens: &[u32], desk: &mut Desk) -> Result<Drawn, Broken> {
        let Desk { scratch, forbidden } = desk;
        forbidden.clear();
        self.forbid(self.length, end_tokens, forbidden);
        let sampling = &self.new.sampling;
        let draw = Draw { seed: sampling.seed, choice: self.choice, position: self.length as u64 };
        let allowed = self.guide.as_mut().map(|guide| guide.allowed()).transpose()?;
        let bars = Bars { forbidden, allowed };
        sampler::sample(row, sampling, &self.history, bars, draw, scratch).map_err(|_| Broken::Logits)
    }

    fn grow(&mut self, token: u32) {
        self.length += 1;
        self.history.push(token);
        if let Some(guide) = &mut self.guide {
            guide.drew(token);
        }
    }

    /// What must not be drawn after `length` tokens.
    fn forbid(&self, length: usize, end_tokens: &[u32], forbidden: &mut Vec<u32>) {
        let stops = &self.new.stops;
        if length - self.new.prompt_of(self.choice).len() < stops.min_tokens as usize {
            forbidden.extend_from_slice(&stops.stop_token_ids);
            if !stops.ignore_eos {
                forbidden.extend_from_slice(end_tokens);
            }
        }
    }

    /// Asks a device for the token after `length`, the last of which may not be known yet, but with a grammar is.
    pub(super) fn ask(&mut self, length: usize, end_tokens: &[u32], step: &mut Step) {
        let Step { draws, biases, forbidden, allowed, seen, .. } = step;
        let from = (biases.len(), forbidden.len(), allowed.len(), seen.len());
        self.astray = None;
        if let Some(guide) = &mut self.guide {
            match guide.allowed() {
                Ok(bits) => allowed.extend_from_slice(bits),
                // What is drawn then is not taken.
                Err(why) => self.astray = Some(why),
            }
        }
        let sampling = &self.new.sampling;
        biases.extend_from_slice(&sampling.logit_bias);
        self.forbid(length, end_tokens, forbidden);
        self.history.list(seen);
        draws.push(RowDraw {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            seed: sampling.seed,
            choice: self.choice,
            position: length as u64,
            logprobs: sampling.logprobs,
            biases: from.0..biases.len(),
            forbidden: from.1..forbidden.len(),
            allowed: from.2..allowed.len(),
            seen: from.3..seen.len(),
        });
    }

    /// Takes in what a device drew.
    pub(super) fn take(&mut self, draw: &mut queue::Draw) {
        self.begin(0..0, &[]);
        let Some(token) = draw.token.filter(|_| self.astray.is_none()) else {
            self.broken = Some(self.astray.take().map_or(Broken::Logits, Broken::Guide));
            return;
        };
        let logprobs = self
            .new
            .sampling
            .logprobs
            .map(|_| TokenLogprobs { chosen: draw.logprob, top: std::mem::take(&mut draw.top) });
        self.grow(token);
        self.drawn.push((token, logprobs));
    }
}
