//! How long reports on a year of requests take, every label alone and some together, and what was written for them.
//!
//! `cargo bench --bench reports [-- REQUESTS]`: ten million by default, for which it takes minutes and some GB where
//! temporary files go. The requests go through the ledger as a server's do, a commit an hour. Prints one line a
//! report: the first time, when nothing was read before, and the median of three more.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use obol::ledger::{
    By, Calendar, DeviceInfo, Ledger, OpenOptions, RateCard, ReportQuery, RequestContext, audit, report,
    spent_by_keys,
};
use obol::request::Finish;
use obol::units::{BlockNanos, DeviceNanos, Picos, RequestId, Ticket, UnixNanos};
use obol::usage::{MeterReport, PoolInfo, Snapshot, TokenCounts, Usage};

const HOUR: u64 = 3_600_000_000_000;
const HOURS: u64 = 365 * 24;
/// 2026-01-01.
const START: u64 = 490_896 * HOUR;
const BLOCKS: u64 = 1_000;
const TEAMS: u64 = 12;
const FEATURES: u64 = 3;
const ENVIRONMENTS: [&str; 6] = ["prod", "prod", "prod", "prod", "staging", "dev"];
/// Of a team.
const USERS: u64 = 41;
/// In so many requests, each team's agents begin one run a feature and environment.
const RUNS_BEGIN: u64 = 5_400;

/// SplitMix64 (Steele, Lea and Flood, 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % limit
    }
}

/// Each team has a key, features and users of its own. One request in five is of an agent, whose run is one task.
fn context(random: &mut Random, number: u64) -> RequestContext {
    let (team, feature) = (random.below(TEAMS), random.below(FEATURES));
    let environment = ENVIRONMENTS[random.below(ENVIRONMENTS.len() as u64) as usize];
    let mut tags = BTreeMap::from([
        ("team".to_owned(), format!("team-{team}")),
        ("feature".to_owned(), format!("feature-{team}-{feature}")),
        ("environment".to_owned(), environment.to_owned()),
    ]);
    let is_agent = random.below(5) == 0;
    if is_agent {
        tags.insert("task".into(), format!("run-{team}-{feature}-{environment}-{}", number / RUNS_BEGIN));
    }
    RequestContext {
        request: RequestId(format!("{number:032x}")),
        client_request_id: None,
        idempotency_key: None,
        key_id: Some(format!("key_{team}")),
        tenant: format!("team-{team}"),
        user: Some(format!("user-{team}-{}", random.below(USERS))).filter(|_| !is_agent),
        metadata: BTreeMap::new(),
        tags,
        model: "qwen3-8b".to_owned(),
        precision: "int8".to_owned(),
        endpoint: "/v1/chat/completions",
        purse: None,
    }
}

fn usage(random: &mut Random, request: RequestId, wall: u64) -> Usage {
    let (prefill, decode) = (random.below(50_000_000), random.below(1_500_000_000));
    let status = match random.below(40) {
        0 => Finish::Error,
        1 | 2 => Finish::Cancelled,
        3..=12 => Finish::Length,
        _ => Finish::Stop,
    };
    Usage {
        request,
        ticket: Ticket(0),
        status,
        seed: 1,
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

/// A year of requests, as many in each hour. Gives what they were charged.
fn fill(dir: &Path, requests: u64) -> Picos {
    let rate = RateCard::parse("2.5", "0.2", "USD", None).expect("a rate");
    let device = DeviceInfo { id: "cuda:0".into(), kind: "cuda".into(), name: "a card".into() };
    let options = OpenOptions::one(device, rate, UnixNanos(START), "boot".into());
    let (ledger, meter) = Ledger::open(dir, &options).expect("a ledger");
    let pool = PoolInfo { blocks: BLOCKS, bytes_per_block: 1 << 20, since: DeviceNanos(0) };
    let mut at = Snapshot {
        now: DeviceNanos(0),
        wall: UnixNanos(START),
        pool: Some(pool),
        house_time: Default::default(),
        house_kv: Default::default(),
        settled_device: DeviceNanos(0),
        settled_kv: BlockNanos(0),
        open: Vec::new(),
        energy: None,
    };
    let (mut random, mut made, mut charged) = (Random(1), 0, Picos::ZERO);
    for hour in 0..HOURS {
        let wall = START + hour * HOUR + HOUR - 1;
        let (mut waiters, mut finished) = (Vec::new(), Vec::new());
        while made < requests * (hour + 1) / HOURS {
            let context = context(&mut random, made);
            let mut usage = usage(&mut random, context.request.clone(), wall);
            let (ticket, waiter) = ledger.adopt(context).expect("the disk has room");
            usage.ticket = ticket;
            finished.push(usage);
            waiters.push(waiter);
            made += 1;
        }
        let time: u64 = finished.iter().map(|usage| usage.device().0).sum();
        let kv: u128 = finished.iter().map(|usage| usage.kv.0).sum();
        let elapsed = wall - at.wall.0;
        at.wall = UnixNanos(wall);
        at.now += DeviceNanos(elapsed);
        at.settled_device += DeviceNanos(time);
        at.settled_kv += BlockNanos(kv);
        at.house_time[1] +=
            DeviceNanos(elapsed.checked_sub(time).expect("an hour has room for its requests"));
        at.house_kv[1] += BlockNanos(u128::from(BLOCKS) * u128::from(elapsed) - kv);
        meter.send(MeterReport { finished, snapshot: at.clone() }).expect("the ledger is open");
        for waiter in waiters {
            let receipt = waiter.wait().expect("the disk has room");
            if receipt.usage.status != Finish::Error {
                charged += receipt.total();
            }
        }
    }
    // The next hour, so that the last one has ended; and time to cover it.
    at.wall = UnixNanos(START + HOURS * HOUR + 1);
    at.now += DeviceNanos(2);
    at.house_time[1] += DeviceNanos(2);
    at.house_kv[1] += BlockNanos(u128::from(BLOCKS) * 2);
    meter.send(MeterReport { finished: Vec::new(), snapshot: at }).expect("the ledger is open");
    std::thread::sleep(Duration::from_secs(5));
    ledger.close().expect("the disk has room");
    charged
}

/// Milliseconds: the first time, and the median of three more.
fn timed(dir: &Path, name: &str, query: &ReportQuery, charged: Picos, requests: u64) {
    let mut took = Vec::new();
    let mut rows = 0;
    for _ in 0..4 {
        let start = Instant::now();
        let report = report(dir, query).expect("a report");
        took.push(start.elapsed().as_secs_f64() * 1e3);
        let sum: Picos = report.rows.iter().map(|row| row.spend.usage_cost).sum();
        let loaded: Picos = report.rows.iter().map(|row| row.spend.loaded_cost).sum();
        let balance = report.balances["USD"];
        assert_eq!(sum, balance.usage, "{name}");
        assert_eq!(loaded, balance.usage + balance.house - balance.unallocated, "{name}");
        assert_eq!(balance.bill, balance.usage + balance.house + balance.open, "{name}");
        if query.since.is_none() && query.until.is_none() {
            assert_eq!(sum, charged, "{name}");
            assert_eq!(report.rows.iter().map(|row| row.spend.requests).sum::<u64>(), requests, "{name}");
        }
        rows = report.rows.len();
    }
    let first = took.remove(0);
    took.sort_by(f64::total_cmp);
    println!("{name:<44} {first:>8.0} ms first {:>8.0} ms again {rows:>8} rows", took[1]);
}

fn main() {
    let asked = std::env::args().skip(1).find(|argument| !argument.starts_with("--"));
    let requests = asked.map_or(10_000_000, |count| count.parse().expect("a number of requests"));
    let dir = tempfile::tempdir().expect("a directory");
    let start = Instant::now();
    let charged = fill(dir.path(), requests);
    let size = std::fs::metadata(dir.path().join("ledger.db")).expect("the ledger").len() >> 20;
    println!("{requests} receipts: written in {} s, {size} MB", start.elapsed().as_secs());
    for by in By::ALL {
        let name = format!("a year by {}", by.as_str());
        timed(dir.path(), &name, &ReportQuery::by(&[by]), charged, requests);
    }
    let utc = Calendar::utc();
    let at = |text: &str| Some(utc.instant(text).expect("a date"));
    for (by, since, until) in [
        (&[By::Team, By::Feature, By::Month][..], None, None),
        (&[By::Model, By::Day], None, None),
        (&[By::User, By::Month], None, None),
        (&[By::Team, By::User, By::Status], None, None),
        (&[By::Key], at("2026-06-01"), None),
        (&[By::User], at("2026-06-01"), None),
        (&[By::User], at("2026-06-15"), at("2026-07-15")),
        (&[By::Task], at("2026-12-01"), None),
    ] {
        let names: Vec<&str> = by.iter().map(|by| by.as_str()).collect();
        let text = |time: Option<UnixNanos>| time.map_or(String::new(), |at| utc.text(at)[..10].to_owned());
        let name = format!("{}..{} by {}", text(since), text(until), names.join(","));
        let query = ReportQuery { since, until, ..ReportQuery::by(by) };
        timed(dir.path(), &name, &query, charged, requests);
    }
    let keys: Vec<String> = (0..TEAMS).map(|team| format!("key_{team}")).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    let start = Instant::now();
    let spent = spent_by_keys(dir.path(), &keys).expect("the ledger");
    println!("what {TEAMS} keys have spent: {} us", start.elapsed().as_micros());
    assert_eq!(spent.iter().map(|spent| spent["USD"]).sum::<Picos>(), charged);
    let start = Instant::now();
    let audit = audit(dir.path()).expect("the ledger");
    assert!(audit.is_reconciled(), "{audit}");
    println!("audit: reconciled in {} s", start.elapsed().as_secs());
}
