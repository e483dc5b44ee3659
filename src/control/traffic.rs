//! Traffic that a seed decides, for tests of forecasts and anomalies: arrivals in bursts, costs with a heavy tail,
//! busy days and quiet nights, and spells in which something is wrong.

use crate::units::Picos;

/// What is wrong in a spell.
#[derive(Debug, Clone, Copy)]
pub(super) enum What {
    /// So many times the requests.
    Requests(f64),
    /// So many times the cost of each.
    Costs(f64),
    /// So many further requests a second, all alike.
    Loop(f64),
}

/// Seconds from the beginning of the traffic.
#[derive(Debug, Clone, Copy)]
pub(super) struct Spell {
    pub(super) begin: f64,
    pub(super) end: f64,
    pub(super) what: What,
}

/// A Poisson process whose rate follows the day and wanders around that.
#[derive(Debug)]
pub(super) struct Traffic {
    state: u64,
    /// Requests a second, the day's mean.
    rate: f64,
    /// How far the rate has wandered: its logarithm, an autoregressive process.
    wander: f64,
}

/// The standard deviation of the rate's logarithm, and the seconds after which it forgets.
const BURSTS: f64 = 0.35;
const MEMORY: f64 = 60.0;
/// The day's pattern: from so much to so much of the mean.
const SWING: f64 = 0.7;
/// A typical request, in units, and the standard deviation of its logarithm; one in a hundred costs ten times as much.
const COST: f64 = 2e-4;
const SPREAD: f64 = 1.0;

impl Traffic {
    pub(super) fn new(seed: u64, rate: f64) -> Self {
        Self { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x0b01, rate, wander: 0.0 }
    }

    /// Above 0 and at most 1. SplitMix64 (Steele, Lea and Flood, 2014).
    pub(super) fn unit(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((z ^ (z >> 31)) >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        (-2.0 * self.unit().ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// The requests from `begin` on, for `seconds`: when, and what they cost.
    pub(super) fn bucket(&mut self, begin: f64, seconds: f64, spells: &[Spell]) -> Vec<(f64, Picos)> {
        let keep = (-seconds / MEMORY).exp();
        self.wander = keep * self.wander + BURSTS * (1.0 - keep * keep).sqrt() * self.normal();
        let day = 1.0 - SWING * (std::f64::consts::TAU * begin / 86_400.0).cos();
        let spell =
            spells.iter().find(|spell| (spell.begin..spell.end).contains(&begin)).map(|spell| spell.what);
        let usual = self.rate * day * self.wander.exp();
        let (rate, dearer) = match spell {
            Some(What::Requests(factor)) => (usual * factor, 1.0),
            Some(What::Costs(factor)) => (usual, factor),
            Some(What::Loop(_)) | None => (usual, 1.0),
        };
        let mut requests = Vec::new();
        self.arrivals(begin, seconds, rate, |traffic, at| {
            let tail = if traffic.unit() < 0.01 { 10.0 } else { 1.0 };
            let cost = COST * dearer * tail * (SPREAD * traffic.normal()).exp();
            requests.push((at, cost));
        });
        if let Some(What::Loop(rate)) = spell {
            self.arrivals(begin, seconds, rate, |traffic, at| {
                requests.push((at, COST * (1.0 + 0.1 * traffic.unit())));
            });
        }
        requests.into_iter().map(|(at, cost)| (at, Picos((cost * 1e12) as i128))).collect()
    }

    fn arrivals(&mut self, begin: f64, seconds: f64, rate: f64, mut each: impl FnMut(&mut Self, f64)) {
        let mut at = begin;
        loop {
            at -= self.unit().ln() / rate;
            if at >= begin + seconds {
                return;
            }
            each(self, at);
        }
    }
}
