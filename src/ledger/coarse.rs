//! Coarse roll-ups: hourly ones, with what they carry of the house, added up by UTC day, and by UTC month where
//! they are by user and task, which are as many in an hour as requests.
//!
//! Does: add hours that have ended, some rows at a time, as receipts wait for it; make them again where the wall clock
//! was set back; read them; check them.
//! Does not know: who asks, groups.
//! Invariants: they cover the hours before `coarse_until.hour`, all of them, and say what the hourly ones come to.
//! Rows that may have parts of the hours that are being added are not read meanwhile, nor are stale ones.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use rusqlite::{
    CachedStatement, Connection, OptionalExtension, ToSql, Transaction, TransactionBehavior, params,
};

use super::calendar::{month_hours, month_of, utc_hour};
use super::parties::{self, Parties};
use super::rollup::Dimensions;
use super::rows;
use super::showback::{Showback, Unit};
use super::store::{SqlResult, Store};
use super::sums::Sums;
use crate::units::Picos;

/// The tables; part of the schema since version 5, and since version 6 with what is being added.
pub(super) const SCHEMA: &str = include_str!("coarse.sql");
pub(super) const DAY_HOURS: u64 = 24;
/// Where a transaction took longer, the log says so.
const SLOW: Duration = Duration::from_millis(250);
const RETRY: Duration = Duration::from_secs(60);

/// What is done at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// So many are read together,
    pub(super) hours: u64,
    /// but no hour is added to so many rows.
    pub(super) read: usize,
    /// Rows that are written, or deleted, in one transaction.
    pub(super) written: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { hours: DAY_HOURS, read: 10_000, written: 4_000 }
    }
}

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

/// How far they are, as the database has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct State {
    /// The first clock hour that is not covered.
    until: u64,
    /// The hours before this one are being added; `until` where none is.
    adding: u64,
    /// So many of their rows are added.
    added: usize,
    /// Rows of the month of `until` and of later ones are of before the wall clock was set back.
    stale: bool,
}

impl State {
    fn read(connection: &Connection) -> SqlResult<Self> {
        let sql = "SELECT hour, adding, added, stale FROM coarse_until";
        connection.query_row(sql, [], |row| {
            Ok(Self { until: row.get(0)?, adding: row.get(1)?, added: row.get(2)?, stale: row.get(3)? })
        })
    }

    fn write(&self, transaction: &Transaction<'_>) -> SqlResult<()> {
        let sql = "UPDATE coarse_until SET hour = ?1, adding = ?2, added = ?3, stale = ?4";
        transaction.execute(sql, params![self.until, self.adding, self.added, self.stale]).map(drop)
    }

    /// Covered up to here, and nothing is being added.
    fn at(until: u64) -> Self {
        Self { until, adding: until, added: 0, stale: false }
    }
}

/// The first clock hour of which days (or months, with users and tasks) are not to be read.
pub(super) fn until(connection: &Connection, unit: Unit) -> SqlResult<u64> {
    let state = State::read(connection)?;
    Ok(match unit {
        Unit::Hour => 0,
        _ if state.added == 0 => state.until,
        Unit::Day => state.until / DAY_HOURS * DAY_HOURS,
        Unit::Month => month_hours(month_of(state.until)).start,
    })
}

/// How far they are, as a server's writer knows.
#[derive(Debug, Default)]
pub(super) struct Progress {
    bounds: Bounds,
    /// The first hour that is not covered.
    until: u64,
    /// What is being added, as long as it is known.
    adding: Option<Adding>,
    /// After a failure.
    retry_at: Option<Instant>,
}

impl Progress {
    #[cfg(test)]
    pub(super) fn bounded(bounds: Bounds) -> Self {
        Self { bounds, ..Self::default() }
    }

    /// Goes one step towards covering the hours before `end`, in which nothing is booked any more.
    pub(super) fn extend(&mut self, store: &mut Store, end: u64) {
        if end <= self.until || self.retry_at.is_some_and(|at| Instant::now() < at) {
            return;
        }
        self.retry_at = None;
        if let Err(error) = self.step(store.connection_mut(), end) {
            tracing::warn!(%error, "the ledger's coarse roll-ups stay behind: long reports take longer");
            self.retry_at = Some(Instant::now() + RETRY);
        }
    }

    /// Writes or deletes some rows in one transaction. Gives the first hour that is not covered then.
    pub(super) fn step(&mut self, connection: &mut Connection, end: u64) -> SqlResult<u64> {
        let state = State::read(connection)?;
        self.until = state.until;
        if state.stale {
            self.adding = None;
            clear(connection, state, self.bounds.written)?;
        } else if state.until < end {
            let known = self.adding.take().filter(|adding| adding.state == state);
            let mut adding = match known {
                Some(adding) => adding,
                None => Adding::read(connection, state, end, self.bounds)?,
            };
            self.until = adding.write(connection, self.bounds.written)?;
            // Hours of which nothing is in the tables yet are read again: something may be booked to them.
            self.adding = Some(adding).filter(|adding| adding.state.added > 0);
        }
        Ok(self.until)
    }
}

/// Hours on their way into the tables: the rows in their order, whose first `state.added` are in.
#[derive(Debug)]
struct Adding {
    state: State,
    dimensions: Dimensions,
    days: Vec<((u64, usize), Loaded)>,
    months: Vec<((u64, usize, usize), Loaded)>,
}

impl Adding {
    /// The hours that were begun, or else the next ones before `end`.
    fn read(connection: &Connection, mut state: State, end: u64, bounds: Bounds) -> SqlResult<Self> {
        let start = Instant::now();
        if state.added == 0 {
            state.adding = next_hours(connection, state.until, end, bounds)?;
        }
        let coarse = Coarse::of(connection, state.until..state.adding)?;
        let Coarse { dimensions, days, months } = coarse;
        let adding = Self {
            state,
            dimensions,
            days: days.into_iter().collect(),
            months: months.into_iter().collect(),
        };
        slow("reading", start, adding.rows());
        Ok(adding)
    }

    fn rows(&self) -> usize {
        self.days.len() + self.months.len()
    }

    /// Adds at most so many rows in one transaction. Gives the first hour that is not covered then.
    fn write(&mut self, connection: &mut Connection, most: usize) -> SqlResult<u64> {
        let start = Instant::now();
        let (from, to) = (self.state.added, self.rows().min(self.state.added + most));
        let after =
            if to == self.rows() { State::at(self.state.adding) } else { State { added: to, ..self.state } };
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let of = |rows: usize, before: usize| {
            from.saturating_sub(before).min(rows)..to.saturating_sub(before).min(rows)
        };
        self.add_days(&transaction, of(self.days.len(), 0))?;
        self.add_months(&transaction, of(self.months.len(), self.days.len()))?;
        after.write(&transaction)?;
        transaction.commit()?;
        self.state = after;
        slow("writing", start, to - from);
        Ok(after.until)
    }

    fn add_days(&self, transaction: &Transaction<'_>, rows: Range<usize>) -> SqlResult<()> {
        let mut find =
            transaction.prepare_cached("SELECT sums FROM day_rollups WHERE day = ?1 AND dimension = ?2")?;
        let mut put = transaction.prepare_cached(
            "INSERT INTO day_rollups (day, dimension, sums) VALUES (?1, ?2, ?3)
             ON CONFLICT DO UPDATE SET sums = excluded.sums",
        )?;
        for ((day, dimension), loaded) in &self.days[rows] {
            let keys: [&dyn ToSql; 2] = [day, &self.dimensions.id(*dimension)];
            add(&mut find, &mut put, &keys, *loaded)?;
        }
        Ok(())
    }

    fn add_months(&self, transaction: &Transaction<'_>, rows: Range<usize>) -> SqlResult<()> {
        let mut find = transaction.prepare_cached(
            "SELECT sums FROM party_month_rollups WHERE month = ?1 AND dimension = ?2 AND party = ?3",
        )?;
        let mut put = transaction.prepare_cached(
            "INSERT INTO party_month_rollups (month, dimension, party, sums) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT DO UPDATE SET sums = excluded.sums",
        )?;
        for ((month, dimension, party), loaded) in &self.months[rows] {
            let keys: [&dyn ToSql; 3] = [month, &self.dimensions.id(*dimension), &(*party as i64)];
            add(&mut find, &mut put, &keys, *loaded)?;
        }
        Ok(())
    }
}

fn slow(what: &str, start: Instant, rows: usize) {
    let took = start.elapsed();
    if took > SLOW {
        let took_ms = took.as_millis();
        tracing::info!(took_ms, rows, "{what} coarse roll-ups held the ledger up");
    }
}

/// The end of the hours from `from` on that are added together; hours without requests have nothing to add.
fn next_hours(connection: &Connection, from: u64, end: u64, bounds: Bounds) -> SqlResult<u64> {
    let first: Option<u64> =
        connection.query_row("SELECT min(hour) FROM rollups WHERE hour >= ?1", [from], |row| row.get(0))?;
    let first = first.unwrap_or(end).min(end);
    let mut rows_of = connection.prepare_cached(
        "SELECT (SELECT count(*) FROM (SELECT 1 FROM rollups WHERE hour = ?1 LIMIT ?2))
              + (SELECT count(*) FROM (SELECT 1 FROM party_rollups WHERE hour = ?1 LIMIT ?2))",
    )?;
    let (mut to, mut rows) = (first, 0);
    while to < end.min(first + bounds.hours) && rows < bounds.read {
        rows += rows_of.query_row(params![to, bounds.read], |row| row.get::<_, usize>(0))?;
        to += 1;
    }
    Ok(to)
}

/// Deletes at most so many of the rows that are stale.
fn clear(connection: &mut Connection, state: State, most: usize) -> SqlResult<()> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let month = month_of(state.until);
    let months = transaction.execute(
        "DELETE FROM party_month_rollups WHERE (month, dimension, party) IN
         (SELECT month, dimension, party FROM party_month_rollups WHERE month >= ?1 LIMIT ?2)",
        params![month, most],
    )?;
    let days = transaction.execute(
        "DELETE FROM day_rollups WHERE (day, dimension) IN
         (SELECT day, dimension FROM day_rollups WHERE day >= ?1 LIMIT ?2)",
        params![month_hours(month).start / DAY_HOURS, most - months],
    )?;
    if months + days < most {
        State::at(state.until).write(&transaction)?;
    }
    transaction.commit()
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

    /// Adds so many rows of `other`, in the order in which they are written.
    fn add_first(&mut self, other: Self, rows: usize) {
        let of_months = rows.saturating_sub(other.days.len());
        for (key, loaded) in other.days.into_iter().take(rows) {
            *self.days.entry(key).or_default() += loaded;
        }
        for (key, loaded) in other.months.into_iter().take(of_months) {
            *self.months.entry(key).or_default() += loaded;
        }
    }
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

/// Something is added to this hour, if to any: the months from its own on are made again if it is covered, or being
/// added.
pub(super) fn reopen(transaction: &Transaction<'_>, hour: Option<u64>) -> SqlResult<()> {
    let Some(hour) = hour else { return Ok(()) };
    let state = State::read(transaction)?;
    if hour >= state.adding {
        return Ok(());
    }
    let first = month_hours(month_of(hour.min(state.until))).start;
    tracing::info!(from = utc_hour(first), "the wall clock was set back: coarse roll-ups are made again");
    // Nobody reads what is not covered; it is deleted when nothing waits.
    State { stale: true, ..State::at(first) }.write(transaction)
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
    let state = State::read(connection)?;
    let mut right = Coarse::of(connection, 0..state.until)?;
    if state.added > 0 {
        right.add_first(Coarse::of(connection, state.until..state.adding)?, state.added);
    }
    let last = if state.stale { month_of(state.until) } else { u64::MAX >> 1 };
    let last_day = if state.stale { state.until / DAY_HOURS } else { u64::MAX >> 1 };
    let mut days = BTreeMap::new();
    each_day(connection, &right.dimensions, 0..last_day, |day, dimension, loaded| {
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
    let mut query = connection.prepare("SELECT DISTINCT month FROM party_month_rollups WHERE month < ?1")?;
    let written = query.query_map([last], |row| row.get(0))?.collect::<SqlResult<Vec<u64>>>()?;
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
