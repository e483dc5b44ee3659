//! What sampling needs of one sequence, and what it drew. Lanes are handed to the device's threads for a
//! step: rows of one sequence are sampled in order, rows of different sequences side by side.
//!
//! Knows no block, account or channel. Invariant: after a step `drawn` is what drawing one token a step
//! would have given, since a row's logits and its draw depend on the tokens before it only.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::request::{NewRequest, TokenLogprobs};

use super::draft::DRAFTS_MAX;
use super::sampler::{self, Draw, History, Scratch};

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
    /// Tokens drawn in this step, in order.
    pub(super) drawn: Vec<Drawn>,
    /// A row of logits held no number; nothing was drawn from it.
    pub(super) broken: bool,
}

/// A lane as sequence and device share it: never both at a time, so its lock is never waited for.
pub(super) type SharedLane = Arc<Mutex<Lane>>;

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic in a step ends everything that took part in it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lane {
    pub(super) fn new(new: &Arc<NewRequest>, choice: u32) -> Self {
        Self {
            choice,
            history: History::new(&new.prompt, &new.sampling),
            length: new.prompt.len(),
            drafts: Vec::new(),
            drawn: Vec::with_capacity(1),
            broken: false,
            new: new.clone(),
        }
    }

    /// Before a step that verifies `drafts`.
    pub(super) fn begin(&mut self, drafts: &[u32]) {
        self.drawn.clear();
        self.drafts.clear();
        if !drafts.is_empty() {
            self.drafts.reserve_exact(DRAFTS_MAX);
            self.drawn.reserve_exact(DRAFTS_MAX + 1);
            self.drafts.extend_from_slice(drafts);
        }
        self.broken = false;
    }

    /// Draws from `logits` (rows, vocab): the first row's token, and the next row's while the draft between
    /// them is what was drawn.
    pub(super) fn sample(&mut self, logits: &[f32], vocab: usize, end_tokens: &[u32], desk: &mut Desk) {
        let Desk { scratch, forbidden } = desk;
        let (sampling, stops) = (&self.new.sampling, &self.new.stops);
        for (index, row) in logits.chunks_exact(vocab).enumerate() {
            forbidden.clear();
            if self.length - self.new.prompt.len() < stops.min_tokens as usize {
                forbidden.extend_from_slice(&stops.stop_token_ids);
                if !stops.ignore_eos {
                    forbidden.extend_from_slice(end_tokens);
                }
            }
            let draw = Draw { seed: sampling.seed, choice: self.choice, position: self.length as u64 };
            let Ok((token, logprobs)) =
                sampler::sample(row, sampling, &self.history, forbidden, draw, scratch)
            else {
                self.broken = true;
                return;
            };
            self.length += 1;
            self.history.push(token);
            self.drawn.push((token, logprobs));
            // The next row is of what was proposed: it counts if that is what was drawn.
            if self.drafts.get(index) != Some(&token) {
                return;
            }
        }
    }
}
