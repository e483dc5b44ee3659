//! The calendar of a time zone: instants as people write them, and the days and months that clock hours lie in.
//!
//! Does not know: budgets, receipts.
//! Invariant: a clock hour lies wholly in the day and the month in which it begins, also where a zone's midnight
//! is not on a clock hour.

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;

use crate::units::UnixNanos;

pub(super) const HOUR_NANOS: u64 = 3_600_000_000_000;

/// What cannot be understood of a time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CalendarError {
    #[error("{0:?} is not a time zone; use a name such as Europe/Berlin or UTC")]
    Zone(String),
    #[error(
        "{0:?} is not a time since 1970; use a date such as 2026-11-30 or a time such as 2026-11-30T08:00:00Z"
    )]
    Instant(String),
}

/// A part of the calendar that rows may be grouped by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Hour,
    Day,
    Month,
}

/// A named time zone, of the database that the program brings with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Calendar(TimeZone);

impl Calendar {
    #[must_use]
    pub fn utc() -> Self {
        Self(TimeZone::UTC)
    }

    /// By its name in the IANA database.
    ///
    /// # Errors
    /// When there is no such zone.
    pub fn named(name: &str) -> Result<Self, CalendarError> {
        TimeZone::get(name).map(Self).map_err(|_| CalendarError::Zone(name.to_owned()))
    }

    #[must_use]
    pub fn name(&self) -> &str {
        self.0.iana_name().unwrap_or("UTC")
    }

    /// A date, which is its first instant here, or a time with an offset (RFC 3339).
    ///
    /// # Errors
    /// When it is neither of them, or before 1970.
    pub fn instant(&self, text: &str) -> Result<UnixNanos, CalendarError> {
        let wrong = || CalendarError::Instant(text.to_owned());
        let time = match text.parse::<Timestamp>() {
            Ok(time) => time,
            Err(_) => {
                // A date alone: with a time of day it would be cut off.
                let date: Date = Some(text)
                    .filter(|text| text.len() == 10)
                    .ok_or_else(wrong)?
                    .parse()
                    .map_err(|_| wrong())?;
                self.0.to_zoned(date.at(0, 0, 0, 0)).map_err(|_| wrong())?.timestamp()
            }
        };
        u64::try_from(time.as_nanosecond()).map(UnixNanos).map_err(|_| wrong())
    }

    /// By RFC 3339, to the microsecond.
    #[must_use]
    pub fn text(&self, at: UnixNanos) -> String {
        let time = Timestamp::from_nanosecond(at.0.into()).unwrap_or(Timestamp::MAX);
        time.to_zoned(self.0.clone()).strftime("%Y-%m-%dT%H:%M:%S.%6f%:z").to_string()
    }

    /// The month, day or hour in which a clock hour begins.
    pub(super) fn label(&self, part: Part, hour: u64) -> String {
        let at = start(hour).to_zoned(self.0.clone());
        match part {
            Part::Hour if self.0 == TimeZone::UTC => utc_hour(hour),
            Part::Hour => at.strftime("%Y-%m-%dT%H:%M:%S%:z").to_string(),
            Part::Day => at.strftime("%Y-%m-%d").to_string(),
            Part::Month => at.strftime("%Y-%m").to_string(),
        }
    }
}

/// The clock hours that begin at or after `since` and before `until`.
pub(super) fn hours(since: Option<UnixNanos>, until: Option<UnixNanos>) -> std::ops::Range<u64> {
    let hour = |at: UnixNanos| at.0.div_ceil(HOUR_NANOS);
    since.map_or(0, hour)..until.map_or(u64::MAX / HOUR_NANOS, hour)
}

/// Begin of a clock hour in UTC, by RFC 3339.
pub(super) fn utc_hour(hour: u64) -> String {
    start(hour).strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// First instants of the UTC month that a clock hour lies in, and of the one after it.
pub(super) fn utc_month(hour: u64) -> (String, String) {
    let first = start(hour).to_zoned(TimeZone::UTC).date().first_of_month();
    let next = first.last_of_month().tomorrow().expect("clock hours end in 2554");
    let text = |date: Date| date.strftime("%Y-%m-%dT00:00:00Z").to_string();
    (text(first), text(next))
}

/// The UTC month that a clock hour lies in, counted from January 1970.
pub(super) fn month_of(hour: u64) -> u64 {
    let date = start(hour).to_zoned(TimeZone::UTC).date();
    let months = (i64::from(date.year()) - 1970) * 12 + i64::from(date.month()) - 1;
    u64::try_from(months).expect("clock hours begin in 1970")
}

/// The clock hours of a UTC month, so counted.
pub(super) fn month_hours(month: u64) -> std::ops::Range<u64> {
    let first = |month: u64| {
        let year = i16::try_from(1970 + month / 12).expect("clock hours end in 2554");
        let date = Date::new(year, i8::try_from(month % 12 + 1).expect("at most 12"), 1);
        let date = date.expect("every month has a first day");
        let time = date.to_zoned(TimeZone::UTC).expect("years of four digits").timestamp();
        u64::try_from(time.as_second() / 3600).expect("from 1970 on")
    };
    first(month)..first(month + 1)
}

fn start(hour: u64) -> Timestamp {
    let seconds = i64::try_from(hour.saturating_mul(3600)).unwrap_or(i64::MAX);
    Timestamp::from_second(seconds).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hours_lie_in_the_days_and_months_of_their_zone() {
        let check = |zone: &str, hour: u64, labels: [&str; 3]| {
            let calendar = Calendar::named(zone).unwrap();
            let got = [Part::Month, Part::Day, Part::Hour].map(|part| calendar.label(part, hour));
            assert_eq!(got, labels, "{zone}");
        };
        check("UTC", 0, ["1970-01", "1970-01-01", "1970-01-01T00:00:00Z"]);
        check("UTC", 264_383, ["2000-02", "2000-02-28", "2000-02-28T23:00:00Z"]);
        check("UTC", 264_384, ["2000-02", "2000-02-29", "2000-02-29T00:00:00Z"]);
        check("UTC", 1_140_984, ["2100-03", "2100-03-01", "2100-03-01T00:00:00Z"]);
        // 2026-03-29, when clocks in Berlin go from 2 to 3.
        check("Europe/Berlin", 492_984, ["2026-03", "2026-03-29", "2026-03-29T01:00:00+01:00"]);
        check("Europe/Berlin", 492_985, ["2026-03", "2026-03-29", "2026-03-29T03:00:00+02:00"]);
        // Half an hour off: the hour that begins at 23:30 is the old day's.
        check("Asia/Kolkata", 18, ["1970-01", "1970-01-01", "1970-01-01T23:30:00+05:30"]);
        check("Asia/Kolkata", 19, ["1970-01", "1970-01-02", "1970-01-02T00:30:00+05:30"]);
        assert_eq!(utc_month(264_384), ("2000-02-01T00:00:00Z".into(), "2000-03-01T00:00:00Z".into()));
        assert_eq!(utc_month(498_000).1, "2026-11-01T00:00:00Z");
        assert_eq!((month_of(0), month_hours(0)), (0, 0..744));
        assert_eq!((month_of(264_383), month_of(264_384)), (361, 361));
        assert_eq!(month_hours(361), 263_712..264_408, "February of a leap year");
        assert!((360..700).all(|month| month_of(month_hours(month).start) == month));
    }

    #[test]
    fn times_are_dates_of_the_zone_or_name_their_own_offset() {
        let berlin = Calendar::named("Europe/Berlin").unwrap();
        let check = |text: &str, seconds: u64| {
            assert_eq!(berlin.instant(text), Ok(UnixNanos(seconds * 1_000_000_000)), "{text}");
        };
        check("2026-11-01", 1_793_487_600);
        check("2026-11-01T00:00:00Z", 1_793_491_200);
        check("2026-11-01T00:00:00+02:00", 1_793_484_000);
        assert_eq!(berlin.text(UnixNanos(1_793_487_600_123_456_789)), "2026-11-01T00:00:00.123456+01:00");
        for wrong in ["", "yesterday", "2026-13-01", "1969-12-31T23:59:59Z", "2026-11-01T08:00", "20261101"] {
            assert_eq!(berlin.instant(wrong), Err(CalendarError::Instant(wrong.into())), "{wrong:?}");
        }
        assert!(Calendar::named("Mars/Olympus").is_err());
        assert_eq!(berlin.name(), "Europe/Berlin");
    }

    #[test]
    fn a_span_has_the_hours_that_begin_in_it() {
        let hour = |count: u64| Some(UnixNanos(count * HOUR_NANOS));
        assert_eq!(hours(hour(5), hour(7)), 5..7);
        assert_eq!(hours(Some(UnixNanos(5 * HOUR_NANOS + 1)), Some(UnixNanos(7 * HOUR_NANOS + 1))), 6..8);
        assert_eq!(hours(None, hour(1)), 0..1);
        assert!(hours(None, None).contains(&498_000));
    }
}
