//! Months of requests through the ledger's own books and store: what reports say from coarse roll-ups is what they
//! say from hourly ones. `benches/reports.rs` has a year of more requests.

use std::collections::BTreeMap;
use std::path::Path;

use rusqlite::Connection;

use super::audit::audit;
use super::books::{Books, Epoch, NextTransaction};
use super::group::Group;
use super::price::RateCard;
use super::receipt::{Attribution, Claim};
use super::report::{By, ReportQuery, read};
use super::showback::Unit;
use super::store::{FILE, Store};
use super::{Calendar, DeviceInfo, coarse, rows, spent_by_keys};
use crate::random::Random;
use crate::request::{Finish, Tier};
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
        tier: Tier::Default,
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

/// By every label alone and by some together, each checked against what was charged and against the same report
/// from hourly roll-ups alone.
fn report_on(dir: &Path, requests: u64, charged: Picos) {
    let (mut connection, path) = rows::open_for_reading(dir).unwrap();
    let utc = Calendar::utc();
    let berlin = Calendar::named("Europe/Berlin").unwrap();
    let at = |text: &str| Some(utc.instant(text).unwrap());
    let mut groupings: Vec<Vec<By>> = By::ALL.iter().map(|by| vec![*by]).collect();
    groupings.push(vec![By::Team, By::Feature, By::Month]);
    groupings.push(vec![By::User, By::Month, By::Status]);
    groupings.push(vec![By::Task, By::Day]);
    for by in &groupings {
        for (since, until, calendar) in [
            (None, None, &utc),
            (at("2026-02-01"), None, &utc),
            (at("2026-01-17T05:30:00Z"), at("2026-03-03T17:00:00Z"), &utc),
            (None, at("2026-02-01"), &berlin),
        ] {
            let query = ReportQuery { since, until, calendar: calendar.clone(), ..ReportQuery::by(by) };
            let mut read = |hourly| {
                rows::in_snapshot(&mut connection, &path, |snapshot| read(snapshot, &query, hourly)).unwrap()
            };
            let (report, hourly) = (read(false), read(true));
            assert!(report == hourly, "{by:?} from {since:?} until {until:?}");
            let sum: Picos = report.rows.iter().map(|row| row.spend.usage_cost).sum();
            let loaded: Picos = report.rows.iter().map(|row| row.spend.loaded_cost).sum();
            let balance = report.balances["USD"];
            assert_eq!(sum, balance.usage);
            assert_eq!(loaded, balance.usage + balance.house - balance.unallocated, "{by:?}");
            assert_eq!(balance.bill, balance.usage + balance.house + balance.open);
            if query.since.is_none() && query.until.is_none() {
                assert_eq!(sum, charged, "{by:?}");
                assert_eq!(report.rows.iter().map(|row| row.spend.requests).sum::<u64>(), requests);
            }
        }
    }
    let keys: Vec<String> = (0..TEAMS).map(|team| format!("key_{team}")).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    let spent = spent_by_keys(dir, &keys).unwrap();
    assert_eq!(spent.iter().map(|spent| spent["USD"]).sum::<Picos>(), charged);
}

/// Covers all hours before this one.
fn cover(dir: &Path, hour: u64) {
    let mut store = Store::open(&dir.join(FILE)).unwrap();
    let mut progress = coarse::Progress::default();
    while progress.step(store.connection_mut(), hour).unwrap() < hour {}
}

/// Few enough rows that an hour takes some steps.
const SMALL: coarse::Bounds = coarse::Bounds { hours: 24, read: 20, written: 5 };

/// How many rows are added of hours that are not covered yet, and whether stale ones are left.
fn added(dir: &Path) -> (u64, bool) {
    let (connection, _) = rows::open_for_reading(dir).unwrap();
    let row = "SELECT added, stale FROM coarse_until";
    connection.query_row(row, [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap()
}

/// Reports by user and by day are what hourly roll-ups say.
fn equals_hourly(dir: &Path) {
    let (mut connection, path) = rows::open_for_reading(dir).unwrap();
    for by in [&[By::User, By::Month][..], &[By::Day, By::Team], &[By::Task]] {
        let query = ReportQuery::by(by);
        let mut read = |hourly| {
            rows::in_snapshot(&mut connection, &path, |snapshot| read(snapshot, &query, hourly)).unwrap()
        };
        assert!(read(false) == read(true), "{by:?}");
    }
}

fn reconciled(dir: &Path) {
    let audit = audit(dir).unwrap();
    assert!(audit.is_reconciled(), "{audit}");
}

#[test]
fn months_of_a_few_requests_add_up_hourly_and_coarse() {
    let dir = tempfile::tempdir().unwrap();
    let charged = fill(dir.path(), 800, 3 * MONTH_HOURS);
    for covered in [0, 30 * 24 + 7, 3 * MONTH_HOURS] {
        cover(dir.path(), START / HOUR + covered);
        report_on(dir.path(), 800, charged);
        reconciled(dir.path());
    }
}

#[test]
fn an_hour_that_is_covered_and_grows_is_covered_anew() {
    let dir = tempfile::tempdir().unwrap();
    let first = fill(dir.path(), 300, 3 * MONTH_HOURS);
    cover(dir.path(), START / HOUR + 3 * MONTH_HOURS);
    let until = || {
        let (connection, _) = rows::open_for_reading(dir.path()).unwrap();
        coarse::until(&connection, Unit::Month).unwrap()
    };
    assert_eq!(until(), START / HOUR + 3 * MONTH_HOURS);
    // A server whose clock stands weeks before the end of the last one's.
    let mut store = Store::open(&dir.path().join(FILE)).unwrap();
    let rate = RateCard::parse("2.5", "0.2", "USD", None).unwrap();
    let device = DeviceInfo { id: "cuda:0".into(), kind: "cuda".into(), name: "a card".into() };
    store.open_epoch("later", &device, &rate, UnixNanos(START + 40 * 24 * HOUR)).unwrap();
    drop(store);
    assert_eq!(until(), START / HOUR + 31 * 24, "February is open again");
    assert!(first > Picos::ZERO);
    reconciled(dir.path());
    equals_hourly(dir.path());
}

#[test]
fn hours_are_covered_in_parts_and_go_on_after_a_restart_where_they_stopped() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path(), 300, MONTH_HOURS + 100);
    let end = START / HOUR + MONTH_HOURS + 100;
    let mut store = Store::open(&dir.path().join(FILE)).unwrap();
    let mut progress = coarse::Progress::bounded(SMALL);
    let (mut steps, mut cut_off) = (0, 0);
    loop {
        let before = store.connection().total_changes();
        let until = progress.step(store.connection_mut(), end).unwrap();
        assert!(store.connection().total_changes() - before <= SMALL.written as u64 + 1, "a step is small");
        steps += 1;
        if until >= end {
            break;
        }
        if steps % 7 == 0 {
            drop(store);
            cut_off += u64::from(added(dir.path()).0 > 0);
            reconciled(dir.path());
            equals_hourly(dir.path());
            store = Store::open(&dir.path().join(FILE)).unwrap();
            progress = coarse::Progress::bounded(SMALL);
        }
    }
    drop(store);
    assert!(cut_off > 3, "{cut_off} of {steps}");
    assert_eq!(added(dir.path()), (0, false));
    reconciled(dir.path());
    equals_hourly(dir.path());
}

#[test]
fn an_hour_that_grows_while_it_is_covered_is_covered_anew() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path(), 300, MONTH_HOURS + 100);
    let end = START / HOUR + MONTH_HOURS + 100;
    let mut store = Store::open(&dir.path().join(FILE)).unwrap();
    let mut progress = coarse::Progress::bounded(SMALL);
    let mut until = 0;
    while until < START / HOUR + MONTH_HOURS + 50 || added(dir.path()).0 == 0 {
        until = progress.step(store.connection_mut(), end).unwrap();
    }
    let rate = RateCard::parse("2.5", "0.2", "USD", None).unwrap();
    let device = DeviceInfo { id: "cuda:0".into(), kind: "cuda".into(), name: "a card".into() };
    store.open_epoch("later", &device, &rate, UnixNanos(until * HOUR)).unwrap();
    assert_eq!(added(dir.path()), (0, true));
    let mut clearing = 0;
    while added(dir.path()).1 {
        assert!(progress.step(store.connection_mut(), end).unwrap() < until);
        clearing += 1;
        if clearing % 4 == 1 {
            reconciled(dir.path());
            equals_hourly(dir.path());
        }
    }
    assert!(clearing > 5, "{clearing} steps");
    while progress.step(store.connection_mut(), end).unwrap() < end {}
    reconciled(dir.path());
    equals_hourly(dir.path());
}

#[test]
fn the_audit_names_coarse_rollups_that_are_not_what_hours_come_to() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path(), 300, MONTH_HOURS);
    cover(dir.path(), START / HOUR + 20 * 24);
    for sql in [
        "UPDATE day_rollups SET sums = CAST(substr(sums, 1, length(sums) - 1) || x'01' AS BLOB) WHERE day = 20454",
        "UPDATE party_month_rollups SET sums = CAST(substr(sums, 1, length(sums) - 1) || x'01' AS BLOB)",
        "DELETE FROM day_rollups WHERE day = 20454",
        "DELETE FROM party_month_rollups",
        "UPDATE party_month_rollups SET month = 1000000000",
        "UPDATE day_rollups SET day = day + 1000000000000",
        "UPDATE coarse_until SET hour = hour + 24, adding = adding + 24",
        "UPDATE coarse_until SET adding = hour + 24, added = 5",
    ] {
        let broken = tempfile::tempdir().unwrap();
        std::fs::copy(dir.path().join(FILE), broken.path().join(FILE)).unwrap();
        Connection::open(broken.path().join(FILE)).unwrap().execute(sql, []).unwrap();
        let found = audit(broken.path()).unwrap();
        assert!(found.to_string().contains("coarse roll-up of"), "{sql}: {found}");
    }
}
