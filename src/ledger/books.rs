//! The books of one epoch: reports of the meter in, records to be written out. Pure: no disk, no clock.
//!
//! Does: check each report against the laws, settle requests, post the house at the close of each clock
//! hour and of the epoch, post what flooring left over.
//! Does not know: SQL, waiters, threads.
//! Invariants: a report that breaks a law changes nothing; everything posted is worth at most what the
//! device cost so far; at the end of the epoch it is worth exactly that.
//!
//! An hour's close inside a gap between two snapshots: the gap's idle time comes first, up to the hour's
//! end; all other work of the gap belongs to the hour of the later snapshot. KV of that idle time is
//! split in the proportion of the whole gap. Carry stays open until the epoch ends.
//!
//! Rounding at an hour's close: what is open is valued rounded up, so the difference posted is what
//! flooring has lost for good; it never has to be taken back. At the epoch's end nothing is open and
//! the rest follows to the last pico.

use std::sync::Arc;

use super::entry::{
    Amounts, BEFORE_POOL, CACHED, CARRY, CRASH, FREE, House, IDLE, Kind, ROUNDING, Transaction,
    TransactionHead, device_account, payer, vendor_account,
};
use super::price::{Prices, RateCard, mul_div};
use super::receipt::{Attribution, Line, Receipt};
use crate::request::Finish;
use crate::units::{BlockNanos, DeviceNanos, Picos, UnixNanos};
use crate::usage::{Accrual, HouseKv, HouseTime, MeterReport, PoolInfo, Snapshot, TokenCounts, Usage};

const HOUR: u64 = 3_600_000_000_000;

/// A crash that lasted longer is closed by spans of this many hours: few closes after decades that a wrong
/// clock makes up, each small enough for its column of money.
const HOURLY_MAX: u64 = 31 * 24;

pub(super) fn hour_of(wall: UnixNanos) -> u64 {
    wall.0 / HOUR
}

/// A report that breaks the law: a bug of the meter. Nothing of it was booked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the meter's report breaks the law: {0}")]
pub(super) struct Fault(pub(super) String);

/// What is to be appended to the ledger, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Record {
    Pool { epoch: i64, pool: PoolInfo },
    Receipt { receipt: Arc<Receipt>, transaction: Transaction },
    House(Transaction),
    Bill { transaction: Transaction, from: DeviceNanos, to: DeviceNanos },
    End { epoch: i64, clean: bool, end: DeviceNanos, wall: UnixNanos },
}

/// An epoch's fixed facts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Epoch {
    pub(super) id: i64,
    pub(super) device: String,
    pub(super) rate: RateCard,
}

/// What the closes of an epoch have posted so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Posted {
    pub(super) at: DeviceNanos,
    pub(super) house: House,
    /// Money of the house without rounding.
    pub(super) money: Picos,
    pub(super) rounding: Picos,
}

/// All that is needed to go on with an epoch: the checkpoint is made of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Books {
    pub(super) epoch: Epoch,
    pub(super) last: Snapshot,
    pub(super) hour: u64,
    pub(super) settled_money: Picos,
    pub(super) posted: Posted,
    pub(super) method: Option<String>,
    pub(super) next_transaction: i64,
    crash: Crash,
}

/// The part of an epoch that is not in entries yet, priced by the same floors as it will be.
#[derive(Debug, Clone)]
pub(super) struct Standing {
    pub(super) unposted: Vec<(String, Amounts)>,
    pub(super) open: Amounts,
    /// Of the whole epoch so far.
    pub(super) bill: Picos,
    /// What is missing to the bill and not posted yet.
    pub(super) rounding: Picos,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Crash {
    time: DeviceNanos,
    kv: BlockNanos,
}

impl Books {
    pub(super) fn open(epoch: Epoch, wall: UnixNanos, next_transaction: i64) -> Self {
        let last = Snapshot {
            now: DeviceNanos::ZERO,
            wall,
            pool: None,
            house_time: Default::default(),
            house_kv: Default::default(),
            settled_device: DeviceNanos::ZERO,
            settled_kv: BlockNanos::ZERO,
            open: Vec::new(),
        };
        Self::restore(epoch, last, hour_of(wall), Picos::ZERO, Posted::default(), next_transaction)
    }

    pub(super) fn restore(
        epoch: Epoch,
        last: Snapshot,
        hour: u64,
        settled_money: Picos,
        posted: Posted,
        next_transaction: i64,
    ) -> Self {
        Self {
            epoch,
            last,
            hour,
            settled_money,
            posted,
            method: None,
            next_transaction,
            crash: Crash::default(),
        }
    }

    /// Books one report. `who` gives each finished request's attribution, `None` for a ticket that
    /// was never given out.
    pub(super) fn apply(
        &mut self,
        report: MeterReport,
        mut who: impl FnMut(&Usage) -> Option<Attribution>,
    ) -> Result<Vec<Record>, Fault> {
        self.check(&report)?;
        let mut records = Vec::new();
        let MeterReport { finished, snapshot } = report;
        self.close_hours(&snapshot, &mut records);
        if self.last.pool.is_none()
            && let Some(pool) = snapshot.pool
        {
            records.push(Record::Pool { epoch: self.epoch.id, pool });
        }
        self.last = snapshot;
        for usage in finished {
            let who = who(&usage);
            records.push(self.settle(usage, who));
        }
        Ok(records)
    }

    fn check(&self, report: &MeterReport) -> Result<(), Fault> {
        let (old, new) = (&self.last, &report.snapshot);
        new.check().map_err(Fault)?;
        let fault = |what: String| Err(Fault(what));
        if new.now < old.now {
            return fault(format!("the device clock fell from {} to {} ns", old.now.0, new.now.0));
        }
        if old.pool.is_some() && old.pool != new.pool {
            return fault(format!(
                "the KV pool changed within the epoch: {:?}, then {:?}",
                old.pool, new.pool
            ));
        }
        for (class, (was, is)) in HouseTime::ALL.iter().zip(old.house_time.iter().zip(&new.house_time)) {
            if is < was {
                return fault(format!("{} fell from {} to {} ns", class.account(), was.0, is.0));
            }
        }
        for class in [CACHED, FREE] {
            let (was, is) = (old.house_kv[class], new.house_kv[class]);
            if is < was {
                let account = HouseKv::ALL[class].account();
                return fault(format!("{account} fell from {} to {} block-ns", was.0, is.0));
            }
        }
        let finished = &report.finished;
        let device = old.settled_device + finished.iter().map(Usage::device).sum();
        if device != new.settled_device {
            let (is, want) = (new.settled_device.0, device.0);
            return fault(format!("settled device time is {is} ns, the receipts' sum is {want} ns"));
        }
        let kv = old.settled_kv + finished.iter().map(|usage| usage.kv).sum();
        if kv != new.settled_kv {
            let (is, want) = (new.settled_kv.0, kv.0);
            return fault(format!("settled KV is {is} block-ns, the receipts' sum is {want} block-ns"));
        }
        if let Some(pool) = new.pool {
            let used = new.settled_device + new.open.iter().map(|open| open.device).sum();
            if old.pool.is_none() && (pool.since < old.now || pool.since > new.now) {
                return fault(format!("the KV pool begins at {} ns, outside this report", pool.since.0));
            }
            let before = old.settled_device + old.open.iter().map(|open| open.device).sum();
            if pool.since + used > new.now || (old.pool.is_none() && before > DeviceNanos::ZERO) {
                return fault("requests used the device before there was a KV pool".to_owned());
            }
        }
        Ok(())
    }

    fn prices(&self) -> Prices {
        self.epoch.rate.prices(self.last.pool)
    }

    fn settle(&mut self, mut usage: Usage, who: Option<Attribution>) -> Record {
        let attribution = who.unwrap_or_else(|| {
            usage.status = Finish::Error;
            Attribution::unknown(&usage)
        });
        let rate = &self.epoch.rate;
        let line = Line::price(&self.epoch.device, rate, &self.prices(), usage.device(), usage.kv);
        let amounts = Amounts { time: usage.device(), kv: usage.kv, money: line.total() };
        self.settled_money += amounts.money;
        let receipt = Receipt {
            attribution,
            usage,
            device: self.epoch.device.clone(),
            bytes_per_block: self.last.pool.map_or(0, |pool| pool.bytes_per_block),
            lines: vec![line],
            currency: rate.currency().to_owned(),
            method_id: self.method.clone(),
        };
        let head = self.head(Kind::Receipt);
        let transaction = Transaction::balanced(
            head,
            vec![(payer(receipt.usage.status, &receipt.attribution.tenant), amounts)],
            device_account(&self.epoch.device),
        );
        Record::Receipt { receipt: Arc::new(receipt), transaction }
    }

    fn head(&mut self, kind: Kind) -> TransactionHead {
        let id = self.next_transaction;
        self.next_transaction += 1;
        TransactionHead { id, kind, epoch: self.epoch.id, hour: self.hour, wall: self.last.wall }
    }

    /// Closes each clock hour that ended before `next`.
    fn close_hours(&mut self, next: &Snapshot, records: &mut Vec<Record>) {
        let target = hour_of(next.wall);
        while self.hour < target {
            let boundary = UnixNanos((self.hour + 1) * HOUR);
            let idle = self.idle_until(boundary, next);
            self.close(records, false);
            self.hour = if idle == 0 { target } else { self.hour + 1 };
        }
    }

    /// Moves the books through the gap's idle time towards `boundary`; returns how far.
    fn idle_until(&mut self, boundary: UnixNanos, next: &Snapshot) -> u64 {
        let last = &mut self.last;
        if last.pool != next.pool || boundary <= last.wall {
            return 0;
        }
        let left = next.house_time[IDLE] - last.house_time[IDLE];
        let mut idle = left.0.min(boundary.0 - last.wall.0);
        if let Some(pool) = last.pool.filter(|pool| pool.blocks > 0) {
            let blocks = u128::from(pool.blocks);
            let cached = next.house_kv[CACHED] - last.house_kv[CACHED];
            let both = cached + (next.house_kv[FREE] - last.house_kv[FREE]);
            idle = idle.min(u64::try_from(both.0 / blocks).unwrap_or(u64::MAX));
            if idle > 0 {
                let elapsed = blocks * u128::from(idle);
                let part = mul_div(elapsed, cached.0, both.0).0;
                last.house_kv[CACHED] += BlockNanos(part);
                last.house_kv[FREE] += BlockNanos(elapsed - part);
            }
        }
        last.house_time[IDLE] += DeviceNanos(idle);
        last.now += DeviceNanos(idle);
        last.wall = UnixNanos(last.wall.0 + idle);
        idle
    }

    fn house(&self) -> House {
        House {
            time: self.last.house_time.map(|time| time.0),
            kv: self.last.house_kv.map(|kv| kv.0),
            crash_time: self.crash.time.0,
            crash_kv: self.crash.kv.0,
        }
    }

    /// Posts the bill and the house since the last close. `last`: the epoch ends, nothing stays open.
    fn close(&mut self, records: &mut Vec<Record>, last: bool) {
        let (now, prices) = (self.last.now, self.prices());
        let house = self.house();
        let mut debits = house_debits(&self.posted, &house, self.last.pool, now, &prices, last);
        for (_, amounts) in &debits {
            self.posted.money += amounts.money;
        }
        let open = if last {
            assert!(self.last.open.is_empty(), "the epoch ends with open requests: this is a bug");
            Picos::ZERO
        } else {
            let carry = prices.at_most(DeviceNanos::ZERO, self.last.house_kv[CARRY]);
            self.last.open.iter().map(|open| prices.at_most(open.device, open.kv)).sum::<Picos>() + carry
        };
        let cost = self.epoch.rate.bill(DeviceNanos::ZERO, now);
        let lost = cost - self.settled_money - self.posted.money - open - self.posted.rounding;
        assert!(!last || lost >= Picos::ZERO, "posted more than the device cost: this is a bug");
        if lost > Picos::ZERO {
            self.posted.rounding += lost;
            debits.push((ROUNDING.to_owned(), Amounts { money: lost, ..Amounts::default() }));
        }
        let (from, device) = (self.posted.at, device_account(&self.epoch.device));
        if now > from {
            let bill = Amounts {
                time: now - from,
                kv: elapsed_kv(self.last.pool, now) - elapsed_kv(self.last.pool, from),
                money: self.epoch.rate.bill(from, now),
            };
            let head = self.head(Kind::Bill);
            let vendor = vendor_account(&self.epoch.device);
            let transaction = Transaction::balanced(head, vec![(device.clone(), bill)], vendor);
            records.push(Record::Bill { transaction, from, to: now });
        }
        if !debits.is_empty() {
            let head = self.head(Kind::House);
            records.push(Record::House(Transaction::balanced(head, debits, device)));
        }
        self.posted.at = now;
        let carry = self.posted.house.kv[CARRY];
        self.posted.house = house;
        if !last {
            self.posted.house.kv[CARRY] = carry;
        }
    }

    /// Where the epoch stands between two closes: what the house has used since the last one, what is open,
    /// what flooring has taken.
    pub(super) fn standing(&self) -> Standing {
        let (now, prices) = (self.last.now, self.prices());
        let unposted = house_debits(&self.posted, &self.house(), self.last.pool, now, &prices, true);
        let mut open = Amounts::default();
        for accrual in &self.last.open {
            let money = prices.time(accrual.device) + prices.memory(accrual.kv);
            open += Amounts { time: accrual.device, kv: accrual.kv, money };
        }
        let bill = self.epoch.rate.bill(DeviceNanos::ZERO, now);
        let house = self.posted.money + unposted.iter().map(|(_, amounts)| amounts.money).sum();
        let rounding = bill - self.settled_money - house - open.money - self.posted.rounding;
        Standing { unposted, open, bill, rounding }
    }

    /// Ends the epoch: what is still open settles with status `error`, all is posted.
    pub(super) fn end(&mut self, who: impl FnMut(&Usage) -> Option<Attribution>) -> Vec<Record> {
        let mut records = self.settle_open(who);
        self.finish(true, &mut records);
        records
    }

    /// Ends an epoch that stopped without a word: it lasted until `restart` on the wall clock, and
    /// from the last snapshot on nobody used it.
    pub(super) fn crash(
        &mut self,
        restart: UnixNanos,
        who: impl FnMut(&Usage) -> Option<Attribution>,
    ) -> Vec<Record> {
        let mut records = self.settle_open(who);
        let target = hour_of(restart);
        let hours = target.saturating_sub(self.hour);
        let mut step = 1;
        if hours > HOURLY_MAX {
            step = HOURLY_MAX;
            tracing::error!(
                epoch = self.epoch.id,
                hours,
                "the crash lies so far back that the wall clock was probably wrong; all that time goes to \
                 house:crash, with one close for each 31 days"
            );
        }
        while self.hour < target {
            let next = target.min(self.hour + step);
            self.down_until(UnixNanos(next * HOUR));
            self.close(&mut records, false);
            self.hour = next;
        }
        self.down_until(restart);
        self.finish(false, &mut records);
        records
    }

    fn finish(&mut self, clean: bool, records: &mut Vec<Record>) {
        self.close(records, true);
        let (epoch, end, wall) = (self.epoch.id, self.last.now, self.last.wall);
        records.push(Record::End { epoch, clean, end, wall });
    }

    fn down_until(&mut self, wall: UnixNanos) {
        let down = DeviceNanos(wall.0.saturating_sub(self.last.wall.0));
        let before = elapsed_kv(self.last.pool, self.last.now);
        self.last.now += down;
        self.last.wall = self.last.wall.max(wall);
        self.crash.time += down;
        self.crash.kv += elapsed_kv(self.last.pool, self.last.now) - before;
    }

    pub(super) fn settle_open(&mut self, mut who: impl FnMut(&Usage) -> Option<Attribution>) -> Vec<Record> {
        let open = std::mem::take(&mut self.last.open);
        let mut records = Vec::with_capacity(open.len());
        for accrual in open {
            let usage = broken_off(&accrual, self.last.wall);
            self.last.settled_device += usage.device();
            self.last.settled_kv += usage.kv;
            let who = who(&usage);
            records.push(self.settle(usage, who));
        }
        records
    }
}

/// The usage of a request that never ended: only its quantities are known, the time not by phase.
fn broken_off(open: &Accrual, wall: UnixNanos) -> Usage {
    Usage {
        request: open.request.clone(),
        ticket: open.ticket,
        status: Finish::Error,
        seed: 0,
        tokens: TokenCounts::default(),
        prefill: DeviceNanos::ZERO,
        decode: open.device,
        steps: 0,
        kv: open.kv,
        kv_peak_blocks: 0,
        queue: DeviceNanos::ZERO,
        ttft: None,
        wall: DeviceNanos::ZERO,
        submitted_at: wall,
        finished_at: wall,
        saved_by_prefix_cache: DeviceNanos::ZERO,
        saved_by_batching: DeviceNanos::ZERO,
    }
}

/// Block-time of the pool from its beginning to `now`.
pub(super) fn elapsed_kv(pool: Option<PoolInfo>, now: DeviceNanos) -> BlockNanos {
    let elapsed = |pool: PoolInfo| u128::from(pool.blocks) * u128::from(now.0.saturating_sub(pool.since.0));
    BlockNanos(pool.map_or(0, elapsed))
}

/// What the house used since the last close, priced, by account; accounts with nothing are left out.
/// Time before the pool existed costs the whole price.
pub(super) fn house_debits(
    posted: &Posted,
    house: &House,
    pool: Option<PoolInfo>,
    now: DeviceNanos,
    prices: &Prices,
    with_carry: bool,
) -> Vec<(String, Amounts)> {
    let mut before_pool = pool.map_or(0, |pool| now.0.min(pool.since.0).saturating_sub(posted.at.0));
    let mut debits: Vec<(String, Amounts)> = Vec::new();
    let mut post = |account: &str, time: u64, whole: u64, kv: u128| {
        let money = prices.whole(DeviceNanos(whole))
            + prices.time(DeviceNanos(time - whole))
            + prices.memory(BlockNanos(kv));
        let amounts = Amounts { time: DeviceNanos(time), kv: BlockNanos(kv), money };
        if !amounts.is_zero() {
            debits.push((account.to_owned(), amounts));
        }
    };
    let mut take = |time: u64| {
        let whole = time.min(before_pool);
        before_pool -= whole;
        whole
    };
    for class in BEFORE_POOL {
        let time = house.time[class] - posted.house.time[class];
        post(HouseTime::ALL[class].account(), time, take(time), 0);
    }
    let crash_time = house.crash_time - posted.house.crash_time;
    post(CRASH, crash_time, take(crash_time), house.crash_kv - posted.house.crash_kv);
    for class in [CACHED, FREE, CARRY] {
        if class != CARRY || with_carry {
            post(HouseKv::ALL[class].account(), 0, 0, house.kv[class] - posted.house.kv[class]);
        }
    }
    debits
}
