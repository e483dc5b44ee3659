//! Sampling as its definition says it: copies the row, weighs every token, sorts. What is slow and obvious, and
//! equal to the device bit for bit.

use obol_kernels::RowDraw;

/// All lists of a case.
#[derive(Debug, Clone, Default)]
pub(crate) struct Lists {
    pub(crate) biases: Vec<(u32, f32)>,
    pub(crate) forbidden: Vec<u32>,
    pub(crate) allowed: Vec<u32>,
    pub(crate) seen: Vec<(u32, u32)>,
    /// The tokens of the step's rows.
    pub(crate) tokens: Vec<u32>,
}

/// The drawn token, where this row of the step's tokens is fed; None where no logit is finite.
pub(crate) fn sample(logits: &[f32], (draw, fed): &(RowDraw, Option<usize>), lists: &Lists) -> Option<u32> {
    let mut row = logits.to_vec();
    adjust(&mut row, draw, *fed, lists);
    let finite = row.iter().enumerate().filter(|(_, logit)| logit.is_finite());
    let (best, max) = finite.fold(None, |best: Option<(usize, f32)>, (token, logit)| match best {
        Some((_, max)) if *logit <= max => best,
        _ => Some((token, *logit)),
    })?;
    if draw.temperature < 1e-5 || draw.top_k == 1 {
        return Some(best as u32);
    }
    let kept = filter(&row, max, draw);
    let total: u128 = kept.iter().map(|(_, weight)| u128::from(units(*weight))).sum();
    let target = (total * u128::from(random_bits(draw))) >> 53;
    let mut sum = 0;
    let found = kept.iter().find(|(_, weight)| {
        sum += u128::from(units(*weight));
        target < sum
    });
    Some(found.map_or(best as u32, |(token, _)| *token))
}

fn adjust(row: &mut [f32], draw: &RowDraw, fed: Option<usize>, lists: &Lists) {
    for (token, bias) in &lists.biases[draw.biases.clone()] {
        if let Some(logit) = row.get_mut(*token as usize) {
            *logit += bias;
        }
    }
    let mut seen = lists.seen[draw.seen.clone()].to_vec();
    let penalised =
        draw.repetition_penalty != 1.0 || draw.presence_penalty != 0.0 || draw.frequency_penalty != 0.0;
    if let Some(token) = fed.filter(|_| penalised).map(|row| lists.tokens[row]) {
        match seen.iter_mut().find(|(seen, _)| *seen == token) {
            Some((_, times)) => *times += 1,
            None => seen.push((token, 1)),
        }
    }
    for (token, times) in seen {
        let Some(logit) = row.get_mut(token as usize) else { continue };
        if draw.repetition_penalty != 1.0 {
            let penalty = draw.repetition_penalty;
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
        if times > 0 {
            *logit -= draw.presence_penalty + draw.frequency_penalty * times as f32;
        }
    }
    for token in &lists.forbidden[draw.forbidden.clone()] {
        if let Some(logit) = row.get_mut(*token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
    let allowed = &lists.allowed[draw.allowed.clone()];
    let is_allowed = |token: usize| allowed.get(token / 32).is_some_and(|word| word >> (token % 32) & 1 == 1);
    if !allowed.is_empty() {
        let barred = row.iter_mut().enumerate().filter(|(token, _)| !is_allowed(*token));
        barred.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
    }
}

/// The candidates as (token, weight), in token order.
fn filter(row: &[f32], max: f32, draw: &RowDraw) -> Vec<(u32, f32)> {
    let scale = 1.0 / draw.temperature;
    let floor = if draw.min_p > 0.0 { draw.min_p.ln().max(-30.0) } else { -30.0 };
    let exponents = row.iter().enumerate().map(|(token, logit)| (token as u32, (logit - max) * scale));
    let within = exponents.filter(|(_, exponent)| *exponent >= floor && *exponent <= 0.0);
    let mut kept: Vec<(u32, f32)> = within.map(|(token, exponent)| (token, exp(exponent))).collect();
    kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    if draw.top_k > 0 {
        kept.truncate(draw.top_k as usize);
    }
    if draw.top_p < 1.0 {
        let total: u64 = kept.iter().map(|(_, weight)| units(*weight)).sum();
        let target = (f64::from(draw.top_p) * total as f64) as u64;
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

/// A weight in units of 2^-44.
fn units(weight: f32) -> u64 {
    (f64::from(weight) * f64::from(1 << 22) * f64::from(1 << 22)).round_ties_even() as u64
}

/// e^x without fused operations: Cody-Waite reduction and the polynomial of Moshier's Cephes `expf`.
fn exp(x: f32) -> f32 {
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = x - n * 0.693_359_4;
    let r = r + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    (p * (r * r) + (r + 1.0)) * 2f32.powi(n as i32)
}

/// 53 random bits: Philox4x32-10.
fn random_bits(draw: &RowDraw) -> u64 {
    let mut counter = [draw.position as u32, (draw.position >> 32) as u32, draw.choice, 0];
    let mut key = [draw.seed as u32, (draw.seed >> 32) as u32];
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
    (u64::from(counter[0]) << 32 | u64::from(counter[1])) >> 11
}

/// The log-probability of each token, and the tokens that may be among the most likely, best first.
pub(crate) fn logprobs(row: &[f32]) -> (Vec<f64>, Vec<u32>) {
    let weighs = |logit: &f32| logit.is_finite();
    let max = row.iter().copied().filter(weighs).fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().filter(|logit| weighs(logit)).map(|logit| f64::from(logit - max).exp()).sum();
    let of = |logit: &f32| f64::from(*logit) - f64::from(max) - sum.ln();
    let mut order: Vec<u32> =
        (0..row.len() as u32).filter(|token| row[*token as usize] < f32::INFINITY).collect();
    order.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b)));
    (row.iter().map(of).collect(), order)
}
