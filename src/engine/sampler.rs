//! Draws the next token from a row of logits. Pure: knows no sequence, batch, clock or channel.
//!
//! Order: logit bias and penalties, forbidden tokens, what a grammar allows, temperature, min-p, top-k, top-p, then one
//! inverse-CDF draw in token order. The draw depends on (seed, choice, position) only, through the
//! counter-based generator Philox4x32-10, so what shares the batch, a preemption or another schedule
//! cannot change it.
//!
//! The vocabulary is neither copied nor sorted: its pieces' highest logits, and their sums of weights
//! where the whole distribution matters, say where the tokens are that can be drawn, and only those are
//! looked at one by one.

mod philox;
mod row;
mod weigh;

#[cfg(test)]
mod oracle;
#[cfg(test)]
mod tests;

use obol_models::queue::Seen;

use crate::request::{Sampling, TokenLogprobs};

use row::{PIECE, Patch, Row};
use weigh::{Scale, UNITS, units};

/// Where in which random sequence the draw is.
#[derive(Debug, Clone, Copy)]
pub struct Draw {
    pub seed: u64,
    pub choice: u32,
    /// Position of the token to be drawn, counted from the start of the prompt.
    pub position: u64,
}

/// Below this a temperature is 0: its reciprocal would take the logits out of range.
const TEMPERATURE_MIN: f32 = 1e-5;

/// e^-30 of the best: under it a token cannot matter to a sum over any vocabulary.
const EXPONENT_MIN: f32 = -30.0;

/// Tokens are looked for in steps of e^-4: each has up to 55 times less weight than the one before, so most
/// distributions give up enough of theirs in two or three.
const LEVEL: f32 = 4.0;

/// What the sequence has seen, for penalties.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// No penalty asks for it: nothing is kept.
    off: bool,
    /// (token, times generated), ascending by token.
    generated: Vec<(u32, u32)>,
    /// Distinct prompt tokens, ascending; kept only when a repetition penalty asks for it.
    prompt: Vec<u32>,
}

impl History {
    #[must_use]
    pub fn new(prompt: &[u32], sampling: &Sampling) -> Self {
        let mut distinct = Vec::new();
        if sampling.repetition_penalty != 1.0 {
            distinct = prompt.to_vec();
            distinct.sort_unstable();
            distinct.dedup();
        }
        Self { off: !penalised(sampling), generated: Vec::new(), prompt: distinct }
    }

    pub fn push(&mut self, token: u32) {
        if self.off {
            return;
        }
        match self.generated.binary_search_by_key(&token, |(t, _)| *t) {
            Ok(at) => self.generated[at].1 += 1,
            Err(at) => self.generated.insert(at, (token, 1)),
        }
    }

    /// Appends what was seen, ascending by token.
    pub fn list(&self, seen: &mut Vec<Seen>) {
        let mut prompt = self.prompt.iter().copied().peekable();
        for &(token, times) in &self.generated {
            while let Some(token) = prompt.next_if(|prompt| *prompt < token) {
                seen.push(Seen { token, times: 0 });
            }
            prompt.next_if_eq(&token);
            seen.push(Seen { token, times });
        }
        seen.extend(prompt.map(|token| Seen { token, times: 0 }));
    }
}

fn penalised(sampling: &Sampling) -> bool {
    sampling.presence_penalty != 0.0
        || sampling.frequency_penalty != 0.0
        || sampling.repetition_penalty != 1.0
}

/// What may not be drawn.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bars<'a> {
    /// Tokens that are barred whatever else is said.
    pub forbidden: &'a [u32],
    /// The tokens that a grammar allows, as [`Guide::allowed`](crate::request::Guide::allowed) gives them.
    pub allowed: Option<&'a [u32]>,
}

impl<'a> Bars<'a> {
    /// Bars these tokens alone.
    #[must_use]
    pub fn forbid(forbidden: &'a [u32]) -> Self {
        Self { forbidden, allowed: None }
    }
}

/// The logits were not numbers: the model or its file is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotFinite;

/// Space that is used again: once it has grown, sampling allocates nothing (but the list of most likely
/// tokens, which leaves with its token).
#[derive(Debug, Default)]
pub struct Scratch {
    patch: Patch,
    /// The highest logit of each piece.
    highest: Vec<f32>,
    /// The sum of weights of each piece, in units.
    masses: Vec<u64>,
    ranked: Vec<f32>,
    kept: Vec<(u32, f32)>,
}

/// Picks the next token; what `bars` bar is never picked.
///
/// # Errors
/// `NotFinite` when no logit that may be drawn is a finite number.
pub fn sample(
    logits: &[f32],
    sampling: &Sampling,
    history: &History,
    bars: Bars<'_>,
    draw: Draw,
    scratch: &mut Scratch,
) -> Result<(u32, Option<TokenLogprobs>), NotFinite> {
    let Scratch { patch, highest, masses, ranked, kept } = scratch;
    patch.clear();
    adjust(logits, patch, sampling, history, bars);
    let row = Row { plain: logits, patch };
    row.highest(highest);
    let (best, logit) = row.best(highest).ok_or(NotFinite)?;
    let token = if sampling.temperature < TEMPERATURE_MIN || sampling.top_k == 1 {
        best
    } else {
        let drawer = Drawer { row, highest, scale: scale(logit, sampling) };
        drawer.draw(sampling, philox::bits(draw), masses, ranked, kept).unwrap_or(best)
    };
    let logprobs = sampling.logprobs.map(|top| {
        if !patch.is_empty() {
            patch.clear();
            Row { plain: logits, patch }.highest(highest);
        }
        logprobs(Row { plain: logits, patch }, highest, token, top as usize, ranked, kept)
    });
    Ok((token, logprobs))
}

/// How likely `token` was, and the `top` most likely ones, by a plain row of logits.
///
/// # Errors
/// `NotFinite` when no logit is a finite number.
pub fn score(
    logits: &[f32],
    token: u32,
    top: u32,
    scratch: &mut Scratch,
) -> Result<TokenLogprobs, NotFinite> {
    let Scratch { patch, highest, ranked, kept, .. } = scratch;
    patch.clear();
    let row = Row { plain: logits, patch };
    row.highest(highest);
    row.best(highest).ok_or(NotFinite)?;
    Ok(logprobs(row, highest, token, top as usize, ranked, kept))
}

/// Changes the logits that bias, penalties and `bars` are about.
fn adjust(plain: &[f32], patch: &mut Patch, sampling: &Sampling, history: &History, bars: Bars<'_>) {
    for (token, bias) in &sampling.logit_bias {
        if let Some(logit) = patch.logit(plain, *token) {
            *logit += bias;
        }
    }
    if sampling.repetition_penalty != 1.0 {
        let generated = history.generated.iter().map(|(token, _)| token);
        let repeated = generated.filter(|token| history.prompt.binary_search(token).is_err());
        for token in repeated.chain(&history.prompt) {
            let logit = patch.logit(plain, *token).expect("what was seen is in the vocabulary");
            *logit = if *logit > 0.0 {
                *logit / sampling.repetition_penalty
            } else {
                *logit * sampling.repetition_penalty
            };
        }
    }
    if sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0 {
        for (token, times) in &history.generated {
            let logit = patch.logit(plain, *token).expect("what was generated is in the vocabulary");
            *logit -= sampling.presence_penalty + sampling.frequency_penalty * *times as f32;
        }
    }
    for token in bars.forbidden {
        if let Some(logit) = patch.logit(plain, *token) {
            *logit = f32::NEG_INFINITY;
        }
    }
    if let Some(allowed) = bars.allowed {
        patch.keep_only(plain, allowed);
    }
}

fn scale(best: f32, sampling: &Sampling) -> Scale {
    let floor = if sampling.min_p > 0.0 { sampling.min_p.ln() } else { EXPONENT_MIN };
    Scale { best, inverse: 1.0 / sampling.temperature, floor: floor.max(EXPONENT_MIN) }
}

/// A token and its weight: most likely first, ties to the lower id.
fn by_weight(a: &(u32, f32), b: &(u32, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// A row with its pieces' highest logits, and what its logits weigh.
#[derive(Clone, Copy)]
struct Drawer<'a> {
    row: Row<'a>,
    highest: &'a [f32],
    scale: Scale,
}

impl Drawer<'_> {
    /// `None` when nothing weighs anything.
    fn draw(
        &self,
        sampling: &Sampling,
        bits: u64,
        masses: &mut Vec<u64>,
        ranked: &mut Vec<f32>,
        kept: &mut Vec<(u32, f32)>,
    ) -> Option<u32> {
        if sampling.top_k == 0 && sampling.top_p >= 1.0 {
            let total = self.weigh(masses);
            return self.pick_of_all(philox::below(total, bits), masses);
        }
        self.filter(sampling, masses, ranked, kept);
        pick(kept, bits)
    }

    /// Keeps what top-k and top-p leave, as (token, weight) in token order.
    fn filter(
        &self,
        sampling: &Sampling,
        masses: &mut Vec<u64>,
        ranked: &mut Vec<f32>,
        kept: &mut Vec<(u32, f32)>,
    ) {
        let top_k = sampling.top_k as usize;
        if top_k > 0 {
            // A little lower: weights are rounded, and ties among them go to the lower id.
            let least = self.scale.exponent(least_of_top(self.highest, top_k, ranked)) - 1e-4;
            self.gather(least, kept);
            if top_k < kept.len() {
                kept.select_nth_unstable_by(top_k - 1, by_weight);
                kept.truncate(top_k);
            }
            if sampling.top_p < 1.0 {
                keep_mass(kept, share(sampling.top_p, mass(kept)));
            }
        } else {
            let target = share(sampling.top_p, self.weigh(masses));
            self.gather_mass(target, kept);
            keep_mass(kept, target);
        }
        kept.sort_unstable_by_key(|(token, _)| *token);
    }

    /// The sum of the weights of each piece, and of all.
    fn weigh(&self, masses: &mut Vec<u64>) -> u64 {
        masses.clear();
        masses.extend(self.highest.iter().enumerate().map(|(piece, highest)| {
            let counts = self.scale.exponent(*highest) >= self.scale.floor;
            if counts { self.scale.mass(self.row.piece(piece)) } else { 0 }
        }));
        masses.iter().sum()
    }

    /// The token of the whole vocabulary at which the sum of weights passes `target`.
    fn pick_of_all(&self, target: u64, masses: &[u64]) -> Option<u32> {
        let mut sum = 0;
        let piece = masses.iter().position(|mass| {
            sum += mass;
            target < sum
        })?;
        sum -= masses[piece];
        let within = self.row.piece(piece).iter().position(|logit| {
            sum += units(self.scale.weight(*logit));
            target < sum
        });
        Some((piece * PIECE + within.expect("the piece's sum passes the target")) as u32)
    }

    /// Some of the most likely tokens, as few as are quickly known to weigh `target`.
    fn gather_mass(&self, target: u64, kept: &mut Vec<(u32, f32)>) {
        let mut least = -LEVEL;
        loop {
            self.gather(least, kept);
            if mass(kept) >= target || least <= self.scale.floor {
                break;
            }
            least -= LEVEL;
        }
    }

    /// All tokens with an exponent of at least `least`, in token order.
    fn gather(&self, least: f32, kept: &mut Vec<(u32, f32)>) {
        kept.clear();
        let scale = Scale { floor: least.max(self.scale.floor), ..self.scale };
        for (piece, highest) in self.highest.iter().enumerate() {
            if scale.exponent(*highest) >= scale.floor {
                let weights = scale.weights(self.row.piece(piece));
                let first = (piece * PIECE) as u32;
                let found = weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0);
                kept.extend(found.map(|(at, weight)| (first + at as u32, *weight)));
            }
        }
    }
}

/// A logit that at least `k` of the row reach: the k-th of the pieces' highest. Negative infinity when there
/// are fewer pieces.
fn least_of_top(highest: &[f32], k: usize, ranked: &mut Vec<f32>) -> f32 {
    if k > highest.len() {
        return f32::NEG_INFINITY;
    }
    ranked.clear();
    ranked.extend_from_slice(highest);
    *ranked.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
}

/// Keeps the most likely of `kept` whose weights reach `target`, at least one, in any order.
fn keep_mass(kept: &mut Vec<(u32, f32)>, mut target: u64) {
    // The cut is between `low` and `high`; halves are ordered against each other, and only the last few
    // inside themselves.
    let (mut low, mut high) = (0, kept.len());
    while high - low > 16 {
        let middle = (high - low) / 2;
        let range = &mut kept[low..high];
        range.select_nth_unstable_by(middle, by_weight);
        let upper = mass(&range[..middle]);
        if upper >= target {
            high = low + middle;
        } else {
            target -= upper;
            low += middle;
        }
    }
    kept[low..high].sort_unstable_by(by_weight);
    let mut sum = 0;
    let enough = kept[low..high].iter().position(|(_, weight)| {
        sum += units(*weight);
        sum >= target
    });
    kept.truncate(enough.map_or(high, |at| low + at + 1));
}

/// The sum of the weights, in units.
fn mass(kept: &[(u32, f32)]) -> u64 {
    kept.iter().map(|(_, weight)| units(*weight)).sum()
}

/// What top-p keeps of a total, in units.
fn share(top_p: f32, total: u64) -> u64 {
    (f64::from(top_p) * total as f64) as u64
}

/// Inverse CDF over the candidates in token order.
fn pick(kept: &[(u32, f32)], bits: u64) -> Option<u32> {
    let target = philox::below(mass(kept), bits);
    let mut sum = 0;
    let found = kept.iter().find(|(_, weight)| {
        sum += units(*weight);
        target < sum
    });
    found.map(|(token, _)| *token)
}

/// Of the plain row, whose pieces' highest logits are `highest`.
fn logprobs(
    row: Row<'_>,
    highest: &[f32],
    chosen: u32,
    top: usize,
    ranked: &mut Vec<f32>,
    kept: &mut Vec<(u32, f32)>,
) -> TokenLogprobs {
    let best = highest.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // All that is more than nothing in an f32.
    let scale = Scale { best, inverse: 1.0, floor: -80.0 };
    let sum: u64 = (0..row.pieces()).map(|piece| scale.mass(row.piece(piece))).sum();
    let log_sum = best + (sum as f64 / UNITS).ln() as f32;
    let mut most = Vec::new();
    if top > 0 {
        let least = least_of_top(highest, top, ranked);
        kept.clear();
        for piece in (0..row.pieces()).filter(|piece| highest[*piece] >= least) {
            let reach = |(_, logit): &(usize, &f32)| **logit >= least && **logit < f32::INFINITY;
            let found = row.piece(piece).iter().enumerate().filter(reach);
            kept.extend(found.map(|(at, logit)| ((piece * PIECE + at) as u32, *logit)));
        }
        kept.sort_unstable_by(by_weight);
        kept.truncate(top);
        most.extend(kept.iter().map(|(token, logit)| (*token, logit - log_sum)));
    }
    TokenLogprobs { chosen: row.plain[chosen as usize] - log_sum, top: most }
}
