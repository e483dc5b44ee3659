//! What two models say about the same next token: negative log-likelihood, Kullback-Leibler divergence,
//! the most likely token. Pure functions over rows of logits; sums are in f64.
//!
//! Perplexity, its standard error and which positions count follow llama.cpp's `llama-perplexity`, so
//! that figures can be put beside each other.

use std::thread;

use crate::measure::statistics::{mean_and_error, percentile};

/// A row of logits, reduced to what is kept of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Row {
    /// Logarithm of the sum of the logits' exponentials.
    pub(super) log_z: f64,
    /// Of the text's next token, negative.
    pub(super) nll: f64,
    /// The most likely token; ties to the lower id.
    pub(super) top: usize,
}

/// `None` when a logit is not a number.
pub(super) fn row(logits: &[f32], target: u32) -> Option<Row> {
    let (mut top, mut max) = (0, f32::NEG_INFINITY);
    for (id, &logit) in logits.iter().enumerate() {
        if !logit.is_finite() {
            return None;
        }
        if logit > max {
            (top, max) = (id, logit);
        }
    }
    let max = f64::from(max);
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
    let log_z = max + sum.ln();
    Some(Row { log_z, nll: log_z - f64::from(logits[target as usize]), top })
}

/// Divergence of `own` from `reference` in nats: how much longer the reference's tokens are to write
/// with the other's probabilities. Exactly 0 for equal rows.
pub(super) fn divergence(reference: (&[f32], f64), own: (&[f32], f64)) -> f64 {
    let sum: f64 = reference.0.iter().zip(own.0).fold(0.0, |sum, (&reference_logit, &own_logit)| {
        let reference_logit = f64::from(reference_logit);
        sum + (reference_logit - reference.1).exp() * (reference_logit - f64::from(own_logit))
    });
    // Probabilities sum to 1 within rounding, and no divergence is negative.
    (sum - (reference.1 - own.1)).max(0.0)
}

/// One position of the text under a variant and under the reference.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Pair {
    pub(super) nll: f64,
    pub(super) reference_nll: f64,
    pub(super) divergence: f64,
    pub(super) same_top: bool,
}

/// How well one model predicts the text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Perplexity {
    pub value: f64,
    /// Standard error.
    pub error: f64,
}

/// How far a variant is from the reference.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Distance {
    /// Perplexity over the reference's, less one, and its standard error from paired differences.
    pub loss: f64,
    pub loss_error: f64,
    /// Divergence in nats.
    pub kl_mean: f64,
    pub kl_error: f64,
    pub kl_median: f64,
    pub kl_99: f64,
    pub kl_max: f64,
    /// Share of positions at which the most likely token is the same.
    pub same_top: f64,
    /// Mean absolute change of the probability of the text's token.
    pub probability_shift: f64,
}

pub(super) fn perplexity(nlls: &[f64]) -> Perplexity {
    let (mean, error) = mean_and_error(nlls);
    Perplexity { value: mean.exp(), error: error * mean.exp() }
}

pub(super) fn distance(pairs: &[Pair]) -> Distance {
    let of = |figure: fn(&Pair) -> f64| pairs.iter().map(figure).collect::<Vec<f64>>();
    let (change, change_error) = mean_and_error(&of(|pair| pair.nll - pair.reference_nll));
    let mut divergences = of(|pair| pair.divergence);
    let (kl_mean, kl_error) = mean_and_error(&divergences);
    divergences.sort_by(f64::total_cmp);
    Distance {
        loss: change.exp_m1(),
        loss_error: change_error * change.exp(),
        kl_mean,
        kl_error,
        kl_median: percentile(&divergences, 0.5),
        kl_99: percentile(&divergences, 0.99),
        kl_max: percentile(&divergences, 1.0),
        same_top: mean_and_error(&of(|pair| f64::from(u8::from(pair.same_top)))).0,
        probability_shift: mean_and_error(&of(|pair| {
            ((-pair.nll).exp() - (-pair.reference_nll).exp()).abs()
        }))
        .0,
    }
}

/// `f` of 0 to `count`, on several threads.
pub(super) fn in_parallel<T: Send>(count: usize, threads: usize, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let share = count.div_ceil(threads.max(1)).max(1);
    let f = &f;
    thread::scope(|scope| {
        let parts: Vec<_> = (0..count)
            .step_by(share)
            .map(|start| {
                let part = start..count.min(start + share);
                scope.spawn(move || part.map(f).collect::<Vec<T>>())
            })
            .collect();
        let joined = parts.into_iter().map(|part| part.join());
        joined.flat_map(|part| part.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(seed: u32, vocab: u32) -> Vec<f32> {
        (0..vocab).map(|id| ((id * 37 + seed * 101 + id * id * seed) % 61) as f32 / 5.0 - 6.0).collect()
    }

    /// Probabilities the direct way.
    fn softmax(logits: &[f32]) -> Vec<f64> {
        let powers: Vec<f64> = logits.iter().map(|&logit| f64::from(logit).exp()).collect();
        let sum: f64 = powers.iter().sum();
        powers.iter().map(|power| power / sum).collect()
    }

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() <= 1e-12 * (1.0 + b.abs()), "{a} is not {b}");
    }

    #[test]
    fn rows_and_divergences_are_what_the_definition_says() {
        for seed in 1..40 {
            let (reference, own) = (logits(seed, 17), logits(seed + 3, 17));
            let (p, q) = (softmax(&reference), softmax(&own));
            let target = seed % 17;
            let (r, o) = (row(&reference, target).unwrap(), row(&own, target).unwrap());
            close(r.nll, -p[target as usize].ln());
            close(o.nll, -q[target as usize].ln());
            let best = p.iter().copied().fold(0.0, f64::max);
            assert_eq!(r.top, p.iter().position(|&x| x >= best - 1e-15).unwrap());
            let kl: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
            close(divergence((&reference, r.log_z), (&own, o.log_z)), kl);
            let zero = divergence((&own, o.log_z), (&own, o.log_z));
            assert!(zero.to_bits() == 0, "equal rows diverge by {zero}");
        }
    }

    #[test]
    fn large_logits_do_not_overflow_and_bad_ones_are_told() {
        let scored = row(&[1e4, 0.0, -1e4], 1).unwrap();
        close(scored.nll, 1e4);
        assert_eq!(scored.top, 0);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(row(&[0.0, bad], 0), None);
        }
    }

    #[test]
    fn perplexity_and_its_error_follow_the_convention() {
        let nlls = [1.0, 2.0, 4.0, 1.5];
        let (sum, squares) = nlls.iter().fold((0.0, 0.0), |(s, q), x| (s + x, q + x * x));
        let mean = sum / 4.0;
        let found = perplexity(&nlls);
        close(found.value, mean.exp());
        close(found.error, mean.exp() * ((squares / 4.0 - mean * mean) / 3.0_f64).sqrt());
        // A model that knows nothing is as perplexed as its vocabulary is large.
        let uniform = row(&[0.5; 11], 3).unwrap();
        close(perplexity(&[uniform.nll; 5]).value, 11.0);
    }

    #[test]
    fn the_distance_is_of_pairs() {
        let pair =
            |nll, reference_nll, divergence, same_top| Pair { nll, reference_nll, divergence, same_top };
        let found = distance(&[pair(2.0, 1.0, 0.5, true), pair(1.0, 1.0, 0.1, false)]);
        close(found.loss, 0.5_f64.exp() - 1.0);
        close(found.kl_mean, 0.3);
        close(found.kl_median, 0.3);
        close(found.kl_max, 0.5);
        close(found.kl_99, 0.1 + 0.4 * 0.99);
        close(found.same_top, 0.5);
        close(found.probability_shift, ((-1.0_f64).exp() - (-2.0_f64).exp()) / 2.0);
        let alone = distance(&[pair(1.0, 1.0, 0.0, true)]);
        assert!(alone.loss_error.abs() < 1e-300 && alone.kl_max.abs() < 1e-300);
    }

    #[test]
    fn work_in_parallel_keeps_its_order() {
        for (count, threads) in [(0, 3), (1, 3), (7, 3), (64, 2), (3, 16)] {
            let doubled = in_parallel(count, threads, |index| index * 2);
            assert_eq!(doubled, (0..count).map(|index| index * 2).collect::<Vec<_>>());
        }
    }
}
