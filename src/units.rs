//! Units as types: time, block-time, money, and the ids that travel with them.
//!
//! Integers only. No float is ever summed or billed, and arithmetic that would overflow or go
//! below zero stops the program: a wrong sum must never be written down.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Sub};

use serde::{Deserialize, Serialize};

macro_rules! quantity {
    ($(#[$doc:meta])* $name:ident, $int:ty) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $int);

        impl $name {
            pub const ZERO: Self = Self(0);
        }

        impl Add for $name {
            type Output = Self;
            fn add(self, other: Self) -> Self {
                Self(self.0.checked_add(other.0).expect(concat!(stringify!($name), " overflows")))
            }
        }

        impl Sub for $name {
            type Output = Self;
            fn sub(self, other: Self) -> Self {
                Self(self.0.checked_sub(other.0).expect(concat!(stringify!($name), " underflows")))
            }
        }

        impl AddAssign for $name {
            fn add_assign(&mut self, other: Self) {
                *self = *self + other;
            }
        }

        impl Sum for $name {
            fn sum<I: Iterator<Item = Self>>(parts: I) -> Self {
                parts.fold(Self::ZERO, Add::add)
            }
        }
    };
}

quantity!(
    /// Device time in nanoseconds: a duration charged to somebody, or an instant on the device's
    /// monotonic clock, counted from the start of the epoch.
    DeviceNanos,
    u64
);
quantity!(
    /// KV-cache memory times time: blocks x nanoseconds. Passes `i64` after a day at 100,000 blocks.
    BlockNanos,
    u128
);
quantity!(
    /// Money in 10^-12 of the currency's unit ($2.50 an hour = 694.44 pico-dollars a microsecond).
    Picos,
    i128
);
quantity!(
    /// Wall-clock time, nanoseconds since 1970-01-01T00:00:00Z. For people; never for measuring.
    UnixNanos,
    u64
);

impl DeviceNanos {
    /// Decimal seconds, nanosecond exact: `1.000000001`.
    #[must_use]
    pub fn seconds(self) -> String {
        format!("{}.{:09}", self.0 / 1_000_000_000, self.0 % 1_000_000_000)
    }

    /// For display and statistics only.
    #[must_use]
    pub fn as_secs_f64(self) -> f64 {
        self.0 as f64 / 1e9
    }
}

/// One unit of a currency, in picos.
const UNIT: i128 = 1_000_000_000_000;
const PLACES: usize = 12;

impl Picos {
    /// Most money that a setting may name: 10^15 units, far from where sums overflow.
    pub const SETTING_MAX: Self = Self(1_000_000_000_000_000 * UNIT);

    /// An amount as people write it, exactly: `25`, `2.50`, at most 12 places, not negative.
    ///
    /// # Errors
    /// Says what is wrong with the text, for people.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (whole, places) = text.split_once('.').unwrap_or((text, "0"));
        let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(whole) || !digits(places) {
            return Err(format!("{text:?} is not an amount such as 25 or 2.50"));
        }
        if places.len() > PLACES {
            return Err(format!("{text:?} has more than 12 decimal places"));
        }
        let too_large = || format!("{text:?} is too large; at most 10^15");
        let whole: i128 = whole.parse().map_err(|_| too_large())?;
        let places: i128 = format!("{places:0<PLACES$}").parse().map_err(|_| too_large())?;
        let picos = whole.checked_mul(UNIT).and_then(|picos| picos.checked_add(places));
        picos.map(Self).filter(|picos| *picos <= Self::SETTING_MAX).ok_or_else(too_large)
    }

    /// Decimal units of the currency with 12 places: `0.000001234567`.
    #[must_use]
    pub fn decimal(self) -> String {
        let sign = if self.0 < 0 { "-" } else { "" };
        let whole = self.0.unsigned_abs();
        format!("{sign}{}.{:012}", whole / 1_000_000_000_000, whole % 1_000_000_000_000)
    }

    /// For display only (`usage.cost`, gauges).
    #[must_use]
    pub fn as_f64(self) -> f64 {
        self.0 as f64 / 1e12
    }
}

impl BlockNanos {
    /// Byte-seconds as a decimal string, exact: block-ns times the bytes of a block over 10^9.
    #[must_use]
    pub fn byte_seconds(self, bytes_per_block: u64) -> String {
        let product = self.0.checked_mul(u128::from(bytes_per_block)).expect("byte-nanoseconds overflow");
        format!("{}.{:09}", product / 1_000_000_000, product % 1_000_000_000)
    }
}

/// A request's id, ours: UUIDv7 without dashes, so ids sort by time. Shown as `x-request-id`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RequestId(pub String);

impl RequestId {
    #[must_use]
    pub fn new() -> Self {
        Self(uuid::Uuid::now_v7().simple().to_string())
    }
}

impl Default for RequestId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the ledger gave out for an adopted request; the engine hands it back unread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ticket(pub u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_exactly_or_not_at_all() {
        for (text, picos) in [("0", 0), ("25", 25 * UNIT), ("2.50", 5 * UNIT / 2), ("0.000000000001", 1)] {
            assert_eq!(Picos::parse(text), Ok(Picos(picos)), "{text}");
        }
        assert_eq!(Picos::parse("1000000000000000"), Ok(Picos::SETTING_MAX));
        for text in
            ["", ".", "1.", ".5", "-1", "+1", "1e3", " 1", "0.0000000000001", "1000000000000001", "\u{661}"]
        {
            assert!(Picos::parse(text).is_err(), "{text:?}");
        }
        assert!(Picos::parse(&"9".repeat(60)).is_err());
    }
}
