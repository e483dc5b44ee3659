//! Looks at what requests cost as they settle, and says what to raise an alert about.
//!
//! Does not know: what was raised before; the same alert may come again after a restart, under the same name.

use std::collections::HashMap;

use std::sync::Arc;

use super::rules::{Daily, Rules};
use super::{About, Alert};
use crate::control::anomaly::Detector;
use crate::control::budgets::{Budget, Crossing, Mode, Scope, Spender, Standing};
use crate::control::forecast::{Projection, Series, reaches};
use crate::control::foreseen::Foreseen;
use crate::control::window::{Span, Window};
use crate::units::{Picos, RequestId, UnixNanos};

/// Alerts about single requests: so many a minute at most, or a low limit would drown all others.
const REQUESTS_A_MINUTE: u32 = 60;
const MINUTE: u64 = 60_000_000_000;
/// Accounts of budgets that are forecast at the same time; of further ones nothing is said.
const FORECASTS_MAX: usize = 1_000;

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
    detector: Detector,
    /// By budget and value.
    forecasts: HashMap<(String, String), Forecast>,
    /// The minute in which budgets were last projected.
    projected: u64,
    /// What was found then, until it is taken.
    foreseen: Option<Vec<Foreseen>>,
}

#[derive(Debug)]
struct Forecast {
    series: Series,
    /// The window that an alert was raised about.
    raised: Option<UnixNanos>,
}

impl Watch {
    #[must_use]
    pub fn new(rules: Rules, currency: &str) -> Self {
        Self {
            rules,
            currency: currency.to_owned(),
            days: Days::new(),
            requests: (0, 0),
            suppressed: 0,
            detector: Detector::default(),
            forecasts: HashMap::new(),
            projected: 0,
            foreseen: None,
        }
    }

    /// The earliest beginning of the days that are under way: what was charged since then must be replayed.
    #[must_use]
    pub fn counts_since(&self, budgets: &[Arc<Budget>], now: UnixNanos) -> Option<UnixNanos> {
        let days = self.rules.daily.iter().map(|rule| Window::Day.around(now, &rule.zone).start);
        let forecasts = budgets.iter().filter(|_| self.rules.forecasts).map(|rule| {
            let span = rule.window.around(now, &rule.zone);
            Series::for_window(length(rule, span)).counts_since(now)
        });
        days.chain(forecasts).min()
    }

    /// Counts what was charged before this server started.
    pub fn replay(&mut self, budgets: &[Arc<Budget>], who: &Spender, at: UnixNanos, charged: Picos) {
        self.foresee(budgets, who, at, charged);
        for rule in 0..self.rules.daily.len() {
            self.count(rule, who, at, charged);
        }
    }

    /// Takes a settled request in.
    pub fn settled(&mut self, budgets: &[Arc<Budget>], settled: &Settled) -> Vec<Alert> {
        self.foresee(budgets, &settled.who, settled.ended, settled.cost);
        if self.rules.anomalies {
            self.detector.count(&settled.who, settled.cost);
        }
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

    /// Closes what is over at `now`: what was unusual in it, and which budgets will not last.
    pub fn close(&mut self, now: UnixNanos, standings: impl FnOnce() -> Vec<Standing>) -> Vec<Alert> {
        let spikes = self.detector.close(now);
        let mut alerts: Vec<Alert> =
            spikes.iter().map(|spike| Alert::of_spike(spike, &self.currency)).collect();
        if self.rules.forecasts && self.projected != now.0 / MINUTE {
            self.projected = now.0 / MINUTE;
            let mut all = Vec::new();
            for standing in standings() {
                let Some(projection) = self.projection(&standing, now) else { continue };
                alerts.extend(self.will_not_last(&standing, &projection, now));
                // What is projected has an end.
                all.extend(standing.until_end().end.map(|end| {
                    let Standing { budget, value, .. } = standing;
                    Foreseen { budget, value, end, at: now, projection }
                }));
            }
            self.foreseen = Some(all);
        }
        alerts
    }

    /// Where the windows of budgets will end, once each time that `close` has found it out anew.
    pub fn take_foreseen(&mut self) -> Option<Vec<Foreseen>> {
        self.foreseen.take()
    }

    /// Where a budget's window will end; `None` where too little is known of it, or it has no end.
    pub fn projection(&mut self, standing: &Standing, now: UnixNanos) -> Option<Projection> {
        let forecast = self.forecasts.get_mut(&(standing.budget.clone(), standing.value.clone()))?;
        forecast.series.close(now);
        forecast.series.project(standing.spent, now, standing.until_end())
    }

    /// Raised where nine of ten such windows end over the cap, once a window.
    fn will_not_last(
        &mut self,
        standing: &Standing,
        projection: &Projection,
        now: UnixNanos,
    ) -> Option<Alert> {
        let forecast = self.forecasts.get_mut(&(standing.budget.clone(), standing.value.clone()))?;
        let is_news = forecast.raised != Some(standing.span.start) && standing.mode != Mode::Observe;
        if !is_news || standing.spent >= standing.cap || projection.low <= standing.cap {
            return None;
        }
        forecast.raised = Some(standing.span.start);
        let reaches = reaches(standing.cap, standing.spent, projection, now, standing.until_end());
        Some(Alert::of_forecast(standing, projection, (reaches, now), &self.currency))
    }

    fn foresee(&mut self, budgets: &[Arc<Budget>], who: &Spender, at: UnixNanos, charged: Picos) {
        if !self.rules.forecasts {
            return;
        }
        for rule in budgets {
            let Some(value) = rule.whose(who) else { continue };
            let name = (rule.id.clone(), value.to_owned());
            let span = rule.window.around(at, &rule.zone);
            if length(rule, span).is_none() && rule.until.is_none() {
                continue;
            }
            if self.forecasts.contains_key(&name) || self.forecasts.len() < FORECASTS_MAX {
                let new = || Forecast { series: Series::for_window(length(rule, span)), raised: None };
                self.forecasts.entry(name).or_insert_with(new).series.count(at, charged);
            }
        }
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

/// Of a budget's window, in nanoseconds; `None` for a lifetime.
fn length(rule: &Budget, span: Span) -> Option<u64> {
    span.end.filter(|_| rule.window != Window::Lifetime).map(|end| end.0 - span.start.0)
}
