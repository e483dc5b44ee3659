//! `control.db`: keys and the trail of their changes.
//!
//! Does not know: who may change what, which keys are in force.
//! Invariants: a file that is not ours, or damaged, is never written to; a change and its row in the trail are one
//! transaction, all or nothing, durable when it returns; rows of the trail are only added.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::{
    Connection, ErrorCode, OpenFlags, OptionalExtension, Row, Transaction, TransactionBehavior, params,
};
use serde_json::Value;

use super::ControlError;
use super::audit_trail::{Action, Actor, AuditEntry, AuditPage};
use super::keys::{Key, KeyId, KeySettings, SecretHash, short};
use crate::request::Tag;
use crate::units::{Picos, UnixNanos};

const FILE: &str = "control.db";
/// "OBOC".
const APPLICATION_ID: i64 = 0x4F42_4F43;
const SCHEMA_VERSION: i64 = 3;
/// What each version has more than the one before.
const PARTS: [&str; SCHEMA_VERSION as usize] =
    [include_str!("schema.sql"), include_str!("alerts.sql"), include_str!("foreseen.sql")];
/// A change waits so long for another process's change.
const WRITE_PATIENCE: Duration = Duration::from_secs(5);
/// A look waits so long for another process that opens or closes the file.
const READ_PATIENCE: Duration = Duration::from_millis(250);

const KEY: &str =
    "SELECT id, hash, old_hash, old_until, name, alias, expires_at, blocked, models, max_tokens,
    max_budget, soft_budget, budget_duration, tpm_limit, rpm_limit, max_parallel_requests, tags, require_tags,
    metadata, created_at, updated_at, deleted_at, changed,
    (SELECT actor FROM audit WHERE target = keys.id ORDER BY audit.id LIMIT 1),
    (SELECT actor FROM audit WHERE audit.id = keys.changed) FROM keys";

pub(super) type SqlResult<T> = Result<T, rusqlite::Error>;

/// A key's row.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct StoredKey {
    pub(super) key: Key,
    pub(super) hash: SecretHash,
    /// The secret before the last rotation, and until when it still works.
    pub(super) old: Option<(SecretHash, UnixNanos)>,
    /// The row of the trail that says how it came to stand so; 0 until it is written.
    pub(super) changed: i64,
}

/// What a change is written down with.
pub(super) struct Deed<'a> {
    pub(super) at: UnixNanos,
    pub(super) actor: &'a Actor,
    pub(super) action: Action,
}

pub(super) struct Store {
    connection: Connection,
    path: PathBuf,
}

impl Store {
    /// Opens the database of a data directory for changes; makes both where there are none.
    pub(super) fn open(data_dir: &Path) -> Result<Self, ControlError> {
        fs::create_dir_all(data_dir)
            .map_err(|source| ControlError::DataDir { path: data_dir.to_owned(), source })?;
        let path = data_dir.join(FILE);
        let mut store = Self::connect(&path, OpenFlags::SQLITE_OPEN_CREATE, WRITE_PATIENCE)?;
        let empty = store.identify()?;
        if !empty {
            store.check()?;
        }
        store.configure().map_err(|source| store.broken(source))?;
        if empty || store.version()? < SCHEMA_VERSION {
            store.create()?;
        }
        Ok(store)
    }

    /// Opens what is there, to look at it.
    pub(super) fn open_for_reading(data_dir: &Path) -> Result<Self, ControlError> {
        let path = data_dir.join(FILE);
        if !path.is_file() {
            return Err(ControlError::NoKeys { path });
        }
        let store = Self::connect(&path, OpenFlags::empty(), WRITE_PATIENCE)?;
        if store.identify()? {
            return Err(ControlError::NoKeys { path });
        }
        store.check()?;
        store.connection.busy_timeout(READ_PATIENCE).map_err(|source| store.broken(source))?;
        Ok(store)
    }

    fn connect(path: &Path, more: OpenFlags, patience: Duration) -> Result<Self, ControlError> {
        // Reading a file whose log was left behind by a crash writes to it: so both open it for that.
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | more;
        let opened = Connection::open_with_flags(path, flags)
            .and_then(|connection| connection.busy_timeout(patience).map(|()| connection));
        let connection = opened.map_err(|source| ControlError::unreadable(path, source))?;
        Ok(Self { connection, path: path.to_owned() })
    }

    fn broken(&self, source: rusqlite::Error) -> ControlError {
        ControlError::unreadable(&self.path, source)
    }

    /// Refuses a file that is not ours; says whether it is still empty. Only reads.
    fn identify(&self) -> Result<bool, ControlError> {
        let number = |sql: &str| -> Result<i64, ControlError> {
            self.connection.query_row(sql, [], |row| row.get(0)).map_err(|source| self.broken(source))
        };
        let tables = number("SELECT count(*) FROM sqlite_schema")?;
        let application = number("PRAGMA application_id")?;
        let version = number("PRAGMA user_version")?;
        match (tables, application, version) {
            (0, 0, 0) => Ok(true),
            (_, APPLICATION_ID, 1..=SCHEMA_VERSION) => Ok(false),
            (_, APPLICATION_ID, found) => Err(ControlError::SchemaVersion { path: self.path.clone(), found }),
            _ => Err(ControlError::NotOurs { path: self.path.clone() }),
        }
    }

    fn check(&self) -> Result<(), ControlError> {
        let verdict: String = self
            .connection
            .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
            .map_err(|source| self.broken(source))?;
        if verdict == "ok" {
            return Ok(());
        }
        Err(ControlError::Corrupt { path: self.path.clone(), detail: verdict })
    }

    fn configure(&self) -> SqlResult<()> {
        let began = Instant::now();
        // SQLite waits for nobody here, and another process may be doing the same.
        while let Err(error) = self.connection.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(())) {
            if error.sqlite_error_code() != Some(ErrorCode::DatabaseBusy) || began.elapsed() > WRITE_PATIENCE
            {
                return Err(error);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.connection.execute_batch(
            "PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; PRAGMA recursive_triggers = ON;
             PRAGMA trusted_schema = OFF;",
        )
    }

    /// Of the tables that are there.
    pub(super) fn version(&self) -> Result<i64, ControlError> {
        let read =
            |connection: &Connection| connection.query_row("PRAGMA user_version", [], |row| row.get(0));
        self.read(read)
    }

    /// What is missing. Two processes may do this at once: the second finds the first one's tables.
    fn create(&mut self) -> Result<(), ControlError> {
        let path = self.path.clone();
        let broken = |source| ControlError::unreadable(&path, source);
        let transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(broken)?;
        let version: usize =
            transaction.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(broken)?;
        if version < PARTS.len() {
            for part in &PARTS[version..] {
                transaction.execute_batch(part).map_err(broken)?;
            }
            transaction
                .execute_batch(&format!(
                    "PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};"
                ))
                .map_err(broken)?;
        }
        transaction.commit().map_err(broken)?;
        self.identify().map(drop)
    }

    /// One change, durable when it returns, or none. Other processes' changes wait meanwhile.
    pub(super) fn transact<T>(
        &mut self,
        work: impl FnOnce(&Change<'_>) -> Result<T, ControlError>,
    ) -> Result<T, ControlError> {
        let path = self.path.clone();
        let broken = |source| ControlError::unreadable(&path, source);
        let transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(broken)?;
        let change = Change { transaction, path: &path };
        let done = work(&change)?;
        change.transaction.commit().map_err(broken)?;
        Ok(done)
    }

    /// A look at one state of the file.
    pub(super) fn read<T>(&self, work: impl FnOnce(&Connection) -> SqlResult<T>) -> Result<T, ControlError> {
        work(&self.connection).map_err(|source| self.broken(source))
    }

    /// A change that is nobody's deed, as what was sent: durable when it returns, or none.
    pub(super) fn write<T>(
        &mut self,
        work: impl FnOnce(&Transaction<'_>) -> SqlResult<T>,
    ) -> Result<T, ControlError> {
        let change = |connection: &mut Connection| {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let done = work(&transaction)?;
            transaction.commit()?;
            Ok(done)
        };
        change(&mut self.connection).map_err(|source| ControlError::unreadable(&self.path, source))
    }

    /// Changes when another connection, of this process or another, has written.
    pub(super) fn data_version(&self) -> Result<i64, ControlError> {
        self.connection
            .query_row("PRAGMA data_version", [], |row| row.get(0))
            .map_err(|source| self.broken(source))
    }

    /// The keys that were changed after this row of the trail, and its last row that changed one.
    pub(super) fn keys_changed_after(&self, seen: i64) -> Result<(Vec<StoredKey>, i64), ControlError> {
        let read = || -> SqlResult<(Vec<StoredKey>, i64)> {
            let sql = format!("{KEY} WHERE changed > ?1 ORDER BY changed");
            let mut query = self.connection.prepare_cached(&sql)?;
            let mut last = seen;
            let mut keys = Vec::new();
            let mut rows = query.query([seen])?;
            while let Some(row) = rows.next()? {
                let stored = stored(row)?;
                last = stored.changed;
                keys.push(stored);
            }
            Ok((keys, last))
        };
        read().map_err(|source| self.broken(source))
    }

    /// The trail, newest first.
    pub(super) fn trail(&self, page: &AuditPage) -> Result<Vec<AuditEntry>, ControlError> {
        let read = || -> SqlResult<Vec<AuditEntry>> {
            let mut query = self.connection.prepare_cached(
                "SELECT id, at, actor, action, target, before, after FROM audit
                 WHERE (?1 IS NULL OR target = ?1) AND (?2 IS NULL OR id < ?2) ORDER BY id DESC LIMIT ?3",
            )?;
            let rows = query.query_map(params![page.target, page.before, page.limit], |row| {
                Ok(AuditEntry {
                    id: row.get(0)?,
                    at: UnixNanos(row.get(1)?),
                    actor: row.get(2)?,
                    action: row.get(3)?,
                    target: row.get(4)?,
                    before: row.get::<_, Option<String>>(5)?.map(|text| parsed(5, &text)).transpose()?,
                    after: row.get::<_, Option<String>>(6)?.map(|text| parsed(6, &text)).transpose()?,
                })
            })?;
            rows.collect()
        };
        read().map_err(|source| self.broken(source))
    }
}

#[cfg(test)]
impl Store {
    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }
}

/// A change in progress; dropped without the end of `transact`, nothing of it stays.
pub(super) struct Change<'a> {
    transaction: Transaction<'a>,
    path: &'a Path,
}

impl Change<'_> {
    fn broken(&self, source: rusqlite::Error) -> ControlError {
        ControlError::unreadable(self.path, source)
    }

    /// # Errors
    /// `NoSuchKey` where there is none, or only a deleted one.
    pub(super) fn living(&self, id: &KeyId) -> Result<StoredKey, ControlError> {
        let found = self
            .transaction
            .prepare_cached(&format!("{KEY} WHERE id = ?1 AND deleted_at IS NULL"))
            .and_then(|mut query| query.query_row([&id.0], stored).optional())
            .map_err(|source| self.broken(source))?;
        found.ok_or_else(|| ControlError::NoSuchKey { reference: id.0.clone() })
    }

    /// Writes a key and its row in the trail; returns it as written. `before` is `None` for a new one.
    pub(super) fn write(
        &self,
        deed: &Deed<'_>,
        before: Option<&StoredKey>,
        mut after: StoredKey,
    ) -> Result<StoredKey, ControlError> {
        if let (Some(alias), None) = (&after.key.settings.alias, after.key.deleted)
            && self.is_taken(alias, &after.key.id).map_err(|source| self.broken(source))?
        {
            return Err(ControlError::AliasTaken { alias: alias.clone() });
        }
        let actor = deed.actor.as_str();
        actor.clone_into(&mut after.key.updated_by);
        after.changed = self
            .audit(deed, before.map(|stored| &stored.key), &after.key)
            .map_err(|source| self.broken(source))?;
        self.put(&after).map_err(|source| self.broken(source))?;
        Ok(after)
    }

    fn is_taken(&self, alias: &str, by_other_than: &KeyId) -> SqlResult<bool> {
        self.transaction
            .prepare_cached("SELECT 1 FROM keys WHERE alias = ?1 AND deleted_at IS NULL AND id <> ?2")?
            .exists(params![alias, by_other_than.0])
    }

    fn audit(&self, deed: &Deed<'_>, before: Option<&Key>, after: &Key) -> SqlResult<i64> {
        self.transaction
            .prepare_cached(
                "INSERT INTO audit (at, actor, action, target, before, after) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            )?
            .execute(params![
                deed.at.0,
                deed.actor.as_str(),
                deed.action.as_str(),
                after.id.0,
                before.map(|key| key.to_json().to_string()),
                after.to_json().to_string()
            ])?;
        Ok(self.transaction.last_insert_rowid())
    }

    fn put(&self, stored: &StoredKey) -> SqlResult<()> {
        let StoredKey { key, hash, old, changed } = stored;
        let set = &key.settings;
        let tags: serde_json::Map<String, Value> = set
            .tags
            .iter()
            .map(|(tag, value)| (tag.as_str().to_owned(), Value::from(value.clone())))
            .collect();
        let mut upsert = self.transaction.prepare_cached(
            "INSERT INTO keys (id, hash, old_hash, old_until, name, alias, expires_at, blocked, models, max_tokens,
             max_budget, soft_budget, budget_duration, tpm_limit, rpm_limit, max_parallel_requests, tags,
             require_tags, metadata, created_at, updated_at, deleted_at, changed)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20, ?21,
             ?22, ?23)
             ON CONFLICT (id) DO UPDATE SET hash = ?2, old_hash = ?3, old_until = ?4, name = ?5, alias = ?6,
             expires_at = ?7, blocked = ?8, models = ?9, max_tokens = ?10, max_budget = ?11, soft_budget = ?12,
             budget_duration = ?13, tpm_limit = ?14, rpm_limit = ?15, max_parallel_requests = ?16, tags = ?17,
             require_tags = ?18, metadata = ?19, updated_at = ?21, deleted_at = ?22, changed = ?23",
        )?;
        upsert.execute(params![
            key.id.0,
            hash.0,
            old.as_ref().map(|(hash, _)| hash.0),
            old.as_ref().map(|(_, until)| until.0),
            key.name,
            set.alias,
            set.expires.map(|at| at.0),
            set.blocked,
            Value::from(set.models.clone()).to_string(),
            set.max_tokens,
            set.max_budget.map(short),
            set.soft_budget.map(short),
            set.budget_duration.map(|span| span.to_string()),
            set.tpm_limit,
            set.rpm_limit,
            set.max_parallel_requests,
            Value::Object(tags).to_string(),
            Value::from_iter(set.require_tags.iter().map(|tag| tag.as_str())).to_string(),
            Value::Object(set.metadata.clone()).to_string(),
            key.created.0,
            key.updated.0,
            key.deleted.map(|at| at.0),
            changed
        ])?;
        Ok(())
    }
}

/// A row of `KEY`.
fn stored(row: &Row<'_>) -> SqlResult<StoredKey> {
    let instant = |column: usize| -> SqlResult<Option<UnixNanos>> {
        Ok(row.get::<_, Option<u64>>(column)?.map(UnixNanos))
    };
    let old = match (row.get::<_, Option<[u8; 32]>>(2)?, instant(3)?) {
        (Some(hash), Some(until)) => Some((SecretHash(hash), until)),
        _ => None,
    };
    let amount = |column: usize| -> SqlResult<Option<Picos>> {
        let text: Option<String> = row.get(column)?;
        text.map(|text| Picos::parse(&text).map_err(|problem| malformed(column, problem))).transpose()
    };
    let span: Option<String> = row.get(12)?;
    let text = |column: usize| row.get::<_, String>(column);
    let tags: std::collections::BTreeMap<Tag, String> = parsed(16, &text(16)?)?;
    let settings = KeySettings {
        alias: row.get(5)?,
        expires: instant(6)?,
        blocked: row.get(7)?,
        models: parsed(8, &text(8)?)?,
        max_tokens: row.get(9)?,
        max_budget: amount(10)?,
        soft_budget: amount(11)?,
        budget_duration: span
            .map(|text| text.parse().map_err(|problem| malformed(12, problem)))
            .transpose()?,
        tpm_limit: row.get(13)?,
        rpm_limit: row.get(14)?,
        max_parallel_requests: row.get(15)?,
        tags,
        require_tags: parsed(17, &text(17)?)?,
        metadata: parsed(18, &text(18)?)?,
    };
    let [created, updated] = [row.get(19)?, row.get(20)?].map(UnixNanos);
    let [created_by, updated_by] = [text(23)?, text(24)?];
    let key = Key {
        id: KeyId(text(0)?),
        name: text(4)?,
        settings,
        created,
        created_by,
        updated,
        updated_by,
        deleted: instant(21)?,
    };
    Ok(StoredKey { key, hash: SecretHash(row.get(1)?), old, changed: row.get(22)? })
}

pub(super) fn parsed<T: serde::de::DeserializeOwned>(column: usize, text: &str) -> SqlResult<T> {
    serde_json::from_str(text).map_err(|error| malformed(column, error.to_string()))
}

pub(super) fn malformed(column: usize, problem: String) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Text, problem.into())
}

impl ControlError {
    fn unreadable(path: &Path, source: rusqlite::Error) -> Self {
        let path = path.to_owned();
        match source.sqlite_error_code() {
            Some(ErrorCode::NotADatabase) => Self::NotOurs { path },
            Some(ErrorCode::DatabaseCorrupt) => Self::Corrupt { path, detail: source.to_string() },
            Some(ErrorCode::DiskFull) => Self::DiskFull { path },
            _ => Self::Database { path, source },
        }
    }
}
