//! Receipts a second, from the meter's report to the resolved waiter, in groups as an engine sends them.

use std::collections::BTreeMap;
use std::sync::mpsc::Sender;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use obol::ledger::{DeviceInfo, Ledger, OpenOptions, RateCard, RequestContext};
use obol::request::{Finish, Tier};
use obol::units::{BlockNanos, DeviceNanos, RequestId, UnixNanos};
use obol::usage::{MeterReport, PoolInfo, Snapshot, TokenCounts, Usage};

const WALL: UnixNanos = UnixNanos(1_790_000_000_000_000_000);

fn context() -> RequestContext {
    RequestContext {
        request: RequestId::new(),
        client_request_id: None,
        idempotency_key: None,
        key_id: None,
        tenant: "anonymous".to_owned(),
        user: Some("user".to_owned()),
        metadata: BTreeMap::new(),
        tags: BTreeMap::from([("team".to_owned(), "red".to_owned())]),
        model: "small".to_owned(),
        precision: "Q4_1".to_owned(),
        endpoint: "/v1/chat/completions",
        tier: Tier::Default,
        purse: None,
    }
}

/// One report with `group` finished requests; returns when all receipts are durable.
fn settle(ledger: &Ledger, meter: &Sender<MeterReport>, at: &mut Snapshot, group: usize) {
    let mut waiters = Vec::with_capacity(group);
    let mut finished = Vec::with_capacity(group);
    for _ in 0..group {
        let context = context();
        let request = context.request.clone();
        let (ticket, waiter) = ledger.adopt(context).expect("the disk has room");
        waiters.push(waiter);
        at.now += DeviceNanos(1_000_003);
        at.settled_device += DeviceNanos(1_000_003);
        at.settled_kv += BlockNanos(500 * 1_000_003);
        at.house_kv[1] += BlockNanos(500 * 1_000_003);
        finished.push(Usage {
            request,
            ticket,
            status: Finish::Stop,
            seed: 1,
            tokens: TokenCounts { prompt: 100, completion: 100, ..TokenCounts::default() },
            prefill: DeviceNanos(3),
            decode: DeviceNanos(1_000_000),
            steps: 100,
            kv: BlockNanos(500 * 1_000_003),
            kv_peak_blocks: 13,
            queue: DeviceNanos(1),
            ttft: Some(DeviceNanos(2)),
            wall: DeviceNanos(1_000_003),
            submitted_at: WALL,
            finished_at: WALL,
            saved_by_prefix_cache: DeviceNanos(0),
            saved_by_batching: DeviceNanos(0),
            energy_mj: None,
        });
    }
    meter.send(MeterReport { finished, snapshot: at.clone() }).expect("the ledger is open");
    for waiter in waiters {
        waiter.wait().expect("the disk has room");
    }
}

fn receipts(criterion: &mut Criterion) {
    let mut benches = criterion.benchmark_group("receipts");
    for group in [1_usize, 16, 64, 256, 1_024] {
        let dir = tempfile::tempdir().expect("a directory");
        let device = DeviceInfo { id: "cpu".to_owned(), kind: "cpu".to_owned(), name: "cpu".to_owned() };
        let rate = RateCard::parse("0.07", "0.2", "USD", None).expect("a rate");
        let options = OpenOptions::one(device, rate, WALL, RequestId::new().0);
        let (ledger, meter) = Ledger::open(dir.path(), &options).expect("a ledger");
        let pool = PoolInfo { blocks: 1_000, bytes_per_block: 4_096, since: DeviceNanos(0) };
        let mut at = Snapshot {
            now: DeviceNanos(0),
            wall: WALL,
            pool: Some(pool),
            house_time: Default::default(),
            house_kv: Default::default(),
            settled_device: DeviceNanos(0),
            settled_kv: BlockNanos(0),
            open: Vec::new(),
            energy: None,
        };
        benches.throughput(Throughput::Elements(group as u64));
        benches.bench_function(group.to_string(), |bench| {
            bench.iter(|| settle(&ledger, &meter, &mut at, group));
        });
        ledger.close().expect("the disk has room");
    }
    benches.finish();
}

criterion_group!(benches, receipts);
criterion_main!(benches);
