//! Pages of receipts, newest first.
//!
//! Does not know: who may see what; the caller's filter says it.

use rusqlite::{Connection, OptionalExtension, ToSql};

use super::receipt::Receipt;
use super::rows;
use super::store::SqlResult;
use crate::request::Finish;
use crate::units::{RequestId, UnixNanos};

/// Which receipts; `None` leaves a field open.
#[derive(Debug, Clone, Default)]
pub struct ReceiptFilter {
    pub model: Option<String>,
    pub user: Option<String>,
    pub tenant: Option<String>,
    pub key_id: Option<String>,
    pub endpoint: Option<String>,
    pub status: Option<Finish>,
    /// Finished at or after.
    pub since: Option<UnixNanos>,
    /// Finished before.
    pub until: Option<UnixNanos>,
}

/// Which part of them.
#[derive(Debug, Clone)]
pub struct Page {
    /// At most this many; at least 1 and at most 1,000 are given.
    pub limit: u32,
    /// Only receipts older than this request's; an id that is not in the ledger gives an empty page.
    pub after: Option<RequestId>,
}

impl Default for Page {
    fn default() -> Self {
        Self { limit: 100, after: None }
    }
}

#[derive(Debug, Clone)]
pub struct ReceiptPage {
    pub receipts: Vec<Receipt>,
    /// There are older ones; ask for those after the last one here.
    pub has_more: bool,
}

pub(super) fn receipts(
    connection: &Connection,
    filter: &ReceiptFilter,
    page: &Page,
) -> SqlResult<ReceiptPage> {
    let empty = ReceiptPage { receipts: Vec::new(), has_more: false };
    let before: Option<i64> = match &page.after {
        None => None,
        Some(request) => {
            let mut find = connection.prepare_cached("SELECT tx FROM receipts WHERE request_id = ?1")?;
            let Some(tx) = find.query_row([&request.0], |row| row.get(0)).optional()? else {
                return Ok(empty);
            };
            Some(tx)
        }
    };
    let status = filter.status.map(Finish::as_str);
    let (since, until) = (filter.since.map(|wall| wall.0), filter.until.map(|wall| wall.0));
    let limit = page.limit.clamp(1, 1000) as usize;
    let more = i64::try_from(limit).expect("at most 1000") + 1;
    let conditions: [(&str, &dyn ToSql, bool); 9] = [
        ("model =", &filter.model, filter.model.is_some()),
        ("user =", &filter.user, filter.user.is_some()),
        ("tenant =", &filter.tenant, filter.tenant.is_some()),
        ("key_id =", &filter.key_id, filter.key_id.is_some()),
        ("endpoint =", &filter.endpoint, filter.endpoint.is_some()),
        ("status =", &status, status.is_some()),
        ("finished_at >=", &since, since.is_some()),
        ("finished_at <", &until, until.is_some()),
        ("tx <", &before, before.is_some()),
    ];
    let mut sql = String::from("WHERE 1");
    let mut values: Vec<&dyn ToSql> = Vec::new();
    for (condition, value, given) in conditions {
        if given {
            values.push(value);
            sql.push_str(&format!(" AND {condition} ?{}", values.len()));
        }
    }
    values.push(&more);
    sql.push_str(&format!(" ORDER BY tx DESC LIMIT ?{}", values.len()));
    let mut receipts: Vec<Receipt> =
        rows::receipts(connection, &sql, &values)?.into_iter().map(|(_, receipt)| receipt).collect();
    let has_more = receipts.len() > limit;
    receipts.truncate(limit);
    Ok(ReceiptPage { receipts, has_more })
}
