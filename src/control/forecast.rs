//! What a budget's window will probably have spent when it ends, and how sure that is.
//!
//! What was spent in equal buckets of time is taken for a process whose rate follows the hour of the day, where there
//! are two days of it, and whose variance grows with its rate (a quasi-Poisson model; McCullagh and Nelder,
//! "Generalized Linear Models", 1989, 9.2). Neighbouring buckets may resemble each other; the band is wider by what
//! that adds to the variance of their sum (Newey and West, 1987).
//!
//! Does not know: budgets' caps, clocks. Floats, for they bill nothing.

use std::collections::VecDeque;

use super::window::Span;
use crate::units::{Picos, UnixNanos};

const SECOND: u64 = 1_000_000_000;
const HOUR: u64 = 3_600 * SECOND;
const DAY: u64 = 24 * HOUR;
/// With fewer buckets nothing is said.
const BUCKETS_MIN: usize = 6;
/// Eight of ten windows should end within the band: so many standard deviations of a normal distribution.
const BAND: f64 = 1.281_6;
/// Where no time of day is known, the rate itself goes up or down meanwhile: by so much of it, one standard deviation.
const DRIFT: f64 = 0.08;

/// What a window will have spent at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Projection {
    pub expected: Picos,
    /// One of ten windows ends below it, and one above `high`.
    pub low: Picos,
    pub high: Picos,
}

/// What was spent, by buckets of time.
#[derive(Debug, Clone)]
pub struct Series {
    /// Nanoseconds.
    length: u64,
    most: usize,
    /// The bucket that is filled now; those of `sums` are before it.
    current: u64,
    open: f64,
    sums: VecDeque<f64>,
}

impl Series {
    /// In buckets that suit windows of such a length (ns), and as many of them as are worth keeping.
    #[must_use]
    pub fn for_window(length: Option<u64>) -> Self {
        let (length, most) = match length {
            Some(window) if window <= 2 * HOUR => (60 * SECOND, 40),
            Some(window) if window <= 2 * DAY => (HOUR / 4, 7 * 96),
            _ => (HOUR, 14 * 24),
        };
        Self { length, most, current: 0, open: 0.0, sums: VecDeque::new() }
    }

    /// From when on what was spent is worth counting again at a start.
    #[must_use]
    pub fn counts_since(&self, now: UnixNanos) -> UnixNanos {
        UnixNanos(now.0.saturating_sub(self.length * (self.most as u64 + 1)))
    }

    /// Counts what was spent at `at`; times must not descend by much: what is late counts in the open bucket.
    pub fn count(&mut self, at: UnixNanos, amount: Picos) {
        self.close(at);
        self.open += amount.as_f64();
    }

    /// Closes the buckets that are over at `now`. The first one counted in is the beginning.
    pub fn close(&mut self, now: UnixNanos) {
        let bucket = now.0 / self.length;
        if self.current == 0 {
            self.current = bucket;
        }
        // After a long silence all that is kept is empty.
        let steps = bucket.saturating_sub(self.current).min(self.most as u64 + 1);
        for _ in 0..steps {
            self.sums.push_back(std::mem::take(&mut self.open));
            if self.sums.len() > self.most {
                self.sums.pop_front();
            }
        }
        self.current = self.current.max(bucket);
    }

    /// Where a window that stands at `spent` now will end; `None` where it has no end, or too little is known.
    #[must_use]
    pub fn project(&self, spent: Picos, now: UnixNanos, span: Span) -> Option<Projection> {
        let rest = span.end?.0.saturating_sub(now.0) as f64 / self.length as f64;
        let known = self.sums.len();
        if known < BUCKETS_MIN {
            return None;
        }
        let profile = self.profile();
        let phases = profile.len() as u64;
        let usual = |bucket: u64| profile[(bucket % phases) as usize];
        let first = self.current - known as u64;
        let fitted: Vec<f64> = (0..known as u64).map(|at| usual(first + at)).collect();
        let total: f64 = fitted.iter().sum();
        if total <= 0.0 {
            return Some(Projection { expected: spent, low: spent, high: spent });
        }
        // A part of this bucket is left, then whole ones, then a part of the last.
        let left = 1.0 - (now.0 % self.length) as f64 / self.length as f64;
        let mut coming = usual(self.current) * left.min(rest);
        let after = (rest - left).max(0.0);
        coming += (1..=after as u64).map(|at| usual(self.current + at)).sum::<f64>();
        coming += usual(self.current + 1 + after as u64) * after.fract();

        let residuals: Vec<f64> =
            self.sums.iter().zip(&fitted).map(|(sum, fit)| scaled(*sum, *fit)).collect();
        // Each phase of the profile is a mean of its own, over three of them.
        let free = (known as f64 - (phases as f64 / 3.0).max(1.0)).max(1.0);
        let dispersion = residuals.iter().map(|residual| residual * residual).sum::<f64>() / free;
        let drift = if phases == 1 { DRIFT * coming } else { 0.0 };
        let variance =
            dispersion * inflation(&residuals) * (coming + coming * coming / total) + drift * drift;
        // Of few buckets the spread is not known well: Student's distribution, to its first term.
        let width = BAND * (1.0 + (BAND * BAND + 1.0) / (4.0 * free)) * variance.sqrt();
        let at = |more: f64| spent + Picos((more.max(0.0) * 1e12) as i128);
        Some(Projection { expected: at(coming), low: at(coming - width), high: at(coming + width) })
    }

    /// What a bucket usually has, by the time of day where at least two days are known; else one mean.
    fn profile(&self) -> Vec<f64> {
        let phases = (DAY / self.length) as usize;
        let known = self.sums.len();
        if known < 2 * phases {
            return vec![self.sums.iter().sum::<f64>() / known as f64];
        }
        let first = (self.current as usize - known) % phases;
        let mut sums = vec![(0.0, 0_u32); phases];
        for (at, sum) in self.sums.iter().enumerate() {
            let (total, count) = &mut sums[(first + at) % phases];
            (*total, *count) = (*total + sum, *count + 1);
        }
        // Neighbours belong to the same time of day: few days make a jagged profile otherwise.
        let around = |phase: usize| {
            let near = [phase + phases - 1, phase, phase + 1].map(|near| sums[near % phases]);
            let (total, count) =
                near.iter().fold((0.0, 0), |(total, count), (sum, of)| (total + sum, count + of));
            total / f64::from(count)
        };
        (0..phases).map(around).collect()
    }
}

/// Pearson's residual.
fn scaled(sum: f64, fit: f64) -> f64 {
    if fit > 0.0 { (sum - fit) / fit.sqrt() } else { 0.0 }
}

/// How many times more the sum of many varies than if they did not resemble their neighbours; at least 1.
fn inflation(residuals: &[f64]) -> f64 {
    let known = residuals.len();
    let lags = (known / 4).min(24);
    let power: f64 = residuals.iter().map(|residual| residual * residual).sum();
    if power <= 0.0 {
        return 1.0;
    }
    let alike = |lag: usize| {
        residuals.iter().zip(&residuals[lag..]).map(|(one, other)| one * other).sum::<f64>() / power
    };
    let weight = |lag: usize| 1.0 - lag as f64 / (lags + 1) as f64;
    (1.0 + 2.0 * (1..=lags).map(|lag| weight(lag) * alike(lag)).sum::<f64>()).max(1.0)
}

/// When a window that goes on as expected will have spent `cap`; `None`: not before it ends.
#[must_use]
pub fn reaches(
    cap: Picos,
    spent: Picos,
    projection: &Projection,
    now: UnixNanos,
    span: Span,
) -> Option<UnixNanos> {
    let end = span.end?;
    if projection.expected <= cap || spent >= cap {
        return None;
    }
    let share = (cap.as_f64() - spent.as_f64()) / (projection.expected.as_f64() - spent.as_f64());
    let rest = end.0.saturating_sub(now.0) as f64;
    Some(UnixNanos(now.0 + (rest * share) as u64))
}

#[cfg(test)]
mod tests;
