//! The database, read: rows back into the values they were made of.
//!
//! Does not know: what a balance should be.
//! Invariants: nothing is summed by SQL; a receipt read equals the receipt written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, OptionalExtension, Row, ToSql, params};

use super::LedgerError;
use super::books::{Books, Epoch, Posted};
use super::entry::{CACHED, CARRY, CRASH, FREE, House, ROUNDING};
use super::migrate::SCHEMA_VERSION;
use super::price::{self, RateCard};
use super::receipt::{Attribution, Line, Receipt};
use super::recovery::upgrade;
use super::store::{FILE, SqlResult, identify};
use crate::request::{Finish, Tier};
use crate::units::{BlockNanos, DeviceNanos, Picos, RequestId, Ticket, UnixNanos};
use crate::usage::{Accrual, HouseKv, HouseTime, PoolInfo, Snapshot, TokenCounts, Usage};

/// Splits a quantity over two columns: value = hi * 10^18 + lo.
const SPLIT: u128 = 1_000_000_000_000_000_000;

pub(super) fn split(value: u128) -> SqlResult<(i64, i64)> {
    let part = |part: u128| {
        i64::try_from(part).map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))
    };
    Ok((part(value / SPLIT)?, part(value % SPLIT)?))
}

pub(super) fn join(hi: u64, lo: u64) -> u128 {
    u128::from(hi) * SPLIT + u128::from(lo)
}

/// Opens the ledger for reading, beside a running server or without one. That of an earlier build is brought to
/// this build's schema first, for which no server may have it.
pub(super) fn open_for_reading(data_dir: &Path) -> Result<(Connection, PathBuf), LedgerError> {
    let path = data_dir.join(FILE);
    if !path.exists() {
        return Err(LedgerError::NoLedger { path });
    }
    // A database in WAL mode needs its index file even to be read, so a plain read-only open fails
    // where no server runs; `query_only` refuses every write.
    let flags = OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(&path, flags | OpenFlags::SQLITE_OPEN_READ_WRITE)
        .or_else(|_| Connection::open_with_flags(&path, flags | OpenFlags::SQLITE_OPEN_READ_ONLY))
        .map_err(|source| LedgerError::unreadable(&path, source))?;
    let setup = "PRAGMA query_only = ON; PRAGMA trusted_schema = OFF;";
    connection
        .busy_timeout(std::time::Duration::from_secs(5))
        .and_then(|()| connection.execute_batch(setup))
        .map_err(|source| LedgerError::unreadable(&path, source))?;
    match identify(&connection, &path)? {
        None => Err(LedgerError::NoLedger { path }),
        Some(SCHEMA_VERSION) => Ok((connection, path)),
        Some(_) => {
            drop(connection);
            upgrade(data_dir)?;
            open_for_reading(data_dir)
        }
    }
}

/// Runs `read` on one snapshot of the database.
pub(super) fn in_snapshot<T>(
    connection: &mut Connection,
    path: &Path,
    read: impl FnOnce(&Connection) -> SqlResult<T>,
) -> Result<T, LedgerError> {
    let attempt = || {
        let transaction = connection.transaction()?;
        let value = read(&transaction)?;
        transaction.finish()?;
        Ok(value)
    };
    attempt().map_err(|source| LedgerError::unreadable(path, source))
}

/// One epoch as written, with its pool and its end.
#[derive(Debug, Clone)]
pub(super) struct EpochRow {
    pub(super) boot: String,
    pub(super) epoch: Epoch,
    pub(super) pool: Option<PoolInfo>,
    pub(super) end: Option<DeviceNanos>,
}

pub(super) fn epochs(connection: &Connection) -> SqlResult<Vec<EpochRow>> {
    let mut query = connection.prepare(
        "SELECT epochs.id, epochs.device, pools.blocks, pools.bytes_per_block, pools.since_ns, epoch_ends.end_ns,
         epochs.boot_id, rates.device_hour_picos, rates.kv_share_parts, rates.priority_parts,
         rates.default_parts, rates.flex_parts, rates.batch_parts, rates.currency, rates.version FROM epochs JOIN rates ON rates.version = epochs.rate_version
         LEFT JOIN pools ON pools.epoch = epochs.id LEFT JOIN epoch_ends ON epoch_ends.epoch = epochs.id
         ORDER BY epochs.id",
    )?;
    let rows = query.query_map([], |row| {
        let rate = rate_card(row, 7)?;
        let blocks: Option<u64> = row.get(2)?;
        let pool = blocks
            .map(|blocks| {
                Ok::<_, rusqlite::Error>(PoolInfo {
                    blocks,
                    bytes_per_block: row.get(3)?,
                    since: DeviceNanos(row.get(4)?),
                })
            })
            .transpose()?;
        let end: Option<u64> = row.get(5)?;
        Ok(EpochRow {
            boot: row.get(6)?,
            epoch: Epoch { id: row.get(0)?, device: row.get(1)?, rate },
            pool,
            end: end.map(DeviceNanos),
        })
    })?;
    rows.collect()
}

/// Name and kind of each device, as of its latest start.
pub(super) type DeviceNames = BTreeMap<String, (String, String)>;

pub(super) fn device_names(connection: &Connection) -> SqlResult<DeviceNames> {
    let mut query = connection.prepare("SELECT device, device_name, device_kind FROM epochs ORDER BY id")?;
    query.query_map([], |row| Ok((row.get(0)?, (row.get(1)?, row.get(2)?))))?.collect()
}

pub(super) fn rate(connection: &Connection, version: &str) -> SqlResult<Option<RateCard>> {
    connection
        .query_row(
            "SELECT device_hour_picos, kv_share_parts, priority_parts, default_parts, flex_parts, batch_parts,
             currency, version FROM rates WHERE version = ?1",
            [version],
            |row| rate_card(row, 0),
        )
        .optional()
}

/// From eight columns next to each other.
fn rate_card(row: &Row<'_>, first: usize) -> SqlResult<RateCard> {
    let mut tiers = price::WHOLE;
    for (column, parts) in (first + 2..).zip(&mut tiers) {
        *parts = row.get(column)?;
    }
    let figures = (row.get(first)?, row.get(first + 1)?);
    Ok(RateCard::from_parts(figures, tiers, row.get(first + 6)?, row.get(first + 7)?))
}

/// A request that was running at the checkpoint, and whose it is.
#[derive(Debug, Clone)]
pub(super) struct OpenRow {
    pub(super) accrual: Accrual,
    pub(super) attribution: Option<Attribution>,
}

/// Where an epoch without an end stands: the checkpoint as the meter's snapshot, and more.
#[derive(Debug, Clone)]
pub(super) struct CheckpointRow {
    pub(super) snapshot: Snapshot,
    pub(super) hour: u64,
    pub(super) settled_money: Picos,
    pub(super) open: Vec<OpenRow>,
}

pub(super) fn checkpoint(connection: &Connection, row: &EpochRow) -> SqlResult<Option<CheckpointRow>> {
    let epoch = row.epoch.id;
    let open = open_accruals(connection, epoch)?;
    let accruals: Vec<Accrual> = open.iter().map(|open| open.accrual.clone()).collect();
    connection
        .query_row(
            "SELECT hour, wall, now_ns, host_gap_ns, idle_ns, load_ns, warmup_ns, preemption_ns, settled_ns,
             cached_hi, cached_lo, free_hi, free_lo, carry_hi, carry_lo, settled_hi, settled_lo, money_hi,
             money_lo FROM checkpoint WHERE epoch = ?1 AND device = ?2",
            params![epoch, row.epoch.device],
            |sql| {
                let time = |column: usize| sql.get(column).map(DeviceNanos);
                let kv = |column: usize| Ok::<_, rusqlite::Error>(BlockNanos(wide(sql, column)?));
                let snapshot = Snapshot {
                    now: time(2)?,
                    wall: UnixNanos(sql.get(1)?),
                    pool: row.pool,
                    house_time: [time(3)?, time(4)?, time(5)?, time(6)?, time(7)?],
                    house_kv: [kv(9)?, kv(11)?, kv(13)?],
                    settled_device: time(8)?,
                    settled_kv: kv(15)?,
                    open: accruals,
                    // Not kept: a checkpoint is of money, which energy is not.
                    energy: None,
                };
                Ok(CheckpointRow { snapshot, hour: sql.get(0)?, settled_money: money(wide(sql, 17)?), open })
            },
        )
        .optional()
}

fn open_accruals(connection: &Connection, epoch: i64) -> SqlResult<Vec<OpenRow>> {
    let mut query = connection.prepare(
        "SELECT ticket, request_id, device_ns, block_ns_hi, block_ns_lo, attribution FROM open_accruals
         WHERE epoch = ?1 ORDER BY ticket",
    )?;
    let rows = query.query_map([epoch], |row| {
        let json: Option<String> = row.get(5)?;
        let attribution =
            json.map(|json| serde_json::from_str(&json)).transpose().map_err(|error| invalid(5, error))?;
        Ok(OpenRow {
            accrual: Accrual {
                ticket: Ticket(row.get(0)?),
                request: RequestId(row.get(1)?),
                device: DeviceNanos(row.get(2)?),
                kv: BlockNanos(wide(row, 3)?),
            },
            attribution,
        })
    })?;
    rows.collect()
}

/// What the closes of an epoch posted, from their entries.
pub(super) fn posted(connection: &Connection, epoch: i64) -> SqlResult<Posted> {
    let mut posted = Posted::default();
    let mut query = connection.prepare(
        "SELECT accounts.name, entries.device_ns, entries.block_ns_hi, entries.block_ns_lo, entries.picos
         FROM transactions JOIN entries ON entries.tx = transactions.id
         JOIN accounts ON accounts.id = entries.account
         WHERE transactions.epoch = ?1 AND transactions.kind = 'house' AND transactions.kind <> 'receipt'
         AND entries.side = 'debit'", // the second condition names the index of closes
    )?;
    let mut rows = query.query([epoch])?;
    while let Some(row) = rows.next()? {
        let (name, time, kv): (String, u64, u128) = (row.get(0)?, row.get(1)?, wide(row, 2)?);
        let amount = Picos(i128::from(row.get::<_, i64>(4)?));
        if name == ROUNDING {
            posted.rounding += amount;
            continue;
        }
        posted.money += amount;
        add_house(&mut posted.house, &name, time, kv);
    }
    let at: Option<u64> = connection.query_row(
        "SELECT max(bills.to_ns) FROM bills JOIN transactions ON transactions.id = bills.tx
         WHERE transactions.epoch = ?1 AND transactions.kind <> 'receipt'",
        [epoch],
        |row| row.get(0),
    )?;
    posted.at = DeviceNanos(at.unwrap_or(0));
    Ok(posted)
}

/// Adds an entry of a house account to the class it is named after.
pub(super) fn add_house(house: &mut House, account: &str, time: u64, kv: u128) {
    if account == CRASH {
        house.crash_time += time;
        house.crash_kv += kv;
    }
    for (class, sum) in HouseTime::ALL.iter().zip(&mut house.time) {
        if class.account() == account {
            *sum += time;
        }
    }
    for class in [CACHED, FREE, CARRY] {
        if HouseKv::ALL[class].account() == account {
            house.kv[class] += kv;
        }
    }
}

impl CheckpointRow {
    /// The books as they stood at the checkpoint.
    pub(super) fn books(&self, epoch: Epoch, posted: Posted) -> Books {
        Books::restore(epoch, self.snapshot.clone(), self.hour, self.settled_money, posted)
    }
}

pub(super) const RECEIPT: &str = "SELECT tx, request_id, ticket, client_request_id, idempotency_key, key_id,
    tenant, user, metadata, tags, model, precision, endpoint, status, seed, prompt_tokens, cached_tokens,
    completion_tokens, draft_accepted, draft_rejected, prefill_ns, decode_ns, steps, block_ns_hi,
    block_ns_lo, bytes_per_block, kv_peak_blocks, queue_ns, ttft_ns, wall_ns, submitted_at, finished_at,
    saved_prefix_cache_ns, saved_batching_ns, device, currency, method_id, energy_mj, overrun_picos,
    service_tier FROM receipts";

/// Receipts chosen by the end of a query that begins with `RECEIPT`, each with its transaction's id.
pub(super) fn receipts(
    connection: &Connection,
    condition: &str,
    values: &[&dyn ToSql],
) -> SqlResult<Vec<(i64, Receipt)>> {
    let mut query = connection.prepare_cached(&format!("{RECEIPT} {condition}"))?;
    let mut rows = query.query(values)?;
    let mut receipts = Vec::new();
    while let Some(row) = rows.next()? {
        let mut receipt = receipt(row)?;
        let tx = row.get(0)?;
        receipt.lines = lines(connection, tx)?;
        receipts.push((tx, receipt));
    }
    Ok(receipts)
}

fn receipt(row: &Row<'_>) -> SqlResult<Receipt> {
    let time = |column: usize| row.get(column).map(DeviceNanos);
    let status: String = row.get(13)?;
    let request = RequestId(row.get(1)?);
    let usage = Usage {
        request: request.clone(),
        ticket: Ticket(row.get(2)?),
        status: finish(&status).ok_or_else(|| invalid(13, format!("status {status:?}")))?,
        seed: row.get::<_, i64>(14)?.cast_unsigned(),
        tokens: TokenCounts {
            prompt: row.get(15)?,
            cached: row.get(16)?,
            completion: row.get(17)?,
            draft_accepted: row.get(18)?,
            draft_rejected: row.get(19)?,
        },
        prefill: time(20)?,
        decode: time(21)?,
        steps: row.get(22)?,
        kv: BlockNanos(wide(row, 23)?),
        kv_peak_blocks: row.get(26)?,
        queue: time(27)?,
        ttft: row.get::<_, Option<u64>>(28)?.map(DeviceNanos),
        wall: time(29)?,
        submitted_at: UnixNanos(row.get(30)?),
        finished_at: UnixNanos(row.get(31)?),
        saved_by_prefix_cache: time(32)?,
        saved_by_batching: time(33)?,
        energy_mj: row.get(37)?,
    };
    let pairs = |column: usize| {
        let json: String = row.get(column)?;
        serde_json::from_str(&json).map_err(|error| invalid(column, error))
    };
    Ok(Receipt {
        attribution: Attribution {
            request,
            client_request_id: row.get(3)?,
            idempotency_key: row.get(4)?,
            key_id: row.get(5)?,
            tenant: row.get(6)?,
            user: row.get(7)?,
            metadata: pairs(8)?,
            tags: pairs(9)?,
            model: row.get(10)?,
            precision: row.get(11)?,
            endpoint: row.get(12)?,
            tier: tier(row, 39)?,
        },
        usage,
        device: row.get(34)?,
        bytes_per_block: row.get(25)?,
        lines: Vec::new(),
        overrun: Picos(i128::from(row.get::<_, i64>(38)?)),
        currency: row.get(35)?,
        method_id: row.get(36)?,
    })
}

fn lines(connection: &Connection, tx: i64) -> SqlResult<Vec<Line>> {
    let mut query = connection.prepare_cached(
        "SELECT device, rate_version, device_ns, block_ns_hi, block_ns_lo, time_picos, memory_picos,
         discount_picos FROM receipt_lines WHERE tx = ?1 ORDER BY line",
    )?;
    let rows = query.query_map([tx], |row| {
        Ok(Line {
            device: row.get(0)?,
            rate_version: row.get(1)?,
            device_time: DeviceNanos(row.get(2)?),
            kv: BlockNanos(wide(row, 3)?),
            time: Picos(i128::from(row.get::<_, i64>(5)?)),
            memory: Picos(i128::from(row.get::<_, i64>(6)?)),
            discount: Picos(i128::from(row.get::<_, i64>(7)?)),
        })
    })?;
    rows.collect()
}

fn tier(row: &Row<'_>, column: usize) -> SqlResult<Tier> {
    let name: String = row.get(column)?;
    Tier::parse(&name).ok_or_else(|| invalid(column, format!("service tier {name:?}")))
}

fn finish(status: &str) -> Option<Finish> {
    [Finish::Stop, Finish::Length, Finish::Cancelled, Finish::Budget, Finish::Error]
        .into_iter()
        .find(|finish| finish.as_str() == status)
}

/// A split quantity in two columns next to each other.
pub(super) fn wide(row: &Row<'_>, hi: usize) -> SqlResult<u128> {
    Ok(join(row.get(hi)?, row.get(hi + 1)?))
}

fn money(value: u128) -> Picos {
    Picos(i128::try_from(value).expect("two columns hold less than 2^127"))
}

pub(super) fn invalid(
    column: usize,
    error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Text, error.into())
}
