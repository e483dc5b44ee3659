//! Budgets as the configuration names them, made into rules.

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;

use super::budgets::{Budget, Mode, Scope};
use super::window::Window;
use crate::config::BudgetText;
use crate::units::{Picos, UnixNanos};

/// Alerts are raised at these per cent of the cap where none are named.
const ALERTS: [u8; 3] = [50, 80, 100];

/// The rules that the configuration names.
///
/// # Errors
/// Says which budget is wrong, and what it may be.
pub fn parse(texts: &[BudgetText]) -> Result<Vec<Budget>, String> {
    let mut rules: Vec<Budget> = Vec::with_capacity(texts.len());
    for (at, text) in texts.iter().enumerate() {
        let rule = rule(text).map_err(|problem| format!("budget {}: {problem}", at + 1))?;
        if rules.iter().any(|known| known.id == rule.id) {
            return Err(format!("budget {}: two budgets are called {:?}; name one of them", at + 1, rule.id));
        }
        rules.push(rule);
    }
    Ok(rules)
}

fn rule(text: &BudgetText) -> Result<Budget, String> {
    let scope = Scope::parse(&text.scope).ok_or_else(|| {
        format!("scope {:?} is not one of {}", text.scope, Scope::ALL.map(Scope::name).join(", "))
    })?;
    if scope == Scope::All && text.value.is_some() {
        return Err("scope \"all\" has no value; leave it out".to_owned());
    }
    let window = Window::parse(&text.window)
        .ok_or_else(|| format!("window {:?} is not one of hour, day, week, month, lifetime", text.window))?;
    let zone = text.time_zone.as_deref().map_or(Ok(TimeZone::UTC), |name| {
        let unknown = |_| format!("time_zone {name:?} is not known; write a name such as Europe/Berlin");
        TimeZone::get(name).map_err(unknown)
    })?;
    let until = text.until.as_deref().map(|until| end_date(until, &zone)).transpose()?;
    let mode = text.mode.as_deref().map_or(Ok(Mode::Block), |name| {
        Mode::parse(name).ok_or_else(|| format!("mode {name:?} is not one of observe, warn, throttle, block"))
    })?;
    let mut soft = text.alerts.clone().unwrap_or_else(|| ALERTS.to_vec());
    soft.sort_unstable();
    soft.dedup();
    if soft.first() == Some(&0) {
        return Err("alerts: 0 per cent is reached by everybody; begin at 1".to_owned());
    }
    let id = text.name.clone().unwrap_or_else(|| {
        [Some(scope.name()), text.value.as_deref(), Some(window.name())]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .join(" ")
    });
    let cap = Picos::parse(&text.cap).map_err(|problem| format!("cap: {problem}"))?;
    // Only a lifetime's first window is bounded by its end date; it is allowed everywhere, as an end to spending.
    Ok(Budget { id, scope, value: text.value.clone(), cap, window, zone, until, mode, soft })
}

/// The end of a day, or an instant.
fn end_date(text: &str, zone: &TimeZone) -> Result<UnixNanos, String> {
    let of_day = |date: Date| {
        let next = date.tomorrow().ok()?.to_datetime(jiff::civil::Time::midnight());
        zone.to_timestamp(next).ok()
    };
    let instant = match text.parse::<Date>() {
        Ok(date) if text.len() == 10 => of_day(date),
        _ => text.parse::<Timestamp>().ok(),
    };
    instant.and_then(|at| u64::try_from(at.as_nanosecond()).ok()).map(UnixNanos).ok_or_else(|| {
        format!("until {text:?} is no date such as 2026-12-31, and no instant such as 2026-12-31T18:00:00Z")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(scope: &str, value: Option<&str>, cap: &str, window: &str) -> BudgetText {
        BudgetText {
            name: None,
            scope: scope.into(),
            value: value.map(str::to_owned),
            cap: cap.into(),
            window: window.into(),
            time_zone: None,
            until: None,
            mode: None,
            alerts: None,
        }
    }

    #[test]
    fn rules_are_read_with_their_defaults() {
        let until = BudgetText {
            until: Some("2026-12-31".into()),
            time_zone: Some("Europe/Berlin".into()),
            mode: Some("warn".into()),
            alerts: Some(vec![90, 10, 90]),
            ..text("team", Some("search"), "12.5", "lifetime")
        };
        let rules = parse(&[text("all", None, "100", "month"), until]).expect("good rules");
        assert_eq!((rules[0].id.as_str(), rules[0].mode), ("all month", Mode::Block));
        assert_eq!((rules[0].soft.as_slice(), rules[0].until), ([50, 80, 100].as_slice(), None));
        assert_eq!((rules[1].id.as_str(), rules[1].cap), ("team search lifetime", Picos(12_500_000_000_000)));
        assert_eq!(
            rules[1].until,
            Some(UnixNanos(1_798_758_000_000_000_000)),
            "the end of the day in Berlin"
        );
        assert_eq!(rules[1].soft, [10, 90]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let check = |text: BudgetText, problem: &str| {
            let error = parse(&[text]).expect_err("a bad rule");
            assert!(error.contains("budget 1") && error.contains(problem), "{error}");
        };
        let good = || text("team", None, "1", "day");
        check(text("squad", None, "1", "day"), "\"squad\" is not one of all, key, team");
        check(text("team", None, "-1", "day"), "cap");
        check(text("team", None, "1", "fortnight"), "fortnight");
        check(text("all", Some("x"), "1", "day"), "has no value");
        check(BudgetText { time_zone: Some("Mars/Olympus".into()), ..good() }, "Mars/Olympus");
        check(BudgetText { mode: Some("halt".into()), ..good() }, "observe, warn, throttle, block");
        check(BudgetText { until: Some("soon".into()), ..good() }, "soon");
        check(BudgetText { alerts: Some(vec![0]), ..good() }, "0 per cent");
        let error = parse(&[good(), good()]).expect_err("the same twice");
        assert!(error.contains("\"team day\""), "{error}");
    }
}
