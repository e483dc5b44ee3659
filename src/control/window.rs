//! Windows of time in which a budget counts: calendar windows in a named time zone, or equal spans since a moment.
//!
//! Does not know: money. Invariant: the windows of one kind cut time into half-open intervals; an instant is in
//! exactly one of them.

use jiff::civil::{Date, Time, Weekday};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};

use crate::units::UnixNanos;

/// How long a budget counts before it begins anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Window {
    /// By the clock in UTC, as the ledger's hours are.
    Hour,
    Day,
    /// From Monday on.
    Week,
    Month,
    /// Equal spans of so many seconds since a moment (seconds since 1970).
    Every {
        seconds: u64,
        since: u64,
    },
    /// So many months of the calendar in UTC since a moment (seconds since 1970).
    Months {
        count: u32,
        since: u64,
    },
    Lifetime,
}

/// One window: from `start` until before `end`, which a lifetime does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Span {
    pub start: UnixNanos,
    pub end: Option<UnixNanos>,
}

impl Window {
    /// `hour`, `day`, `week`, `month` or `lifetime`.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "hour" => Self::Hour,
            "day" => Self::Day,
            "week" => Self::Week,
            "month" => Self::Month,
            "lifetime" => Self::Lifetime,
            _ => return None,
        })
    }

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hour => "hour",
            Self::Day => "day",
            Self::Week => "week",
            Self::Month => "month",
            Self::Every { .. } | Self::Months { .. } => "period",
            Self::Lifetime => "lifetime",
        }
    }

    /// The window that `at` is in.
    #[must_use]
    pub fn around(self, at: UnixNanos, zone: &TimeZone) -> Span {
        let timestamp = instant(at);
        let local = zone.to_datetime(timestamp);
        let (date, midnight) = (local.date(), Time::midnight());
        let days = |first: Date, next: Option<Date>| {
            // A midnight that the zone leaves out begins with the first instant after the gap.
            let begin = |date: Date| nanos(zone.to_timestamp(date.to_datetime(midnight)).ok());
            Span { start: begin(first).unwrap_or(UnixNanos(0)), end: next.and_then(begin) }
        };
        match self {
            Self::Hour => Self::Every { seconds: 3_600, since: 0 }.around(at, zone),
            Self::Day => days(date, date.tomorrow().ok()),
            Self::Week => {
                let monday = date.checked_sub(i64::from(date.weekday().since(Weekday::Monday)).days());
                let monday = monday.unwrap_or(date);
                days(monday, monday.checked_add(7.days()).ok())
            }
            Self::Month => {
                let first = date.first_of_month();
                days(first, first.checked_add(1.month()).ok())
            }
            Self::Every { seconds, since } => {
                let (length, since) = (seconds.max(1) * 1_000_000_000, since * 1_000_000_000);
                let past = at.0.saturating_sub(since) % length;
                let start = at.0 - past.min(at.0);
                Span { start: UnixNanos(start), end: Some(UnixNanos(start.saturating_add(length))) }
            }
            Self::Months { count, since } => months(at, i64::from(count.max(1)), since),
            Self::Lifetime => Span { start: UnixNanos(0), end: None },
        }
    }
}

/// Months after the moment, the 31st becoming a month's last day; what comes before it is in the first window.
fn months(at: UnixNanos, count: i64, since: u64) -> Span {
    let first = instant(UnixNanos(since.saturating_mul(1_000_000_000))).to_zoned(TimeZone::UTC);
    let begin =
        |window: i64| nanos(first.checked_add((window * count).months()).ok().map(|at| at.timestamp()));
    let now = instant(at).to_zoned(TimeZone::UTC);
    let passed = (i64::from(now.year()) - i64::from(first.year())) * 12 + i64::from(now.month())
        - i64::from(first.month());
    let mut window = (passed / count).max(0);
    if window > 0 && begin(window).is_some_and(|begin| begin > at) {
        window -= 1;
    }
    Span { start: begin(window).unwrap_or(UnixNanos(0)), end: begin(window + 1) }
}

fn instant(at: UnixNanos) -> Timestamp {
    Timestamp::from_nanosecond(i128::from(at.0)).unwrap_or(Timestamp::MAX)
}

fn nanos(at: Option<Timestamp>) -> Option<UnixNanos> {
    u64::try_from(at?.as_nanosecond()).ok().map(UnixNanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> UnixNanos {
        nanos(Some(text.parse().expect("a timestamp"))).expect("after 1970")
    }

    fn check(window: Window, zone: &str, instant: &str, start: &str, end: &str) {
        let zone = TimeZone::get(zone).expect("a zone");
        let span = window.around(at(instant), &zone);
        assert_eq!(span, Span { start: at(start), end: Some(at(end)) }, "{window:?} around {instant}");
    }

    #[test]
    fn windows_are_those_of_the_calendar_in_the_zone() {
        let berlin = "Europe/Berlin";
        check(Window::Day, "UTC", "2026-11-22T16:00:00Z", "2026-11-22T00:00:00Z", "2026-11-23T00:00:00Z");
        check(Window::Day, berlin, "2026-11-22T23:30:00Z", "2026-11-22T23:00:00Z", "2026-11-23T23:00:00Z");
        // Days of 23 and 25 hours.
        check(Window::Day, berlin, "2026-03-29T12:00:00Z", "2026-03-28T23:00:00Z", "2026-03-29T22:00:00Z");
        check(Window::Day, berlin, "2026-10-25T12:00:00Z", "2026-10-24T22:00:00Z", "2026-10-25T23:00:00Z");
        check(Window::Week, berlin, "2026-11-22T16:00:00Z", "2026-11-15T23:00:00Z", "2026-11-22T23:00:00Z");
        check(Window::Month, berlin, "2026-12-31T23:30:00Z", "2026-12-31T23:00:00Z", "2027-01-31T23:00:00Z");
        check(Window::Month, "UTC", "2028-02-29T00:00:00Z", "2028-02-01T00:00:00Z", "2028-03-01T00:00:00Z");
        check(
            Window::Hour,
            "Asia/Kolkata",
            "2026-11-22T16:40:00Z",
            "2026-11-22T16:00:00Z",
            "2026-11-22T17:00:00Z",
        );
        check(Window::Hour, berlin, "2026-10-25T01:59:59Z", "2026-10-25T01:00:00Z", "2026-10-25T02:00:00Z");
        let period = Window::Every { seconds: 1_800, since: 600 };
        check(period, "UTC", "1970-01-01T00:41:00Z", "1970-01-01T00:40:00Z", "1970-01-01T01:10:00Z");
        let quarter = Window::Months { count: 3, since: 1_769_817_600 };
        check(quarter, "UTC", "2026-02-01T00:00:00Z", "2026-01-31T00:00:00Z", "2026-04-30T00:00:00Z");
        check(quarter, "UTC", "2026-04-29T23:59:59Z", "2026-01-31T00:00:00Z", "2026-04-30T00:00:00Z");
        check(quarter, "UTC", "2026-04-30T00:00:00Z", "2026-04-30T00:00:00Z", "2026-07-31T00:00:00Z");
        let life = Window::Lifetime.around(at("2026-11-22T16:00:00Z"), &TimeZone::UTC);
        assert_eq!(life, Span { start: UnixNanos(0), end: None });
    }

    #[test]
    fn every_instant_is_in_the_window_around_it_and_windows_do_not_overlap() {
        let zones = [
            "UTC",
            "Europe/Berlin",
            "America/St_Johns",
            "Asia/Kathmandu",
            "Australia/Lord_Howe",
            "Africa/Cairo",
        ];
        for zone in zones.map(|name| TimeZone::get(name).expect("a zone")) {
            for window in [Window::Hour, Window::Day, Window::Week, Window::Month] {
                let mut instant = at("2025-12-30T10:17:00Z");
                for _ in 0..20_000 {
                    let span = window.around(instant, &zone);
                    let end = span.end.expect("it ends");
                    assert!(span.start <= instant && instant < end, "{window:?} {instant:?} {span:?}");
                    let next = window.around(end, &zone);
                    assert_eq!(next.start, end, "{window:?} after {span:?} in {zone:?}");
                    assert_eq!(window.around(UnixNanos(end.0 - 1), &zone), span);
                    instant = UnixNanos(instant.0 + 1_717_000_000_000);
                }
            }
        }
    }
}
