//! Double entry: accounts, amounts in the three commodities, and transactions that balance.
//!
//! Does not know: what a price is, how rows are stored.
//! Invariant: in every transaction debits equal credits in device time, block-time and money, each.

use super::receipt::Receipt;
use crate::request::Finish;
use crate::units::{BlockNanos, DeviceNanos, Picos, UnixNanos};
use crate::usage::{HouseKv, HouseTime};

pub(super) const ERROR: &str = "house:error";
pub(super) const CRASH: &str = "house:crash";
/// Work past a hard cap.
pub(super) const CAP_OVERRUN: &str = "house:cap_overrun";
/// What tiers cost less than the device does.
pub(super) const DISCOUNT: &str = "house:tier_discount";
pub(super) const ROUNDING: &str = "house:rounding";

/// What the device offers: debited by the bill, credited by whoever used it. Its balance is the work
/// that is still open.
pub(super) fn device_account(device: &str) -> String {
    format!("device:{device}")
}

/// Where the device's bill comes from.
pub(super) fn vendor_account(device: &str) -> String {
    format!("vendor:{device}")
}

/// Who pays for a receipt with this status.
pub(super) fn payer(status: Finish, tenant: &str) -> String {
    if status == Finish::Error { ERROR.to_owned() } else { format!("tenant:{tenant}") }
}

/// The debits of a receipt over `total`: of its payer, and contra entries for what the house pays of its money.
pub(super) fn receipt_debits(receipt: &Receipt, total: Amounts) -> Vec<(String, Amounts)> {
    let contra = [(DISCOUNT, receipt.discount()), (CAP_OVERRUN, receipt.overrun)];
    let house: Picos = contra.iter().map(|(_, money)| *money).sum();
    let payer = payer(receipt.usage.status, &receipt.attribution.tenant);
    let mut debits = vec![(payer, Amounts { money: total.money - house, ..total })];
    for (account, money) in contra.into_iter().filter(|(_, money)| *money != Picos::ZERO) {
        debits.push((account.to_owned(), Amounts { money, ..Amounts::default() }));
    }
    debits
}

/// Quantities of the three commodities; never negative, the side says the sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Amounts {
    pub(super) time: DeviceNanos,
    pub(super) kv: BlockNanos,
    pub(super) money: Picos,
}

impl Amounts {
    #[must_use]
    pub(super) fn is_zero(&self) -> bool {
        *self == Self::default()
    }
}

impl std::ops::AddAssign for Amounts {
    fn add_assign(&mut self, other: Self) {
        self.time += other.time;
        self.kv += other.kv;
        self.money += other.money;
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Debit,
    Credit,
}

impl Side {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Debit => "debit",
            Self::Credit => "credit",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) account: String,
    pub(super) side: Side,
    pub(super) amounts: Amounts,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// One finished request.
    Receipt,
    /// What nobody requested, since the last close.
    House,
    /// The device's price, since the last close.
    Bill,
}

impl Kind {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Receipt => "receipt",
            Self::House => "house",
            Self::Bill => "bill",
        }
    }
}

/// Balanced entries of one occasion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Transaction {
    pub(super) id: i64,
    pub(super) kind: Kind,
    pub(super) epoch: i64,
    /// Clock hour, hours since 1970-01-01T00Z.
    pub(super) hour: u64,
    pub(super) wall: UnixNanos,
    pub(super) entries: Vec<Entry>,
}

impl Transaction {
    /// Debits for each of `debits`, one credit for their sum.
    pub(super) fn balanced(head: TransactionHead, debits: Vec<(String, Amounts)>, credit: String) -> Self {
        let mut total = Amounts::default();
        debits.iter().for_each(|(_, amounts)| total += *amounts);
        Self::of(head, debits, vec![(credit, total)])
    }

    /// These debits and credits, which are equal in sum.
    pub(super) fn of(
        head: TransactionHead,
        debits: Vec<(String, Amounts)>,
        credits: Vec<(String, Amounts)>,
    ) -> Self {
        let entries = |side: Side, amounts: Vec<(String, Amounts)>| {
            amounts.into_iter().map(move |(account, amounts)| Entry { account, side, amounts })
        };
        let entries = entries(Side::Debit, debits).chain(entries(Side::Credit, credits)).collect();
        let TransactionHead { id, kind, epoch, hour, wall } = head;
        Self { id, kind, epoch, hour, wall, entries }
    }
}

/// A transaction without its entries.
#[derive(Debug, Clone, Copy)]
pub(super) struct TransactionHead {
    pub(super) id: i64,
    pub(super) kind: Kind,
    pub(super) epoch: i64,
    pub(super) hour: u64,
    pub(super) wall: UnixNanos,
}

/// Cumulative quantities of an epoch that no request pays: the meter's house classes, and the time
/// after a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct House {
    pub(super) time: [u64; HouseTime::ALL.len()],
    pub(super) kv: [u128; HouseKv::ALL.len()],
    pub(super) crash_time: u64,
    pub(super) crash_kv: u128,
}

/// Position of a class in `HouseTime::ALL` and so in `Snapshot::house_time`.
pub(super) const IDLE: usize = 1;
pub(super) const CACHED: usize = 0;
pub(super) const FREE: usize = 1;
pub(super) const CARRY: usize = 2;

/// The order in which house time fills the nanoseconds before the pool existed.
pub(super) const BEFORE_POOL: [usize; HouseTime::ALL.len()] = [2, 3, 0, 1, 4];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_name_the_classes() {
        assert_eq!(HouseTime::ALL[IDLE], HouseTime::Idle);
        assert_eq!(
            [HouseKv::ALL[CACHED], HouseKv::ALL[FREE], HouseKv::ALL[CARRY]],
            [HouseKv::Cached, HouseKv::Free, HouseKv::Carry]
        );
        assert_eq!(
            BEFORE_POOL.map(|class| HouseTime::ALL[class]),
            [HouseTime::Load, HouseTime::Warmup, HouseTime::HostGap, HouseTime::Idle, HouseTime::Preemption]
        );
    }
}
