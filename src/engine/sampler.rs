//! Draws the next token from a row of logits. Pure: knows no sequence, batch, clock or channel.
//!
//! Order: logit bias and penalties, forbidden tokens, temperature, min-p, top-k, top-p, then one
//! inverse-CDF draw in token order. The draw depends on (seed, choice, position) only, through the
//! counter-based generator Philox4x32-10 (Salmon et al., SC'11), so what shares the batch, a
//! preemption or another schedule cannot change it.

use crate::request::{Sampling, TokenLogprobs};

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

/// What the sequence has seen, for penalties.
#[derive(Debug, Clone, Default)]
pub struct History {
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
        Self { generated: Vec::new(), prompt: distinct }
    }

    pub fn push(&mut self, token: u32) {
        match self.generated.binary_search_by_key(&token, |(t, _)| *t) {
            Ok(at) => self.generated[at].1 += 1,
            Err(at) => self.generated.insert(at, (token, 1)),
        }
    }
}

/// The logits were not numbers: the model or its file is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotFinite;

/// Reusable space for the candidates.
#[derive(Debug, Default)]
pub struct Scratch {
    logits: Vec<f32>,
    kept: Vec<(u32, f32)>,
}

/// Picks the next token; `forbidden` tokens are never picked.
///
/// # Errors
/// `NotFinite` when no logit is a finite number.
pub fn sample(
    logits: &[f32],
    sampling: &Sampling,
    history: &History,
    forbidden: &[u32],
    draw: Draw,
    scratch: &mut Scratch,
) -> Result<(u32, Option<TokenLogprobs>), NotFinite> {
    let plain = sampling.logit_bias.is_empty()
        && sampling.presence_penalty == 0.0
        && sampling.frequency_penalty == 0.0
        && sampling.repetition_penalty == 1.0
        && forbidden.is_empty();
    let Scratch { logits: adjusted, kept } = scratch;
    let row = if plain {
        logits
    } else {
        adjusted.clear();
        adjusted.extend_from_slice(logits);
        adjust(adjusted, sampling, history, forbidden);
        adjusted
    };
    let best = argmax(row).ok_or(NotFinite)?;
    let token = if sampling.temperature < TEMPERATURE_MIN || sampling.top_k == 1 {
        best
    } else {
        filter(row, row[best as usize], sampling, kept);
        pick(kept, uniform(draw)).unwrap_or(best)
    };
    let logprobs = sampling.logprobs.map(|top| logprobs(logits, token, top as usize));
    Ok((token, logprobs))
}

fn adjust(row: &mut [f32], sampling: &Sampling, history: &History, forbidden: &[u32]) {
    for (token, bias) in &sampling.logit_bias {
        if let Some(logit) = row.get_mut(*token as usize) {
            *logit += bias;
        }
    }
    if sampling.repetition_penalty != 1.0 {
        let generated = history.generated.iter().map(|(token, _)| token);
        let repeated = generated.filter(|token| history.prompt.binary_search(token).is_err());
        for token in repeated.chain(&history.prompt) {
            let logit = &mut row[*token as usize];
            *logit = if *logit > 0.0 {
                *logit / sampling.repetition_penalty
            } else {
                *logit * sampling.repetition_penalty
            };
        }
    }
    for (token, times) in &history.generated {
        row[*token as usize] -= sampling.presence_penalty + sampling.frequency_penalty * *times as f32;
    }
    for token in forbidden {
        if let Some(logit) = row.get_mut(*token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// The highest finite logit, ties to the lower id; `None` when there is none.
fn argmax(row: &[f32]) -> Option<u32> {
    let mut best = (f32::NEG_INFINITY, None);
    for (id, logit) in row.iter().enumerate() {
        if *logit > best.0 && *logit < f32::INFINITY {
            best = (*logit, Some(id as u32));
        }
    }
    best.1
}

/// Keeps the candidates as (token, unnormalised probability), in token order.
fn filter(row: &[f32], max: f32, sampling: &Sampling, kept: &mut Vec<(u32, f32)>) {
    let scale = 1.0 / sampling.temperature;
    kept.clear();
    // Below e^-30 of the best a token cannot matter to an f32 sum over any vocabulary.
    let floor = if sampling.min_p > 0.0 { sampling.min_p.ln() } else { -30.0 };
    for (id, logit) in row.iter().enumerate() {
        let exponent = (logit - max) * scale;
        if exponent >= floor && exponent <= 0.0 {
            kept.push((id as u32, exponent.exp()));
        }
    }
    let by_probability = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let top_k = sampling.top_k as usize;
    if top_k > 0 && top_k < kept.len() {
        kept.select_nth_unstable_by(top_k - 1, by_probability);
        kept.truncate(top_k);
    }
    if sampling.top_p < 1.0 {
        kept.sort_unstable_by(by_probability);
        let total: f64 = kept.iter().map(|(_, p)| f64::from(*p)).sum();
        let mut sum = 0.0;
        let enough = kept.iter().position(|(_, p)| {
            sum += f64::from(*p);
            sum >= f64::from(sampling.top_p) * total
        });
        kept.truncate(enough.map_or(kept.len(), |at| at + 1));
    }
    kept.sort_unstable_by_key(|(token, _)| *token);
}

/// Inverse CDF over the candidates in token order.
fn pick(kept: &[(u32, f32)], uniform: f64) -> Option<u32> {
    let total: f64 = kept.iter().map(|(_, p)| f64::from(*p)).sum();
    let target = uniform * total;
    let mut sum = 0.0;
    for (token, p) in kept {
        sum += f64::from(*p);
        if target < sum {
            return Some(*token);
        }
    }
    kept.last().map(|(token, _)| *token)
}

fn logprobs(row: &[f32], chosen: u32, top: usize) -> TokenLogprobs {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|logit| f64::from((logit - max).exp())).sum();
    let log_sum = max + sum.ln() as f32;
    let mut best: Vec<(u32, f32)> = Vec::new();
    if top > 0 {
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        best = row.iter().enumerate().map(|(id, logit)| (id as u32, *logit)).collect();
        if top < best.len() {
            best.select_nth_unstable_by(top - 1, order);
            best.truncate(top);
        }
        best.sort_unstable_by(order);
        for (_, logit) in &mut best {
            *logit -= log_sum;
        }
    }
    TokenLogprobs { chosen: row[chosen as usize] - log_sum, top: best }
}

/// Uniform in [0, 1) with 53 bits.
fn uniform(draw: Draw) -> f64 {
    let counter = [draw.position as u32, (draw.position >> 32) as u32, draw.choice, 0];
    let [a, b, ..] = philox(counter, [draw.seed as u32, (draw.seed >> 32) as u32]);
    let bits = u64::from(a) << 32 | u64::from(b);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// Philox4x32-10.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let low = u64::from(counter[0]) * 0xD251_1F53;
        let high = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (high >> 32) as u32 ^ counter[1] ^ key[0],
            high as u32,
            (low >> 32) as u32 ^ counter[3] ^ key[1],
            low as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(row: &[f32], sampling: &Sampling, history: &History, forbidden: &[u32], position: u64) -> u32 {
        let draw = Draw { seed: sampling.seed, choice: 0, position };
        sample(row, sampling, history, forbidden, draw, &mut Scratch::default()).expect("finite").0
    }

    fn greedy() -> Sampling {
        Sampling { temperature: 0.0, ..Sampling::default() }
    }

    #[test]
    fn philox_equals_the_published_vectors() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
    }

    #[test]
    fn greedy_takes_the_highest_and_the_lower_id_on_a_tie() {
        let none = History::default();
        assert_eq!(run(&[0.0, 3.0, 3.0, 1.0], &greedy(), &none, &[], 0), 1);
        assert_eq!(run(&[0.0, 3.0, 3.0, 1.0], &greedy(), &none, &[1], 0), 2);
        assert_eq!(run(&[f32::NAN, 3.0, f32::INFINITY], &greedy(), &none, &[], 0), 1);
        for temperature in [1e-40, 1e-6, f32::MIN_POSITIVE] {
            let cold = Sampling { temperature, ..Sampling::default() };
            assert_eq!(run(&[0.0, 3.0, 2.9], &cold, &none, &[], 0), 1, "{temperature}");
        }
        let cold = Sampling { temperature: 1e-5, ..Sampling::default() };
        assert_eq!(run(&[-1e30, 3.0, 2.9], &cold, &none, &[], 0), 1);
        let broken = [f32::NAN; 3];
        let draw = Draw { seed: 0, choice: 0, position: 0 };
        assert_eq!(sample(&broken, &greedy(), &none, &[], draw, &mut Scratch::default()), Err(NotFinite));
    }

    #[test]
    fn penalties_and_bias_move_the_choice() {
        let mut history = History::new(&[2], &Sampling { repetition_penalty: 2.0, ..greedy() });
        history.push(1);
        history.push(1);
        let row = [1.0, 2.0, 2.5, 1.9];
        assert_eq!(run(&row, &greedy(), &history, &[], 0), 2);
        assert_eq!(run(&row, &Sampling { repetition_penalty: 2.0, ..greedy() }, &history, &[], 0), 3);
        assert_eq!(
            run(&row, &Sampling { logit_bias: vec![(0, 5.0), (99, 1.0)], ..greedy() }, &history, &[], 0),
            0
        );
        let row = [1.0, 2.0, 0.0, 1.9];
        assert_eq!(run(&row, &Sampling { presence_penalty: 0.05, ..greedy() }, &history, &[], 0), 1);
        assert_eq!(run(&row, &Sampling { frequency_penalty: 0.06, ..greedy() }, &history, &[], 0), 3);
    }

    #[test]
    fn filters_keep_what_they_promise() {
        let row: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        let mut kept = Vec::new();
        let mut check = |sampling: Sampling, expected: &[u32]| {
            filter(&row, row[0], &sampling, &mut kept);
            assert_eq!(kept.iter().map(|(t, _)| *t).collect::<Vec<_>>(), expected, "{sampling:?}");
        };
        check(Sampling::default(), &[0, 1, 2, 3]);
        check(Sampling { top_k: 2, ..Sampling::default() }, &[0, 1]);
        check(Sampling { top_p: 0.79, ..Sampling::default() }, &[0, 1]);
        check(Sampling { top_p: 0.81, ..Sampling::default() }, &[0, 1, 2]);
        check(Sampling { min_p: 0.2, ..Sampling::default() }, &[0, 1, 2]);
        check(Sampling { min_p: 1.0, ..Sampling::default() }, &[0]);
        check(Sampling { top_p: 0.0, ..Sampling::default() }, &[0]);
    }

    #[test]
    fn draws_follow_the_distribution_and_repeat_with_the_seed() {
        let row: Vec<f32> = [0.5f32, 0.3, 0.2].iter().map(|p| p.ln()).collect();
        let sampling = Sampling { seed: 7, ..Sampling::default() };
        let mut counts = [0u32; 3];
        for position in 0..20_000 {
            let token = run(&row, &sampling, &History::default(), &[], position);
            assert_eq!(token, run(&row, &sampling, &History::default(), &[], position));
            counts[token as usize] += 1;
        }
        for (count, p) in counts.iter().zip([0.5, 0.3, 0.2]) {
            assert!((f64::from(*count) / 20_000.0 - p).abs() < 0.015, "{counts:?}");
        }
    }

    #[test]
    fn logprobs_are_of_the_plain_distribution_most_likely_first() {
        let row: Vec<f32> = [0.1f32, 0.6, 0.3].iter().map(|p| p.ln() + 4.0).collect();
        let got = logprobs(&row, 2, 2);
        assert!((got.chosen - 0.3f32.ln()).abs() < 1e-5);
        assert_eq!(got.top.iter().map(|(t, _)| *t).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(logprobs(&row, 2, 0).top, []);
    }
}
