//! Spans of time as LiteLLM writes them: `30s`, `30m`, `12h`, `30d`, `2w`, `1mo`.

use std::fmt;
use std::str::FromStr;

use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};

use crate::units::UnixNanos;

/// Longer is a mistake: a century.
const DAYS_MAX: u64 = 36_525;

/// A positive span: seconds, or months of the calendar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Span {
    count: u32,
    unit: SpanUnit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SpanUnit {
    Second,
    Minute,
    Hour,
    /// 24 hours where it is added to an instant.
    Day,
    Week,
    Month,
}

impl SpanUnit {
    const ALL: [Self; 6] = [Self::Second, Self::Minute, Self::Hour, Self::Day, Self::Week, Self::Month];

    fn suffix(self) -> &'static str {
        match self {
            Self::Second => "s",
            Self::Minute => "m",
            Self::Hour => "h",
            Self::Day => "d",
            Self::Week => "w",
            Self::Month => "mo",
        }
    }

    /// Of a month the longest, which bounds it.
    fn seconds(self) -> u64 {
        match self {
            Self::Second => 1,
            Self::Minute => 60,
            Self::Hour => 3_600,
            Self::Day => 86_400,
            Self::Week => 7 * 86_400,
            Self::Month => 31 * 86_400,
        }
    }
}

impl Span {
    #[must_use]
    pub fn count(self) -> u32 {
        self.count
    }

    #[must_use]
    pub fn unit(self) -> SpanUnit {
        self.unit
    }

    /// The instant that is so much later; months by the UTC calendar, the 31st becoming a month's last day.
    #[must_use]
    pub fn after(self, start: UnixNanos) -> UnixNanos {
        if self.unit != SpanUnit::Month {
            let nanos = u64::from(self.count) * self.unit.seconds() * 1_000_000_000;
            return UnixNanos(start.0.saturating_add(nanos));
        }
        let later = timestamp(start)
            .to_zoned(TimeZone::UTC)
            .checked_add(i64::from(self.count).months())
            .expect("a century from now is a date");
        UnixNanos(u64::try_from(later.timestamp().as_nanosecond()).unwrap_or(u64::MAX))
    }
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a span of time such as 30s, 15m, 12h, 30d, 2w or 1mo");
        let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let (count, suffix) = text.split_at(digits);
        let unit = SpanUnit::ALL.into_iter().find(|unit| unit.suffix() == suffix).ok_or_else(wrong)?;
        let count: u32 = count.parse().map_err(|_| wrong())?;
        if count == 0 || u64::from(count) * unit.seconds() > DAYS_MAX * 86_400 {
            return Err(format!("{text:?} is not between a second and a century"));
        }
        Ok(Self { count, unit })
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.count, self.unit.suffix())
    }
}

fn timestamp(at: UnixNanos) -> Timestamp {
    Timestamp::from_nanosecond(i128::from(at.0)).expect("64 bits of nanoseconds end in 2554")
}

/// As in RFC 3339, to the millisecond.
#[must_use]
pub fn rfc3339(at: UnixNanos) -> String {
    format!("{:.3}", timestamp(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: UnixNanos = UnixNanos(1_769_860_800_000_000_000);

    #[test]
    fn spans_are_added_to_instants() {
        assert_eq!(rfc3339(START), "2026-01-31T12:00:00.000Z");
        for (text, later) in [
            ("30s", "2026-01-31T12:00:30.000Z"),
            ("15m", "2026-01-31T12:15:00.000Z"),
            ("12h", "2026-02-01T00:00:00.000Z"),
            ("30d", "2026-03-02T12:00:00.000Z"),
            ("2w", "2026-02-14T12:00:00.000Z"),
            ("1mo", "2026-02-28T12:00:00.000Z"),
            ("14mo", "2027-03-31T12:00:00.000Z"),
        ] {
            let span: Span = text.parse().unwrap();
            assert_eq!(span.to_string(), text);
            assert_eq!(rfc3339(span.after(START)), later, "{text}");
        }
    }

    #[test]
    fn what_is_no_span_is_refused() {
        for text in ["", "30", "d", "0d", "-1d", "1.5h", "1y", "30 d", "99999999999s", "40000d", "1200mo"] {
            assert!(text.parse::<Span>().is_err(), "{text:?}");
        }
        assert!("100d".parse::<Span>().is_ok() && "36525d".parse::<Span>().is_ok());
    }
}
