//! A year of requests through the ledger's own books and store, and what it takes to report on it.
//!
//! The large run is for people: `cargo test --release --lib ten_million -- --ignored --nocapture`. Books and store
//! make a month of it, which the database then copies eleven times, each a month later. It needs some minutes and
//! 7 GB where temporary files go.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use rusqlite::Connection;

use super::audit::audit;
use super::books::{Books, Epoch, NextTransaction};
use super::group::Group;
use super::price::RateCard;
use super::receipt::{Attribution, Claim};
use super::report::{By, ReportQuery, report};
use super::rollup::Sums;
use super::store::{FILE, Store};
use super::{Calendar, DeviceInfo, spent_by_keys};
use crate::random::Random;
use crate::request::Finish;
use crate::units::{BlockNanos, DeviceNanos, Picos, RequestId, Ticket, UnixNanos};
use crate::usage::{MeterReport, PoolInfo, Snapshot, TokenCounts, Usage};

const HOUR: u64 = 3_600_000_000_000;
/// 2026-01-01.
const START: u64 = 490_896 * HOUR;
/// A twelfth of a year.
const MONTH_HOURS: u64 = 365 * 2;
const BLOCKS: u64 = 1_000;
const TEAMS: u64 = 12;
const USERS: u64 = 500;

/// Each team has a key, three features, three environments and users of its own; an agent's run is one task.
fn attribution(random: &mut Random, number: u64) -> Attribution {
    let team = random.below(TEAMS);
    let feature = random.below(3);
    let environment = ["prod", "prod", "prod", "prod", "staging", "dev"][random.below(6) as usize];
    let mut tags = BTreeMap::from([
        ("team".to_owned(), format!("team-{team}")),
        ("feature".to_owned(), format!("feature-{team}-{feature}")),
        ("environment".to_owned(), environment.to_owned()),
    ]);
    let task = random.below(5) == 0;
    if task {
        tags.insert("task".to_owned(), format!("run-{}", number / 50));
    }
    let user = Some(format!("user-{team}-{}", random.below(USERS / TEAMS))).filter(|_| !task);
    Attribution {
        request: RequestId(format!("{number:032x}")),
        client_request_id: None,
        idempotency_key: None,
        key_id: Some(format!("key_{team}")),
        tenant: format!("team-{team}"),
        user,
        metadata: BTreeMap::new(),
        tags,
        model: "qwen3-8b".to_owned(),
        precision: "int8".to_owned(),
        endpoint: "/v1/chat/completions".to_owned(),
    }
}

fn usage(random: &mut Random, request: RequestId, number: u64, wall: u64) -> Usage {
    let (prefill, decode) = (random.below(50_000_000), random.below(1_500_000_000));
    let status = match random.below(40) {
        0 => Finish::Error,
        1 | 2 => Finish::Cancelled,
        3..=12 => Finish::Length,
        _ => Finish::Stop,
    };
    Usage {
        request,
        ticket: Ticket(number),
        status,
        seed: number,
        tokens: TokenCounts {
            prompt: 200 + random.below(2_000),
            cached: random.below(200),
            completion: random.below(500),
            ..TokenCounts::default()
        },
        prefill: DeviceNanos(prefill),
        decode: DeviceNanos(decode),
        steps: 100,
        kv: BlockNanos(u128::from(random.below(20)) * 1_000_000_007),
        kv_peak_blocks: 20,
        queue: DeviceNanos(1_000),
        ttft: Some(DeviceNanos(2_000_000)),
        wall: DeviceNanos(prefill + decode),
        submitted_at: UnixNanos(wall),
        finished_at: UnixNanos(wall),
        saved_by_prefix_cache: DeviceNanos(0),
        saved_by_batching: DeviceNanos(0),
        energy_mj: Some(decode / 1_000_000 * 300),
    }
}

/// Fills a new ledger with these hours of requests, as many in each, a commit an hour. Gives what they were charged.
fn fill(dir: &Path, requests: u64, hours: u64) -> Picos {
    let mut store = Store::open(&dir.join(FILE)).unwrap();
    // Nothing here outlives the test, so the disk need not be waited for.
    store.connection().execute_batch("PRAGMA synchronous = OFF").unwrap();
    let rate = RateCard::parse("2.5", "0.2", "USD", None).unwrap();
    let device = DeviceInfo { id: "cuda:0".into(), kind: "cuda".into(), name: "a card".into() };
    let id = store.open_epoch("boot", &device, &rate, UnixNanos(START)).unwrap();
    let mut group = Group::new(vec![Books::open(Epoch { id, device: device.id, rate }, UnixNanos(START))]);
    let mut at = Snapshot { wall: UnixNanos(START), ..group.last().clone() };
    at.pool = Some(PoolInfo { blocks: BLOCKS, bytes_per_block: 1 << 20, since: DeviceNanos(0) });
    let (mut random, mut next, mut made, mut charged) = (Random(1), NextTransaction(1), 0, Picos::ZERO);
    for hour in 0..hours {
        let wall = START + hour * HOUR + HOUR - 1;
        let mut who: BTreeMap<u64, Attribution> = BTreeMap::new();
        let mut finished = Vec::new();
        while made < requests * (hour + 1) / hours {
            let attribution = attribution(&mut random, made);
            finished.push(usage(&mut random, attribution.request.clone(), made, wall));
            who.insert(made, attribution);
            made += 1;
        }
        let time: u64 = finished.iter().map(|usage| usage.device().0).sum();
        let kv: u128 = finished.iter().map(|usage| usage.kv.0).sum();
        let elapsed = wall - at.wall.0;
        at.wall = UnixNanos(wall);
        at.now += DeviceNanos(elapsed);
        at.settled_device += DeviceNanos(time);
        at.settled_kv += BlockNanos(kv);
        at.house_time[1] += DeviceNanos(elapsed.checked_sub(time).expect("an hour has room"));
        at.house_kv[1] += BlockNanos(u128::from(BLOCKS) * u128::from(elapsed) - kv);
        let report = MeterReport { finished, snapshot: at.clone() };
        let records =
            group.apply(report, &mut next, |usage| who.remove(&usage.ticket.0).map(Claim::from)).unwrap();
        for record in &records {
            if let super::books::Record::Receipt { receipt, .. } = record
                && receipt.usage.status != Finish::Error
            {
                charged += receipt.total();
            }
        }
        store.commit(&records, &[], &[&group.books[0]], &mut |_| None).unwrap();
    }
    let records = group.end(&mut next, |_| None);
    store.commit(&records, &[], &[], &mut |_| None).unwrap();
    store.fold();
    charged
}

/// Appends copies of the ledger's `MONTH_HOURS` to it, the first so much later than they, and so on.
fn copy(dir: &Path, copies: u64) {
    let month = dir.join("month.db");
    std::fs::copy(dir.join(FILE), &month).unwrap();
    let ledger = Connection::open(dir.join(FILE)).unwrap();
    ledger
        .execute_batch(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; DROP INDEX receipts_user; DROP INDEX receipts_key;
             DROP INDEX receipts_status; DROP INDEX receipts_tenant; DROP INDEX receipts_finished;",
        )
        .unwrap();
    ledger.execute("ATTACH ?1 AS month", [month.to_str().unwrap()]).unwrap();
    let last: u64 = ledger.query_row("SELECT max(id) FROM transactions", [], |row| row.get(0)).unwrap();
    for copy in 1..=copies {
        let (hours, nanos) = (copy * MONTH_HOURS, copy * MONTH_HOURS * HOUR);
        let moved = |table: &str, column: String| match column.as_str() {
            "tx" => format!("tx + {}", copy * last),
            "id" => format!("id + {}", copy * last),
            "request_id" => format!("printf('%032x', tx + {})", copy * last),
            "hour" => format!("hour + {hours}"),
            "wall" | "submitted_at" | "finished_at" => format!("{column} + {nanos}"),
            "from_ns" | "to_ns" if table == "bills" => format!("{column} + {nanos}"),
            _ => column,
        };
        ledger.execute_batch("BEGIN").unwrap();
        for table in
            ["transactions", "entries", "bills", "receipts", "receipt_lines", "rollups", "party_rollups"]
        {
            let mut query = ledger.prepare("SELECT name FROM pragma_table_info(?1) ORDER BY cid").unwrap();
            let columns = query.query_map([table], |row| row.get::<_, String>(0)).unwrap();
            let columns: Vec<String> = columns.map(|column| moved(table, column.unwrap())).collect();
            let columns = columns.join(", ");
            let insert = format!("INSERT INTO {table} SELECT {columns} FROM month.{table}");
            ledger.execute_batch(&insert).unwrap();
        }
        ledger.execute_batch("COMMIT").unwrap();
    }
    let mut query = ledger.prepare("SELECT dimension, sums FROM dimension_totals").unwrap();
    let totals = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    let totals: Vec<(i64, Vec<u8>)> = totals.collect::<Result<_, _>>().unwrap();
    for (dimension, packed) in totals {
        let of_month = Sums::unpacked(&packed).unwrap();
        let mut sums = of_month;
        (0..copies).for_each(|_| sums += of_month);
        let set = "UPDATE dimension_totals SET sums = ?2 WHERE dimension = ?1";
        ledger.execute(set, rusqlite::params![dimension, sums.packed()]).unwrap();
    }
    drop(query);
    drop(ledger);
    std::fs::remove_file(month).unwrap();
}

/// Reports in several ways, each checked against what was charged, and prints how long each took.
fn report_on(dir: &Path, requests: u64, charged: Picos) {
    let month = Calendar::utc().instant("2026-06-01").unwrap();
    let year = |by: &[By]| ReportQuery::by(by);
    let from_june = |by: &[By]| ReportQuery { since: Some(month), ..year(by) };
    for (name, query) in [
        ("a year by team", year(&[By::Team])),
        ("a year by team, again", year(&[By::Team])),
        ("a year by team, feature and month", year(&[By::Team, By::Feature, By::Month])),
        ("a year by model and day", year(&[By::Model, By::Day])),
        ("from June by key", from_june(&[By::Key])),
        ("a year by user", year(&[By::User])),
    ] {
        let start = Instant::now();
        let report = report(dir, &query).unwrap();
        let took = start.elapsed().as_millis();
        let sum: Picos = report.rows.iter().map(|row| row.spend.usage_cost).sum();
        let balance = report.balances["USD"];
        assert_eq!(sum, balance.usage);
        assert_eq!(balance.bill, balance.usage + balance.house + balance.open);
        if query.since.is_none() {
            assert_eq!(sum, charged, "{name}");
            assert_eq!(report.rows.iter().map(|row| row.spend.requests).sum::<u64>(), requests);
        }
        println!("{name}: {took} ms, {} rows", report.rows.len());
    }
    let keys: Vec<String> = (0..TEAMS).map(|team| format!("key_{team}")).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    let start = Instant::now();
    let spent = spent_by_keys(dir, &keys).unwrap();
    println!("what {TEAMS} keys have spent: {} us", start.elapsed().as_micros());
    assert_eq!(spent.iter().map(|spent| spent["USD"]).sum::<Picos>(), charged);
}

#[test]
fn a_year_of_a_few_requests_adds_up() {
    let dir = tempfile::tempdir().unwrap();
    let charged = fill(dir.path(), 3_000, 12 * MONTH_HOURS);
    report_on(dir.path(), 3_000, charged);
    let audit = audit(dir.path()).unwrap();
    assert!(audit.is_reconciled(), "{audit}");
}

#[test]
fn copied_months_add_up() {
    let dir = tempfile::tempdir().unwrap();
    let charged = fill(dir.path(), 500, MONTH_HOURS);
    copy(dir.path(), 11);
    report_on(dir.path(), 12 * 500, Picos(12 * charged.0));
    let found = audit(dir.path()).unwrap();
    let about_rollups: Vec<_> = found.differences.iter().filter(|said| said.contains("roll-up")).collect();
    assert!(about_rollups.is_empty(), "{about_rollups:?}");
}

#[test]
#[ignore = "takes minutes and 7 GB of disk"]
fn ten_million_receipts() {
    let dir = tempfile::tempdir().unwrap();
    let start = Instant::now();
    let charged = fill(dir.path(), 833_334, MONTH_HOURS);
    println!("833,334 receipts in {} s", start.elapsed().as_secs());
    copy(dir.path(), 11);
    let size = std::fs::metadata(dir.path().join(FILE)).unwrap().len();
    println!("10,000,008 receipts in {} s, {} MB", start.elapsed().as_secs(), size >> 20);
    report_on(dir.path(), 12 * 833_334, Picos(12 * charged.0));
}
