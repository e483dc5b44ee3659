//! What requests were charged since some time, for budgets that begin to count again at a start.

use std::collections::BTreeMap;

use rusqlite::{Connection, params};

use super::rows::invalid;
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

/// Of requests, of one key or of all, that were submitted at or after `since`; those of one request add up to what it was charged.
pub(super) fn charges(
    connection: &Connection,
    key: Option<&str>,
    since: UnixNanos,
    mut each: impl FnMut(Charge),
) -> SqlResult<()> {
    // No request ends before it was submitted, so that the index of the ends serves.
    let of_key = if key.is_some() { "AND receipts.key_id = ?2" } else { "AND ?2 IS NULL" };
    let mut query = connection.prepare(&format!(
        "SELECT receipts.key_id, receipts.user, receipts.tags, receipts.submitted_at,
         receipt_lines.time_picos, receipt_lines.memory_picos,
         CASE receipt_lines.line WHEN 0 THEN receipts.overrun_picos ELSE 0 END, receipts.tenant, receipt_lines.line,
         receipts.request_id
         FROM receipts JOIN receipt_lines ON receipt_lines.tx = receipts.tx
         WHERE receipts.finished_at >= ?1 AND receipts.submitted_at >= ?1 AND receipts.status <> 'error'
         {of_key}"
    ))?;
    let mut rows = query.query(params![i64::try_from(since.0).unwrap_or(i64::MAX), key])?;
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
