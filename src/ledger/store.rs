//! The database, written: opening it safely, the append-only schema, one transaction a commit.
//!
//! Does not know: prices, waiters, when to commit.
//! Invariants: a file that is not our ledger is never written to; a commit is all or nothing; rows are
//! only ever added, except those of the checkpoint and the sums of roll-ups.

mod receipts;

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension, TransactionBehavior, params};

use super::books::{Books, NextTransaction, Record};
use super::entry::Transaction;
use super::migrate::{SCHEMA_VERSION, migrate};
use super::price::RateCard;
use super::rollup::{self, Batch};
use super::rows::split;
use super::{DeviceInfo, LedgerError, MethodRecord, coarse};
use crate::units::{BlockNanos, DeviceNanos, Ticket, UnixNanos};

pub(super) const FILE: &str = "ledger.db";
/// "OBOL".
const APPLICATION_ID: i64 = 0x4F42_4F4C;
const SCHEMA: &str = include_str!("schema.sql");
/// For pages of receipts; a ledger of an earlier build gets them when it is opened.
const INDEXES: &str = "
    CREATE INDEX IF NOT EXISTS receipts_user ON receipts (user) WHERE user IS NOT NULL;
    CREATE INDEX IF NOT EXISTS receipts_key ON receipts (key_id) WHERE key_id IS NOT NULL;
    CREATE INDEX IF NOT EXISTS receipts_status ON receipts (status);
    CREATE INDEX IF NOT EXISTS receipts_tenant ON receipts (tenant);
    CREATE INDEX IF NOT EXISTS receipts_finished ON receipts (finished_at);";
const APPEND_ONLY: [&str; 11] = [
    "rates",
    "epochs",
    "pools",
    "epoch_ends",
    "methods",
    "accounts",
    "transactions",
    "entries",
    "bills",
    "receipts",
    "receipt_lines",
];
/// Larger files are not read through at the start: that would take seconds.
const CHECKED_AT_OPEN_MAX: u64 = 64 << 20;
/// How long a commit waits for a lock that another process holds before it counts as failed.
const LOCK_PATIENCE: Duration = Duration::from_millis(250);

pub(super) type SqlResult<T> = Result<T, rusqlite::Error>;

pub(super) struct Store {
    connection: Connection,
    accounts: HashMap<String, i64>,
    /// The rows of `open_accruals` of the running epochs, as last committed.
    accruals: HashMap<i64, Accruals>,
    rollups: rollup::Known,
}

/// What each open request has used in an epoch.
type Accruals = HashMap<Ticket, (DeviceNanos, BlockNanos)>;

impl Store {
    /// Opens or creates the ledger's database for writing.
    pub(super) fn open(path: &Path) -> Result<Self, LedgerError> {
        let broken = |source| LedgerError::unreadable(path, source);
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut connection = Connection::open_with_flags(path, flags).map_err(broken)?;
        connection.busy_timeout(LOCK_PATIENCE).map_err(broken)?;
        let version = identify(&connection, path)?;
        if version.is_some() && std::fs::metadata(path).is_ok_and(|file| file.len() <= CHECKED_AT_OPEN_MAX) {
            let verdict: String =
                connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(broken)?;
            if verdict != "ok" {
                return Err(LedgerError::Corrupt { path: path.to_owned(), detail: verdict });
            }
        }
        configure(&connection).map_err(broken)?;
        match version {
            None => create(&mut connection),
            Some(found) => migrate(&mut connection, found),
        }
        .map_err(broken)?;
        connection.execute_batch(INDEXES).map_err(broken)?;
        let (accounts, accruals, rollups) = Default::default();
        Ok(Self { connection, accounts, accruals, rollups })
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    pub(super) fn connection_mut(&mut self) -> &mut Connection {
        &mut self.connection
    }

    /// Appends the records, and writes where the devices of `books` stand after them. All or nothing.
    pub(super) fn commit(
        &mut self,
        records: &[Record],
        methods: &[MethodRecord],
        books: &[&Books],
        attribution: &mut dyn FnMut(Ticket) -> Option<String>,
    ) -> SqlResult<()> {
        let result = self.try_commit(records, methods, books, attribution);
        if result.is_err() {
            // Accounts and labels that the failed transaction made do not exist.
            self.accounts.clear();
            self.rollups.forget();
        }
        result
    }

    fn try_commit(
        &mut self,
        records: &[Record],
        methods: &[MethodRecord],
        books: &[&Books],
        attribution: &mut dyn FnMut(Ticket) -> Option<String>,
    ) -> SqlResult<()> {
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let mut writer = Writer { connection: &transaction, accounts: &mut self.accounts };
        for method in methods {
            writer.method(method)?;
        }
        let mut batch = Batch::default();
        for record in records {
            writer.record(record)?;
            if let Record::Receipt { receipt, transaction, .. } = record {
                batch.add(transaction.hour, receipt);
            }
        }
        self.rollups.write(&transaction, &batch)?;
        coarse::reopen(&transaction, records.iter().filter_map(Record::hour).min())?;
        // Their rows were deleted with the receipts.
        let settled = records.iter().filter_map(|record| match record {
            Record::Receipt { receipt, .. } => Some(receipt.usage.ticket),
            _ => None,
        });
        let settled = settled.collect();
        let mut accruals = Vec::with_capacity(books.len());
        for books in books {
            writer.checkpoint(books)?;
            let written = self.accruals.get(&books.epoch.id);
            accruals.push((books.epoch.id, writer.accruals(books, written, &settled, attribution)?));
        }
        transaction.commit()?;
        self.accruals.extend(accruals);
        Ok(())
    }

    /// Starts an epoch: its rate, itself, its first checkpoint. Returns the books' id of it.
    pub(super) fn open_epoch(
        &mut self,
        boot_id: &str,
        device: &DeviceInfo,
        rate: &RateCard,
        wall: UnixNanos,
    ) -> SqlResult<i64> {
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let [priority, default, flex, batch] = rate.tier_parts();
        transaction.execute(
            "INSERT INTO rates (version, device_hour_picos, kv_share_parts, currency, priority_parts, default_parts,
             flex_parts, batch_parts) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) ON CONFLICT DO NOTHING",
            params![
                rate.version(),
                i64::try_from(rate.device_hour().0).expect("limited by RateCard::parse"),
                rate.kv_share_parts(),
                rate.currency(),
                priority,
                default,
                flex,
                batch
            ],
        )?;
        transaction.execute(
            "INSERT INTO epochs (boot_id, device, device_kind, device_name, rate_version, started_at)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            params![boot_id, device.id, device.kind, device.name, rate.version(), wall.0],
        )?;
        let id = transaction.last_insert_rowid();
        let epoch = super::books::Epoch { id, device: device.id.clone(), rate: rate.clone() };
        let writer = Writer { connection: &transaction, accounts: &mut self.accounts };
        let books = Books::open(epoch, wall);
        writer.checkpoint(&books)?;
        coarse::reopen(&transaction, Some(books.hour))?;
        transaction.commit()?;
        Ok(id)
    }

    /// Moves everything from the write-ahead log into the one file. What it cannot move stays in the log.
    pub(super) fn fold(&self) {
        let folded = self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
        if let Err(error) = folded {
            tracing::debug!(%error, "the write-ahead log stays beside the ledger");
        }
    }

    pub(super) fn next_transaction(&self) -> SqlResult<NextTransaction> {
        let next = "SELECT coalesce(max(id), 0) + 1 FROM transactions";
        self.connection.query_row(next, [], |row| row.get(0)).map(NextTransaction)
    }
}

/// Refuses a file that is not our ledger, or is of a later build. Gives its schema's version; none while it is
/// empty. Only reads.
pub(super) fn identify(connection: &Connection, path: &Path) -> Result<Option<i64>, LedgerError> {
    let number = |sql: &str| -> Result<i64, LedgerError> {
        connection
            .query_row(sql, [], |row| row.get(0))
            .map_err(|source| LedgerError::unreadable(path, source))
    };
    let tables = number("SELECT count(*) FROM sqlite_schema")?;
    let application = number("PRAGMA application_id")?;
    let version = number("PRAGMA user_version")?;
    if tables == 0 && application == 0 && version == 0 {
        return Ok(None);
    }
    if application != APPLICATION_ID {
        return Err(LedgerError::NotALedger { path: path.to_owned() });
    }
    if !(1..=SCHEMA_VERSION).contains(&version) {
        let path = path.to_owned();
        return Err(LedgerError::SchemaVersion { path, found: version, known: SCHEMA_VERSION });
    }
    Ok(Some(version))
}

fn configure(connection: &Connection) -> SqlResult<()> {
    connection.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(()))?;
    connection.execute_batch(
        "PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; PRAGMA recursive_triggers = ON;
         PRAGMA trusted_schema = OFF;",
    )?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(())
}

fn create(connection: &mut Connection) -> SqlResult<()> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    transaction.execute_batch(SCHEMA)?;
    transaction.execute_batch(rollup::SCHEMA)?;
    transaction.execute_batch(coarse::SCHEMA)?;
    for table in APPEND_ONLY {
        for verb in ["UPDATE", "DELETE"] {
            transaction.execute_batch(&format!(
                "CREATE TRIGGER {table}_no_{verb} BEFORE {verb} ON {table}
                 BEGIN SELECT RAISE(ABORT, 'the ledger only appends'); END;"
            ))?;
        }
    }
    transaction.execute_batch(&format!(
        "PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};"
    ))?;
    transaction.commit()
}

/// A commit in progress.
struct Writer<'a> {
    connection: &'a Connection,
    accounts: &'a mut HashMap<String, i64>,
}

impl Writer<'_> {
    fn insert(&self, sql: &str, values: impl rusqlite::Params) -> SqlResult<()> {
        self.connection.prepare_cached(sql)?.execute(values).map(drop)
    }

    fn method(&self, method: &MethodRecord) -> SqlResult<()> {
        self.insert(
            "INSERT INTO methods (id, json) VALUES (?1, ?2) ON CONFLICT DO NOTHING",
            params![method.id, method.json],
        )
    }

    fn record(&mut self, record: &Record) -> SqlResult<()> {
        match record {
            Record::Pool { epoch, pool } => self.insert(
                "INSERT INTO pools (epoch, blocks, bytes_per_block, since_ns) VALUES (?1, ?2, ?3, ?4)",
                params![epoch, pool.blocks, pool.bytes_per_block, pool.since.0],
            ),
            Record::Receipt { receipt, transaction, epochs } => {
                self.transaction(transaction)?;
                self.receipt(transaction, receipt)?;
                for epoch in epochs {
                    self.insert(
                        "DELETE FROM open_accruals WHERE epoch = ?1 AND ticket = ?2",
                        params![epoch, receipt.usage.ticket.0],
                    )?;
                }
                Ok(())
            }
            Record::House(transaction) => self.transaction(transaction),
            Record::Bill { transaction, from, to } => {
                self.transaction(transaction)?;
                self.insert(
                    "INSERT INTO bills (tx, from_ns, to_ns) VALUES (?1, ?2, ?3)",
                    params![transaction.id, from.0, to.0],
                )
            }
            Record::End { epoch, clean, end, wall } => {
                let reason = if *clean { "clean" } else { "crash" };
                self.insert(
                    "INSERT INTO epoch_ends (epoch, reason, end_ns, ended_at) VALUES (?1, ?2, ?3, ?4)",
                    params![epoch, reason, end.0, wall.0],
                )?;
                self.insert("DELETE FROM open_accruals WHERE epoch = ?1", params![epoch])?;
                self.insert("DELETE FROM checkpoint WHERE epoch = ?1", params![epoch])
            }
        }
    }

    fn transaction(&mut self, transaction: &Transaction) -> SqlResult<()> {
        self.insert(
            "INSERT INTO transactions (id, kind, epoch, hour, wall) VALUES (?1, ?2, ?3, ?4, ?5)",
            params![
                transaction.id,
                transaction.kind.as_str(),
                transaction.epoch,
                transaction.hour,
                transaction.wall.0
            ],
        )?;
        for entry in &transaction.entries {
            let account = self.account(&entry.account)?;
            let (hi, lo) = split(entry.amounts.kv.0)?;
            self.insert(
                "INSERT INTO entries (tx, account, side, device_ns, block_ns_hi, block_ns_lo, picos)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
                params![
                    transaction.id,
                    account,
                    entry.side.as_str(),
                    entry.amounts.time.0,
                    hi,
                    lo,
                    picos(entry.amounts.money.0)?
                ],
            )?;
        }
        Ok(())
    }

    fn account(&mut self, name: &str) -> SqlResult<i64> {
        if let Some(&id) = self.accounts.get(name) {
            return Ok(id);
        }
        let known = self
            .connection
            .prepare_cached("SELECT id FROM accounts WHERE name = ?1")?
            .query_row([name], |row| row.get(0))
            .optional()?;
        let id = if let Some(id) = known {
            id
        } else {
            self.insert("INSERT INTO accounts (name) VALUES (?1)", [name])?;
            self.connection.last_insert_rowid()
        };
        self.accounts.insert(name.to_owned(), id);
        Ok(id)
    }

    fn checkpoint(&self, books: &Books) -> SqlResult<()> {
        let (last, epoch) = (&books.last, books.epoch.id);
        let time = last.house_time.map(|time| time.0);
        let [cached, free, carry] =
            [split(last.house_kv[0].0)?, split(last.house_kv[1].0)?, split(last.house_kv[2].0)?];
        let settled = split(last.settled_kv.0)?;
        let money = split(u128::try_from(books.settled_money.0).expect("receipts cost nothing negative"))?;
        self.insert(
            "INSERT OR REPLACE INTO checkpoint (device, epoch, hour, wall, now_ns, host_gap_ns, idle_ns,
             load_ns, warmup_ns, preemption_ns, cached_hi, cached_lo, free_hi, free_lo, carry_hi, carry_lo,
             settled_ns, settled_hi, settled_lo, money_hi, money_lo)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19,
             ?20, ?21)",
            params![
                books.epoch.device,
                epoch,
                books.hour,
                last.wall.0,
                last.now.0,
                time[0],
                time[1],
                time[2],
                time[3],
                time[4],
                cached.0,
                cached.1,
                free.0,
                free.1,
                carry.0,
                carry.1,
                last.settled_device.0,
                settled.0,
                settled.1,
                money.0,
                money.1
            ],
        )
    }

    /// Writes what each open request has used, where that has changed since `written`. Returns what is
    /// written now.
    fn accruals(
        &self,
        books: &Books,
        written: Option<&Accruals>,
        settled: &HashSet<Ticket>,
        attribution: &mut dyn FnMut(Ticket) -> Option<String>,
    ) -> SqlResult<Accruals> {
        let epoch = books.epoch.id;
        let mut now = Accruals::with_capacity(books.last.open.len());
        for open in &books.last.open {
            let used = (open.device, open.kv);
            let row = now
                .get(&open.ticket)
                .or_else(|| written?.get(&open.ticket).filter(|_| !settled.contains(&open.ticket)));
            let stands = row == Some(&used);
            now.insert(open.ticket, used);
            if stands {
                continue;
            }
            let (hi, lo) = split(open.kv.0)?;
            let mut update = self.connection.prepare_cached(
                "UPDATE open_accruals SET device_ns = ?3, block_ns_hi = ?4, block_ns_lo = ?5
                 WHERE epoch = ?1 AND ticket = ?2",
            )?;
            if update.execute(params![epoch, open.ticket.0, open.device.0, hi, lo])? == 0 {
                self.insert(
                    "INSERT INTO open_accruals (epoch, ticket, request_id, device_ns, block_ns_hi, block_ns_lo,
                     attribution) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
                    params![
                        epoch,
                        open.ticket.0,
                        open.request.0,
                        open.device.0,
                        hi,
                        lo,
                        attribution(open.ticket)
                    ],
                )?;
            }
        }
        Ok(now)
    }
}

fn picos(money: i128) -> SqlResult<i64> {
    i64::try_from(money).map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))
}

#[cfg(test)]
mod tests {
    use super::super::books::{Epoch, NextTransaction};
    use super::super::group::Group;
    use super::super::rows;
    use super::*;
    use crate::units::RequestId;
    use crate::usage::Accrual;

    const WALL: UnixNanos = UnixNanos(1_790_000_000_000_000_000);

    fn written(store: &Store) -> Vec<Accrual> {
        let epochs = rows::epochs(store.connection()).unwrap();
        let checkpoint = rows::checkpoint(store.connection(), epochs.last().unwrap()).unwrap().unwrap();
        checkpoint.snapshot.open
    }

    #[test]
    fn only_accruals_that_changed_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let mut store = Store::open(&path).unwrap();
        let rate = RateCard::parse("1", "0.2", "USD", None).unwrap();
        let device = DeviceInfo { id: "cpu".into(), kind: "cpu".into(), name: "a processor".into() };
        let id = store.open_epoch("boot", &device, &rate, WALL).unwrap();
        let mut books = Books::open(Epoch { id, device: device.id, rate }, WALL);
        books.last.open = (0..1000)
            .map(|number| Accrual {
                request: RequestId(format!("r{number}")),
                ticket: Ticket(number),
                device: DeviceNanos(0),
                kv: BlockNanos(0),
            })
            .collect();
        let commit = |store: &mut Store, books: &Books, records: &[Record]| {
            let before = store.connection.total_changes();
            let result = store.commit(records, &[], &[books], &mut |_| None);
            (result.is_ok(), store.connection.total_changes() - before)
        };
        assert_eq!(commit(&mut store, &books, &[]), (true, 1001));
        assert_eq!(commit(&mut store, &books, &[]), (true, 1), "the checkpoint alone");
        books.last.open[500].device.0 = 7;
        books.last.open[501].kv.0 = 8;
        assert_eq!(commit(&mut store, &books, &[]), (true, 3));
        assert_eq!(written(&store), books.last.open);

        // What a failed commit wrote is not taken for written.
        books.last.open[7].device.0 = 9;
        let foreign = Connection::open(&path).unwrap();
        foreign.execute_batch("BEGIN IMMEDIATE").unwrap();
        assert!(!commit(&mut store, &books, &[]).0);
        foreign.execute_batch("ROLLBACK").unwrap();
        assert_eq!(commit(&mut store, &books, &[]), (true, 2));
        assert_eq!(written(&store), books.last.open);

        // A receipt deletes the row of its ticket; another request with that ticket gets a new one.
        let twice = Accrual { request: RequestId("again".into()), ..books.last.open[3].clone() };
        books.last.open.push(twice);
        assert_eq!(commit(&mut store, &books, &[]), (true, 1));
        let who = |_: &crate::usage::Usage| None;
        let mut other = Group::new(vec![books.clone()]);
        other.books[0].last.open = vec![books.last.open.remove(3)];
        let settled = other.settle_open(&mut NextTransaction(1), who);
        assert!(commit(&mut store, &books, &settled).0);
        books.last.open.sort_by_key(|open| open.ticket.0);
        assert_eq!(written(&store), books.last.open);
    }
}
