//! `GET /v1/organization/costs` and `/v1/organization/usage/completions`, in OpenAI's shapes.
//!
//! Buckets begin at UTC hours or midnights; a time within one stands for the whole of it. Costs are what receipts
//! charged; house money is nobody's cost, and is in reports. A project is a tenant. Beside OpenAI's names,
//! `group_by` takes the reports' own labels (`team`, `feature`, ...); the exact figures stand under `obol`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::{RawQuery, State};
use axum::{Extension, Json};
use serde_json::{Map, Value, json};

use super::Server;
use super::error::ApiError;
use super::fields::Invalid;
use super::receipts::{from_ledger, number as whole_number};
use super::spend_query::{DAY_SECONDS, Pairs, Viewer, exact, label, number};
use crate::ledger::{By, Calendar, Report, ReportQuery, Row};
use crate::units::{Picos, UnixNanos};

const HOUR_SECONDS: u64 = 3600;
const SECOND: u64 = 1_000_000_000;
/// Instants that bucket arithmetic cannot overflow.
const SECONDS_MAX: u64 = u64::MAX / SECOND - 200 * DAY_SECONDS;

/// OpenAI's names of what rows are grouped by, where they are not ours.
const NAMES: [(&str, By); 3] = [("project_id", By::Tenant), ("api_key_id", By::Key), ("user_id", By::User)];

/// One part of a request's cost.
#[derive(Clone, Copy)]
struct LineItem {
    name: &'static str,
    unit: &'static str,
    cost: fn(&Row) -> Picos,
    /// In its unit, for display.
    quantity: fn(&Row) -> f64,
    always: bool,
}

const LINE_ITEMS: [LineItem; 4] = [
    LineItem {
        name: "device time",
        unit: "duration_seconds",
        cost: |row| row.spend.time_cost,
        quantity: |row| row.spend.device_time.as_secs_f64(),
        always: true,
    },
    LineItem {
        name: "KV cache memory",
        unit: "gibibyte_hours",
        cost: |row| row.spend.memory_cost,
        quantity: |row| row.spend.kv_byte_nanos as f64 / (3600e9 * 1_073_741_824.0),
        always: true,
    },
    LineItem {
        name: "service tier: what it costs less",
        unit: "duration_seconds",
        cost: |row| Picos(-row.spend.discount.0),
        quantity: |_| 0.0,
        always: false,
    },
    LineItem {
        name: "past a budget's cap: on the house",
        unit: "duration_seconds",
        cost: |row| {
            let spend = &row.spend;
            Picos(spend.usage_cost.0 - spend.time_cost.0 - spend.memory_cost.0 + spend.discount.0)
        },
        quantity: |_| 0.0,
        always: false,
    },
];

/// What is asked for: one page of buckets.
#[derive(Debug, PartialEq)]
struct Asked {
    query: ReportQuery,
    /// Name in the answer and label of each group, in the order of the query's, after the time.
    names: Vec<(String, By)>,
    line_items: bool,
    /// First seconds of the page's buckets, and the first one after it.
    starts: Vec<u64>,
    end: u64,
    width: u64,
    has_more: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Of {
    Costs,
    Usage,
}

pub(super) async fn costs(
    State(server): State<Arc<Server>>,
    Extension(viewer): Extension<Viewer>,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>, ApiError> {
    answer(Of::Costs, &server, viewer, query).await
}

pub(super) async fn completions(
    State(server): State<Arc<Server>>,
    Extension(viewer): Extension<Viewer>,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>, ApiError> {
    answer(Of::Usage, &server, viewer, query).await
}

async fn answer(
    of: Of,
    server: &Server,
    viewer: Viewer,
    query: Option<String>,
) -> Result<Json<Value>, ApiError> {
    let now = server.app()?.clock().wall().0 / SECOND;
    let asked = asked(of, &query.unwrap_or_default(), &viewer, now)?;
    let query = asked.query.clone();
    let report = from_ledger(server, move |ledger| ledger.report(&query)).await?;
    Ok(Json(page(of, &asked, &report)))
}

fn asked(of: Of, query: &str, viewer: &Viewer, now: u64) -> Result<Asked, Invalid> {
    let mut pairs = Pairs::parse(query)?;
    let seconds = |pairs: &mut Pairs, name: &str| {
        pairs.one(name)?.map(|text| whole_number(name, &text, 0..=SECONDS_MAX)).transpose()
    };
    let (part, width, default, most) = match (of, pairs.one("bucket_width")?.as_deref()) {
        (Of::Costs, None | Some("1d")) => (By::Day, DAY_SECONDS, 7, 180),
        (Of::Usage, None | Some("1d")) => (By::Day, DAY_SECONDS, 7, 31),
        (Of::Usage, Some("1h")) => (By::Hour, HOUR_SECONDS, 24, 168),
        (Of::Costs, Some(_)) => return Err(Invalid::new("bucket_width", "`bucket_width` must be 1d")),
        (Of::Usage, Some(_)) => {
            return Err(Invalid::new(
                "bucket_width",
                "`bucket_width` must be 1d or 1h: books are kept by hour",
            ));
        }
    };
    let start = seconds(&mut pairs, "start_time")?
        .ok_or_else(|| Invalid::new("start_time", "`start_time` is required, in Unix seconds"))?;
    let until = seconds(&mut pairs, "end_time")?.unwrap_or(now).div_ceil(width) * width;
    let limit = match pairs.one("limit")? {
        Some(text) => whole_number("limit", &text, 1..=most)?,
        None => default,
    };
    let from = match pairs.one("page")? {
        None => start,
        Some(page) => whole_number("page", page.strip_prefix("page_").unwrap_or(&page), start..=SECONDS_MAX)
            .map_err(|_| Invalid::new("page", "`page` must be the `next_page` of the page before"))?,
    };
    let from = from / width * width;
    let end = until.min(from.saturating_add(limit * width)).max(from);
    let (names, line_items) = groups(of, &mut pairs)?;
    let by = std::iter::once(part).chain(names.iter().map(|(_, by)| *by)).collect::<Vec<_>>();
    let nanos = |seconds: u64| Some(UnixNanos(seconds * SECOND));
    let mut query = ReportQuery { since: nanos(from), until: nanos(end), ..ReportQuery::by(&by) };
    for (name, by) in
        [("project_ids", By::Tenant), ("api_key_ids", By::Key), ("user_ids", By::User), ("models", By::Model)]
    {
        let labels = pairs.all(name);
        if !labels.is_empty() {
            query.only.push((by, labels));
        }
    }
    pairs.finish()?;
    viewer.narrow(&mut query);
    let starts = (from..end).step_by(width as usize).collect();
    Ok(Asked { query, names, line_items, starts, end, width, has_more: end < until })
}

/// What `group_by` names.
fn groups(of: Of, pairs: &mut Pairs) -> Result<(Vec<(String, By)>, bool), Invalid> {
    let (mut names, mut line_items) = (Vec::new(), false);
    let asked = pairs.all("group_by");
    for name in asked.iter().flat_map(|names| names.split(',')) {
        if name == "line_item" && of == Of::Costs {
            line_items = true;
            continue;
        }
        let theirs = NAMES.iter().find(|(theirs, _)| *theirs == name);
        let by = theirs.map(|(_, by)| *by).or_else(|| By::parse(name));
        match by.filter(|by| !matches!(by, By::Hour | By::Day | By::Month)) {
            Some(by) if !names.iter().any(|(_, known)| *known == by) => names.push((name.to_owned(), by)),
            Some(_) => {}
            None => return Err(Invalid::new("group_by", format!("`group_by` does not take {name:?}"))),
        }
    }
    Ok((names, line_items))
}

fn page(of: Of, asked: &Asked, report: &Report) -> Value {
    let mut of_bucket: BTreeMap<u64, Vec<&Row>> = BTreeMap::new();
    for row in &report.rows {
        let start = Calendar::utc().instant(&row.group[0]).expect("a report names its days and hours");
        of_bucket.entry(start.0 / SECOND).or_default().push(row);
    }
    let bucket = |start: &u64| {
        let rows = of_bucket.get(start).into_iter().flatten().copied();
        let results: Vec<Value> = match of {
            Of::Costs if asked.line_items => {
                let items = |row| {
                    let shown = move |item: &&LineItem| item.always || (item.cost)(row) != Picos::ZERO;
                    LINE_ITEMS.iter().filter(shown).map(move |item| cost(asked, row, Some(item)))
                };
                rows.flat_map(items).collect()
            }
            Of::Costs => rows.map(|row| cost(asked, row, None)).collect(),
            Of::Usage => rows.map(|row| usage(asked, row)).collect(),
        };
        json!({
            "object": "bucket", "start_time": start, "end_time": start + asked.width, "results": results,
        })
    };
    json!({
        "object": "page",
        "data": asked.starts.iter().map(bucket).collect::<Vec<_>>(),
        "has_more": asked.has_more,
        "next_page": asked.has_more.then(|| format!("page_{}", asked.end)),
    })
}

/// The labels that were asked for; OpenAI's others are null.
fn labels(asked: &Asked, row: &Row, all: &[&str]) -> Map<String, Value> {
    let mut object: Map<String, Value> = all.iter().map(|name| ((*name).to_owned(), Value::Null)).collect();
    for ((name, _), text) in asked.names.iter().zip(&row.group[1..]) {
        object.insert(name.clone(), label(text));
    }
    object
}

fn cost(asked: &Asked, row: &Row, item: Option<&LineItem>) -> Value {
    let mut object = labels(asked, row, &["project_id", "api_key_id", "line_item"]);
    let money = item.map_or(row.spend.usage_cost, |item| (item.cost)(row));
    let mut figures = exact(row);
    figures["value"] = json!(money.decimal());
    object.extend([
        ("object".to_owned(), json!("organization.costs.result")),
        ("amount".to_owned(), json!({"value": number(money), "currency": row.currency.to_ascii_lowercase()})),
        ("quantity".to_owned(), json!(item.map(|item| (item.quantity)(row)))),
        ("quantity_unit".to_owned(), json!(item.map(|item| item.unit))),
        ("obol".to_owned(), figures),
    ]);
    if let Some(item) = item {
        object.insert("line_item".to_owned(), json!(item.name));
    }
    Value::Object(object)
}

fn usage(asked: &Asked, row: &Row) -> Value {
    let names = ["project_id", "user_id", "api_key_id", "model", "batch", "service_tier"];
    let mut object = labels(asked, row, &names);
    let spend = &row.spend;
    object.extend([
        ("object".to_owned(), json!("organization.usage.completions.result")),
        ("input_tokens".to_owned(), json!(spend.prompt_tokens)),
        ("output_tokens".to_owned(), json!(spend.completion_tokens)),
        ("input_cached_tokens".to_owned(), json!(spend.cached_tokens)),
        ("input_uncached_tokens".to_owned(), json!(spend.prompt_tokens.saturating_sub(spend.cached_tokens))),
        ("input_audio_tokens".to_owned(), json!(0)),
        ("output_audio_tokens".to_owned(), json!(0)),
        ("num_model_requests".to_owned(), json!(spend.requests)),
        ("obol".to_owned(), exact(row)),
    ]);
    Value::Object(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 20_000 * DAY_SECONDS + 5;

    #[test]
    fn buckets_are_whole_days_page_by_page() {
        let start = 19_990 * DAY_SECONDS + 77;
        let ask =
            |more: &str| asked(Of::Costs, &format!("start_time={start}{more}"), &Viewer::Admin, NOW).unwrap();
        let first = ask("");
        assert_eq!(first.starts, (19_990..19_997).map(|day| day * DAY_SECONDS).collect::<Vec<_>>());
        assert!(first.has_more);
        let second = ask(&format!("&page=page_{}", first.end));
        assert_eq!(second.starts, (19_997..20_001).map(|day| day * DAY_SECONDS).collect::<Vec<_>>());
        assert!(!second.has_more, "the running day is the last one");
        assert_eq!(ask("&limit=180").starts.len(), 11);
        assert_eq!(ask(&format!("&end_time={}", start + 1)).starts, [19_990 * DAY_SECONDS]);
        assert!(ask("&end_time=5").starts.is_empty());
        let hours = asked(Of::Usage, &format!("start_time={start}&bucket_width=1h"), &Viewer::Admin, NOW);
        assert_eq!(hours.unwrap().starts.len(), 24);
    }

    #[test]
    fn groups_have_either_name_and_a_key_sees_itself() {
        let viewer = Viewer::Key("key_1".into());
        let query = "start_time=0&group_by[]=project_id&group_by=line_item,team&project_ids=red";
        let asked = asked(Of::Costs, query, &viewer, NOW).unwrap();
        assert_eq!(asked.query.by, [By::Day, By::Tenant, By::Team]);
        assert!(asked.line_items);
        let only = [(By::Tenant, vec!["red".to_owned()]), (By::Key, vec!["key_1".to_owned()])];
        assert_eq!(asked.query.only, only);
    }

    #[test]
    fn what_is_not_understood_is_refused_by_name() {
        for (of, query, param) in [
            (Of::Costs, "", "start_time"),
            (Of::Costs, "start_time=x", "start_time"),
            (Of::Costs, "start_time=0&bucket_width=1h", "bucket_width"),
            (Of::Usage, "start_time=0&bucket_width=1m", "bucket_width"),
            (Of::Usage, "start_time=0&limit=32", "limit"),
            (Of::Costs, "start_time=0&limit=181", "limit"),
            (Of::Usage, "start_time=0&group_by=line_item", "group_by"),
            (Of::Costs, "start_time=0&group_by=day", "group_by"),
            (Of::Costs, "start_time=0&page=tomorrow", "page"),
            (Of::Costs, "start_time=0&colour=red", "colour"),
        ] {
            let error = asked(of, query, &Viewer::Admin, NOW).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{query}");
        }
    }
}
