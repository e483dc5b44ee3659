//! Coarse roll-ups: hourly ones, with what they carry of the house, added up by UTC day, and by UTC month where
//! they are by user and task, which are as many in an hour as requests.
//!
//! Does: add hours that have ended, take them off again where the wall clock was set back, read them, check them.
//! Does not know: who asks, groups.
//! Invariants: they cover the hours before `coarse_until`, all of them, and say what the hourly ones come to.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use rusqlite::{CachedStatement, Connection, OptionalExtension, ToSql, Transaction, TransactionBehavior};

use super::calendar::{month_hours, month_of, utc_hour};
use super::parties::{self, Parties};
use super::rollup::{Dimensions, Sums};
use super::rows;
use super::showback::Showback;
use super::store::{SqlResult, Store};
use crate::units::Picos;

/// The tables; part of the schema since version 5.
pub(super) const SCHEMA: &str = include_str!("coarse.sql");
pub(super) const DAY_HOURS: u64 = 24;
/// More hours are not added at once, so that receipts need not wait long for it.
const ADDED_MAX: u64 = 24;
const RETRY: Duration = Duration::from_secs(60);

/// Sums of hours, and what they carry of the house.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Loaded {
    pub(super) sums: Sums,
    pub(super) share: Picos,
}

impl Loaded {
    fn read(row: &rusqlite::Row<'_>, column: usize) -> SqlResult<Self> {
        let (sums, share) = Sums::unpacked_with(row.get_ref(column)?.as_blob()?)
            .ok_or_else(|| rows::invalid(column, "no sums of a coarse roll-up"))?;
        Ok(Self { sums, share })
    }
}

impl std::ops::AddAssign for Loaded {
    fn add_assign(&mut self, other: Self) {
        self.sums += other.sums;
        self.share += other.share;
    }
}

/// The first clock hour that is not covered.
pub(super) fn until(connection: &Connection) -> SqlResult<u64> {
    connection.query_row("SELECT hour FROM coarse_until", [], |row| row.get(0))
}

/// How far they are, as a server's writer knows.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// The first hour that is not covered.
    until: u64,
    /// After a failure.
    retry_at: Option<Instant>,
}

impl Progress {
    /// Covers some more of the hours before `end`, in which nothing is booked any more.
    pub(super) fn extend(&mut self, store: &mut Store, end: u64) {
        if end <= self.until || self.retry_at.is_some_and(|at| Instant::now() < at) {
            return;
        }
        match extend(store.connection_mut(), end) {
            Ok(until) => *self = Self { until, retry_at: None },
            Err(error) => {
                tracing::warn!(%error, "the ledger's coarse roll-ups stay behind: long reports take longer");
                self.retry_at = Some(Instant::now() + RETRY);
            }
        }
    }
}

/// What some hours come to: by day and dimension's place, by month, dimension's place and party's place.
struct Coarse {
    dimensions: Dimensions,
    days: BTreeMap<(u64, usize), Loaded>,
    months: BTreeMap<(u64, usize, usize), Loaded>,
}

impl Coarse {
    fn of(connection: &Connection, hours: Range<u64>) -> SqlResult<Self> {
        let mut showback = Showback::read(connection, hours, false)?;
        let (mut days, mut months) = (BTreeMap::<_, Loaded>::new(), BTreeMap::<_, Loaded>::new());
        let mut names = Parties::default();
        showback.walk_hours(connection, |showback, hour| {
            for row in hour.rows {
                let loaded = Loaded { sums: row.sums, share: row.share };
                *days.entry((hour.hour / DAY_HOURS, row.dimension)).or_default() += loaded;
            }
            if hour.rows.is_empty() {
                return Ok(());
            }
            let month = month_of(hour.hour);
            let nothing = |_: &Parties, _: &[usize]| {};
            parties::split(connection, showback, hour, &mut names, nothing, |row, party, sums, share| {
                if let Some(party) = party {
                    let of_month = months.entry((month, row.dimension, party)).or_default();
                    *of_month += Loaded { sums: *sums, share };
                }
            })
        })?;
        Ok(Self { dimensions: showback.dimensions, days, months })
    }
}

/// Covers at most `ADDED_MAX` more of the hours before `end`. Gives the first hour that is not covered then.
pub(super) fn extend(connection: &mut Connection, end: u64) -> SqlResult<u64> {
    let from = until(connection)?;
    if from >= end {
        return Ok(from);
    }
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let until = add_hours(&transaction, from, end)?;
    transaction.commit()?;
    Ok(until)
}

fn add_hours(transaction: &Transaction<'_>, from: u64, end: u64) -> SqlResult<u64> {
    let first: Option<u64> =
        transaction.query_row("SELECT min(hour) FROM rollups WHERE hour >= ?1", [from], |row| row.get(0))?;
    // Hours without requests have nothing to add.
    let from = first.unwrap_or(end).min(end);
    let end = end.min(from + ADDED_MAX);
    let coarse = Coarse::of(transaction, from..end)?;
    let mut find =
        transaction.prepare_cached("SELECT sums FROM day_rollups WHERE day = ?1 AND dimension = ?2")?;
    let mut put = transaction.prepare_cached(
        "INSERT INTO day_rollups (day, dimension, sums) VALUES (?1, ?2, ?3)
         ON CONFLICT DO UPDATE SET sums = excluded.sums",
    )?;
    for ((day, dimension), loaded) in &coarse.days {
        let keys: [&dyn ToSql; 2] = [day, &coarse.dimensions.id(*dimension)];
        add(&mut find, &mut put, &keys, *loaded)?;
    }
    let mut find = transaction.prepare_cached(
        "SELECT sums FROM party_month_rollups WHERE month = ?1 AND dimension = ?2 AND party = ?3",
    )?;
    let mut put = transaction.prepare_cached(
        "INSERT INTO party_month_rollups (month, dimension, party, sums) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT DO UPDATE SET sums = excluded.sums",
    )?;
    for ((month, dimension, party), loaded) in &coarse.months {
        let keys: [&dyn ToSql; 3] = [month, &coarse.dimensions.id(*dimension), &(*party as i64)];
        add(&mut find, &mut put, &keys, *loaded)?;
    }
    transaction.execute("UPDATE coarse_until SET hour = ?1", [end])?;
    Ok(end)
}

fn add(
    find: &mut CachedStatement<'_>,
    put: &mut CachedStatement<'_>,
    keys: &[&dyn ToSql],
    mut loaded: Loaded,
) -> SqlResult<()> {
    if let Some(there) = find.query_row(keys, |row| Loaded::read(row, 0)).optional()? {
        loaded += there;
    }
    let packed = loaded.sums.packed_with(&[loaded.share]);
    put.execute(&*[keys, &[&packed]].concat()).map(drop)
}

/// Something is added to this hour, if to any: takes the months from its own on off again if it is covered.
pub(super) fn reopen(transaction: &Transaction<'_>, hour: Option<u64>) -> SqlResult<()> {
    let Some(hour) = hour else { return Ok(()) };
    if hour >= until(transaction)? {
        return Ok(());
    }
    let month = month_of(hour);
    let first = month_hours(month).start;
    tracing::info!(from = utc_hour(first), "the wall clock was set back: coarse roll-ups are made again");
    transaction.execute("DELETE FROM day_rollups WHERE day >= ?1", [first / DAY_HOURS])?;
    transaction.execute("DELETE FROM party_month_rollups WHERE month >= ?1", [month])?;
    transaction.execute("UPDATE coarse_until SET hour = min(hour, ?1)", [first]).map(drop)
}

/// Hands out the rows of these days, in the order of days: the day, the dimension's place and its sums.
pub(super) fn each_day(
    connection: &Connection,
    dimensions: &Dimensions,
    days: Range<u64>,
    mut take: impl FnMut(u64, usize, Loaded) -> SqlResult<()>,
) -> SqlResult<()> {
    let mut query = connection.prepare(
        "SELECT day, dimension, sums FROM day_rollups WHERE day >= ?1 AND day < ?2 ORDER BY day, dimension",
    )?;
    let mut rows = query.query([days.start, days.end])?;
    while let Some(row) = rows.next()? {
        take(row.get(0)?, dimensions.place(row.get(1)?)?, Loaded::read(row, 2)?)?;
    }
    Ok(())
}

/// A month's rows by dimension's place and party's id, those of a dimension next to each other.
pub(super) fn parties_of_month(
    connection: &Connection,
    dimensions: &Dimensions,
    month: u64,
) -> SqlResult<Vec<(usize, i64, Loaded)>> {
    let mut query = connection.prepare_cached(
        "SELECT dimension, party, sums FROM party_month_rollups WHERE month = ?1 ORDER BY dimension, party",
    )?;
    let rows = query
        .query_map([month], |row| Ok((dimensions.place(row.get(0)?)?, row.get(1)?, Loaded::read(row, 2)?)))?;
    rows.collect()
}

/// What differs from what the hourly roll-ups come to.
pub(super) fn check(connection: &Connection) -> SqlResult<Vec<String>> {
    let until = until(connection)?;
    let right = Coarse::of(connection, 0..until)?;
    let mut days = BTreeMap::new();
    each_day(connection, &right.dimensions, 0..u64::MAX >> 1, |day, dimension, loaded| {
        days.insert((day, dimension), loaded);
        Ok(())
    })?;
    let mut differences = Vec::new();
    let name = |(day, dimension): &(u64, usize)| {
        format!(
            "the day of {}, {}",
            utc_hour(day.saturating_mul(DAY_HOURS)),
            right.dimensions.sorted[*dimension]
        )
    };
    differ(&days, &right.days, name, &mut differences);
    let mut query = connection.prepare("SELECT DISTINCT month FROM party_month_rollups ORDER BY month")?;
    let written = query.query_map([], |row| row.get(0))?.collect::<SqlResult<Vec<u64>>>()?;
    let mut months = BTreeMap::new();
    for month in written {
        for (dimension, party, loaded) in parties_of_month(connection, &right.dimensions, month)? {
            let party = usize::try_from(party).map_err(|error| rows::invalid(1, error))?;
            months.insert((month, dimension, party), loaded);
        }
    }
    let name = |(month, dimension, party): &(u64, usize, usize)| {
        format!("month {month} since 1970, {}, party {party}", right.dimensions.sorted[*dimension])
    };
    differ(&months, &right.months, name, &mut differences);
    Ok(differences)
}

fn differ<K: Ord>(
    written: &BTreeMap<K, Loaded>,
    right: &BTreeMap<K, Loaded>,
    name: impl Fn(&K) -> String,
    differences: &mut Vec<String>,
) {
    for (key, loaded) in right {
        if written.get(key) != Some(loaded) {
            let is = written.get(key);
            let what = name(key);
            differences.push(format!("coarse roll-up of {what}: {is:?} is written, {loaded:?} is right"));
        }
    }
    for key in written.keys().filter(|key| !right.contains_key(key)) {
        differences.push(format!("coarse roll-up of {} has no hourly roll-ups", name(key)));
    }
}
