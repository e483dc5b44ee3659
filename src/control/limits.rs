//! Rate limits: requests and tokens a minute, and requests at a time, by token bucket.
//!
//! A bucket holds a minute's worth and refills evenly, so that a burst may take a whole minute's share at once. A
//! request takes its prompt's tokens when it is admitted and its answer's when that is known; an answer may so take
//! more than is left, and then nothing is admitted until the debt is paid off. Nothing is set aside for answers that
//! may never be that long.
//!
//! Does not know: keys, HTTP, money. Invariant: integers only; no more time is counted than has passed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::units::DeviceNanos;

const MINUTE: i128 = 60_000_000_000;
/// Callers without a request are forgotten once there are so many, when their buckets are full anyway.
const KNOWN_MAX: usize = 10_000;

/// What one caller may do. `None`: no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// A minute.
    pub requests: Option<u64>,
    /// Of prompts and answers, a minute.
    pub tokens: Option<u64>,
    /// At a time.
    pub parallel: Option<u32>,
}

impl Limits {
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// One limit as clients are told of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allotment {
    /// A minute.
    pub limit: u64,
    pub remaining: u64,
    /// Until all of it is there again.
    pub full_after: DeviceNanos,
}

/// What is left of the limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Left {
    pub requests: Option<Allotment>,
    pub tokens: Option<Allotment>,
}

/// Which limit a request would pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exceeded {
    Requests {
        limit: u64,
        retry_after: DeviceNanos,
    },
    Tokens {
        limit: u64,
        wanted: u64,
        retry_after: DeviceNanos,
    },
    /// More than a whole minute's share: waiting does not help.
    TooLarge {
        limit: u64,
        wanted: u64,
    },
    Parallel {
        limit: u32,
    },
}

impl std::fmt::Display for Exceeded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Requests { limit, .. } => {
                write!(f, "this key may send {limit} requests a minute; retry later")
            }
            Self::Tokens { limit, wanted, .. } => write!(
                f,
                "this key may use {limit} tokens a minute, and has not {wanted} left for this prompt; retry later"
            ),
            Self::TooLarge { limit, wanted } => {
                write!(f, "this key may use {limit} tokens a minute; a prompt of {wanted} never fits")
            }
            Self::Parallel { limit } => {
                write!(f, "this key may have {limit} requests at a time; retry when one has ended")
            }
        }
    }
}

/// What one caller has left of one limit: `level` is in 1/60 of a billionth, so that each nanosecond adds the limit.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    level: i128,
    at: DeviceNanos,
    limit: u64,
}

impl Bucket {
    fn full(limit: u64, at: DeviceNanos) -> Self {
        Self { level: i128::from(limit) * MINUTE, at, limit }
    }

    /// As of `now`, with this limit from now on.
    fn refill(&mut self, limit: u64, now: DeviceNanos) {
        let passed = i128::from(now.0.saturating_sub(self.at.0));
        let full = i128::from(limit) * MINUTE;
        // A changed limit keeps what was taken, not what was left.
        let taken = (i128::from(self.limit) * MINUTE - self.level).max(0);
        self.level = if limit == self.limit { self.level } else { full - taken };
        self.level = (self.level + passed * i128::from(limit)).min(full);
        (self.at, self.limit) = (now.max(self.at), limit);
    }

    /// How long until so many are there.
    fn wait(&self, wanted: u64) -> DeviceNanos {
        let missing = (i128::from(wanted) * MINUTE - self.level).max(0);
        let nanos = missing.div_euclid(i128::from(self.limit.max(1)))
            + i128::from(missing.rem_euclid(i128::from(self.limit.max(1))) > 0);
        DeviceNanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn has(&self, wanted: u64) -> bool {
        self.level >= i128::from(wanted) * MINUTE
    }

    fn take(&mut self, tokens: u64) {
        self.level -= i128::from(tokens) * MINUTE;
    }

    fn shown(&self) -> Allotment {
        let remaining = u64::try_from((self.level / MINUTE).max(0)).unwrap_or(u64::MAX);
        Allotment { limit: self.limit, remaining, full_after: self.wait(self.limit) }
    }
}

#[derive(Debug, Default)]
struct Caller {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    running: u32,
}

impl Caller {
    fn refill(&mut self, limits: &Limits, now: DeviceNanos) {
        let renew = |bucket: &mut Option<Bucket>, limit: Option<u64>| match limit {
            None => *bucket = None,
            Some(limit) => bucket.get_or_insert_with(|| Bucket::full(limit, now)).refill(limit, now),
        };
        renew(&mut self.requests, limits.requests);
        renew(&mut self.tokens, limits.tokens);
    }

    /// Which limit a prompt of so many tokens would pass.
    fn exceeds(&self, limits: &Limits, prompt: u64) -> Option<Exceeded> {
        if let Some(limit) = limits.parallel.filter(|limit| self.running >= *limit) {
            return Some(Exceeded::Parallel { limit });
        }
        if let Some(bucket) = self.requests.filter(|bucket| !bucket.has(1)) {
            return Some(Exceeded::Requests { limit: bucket.limit, retry_after: bucket.wait(1) });
        }
        let bucket = self.tokens?;
        let limit = bucket.limit;
        if prompt > limit {
            return Some(Exceeded::TooLarge { limit, wanted: prompt });
        }
        let retry_after = bucket.wait(prompt.max(1));
        (!bucket.has(prompt.max(1))).then_some(Exceeded::Tokens { limit, wanted: prompt, retry_after })
    }

    fn left(&self) -> Left {
        Left {
            requests: self.requests.as_ref().map(Bucket::shown),
            tokens: self.tokens.as_ref().map(Bucket::shown),
        }
    }

    /// Whether it stands as if it had never asked.
    fn is_idle(&self, now: DeviceNanos) -> bool {
        let full = |bucket: &Option<Bucket>| {
            bucket.is_none_or(|mut bucket| {
                bucket.refill(bucket.limit, now);
                bucket.has(bucket.limit)
            })
        };
        self.running == 0 && full(&self.requests) && full(&self.tokens)
    }
}

/// All callers' buckets; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Limiter(Arc<Mutex<HashMap<String, Caller>>>);

impl Limiter {
    fn callers(&self) -> MutexGuard<'_, HashMap<String, Caller>> {
        // Each change is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is left of a caller's limits at `now`.
    #[must_use]
    pub fn left(&self, who: &str, limits: &Limits, now: DeviceNanos) -> Left {
        let known = self.callers();
        let buckets = known.get(who).map(|caller| (caller.requests, caller.tokens));
        drop(known);
        let (requests, tokens) = buckets.unwrap_or_default();
        let mut caller = Caller { requests, tokens, running: 0 };
        caller.refill(limits, now);
        caller.left()
    }

    /// Admits a request whose prompt has so many tokens, at `now` on a clock that never goes back.
    ///
    /// # Errors
    /// Which limit it would pass; nothing is taken then.
    pub fn admit(
        &self,
        who: &str,
        limits: &Limits,
        prompt: u64,
        now: DeviceNanos,
    ) -> Result<(Pass, Left), Exceeded> {
        let mut callers = self.callers();
        if callers.len() >= KNOWN_MAX && !callers.contains_key(who) {
            callers.retain(|_, caller| !caller.is_idle(now));
        }
        let caller = callers.entry(who.to_owned()).or_default();
        caller.refill(limits, now);
        if let Some(exceeded) = caller.exceeds(limits, prompt) {
            return Err(exceeded);
        }
        caller.running += 1;
        if let Some(bucket) = &mut caller.requests {
            bucket.take(1);
        }
        if let Some(bucket) = &mut caller.tokens {
            bucket.take(prompt);
        }
        let left = caller.left();
        drop(callers);
        Ok((Pass { limiter: self.clone(), who: who.to_owned(), completion: 0 }, left))
    }
}

/// One of a caller's requests at a time, until this is dropped.
#[derive(Debug)]
pub struct Pass {
    limiter: Limiter,
    who: String,
    completion: u64,
}

impl Pass {
    /// The answer has come to so many tokens.
    pub fn answered(&mut self, tokens: u64) {
        self.completion = tokens;
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut callers = self.limiter.callers();
        let caller = callers.get_mut(&self.who).expect("a caller with a request is known");
        caller.running -= 1;
        if let Some(bucket) = &mut caller.tokens {
            bucket.take(self.completion);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn at(seconds: u64) -> DeviceNanos {
        DeviceNanos(seconds * SECOND)
    }

    #[test]
    fn a_burst_takes_a_minutes_share_and_then_waits_for_the_refill() {
        let (limiter, limits) = (Limiter::default(), Limits { requests: Some(6), ..Limits::default() });
        let mut passes = Vec::new();
        for left in (0..6).rev() {
            let (pass, shown) = limiter.admit("a", &limits, 1, at(100)).expect("in the burst");
            let shown = shown.requests.expect("it is limited");
            assert_eq!((shown.limit, shown.remaining), (6, left));
            assert_eq!(shown.full_after, at((6 - left) * 10));
            passes.push(pass);
        }
        let refused = limiter.admit("a", &limits, 1, at(100)).expect_err("the seventh");
        assert_eq!(refused, Exceeded::Requests { limit: 6, retry_after: at(10) });
        assert!(limiter.admit("b", &limits, 1, at(100)).is_ok(), "another has its own");
        assert!(limiter.admit("a", &limits, 1, DeviceNanos(110 * SECOND - 1)).is_err());
        assert!(limiter.admit("a", &limits, 1, at(110)).is_ok());
        assert!(limiter.admit("a", &limits, 1, at(110)).is_err());
        // However long it was quiet, a minute's share is all there is.
        for _ in 0..6 {
            limiter.admit("a", &limits, 1, at(9_000)).expect("full again");
        }
        assert!(limiter.admit("a", &limits, 1, at(9_000)).is_err());
    }

    #[test]
    fn answers_are_paid_when_they_are_known() {
        let (limiter, limits) = (Limiter::default(), Limits { tokens: Some(600), ..Limits::default() });
        assert_eq!(
            limiter.admit("a", &limits, 601, at(0)).expect_err("never"),
            Exceeded::TooLarge { limit: 600, wanted: 601 }
        );
        let (mut pass, left) = limiter.admit("a", &limits, 100, at(0)).expect("there are 600");
        assert_eq!(left.tokens.expect("limited").remaining, 500);
        pass.answered(700);
        drop(pass);
        let refused = limiter.admit("a", &limits, 10, at(0)).expect_err("200 in debt");
        assert_eq!(refused, Exceeded::Tokens { limit: 600, wanted: 10, retry_after: at(21) });
        assert!(limiter.admit("a", &limits, 10, at(21)).is_ok());
    }

    #[test]
    fn what_is_left_is_told_without_taking_any() {
        let (limiter, limits) = (Limiter::default(), Limits { requests: Some(6), ..Limits::default() });
        let left = |seconds| limiter.left("a", &limits, at(seconds)).requests.expect("limited").remaining;
        assert_eq!((left(0), limiter.callers().len()), (6, 0), "one who never asked is not remembered");
        drop(limiter.admit("a", &limits, 1, at(0)).expect("in the burst"));
        assert_eq!((left(0), left(0), left(10)), (5, 5, 6));
        assert_eq!(limiter.left("a", &Limits::default(), at(0)), Left::default());
    }

    #[test]
    fn callers_that_were_quiet_are_forgotten() {
        let (limiter, limits) = (Limiter::default(), Limits { requests: Some(60), ..Limits::default() });
        for caller in 0..KNOWN_MAX {
            drop(limiter.admit(&caller.to_string(), &limits, 1, at(0)).expect("in the burst"));
        }
        let _runs = limiter.admit("0", &limits, 1, at(0)).expect("in the burst");
        drop(limiter.admit("late", &limits, 1, at(0)).expect("in the burst"));
        assert_eq!(limiter.callers().len(), KNOWN_MAX + 1, "nobody is full again");
        drop(limiter.admit("later", &limits, 1, at(60)).expect("in the burst"));
        assert_eq!(limiter.callers().len(), 2, "who has a request is kept");
    }

    #[test]
    fn so_many_at_a_time() {
        let (limiter, limits) = (Limiter::default(), Limits { parallel: Some(2), ..Limits::default() });
        let first = limiter.admit("a", &limits, 1, at(0)).expect("one");
        let _second = limiter.admit("a", &limits, 1, at(0)).expect("two");
        assert_eq!(
            limiter.admit("a", &limits, 1, at(0)).expect_err("three"),
            Exceeded::Parallel { limit: 2 }
        );
        drop(first);
        assert!(limiter.admit("a", &limits, 1, at(0)).is_ok());
    }

    #[test]
    fn a_limit_that_changes_keeps_what_was_taken() {
        let limiter = Limiter::default();
        let of = |tokens| Limits { tokens: Some(tokens), ..Limits::default() };
        drop(limiter.admit("a", &of(100), 80, at(0)).expect("100 are there"));
        assert!(limiter.admit("a", &of(50), 1, at(0)).is_err(), "80 of 50 are taken");
        let (_, left) = limiter.admit("a", &of(200), 20, at(0)).expect("more than before");
        assert_eq!(left.tokens.expect("limited").remaining, 100, "200 less 80 and 20");
    }
}
