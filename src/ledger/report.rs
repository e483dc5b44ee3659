//! What was spent, by whom and on what: sums over the receipts, with the house accounts apart.
//!
//! Does: read one snapshot beside a running server; usage cost and fully loaded cost.
//! Does not know: how to print (`render.rs`), who may see it.
//! Invariants: sums are ours, in integers; rows + unallocated house + open = the bill.
//!
//! Fully loaded cost: the house money of each clock hour of a device is split over that hour's receipt
//! lines in the proportion of their usage money, by prefix rounding in the order of request ids. An hour
//! without lines that cost anything stays unallocated. The hour that is still running is split as it
//! stands. A request with status `error` is counted, but costs its caller nothing: `house:error` pays.

use std::collections::BTreeMap;
use std::path::Path;

use rusqlite::Connection;

use super::LedgerError;
use super::entry::{Amounts, ERROR, ROUNDING};
use super::price::mul_div;
use super::rows::{self, wide};
use super::store::SqlResult;
use crate::units::{BlockNanos, DeviceNanos, Picos};

/// What rows are grouped by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    Model,
    /// UTC day in which the request ended.
    Day,
    Tenant,
    User,
    Endpoint,
    Status,
}

impl By {
    pub const ALL: [Self; 6] =
        [Self::Model, Self::Day, Self::Tenant, Self::User, Self::Endpoint, Self::Status];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Day => "day",
            Self::Tenant => "tenant",
            Self::User => "user",
            Self::Endpoint => "endpoint",
            Self::Status => "status",
        }
    }

    /// By its name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|by| by.as_str() == name)
    }
}

/// Sums over the receipts of one group.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Spend {
    pub requests: u64,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub completion_tokens: u64,
    pub device_time: DeviceNanos,
    pub kv_byte_nanos: u128,
    /// What receipts say.
    pub usage_cost: Picos,
    /// With the house's share of each hour.
    pub loaded_cost: Picos,
}

/// One row: the group's values in the order asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    pub currency: String,
    pub group: Vec<String>,
    pub spend: Spend,
}

/// One house account, of all devices under one currency.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HouseRow {
    pub currency: String,
    pub account: String,
    pub time: DeviceNanos,
    pub kv: BlockNanos,
    pub money: Picos,
}

/// Money of one currency: `bill = usage + house + open`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Balance {
    pub bill: Picos,
    pub usage: Picos,
    pub house: Picos,
    /// Of requests that have not ended.
    pub open: Picos,
    /// The part of `house` that no hour's requests carry.
    pub unallocated: Picos,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    pub by: Vec<By>,
    pub rows: Vec<Row>,
    pub house: Vec<HouseRow>,
    /// By currency.
    pub balances: BTreeMap<String, Balance>,
}

/// Reads the ledger in a data directory; a server may be running.
///
/// # Errors
/// When there is no ledger or it cannot be read.
pub fn report(data_dir: &Path, by: &[By]) -> Result<Report, LedgerError> {
    let (mut connection, path) = rows::open_for_reading(data_dir)?;
    rows::in_snapshot(&mut connection, &path, |connection| read(connection, by))
}

/// A receipt line that costs something, waiting for its hour's house money.
struct Share {
    request: String,
    usage: Picos,
    group: (String, Vec<String>),
}

type DeviceHour = (String, String, u64);

#[derive(Default)]
struct Reading {
    groups: BTreeMap<(String, Vec<String>), Spend>,
    house: BTreeMap<(String, String), Amounts>,
    house_hours: BTreeMap<DeviceHour, Picos>,
    shares: BTreeMap<DeviceHour, Vec<Share>>,
    balances: BTreeMap<String, Balance>,
}

fn read(connection: &Connection, by: &[By]) -> SqlResult<Report> {
    let mut reading = Reading::default();
    reading.lines(connection, by)?;
    reading.house_entries(connection)?;
    reading.standing(connection)?;
    reading.split_house();
    let rows = reading.groups.into_iter().map(|((currency, group), spend)| Row { currency, group, spend });
    let house = reading.house.into_iter().map(|((currency, account), amounts)| HouseRow {
        currency,
        account,
        time: amounts.time,
        kv: amounts.kv,
        money: amounts.money,
    });
    Ok(Report { by: by.to_vec(), rows: rows.collect(), house: house.collect(), balances: reading.balances })
}

impl Reading {
    fn lines(&mut self, connection: &Connection, by: &[By]) -> SqlResult<()> {
        let mut query = connection.prepare(
            "SELECT receipts.currency, transactions.hour, receipt_lines.device, receipts.request_id,
             receipts.model, receipts.finished_at, receipts.tenant, receipts.user, receipts.endpoint,
             receipts.status, receipt_lines.line, receipts.prompt_tokens, receipts.cached_tokens,
             receipts.completion_tokens, receipt_lines.device_ns, receipt_lines.block_ns_hi,
             receipt_lines.block_ns_lo, receipts.bytes_per_block, receipt_lines.time_picos,
             receipt_lines.memory_picos
             FROM receipt_lines JOIN receipts ON receipts.tx = receipt_lines.tx
             JOIN transactions ON transactions.id = receipts.tx",
        )?;
        let mut rows = query.query([])?;
        while let Some(row) = rows.next()? {
            let text = |column: usize| row.get::<_, String>(column);
            let mut group = Vec::with_capacity(by.len());
            for by in by {
                group.push(match by {
                    By::Model => text(4)?,
                    By::Day => day(row.get(5)?),
                    By::Tenant => text(6)?,
                    By::User => row.get::<_, Option<String>>(7)?.unwrap_or_default(),
                    By::Endpoint => text(8)?,
                    By::Status => text(9)?,
                });
            }
            let (currency, hour, device) = (text(0)?, row.get(1)?, text(2)?);
            let group = (currency.clone(), group);
            let spend = self.groups.entry(group.clone()).or_default();
            if row.get::<_, i64>(10)? == 0 {
                spend.requests += 1;
                spend.prompt_tokens += row.get::<_, u64>(11)?;
                spend.cached_tokens += row.get::<_, u64>(12)?;
                spend.completion_tokens += row.get::<_, u64>(13)?;
            }
            let usage = Picos(i128::from(row.get::<_, i64>(18)?) + i128::from(row.get::<_, i64>(19)?));
            let (time, kv) = (DeviceNanos(row.get(14)?), BlockNanos(wide(row, 15)?));
            if text(9)? == "error" {
                let amounts = Amounts { time, kv, money: usage };
                self.add_house(&(currency, device, hour), ERROR.to_owned(), amounts);
                continue;
            }
            spend.device_time += time;
            spend.kv_byte_nanos += kv.0.saturating_mul(u128::from(row.get::<_, u64>(17)?));
            spend.usage_cost += usage;
            spend.loaded_cost += usage;
            self.balances.entry(currency.clone()).or_default().usage += usage;
            if usage > Picos::ZERO {
                let share = Share { request: text(3)?, usage, group };
                self.shares.entry((currency, device, hour)).or_default().push(share);
            }
        }
        Ok(())
    }

    fn add_house(&mut self, at: &DeviceHour, account: String, amounts: Amounts) {
        *self.house_hours.entry(at.clone()).or_default() += amounts.money;
        *self.house.entry((at.0.clone(), account)).or_default() += amounts;
        self.balances.entry(at.0.clone()).or_default().house += amounts.money;
    }

    /// What was posted at closes; what requests with status `error` used is in their lines.
    fn house_entries(&mut self, connection: &Connection) -> SqlResult<()> {
        let mut query = connection.prepare(
            "SELECT rates.currency, epochs.device, transactions.hour, accounts.name, entries.device_ns,
             entries.block_ns_hi, entries.block_ns_lo, entries.picos
             FROM transactions JOIN entries ON entries.tx = transactions.id
             JOIN accounts ON accounts.id = entries.account
             JOIN epochs ON epochs.id = transactions.epoch JOIN rates ON rates.version = epochs.rate_version
             WHERE transactions.kind = 'house' AND entries.side = 'debit'",
        )?;
        let mut rows = query.query([])?;
        while let Some(row) = rows.next()? {
            let amounts = Amounts {
                time: DeviceNanos(row.get(4)?),
                kv: BlockNanos(wide(row, 5)?),
                money: Picos(i128::from(row.get::<_, i64>(7)?)),
            };
            self.add_house(&(row.get(0)?, row.get(1)?, row.get(2)?), row.get(3)?, amounts);
        }
        Ok(())
    }

    /// Bills, and what the running epochs have not posted yet.
    fn standing(&mut self, connection: &Connection) -> SqlResult<()> {
        for row in rows::epochs(connection)? {
            let currency = row.epoch.rate.currency().to_owned();
            if let Some(end) = row.end {
                let bill = row.epoch.rate.bill(DeviceNanos::ZERO, end);
                self.balances.entry(currency).or_default().bill += bill;
                continue;
            }
            let Some(checkpoint) = rows::checkpoint(connection, &row)? else { continue };
            let at = (currency, row.epoch.device.clone(), checkpoint.hour);
            let posted = rows::posted(connection, row.epoch.id)?;
            let standing = checkpoint.books(row.epoch, posted).standing();
            let balance = self.balances.entry(at.0.clone()).or_default();
            balance.bill += standing.bill;
            balance.open += standing.open.money;
            for (account, amounts) in standing.unposted {
                self.add_house(&at, account, amounts);
            }
            let rounding = Amounts { money: standing.rounding, ..Amounts::default() };
            self.add_house(&at, ROUNDING.to_owned(), rounding);
        }
        Ok(())
    }

    fn split_house(&mut self) {
        for (at, house) in &self.house_hours {
            let Some(shares) = self.shares.get_mut(at) else {
                self.balances.entry(at.0.clone()).or_default().unallocated += *house;
                continue;
            };
            shares.sort_by(|a, b| a.request.cmp(&b.request));
            let total: Picos = shares.iter().map(|share| share.usage).sum();
            let (mut before, mut given) = (Picos::ZERO, Picos::ZERO);
            for share in shares {
                before += share.usage;
                let until = portion(*house, before, total);
                let spend = self.groups.get_mut(&share.group).expect("every share's group was made with it");
                spend.loaded_cost += until - given;
                given = until;
            }
            assert_eq!(given, *house, "an hour's house money is split without remainder");
        }
    }
}

/// `floor(house * part / whole)`.
fn portion(house: Picos, part: Picos, whole: Picos) -> Picos {
    let positive = |money: Picos| u128::try_from(money.0).expect("entries hold nothing negative");
    let (quotient, _) = mul_div(positive(house), positive(part), positive(whole));
    Picos(i128::try_from(quotient).expect("a part is not more than the whole"))
}

/// The UTC day as YYYY-MM-DD. Civil-from-days after Howard Hinnant, "chrono-Compatible Low-Level Date
/// Algorithms".
fn day(wall: u64) -> String {
    let days = wall / 86_400_000_000_000 + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let date = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{date:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_civil() {
        let check = |seconds: u64, want: &str| assert_eq!(day(seconds * 1_000_000_000), want);
        check(0, "1970-01-01");
        check(86_399, "1970-01-01");
        check(951_782_400, "2000-02-29");
        check(1_767_225_599, "2025-12-31");
        check(1_767_225_600, "2026-01-01");
        check(4_107_542_400, "2100-03-01");
    }
}
