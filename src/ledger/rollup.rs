//! Roll-ups: sums over receipt lines by clock hour and by what they are attributed to, so that a report reads
//! some rows an hour instead of all receipts.
//!
//! Does: add receipts to them in the commit that writes the receipts, fill them from the receipts of a ledger
//! that has none, read them.
//! Does not know: the house, how rows are grouped.
//! Invariants: they are the sums of the lines that are in the same snapshot; sums are ours, in integers.
//!
//! Two grains, as labels differ in how many values they take. `rollups` has a row for each hour and each
//! combination of the labels with few values (`Label`). Users and tasks may be as many as requests, so they have
//! rows of their own in `party_rollups`, which only reports by user or task read. `dimension_totals` has the
//! labels of `rollups` over all hours.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use rusqlite::{CachedStatement, Connection, OptionalExtension, ToSql, Transaction};

use super::receipt::Receipt;
use super::rows;
use super::store::SqlResult;
use super::sums::Sums;
use crate::request::Finish;
use crate::units::Picos;

/// The tables; part of the schema since version 4, with each status apart since version 5, and each tier since version 8.
pub(super) const SCHEMA: &str = include_str!("rollups.sql");

/// Labels of a dimension, in the order in which dimensions are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Label {
    Currency,
    Device,
    RateVersion,
    Tenant,
    Key,
    Team,
    Feature,
    Environment,
    CostCenter,
    Model,
    Precision,
    Endpoint,
    /// Why the request ended. Where that is an error, the house pays.
    Status,
    Tier,
}

const LABELS: usize = 14;
const FIND_DIMENSION: &str = "SELECT id FROM dimensions WHERE currency = ?1 AND device = ?2
    AND rate_version = ?3 AND tenant = ?4 AND key_id = ?5 AND team = ?6 AND feature = ?7 AND environment = ?8
    AND cost_center = ?9 AND model = ?10 AND precision = ?11 AND endpoint = ?12 AND status = ?13
    AND service_tier = ?14 AND bytes_per_block = ?15";
const INSERT_DIMENSION: &str = "INSERT INTO dimensions (currency, device, rate_version, tenant, key_id, team,
    feature, environment, cost_center, model, precision, endpoint, status, service_tier, bytes_per_block)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)";
const DIMENSIONS: &str = "SELECT currency, device, rate_version, tenant, key_id, team, feature, environment,
    cost_center, model, precision, endpoint, status, service_tier, bytes_per_block, id FROM dimensions ORDER BY id";

/// More parties than this are not remembered between commits, but looked up.
const PARTIES_KNOWN_MAX: usize = 100_000;
/// While roll-ups are filled: so many rows are in memory before they are written.
const FILL_ROWS_MAX: usize = 200_000;
/// While roll-ups are filled: how many receipts are between two lines of the log.
const FILL_LOGGED: u64 = 500_000;

/// What a line is attributed to; ordered by its labels.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Dimension {
    labels: [String; LABELS],
    pub(super) bytes_per_block: u64,
}

impl Dimension {
    /// Of a receipt's line.
    fn of(receipt: &Receipt, line: usize) -> Self {
        let (who, line) = (&receipt.attribution, &receipt.lines[line]);
        let tag = |name: &str| who.tags.get(name).cloned().unwrap_or_default();
        Self {
            labels: [
                receipt.currency.clone(),
                line.device.clone(),
                line.rate_version.clone(),
                who.tenant.clone(),
                who.key_id.clone().unwrap_or_default(),
                tag("team"),
                tag("feature"),
                tag("environment"),
                tag("cost_center"),
                who.model.clone(),
                who.precision.clone(),
                who.endpoint.clone(),
                receipt.usage.status.as_str().to_owned(),
                who.tier.as_str().to_owned(),
            ],
            bytes_per_block: receipt.bytes_per_block,
        }
    }

    pub(super) fn labels(&self) -> impl Iterator<Item = &str> {
        self.labels.iter().map(String::as_str)
    }

    /// Empty where the request had none.
    pub(super) fn label(&self, label: Label) -> &str {
        &self.labels[label as usize]
    }
}

/// Who or what run a request belongs to. Empty: unknown. A user that the key's tags name goes before the request's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(super) struct Party {
    pub(super) user: String,
    pub(super) task: String,
}

impl Party {
    fn of(receipt: &Receipt) -> Option<Self> {
        let who = &receipt.attribution;
        let user = who.tags.get("user").or(who.user.as_ref()).cloned().unwrap_or_default();
        let task = who.tags.get("task").cloned().unwrap_or_default();
        (!user.is_empty() || !task.is_empty()).then_some(Self { user, task })
    }
}

/// The sums of some receipts, in the order in which they are written.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) rows: BTreeMap<(u64, Dimension), Sums>,
    pub(super) parties: BTreeMap<(u64, Dimension, Party), Sums>,
}

impl Batch {
    /// Adds a receipt of a transaction in this clock hour.
    pub(super) fn add(&mut self, hour: u64, receipt: &Receipt) {
        let party = Party::of(receipt);
        for line in 0..receipt.lines.len() {
            let (dimension, sums) = (Dimension::of(receipt, line), Sums::of(receipt, line));
            if let Some(party) = &party {
                *self.parties.entry((hour, dimension.clone(), party.clone())).or_default() += sums;
            }
            *self.rows.entry((hour, dimension)).or_default() += sums;
        }
    }
}

/// Ids of labels that are in the database.
#[derive(Debug, Default)]
pub(super) struct Known {
    dimensions: HashMap<Dimension, i64>,
    parties: HashMap<Party, i64>,
}

impl Known {
    /// Adds a batch to the roll-ups, in the transaction that is open on the connection. Where it fails, what was
    /// learnt here is not to be believed.
    pub(super) fn write(&mut self, connection: &Connection, batch: &Batch) -> SqlResult<()> {
        let mut find =
            connection.prepare_cached("SELECT sums FROM rollups WHERE hour = ?1 AND dimension = ?2")?;
        let mut put = connection.prepare_cached(
            "INSERT INTO rollups (hour, dimension, sums) VALUES (?1, ?2, ?3)
             ON CONFLICT DO UPDATE SET sums = excluded.sums",
        )?;
        let mut totals: BTreeMap<i64, Sums> = BTreeMap::new();
        for ((hour, dimension), sums) in &batch.rows {
            let dimension = self.dimension(connection, dimension)?;
            let keys: [&dyn ToSql; 2] = [hour, &dimension];
            add(&mut find, &mut put, &keys, *sums)?;
            *totals.entry(dimension).or_default() += *sums;
        }
        let mut find = connection.prepare_cached("SELECT sums FROM dimension_totals WHERE dimension = ?1")?;
        let mut put = connection.prepare_cached(
            "INSERT INTO dimension_totals (dimension, sums) VALUES (?1, ?2)
             ON CONFLICT DO UPDATE SET sums = excluded.sums",
        )?;
        for (dimension, sums) in totals {
            add(&mut find, &mut put, &[&dimension], sums)?;
        }
        let mut find = connection.prepare_cached(
            "SELECT sums FROM party_rollups WHERE hour = ?1 AND dimension = ?2 AND party = ?3",
        )?;
        let mut put = connection.prepare_cached(
            "INSERT INTO party_rollups (hour, dimension, party, sums) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT DO UPDATE SET sums = excluded.sums",
        )?;
        for ((hour, dimension, party), sums) in &batch.parties {
            let dimension = self.dimension(connection, dimension)?;
            let party = self.party(connection, party)?;
            let keys: [&dyn ToSql; 3] = [hour, &dimension, &party];
            add(&mut find, &mut put, &keys, *sums)?;
        }
        Ok(())
    }

    fn dimension(&mut self, connection: &Connection, dimension: &Dimension) -> SqlResult<i64> {
        if let Some(&id) = self.dimensions.get(dimension) {
            return Ok(id);
        }
        let mut values: Vec<&dyn ToSql> = dimension.labels.iter().map(|label| label as &dyn ToSql).collect();
        values.push(&dimension.bytes_per_block);
        let id = id_of(connection, FIND_DIMENSION, INSERT_DIMENSION, &values)?;
        self.dimensions.insert(dimension.clone(), id);
        Ok(id)
    }

    fn party(&mut self, connection: &Connection, party: &Party) -> SqlResult<i64> {
        if let Some(&id) = self.parties.get(party) {
            return Ok(id);
        }
        if self.parties.len() >= PARTIES_KNOWN_MAX {
            self.parties.clear();
        }
        let find = "SELECT id FROM parties WHERE user = ?1 AND task = ?2";
        let insert = "INSERT INTO parties (user, task) VALUES (?1, ?2)";
        let id = id_of(connection, find, insert, &[&party.user, &party.task])?;
        self.parties.insert(party.clone(), id);
        Ok(id)
    }

    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }
}

fn id_of(connection: &Connection, find: &str, insert: &str, values: &[&dyn ToSql]) -> SqlResult<i64> {
    let known = connection.prepare_cached(find)?.query_row(values, |row| row.get(0)).optional()?;
    if let Some(id) = known {
        return Ok(id);
    }
    connection.prepare_cached(insert)?.execute(values)?;
    Ok(connection.last_insert_rowid())
}

/// Adds `sums` to the row with these keys.
fn add(
    find: &mut CachedStatement<'_>,
    put: &mut CachedStatement<'_>,
    keys: &[&dyn ToSql],
    mut sums: Sums,
) -> SqlResult<()> {
    if let Some(there) = find.query_row(keys, |row| Sums::read(row, 0)).optional()? {
        sums += there;
    }
    let sums = sums.packed();
    put.execute(&*[keys, &[&sums]].concat()).map(drop)
}

/// Makes the tables in a ledger of an earlier schema, and fills them from its receipts.
pub(super) fn create_and_fill(transaction: &Transaction<'_>) -> SqlResult<()> {
    transaction.execute_batch(SCHEMA)?;
    let (mut known, mut batch) = (Known::default(), Batch::default());
    let (mut after, mut count) = (0_i64, 0_u64);
    loop {
        let page = rows::receipts(transaction, "WHERE tx > ?1 ORDER BY tx LIMIT 1000", &[&after])?;
        let Some((last, _)) = page.last() else { break };
        after = *last;
        let mut hour_of = transaction.prepare_cached("SELECT hour FROM transactions WHERE id = ?1")?;
        for (tx, receipt) in &page {
            batch.add(hour_of.query_row([tx], |row| row.get(0))?, receipt);
        }
        let before = count;
        count += page.len() as u64;
        if count / FILL_LOGGED > before / FILL_LOGGED {
            tracing::info!(receipts = count, "the ledger's roll-ups are being made");
        }
        if batch.rows.len() + batch.parties.len() > FILL_ROWS_MAX {
            known.write(transaction, &std::mem::take(&mut batch))?;
        }
    }
    known.write(transaction, &batch)
}

/// Dimensions by id, and their places when sorted by their labels.
#[derive(Debug, Clone, Default)]
pub(super) struct Dimensions {
    /// Places by id: ids count from 1, as nothing is ever deleted.
    by_id: Vec<usize>,
    /// Ids by place.
    ids: Vec<i64>,
    /// In their order.
    pub(super) sorted: Vec<Dimension>,
}

impl Dimensions {
    pub(super) fn read(connection: &Connection) -> SqlResult<Self> {
        let mut query = connection.prepare(DIMENSIONS)?;
        let rows = query.query_map([], |row| {
            let mut labels: [String; LABELS] = Default::default();
            for (column, label) in labels.iter_mut().enumerate() {
                *label = row.get(column)?;
            }
            Ok((Dimension { labels, bytes_per_block: row.get(LABELS)? }, row.get(LABELS + 1)?))
        })?;
        let mut all: Vec<(Dimension, i64)> = rows.collect::<SqlResult<_>>()?;
        all.sort();
        let mut by_id = vec![usize::MAX; all.len() + 1];
        for (place, (_, id)) in all.iter().enumerate() {
            let slot = usize::try_from(*id).ok().and_then(|id| by_id.get_mut(id));
            *slot.ok_or_else(|| rows::invalid(LABELS + 1, "dimensions do not count from 1"))? = place;
        }
        let (sorted, ids) = all.into_iter().unzip();
        Ok(Self { by_id, ids, sorted })
    }

    pub(super) fn id(&self, place: usize) -> i64 {
        self.ids[place]
    }

    pub(super) fn place(&self, id: i64) -> SqlResult<usize> {
        let place = usize::try_from(id).ok().and_then(|id| self.by_id.get(id)).copied();
        place
            .filter(|place| *place != usize::MAX)
            .ok_or_else(|| rows::invalid(1, "a roll-up's dimension is missing"))
    }
}

/// Hands out each hour's rows, of the dimensions at these places, in the order of their places.
pub(super) fn each_hour(
    connection: &Connection,
    dimensions: &Dimensions,
    hours: Range<u64>,
    mut take: impl FnMut(u64, &[(usize, Sums)]) -> SqlResult<()>,
) -> SqlResult<()> {
    let mut query = connection.prepare(
        "SELECT hour, dimension, sums FROM rollups WHERE hour >= ?1 AND hour < ?2 ORDER BY hour, dimension",
    )?;
    let mut rows = query.query([signed(hours.start), signed(hours.end)])?;
    let (mut hour, mut of_hour) = (0, Vec::new());
    let mut flush = |hour: u64, of_hour: &mut Vec<(usize, Sums)>| {
        of_hour.sort_unstable_by_key(|(place, _)| *place);
        take(hour, of_hour)?;
        of_hour.clear();
        Ok::<_, rusqlite::Error>(())
    };
    while let Some(row) = rows.next()? {
        let next = row.get(0)?;
        if next != hour && !of_hour.is_empty() {
            flush(hour, &mut of_hour)?;
        }
        hour = next;
        of_hour.push((dimensions.place(row.get(1)?)?, Sums::read(row, 2)?));
    }
    if of_hour.is_empty() { Ok(()) } else { flush(hour, &mut of_hour) }
}

/// An hour's rows by dimension's place and party's id.
pub(super) fn parties_of_hour(
    connection: &Connection,
    dimensions: &Dimensions,
    hour: u64,
) -> SqlResult<Vec<(usize, i64, Sums)>> {
    let mut query = connection.prepare_cached(
        "SELECT dimension, party, sums FROM party_rollups WHERE hour = ?1 ORDER BY dimension, party",
    )?;
    let rows = query.query_map([signed(hour)], |row| {
        Ok((dimensions.place(row.get(0)?)?, row.get(1)?, Sums::read(row, 2)?))
    })?;
    rows.collect()
}

/// What lines come to over all hours, by what they are attributed to.
pub(super) fn totals(
    connection: &Connection,
    dimensions: &Dimensions,
) -> SqlResult<BTreeMap<Dimension, Sums>> {
    let mut query = connection.prepare("SELECT dimension, sums FROM dimension_totals")?;
    let rows = query.query_map([], |row| {
        let place = dimensions.place(row.get(0)?)?;
        Ok((dimensions.sorted[place].clone(), Sums::read(row, 1)?))
    })?;
    rows.collect()
}

/// What a key was charged, by currency. A request with status `error` costs its caller nothing.
pub(super) fn spent_by_key(connection: &Connection, key_id: &str) -> SqlResult<BTreeMap<String, Picos>> {
    let mut query = connection.prepare_cached(
        "SELECT currency, sums FROM dimensions JOIN dimension_totals ON dimension = id
         WHERE key_id = ?1 AND status <> ?2",
    )?;
    let mut rows = query.query([key_id, Finish::Error.as_str()])?;
    let mut spent: BTreeMap<String, Picos> = BTreeMap::new();
    while let Some(row) = rows.next()? {
        *spent.entry(row.get(0)?).or_default() += Sums::read(row, 1)?.money();
    }
    Ok(spent)
}

fn signed(hour: u64) -> i64 {
    i64::try_from(hour).unwrap_or(i64::MAX)
}
