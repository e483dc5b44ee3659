//! Sampling as its definition says it: copies the row, weighs every token, sorts. What is slow and obvious.

use super::*;

/// As [`super::sample`], with weights from `exp`; `None` for `NotFinite`.
pub(super) fn sample(
    logits: &[f32],
    sampling: &Sampling,
    history: &History,
    forbidden: &[u32],
    bits: u64,
    exp: fn(f32) -> f32,
) -> Option<u32> {
    let mut row = logits.to_vec();
    adjust(&mut row, sampling, history, forbidden);
    let finite = row.iter().enumerate().filter(|(_, logit)| logit.is_finite());
    let (best, max) = finite.fold(None, |best: Option<(usize, f32)>, (id, logit)| match best {
        Some((_, max)) if *logit <= max => best,
        _ => Some((id, *logit)),
    })?;
    if sampling.temperature < TEMPERATURE_MIN || sampling.top_k == 1 {
        return Some(best as u32);
    }
    Some(pick(&filter(&row, max, sampling, exp), bits).unwrap_or(best as u32))
}

fn adjust(row: &mut [f32], sampling: &Sampling, history: &History, forbidden: &[u32]) {
    for (token, bias) in &sampling.logit_bias {
        if let Some(logit) = row.get_mut(*token as usize) {
            *logit += bias;
        }
    }
    let mut seen: Vec<u32> = history.generated.iter().map(|(token, _)| *token).collect();
    seen.extend(&history.prompt);
    seen.sort_unstable();
    seen.dedup();
    for token in seen {
        let logit = &mut row[token as usize];
        let penalty = sampling.repetition_penalty;
        *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
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

/// The candidates as (token, weight), in token order.
pub(super) fn filter(row: &[f32], max: f32, sampling: &Sampling, exp: fn(f32) -> f32) -> Vec<(u32, f32)> {
    let scale = 1.0 / sampling.temperature;
    let floor = if sampling.min_p > 0.0 { sampling.min_p.ln().max(EXPONENT_MIN) } else { EXPONENT_MIN };
    let exponents = row.iter().enumerate().map(|(id, logit)| (id as u32, (logit - max) * scale));
    let within = exponents.filter(|(_, exponent)| *exponent >= floor && *exponent <= 0.0);
    let mut kept: Vec<(u32, f32)> = within.map(|(id, exponent)| (id, exp(exponent))).collect();
    kept.sort_by(by_weight);
    if sampling.top_k > 0 {
        kept.truncate(sampling.top_k as usize);
    }
    if sampling.top_p < 1.0 {
        let target = share(sampling.top_p, mass(&kept));
        let mut sum = 0;
        let enough = kept.iter().position(|(_, weight)| {
            sum += units(*weight);
            sum >= target
        });
        kept.truncate(enough.map_or(kept.len(), |at| at + 1));
    }
    kept.sort_by_key(|(token, _)| *token);
    kept
}

pub(super) fn logprobs(row: &[f32], chosen: u32, top: usize) -> (f64, Vec<u32>) {
    let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
    let mut order: Vec<u32> = (0..row.len() as u32).collect();
    order.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b)));
    order.truncate(top);
    (f64::from(row[chosen as usize]) - sum.ln(), order)
}
