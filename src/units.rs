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

impl Picos {
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
