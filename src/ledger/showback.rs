//! The books hour by hour: each hour's roll-ups with their share of the house's money.
//!
//! Does: read house entries, bills and what runs, and hand out each clock hour complete.
//! Does not know: groups, formats.
//! Invariants: an hour's house money is split without remainder; rows + unallocated house + open = the bill.
//!
//! Fully loaded cost: the house money of each clock hour of a device is split over that hour's roll-up rows in
//! the proportion of their usage money, by prefix rounding in the order of their labels; within a row over its
//! parties in the same way. So every grouping has the same total, and any two agree where one refines the other.
//! An hour in which no line cost anything stays unallocated. The hour that still runs is split as it stands.
//! A request with status `error` costs its caller nothing: `house:error` pays.
//!
//! Days and months that the coarse roll-ups have say what their hours come to, shares included; so whoever does
//! not look at hours gets the same from them.

use std::collections::BTreeMap;
use std::ops::Range;

use rusqlite::Connection;

use super::calendar::{month_hours, month_of};
use super::coarse::{self, DAY_HOURS, Loaded};
use super::entry::{Amounts, CAP_OVERRUN, DISCOUNT, ERROR, ROUNDING};
use super::price::mul_div;
use super::report::Balance;
use super::rollup::{self, Dimensions, Label};
use super::rows::{self, wide};
use super::store::SqlResult;
use super::sums::Sums;
use crate::request::Finish;
use crate::units::{BlockNanos, DeviceNanos, Picos};

/// The first condition is that of the index of closes. `CROSS` keeps the tables in this order: the database would
/// rather read all entries, nearly all of which are of receipts.
const CLOSES: &str =
    "SELECT rates.currency, epochs.device, transactions.hour, transactions.kind, accounts.name,
    entries.device_ns, entries.block_ns_hi, entries.block_ns_lo, entries.picos
    FROM epochs CROSS JOIN transactions ON transactions.epoch = epochs.id AND transactions.kind <> 'receipt'
    AND transactions.hour >= ?1 AND transactions.hour < ?2
    CROSS JOIN entries ON entries.tx = transactions.id AND entries.side = 'debit'
    JOIN accounts ON accounts.id = entries.account JOIN rates ON rates.version = epochs.rate_version";

/// A roll-up row of an hour.
#[derive(Debug, Clone, Copy)]
pub(super) struct HourRow {
    /// Its dimension's place.
    pub(super) dimension: usize,
    pub(super) sums: Sums,
    /// What it carries of the house. Nothing where the house pays for the row itself.
    pub(super) share: Picos,
}

/// Amounts of an hour by device and account.
pub(super) type House = BTreeMap<(usize, String), Amounts>;

/// All of one clock hour, or of more of them together.
pub(super) struct Hour<'a> {
    /// The first one.
    pub(super) hour: u64,
    /// A UTC day or month of hours, as far as the coarse roll-ups go.
    pub(super) is_coarse: bool,
    pub(super) rows: &'a [HourRow],
    pub(super) house: &'a House,
    /// House money that no row carries, by device.
    pub(super) unallocated: &'a [(usize, Picos)],
}

/// What may be handed out together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    Hour,
    /// Of UTC, where the coarse roll-ups have it.
    Day,
    Month,
}

impl Unit {
    /// The days of this unit that lie between two clock hours. Where `end` is the `last` hour that there is, its
    /// own unit counts as a whole one.
    fn days(self, from: u64, end: u64, last: bool) -> Range<u64> {
        let day = |month: u64| month_hours(month).start / DAY_HOURS;
        match self {
            Self::Hour => 0..0,
            Self::Day => {
                from.div_ceil(DAY_HOURS)..if last { end.div_ceil(DAY_HOURS) } else { end / DAY_HOURS }
            }
            Self::Month => {
                let up = |hour: u64| month_of(hour) + u64::from(month_hours(month_of(hour)).start < hour);
                day(up(from))..day(if last { up(end) } else { month_of(end) })
            }
        }
    }

    /// The clock hours of the unit in which a day lies.
    fn hours(self, day: u64) -> Range<u64> {
        let hour = day * DAY_HOURS;
        match self {
            Self::Month => month_hours(month_of(hour)),
            Self::Hour | Self::Day => hour..hour + DAY_HOURS,
        }
    }
}

/// Some clock hours of the ledger.
pub(super) struct Showback {
    hours: Range<u64>,
    whole: bool,
    pub(super) dimensions: Dimensions,
    /// Currency and device.
    pub(super) devices: Vec<(String, String)>,
    /// The device of each dimension, and whether the house pays for it.
    device_of_dimension: Vec<usize>,
    is_error: Vec<bool>,
    /// The latest size of a block of the KV pool, by device.
    bytes_per_block: BTreeMap<String, u64>,
    house: BTreeMap<u64, House>,
    pub(super) balances: BTreeMap<String, Balance>,
}

impl Showback {
    /// Reads all but the roll-ups. `whole`: the hours are all that there are.
    pub(super) fn read(connection: &Connection, hours: Range<u64>, whole: bool) -> SqlResult<Self> {
        let mut showback = Self {
            hours,
            whole,
            dimensions: Dimensions::read(connection)?,
            devices: Vec::new(),
            device_of_dimension: Vec::new(),
            is_error: Vec::new(),
            bytes_per_block: BTreeMap::new(),
            house: BTreeMap::new(),
            balances: BTreeMap::new(),
        };
        for place in 0..showback.dimensions.sorted.len() {
            let dimension = &showback.dimensions.sorted[place];
            let (currency, device) =
                (dimension.label(Label::Currency).to_owned(), dimension.label(Label::Device).to_owned());
            let is_error = dimension.label(Label::Status) == Finish::Error.as_str();
            let device = showback.device(currency, device);
            showback.device_of_dimension.push(device);
            showback.is_error.push(is_error);
        }
        showback.closes(connection)?;
        showback.standing(connection)?;
        Ok(showback)
    }

    pub(super) fn is_error(&self, row: &HourRow) -> bool {
        self.is_error[row.dimension]
    }

    /// The place of a row's device.
    pub(super) fn device_of(&self, row: &HourRow) -> usize {
        self.device_of_dimension[row.dimension]
    }

    /// Of a device's latest KV pool; 0 where it never had one.
    pub(super) fn bytes_per_block(&self, device: usize) -> u64 {
        self.bytes_per_block.get(&self.devices[device].1).copied().unwrap_or(0)
    }

    fn device(&mut self, currency: String, device: String) -> usize {
        let name = (currency, device);
        self.devices.iter().position(|known| *known == name).unwrap_or_else(|| {
            self.devices.push(name);
            self.devices.len() - 1
        })
    }

    fn balance(&mut self, device: usize) -> &mut Balance {
        self.balances.entry(self.devices[device].0.clone()).or_default()
    }

    fn add_house(&mut self, hour: u64, device: usize, account: &str, amounts: Amounts) {
        let of_hour = self.house.entry(hour).or_default();
        *of_hour.entry((device, account.to_owned())).or_default() += amounts;
    }

    /// What closes posted in these hours: the house, and the bills.
    fn closes(&mut self, connection: &Connection) -> SqlResult<()> {
        let mut query = connection.prepare(CLOSES)?;
        let mut rows = query.query([self.hours.start, self.hours.end])?;
        while let Some(row) = rows.next()? {
            let hour = row.get(2)?;
            let device = self.device(row.get(0)?, row.get(1)?);
            let money = Picos(i128::from(row.get::<_, i64>(8)?));
            if row.get_ref(3)?.as_str()? == "bill" {
                self.balance(device).bill += money;
                continue;
            }
            let amounts = Amounts { time: DeviceNanos(row.get(5)?), kv: BlockNanos(wide(row, 6)?), money };
            self.add_house(hour, device, row.get_ref(4)?.as_str()?, amounts);
        }
        Ok(())
    }

    /// What the running epochs have not posted yet, in the hours in which they stand; and blocks' sizes.
    fn standing(&mut self, connection: &Connection) -> SqlResult<()> {
        for row in rows::epochs(connection)? {
            if let Some(pool) = row.pool {
                self.bytes_per_block.insert(row.epoch.device.clone(), pool.bytes_per_block);
            }
            if row.end.is_some() {
                continue;
            }
            let Some(checkpoint) = rows::checkpoint(connection, &row)? else { continue };
            if !self.hours.contains(&checkpoint.hour) {
                continue;
            }
            let device = self.device(row.epoch.rate.currency().to_owned(), row.epoch.device.clone());
            let posted = rows::posted(connection, row.epoch.id)?;
            let unbilled = row.epoch.rate.bill(posted.at, checkpoint.snapshot.now);
            let standing = checkpoint.books(row.epoch, posted).standing();
            let balance = self.balance(device);
            balance.bill += unbilled;
            balance.open += standing.open.money;
            for (account, amounts) in standing.unposted {
                self.add_house(checkpoint.hour, device, &account, amounts);
            }
            let rounding = Amounts { money: standing.rounding, ..Amounts::default() };
            self.add_house(checkpoint.hour, device, ROUNDING, rounding);
        }
        Ok(())
    }

    /// Hands out every hour that has something, in order, once.
    pub(super) fn walk_hours(
        &mut self,
        connection: &Connection,
        take: impl FnMut(&Self, &Hour<'_>) -> SqlResult<()>,
    ) -> SqlResult<()> {
        self.walk(connection, Unit::Hour, |_| false, take)
    }

    /// The same, but hours that make up a unit are handed out as one where they are `alike`.
    pub(super) fn walk(
        &mut self,
        connection: &Connection,
        unit: Unit,
        alike: impl Fn(Range<u64>) -> bool,
        take: impl FnMut(&Self, &Hour<'_>) -> SqlResult<()>,
    ) -> SqlResult<()> {
        let houses = std::mem::take(&mut self.house);
        let (dimensions, asked) = (self.dimensions.clone(), self.hours.clone());
        let mut walk = Walk { showback: self, connection, dimensions, houses, take };
        let until = coarse::until(connection, unit)?;
        let end = asked.end.min(until);
        let days = unit.days(asked.start, end, end == until);
        let mut at = asked.start;
        if days.start < days.end {
            walk.hours(at..days.start * DAY_HOURS)?;
            walk.days(days.clone(), unit, until, &alike)?;
            at = until.min(days.end * DAY_HOURS);
        }
        walk.hours(at..asked.end)?;
        walk.houses_before(u64::MAX)?;
        if !self.whole {
            // What is missing is the work that was begun in these hours but did not end in them, less that which
            // ended in them but was begun before.
            self.balances
                .values_mut()
                .for_each(|sum| sum.open = Picos(sum.bill.0 - sum.usage.0 - sum.house.0));
        }
        Ok(())
    }

    /// Adds rows and the house of some hours to the balances; `house` gets what it pays of the rows. Gives the
    /// money of the house and of the usage by device.
    fn balance_of(&mut self, rows: &[HourRow], house: &mut House) -> BTreeMap<usize, (Picos, Picos)> {
        let mut money: BTreeMap<usize, (Picos, Picos)> = BTreeMap::new();
        for row in rows {
            let device = self.device_of(row);
            if self.is_error(row) {
                let amounts = Amounts { time: row.sums.device, kv: row.sums.kv, money: row.sums.money() };
                *house.entry((device, ERROR.to_owned())).or_default() += amounts;
            } else {
                money.entry(device).or_default().1 += row.sums.money();
                for (account, money) in [(CAP_OVERRUN, row.sums.overrun), (DISCOUNT, row.sums.discount)] {
                    if money > Picos::ZERO {
                        let amounts = Amounts { money, ..Amounts::default() };
                        *house.entry((device, account.to_owned())).or_default() += amounts;
                    }
                }
            }
        }
        for ((device, _), amounts) in &*house {
            money.entry(*device).or_default().0 += amounts.money;
        }
        for (&device, &(house, usage)) in &money {
            let balance = self.balance(device);
            balance.house += house;
            balance.usage += usage;
        }
        money
    }
}

/// A walk over some hours, in their order.
struct Walk<'a, F> {
    showback: &'a mut Showback,
    connection: &'a Connection,
    dimensions: Dimensions,
    /// Of hours that were not handed out yet.
    houses: BTreeMap<u64, House>,
    take: F,
}

impl<F: FnMut(&Showback, &Hour<'_>) -> SqlResult<()>> Walk<'_, F> {
    fn hours(&mut self, hours: Range<u64>) -> SqlResult<()> {
        if hours.is_empty() {
            return Ok(());
        }
        let dimensions = std::mem::take(&mut self.dimensions);
        rollup::each_hour(self.connection, &dimensions, hours, |hour, rows| {
            self.houses_before(hour)?;
            let house = self.houses.remove(&hour).unwrap_or_default();
            self.hour(hour, rows, house)
        })?;
        self.dimensions = dimensions;
        Ok(())
    }

    /// Hours without rows.
    fn houses_before(&mut self, hour: u64) -> SqlResult<()> {
        while let Some(first) = self.houses.first_entry().filter(|first| *first.key() < hour) {
            let (earlier, house) = first.remove_entry();
            self.hour(earlier, &[], house)?;
        }
        Ok(())
    }

    fn days(
        &mut self,
        days: Range<u64>,
        unit: Unit,
        until: u64,
        alike: &impl Fn(Range<u64>) -> bool,
    ) -> SqlResult<()> {
        let dimensions = self.dimensions.clone();
        let mut hours = 0..0;
        let mut sums = vec![None; dimensions.sorted.len()];
        coarse::each_day(self.connection, &dimensions, days, |day, dimension, loaded| {
            if day * DAY_HOURS >= hours.end {
                self.unit(hours.clone(), &mut sums, alike)?;
                hours = unit.hours(day);
                hours.end = hours.end.min(until);
            }
            *sums[dimension].get_or_insert_with(Loaded::default) += loaded;
            Ok(())
        })?;
        self.unit(hours, &mut sums, alike)
    }

    /// Hands out the sums of some hours, by dimension, and takes them away.
    fn unit(
        &mut self,
        hours: Range<u64>,
        sums: &mut [Option<Loaded>],
        alike: &impl Fn(Range<u64>) -> bool,
    ) -> SqlResult<()> {
        if hours.is_empty() {
            return Ok(());
        }
        let taken = sums.iter_mut().enumerate();
        let rows: Vec<HourRow> = taken
            .filter_map(|(dimension, sums)| {
                sums.take().map(|Loaded { sums, share }| HourRow { dimension, sums, share })
            })
            .collect();
        if !alike(hours.clone()) {
            return self.hours(hours);
        }
        self.houses_before(hours.start)?;
        let mut house = House::new();
        while let Some(first) = self.houses.first_entry().filter(|first| *first.key() < hours.end) {
            for (account, amounts) in first.remove() {
                *house.entry(account).or_default() += amounts;
            }
        }
        let mut left: BTreeMap<usize, Picos> = BTreeMap::new();
        for (device, (house, _)) in self.showback.balance_of(&rows, &mut house) {
            left.insert(device, house);
        }
        for row in &rows {
            let left = left.get_mut(&self.showback.device_of(row)).expect("its money was added up");
            *left = *left - row.share;
        }
        // What no row carries is that of hours without usage.
        let unallocated: Vec<_> = left.into_iter().filter(|(_, money)| *money != Picos::ZERO).collect();
        for (device, money) in &unallocated {
            self.showback.balance(*device).unallocated += *money;
        }
        let unit = Hour {
            hour: hours.start,
            is_coarse: true,
            rows: &rows,
            house: &house,
            unallocated: &unallocated,
        };
        (self.take)(self.showback, &unit)
    }

    fn hour(&mut self, hour: u64, rolled_up: &[(usize, Sums)], mut house: House) -> SqlResult<()> {
        let showback = &mut *self.showback;
        let mut rows: Vec<HourRow> = rolled_up
            .iter()
            .map(|(dimension, sums)| HourRow { dimension: *dimension, sums: *sums, share: Picos::ZERO })
            .collect();
        let money = showback.balance_of(&rows, &mut house);
        let mut unallocated = Vec::new();
        for (&device, &(house, usage)) in &money {
            if usage == Picos::ZERO {
                showback.balance(device).unallocated += house;
                unallocated.push((device, house));
            }
        }
        // Rows are in the order of their labels, those of a device next to each other.
        for of_device in rows.chunk_by_mut(|a, b| showback.device_of(a) == showback.device_of(b)) {
            let (house, usage) = money[&showback.device_of(&of_device[0])];
            if usage == Picos::ZERO {
                continue;
            }
            let mut split = Split::new(house, usage);
            for row in of_device {
                if !showback.is_error[row.dimension] {
                    row.share = split.next(row.sums.money());
                }
            }
            assert_eq!(split.given, house, "an hour's house money is split without remainder");
        }
        let hour = Hour { hour, is_coarse: false, rows: &rows, house: &house, unallocated: &unallocated };
        (self.take)(showback, &hour)
    }
}

/// Prefix rounding: hands out a whole in parts that are proportional to weights, and leaves nothing over.
pub(super) struct Split {
    whole: Picos,
    weights: Picos,
    before: Picos,
    given: Picos,
}

impl Split {
    /// `weights`: the sum of all to come, more than zero unless the whole is zero.
    pub(super) fn new(whole: Picos, weights: Picos) -> Self {
        Self { whole, weights, before: Picos::ZERO, given: Picos::ZERO }
    }

    pub(super) fn next(&mut self, weight: Picos) -> Picos {
        if self.whole == Picos::ZERO {
            return Picos::ZERO;
        }
        self.before += weight;
        let positive = |money: Picos| u128::try_from(money.0).expect("entries hold nothing negative");
        let (quotient, _) = mul_div(positive(self.whole), positive(self.before), positive(self.weights));
        let until = Picos(i128::try_from(quotient).expect("a part is not more than the whole"));
        let part = until - self.given;
        self.given = until;
        part
    }
}

#[cfg(test)]
mod tests {
    use super::super::store::{FILE, Store};
    use super::*;

    #[test]
    fn closes_are_found_without_looking_at_receipts() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join(FILE)).unwrap();
        let mut query = store.connection().prepare(&format!("EXPLAIN QUERY PLAN {CLOSES}")).unwrap();
        let steps = query.query_map([0, 1], |row| row.get::<_, String>(3)).unwrap();
        let plan = steps.map(Result::unwrap).collect::<Vec<_>>().join("; ");
        assert!(plan.contains("closes_by_epoch") && plan.contains("SEARCH entries"), "{plan}");
    }
}
