//! A seeded meter that keeps the law, and a dumb ledger beside it.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use obol::ledger::{
    DeviceInfo, Ledger, OpenOptions, RateCard, Receipt, ReceiptWaiter, RequestContext, Tuning,
};
use obol::request::{Finish, Tier};
use obol::units::{BlockNanos, DeviceNanos, Picos, RequestId, Ticket, UnixNanos};
use obol::usage::{Accrual, MeterReport, PoolInfo, Purse, Snapshot, TokenCounts, Usage};

pub(crate) const START: u64 = 1_790_000_000_000_000_000;

/// SplitMix64 (Steele, Lea and Flood, 2014).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

pub(crate) fn rate(device_hour: &str) -> RateCard {
    let card = RateCard::parse(device_hour, "0.2", "USD", None).unwrap();
    card.with_tiers([(Tier::Flex, "0.7"), (Tier::Batch, "0.333")]).unwrap()
}

pub(crate) fn options(boot: &str, rate: RateCard, wall: u64) -> OpenOptions {
    let device = DeviceInfo { id: "cpu".into(), kind: "cpu".into(), name: "a processor".into() };
    OpenOptions::one(device, rate, UnixNanos(wall), boot.into())
}

/// Short patience, and a checkpoint with every report.
pub(crate) fn eager() -> Tuning {
    Tuning { patience: Duration::from_millis(400), checkpoint: Duration::ZERO }
}

pub(crate) fn open(dir: &Path, options: &OpenOptions) -> (Ledger, Sender<MeterReport>) {
    let (ledger, mut senders) = Ledger::open_tuned(dir, options, eager()).unwrap();
    (ledger, senders.remove(0))
}

/// A budget that had set aside a part of what the request costs.
#[derive(Debug)]
struct Scarce;

impl Purse for Scarce {
    fn pay(&self, cost: Picos) -> Picos {
        Picos(cost.0 * 3 / 7)
    }
}

/// Every third request has one.
fn purse(id: &str) -> Option<Arc<dyn Purse>> {
    let sum: u32 = id.bytes().map(u32::from).sum();
    sum.is_multiple_of(3).then(|| Arc::new(Scarce) as Arc<dyn Purse>)
}

pub(crate) fn context(id: &str) -> RequestContext {
    RequestContext {
        request: RequestId(id.to_owned()),
        client_request_id: Some(format!("client-{id}")),
        idempotency_key: None,
        key_id: None,
        tenant: "anonymous".into(),
        user: Some("ann, \"the\" tester".into()),
        metadata: BTreeMap::from([("a".into(), "b".into())]),
        tags: BTreeMap::from([("team".into(), "red".into())]),
        model: "small".into(),
        precision: "Q4_1".into(),
        endpoint: "/v1/completions",
        tier: Tier::Default,
        purse: purse(id),
    }
}

/// With labels that follow from the id; some requests lack some of them.
pub(crate) fn labelled(id: &str) -> RequestContext {
    let mut random = Random(id.bytes().fold(7, |sum: u64, byte| sum.wrapping_mul(131) + u64::from(byte)));
    let mut one_of = |names: &[&str]| {
        let name = names[random.below(names.len() as u64) as usize];
        Some(name.to_owned()).filter(|name| !name.is_empty())
    };
    let mut context = context(id);
    context.tags.clear();
    for (tag, names) in [
        ("team", &["", "red", "blue", "=green"][..]),
        ("feature", &["", "chat", "search"]),
        ("environment", &["", "prod", "test"]),
        ("cost_center", &["", "4711"]),
        ("task", &["", "", "run-1", "run-2", "run-3"]),
    ] {
        context.tags.extend(one_of(names).map(|name| (tag.to_owned(), name)));
    }
    let tier = one_of(&["default", "default", "default", "flex", "batch", "priority"]);
    context.tier = Tier::parse(&tier.expect("none of them is empty")).expect("a tier");
    context.user = one_of(&["", "ann, \"the\" tester", "bob", "cy"]);
    context.key_id = one_of(&["", "key_1", "key_2"]);
    context.tenant = one_of(&["anonymous", "red"]).expect("not empty");
    context.model = one_of(&["small", "large"]).expect("not empty");
    context
}

/// A meter that makes time and blocks up, but accounts for all of them.
pub(crate) struct Meter {
    pub(crate) random: Random,
    pub(crate) at: Snapshot,
    pub(crate) open: Vec<Accrual>,
}

impl Meter {
    pub(crate) fn new(seed: u64, wall: u64) -> Self {
        let at = Snapshot {
            now: DeviceNanos(0),
            wall: UnixNanos(wall),
            pool: None,
            house_time: Default::default(),
            house_kv: Default::default(),
            settled_device: DeviceNanos(0),
            settled_kv: BlockNanos(0),
            open: Vec::new(),
            energy: None,
        };
        Self { random: Random(seed), at, open: Vec::new() }
    }

    /// Loads for a while, then there is a pool.
    pub(crate) fn load(&mut self) -> MeterReport {
        let (load, warmup) = (self.random.below(5_000_000_000), 1 + self.random.below(1_000_000_000));
        self.at.house_time[2] += DeviceNanos(load);
        self.at.house_time[3] += DeviceNanos(warmup);
        self.at.now += DeviceNanos(load + warmup);
        self.at.wall = UnixNanos(self.at.wall.0 + load + warmup);
        let blocks = 1 + self.random.below(5_000);
        self.at.pool = Some(PoolInfo { blocks, bytes_per_block: 4096, since: self.at.now });
        self.report(Vec::new())
    }

    pub(crate) fn start(&mut self, request: RequestId, ticket: Ticket) {
        self.open.push(Accrual { request, ticket, device: DeviceNanos(0), kv: BlockNanos(0) });
    }

    /// Some time passes: work of whoever is open, waste, idleness, now and then hours of it.
    pub(crate) fn pass(&mut self) {
        let most = if self.random.one_in(12) { 9_000_000_000_000 } else { 40_000_000 };
        let mut time = 1 + self.random.below(most);
        self.at.now += DeviceNanos(time);
        self.at.wall = UnixNanos(self.at.wall.0 + time);
        let blocks = self.at.pool.map_or(0, |pool| pool.blocks);
        let mut kv = u128::from(blocks) * u128::from(time);
        // Whatever was carried is given out again.
        kv += std::mem::take(&mut self.at.house_kv[2]).0;
        if !self.open.is_empty() {
            let idle = time.saturating_sub(1_000_000_000);
            self.at.house_time[1] += DeviceNanos(idle);
            let idle_kv = u128::from(blocks) * u128::from(idle);
            self.at.house_kv[1] += BlockNanos(idle_kv);
            time -= idle;
            kv -= idle_kv;
            for class in [0, 4] {
                let part = self.random.below(time / 4 + 1);
                self.at.house_time[class] += DeviceNanos(part);
                time -= part;
            }
            let carry = u128::from(self.random.below(4)).min(kv);
            self.at.house_kv[2] = BlockNanos(carry);
            kv -= carry;
            let count = self.open.len() as u64;
            for index in 0..self.open.len() {
                let last = index + 1 == self.open.len();
                let part = if last { time } else { self.random.below(time / count + 1) };
                time -= part;
                let held = kv / u128::from(count + self.random.below(5));
                kv -= held;
                self.open[index].device += DeviceNanos(part);
                self.open[index].kv += BlockNanos(held);
            }
        }
        self.at.house_time[1] += DeviceNanos(time);
        let cached = kv / u128::from(1 + self.random.below(6));
        self.at.house_kv[0] += BlockNanos(cached);
        self.at.house_kv[1] += BlockNanos(kv - cached);
    }

    pub(crate) fn finish(&mut self, index: usize, status: Finish) -> Usage {
        let open = self.open.swap_remove(index);
        self.at.settled_device += open.device;
        self.at.settled_kv += open.kv;
        let prefill = DeviceNanos(self.random.below(open.device.0 + 1));
        Usage {
            request: open.request,
            ticket: open.ticket,
            status,
            seed: self.random.next(),
            tokens: TokenCounts {
                prompt: 10,
                cached: 3,
                completion: 7,
                draft_accepted: 0,
                draft_rejected: 0,
            },
            prefill,
            decode: open.device - prefill,
            steps: 8,
            kv: open.kv,
            kv_peak_blocks: 2,
            queue: DeviceNanos(1_000),
            ttft: Some(DeviceNanos(2_000_000)).filter(|_| !self.random.one_in(5)),
            wall: DeviceNanos(5_000_001),
            submitted_at: self.at.wall,
            finished_at: self.at.wall,
            saved_by_prefix_cache: DeviceNanos(17),
            saved_by_batching: DeviceNanos(19),
            energy_mj: Some(self.random.below(1 << 40)).filter(|_| !self.random.one_in(5)),
        }
    }

    pub(crate) fn report(&mut self, finished: Vec<Usage>) -> MeterReport {
        self.at.open.clone_from(&self.open);
        self.at.check().unwrap();
        MeterReport { finished, snapshot: self.at.clone() }
    }
}

/// The dumb ledger: quantities by account.
#[derive(Default, Debug, PartialEq, Eq)]
pub(crate) struct Dumb {
    pub(crate) paid: HashMap<String, (u64, u128)>,
    pub(crate) receipts: usize,
}

pub(crate) struct World {
    pub(crate) meter: Meter,
    pub(crate) dumb: Dumb,
    pub(crate) waiting: Vec<ReceiptWaiter>,
    /// Who asks, by the request's id.
    pub(crate) context: fn(&str) -> RequestContext,
    made: u64,
    prefix: String,
}

impl World {
    pub(crate) fn new(seed: u64, wall: u64, prefix: &str) -> Self {
        Self {
            meter: Meter::new(seed, wall),
            dumb: Dumb::default(),
            waiting: Vec::new(),
            context,
            made: 0,
            prefix: prefix.to_owned(),
        }
    }

    /// One step of a random schedule: some start, time passes, some end.
    pub(crate) fn step(&mut self, ledger: &Ledger, sender: &Sender<MeterReport>) {
        if self.meter.at.pool.is_none() {
            let report = self.meter.load();
            sender.send(report).unwrap();
            return;
        }
        while self.meter.open.len() < 6 && !self.meter.random.one_in(3) {
            // Ids that do not sort by age.
            let id = format!("{}{:016x}", self.prefix, self.made.wrapping_mul(0x9E37_79B9_7F4A_7C15));
            self.made += 1;
            let (ticket, waiter) = ledger.adopt((self.context)(&id)).unwrap();
            if self.meter.random.one_in(9) {
                ledger.release(ticket);
                continue;
            }
            self.waiting.push(waiter);
            self.meter.start(RequestId(id), ticket);
        }
        self.meter.pass();
        let mut finished = Vec::new();
        while !self.meter.open.is_empty() && self.meter.random.one_in(3) {
            let index = self.meter.random.below(self.meter.open.len() as u64) as usize;
            let all = [Finish::Stop, Finish::Length, Finish::Cancelled, Finish::Budget, Finish::Error];
            let status = all[self.meter.random.below(5) as usize];
            let usage = self.meter.finish(index, status);
            let tenant = (self.context)(&usage.request.0).tenant;
            let account =
                if status == Finish::Error { "house:error".to_owned() } else { format!("tenant:{tenant}") };
            let sum = self.dumb.paid.entry(account).or_default();
            sum.0 += usage.device().0;
            sum.1 += usage.kv.0;
            self.dumb.receipts += 1;
            finished.push(usage);
        }
        let report = self.meter.report(finished);
        sender.send(report).unwrap();
    }

    /// Ends what is open, as a draining engine does.
    pub(crate) fn drain(&mut self, sender: &Sender<MeterReport>) {
        let mut finished = Vec::new();
        while !self.meter.open.is_empty() {
            let usage = self.meter.finish(0, Finish::Cancelled);
            let tenant = (self.context)(&usage.request.0).tenant;
            let sum = self.dumb.paid.entry(format!("tenant:{tenant}")).or_default();
            sum.0 += usage.device().0;
            sum.1 += usage.kv.0;
            self.dumb.receipts += 1;
            finished.push(usage);
        }
        let report = self.meter.report(finished);
        sender.send(report).unwrap();
    }
}

pub(crate) fn wait(waiter: ReceiptWaiter) -> Receipt {
    Receipt::clone(&waiter.wait().unwrap())
}
