//! What requests were charged since some time, for budgets that begin to count again at a start.

use std::collections::BTreeMap;
use std::path::Path;

use rusqlite::{Connection, params};

use super::LedgerError;
use super::rows::{self, invalid};
use super::store::SqlResult;
use crate::units::{Picos, RequestId, UnixNanos};

/// A part of what one request was charged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Charge {
    pub request: RequestId,
    pub key_id: Option<String>,
    pub tenant: String,
    pub user: Option<String>,
    pub tags: BTreeMap<String, String>,
    /// When the request was submitted.
    pub at: UnixNanos,
    /// Below zero where another device's part is more than all that was charged.
    pub amount: Picos,
    /// Of the request's parts the first.
    pub first: bool,
}

/// What requests were charged that were submitted at or after `since`, in the currency of the last start, which it
/// gives; a server may be running. `None`: none has started yet.
///
/// # Errors
/// When there is no ledger or it cannot be read.
pub fn charges(
    data_dir: &Path,
    since: UnixNanos,
    each: impl FnMut(Charge),
) -> Result<Option<String>, LedgerError> {
    let (mut connection, path) = rows::open_for_reading(data_dir)?;
    rows::in_snapshot(&mut connection, &path, |connection| {
        let last = rows::epochs(connection)?.pop();
        let currency = last.map(|last| last.epoch.rate.currency().to_owned());
        read(connection, (None, currency.as_deref()), since, each)?;
        Ok(currency)
    })
}

/// Of requests, of one key or of all, in one currency or any, that were submitted at or after `since`; those of one
/// request add up to what it was charged.
pub(super) fn read(
    connection: &Connection,
    (key, currency): (Option<&str>, Option<&str>),
    since: UnixNanos,
    mut each: impl FnMut(Charge),
) -> SqlResult<()> {
    // No request ends before it was submitted, so that the index of the ends serves.
    let of_key = if key.is_some() { "AND receipts.key_id = ?2" } else { "AND ?2 IS NULL" };
    let mut query = connection.prepare(&format!(
        "SELECT receipts.key_id, receipts.user, receipts.tags, receipts.submitted_at,
         receipt_lines.time_picos, receipt_lines.memory_picos - receipt_lines.discount_picos,
         CASE receipt_lines.line WHEN 0 THEN receipts.overrun_picos ELSE 0 END, receipts.tenant, receipt_lines.line,
         receipts.request_id
         FROM receipts JOIN receipt_lines ON receipt_lines.tx = receipts.tx
         WHERE receipts.finished_at >= ?1 AND receipts.submitted_at >= ?1 AND receipts.status <> 'error'
         {of_key} AND (?3 IS NULL OR receipts.currency = ?3)"
    ))?;
    let mut rows = query.query(params![i64::try_from(since.0).unwrap_or(i64::MAX), key, currency])?;
    while let Some(row) = rows.next()? {
        let tags: String = row.get(2)?;
        let part = |column: usize| row.get::<_, i64>(column).map(i128::from);
        each(Charge {
            request: RequestId(row.get(9)?),
            key_id: row.get(0)?,
            tenant: row.get(7)?,
            user: row.get(1)?,
            tags: serde_json::from_str(&tags).map_err(|error| invalid(2, error))?,
            at: UnixNanos(row.get(3)?),
            amount: Picos(part(4)? + part(5)? - part(6)?),
            first: row.get::<_, i64>(8)? == 0,
        });
    }
    Ok(())
}
