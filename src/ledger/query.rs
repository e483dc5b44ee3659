//! Receipts looked up: pages of them, newest first, and the one of an idempotency key.
//!
//! Does not know: who may see what; the caller's filter says it.

use rusqlite::{Connection, OptionalExtension, ToSql, params};

use super::receipt::Receipt;
use super::rows;
use super::store::SqlResult;
use crate::request::Finish;
use crate::units::{RequestId, UnixNanos};

/// Which receipts; `None` leaves a field open.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
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
#[derive(Debug, Clone, PartialEq, Eq)]
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

type Span = (Option<i64>, Option<i64>);

/// More receipts of a span of time are not counted: then a page is soon full.
const SPAN_MAX: i64 = 10_000;
const SPAN: &str = "SELECT count(*), min(tx), max(tx) FROM
    (SELECT tx FROM receipts WHERE finished_at >= ?1 AND finished_at < ?2 LIMIT ?3)";

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
    let time = |wall: UnixNanos| i64::try_from(wall.0).unwrap_or(i64::MAX);
    let (since, until) = (filter.since.map(time), filter.until.map(time));
    let mut span = None;
    if since.is_some() || until.is_some() {
        span = transactions_of(connection, since.unwrap_or(0), until.unwrap_or(i64::MAX))?;
        if span.is_some_and(|(first, _)| first.is_none()) {
            return Ok(empty);
        }
    }
    let (first, last) = span.unwrap_or((None, None));
    let limit = page.limit.clamp(1, 1000) as usize;
    let more = i64::try_from(limit).expect("at most 1000") + 1;
    let status = filter.status.map(Finish::as_str);
    let bounds: [(&str, &dyn ToSql, bool); 5] = [
        ("tx <", &before, before.is_some()),
        ("tx >=", &first, first.is_some()),
        ("tx <=", &last, last.is_some()),
        ("+finished_at >=", &since, since.is_some()),
        ("+finished_at <", &until, until.is_some()),
    ];
    let (sql, values) = condition(filter, &status, bounds, &more);
    let mut receipts: Vec<Receipt> =
        rows::receipts(connection, &sql, &values)?.into_iter().map(|(_, receipt)| receipt).collect();
    let has_more = receipts.len() > limit;
    receipts.truncate(limit);
    Ok(ReceiptPage { receipts, has_more })
}

/// The end of the query. Of the fields that have an index, that which leaves the fewest receipts finds
/// them, already in order; a `+` keeps the others' indexes out.
fn condition<'a>(
    filter: &'a ReceiptFilter,
    status: &'a Option<&'static str>,
    bounds: [(&'static str, &'a dyn ToSql, bool); 5],
    more: &'a i64,
) -> (String, Vec<&'a dyn ToSql>) {
    let rare = !matches!(filter.status, None | Some(Finish::Stop | Finish::Length));
    let indexed: [(&str, &dyn ToSql, bool); 5] = [
        ("user", &filter.user, filter.user.is_some()),
        ("key_id", &filter.key_id, filter.key_id.is_some()),
        ("status", status, rare),
        ("tenant", &filter.tenant, filter.tenant.is_some()),
        ("status", status, status.is_some() && !rare),
    ];
    let plain: [(&str, &dyn ToSql, bool); 2] = [
        ("model =", &filter.model, filter.model.is_some()),
        ("endpoint =", &filter.endpoint, filter.endpoint.is_some()),
    ];
    let mut sql = String::from("WHERE 1");
    let mut values: Vec<&dyn ToSql> = Vec::new();
    for (column, value, given) in indexed {
        if given {
            let sign = if values.is_empty() { "" } else { "+" };
            values.push(value);
            sql.push_str(&format!(" AND {sign}{column} = ?{}", values.len()));
        }
    }
    for (condition, value, given) in plain.into_iter().chain(bounds) {
        if given {
            values.push(value);
            sql.push_str(&format!(" AND {condition} ?{}", values.len()));
        }
    }
    values.push(more);
    sql.push_str(&format!(" ORDER BY tx DESC LIMIT ?{}", values.len()));
    (sql, values)
}

/// The first and the last transaction of the receipts of a span of time, from the index alone: `Some` where
/// they are so few that they were all looked at, with `None` in it where there are none.
fn transactions_of(connection: &Connection, since: i64, until: i64) -> SqlResult<Option<Span>> {
    let mut query = connection.prepare_cached(SPAN)?;
    let (count, span): (i64, Span) =
        query.query_row([since, until, SPAN_MAX], |row| Ok((row.get(0)?, (row.get(1)?, row.get(2)?))))?;
    Ok((count < SPAN_MAX).then_some(span))
}

/// The receipt that an idempotency key stands on, in the key's scope.
pub(super) fn by_idempotency_key(
    connection: &Connection,
    key_id: &str,
    idempotency_key: &str,
) -> SqlResult<Option<RequestId>> {
    connection
        .prepare_cached(
            "SELECT request_id FROM receipts
             WHERE coalesce(key_id, '') = ?1 AND idempotency_key = ?2 AND idempotency_key IS NOT NULL",
        )?
        .query_row(params![key_id, idempotency_key], |row| row.get(0))
        .map(RequestId)
        .optional()
}

#[cfg(test)]
mod tests {
    use super::super::store::{FILE, Store};
    use super::*;

    #[test]
    fn common_filters_are_served_by_an_index_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join(FILE)).unwrap();
        let plan = |sql: &str, values: &[&dyn ToSql]| {
            let mut query = store.connection().prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
            let rows = query.query_map(values, |row| row.get::<_, String>(3)).unwrap();
            rows.map(Result::unwrap).collect::<Vec<_>>().join("; ")
        };
        let some = || Some("x".to_owned());
        let none = ReceiptFilter::default;
        let both = |status| ReceiptFilter { tenant: some(), status: Some(status), ..none() };
        for (filter, index) in [
            (ReceiptFilter { user: some(), tenant: some(), model: some(), ..none() }, "receipts_user"),
            (ReceiptFilter { key_id: some(), status: Some(Finish::Error), ..none() }, "receipts_key"),
            (ReceiptFilter { tenant: some(), ..none() }, "receipts_tenant"),
            (both(Finish::Stop), "receipts_tenant"),
            (both(Finish::Error), "receipts_status"),
        ] {
            let (status, bound) = (filter.status.map(Finish::as_str), Some(5_i64));
            let bounds: [(&str, &dyn ToSql, bool); 5] = [
                ("tx <", &bound, true),
                ("tx >=", &bound, true),
                ("tx <=", &bound, true),
                ("+finished_at >=", &bound, true),
                ("+finished_at <", &bound, true),
            ];
            let (sql, values) = condition(&filter, &status, bounds, &10);
            let plan = plan(&format!("{} {sql}", rows::RECEIPT), &values);
            assert!(plan.contains(index) && !plan.contains("B-TREE"), "{sql}: {plan}");
        }
        assert!(plan(SPAN, &[&1, &2, &3]).contains("COVERING INDEX receipts_finished"));
    }
}
