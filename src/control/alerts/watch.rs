//! Looks at what requests cost as they settle, and says what to raise an alert about.
//!
//! Does not know: what was raised before; the same alert may come again after a restart, under the same name.

use std::collections::HashMap;

use super::rules::{Daily, Rules};
use super::{About, Alert};
use crate::control::budgets::{Crossing, Scope, Spender, Standing};
use crate::control::window::{Span, Window};
use crate::units::{Picos, RequestId, UnixNanos};

/// Alerts about single requests: so many a minute at most, or a low limit would drown all others.
const REQUESTS_A_MINUTE: u32 = 60;
const MINUTE: u64 = 60_000_000_000;

/// A request whose receipt is durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settled {
    pub request: RequestId,
    pub who: Spender,
    /// When it was submitted: the day that it counts in, as in budgets.
    pub at: UnixNanos,
    pub ended: UnixNanos,
    pub cost: Picos,
}

/// What a day's totals stand at: by rule and value.
type Days = HashMap<(usize, String), (Span, Picos)>;

#[derive(Debug)]
pub struct Watch {
    rules: Rules,
    currency: String,
    days: Days,
    /// The minute, and the alerts about single requests in it.
    requests: (u64, u32),
    suppressed: u64,
}

impl Watch {
    #[must_use]
    pub fn new(rules: Rules, currency: &str) -> Self {
        Self { rules, currency: currency.to_owned(), days: Days::new(), requests: (0, 0), suppressed: 0 }
    }

    /// The earliest beginning of the days that are under way: what was charged since then must be replayed.
    #[must_use]
    pub fn counts_since(&self, now: UnixNanos) -> Option<UnixNanos> {
        self.rules.daily.iter().map(|rule| Window::Day.around(now, &rule.zone).start).min()
    }

    /// Counts what was charged before this server started.
    pub fn replay(&mut self, who: &Spender, at: UnixNanos, charged: Picos) {
        for rule in 0..self.rules.daily.len() {
            self.count(rule, who, at, charged);
        }
    }

    /// Takes a settled request in.
    pub fn settled(&mut self, settled: &Settled) -> Vec<Alert> {
        let mut alerts = Vec::new();
        for rule in 0..self.rules.daily.len() {
            let Some((value, day, before, after)) = self.count(rule, &settled.who, settled.at, settled.cost)
            else {
                continue;
            };
            let over = self.rules.daily[rule].over;
            if before <= over && over < after {
                alerts.push(self.of_day(rule, &value, day, after, settled.ended));
            }
        }
        alerts.extend(self.expensive(settled));
        alerts
    }

    /// The alert about a request that costs more than the limit. One a request, however often it is asked.
    pub fn expensive(&mut self, settled: &Settled) -> Option<Alert> {
        let limit = self.rules.request_cost.filter(|limit| settled.cost > *limit)?;
        let minute = settled.ended.0 / MINUTE;
        if self.requests.0 != minute {
            self.requests = (minute, 0);
        }
        if self.requests.1 >= REQUESTS_A_MINUTE {
            self.suppressed += 1;
            return None;
        }
        self.requests.1 += 1;
        Some(Alert::of_request(settled, limit, &self.currency))
    }

    /// Alerts about single requests that were left out because there were too many.
    #[must_use]
    pub fn suppressed(&self) -> u64 {
        self.suppressed
    }

    /// The alert of a soft limit or cap that was just reached.
    #[must_use]
    pub fn crossed(&self, crossing: &Crossing, now: UnixNanos) -> Alert {
        Alert::of_budget(crossing, now, &self.currency)
    }

    /// All alerts that follow from what is spent by now, for a start: those that a crash kept from being written
    /// down are among them.
    #[must_use]
    pub fn due(&self, standings: &[Standing], now: UnixNanos) -> Vec<Alert> {
        let crossings = standings.iter().flat_map(Standing::crossings);
        let mut alerts: Vec<Alert> = crossings.map(|crossing| self.crossed(&crossing, now)).collect();
        for ((rule, value), (day, total)) in &self.days {
            let open = day.end.is_none_or(|end| now < end);
            if open && *total > self.rules.daily[*rule].over {
                alerts.push(self.of_day(*rule, value, *day, *total, now));
            }
        }
        // The map has no order; who reads them has.
        alerts.sort_by(|a, b| a.once.cmp(&b.once));
        alerts
    }

    /// The alert about books that do not add up; `None` where they do.
    #[must_use]
    pub fn conservation(
        &self,
        device: &str,
        errors: (i128, i128),
        (start, now): (UnixNanos, UnixNanos),
    ) -> Option<Alert> {
        (errors != (0, 0)).then(|| Alert::of_ledger(device, errors, (start, now), &self.currency))
    }

    /// Counts a charge under a rule, if it falls under it: the value, its day, and its total before and after.
    fn count(
        &mut self,
        rule: usize,
        who: &Spender,
        at: UnixNanos,
        charged: Picos,
    ) -> Option<(String, Span, Picos, Picos)> {
        let Daily { scope, value, zone, .. } = &self.rules.daily[rule];
        let whose = who.value(*scope)?;
        if value.as_deref().is_some_and(|only| only != whose) {
            return None;
        }
        let day = Window::Day.around(at, zone);
        let known = self.days.get(&(rule, whose.to_owned()));
        match known {
            // A request of yesterday that ends today: that day is over, and nobody is told of it any more.
            Some((current, _)) if current.start > day.start => return None,
            Some((current, _)) if current.start < day.start => {
                self.days.retain(|(of, _), (known, _)| *of != rule || known.start >= day.start);
            }
            _ => {}
        }
        let (_, total) = self.days.entry((rule, whose.to_owned())).or_insert((day, Picos::ZERO));
        let before = *total;
        *total += charged;
        Some((whose.to_owned(), day, before, *total))
    }

    fn of_day(&self, rule: usize, value: &str, day: Span, total: Picos, at: UnixNanos) -> Alert {
        let Daily { over, scope, zone_name, .. } = &self.rules.daily[rule];
        let value = if *scope == Scope::All { "" } else { value };
        let about =
            About { scope: *scope, value, spent: total, limit: Some(*over), currency: &self.currency };
        Alert::of_day(&about, rule, day, zone_name, at)
    }
}
