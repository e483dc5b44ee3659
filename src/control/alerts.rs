//! Alerts: what somebody should hear of, as events in the shape of LiteLLM's webhooks.
//!
//! Does: put events together, and the text for people. Does not know: who is told, how, and whether it arrived.
//! Invariant: what an alert is about has one name (`once`), so that it can be raised once whoever notices it again.

pub mod rules;
mod watch;

use serde_json::{Value, json};

pub use watch::{Settled, Watch};

use super::anomaly::{Measure, Spike};
use super::budgets::{Crossing, Scope, Standing};
use super::forecast::Projection;
use super::keys::{rfc3339, short};
use super::window::Span;
use crate::units::{Picos, RequestId, UnixNanos};

/// What an alert is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A soft limit or the cap of a budget was reached.
    Budget,
    /// One request cost more than it should.
    RequestCost,
    /// A day's total is over a limit.
    DailyTotal,
    /// A budget will probably not last until its window ends.
    Forecast,
    /// Requests cost more than they did, or spend is faster.
    Anomaly,
    /// The books do not add up.
    Ledger,
}

impl Kind {
    pub const ALL: [Self; 6] =
        [Self::Budget, Self::RequestCost, Self::DailyTotal, Self::Forecast, Self::Anomaly, Self::Ledger];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Budget => "budget",
            Self::RequestCost => "request_cost",
            Self::DailyTotal => "daily_total",
            Self::Forecast => "forecast",
            Self::Anomaly => "anomaly",
            Self::Ledger => "ledger",
        }
    }
}

/// One alert, and the event that tells of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Alert {
    /// `alert_` and a UUIDv7 without dashes. In the event too: who gets one twice drops the second.
    pub id: String,
    /// The same for the same cause: raised once.
    pub once: String,
    pub at: UnixNanos,
    pub kind: Kind,
    event: Value,
}

/// Whom an alert is about, and what was spent of which limit.
struct About<'a> {
    scope: Scope,
    value: &'a str,
    spent: Picos,
    limit: Option<Picos>,
    currency: &'a str,
}

impl About<'_> {
    /// `team "search"`, `all requests`.
    fn whose(&self) -> String {
        whose(self.scope, self.value)
    }
}

fn whose(scope: Scope, value: &str) -> String {
    match scope {
        Scope::All => "all requests".to_owned(),
        scope => format!("{} {value:?}", scope.name()),
    }
}

impl Alert {
    /// The event, with the members of LiteLLM's and our own under `obol`, where money is exact.
    fn new(
        once: String,
        at: UnixNanos,
        (kind, event): (Kind, &str),
        about: &About<'_>,
        message: &str,
        more: Value,
    ) -> Self {
        let id = format!("alert_{}", RequestId::new());
        let group = match about.scope {
            // LiteLLM's name for the server as a whole.
            Scope::All => "proxy",
            scope => scope.name(),
        };
        let value = |scope: Scope| (about.scope == scope).then_some(about.value);
        let mut ours = json!({
            "kind": kind.name(),
            "scope": about.scope.name(),
            "value": (about.scope != Scope::All).then_some(about.value),
            "spent": about.spent.decimal(),
            "limit": about.limit.map(Picos::decimal),
            "currency": about.currency,
        });
        if let (Value::Object(ours), Value::Object(more)) = (&mut ours, more) {
            ours.extend(more);
        }
        let event = json!({
            "id": id,
            "created_at": rfc3339(at),
            "event": event,
            "event_group": group,
            "event_message": message,
            "spend": about.spent.as_f64(),
            "max_budget": about.limit.map(Picos::as_f64),
            "soft_budget": null,
            "token": null,
            "key_alias": null,
            "user_id": value(Scope::User),
            "team_id": value(Scope::Team),
            "customer_id": null,
            "user_email": null,
            "projected_exceeded_date": null,
            "projected_spend": null,
            "obol": ours,
        });
        Self { id, once, at, kind, event }
    }

    /// A budget's soft limit or cap was reached.
    #[must_use]
    pub fn of_budget(crossing: &Crossing, at: UnixNanos, currency: &str) -> Self {
        let Crossing { budget, scope, value, percent, spent, cap, span } = crossing;
        let about = About { scope: *scope, value, spent: *spent, limit: Some(*cap), currency };
        let event = if *percent < 100 { "threshold_crossed" } else { "budget_crossed" };
        let message = format!(
            "{percent} % of the budget {budget:?} of {} is spent: {} of {} {currency}{}",
            about.whose(),
            short(*spent),
            short(*cap),
            since(*span)
        );
        let once = format!("budget {budget:?} {value:?} {} {percent} {}", span.start.0, cap.0);
        let more = json!({
            "budget": budget,
            "percent": percent,
            "window_start": rfc3339(span.start),
            "window_end": span.end.map(rfc3339),
        });
        let mut alert = Self::new(once, at, (Kind::Budget, event), &about, &message, more);
        if *percent < 100 {
            alert.event["soft_budget"] = json!(cap.as_f64() * f64::from(*percent) / 100.0);
        }
        alert
    }

    fn of_request(settled: &Settled, limit: Picos, currency: &str) -> Self {
        let who = &settled.who;
        let (scope, value) = [(Scope::Key, &who.key), (Scope::Team, &who.team), (Scope::User, &who.user)]
            .into_iter()
            .find_map(|(scope, value)| Some((scope, value.as_deref()?)))
            .unwrap_or((Scope::All, ""));
        let about = About { scope, value, spent: settled.cost, limit: Some(limit), currency };
        let message = format!(
            "The request {} of {} cost {} {currency}, which is over {}",
            settled.request,
            about.whose(),
            short(settled.cost),
            short(limit)
        );
        let more = json!({
            "request_id": settled.request,
            "team": who.team,
            "feature": who.feature,
            "user": who.user,
        });
        let what = (Kind::RequestCost, "request_cost_exceeded");
        let mut alert =
            Self::new(format!("request {}", settled.request), settled.ended, what, &about, &message, more);
        alert.event["team_id"] = json!(who.team);
        alert.event["user_id"] = json!(who.user);
        alert
    }

    fn of_day(about: &About<'_>, rule: usize, day: Span, zone: &str, at: UnixNanos) -> Self {
        let limit = about.limit.unwrap_or_default();
        let message = format!(
            "The day's total of {} is {} {}, which is over {} (time zone {zone})",
            about.whose(),
            short(about.spent),
            about.currency,
            short(limit)
        );
        let once = format!(
            "day {rule} {} {:?} {} {}",
            about.scope.name(),
            about.value,
            day.start.0,
            limit.decimal()
        );
        let more = json!({
            "window_start": rfc3339(day.start),
            "window_end": day.end.map(rfc3339),
            "time_zone": zone,
        });
        Self::new(once, at, (Kind::DailyTotal, "daily_total_exceeded"), about, &message, more)
    }

    /// A budget will probably be spent before its window ends, at `reaches`.
    #[must_use]
    pub fn of_forecast(
        standing: &Standing,
        projection: &Projection,
        (reaches, at): (Option<UnixNanos>, UnixNanos),
        currency: &str,
    ) -> Self {
        let Standing { budget, scope, value, cap, spent, span, .. } = standing;
        let about = About { scope: *scope, value, spent: *spent, limit: Some(*cap), currency };
        let Projection { expected, low, high } = projection;
        let message = format!(
            "The budget {budget:?} of {} will probably not last: {} of {} {currency} are spent, and {} to {} will be \
             when its window ends{}",
            about.whose(),
            short(*spent),
            short(*cap),
            short(*low),
            short(*high),
            span.end.map(|end| format!(" at {}", rfc3339(end))).unwrap_or_default()
        );
        let once = format!("forecast {budget:?} {value:?} {} {}", span.start.0, cap.0);
        let more = json!({
            "budget": budget,
            "window_start": rfc3339(span.start),
            "window_end": span.end.map(rfc3339),
            "projected": { "expected": expected.decimal(), "low": low.decimal(), "high": high.decimal() },
        });
        let what = (Kind::Forecast, "projected_limit_exceeded");
        let mut alert = Self::new(once, at, what, &about, &message, more);
        alert.event["projected_spend"] = json!(expected.as_f64());
        alert.event["projected_exceeded_date"] = json!(reaches.map(|at| rfc3339(at)[..10].to_owned()));
        alert
    }

    fn of_spike(spike: &Spike, currency: &str) -> Self {
        let Spike { scope, value, measure, seen, usual, spent, at } = spike;
        let about = About { scope: *scope, value, spent: *spent, limit: None, currency };
        let ([what, verb], unit) = match measure {
            Measure::CostPerRequest => (["Requests", "cost"], "a request"),
            Measure::SpendRate => (["Spend", "is"], "an hour"),
        };
        let message = format!(
            "{what} of {} {verb} {:.1} times the usual: {seen:.6} {currency} {unit}, usually {usual:.6}",
            about.whose(),
            seen / usual.max(f64::MIN_POSITIVE)
        );
        let once = format!("anomaly {} {value:?} {} {}", scope.name(), measure.name(), at.0);
        let more = json!({ "measure": measure.name(), "seen": seen, "usual": usual });
        Self::new(once, *at, (Kind::Anomaly, "spend_anomaly"), &about, &message, more)
    }

    /// The books of a device do not add up: by so much device time (ns), or block time (block-ns). `start` tells one
    /// run of the server from another.
    #[must_use]
    pub fn of_ledger(
        device: &str,
        (time, blocks): (i128, i128),
        (start, at): (UnixNanos, UnixNanos),
        currency: &str,
    ) -> Self {
        let about = About { scope: Scope::All, value: "", spent: Picos::ZERO, limit: None, currency };
        let message = format!(
            "The ledger does not add up on {device}: {time} ns of device time and {blocks} block-ns of KV memory are \
             unaccounted for; stop trusting new receipts and run `obol audit`"
        );
        let more = json!({
            "device": device,
            "conservation_error_ns": time.to_string(),
            "kv_conservation_error_block_ns": blocks.to_string(),
        });
        let once = format!("ledger {device:?} {}", start.0);
        Self::new(once, at, (Kind::Ledger, "ledger_conservation_error"), &about, &message, more)
    }

    /// The key that it is about, if it is about one.
    #[must_use]
    pub fn key(&self) -> Option<&str> {
        let ours = &self.event["obol"];
        (ours["scope"] == Scope::Key.name()).then(|| ours["value"].as_str()).flatten()
    }

    /// Says what else the key is known by: its token (a hash) and its alias.
    pub fn name_key(&mut self, token: &str, alias: Option<&str>) {
        self.event["token"] = json!(token);
        self.event["key_alias"] = json!(alias);
    }

    #[must_use]
    pub fn event(&self) -> &Value {
        &self.event
    }
}

/// The event as Slack's incoming webhooks take it, and whoever follows them.
#[must_use]
pub fn slack(event: &Value) -> Value {
    let text = |member: &str| event[member].as_str().unwrap_or_default();
    // The three characters that its markup reads.
    let escaped = text("event_message").replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    json!({ "text": format!("*obol: {}*\n{escaped}", text("event")) })
}

fn since(span: Span) -> String {
    if span.start.0 == 0 { String::new() } else { format!(" since {}", rfc3339(span.start)) }
}
