//! `batches.db`: what is known of files and batches, and the results of lines whose batch has not ended.
//!
//! Invariants: a database that is not ours is never written to; each change is one transaction, durable when it
//! returns, or none.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension, Row, ToSql, TransactionBehavior, params};
use serde::de::DeserializeOwned;

use super::facts::{
    Batch, Counts, FileFacts, NewBatch, Owner, Page, Problem, Purpose, Sort, Status, Times, Tokens,
};
use super::{BatchesError, Outcome};
use crate::units::Picos;

const FILE: &str = "batches.db";
/// "OBOB".
const APPLICATION_ID: i64 = 0x4F42_4F42;
const SCHEMA_VERSION: i64 = 1;
const PATIENCE: Duration = Duration::from_secs(5);
/// Results of a batch that are read at a time.
const RESULTS_A_PART: usize = 100;

const FILE_ROW: &str = "SELECT id, key_id, bytes, created_at, filename, purpose, seq FROM files";
const BATCH_ROW: &str =
    "SELECT id, key_id, tenant, endpoint, window, input_file, output_file, error_file, metadata,
    headers, status, problems, created_at, expires_at, in_progress_at, finalizing_at, completed_at, failed_at,
    expired_at, cancelling_at, cancelled_at, total, completed, failed, prompt_tokens, cached_tokens,
    completion_tokens, cost_picos FROM batches";
const OPEN: &str = "status IN ('validating', 'in_progress', 'finalizing', 'cancelling')";

type SqlResult<T> = Result<T, rusqlite::Error>;

pub(super) struct Store {
    connection: Connection,
    path: PathBuf,
}

impl Store {
    pub(super) fn open(data_dir: &Path) -> Result<Self, BatchesError> {
        let path = data_dir.join(FILE);
        let opened = Connection::open(&path).and_then(|connection| {
            connection.busy_timeout(PATIENCE)?;
            Ok(connection)
        });
        let connection = opened.map_err(|source| unreadable(&path, source))?;
        let mut store = Self { connection, path };
        let empty = store.identify()?;
        store.with(|connection| {
            connection.execute_batch(
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;
                 PRAGMA trusted_schema = OFF;",
            )
        })?;
        if empty {
            store.change(|transaction| {
                transaction.execute_batch(include_str!("schema.sql"))?;
                transaction.execute_batch(&format!(
                    "PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};"
                ))
            })?;
        }
        Ok(store)
    }

    /// Refuses a database that is not ours; says whether it is still empty. Only reads.
    fn identify(&self) -> Result<bool, BatchesError> {
        let number = |sql: &str| self.with(|connection| connection.query_row(sql, [], |row| row.get(0)));
        let tables: i64 = number("SELECT count(*) FROM sqlite_schema")?;
        let (application, version) = (number("PRAGMA application_id")?, number("PRAGMA user_version")?);
        let path = || self.path.clone();
        match (tables, application, version) {
            (0, 0, 0) => Ok(true),
            (_, APPLICATION_ID, SCHEMA_VERSION) => Ok(false),
            (_, APPLICATION_ID, found) => {
                Err(BatchesError::SchemaVersion { path: path(), found, known: SCHEMA_VERSION })
            }
            _ => Err(BatchesError::NotOurs { path: path() }),
        }
    }

    fn with<T>(&self, work: impl FnOnce(&Connection) -> SqlResult<T>) -> Result<T, BatchesError> {
        work(&self.connection).map_err(|source| unreadable(&self.path, source))
    }

    /// One change, durable when it returns, or none.
    fn change<T>(&mut self, work: impl FnOnce(&Connection) -> SqlResult<T>) -> Result<T, BatchesError> {
        let change = |connection: &mut Connection| {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let done = work(&transaction)?;
            transaction.commit()?;
            Ok(done)
        };
        change(&mut self.connection).map_err(|source| unreadable(&self.path, source))
    }

    // ------------------------------------------------------------ files

    pub(super) fn file_ids(&self) -> Result<HashSet<String>, BatchesError> {
        self.with(|connection| {
            let mut query = connection.prepare("SELECT id FROM files")?;
            query.query_map([], |row| row.get(0))?.collect()
        })
    }

    /// Of all files together.
    pub(super) fn bytes(&self) -> Result<u64, BatchesError> {
        self.with(|connection| {
            connection.query_row("SELECT coalesce(sum(bytes), 0) FROM files", [], |row| row.get(0))
        })
    }

    pub(super) fn add_file(&mut self, file: &FileFacts) -> Result<(), BatchesError> {
        self.change(|connection| insert_file(connection, file))
    }

    pub(super) fn file(&self, id: &str) -> Result<Option<FileFacts>, BatchesError> {
        self.with(|connection| {
            let mut query = connection.prepare_cached(&format!("{FILE_ROW} WHERE id = ?1"))?;
            query.query_row([id], file_of).optional()
        })
    }

    pub(super) fn files(
        &self,
        owner: Option<&Owner>,
        purpose: Option<Purpose>,
        page: &Page,
    ) -> Result<(Vec<FileFacts>, bool), BatchesError> {
        let purpose = purpose.map(Purpose::as_str);
        self.page(("files", FILE_ROW), owner, ("purpose", purpose), page, file_of)
    }

    pub(super) fn delete_file(&mut self, id: &str) -> Result<(), BatchesError> {
        let reader = self.change(|connection| {
            let sql = format!("SELECT id FROM batches WHERE {OPEN} AND input_file = ?1");
            let reader: Option<String> =
                connection.prepare_cached(&sql)?.query_row([id], |row| row.get(0)).optional()?;
            match reader {
                Some(batch) => Ok(Err(Some(batch))),
                None if connection.execute("DELETE FROM files WHERE id = ?1", [id])? == 0 => Ok(Err(None)),
                None => Ok(Ok(())),
            }
        })?;
        let file = id.to_owned();
        reader.map_err(|reader| match reader {
            Some(batch) => BatchesError::InUse { file, batch },
            None => BatchesError::NoSuchFile { id: file },
        })
    }

    // ------------------------------------------------------------ batches

    pub(super) fn add_batch(
        &mut self,
        id: &str,
        new: &NewBatch,
        now: u64,
        open_max: usize,
    ) -> Result<Batch, BatchesError> {
        let (window, seconds) = &new.window;
        let made = self.change(|connection| {
            let sql = format!("SELECT count(*) FROM batches WHERE {OPEN}");
            let open: u64 = connection.prepare_cached(&sql)?.query_row([], |row| row.get(0))?;
            if open >= open_max as u64 {
                return Ok(Err(BatchesError::TooMany { open: open_max }));
            }
            let input = connection.prepare_cached("SELECT 1 FROM files WHERE id = ?1")?.exists([&new.input_file])?;
            if !input {
                return Ok(Err(BatchesError::NoSuchFile { id: new.input_file.clone() }));
            }
            connection.execute(
                "INSERT INTO batches (id, key_id, tenant, endpoint, window, input_file, metadata, headers, status,
                 created_at, expires_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, 'validating', ?9, ?10)",
                params![
                    id,
                    new.owner.key_id,
                    new.tenant,
                    new.endpoint,
                    window,
                    new.input_file,
                    json(&new.metadata),
                    json(&new.headers),
                    now,
                    now.saturating_add(*seconds)
                ],
            )?;
            batch(connection, id).map(Ok)
        })?;
        made.map(|batch| batch.expect("it was just made"))
    }

    pub(super) fn batch(&self, id: &str) -> Result<Option<Batch>, BatchesError> {
        self.with(|connection| batch(connection, id))
    }

    pub(super) fn batches(
        &self,
        owner: Option<&Owner>,
        page: &Page,
    ) -> Result<(Vec<Batch>, bool), BatchesError> {
        self.page(("batches", BATCH_ROW), owner, ("status", None), page, batch_of)
    }

    pub(super) fn unfinished(&self) -> Result<Vec<String>, BatchesError> {
        self.with(|connection| {
            let sql = format!("SELECT id FROM batches WHERE {OPEN} ORDER BY seq");
            connection.prepare_cached(&sql)?.query_map([], |row| row.get(0))?.collect()
        })
    }

    pub(super) fn cancel(&mut self, id: &str, now: u64) -> Result<Batch, BatchesError> {
        let found = self.change(|connection| {
            connection.execute(
                "UPDATE batches SET status = 'cancelling', cancelling_at = ?2
                 WHERE id = ?1 AND status IN ('validating', 'in_progress')",
                params![id, now],
            )?;
            batch(connection, id)
        })?;
        match found {
            Some(batch) if matches!(batch.status, Status::Cancelling | Status::Cancelled) => Ok(batch),
            Some(batch) => Err(BatchesError::Ended { batch: batch.id, status: batch.status.as_str() }),
            None => Err(BatchesError::Ended { batch: id.to_owned(), status: "not there" }),
        }
    }

    pub(super) fn begin(&mut self, id: &str, lines: u64, now: u64) -> Result<(), BatchesError> {
        self.update(
            "UPDATE batches SET status = 'in_progress', in_progress_at = ?2, total = ?3
             WHERE id = ?1 AND status = 'validating'",
            params![id, now, lines],
        )
    }

    pub(super) fn fail(&mut self, id: &str, problems: &[Problem], now: u64) -> Result<(), BatchesError> {
        self.update(
            "UPDATE batches SET status = 'failed', failed_at = ?2, problems = ?3
             WHERE id = ?1 AND status = 'validating'",
            params![id, now, serde_json::to_string(problems).expect("plain data is JSON")],
        )
    }

    pub(super) fn finalize(&mut self, id: &str, now: u64) -> Result<(), BatchesError> {
        self.update(
            "UPDATE batches SET status = 'finalizing', finalizing_at = ?2
             WHERE id = ?1 AND status = 'in_progress'",
            params![id, now],
        )
    }

    fn update(&mut self, sql: &str, values: &[&dyn ToSql]) -> Result<(), BatchesError> {
        self.change(|connection| connection.execute(sql, values).map(drop))
    }

    /// The batch has ended, and these are its files.
    pub(super) fn finish(
        &mut self,
        id: &str,
        end: Status,
        (output, errors): (Option<FileFacts>, Option<FileFacts>),
        now: u64,
    ) -> Result<(), BatchesError> {
        let at = match end {
            Status::Completed => "completed_at",
            Status::Expired => "expired_at",
            Status::Cancelled => "cancelled_at",
            other => unreachable!("a batch does not end {}", other.as_str()),
        };
        self.change(|connection| {
            for file in output.iter().chain(&errors) {
                insert_file(connection, file)?;
            }
            let id_of = |file: Option<FileFacts>| file.map(|file| file.id);
            connection.execute(
                &format!(
                    "UPDATE batches SET status = ?2, {at} = ?3, output_file = ?4, error_file = ?5 WHERE id = ?1"
                ),
                params![id, end.as_str(), now, id_of(output), id_of(errors)],
            )?;
            connection.execute("DELETE FROM results WHERE batch = ?1", [id]).map(drop)
        })
    }

    // ------------------------------------------------------------ lines

    pub(super) fn ended_lines(&self, id: &str) -> Result<HashSet<u64>, BatchesError> {
        self.with(|connection| {
            let mut query = connection.prepare_cached("SELECT line FROM results WHERE batch = ?1")?;
            query.query_map([id], |row| row.get(0))?.collect()
        })
    }

    pub(super) fn record(&mut self, id: &str, outcome: &Outcome) -> Result<(), BatchesError> {
        let Outcome { line, completed, record, tokens } = outcome;
        let cost = i64::try_from(tokens.cost.0).unwrap_or(i64::MAX);
        self.change(|connection| {
            let new = connection
                .prepare_cached(
                    "INSERT INTO results (batch, line, completed, record) VALUES (?1, ?2, ?3, ?4)
                     ON CONFLICT DO NOTHING",
                )?
                .execute(params![id, line, completed, record])?;
            if new == 0 {
                return Ok(());
            }
            connection
                .prepare_cached(
                    "UPDATE batches SET completed = completed + ?2, failed = failed + ?3,
                     prompt_tokens = prompt_tokens + ?4, cached_tokens = cached_tokens + ?5,
                     completion_tokens = completion_tokens + ?6, cost_picos = cost_picos + ?7 WHERE id = ?1",
                )?
                .execute(params![
                    id,
                    u64::from(*completed),
                    u64::from(!completed),
                    tokens.prompt,
                    tokens.cached,
                    tokens.completion,
                    cost
                ])?;
            Ok(())
        })
    }

    /// The next results behind this line.
    pub(super) fn results(
        &self,
        id: &str,
        completed: bool,
        after: u64,
    ) -> Result<Vec<(u64, String)>, BatchesError> {
        self.with(|connection| {
            let mut query = connection.prepare_cached(
                "SELECT line, record FROM results WHERE batch = ?1 AND completed = ?2 AND line > ?3
                 ORDER BY line LIMIT ?4",
            )?;
            let values = params![id, completed, after, RESULTS_A_PART];
            query.query_map(values, |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
        })
    }

    /// Part of a list of an owner, or of all, where a column has a value, if one is given.
    fn page<T>(
        &self,
        (table, select): (&str, &str),
        owner: Option<&Owner>,
        (column, value): (&str, Option<&str>),
        page: &Page,
        read: fn(&Row<'_>) -> SqlResult<T>,
    ) -> Result<(Vec<T>, bool), BatchesError> {
        let (order, behind) = match page.sort {
            Sort::NewestFirst => ("DESC", "<"),
            Sort::OldestFirst => ("ASC", ">"),
        };
        // Without a cursor all are behind it; one that is not there has nothing behind it.
        let sql = format!(
            "{select} WHERE (?1 OR key_id IS ?2) AND (?3 IS NULL OR {column} = ?3)
             AND (?4 IS NULL OR seq {behind} (SELECT seq FROM {table} WHERE id = ?4)) ORDER BY seq {order} LIMIT ?5"
        );
        let key_id = owner.and_then(|owner| owner.key_id.as_deref());
        let values = params![owner.is_none(), key_id, value, page.after, page.limit + 1];
        let mut rows: Vec<T> =
            self.with(|connection| connection.prepare_cached(&sql)?.query_map(values, read)?.collect())?;
        let more = rows.len() > page.limit;
        rows.truncate(page.limit);
        Ok((rows, more))
    }
}

fn unreadable(path: &Path, source: rusqlite::Error) -> BatchesError {
    let path = path.to_owned();
    match source.sqlite_error_code() {
        Some(rusqlite::ErrorCode::NotADatabase) => BatchesError::NotOurs { path },
        _ => BatchesError::Database { path, source },
    }
}

fn insert_file(connection: &Connection, file: &FileFacts) -> SqlResult<()> {
    let FileFacts { id, owner, bytes, created, filename, purpose } = file;
    connection
        .prepare_cached(
            "INSERT INTO files (id, key_id, bytes, created_at, filename, purpose) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )?
        .execute(params![id, owner.key_id, bytes, created, filename, purpose.as_str()])
        .map(drop)
}

fn batch(connection: &Connection, id: &str) -> SqlResult<Option<Batch>> {
    connection.prepare_cached(&format!("{BATCH_ROW} WHERE id = ?1"))?.query_row([id], batch_of).optional()
}

fn file_of(row: &Row<'_>) -> SqlResult<FileFacts> {
    Ok(FileFacts {
        id: row.get(0)?,
        owner: Owner { key_id: row.get(1)? },
        bytes: row.get(2)?,
        created: row.get(3)?,
        filename: row.get(4)?,
        purpose: word(row, 5, Purpose::parse)?,
    })
}

fn batch_of(row: &Row<'_>) -> SqlResult<Batch> {
    Ok(Batch {
        id: row.get(0)?,
        owner: Owner { key_id: row.get(1)? },
        tenant: row.get(2)?,
        endpoint: row.get(3)?,
        window: row.get(4)?,
        input_file: row.get(5)?,
        output_file: row.get(6)?,
        error_file: row.get(7)?,
        metadata: parsed(8, &row.get::<_, String>(8)?)?,
        headers: parsed(9, &row.get::<_, String>(9)?)?,
        status: word(row, 10, Status::parse)?,
        problems: row.get::<_, Option<String>>(11)?.map(|text| parsed(11, &text)).transpose()?,
        times: Times {
            created: row.get(12)?,
            expires: row.get(13)?,
            in_progress: row.get(14)?,
            finalizing: row.get(15)?,
            completed: row.get(16)?,
            failed: row.get(17)?,
            expired: row.get(18)?,
            cancelling: row.get(19)?,
            cancelled: row.get(20)?,
        },
        counts: Counts { total: row.get(21)?, completed: row.get(22)?, failed: row.get(23)? },
        tokens: Tokens {
            prompt: row.get(24)?,
            cached: row.get(25)?,
            completion: row.get(26)?,
            cost: Picos(row.get::<_, i64>(27)?.into()),
        },
    })
}

fn json(pairs: &BTreeMap<String, String>) -> String {
    serde_json::to_string(pairs).expect("strings are JSON")
}

fn parsed<T: DeserializeOwned>(column: usize, text: &str) -> SqlResult<T> {
    serde_json::from_str(text)
        .map_err(|error| rusqlite::Error::FromSqlConversionFailure(column, Type::Text, error.into()))
}

fn word<T>(row: &Row<'_>, column: usize, parse: impl FnOnce(&str) -> Option<T>) -> SqlResult<T> {
    let text: String = row.get(column)?;
    parse(&text).ok_or_else(|| {
        let error = format!("{text:?} is no word of this column");
        rusqlite::Error::FromSqlConversionFailure(column, Type::Text, error.into())
    })
}
