//! Notices what is unusual: a key or a feature whose requests cost more than they did, or that spends faster.
//!
//! Time is cut into buckets of ten seconds. Each series keeps the last hour of them and asks of every new one how far it
//! is above their median, in robust spreads (Iglewicz and Hoaglin, "How to Detect and Handle Outliers", 1993), so that
//! some odd buckets do not hide the next. Several unusual buckets soon after each other are a spike.
//!
//! Nothing is trained, and what is unusual does not enter the history; what stays for half an hour is taken for usual.
//! Less than usual is not looked for. Does not know: clocks, budgets, who is told. Floats, for they bill nothing.

use std::collections::{HashMap, VecDeque};

use super::budgets::{Scope, Spender};
use crate::units::{Picos, UnixNanos};

/// A bucket's length in nanoseconds.
pub const BUCKET: u64 = 10_000_000_000;
/// Buckets of an hour.
const HISTORY: usize = 360;
/// Fewer than these say nothing yet.
const HISTORY_MIN: usize = 60;
/// And so many of them with requests.
const BUSY_MIN: usize = 20;
/// After so many empty ones in a row, further ones say nothing: a night's silence does not make the morning unusual.
const SILENCE: u32 = 30;
/// Requests that a mean of costs takes; a bucket with fewer is pooled with those after it.
const POOLED: u32 = 10;
/// How many spreads above the median are unusual.
const RATE_SPREADS: f64 = 5.0;
const COST_SPREADS: f64 = 4.5;
/// A spread is at least this part of the median rate, or of a logarithm of costs.
const RATE_SPREAD_MIN: f64 = 0.25;
const COST_SPREAD_MIN: f64 = 0.1;
/// What is less than so many times the usual is no spike, however regular the usual is.
const FACTOR_MIN: f64 = 1.8;
/// A median absolute deviation is so much smaller than a normal distribution's standard deviation.
const NORMAL: f64 = 1.4826;
/// So many of the last four buckets are unusual in a spike. Means of costs are calmer.
const RATE_HITS: u32 = 3;
const COST_HITS: u32 = 2;
/// Usual buckets in a row that end a spike.
const CALM: u32 = 6;
/// Buckets after an alarm without another one of the same series.
const COOLDOWN: u64 = 60;
/// What is unusual for so many buckets in a row is the new usual.
const ABSORBED: u32 = 180;
/// Series at the same time; further ones are not watched until some are forgotten.
const SERIES_MAX: usize = 2_000;
/// Buckets without a request after which a series is forgotten: a day.
const FORGOTTEN: u32 = 8_640;

/// What of a series is unusual.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Measure {
    /// Units of money a request, the geometric mean.
    CostPerRequest,
    /// Units of money an hour.
    SpendRate,
}

impl Measure {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::CostPerRequest => "cost_per_request",
            Self::SpendRate => "spend_rate",
        }
    }
}

/// Something unusual that has just been noticed.
#[derive(Debug, Clone, PartialEq)]
pub struct Spike {
    pub scope: Scope,
    pub value: String,
    pub measure: Measure,
    /// In the last bucket, in the measure's unit.
    pub seen: f64,
    pub usual: f64,
    /// Charged to the series in the last bucket.
    pub spent: Picos,
    /// The end of the bucket in which it was noticed.
    pub at: UnixNanos,
}

/// All series of a server.
#[derive(Debug, Default)]
pub struct Detector {
    series: HashMap<(Scope, String), Series>,
    /// The bucket that is filled now.
    bucket: u64,
}

impl Detector {
    #[must_use]
    pub fn new(now: UnixNanos) -> Self {
        Self { series: HashMap::new(), bucket: now.0 / BUCKET }
    }

    /// Counts a settled request in the bucket that is filled now.
    pub fn count(&mut self, who: &Spender, cost: Picos) {
        // Without a key it is everybody's who has none.
        let key = who.key.as_deref().unwrap_or("anonymous");
        for (scope, value) in [(Scope::Key, Some(key)), (Scope::Feature, who.feature.as_deref())] {
            let Some(value) = value else { continue };
            let name = (scope, value.to_owned());
            if self.series.contains_key(&name) || self.series.len() < SERIES_MAX {
                self.series.entry(name).or_default().count(cost);
            }
        }
    }

    /// Closes the buckets that are over at `now`, and says what is unusual.
    pub fn close(&mut self, now: UnixNanos) -> Vec<Spike> {
        let current = now.0 / BUCKET;
        let mut spikes = Vec::new();
        // A clock that jumps far says nothing of the time between.
        if current.abs_diff(self.bucket) > HISTORY as u64 {
            self.bucket = current.saturating_sub(1);
        }
        while self.bucket < current {
            self.bucket += 1;
            let at = UnixNanos(self.bucket * BUCKET);
            for ((scope, value), series) in &mut self.series {
                let spent = Picos(series.open.picos);
                spikes.extend(series.close(self.bucket).into_iter().flatten().map(
                    |(measure, seen, usual)| Spike {
                        scope: *scope,
                        value: value.clone(),
                        measure,
                        seen,
                        usual,
                        spent,
                        at,
                    },
                ));
            }
            self.series.retain(|_, series| series.silence < FORGOTTEN);
        }
        // The map has no order; who reads them has.
        spikes
            .sort_by(|a, b| (a.at, a.scope, &a.value, a.measure).cmp(&(b.at, b.scope, &b.value, b.measure)));
        spikes
    }
}

/// What a bucket has so far.
#[derive(Debug, Clone, Copy, Default)]
struct Open {
    requests: u32,
    picos: i128,
    logarithms: f64,
}

impl Open {
    fn units(&self) -> f64 {
        Picos(self.picos).as_f64()
    }
}

/// What was unusual lately.
#[derive(Debug, Default)]
struct Run {
    /// The last four, the newest in the lowest bit.
    recent: u8,
    in_a_row: u32,
    calm: u32,
    is_raised: bool,
    /// No alarm before this bucket.
    quiet_until: u64,
}

impl Run {
    /// Takes a bucket in; whether a spike is noticed with it.
    fn push(&mut self, is_unusual: bool, hits: u32, bucket: u64) -> bool {
        self.recent = ((self.recent << 1) | u8::from(is_unusual)) & 0b1111;
        if !is_unusual {
            self.in_a_row = 0;
            self.calm += 1;
            self.is_raised &= self.calm < CALM;
            return false;
        }
        (self.in_a_row, self.calm) = (self.in_a_row + 1, 0);
        let is_spike = self.recent.count_ones() >= hits && !self.is_raised && bucket >= self.quiet_until;
        if is_spike {
            self.is_raised = true;
            self.quiet_until = bucket + COOLDOWN;
        }
        is_spike
    }
}

#[derive(Debug, Default)]
struct Series {
    open: Open,
    /// Of the buckets since the last mean of costs.
    pool: Open,
    /// Spent in a bucket, in units.
    rates: VecDeque<f64>,
    /// Means of costs' logarithms.
    costs: VecDeque<f64>,
    rate_run: Run,
    cost_run: Run,
    /// Empty buckets in a row.
    silence: u32,
}

/// A measure, what was seen and what is usual.
type Noticed = (Measure, f64, f64);

impl Series {
    fn count(&mut self, cost: Picos) {
        // A cost of nothing has no logarithm.
        let logarithm = Picos(cost.0.max(1)).as_f64().ln();
        for open in [&mut self.open, &mut self.pool] {
            open.requests += 1;
            open.picos += cost.0;
            open.logarithms += logarithm;
        }
    }

    fn close(&mut self, bucket: u64) -> [Option<Noticed>; 2] {
        let open = std::mem::take(&mut self.open);
        self.silence = if open.requests == 0 { self.silence.saturating_add(1) } else { 0 };
        let rate = (self.silence <= SILENCE).then(|| self.close_rate(&open, bucket)).flatten();
        let cost = (self.pool.requests >= POOLED).then(|| self.close_costs(bucket)).flatten();
        [cost, rate]
    }

    fn close_rate(&mut self, open: &Open, bucket: u64) -> Option<Noticed> {
        let seen = open.units();
        let busy = self.rates.iter().filter(|rate| **rate > 0.0).count();
        let usual = (self.rates.len() >= HISTORY_MIN && busy >= BUSY_MIN).then(|| {
            let middle = median(self.rates.iter().copied());
            // Of what is above it: rates are skewed, and many of a small series are 0.
            let above = self.rates.iter().filter(|rate| **rate > middle).map(|rate| rate - middle);
            let spread = (NORMAL * median(above)).max(RATE_SPREAD_MIN * middle);
            (middle, middle + RATE_SPREADS * spread)
        });
        let is_unusual = usual.is_some_and(|(middle, limit)| seen > limit && seen > FACTOR_MIN * middle);
        let is_spike = self.rate_run.push(is_unusual, RATE_HITS, bucket);
        keep(&mut self.rates, seen, is_unusual, self.rate_run.in_a_row);
        let hourly = 3_600e9 / BUCKET as f64;
        usual.filter(|_| is_spike).map(|(middle, _)| (Measure::SpendRate, seen * hourly, middle * hourly))
    }

    fn close_costs(&mut self, bucket: u64) -> Option<Noticed> {
        let pool = std::mem::take(&mut self.pool);
        let seen = pool.logarithms / f64::from(pool.requests);
        let usual = (self.costs.len() >= BUSY_MIN).then(|| {
            let middle = median(self.costs.iter().copied());
            let spread = NORMAL * median(self.costs.iter().map(|cost| (cost - middle).abs()));
            (middle, middle + (COST_SPREADS * spread.max(COST_SPREAD_MIN)).max(FACTOR_MIN.ln()))
        });
        let is_unusual = usual.is_some_and(|(_, limit)| seen > limit);
        let is_spike = self.cost_run.push(is_unusual, COST_HITS, bucket);
        keep(&mut self.costs, seen, is_unusual, self.cost_run.in_a_row);
        usual.filter(|_| is_spike).map(|(middle, _)| (Measure::CostPerRequest, seen.exp(), middle.exp()))
    }
}

/// Takes a bucket into the history unless it is unusual; what stays unusual begins a new one.
fn keep(history: &mut VecDeque<f64>, seen: f64, is_unusual: bool, in_a_row: u32) {
    if is_unusual {
        if in_a_row >= ABSORBED {
            history.clear();
        }
        return;
    }
    if history.len() == HISTORY {
        history.pop_front();
    }
    history.push_back(seen);
}

/// 0 of nothing.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    if values.is_empty() {
        return 0.0;
    }
    let middle = values.len() / 2;
    *values.select_nth_unstable_by(middle, f64::total_cmp).1
}

#[cfg(test)]
mod tests;
