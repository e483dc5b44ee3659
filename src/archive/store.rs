//! The database behind the archive.
//!
//! Does not know: threads, retention in days.
//! Invariants: a file that is not ours is never written to; a batch is one transaction, all or nothing, durable when
//! it returns; what is deleted is overwritten.
//!
//! A damaged page is found when it is read: looking at all of a large file would hold up every start.

use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{
    Connection, ErrorCode, OpenFlags, OptionalExtension, Row, Transaction, TransactionBehavior, params,
};

use super::{ArchiveError, Entry, Order};
use crate::units::UnixNanos;

const FILE: &str = "responses.db";
/// "OBOR".
const APPLICATION_ID: i64 = 0x4F42_4F52;
const SCHEMA_VERSION: i64 = 1;
const PATIENCE: Duration = Duration::from_secs(5);
/// Entries that are removed in one transaction because they are too old.
pub(super) const SWEEP_MAX: u64 = 500;
/// What an entry takes beside its texts.
const OVERHEAD_BYTES: u64 = 256;

const ENTRY: &str = "id, owner, previous, created, input, response";

type SqlResult<T> = Result<T, rusqlite::Error>;

/// What a batch has done.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Written {
    /// For each order, whether something was written or removed.
    pub(super) done: Vec<bool>,
    /// Entries that went because they were too old; with [`SWEEP_MAX`], there may be more.
    pub(super) swept: u64,
}

pub(super) struct Store {
    connection: Connection,
    path: PathBuf,
    /// Of all entries together; of the side that writes only.
    bytes: u64,
}

impl Store {
    /// Opens the database of a data directory for changes; makes both where there are none.
    pub(super) fn open(data_dir: &Path) -> Result<Self, ArchiveError> {
        fs::create_dir_all(data_dir).map_err(|error| ArchiveError::DataDir {
            path: data_dir.to_owned(),
            problem: error.to_string(),
        })?;
        private(&data_dir.join(FILE)).map_err(|error| ArchiveError::DataDir {
            path: data_dir.to_owned(),
            problem: error.to_string(),
        })?;
        let mut store = Self::connect(data_dir)?;
        let empty = store.identify()?;
        store.configure().map_err(|error| store.broken(&error))?;
        if empty {
            store.create().map_err(|error| store.broken(&error))?;
        }
        let sum = "SELECT coalesce(sum(bytes), 0) FROM responses";
        store.bytes =
            store.connection.query_row(sum, [], |row| row.get(0)).map_err(|error| store.broken(&error))?;
        Ok(store)
    }

    /// Opens what is there, to look at it.
    pub(super) fn open_for_reading(data_dir: &Path) -> Result<Self, ArchiveError> {
        let store = Self::connect(data_dir)?;
        store
            .connection
            .execute_batch("PRAGMA query_only = ON; PRAGMA trusted_schema = OFF;")
            .map_err(|error| store.broken(&error))?;
        Ok(store)
    }

    fn connect(data_dir: &Path) -> Result<Self, ArchiveError> {
        let path = data_dir.join(FILE);
        // Reading a file whose log was left behind by a crash writes to it: so both open it for that.
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let opened = Connection::open_with_flags(&path, flags)
            .and_then(|connection| connection.busy_timeout(PATIENCE).map(|()| connection));
        match opened {
            Ok(connection) => Ok(Self { connection, path, bytes: 0 }),
            Err(error) => Err(unreadable(&path, &error)),
        }
    }

    fn broken(&self, error: &rusqlite::Error) -> ArchiveError {
        unreadable(&self.path, error)
    }

    /// Refuses a file that is not ours; says whether it is still empty. Only reads.
    fn identify(&self) -> Result<bool, ArchiveError> {
        let number = |sql: &str| -> Result<i64, ArchiveError> {
            self.connection.query_row(sql, [], |row| row.get(0)).map_err(|error| self.broken(&error))
        };
        let tables = number("SELECT count(*) FROM sqlite_schema")?;
        let application = number("PRAGMA application_id")?;
        let version = number("PRAGMA user_version")?;
        match (tables, application, version) {
            (0, 0, 0) => Ok(true),
            (_, APPLICATION_ID, SCHEMA_VERSION) => Ok(false),
            (_, APPLICATION_ID, found) => Err(ArchiveError::SchemaVersion { path: self.path.clone(), found }),
            _ => Err(ArchiveError::NotOurs { path: self.path.clone() }),
        }
    }

    fn configure(&self) -> SqlResult<()> {
        self.connection.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(()))?;
        self.connection.query_row("PRAGMA secure_delete = ON", [], |_| Ok(()))?;
        self.connection.execute_batch("PRAGMA synchronous = FULL; PRAGMA trusted_schema = OFF;")
    }

    fn create(&mut self) -> SqlResult<()> {
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction.execute_batch(include_str!("schema.sql"))?;
        transaction.execute_batch(&format!(
            "PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};"
        ))?;
        transaction.commit()
    }

    /// Carries out a batch, then removes some of what was made before `oldest`, where that is asked for, and the oldest
    /// ones as long as all together have more than `bytes_max`; the newest stays in any case.
    pub(super) fn write(
        &mut self,
        orders: &[Order],
        oldest: Option<UnixNanos>,
        bytes_max: u64,
    ) -> Result<Written, ArchiveError> {
        let (written, bytes) =
            self.transact(orders, oldest, bytes_max).map_err(|error| self.broken(&error))?;
        self.bytes = bytes;
        let removed = orders.iter().zip(&written.done).any(|(order, done)| *done && order.removes());
        if removed || written.swept > 0 {
            // The log has what was removed until it begins anew.
            let emptied = self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
            if let Err(error) = emptied {
                tracing::warn!(%error, "what was removed is gone, but for the log of {}", self.path.display());
            }
        }
        Ok(written)
    }

    fn transact(
        &mut self,
        orders: &[Order],
        oldest: Option<UnixNanos>,
        bytes_max: u64,
    ) -> SqlResult<(Written, u64)> {
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let mut bytes = self.bytes;
        let mut done = Vec::with_capacity(orders.len());
        for order in orders {
            done.push(match order {
                Order::Keep(entry) => {
                    bytes += insert(&transaction, entry)?;
                    true
                }
                Order::Remove { id, owner } => {
                    let sql = "DELETE FROM responses WHERE id = ?1 AND owner = ?2 RETURNING bytes";
                    let gone = deleted(&transaction, sql, params![id, owner])?;
                    bytes -= gone.bytes;
                    gone.entries > 0
                }
            });
        }
        let mut swept = 0;
        if let Some(oldest) = oldest {
            let sql = "DELETE FROM responses WHERE number IN
                (SELECT number FROM responses WHERE created < ?1 ORDER BY created LIMIT ?2) RETURNING bytes";
            let gone = deleted(&transaction, sql, params![oldest.0, SWEEP_MAX])?;
            bytes -= gone.bytes;
            swept = gone.entries;
        }
        while bytes > bytes_max {
            let sql = "DELETE FROM responses WHERE number IN
                (SELECT number FROM responses WHERE number < (SELECT max(number) FROM responses)
                ORDER BY number LIMIT 1) RETURNING bytes";
            let gone = deleted(&transaction, sql, params![])?;
            if gone.entries == 0 {
                break;
            }
            bytes -= gone.bytes;
        }
        transaction.commit()?;
        Ok((Written { done, swept }, bytes))
    }

    /// An entry of this owner's that was not made before `oldest`.
    pub(super) fn find(
        &self,
        id: &str,
        owner: &str,
        oldest: UnixNanos,
    ) -> Result<Option<Entry>, ArchiveError> {
        let sql = format!("SELECT {ENTRY} FROM responses WHERE id = ?1 AND owner = ?2 AND created >= ?3");
        let read = || {
            let mut query = self.connection.prepare_cached(&sql)?;
            query.query_row(params![id, owner, oldest.0], entry).optional()
        };
        read().map_err(|error| self.broken(&error))
    }

    /// The entry and those that it goes on from, as far back as they are there; oldest first.
    pub(super) fn conversation(
        &self,
        id: &str,
        owner: &str,
        oldest: UnixNanos,
    ) -> Result<Vec<Entry>, ArchiveError> {
        let sql = format!(
            "WITH RECURSIVE chain (number, previous) AS (
                SELECT number, previous FROM responses WHERE id = ?1 AND owner = ?2 AND created >= ?3
                UNION
                SELECT before.number, before.previous FROM chain JOIN responses AS before
                    ON before.id = chain.previous AND before.owner = ?2 AND before.created >= ?3
            )
            SELECT {ENTRY} FROM responses WHERE number IN (SELECT number FROM chain) ORDER BY number"
        );
        let read = || -> SqlResult<Vec<Entry>> {
            let mut query = self.connection.prepare_cached(&sql)?;
            query.query_map(params![id, owner, oldest.0], entry)?.collect()
        };
        read().map_err(|error| self.broken(&error))
    }
}

/// Makes the file where there is none; other users of the machine may not read what people said.
fn private(path: &Path) -> io::Result<()> {
    let made = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    match made {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.map(drop),
    }
}

impl Order {
    fn removes(&self) -> bool {
        matches!(self, Self::Remove { .. })
    }
}

/// What it takes.
fn insert(transaction: &Transaction<'_>, entry: &Entry) -> SqlResult<u64> {
    let Entry { id, owner, previous, created, input, response } = entry;
    let bytes = (input.len() + response.len()) as u64 + OVERHEAD_BYTES;
    transaction
        .prepare_cached(
            "INSERT INTO responses (id, owner, previous, created, input, response, bytes)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?
        .execute(params![id, owner, previous, created.0, input, response, bytes])?;
    Ok(bytes)
}

struct Gone {
    entries: u64,
    bytes: u64,
}

fn deleted(transaction: &Transaction<'_>, sql: &str, values: impl rusqlite::Params) -> SqlResult<Gone> {
    let mut statement = transaction.prepare_cached(sql)?;
    let mut rows = statement.query(values)?;
    let mut gone = Gone { entries: 0, bytes: 0 };
    while let Some(row) = rows.next()? {
        gone.entries += 1;
        gone.bytes += row.get::<_, u64>(0)?;
    }
    Ok(gone)
}

fn entry(row: &Row<'_>) -> SqlResult<Entry> {
    Ok(Entry {
        id: row.get(0)?,
        owner: row.get(1)?,
        previous: row.get(2)?,
        created: UnixNanos(row.get(3)?),
        input: row.get(4)?,
        response: row.get(5)?,
    })
}

fn unreadable(path: &Path, error: &rusqlite::Error) -> ArchiveError {
    let path = path.to_owned();
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => ArchiveError::NotOurs { path },
        Some(ErrorCode::DiskFull) => ArchiveError::DiskFull { path },
        _ => ArchiveError::Database { path, problem: error.to_string() },
    }
}

#[cfg(test)]
impl Store {
    /// From now on the file cannot grow, or can again.
    pub(super) fn fill(&self, full: bool) {
        let pages = |sql: &str| self.connection.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
        let most = if full { pages("PRAGMA page_count") } else { 1_000_000 };
        pages(&format!("PRAGMA max_page_count = {most}"));
    }
}
