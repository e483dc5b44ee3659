//! The books of one device's epoch: reports of the meter in, records to be written out. Pure: no disk, no clock.
//!
//! Does: check each report against the laws, price what requests used, post the house at the close of each clock
//! hour and of the epoch, post what flooring left over.
//! Does not know: SQL, waiters, threads, other devices (`group.rs`).
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
    TransactionHead, device_account, vendor_account,
};
use super::price::{Prices, RateCard, mul_div};
use super::receipt::{Line, Receipt};
use crate::units::{BlockNanos, DeviceNanos, Picos, UnixNanos};
use crate::usage::{Accrual, HouseKv, HouseTime, PoolInfo, Snapshot, Usage};

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
    Pool {
        epoch: i64,
        pool: PoolInfo,
    },
    /// `epochs`: those of its lines.
    Receipt {
        receipt: Arc<Receipt>,
        transaction: Transaction,
        epochs: Vec<i64>,
    },
    House(Transaction),
    Bill {
        transaction: Transaction,
        from: DeviceNanos,
        to: DeviceNanos,
    },
    End {
        epoch: i64,
        clean: bool,
        end: DeviceNanos,
        wall: UnixNanos,
    },
}

impl Record {
    /// The clock hour to which it adds something.
    pub(super) fn hour(&self) -> Option<u64> {
        match self {
            Self::Receipt { transaction, .. } | Self::House(transaction) | Self::Bill { transaction, .. } => {
                Some(transaction.hour)
            }
            Self::Pool { .. } | Self::End { .. } => None,
        }
    }
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
    crash: Crash,
}

/// The id of the transaction to come: one for all books of a ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NextTransaction(pub(super) i64);

impl NextTransaction {
    fn take(&mut self) -> i64 {
        self.0 += 1;
        self.0 - 1
    }
}

/// The part of an epoch that is not in entries yet, priced by the same floors as it will be.
#[derive(Debug, Clone)]
pub(super) struct Standing {
    pub(super) unposted: Vec<(String, Amounts)>,
    pub(super) open: Amounts,
    /// What is missing to the bill and not posted yet.
    pub(super) rounding: Picos,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Crash {
    time: DeviceNanos,
    kv: BlockNanos,
}

impl Books {
    pub(super) fn open(epoch: Epoch, wall: UnixNanos) -> Self {
        let last = Snapshot {
            now: DeviceNanos::ZERO,
            wall,
            pool: None,
            house_time: Default::default(),
            house_kv: Default::default(),
            settled_device: DeviceNanos::ZERO,
            settled_kv: BlockNanos::ZERO,
            open: Vec::new(),
            energy: None,
        };
        Self::restore(epoch, last, hour_of(wall), Picos::ZERO, Posted::default())
    }

    pub(super) fn restore(
        epoch: Epoch,
        last: Snapshot,
        hour: u64,
        settled_money: Picos,
        posted: Posted,
    ) -> Self {
        Self { epoch, last, hour, settled_money, posted, crash: Crash::default() }
    }

    /// Moves on to a snapshot that has been checked: closes the hours that have ended before it.
    pub(super) fn advance(
        &mut self,
        snapshot: Snapshot,
        next: &mut NextTransaction,
        records: &mut Vec<Record>,
    ) {
        self.close_hours(&snapshot, next, records);
        if self.last.pool.is_none()
            && let Some(pool) = snapshot.pool
        {
            records.push(Record::Pool { epoch: self.epoch.id, pool });
        }
        self.last = snapshot;
    }

    /// Whether a report of these finished requests may come next.
    pub(super) fn check(&self, finished: &[Usage], new: &Snapshot) -> Result<(), Fault> {
        let old = &self.last;
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

    /// What a request owes for this much of the device, and the account that it is owed to.
    pub(super) fn charge(&mut self, time: DeviceNanos, kv: BlockNanos) -> (Line, String) {
        let line = Line::price(&self.epoch.device, &self.epoch.rate, &self.prices(), time, kv);
        self.settled_money += line.total();
        (line, device_account(&self.epoch.device))
    }

    pub(super) fn head(&self, kind: Kind, next: &mut NextTransaction) -> TransactionHead {
        let (id, epoch) = (next.take(), self.epoch.id);
        TransactionHead { id, kind, epoch, hour: self.hour, wall: self.last.wall }
    }

    /// Closes each clock hour that ended before `coming`.
    fn close_hours(&mut self, coming: &Snapshot, next: &mut NextTransaction, records: &mut Vec<Record>) {
        let target = hour_of(coming.wall);
        while self.hour < target {
            let boundary = UnixNanos((self.hour + 1) * HOUR);
            let idle = self.idle_until(boundary, coming);
            self.close(next, records, false);
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
    fn close(&mut self, next: &mut NextTransaction, records: &mut Vec<Record>, last: bool) {
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
            let head = self.head(Kind::Bill, next);
            let vendor = vendor_account(&self.epoch.device);
            let transaction = Transaction::balanced(head, vec![(device.clone(), bill)], vendor);
            records.push(Record::Bill { transaction, from, to: now });
        }
        if !debits.is_empty() {
            let head = self.head(Kind::House, next);
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
        Standing { unposted, open, rounding }
    }

    /// An epoch that stopped without a word lasted until `restart` on the wall clock, and from the last snapshot
    /// on nobody used it.
    pub(super) fn be_down_until(
        &mut self,
        restart: UnixNanos,
        next: &mut NextTransaction,
        records: &mut Vec<Record>,
    ) {
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
            let until = target.min(self.hour + step);
            self.down_until(UnixNanos(until * HOUR));
            self.close(next, records, false);
            self.hour = until;
        }
        self.down_until(restart);
    }

    /// Posts all that is left, and ends the epoch.
    pub(super) fn finish(&mut self, clean: bool, next: &mut NextTransaction, records: &mut Vec<Record>) {
        self.close(next, records, true);
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

    /// Counts what is open as settled, and hands it out for a receipt to be made of it.
    pub(super) fn take_open(&mut self) -> Vec<Accrual> {
        let open = std::mem::take(&mut self.last.open);
        for accrual in &open {
            self.last.settled_device += accrual.device;
            self.last.settled_kv += accrual.kv;
        }
        open
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
