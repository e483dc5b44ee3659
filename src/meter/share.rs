//! Splits one step's device time over the sequences that shared it.
//! Does not know: prices, accounts, why the scheduler chose these sequences.
//!
//! The cost game is `v(S) = F0 [S not empty] + sum a_i`; its Shapley value shares the fixed part
//! (streaming the weights, launches) equally and leaves the rest to whoever caused it. The weight
//! `w_i = b0 + k * a_i`, k sequences in the step, is in that proportion without a division.
//!
//! Invariant: the shares sum to the step, to the nanosecond.

use serde::{Deserialize, Serialize};

use crate::units::DeviceNanos;

/// Calibrated cost of a step in picoseconds: a fixed part, and parts per new token, per pair of
/// new token and attended position, and per row of logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Coefficients {
    pub step: u64,
    pub token: u64,
    pub attention: u64,
    pub logits: u64,
}

/// Steps differ in what limits them, so each class has coefficients of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepClass {
    /// Every sequence computes one token.
    Decode,
    /// Some decode, some prefill.
    Mixed,
    /// Every sequence computes prompt tokens.
    Prefill,
}

impl StepClass {
    /// The class of a step from how many of its sequences decode and how many prefill.
    #[must_use]
    pub fn of(decoding: usize, prefilling: usize) -> Self {
        match (decoding, prefilling) {
            (_, 0) => Self::Decode,
            (0, _) => Self::Prefill,
            _ => Self::Mixed,
        }
    }
}

/// What one sequence computes in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Work {
    /// New tokens.
    pub tokens: u64,
    /// Positions before them.
    pub context: u64,
    /// Rows of logits.
    pub logits: u64,
}

impl Work {
    /// Pairs of new token and attended position, the token itself included.
    #[must_use]
    pub fn pairs(self) -> u64 {
        self.tokens * self.context + self.tokens * (self.tokens + 1) / 2
    }
}

impl Coefficients {
    /// The sequence's own part, `a_i`, in picoseconds.
    #[must_use]
    pub fn own(&self, work: Work) -> u128 {
        u128::from(self.token) * u128::from(work.tokens)
            + u128::from(self.attention) * u128::from(work.pairs())
            + u128::from(self.logits) * u128::from(work.logits)
    }

    /// The weight of a sequence in a step of `sequences`; at least 1.
    #[must_use]
    pub fn weight(&self, work: Work, sequences: usize) -> u128 {
        (u128::from(self.step) + sequences as u128 * self.own(work)).max(1)
    }

    /// Estimated time of a step with this sequence alone.
    #[must_use]
    pub fn alone(&self, work: Work) -> DeviceNanos {
        let picos = u128::from(self.step) + self.own(work);
        DeviceNanos(u64::try_from(picos / 1000).unwrap_or(u64::MAX))
    }
}

/// Splits `time` in proportion to `weights` by prefix rounding:
/// `x_i = floor(T*S_i/W) - floor(T*S_(i-1)/W)`. Each share is within 1 ns of exact, equal weights
/// differ by at most 1 ns, and the sum is `time`. All zero weights: everything to the first.
pub fn split(time: DeviceNanos, weights: &[u128], shares: &mut Vec<DeviceNanos>) {
    shares.clear();
    split_into(time, weights, |share| shares.push(share));
    if shares.iter().all(|share| *share == DeviceNanos::ZERO)
        && let Some(first) = shares.first_mut()
    {
        *first = time;
    }
    assert_eq!(shares.iter().copied().sum::<DeviceNanos>(), time, "a step is charged once");
}

fn split_into(time: DeviceNanos, weights: &[u128], mut give: impl FnMut(DeviceNanos)) {
    // Scaled down together if need be so that time * total fits: 2^64 * 2^63 < 2^128.
    let total: u128 = weights.iter().sum();
    let shift = (128 - total.leading_zeros()).saturating_sub(63);
    let total: u128 = weights.iter().map(|w| w >> shift).sum::<u128>().max(1);
    let mut sum = 0u128;
    let mut given = 0u64;
    for weight in weights {
        sum += weight >> shift;
        let upto = u64::try_from(u128::from(time.0) * sum / total).expect("a share is at most the step");
        give(DeviceNanos(upto - given));
        given = upto;
    }
}

/// A share split once more between the tokens that are new and those computed a second time after
/// a preemption. Returns (new, recomputed).
#[must_use]
pub fn split_recompute(share: DeviceNanos, new: u128, again: u128) -> (DeviceNanos, DeviceNanos) {
    if again == 0 {
        return (share, DeviceNanos::ZERO);
    }
    let mut parts = [DeviceNanos::ZERO; 2];
    let mut given = parts.iter_mut();
    split_into(share, &[new, again], |part| *given.next().expect("a part a weight") = part);
    assert_eq!(parts[0] + parts[1], share, "a share is charged once");
    (parts[0], parts[1])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(time: u64, weights: &[u128], expected: &[u64]) {
        let mut shares = Vec::new();
        split(DeviceNanos(time), weights, &mut shares);
        assert_eq!(shares.iter().map(|s| s.0).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn shares_are_proportional_and_sum_to_the_step() {
        check(10, &[1, 1], &[5, 5]);
        check(10, &[1, 1, 1], &[3, 3, 4]);
        check(100, &[3, 1], &[75, 25]);
        check(0, &[3, 1], &[0, 0]);
        check(7, &[u128::from(u64::MAX) << 40, u128::from(u64::MAX) << 40], &[3, 4]);
        check(u64::MAX, &[1, 1], &[u64::MAX / 2, u64::MAX / 2 + 1]);
    }

    #[test]
    fn equals_differ_by_at_most_one_and_each_is_within_one_of_exact() {
        let mut state = 1u64;
        let mut random = move |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % n
        };
        for _ in 0..2000 {
            let weights: Vec<u128> =
                (0..1 + random(40)).map(|_| u128::from(1 + random(5)) << random(60)).collect();
            let time = random(1_000_000_000);
            let mut shares = Vec::new();
            split(DeviceNanos(time), &weights, &mut shares);
            let total: u128 = weights.iter().sum();
            for (share, weight) in shares.iter().zip(&weights) {
                let exact = time as f64 * (*weight as f64 / total as f64);
                assert!((share.0 as f64 - exact).abs() <= 1.001, "{share:?} is not within 1 of {exact}");
            }
            for (a, wa) in shares.iter().zip(&weights) {
                for (b, wb) in shares.iter().zip(&weights) {
                    assert!(wa != wb || a.0.abs_diff(b.0) <= 1, "equals differ by more than 1 ns");
                }
            }
        }
    }

    #[test]
    fn the_weight_is_the_shapley_value_of_the_cost_game() {
        // Two sequences, F0 = 10, a = (2, 6): Shapley gives 5 + 2 and 5 + 6.
        let c = Coefficients { step: 10, token: 2, attention: 0, logits: 0 };
        let weights = [1, 3].map(|tokens| c.weight(Work { tokens, context: 0, logits: 0 }, 2));
        check(18, &weights, &[7, 11]);
    }

    #[test]
    fn more_work_never_weighs_less_and_nobody_pays_more_than_alone() {
        let c = Coefficients { step: 5_000_000, token: 90_000, attention: 40, logits: 1_000 };
        let mut last = 0;
        for tokens in 1..200 {
            let work = Work { tokens, context: 7, logits: 1 };
            assert!(c.weight(work, 3) > last);
            last = c.weight(work, 3);
        }
        let works = [1, 64, 512].map(|tokens| Work { tokens, context: 100, logits: 1 });
        let picos = u128::from(c.step) + works.iter().map(|w| c.own(*w)).sum::<u128>();
        let time = DeviceNanos(u64::try_from(picos / 1000).unwrap());
        let mut shares = Vec::new();
        split(time, &works.map(|w| c.weight(w, 3)), &mut shares);
        for (share, work) in shares.iter().zip(works) {
            assert!(share.0 <= c.alone(work).0 + 1);
        }
    }

    #[test]
    fn recomputed_tokens_are_parted_from_new_ones() {
        assert_eq!(split_recompute(DeviceNanos(10), 1, 0), (DeviceNanos(10), DeviceNanos(0)));
        assert_eq!(split_recompute(DeviceNanos(10), 0, 5), (DeviceNanos(0), DeviceNanos(10)));
        assert_eq!(split_recompute(DeviceNanos(10), 1, 4), (DeviceNanos(2), DeviceNanos(8)));
    }
}
