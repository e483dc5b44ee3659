//! How many proposed tokens are worth a row of the step: those that make its expected tokens by its expected
//! time higher. Knows costs and chances; no token, sequence or block.
//!
//! A wrong estimate cannot cost much: verifying is paid from a purse, in parts of a step, that each step adds
//! little to, and each accepted token what it spared.

use super::draft::{Estimate, Verified};

/// Parts of a step that a step may lose by speculation in the long run.
const ALLOWANCE: f64 = 1.0 / 128.0;
/// What the purse has at first, and at most.
const PURSE_FIRST: f64 = 2.0;
const PURSE_MAX: f64 = 8.0;
/// A chance that no proposal is trusted to exceed.
const CHANCE_MAX: f64 = 0.97;
/// A step where a token must hold more often than this to pay has nothing to win; and where more often than
/// the second, it is not worth finding out.
const WORTH: f64 = 0.9;
const WORTH_TRYING: f64 = 0.75;
/// As [`Estimate::learn`] has it: what all sequences together have seen fades slowly.
const DECAY: f64 = 0.98;

/// What a step's decodes do without speculation: one token each.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plain {
    pub(super) tokens: usize,
    /// Any unit of time, the same as the candidates'.
    pub(super) cost: f64,
}

/// A sequence with a proposal.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate {
    /// The sequence's place in `running`.
    pub(super) index: usize,
    pub(super) proposed: usize,
    /// That one more token holds.
    pub(super) chance: f64,
    /// Time of one more row.
    pub(super) cost: f64,
    /// How many of the proposed tokens are worth it.
    pub(super) take: usize,
}

pub(super) struct Speculator {
    pub(super) prior: [Estimate; 2],
    purse: f64,
    /// Of the step under way.
    plain: Plain,
}

impl Speculator {
    pub(super) fn new() -> Self {
        Self {
            prior: [Estimate::new(0.5, 2.0); 2],
            purse: PURSE_FIRST,
            plain: Plain { tokens: 0, cost: 0.0 },
        }
    }

    /// A step begins. `false`: hardly a proposal would pay at `draft` a row.
    pub(super) fn begin(&mut self, plain: Plain, draft: f64) -> bool {
        self.plain = plain;
        self.purse = (self.purse + ALLOWANCE).min(PURSE_MAX);
        plain.tokens > 0 && plain.cost > 0.0 && self.must_hold(draft) < WORTH
    }

    /// How often a token must hold to pay for its row.
    fn must_hold(&self, cost: f64) -> f64 {
        self.plain.tokens as f64 * cost / self.plain.cost
    }

    /// Whether it is worth a row of `cost` to see if proposals hold that seem not to.
    pub(super) fn worth_trying(&self, cost: f64) -> bool {
        self.must_hold(cost) < WORTH_TRYING
    }

    /// Sets what each candidate takes so that expected tokens by expected time are highest: a token is taken
    /// while its chance by its cost is above that ratio, which rises with each better choice (Dinkelbach's
    /// method for ratios, 1967).
    pub(super) fn choose(&self, candidates: &mut [Candidate]) {
        let mut ratio = self.plain.tokens as f64 / self.plain.cost;
        loop {
            let (mut tokens, mut cost) = (self.plain.tokens as f64, self.plain.cost);
            for candidate in &mut *candidates {
                let chance = candidate.chance.min(CHANCE_MAX);
                let (mut holds, mut take) = (chance, 0);
                while take < candidate.proposed && holds > ratio * candidate.cost {
                    tokens += holds;
                    holds *= chance;
                    take += 1;
                }
                candidate.take = take;
                cost += take as f64 * candidate.cost;
            }
            let better = tokens / cost;
            if better <= ratio * 1.001 {
                return;
            }
            ratio = better;
        }
    }

    /// How many of `rows` rows of `cost` each the purse pays for; it pays at once.
    pub(super) fn pay(&mut self, rows: usize, cost: f64) -> usize {
        let row = cost / self.plain.cost;
        let paid = rows.min((self.purse / row) as usize);
        self.purse -= paid as f64 * row;
        paid
    }

    /// A verification of the step under way.
    pub(super) fn learn(&mut self, verified: Verified) {
        self.prior[verified.found].learn(DECAY, verified);
        // A step without it would have given each of its sequences one token.
        let spared = verified.accepted as f64 / self.plain.tokens as f64;
        self.purse = (self.purse + spared).min(PURSE_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One sequence costs 3 to stream the weights and 1 for its own row; so does each more.
    fn takes(sequences: usize, chances: &[f64]) -> Vec<usize> {
        let mut speculator = Speculator::new();
        let plain = Plain { tokens: sequences, cost: 3.0 + sequences as f64 };
        if !speculator.begin(plain, 1.0) {
            return vec![0; chances.len()];
        }
        let candidate =
            |(index, &chance): (usize, &f64)| Candidate { index, proposed: 15, chance, cost: 1.0, take: 9 };
        let mut candidates: Vec<Candidate> = chances.iter().enumerate().map(candidate).collect();
        speculator.choose(&mut candidates);
        candidates.iter().map(|candidate| candidate.take).collect()
    }

    /// Expected tokens by expected time.
    fn ratio(sequences: usize, chances: &[f64], takes: &[usize]) -> f64 {
        let gain: f64 =
            chances.iter().zip(takes).map(|(p, k)| (1..=*k as i32).map(|j| p.powi(j)).sum::<f64>()).sum();
        (sequences as f64 + gain) / (3.0 + sequences as f64 + takes.iter().sum::<usize>() as f64)
    }

    #[test]
    fn tokens_are_taken_while_they_pay() {
        assert_eq!(takes(1, &[0.2]), [0], "a row costs a quarter of the step");
        assert_eq!(takes(1, &[0.5]), [1]);
        assert!(takes(1, &[0.9])[0] > 4);
        assert_eq!(takes(8, &[0.7, 0.95])[0], 0, "with others a step's weights are shared already");
        assert!(takes(8, &[0.7, 0.95])[1] > 1);
        assert_eq!(takes(40, &[1.0]), [0], "nothing pays");
        for (sequences, worth) in [(1, true), (8, true), (16, false)] {
            let mut speculator = Speculator::new();
            let cost = 3.0 + f64::from(sequences);
            assert!(speculator.begin(Plain { tokens: sequences as usize, cost }, 1.0));
            assert_eq!(speculator.worth_trying(1.0), worth, "{sequences} sequences");
        }
    }

    #[test]
    fn no_other_number_is_better() {
        for (sequences, chance) in [(1, 0.3), (1, 0.8), (1, 0.97), (2, 0.6), (4, 0.9), (16, 0.95)] {
            let taken = takes(sequences, &[chance]);
            let best = ratio(sequences, &[chance], &taken);
            for other in 0..=15 {
                let theirs = ratio(sequences, &[chance], &[other]);
                assert!(theirs <= best * 1.002, "{sequences} at {chance}: {other} rather than {taken:?}");
            }
        }
    }

    #[test]
    fn what_never_holds_costs_no_more_than_the_allowance() {
        let mut speculator = Speculator::new();
        let mut spent = 0.0;
        let steps = 10_000;
        for _ in 0..steps {
            assert!(speculator.begin(Plain { tokens: 1, cost: 4.0 }, 1.0));
            let rows = speculator.pay(3, 1.0);
            spent += rows as f64 / 4.0;
            speculator.learn(Verified { found: 0, proposed: rows, accepted: 0 });
        }
        let most = PURSE_FIRST + f64::from(steps) * ALLOWANCE;
        assert!(spent <= most && spent > most - 1.0, "{spent} steps' time of {steps}, at most {most}");
        // What holds is not held back.
        for _ in 0..100 {
            speculator.begin(Plain { tokens: 1, cost: 4.0 }, 1.0);
            let accepted = speculator.pay(3, 1.0);
            speculator.learn(Verified { found: 0, proposed: accepted, accepted });
        }
        assert_eq!(speculator.pay(15, 1.0), 15);
    }
}
