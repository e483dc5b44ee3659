//! How long reports on a year of requests take, every label alone and some together, and what was written for them.
//!
//! `cargo bench --bench reports [-- REQUESTS]`: ten million by default, for which it takes minutes and some GB where
//! temporary files go. The requests go through the ledger as a server's do, a commit an hour. Prints how long
//! receipts were waited for, also while an hour of 100,000 users is rolled up; then one line a report: the first
//! time, when nothing was read before, and the median of three more.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use obol::ledger::{
    By, Calendar, DeviceInfo, Ledger, OpenOptions, RateCard, ReportQuery, RequestContext, Tuning, audit,
    report, spent_by_keys,
};
use obol::request::{Finish, Tier};
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
        tier: Tier::Default,
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

/// A ledger, and the engine's side of it.
struct Books {
    ledger: Ledger,
    meter: Sender<MeterReport>,
    at: Snapshot,
    /// How long the receipts of each report were waited for.
    waits: Vec<Duration>,
}

impl Books {
    fn open(dir: &Path) -> Self {
        let rate = RateCard::parse("2.5", "0.2", "USD", None).expect("a rate");
        let device = DeviceInfo { id: "cuda:0".into(), kind: "cuda".into(), name: "a card".into() };
        let options = OpenOptions::one(device, rate, UnixNanos(START), "boot".into());
        // What a slow disk costs is told by the waits; it should not end the measurement.
        let tuning = Tuning { patience: Duration::from_secs(120), ..Tuning::default() };
        let (ledger, mut meters) = Ledger::open_tuned(dir, &options, tuning).expect("a ledger");
        let meter = meters.remove(0);
        let pool = PoolInfo { blocks: BLOCKS, bytes_per_block: 1 << 20, since: DeviceNanos(0) };
        let at = Snapshot {
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
        Self { ledger, meter, at, waits: Vec::new() }
    }

    /// These requests end at `wall`, all in one report. Gives what they were charged.
    fn settle(&mut self, requests: Vec<(RequestContext, Usage)>, wall: u64) -> Picos {
        let (mut waiters, mut finished) = (Vec::new(), Vec::new());
        for (context, mut usage) in requests {
            let (ticket, waiter) = self.ledger.adopt(context).expect("the disk has room");
            usage.ticket = ticket;
            finished.push(usage);
            waiters.push(waiter);
        }
        let time: u64 = finished.iter().map(|usage| usage.device().0).sum();
        let kv: u128 = finished.iter().map(|usage| usage.kv.0).sum();
        let at = &mut self.at;
        let elapsed = wall - at.wall.0;
        at.wall = UnixNanos(wall);
        at.now += DeviceNanos(elapsed);
        at.settled_device += DeviceNanos(time);
        at.settled_kv += BlockNanos(kv);
        at.house_time[1] += DeviceNanos(elapsed.checked_sub(time).expect("there is time for the requests"));
        at.house_kv[1] += BlockNanos(u128::from(BLOCKS) * u128::from(elapsed) - kv);
        let start = Instant::now();
        self.meter.send(MeterReport { finished, snapshot: at.clone() }).expect("the ledger is open");
        let mut charged = Picos::ZERO;
        for waiter in waiters {
            let receipt =
                waiter.wait().unwrap_or_else(|error| panic!("{error}, after {:?}", start.elapsed()));
            if receipt.usage.status != Finish::Error {
                charged += receipt.total();
            }
        }
        self.waits.push(start.elapsed());
        charged
    }

    /// The median and the longest wait since this was asked last.
    fn waited(&mut self) -> String {
        let mut waits = std::mem::take(&mut self.waits);
        waits.sort_unstable();
        let ms = |wait: Duration| wait.as_secs_f64() * 1e3;
        format!("{:.0} ms, {:.0} ms at most", ms(waits[waits.len() / 2]), ms(waits[waits.len() - 1]))
    }
}

/// A year of requests, as many in each hour. Gives what they were charged.
fn fill(dir: &Path, requests: u64) -> Picos {
    let mut books = Books::open(dir);
    let (mut random, mut made, mut charged) = (Random(1), 0, Picos::ZERO);
    for hour in 0..HOURS {
        let wall = START + hour * HOUR + HOUR - 1;
        let mut of_hour = Vec::new();
        while made < requests * (hour + 1) / HOURS {
            let context = context(&mut random, made);
            let usage = usage(&mut random, context.request.clone(), wall);
            of_hour.push((context, usage));
            made += 1;
        }
        charged += books.settle(of_hour, wall);
    }
    println!("an hour's receipts were waited for {}", books.waited());
    // The next hour, so that the last one has ended; and time to cover it.
    books.settle(Vec::new(), START + HOURS * HOUR + 1);
    std::thread::sleep(Duration::from_secs(5));
    books.ledger.close().expect("the disk has room");
    charged
}

/// How long receipts wait while an hour is rolled up in which so many users asked, each once.
fn crowd(users: u64) {
    let dir = tempfile::tempdir().expect("a directory");
    let mut books = Books::open(dir.path());
    let mut random = Random(2);
    let mut request = |number: u64, wall: u64| {
        let user = Some(format!("user-{number}"));
        let context = RequestContext { user, ..context(&mut random, number) };
        let usage = Usage {
            prefill: DeviceNanos(1_000),
            decode: DeviceNanos(20_000),
            kv: BlockNanos(1_000),
            ..usage(&mut random, context.request.clone(), wall)
        };
        (context, usage)
    };
    const BATCH: u64 = 1_000;
    for batch in 0..users / BATCH {
        let wall = START + (batch + 1) * (HOUR / (users / BATCH + 1));
        let requests = (batch * BATCH..(batch + 1) * BATCH).map(|number| request(number, wall)).collect();
        books.settle(requests, wall);
    }
    println!("an hour of {users} users: {BATCH} receipts were waited for {}", books.waited());
    for number in 0..500 {
        let wall = START + HOUR + (number + 1) * 1_000_000;
        books.settle(vec![request(users + number, wall)], wall);
        std::thread::sleep(Duration::from_millis(10));
    }
    println!("and while it was rolled up, one receipt {}", books.waited());
    books.ledger.close().expect("the disk has room");
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
    crowd(100_000);
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
