//! `GET /spend/logs` and `/global/spend/report`, in LiteLLM's shapes: what dashboards and scripts for it read.
//!
//! Where the shape wants a number there is one, with the exact figures beside it under `obol`. A request with
//! status `error` is listed and costs its caller nothing. Dates are UTC days, the last one included.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::{RawQuery, State};
use axum::http::HeaderName;
use axum::response::IntoResponse;
use axum::{Extension, Json};
use serde_json::{Map, Value, json};

use super::Server;
use super::error::ApiError;
use super::fields::Invalid;
use super::receipts::{bare_id, from_ledger, number as whole_number};
use super::spend_query::{Pairs, Viewer, exact, label, number};
use crate::ledger::{By, Calendar, Page, Receipt, ReceiptFilter, ReportQuery, Row};
use crate::request::Finish;
use crate::units::{DeviceNanos, Picos, RequestId, UnixNanos};

const PAGE_MAX: u32 = 1000;
/// Whether there are older entries than those of the answer.
const HAS_MORE: HeaderName = HeaderName::from_static("x-obol-has-more");

/// What `/spend/logs` is asked for.
#[derive(Debug, PartialEq)]
enum Logs {
    One(RequestId, Viewer),
    Page(ReceiptFilter, Page),
    Days(ReportQuery),
}

/// Entries newest first: `request_id`, `api_key` (the key's id), `user_id`, `start_date`, `end_date`; at most `limit`
/// (1,000) after the one with the id `after`. With dates, sums by day instead, unless `summarize=false`.
pub(super) async fn logs(
    State(server): State<Arc<Server>>,
    Extension(viewer): Extension<Viewer>,
    RawQuery(query): RawQuery,
) -> Result<impl IntoResponse, ApiError> {
    let asked = logs_of(query.as_deref().unwrap_or_default(), viewer)?;
    let (entries, has_more) = match asked {
        Logs::One(request, viewer) => {
            let receipt = from_ledger(&server, move |ledger| ledger.receipt(&request)).await?;
            let own = |receipt: &Receipt| match &viewer {
                Viewer::Admin => true,
                Viewer::Key(own) => receipt.attribution.key_id.as_ref() == Some(own),
            };
            (receipt.iter().filter(|receipt| own(receipt)).map(entry).collect(), false)
        }
        Logs::Page(filter, page) => {
            let page = from_ledger(&server, move |ledger| ledger.receipts(&filter, &page)).await?;
            (page.receipts.iter().map(entry).collect::<Vec<_>>(), page.has_more)
        }
        Logs::Days(query) => {
            let report = from_ledger(&server, move |ledger| ledger.report(&query)).await?;
            (days(&report.rows), false)
        }
    };
    Ok(([(HAS_MORE, if has_more { "true" } else { "false" })], Json(Value::Array(entries))))
}

fn logs_of(query: &str, viewer: Viewer) -> Result<Logs, Invalid> {
    let mut pairs = Pairs::parse(query)?;
    let request = pairs.one("request_id")?;
    let key_id = viewer.key(pairs.one("api_key")?);
    let user = pairs.one("user_id")?;
    let (since, until) = pairs.dates()?;
    let summarize = match pairs.one("summarize")?.as_deref() {
        None | Some("true" | "True") => true,
        Some("false" | "False") => false,
        Some(_) => return Err(Invalid::new("summarize", "`summarize` must be true or false")),
    };
    let mut page = Page { limit: PAGE_MAX, after: pairs.one("after")?.map(|id| bare_id(&id)) };
    if let Some(limit) = pairs.one("limit")? {
        page.limit = whole_number("limit", &limit, 1..=u64::from(PAGE_MAX))? as u32;
    }
    pairs.finish()?;
    if let Some(request) = request {
        return Ok(Logs::One(bare_id(&request), viewer));
    }
    if (since.is_some() || until.is_some()) && summarize {
        let mut query =
            ReportQuery { since, until, ..ReportQuery::by(&[By::Day, By::User, By::Model, By::Key]) };
        query.only.extend(key_id.map(|key| (By::Key, vec![key])));
        query.only.extend(user.map(|user| (By::User, vec![user])));
        return Ok(Logs::Days(query));
    }
    Ok(Logs::Page(ReceiptFilter { user, key_id, since, until, ..ReceiptFilter::default() }, page))
}

/// What a receipt charged somebody.
fn charged(receipt: &Receipt) -> Picos {
    if receipt.usage.status == Finish::Error { Picos::ZERO } else { receipt.total() }
}

fn entry(receipt: &Receipt) -> Value {
    let (who, used) = (&receipt.attribution, &receipt.usage);
    let time = |at: UnixNanos| Calendar::utc().text(at);
    let since_start = |time: DeviceNanos| UnixNanos(used.submitted_at.0.saturating_add(time.0));
    let tag = |name: &str| label(who.tags.get(name).map_or("", String::as_str));
    let user = who.user.as_deref().unwrap_or_default();
    let chat = who.endpoint.contains("chat");
    json!({
        "request_id": who.request,
        "call_type": if chat { "acompletion" } else { "atext_completion" },
        "api_key": who.key_id.clone().unwrap_or_default(),
        "spend": number(charged(receipt)),
        "total_tokens": used.tokens.prompt + used.tokens.completion,
        "prompt_tokens": used.tokens.prompt,
        "completion_tokens": used.tokens.completion,
        "startTime": time(used.submitted_at),
        "endTime": time(used.finished_at),
        "completionStartTime": used.ttft.map(|ttft| time(since_start(ttft))),
        "request_duration_ms": used.wall.0 / 1_000_000,
        "model": who.model,
        "model_id": "",
        "model_group": who.model,
        "custom_llm_provider": "obol",
        "api_base": "",
        "user": user,
        "end_user": user,
        "metadata": who.metadata,
        "cache_hit": if used.tokens.cached > 0 { "True" } else { "False" },
        "cache_key": "",
        "request_tags": who.tags.iter().map(|(name, value)| format!("{name}:{value}")).collect::<Vec<_>>(),
        "team_id": tag("team"),
        "organization_id": null,
        "session_id": tag("task"),
        "requester_ip_address": null,
        "status": if used.status == Finish::Error { "failure" } else { "success" },
        "obol": receipt.to_json(),
    })
}

/// A row a day: its spend, and the same by user and by model; by key under the key's id.
fn days(rows: &[Row]) -> Vec<Value> {
    let mut days: BTreeMap<(&str, &str), [BTreeMap<&str, Picos>; 4]> = BTreeMap::new();
    for row in rows {
        let [day, labels @ ..] = &row.group[..] else { continue };
        let sums = days.entry((day, &row.currency)).or_default();
        *sums[3].entry("").or_default() += row.spend.usage_cost;
        for (sums, label) in sums.iter_mut().zip(labels) {
            *sums.entry(label).or_default() += row.spend.usage_cost;
        }
    }
    let by_label = |sums: &BTreeMap<&str, Picos>, json: fn(Picos) -> Value| -> Map<String, Value> {
        sums.iter().map(|(label, money)| ((*label).to_owned(), json(*money))).collect()
    };
    let decimal = |money: Picos| json!(money.decimal());
    let day =
        |((day, currency), [users, models, keys, all]): (&(&str, &str), &[BTreeMap<&str, Picos>; 4])| {
            let total = all.values().copied().sum();
            let mut object = by_label(keys, number);
            object.extend([
                ("startTime".to_owned(), json!(day)),
                ("spend".to_owned(), number(total)),
                ("users".to_owned(), by_label(users, number).into()),
                ("models".to_owned(), by_label(models, number).into()),
                (
                    "obol".to_owned(),
                    json!({
                        "currency": currency, "spend": total.decimal(), "users": by_label(users, decimal),
                        "models": by_label(models, decimal), "keys": by_label(keys, decimal),
                    }),
                ),
            ]);
            Value::Object(object)
        };
    days.iter().map(day).collect()
}

/// How `/global/spend/report` groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum GroupBy {
    Team,
    Customer,
    Key,
}

/// Spend by UTC day and team (`group_by=team`) or customer (`customer`, the request's user), or over all days by key
/// (`api_key`); of `api_key`, `team_id`, `customer_id` or `internal_user_id` alone where given.
pub(super) async fn report(
    State(server): State<Arc<Server>>,
    Extension(viewer): Extension<Viewer>,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>, ApiError> {
    let (by, query) = report_of(query.as_deref().unwrap_or_default(), &viewer)?;
    let report = from_ledger(&server, move |ledger| ledger.report(&query)).await?;
    Ok(Json(Value::Array(match by {
        GroupBy::Team => by_day(&report.rows, "teams", "team_name"),
        GroupBy::Customer => by_day(&report.rows, "customers", "customer"),
        GroupBy::Key => by_key(&report.rows),
    })))
}

fn report_of(query: &str, viewer: &Viewer) -> Result<(GroupBy, ReportQuery), Invalid> {
    let mut pairs = Pairs::parse(query)?;
    let by = match pairs.one("group_by")?.as_deref() {
        None | Some("team") => GroupBy::Team,
        Some("customer") => GroupBy::Customer,
        Some("api_key") => GroupBy::Key,
        Some(_) => return Err(Invalid::new("group_by", "`group_by` must be team, customer or api_key")),
    };
    let (since, until) = pairs.dates()?;
    let labels: &[By] = match by {
        GroupBy::Team => &[By::Day, By::Team, By::Model, By::Key],
        GroupBy::Customer => &[By::Day, By::User, By::Model, By::Key],
        GroupBy::Key => &[By::Key, By::Model],
    };
    let mut query = ReportQuery { since, until, ..ReportQuery::by(labels) };
    for (name, by) in [
        ("api_key", By::Key),
        ("team_id", By::Team),
        ("customer_id", By::User),
        ("internal_user_id", By::User),
    ] {
        query.only.extend(pairs.one(name)?.map(|label| (by, vec![label])));
    }
    pairs.finish()?;
    viewer.narrow(&mut query);
    Ok((by, query))
}

/// The sums of some rows, and these rows as `entry` shows them.
struct Group {
    money: Picos,
    loaded: Picos,
    prompt: u64,
    completion: u64,
    entries: Vec<Value>,
}

/// Groups neighbouring rows that have the same first labels: sorted rows, as those of a report are.
fn grouped<'a>(rows: &'a [Row], first: usize, entry: fn(&Row) -> Value) -> Vec<(&'a Row, Group)> {
    let same = |a: &Row, b: &Row| a.currency == b.currency && a.group[..first] == b.group[..first];
    let group = |rows: &'a [Row]| {
        let sum = |count: fn(&Row) -> u64| rows.iter().map(count).sum();
        let group = Group {
            money: rows.iter().map(|row| row.spend.usage_cost).sum(),
            loaded: rows.iter().map(|row| row.spend.loaded_cost).sum(),
            prompt: sum(|row| row.spend.prompt_tokens),
            completion: sum(|row| row.spend.completion_tokens),
            entries: rows.iter().map(entry).collect(),
        };
        (&rows[0], group)
    };
    rows.chunk_by(same).map(group).collect()
}

fn by_day(rows: &[Row], list: &str, name: &str) -> Vec<Value> {
    let entry = |row: &Row| {
        json!({
            "model": row.group[2],
            "spend": number(row.spend.usage_cost),
            "total_tokens": row.spend.prompt_tokens + row.spend.completion_tokens,
            "api_key": row.group[3],
            "obol": exact(row),
        })
    };
    let mut days: Vec<(String, Vec<Value>)> = Vec::new();
    let mut groups = grouped(rows, 2, entry);
    groups.sort_by(|(a, _), (b, _)| a.group[0].cmp(&b.group[0]));
    for (row, group) in groups {
        let label = if row.group[1].is_empty() { "untagged" } else { &row.group[1] };
        let value = json!({
            name: label,
            "total_spend": number(group.money),
            "metadata": group.entries,
            "obol": {
                "currency": row.currency, "total_spend": group.money.decimal(),
                "total_loaded": group.loaded.decimal(),
            },
        });
        match days.last_mut() {
            Some((day, values)) if *day == row.group[0] => values.push(value),
            _ => days.push((row.group[0].clone(), vec![value])),
        }
    }
    let day = |(day, values)| json!({"group_by_day": format!("{day}T00:00:00+00:00"), list: values});
    days.into_iter().map(day).collect()
}

fn by_key(rows: &[Row]) -> Vec<Value> {
    let entry = |row: &Row| {
        json!({
            "model": row.group[1],
            "total_cost": number(row.spend.usage_cost),
            "total_input_tokens": row.spend.prompt_tokens,
            "total_output_tokens": row.spend.completion_tokens,
            "obol": exact(row),
        })
    };
    let groups = grouped(rows, 1, entry).into_iter();
    let key = |(row, group): (&Row, Group)| {
        json!({
            "api_key": row.group[0],
            "total_cost": number(group.money),
            "total_input_tokens": group.prompt,
            "total_output_tokens": group.completion,
            "model_details": group.entries,
            "obol": {
                "currency": row.currency, "total_cost": group.money.decimal(),
                "total_loaded": group.loaded.decimal(),
            },
        })
    };
    groups.map(key).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_shown_its_own_spend() {
        let viewer = || Viewer::Key("key_1".into());
        let Ok(Logs::Page(filter, _)) = logs_of("user_id=ann", viewer()) else { panic!("a page") };
        assert_eq!((filter.key_id.as_deref(), filter.user.as_deref()), (Some("key_1"), Some("ann")));
        let Ok(Logs::Days(query)) = logs_of("start_date=2026-11-01&api_key=key_2", viewer()) else {
            panic!("days")
        };
        assert!(!query.only.contains(&(By::Key, vec!["key_2".into()])));
        assert!(query.only.iter().any(|(by, _)| *by == By::Key));
        let (_, query) = report_of("api_key=key_2", &viewer()).unwrap();
        assert!(query.only.contains(&(By::Key, vec!["key_1".into()])));
        assert_eq!(
            logs_of("request_id=chatcmpl-r1", viewer()),
            Ok(Logs::One(RequestId("r1".into()), viewer()))
        );
    }

    #[test]
    fn what_is_not_understood_is_refused_by_name() {
        for (query, param) in [
            ("limit=0", "limit"),
            ("summarize=perhaps", "summarize"),
            ("start_date=1", "start_date"),
            ("colour=red", "colour"),
            ("api_key=a&api_key=b", "api_key"),
        ] {
            let error = logs_of(query, Viewer::Admin).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{query}");
        }
        let error = report_of("group_by=colour", &Viewer::Admin).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("group_by"));
    }
}
