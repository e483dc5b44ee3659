//! Reports against a dumber model that adds receipts up, in random worlds; and what the formats say.

pub(crate) mod focus_rules;
mod forecasts;

use std::collections::BTreeMap;
use std::path::Path;

use obol::ledger::{
    Balance, By, Calendar, Page, Receipt, ReceiptFilter, Report, ReportQuery, audit, focus, report,
    spent_by_keys,
};
use obol::request::Finish;
use obol::units::{Picos, UnixNanos};
use rusqlite::Connection;

use crate::ledger::world::{START, World, labelled, open, options, rate};
use crate::ledger::{copy, reconciled};

const HOUR: u64 = 3_600_000_000_000;

/// A ledger of requests with all kinds of labels, over some days; closed or still open.
fn world(seed: u64, steps: usize, closed: bool) -> (tempfile::TempDir, Vec<Receipt>) {
    let dir = tempfile::tempdir().expect("a directory");
    let (ledger, sender) = open(dir.path(), &options("boot", rate("0.07"), START));
    let mut world = World::new(seed, START, "");
    world.context = labelled;
    for _ in 0..steps {
        world.step(&ledger, &sender);
    }
    if closed {
        world.drain(&sender);
    }
    let mut receipts = Vec::new();
    for waiter in world.waiting.drain(..).rev() {
        if closed {
            waiter.wait().expect("durable");
        } else {
            drop(waiter);
        }
    }
    if closed {
        ledger.close().expect("closes");
    } else {
        drop(sender);
        while ledger.receipts(&ReceiptFilter::default(), &all()).expect("readable").receipts.len()
            < world.dumb.receipts
        {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
    receipts.extend(ledger.receipts(&ReceiptFilter::default(), &all()).expect("readable").receipts);
    assert!(receipts.len() < 1000, "all on one page");
    (dir, receipts)
}

fn all() -> Page {
    Page { limit: 1000, after: None }
}

/// A label as the report should find it.
fn label(by: By, receipt: &Receipt) -> String {
    let who = &receipt.attribution;
    let tag = |name: &str| who.tags.get(name).cloned().unwrap_or_default();
    match by {
        By::Team | By::Feature | By::Environment | By::CostCenter | By::Task => tag(by.as_str()),
        By::Key => who.key_id.clone().unwrap_or_default(),
        By::Tenant => who.tenant.clone(),
        By::User => who.user.clone().unwrap_or_default(),
        By::Model => who.model.clone(),
        By::Precision => who.precision.clone(),
        By::Endpoint => who.endpoint.clone(),
        By::Status => receipt.usage.status.as_str().to_owned(),
        By::Tier => who.tier.as_str().to_owned(),
        By::Device => receipt.device.clone(),
        By::Hour | By::Day | By::Month => unreachable!("not in this model"),
    }
}

/// Requests and money by group, added up receipt by receipt.
fn added_up(by: &[By], receipts: &[Receipt]) -> BTreeMap<Vec<String>, (u64, Picos)> {
    let mut groups: BTreeMap<Vec<String>, (u64, Picos)> = BTreeMap::new();
    for receipt in receipts {
        let group = by.iter().map(|by| label(*by, receipt)).collect();
        let sums = groups.entry(group).or_default();
        sums.0 += 1;
        if receipt.usage.status != Finish::Error {
            sums.1 += receipt.total();
        }
    }
    groups
}

fn reported(dir: &Path, query: &ReportQuery) -> Report {
    report(dir, query).expect("a report")
}

fn groups(report: &Report) -> BTreeMap<Vec<String>, (u64, Picos)> {
    let rows = report.rows.iter();
    rows.map(|row| (row.group.clone(), (row.spend.requests, row.spend.usage_cost))).collect()
}

fn loaded(report: &Report) -> Picos {
    report.rows.iter().map(|row| row.spend.loaded_cost).sum()
}

const LABELS: [By; 13] = [
    By::Team,
    By::Feature,
    By::Environment,
    By::CostCenter,
    By::Task,
    By::Key,
    By::Tenant,
    By::User,
    By::Model,
    By::Precision,
    By::Endpoint,
    By::Status,
    By::Device,
];

#[test]
fn every_grouping_is_what_the_receipts_add_up_to_and_comes_to_the_bill() {
    for seed in 0..8 {
        let closed = seed % 2 == 0;
        let (dir, receipts) = world(seed, 60, closed);
        let what = format!("seed {seed}");
        reconciled(dir.path(), &what);
        let total = reported(dir.path(), &ReportQuery::by(&[]));
        let sum = total.balances["USD"];
        let mut askings: Vec<Vec<By>> = LABELS.iter().map(|by| vec![*by]).collect();
        askings.push(vec![By::Team, By::User]);
        askings.push(vec![By::Task, By::Feature, By::Status, By::User, By::Tenant]);
        for by in askings {
            let report = reported(dir.path(), &ReportQuery::by(&by));
            assert_eq!(groups(&report), added_up(&by, &receipts), "{what}, by {by:?}");
            let usage: Picos = report.rows.iter().map(|row| row.spend.usage_cost).sum();
            let house: Picos = report.house.iter().map(|row| row.money).sum();
            assert_eq!(usage + house + sum.open, sum.bill, "{what}, by {by:?}");
            assert_eq!(loaded(&report) + sum.unallocated + sum.open, sum.bill, "{what}, by {by:?}, loaded");
            assert_eq!(report.balances, total.balances);
        }
        assert_eq!(sum.open == Picos::ZERO, closed, "{what}");
    }
}

#[test]
fn a_finer_grouping_adds_up_to_a_coarser_one_row_by_row() {
    let (dir, _) = world(21, 80, true);
    let coarse = reported(dir.path(), &ReportQuery::by(&[By::Team]));
    for finer in [By::User, By::Task, By::Feature, By::Hour] {
        let fine = reported(dir.path(), &ReportQuery::by(&[By::Team, finer]));
        assert!(fine.rows.len() > coarse.rows.len(), "{finer:?}");
        for row in &coarse.rows {
            let parts = fine.rows.iter().filter(|part| part.group[0] == row.group[0]);
            let sum: Picos = parts.map(|part| part.spend.loaded_cost).sum();
            assert_eq!(sum, row.spend.loaded_cost, "{finer:?}, team {:?}", row.group[0]);
        }
    }
}

#[test]
fn parts_of_time_add_up_to_the_whole() {
    let (dir, _) = world(5, 80, false);
    let whole = reported(dir.path(), &ReportQuery::by(&[By::Team]));
    let part = |since: Option<u64>, until: Option<u64>| {
        let nanos = |hour: Option<u64>| hour.map(|hour| UnixNanos(hour * HOUR));
        let query = ReportQuery { since: nanos(since), until: nanos(until), ..ReportQuery::by(&[By::Team]) };
        reported(dir.path(), &query)
    };
    let first = START / HOUR;
    for cut in [first, first + 1, first + 7, first + 1000] {
        let parts = [part(None, Some(cut)), part(Some(cut), None)];
        let mut sum = Balance::default();
        let (mut usage, mut requests, mut all_loaded) = (Picos::ZERO, 0, Picos::ZERO);
        for report in &parts {
            if let Some(part) = report.balances.get("USD") {
                assert_eq!(part.bill, part.usage + part.house + part.open, "cut at {cut}");
                sum.bill += part.bill;
                sum.usage += part.usage;
                sum.house += part.house;
                sum.open += part.open;
                sum.unallocated += part.unallocated;
            }
            usage += report.rows.iter().map(|row| row.spend.usage_cost).sum();
            requests += report.rows.iter().map(|row| row.spend.requests).sum::<u64>();
            all_loaded += loaded(report);
        }
        assert_eq!(sum, whole.balances["USD"], "cut at {cut}");
        assert_eq!(usage, sum.usage, "cut at {cut}");
        assert_eq!(requests, whole.rows.iter().map(|row| row.spend.requests).sum::<u64>(), "cut at {cut}");
        assert_eq!(all_loaded, loaded(&whole), "cut at {cut}");
    }
}

#[test]
fn days_and_months_are_those_of_the_time_zone() {
    let (dir, _) = world(9, 120, true);
    let by_hour = reported(dir.path(), &ReportQuery::by(&[By::Hour]));
    for (zone, part) in [("UTC", By::Day), ("Pacific/Auckland", By::Day), ("Asia/Kolkata", By::Month)] {
        let calendar = Calendar::named(zone).expect("a zone");
        let query = ReportQuery { calendar: calendar.clone(), ..ReportQuery::by(&[part]) };
        let report = reported(dir.path(), &query);
        for row in &report.rows {
            let begin = row.group[0].clone() + if part == By::Month { "-01" } else { "" };
            let since = calendar.instant(&begin).expect("a date");
            let length = if part == By::Month { 30 * 24 * HOUR } else { 24 * HOUR };
            let inside = by_hour.rows.iter().filter(|hour| {
                let at = calendar.instant(&hour.group[0]).expect("an hour").0;
                (since.0..since.0 + length).contains(&at)
            });
            let sum: Picos = inside.map(|hour| hour.spend.loaded_cost).sum();
            assert_eq!(sum, row.spend.loaded_cost, "{zone} {begin}");
        }
        assert_eq!(loaded(&report), loaded(&by_hour), "{zone}");
    }
}

#[test]
fn a_report_of_some_leaves_the_others_out() {
    let (dir, receipts) = world(13, 80, true);
    for (only, by) in [
        (vec![(By::Team, vec!["red".to_owned(), String::new()])], vec![By::Feature]),
        (vec![(By::User, vec!["bob".to_owned()])], vec![By::Team]),
        (vec![(By::User, vec![String::new()]), (By::Key, vec!["key_1".to_owned()])], vec![By::Task]),
    ] {
        let query = ReportQuery { only: only.clone(), ..ReportQuery::by(&by) };
        let mut right = receipts.clone();
        right.retain(|receipt| only.iter().all(|(by, labels)| labels.contains(&label(*by, receipt))));
        assert!(!right.is_empty() && right.len() < receipts.len(), "{only:?}");
        assert_eq!(groups(&reported(dir.path(), &query)), added_up(&by, &right), "{only:?}");
    }
}

/// All rows of a table, as text.
fn table(dir: &Path, sql: &str) -> Vec<String> {
    let connection = Connection::open(dir.join("ledger.db")).expect("the ledger");
    let mut query = connection.prepare(sql).expect("a query");
    let columns = query.column_count();
    let rows = query.query_map([], |row| {
        let cells = (0..columns).map(|column| row.get_ref(column).map(|cell| format!("{cell:?}")));
        Ok(cells.collect::<Result<Vec<_>, _>>()?.join(" "))
    });
    rows.expect("rows").map(|row| row.expect("a row")).collect()
}

const ROLLUPS: &str =
    "SELECT hour, sums, tenant, key_id, team, feature, environment, cost_center, model, status
    FROM rollups JOIN dimensions ON dimensions.id = dimension ORDER BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10";
const PARTIES: &str = "SELECT hour, sums, user, task, team, feature, environment, model, status
    FROM party_rollups JOIN parties ON parties.id = party JOIN dimensions ON dimensions.id = dimension
    ORDER BY 1, 2, 3, 4, 5, 6, 7, 8, 9";
const TOTALS: &str = "SELECT sums, tenant, key_id, team, feature, environment, cost_center, model, status
    FROM dimension_totals JOIN dimensions ON dimensions.id = dimension ORDER BY 1, 2, 3, 4, 5, 6, 7, 8, 9";

#[test]
fn a_ledger_without_rollups_gets_those_it_would_have_had() {
    let (dir, _) = world(17, 60, true);
    let old = tempfile::tempdir().expect("a directory");
    copy(dir.path(), old.path());
    let connection = Connection::open(old.path().join("ledger.db")).expect("the ledger");
    connection
        .execute_batch(
            "PRAGMA foreign_keys = OFF; DROP TABLE party_rollups; DROP TABLE rollups;
             DROP TABLE dimension_totals; DROP TABLE day_rollups; DROP TABLE party_month_rollups;
             DROP TABLE coarse_until; DROP TABLE parties; DROP TABLE dimensions; PRAGMA user_version = 7;",
        )
        .expect("drops");
    drop(connection);
    reconciled(old.path(), "brought up to date");
    // Numbers of labels go by who came first in a commit or in a page, so labels stand in for them.
    for sql in [ROLLUPS, PARTIES, TOTALS] {
        assert!(!table(dir.path(), sql).is_empty(), "{sql}");
        assert_eq!(table(old.path(), sql), table(dir.path(), sql), "{sql}");
    }
    for by in [By::Team, By::User, By::Hour] {
        let query = ReportQuery::by(&[by]);
        assert_eq!(reported(old.path(), &query).rows, reported(dir.path(), &query).rows);
    }
}

#[test]
fn a_ledger_whose_rollups_know_no_status_gets_those_that_do() {
    let dir = of_earlier_build(4);
    let rows = reported(dir.path(), &ReportQuery::by(&[By::Status])).rows;
    let rows: Vec<_> = rows.iter().map(|row| (row.group[0].as_str(), row.spend.requests)).collect();
    assert_eq!(rows, [("budget", 11), ("cancelled", 14), ("error", 10), ("length", 7), ("stop", 11)]);
    reconciled(dir.path(), "brought up to date");
}

#[test]
fn a_ledger_without_tiers_gets_them() {
    let dir = of_earlier_build(6);
    let found = audit(dir.path()).expect("a ledger");
    assert!(found.is_reconciled(), "before a server had it: {found}");
    reconciled(dir.path(), "brought up to date");
    let rows = reported(dir.path(), &ReportQuery::by(&[By::Tier, By::Team])).rows;
    let rows: Vec<_> = rows.iter().map(|row| (row.group.join(" "), row.spend.requests)).collect();
    assert_eq!(rows, [("default blue".to_owned(), 4), ("default red".to_owned(), 4)]);
}

/// A ledger that a build wrote whose schema had this version.
fn of_earlier_build(version: u32) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/ledger_v{version}.sql"));
    let text = std::fs::read_to_string(golden).expect("the committed ledger");
    let connection = Connection::open(dir.path().join("ledger.db")).expect("a database");
    connection.execute_batch("PRAGMA foreign_keys = OFF").expect("a pragma");
    connection.execute_batch(&text).expect("the committed ledger is SQL");
    let pragmas = format!("PRAGMA application_id = 1329745740; PRAGMA user_version = {version}");
    connection.execute_batch(&pragmas).expect("pragmas");
    dir
}

#[test]
fn the_audit_names_the_hour_whose_rollup_is_not_what_its_receipts_add_up_to() {
    let (dir, _) = world(19, 40, true);
    let broken = tempfile::tempdir().expect("a directory");
    let hour: u64 = Connection::open(dir.path().join("ledger.db"))
        .and_then(|ledger| ledger.query_row("SELECT max(hour) FROM rollups", [], |row| row.get(0)))
        .expect("an hour");
    let name = Calendar::utc();
    for sql in [
        "UPDATE rollups SET sums = CAST(x'7F' || substr(sums, 2) AS BLOB) WHERE hour = ?1",
        "UPDATE rollups SET sums = CAST(substr(sums, 1, length(sums) - 1) || x'01' AS BLOB) WHERE hour = ?1",
        "UPDATE rollups SET sums = zeroblob(12) WHERE hour = ?1",
        "UPDATE party_rollups SET sums = zeroblob(12) WHERE hour = ?1",
        "UPDATE rollups SET hour = hour + 5 WHERE hour = ?1",
        "INSERT INTO parties (user, task) SELECT 'nobody', ?1",
    ] {
        copy(dir.path(), broken.path());
        let connection = Connection::open(broken.path().join("ledger.db")).expect("the ledger");
        connection.execute(sql, [hour]).expect("executes");
        drop(connection);
        let found = audit(broken.path()).expect("a ledger");
        let harmless = sql.starts_with("INSERT");
        assert_eq!(found.is_reconciled(), harmless, "{sql}: {found}");
        let query = ReportQuery { calendar: name.clone(), ..ReportQuery::by(&[By::Hour]) };
        let hours = reported(dir.path(), &query).rows;
        let hour = &hours.last().expect("an hour").group[0];
        assert!(harmless || found.to_string().contains(&format!("roll-up of {hour}")), "{sql}: {found}");
    }
}

#[test]
fn the_audit_names_totals_that_are_not_what_receipts_add_up_to() {
    let (dir, _) = world(19, 40, true);
    let broken = tempfile::tempdir().expect("a directory");
    for sql in [
        "UPDATE dimension_totals SET sums = CAST(x'7F' || substr(sums, 2) AS BLOB) WHERE dimension = 1",
        "UPDATE dimension_totals SET sums = CAST(substr(sums, 1, length(sums) - 1) || x'01' AS BLOB)",
        "UPDATE dimension_totals SET dimension = dimension + 10000",
        "INSERT INTO dimension_totals (dimension, sums) SELECT 10001, zeroblob(12)",
    ] {
        copy(dir.path(), broken.path());
        let connection = Connection::open(broken.path().join("ledger.db")).expect("the ledger");
        connection.execute_batch("PRAGMA foreign_keys = OFF").expect("executes");
        connection.execute(sql, []).expect("executes");
        drop(connection);
        match audit(broken.path()) {
            Ok(found) => assert!(found.to_string().contains("roll-up of all hours"), "{sql}: {found}"),
            Err(error) => assert!(error.to_string().contains("dimension is missing"), "{sql}: {error}"),
        }
    }
}

#[test]
fn what_a_key_has_spent_is_what_its_receipts_add_up_to() {
    let (dir, receipts) = world(29, 120, true);
    let right = added_up(&[By::Key], &receipts);
    let keys: Vec<&str> = right.keys().map(|key| key[0].as_str()).chain(["unheard of"]).collect();
    let overruns = receipts.iter().filter(|of| of.attribution.key_id.is_some() && of.overrun > Picos::ZERO);
    assert!(keys.len() > 3 && overruns.count() > 0, "{keys:?}");
    let spent = spent_by_keys(dir.path(), &keys).expect("a ledger");
    for (key, spent) in keys.iter().zip(spent) {
        let right = right.get(&vec![(*key).to_owned()]).map(|(_, money)| *money);
        assert_eq!(spent.get("USD").copied().unwrap_or_default(), right.unwrap_or_default(), "{key}");
    }
}

#[test]
fn rollups_cannot_be_taken_back() {
    let (dir, _) = world(23, 30, true);
    let connection = Connection::open(dir.path().join("ledger.db")).expect("the ledger");
    for sql in [
        "DELETE FROM rollups",
        "DELETE FROM party_rollups",
        "DELETE FROM dimension_totals",
        "UPDATE dimensions SET team = 'blue'",
        "DELETE FROM parties",
    ] {
        let error = connection.execute(sql, []).expect_err(sql).to_string();
        assert!(error.contains("the ledger only appends"), "{sql}: {error}");
    }
}

fn focus_text(dir: &Path, query: &ReportQuery) -> String {
    let mut text = String::new();
    focus(dir, query, |rows| {
        text += rows;
        Ok(())
    })
    .expect("rows");
    text
}

#[test]
fn focus_rows_keep_the_rules_and_come_to_the_bill() {
    for seed in 30..36 {
        let (dir, receipts) = world(seed, 60, seed % 2 == 0);
        let rows = focus_rules::check(&focus_text(dir.path(), &ReportQuery::by(&[])));
        let report = reported(dir.path(), &ReportQuery::by(&[By::Team]));
        let sum = report.balances["USD"];
        let add = |column: &str, of: &dyn Fn(&focus_rules::Row) -> bool| {
            rows.iter().filter(|row| of(row)).map(|row| focus_rules::picos(&row[column])).sum::<Picos>()
        };
        let what = format!("seed {seed}");
        assert_eq!(add("BilledCost", &|_| true), sum.bill - sum.open, "{what}");
        assert_eq!(add("x_LoadedCost", &|_| true), sum.bill - sum.open, "{what}, loaded");
        assert_eq!(add("BilledCost", &|row| row["x_Account"].is_empty()), sum.usage, "{what}");
        assert_eq!(add("EffectiveCost", &|row| !row["x_Account"].is_empty()), sum.house, "{what}");
        let idle = report.house.iter().find(|row| row.account == "house:idle").expect("idle");
        assert_eq!(add("BilledCost", &|row| row["x_Account"] == "house:idle"), idle.money, "{what}");
        assert!(rows.iter().any(|row| row["CapacityReservationStatus"] == "Unused"), "{what}");
        let nanos: u64 = rows
            .iter()
            .filter(|row| row["x_Account"].is_empty() && !row["x_DeviceNanoseconds"].is_empty())
            .map(|row| row["x_DeviceNanoseconds"].parse::<u64>().expect("a number"))
            .sum();
        let paid = receipts.iter().filter(|receipt| receipt.usage.status != Finish::Error);
        assert_eq!(nanos, paid.map(|receipt| receipt.usage.device().0).sum::<u64>(), "{what}");
    }
}

/// Formats, to be read by people: what these files say is what a bookkeeper would see.
#[test]
fn formats_are_as_they_were() {
    let (dir, _) = world(2, 24, true);
    let report = reported(dir.path(), &ReportQuery::by(&[By::Team, By::User]));
    insta::assert_snapshot!("report_table", report.to_table());
    insta::assert_snapshot!("report_csv", report.to_csv().replace("\r\n", "\n"));
    let json = serde_json::to_string_pretty(&report.to_json()).expect("JSON");
    insta::assert_snapshot!("report_json", json);
    let query = ReportQuery { until: Some(UnixNanos(START + 3 * HOUR)), ..ReportQuery::by(&[]) };
    insta::assert_snapshot!("report_focus", focus_text(dir.path(), &query).replace("\r\n", "\n"));
}
