//! Running totals of the current epochs, kept beside the books for metrics.
//!
//! Does: count what was committed. Does not know: the database, metric names.
//! Invariant: changed only after a commit, by what it wrote.

use std::collections::BTreeMap;

use super::books::{Record, elapsed_kv};
use super::entry::Kind;
use super::receipt::Receipt;
use crate::request::Finish;
use crate::units::{BlockNanos, DeviceNanos, Picos};
use crate::usage::{HouseKv, HouseTime, Snapshot, TokenCounts};

/// What the receipts of one model add up to. Money of requests that ended with status `error` is on the house,
/// not here; they are only counted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ModelTotals {
    /// By status.
    pub requests: BTreeMap<&'static str, u64>,
    pub tokens: TokenCounts,
    /// Millijoules, where the devices have meters.
    pub energy_mj: Option<u64>,
    pub cost: Picos,
}

/// What the requests of one model used of one device, but for those that ended with status `error`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Used {
    pub prefill: DeviceNanos,
    pub decode: DeviceNanos,
    /// Byte-nanoseconds.
    pub kv_byte_nanos: u128,
}

/// One device's epoch so far.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DeviceTotals {
    pub device: String,
    /// By model.
    pub used: BTreeMap<String, Used>,
    /// Device time by house account.
    pub house_time: BTreeMap<&'static str, DeviceNanos>,
    /// Block-time by house account.
    pub house_kv: BTreeMap<&'static str, BlockNanos>,
    /// Device time elapsed minus device time accounted for, by the ledger's own sums. Zero.
    pub conservation_error_ns: i128,
    /// The same for the KV pool, in block-nanoseconds. Zero.
    pub kv_conservation_error: i128,
    settled_time: DeviceNanos,
    settled_kv: BlockNanos,
    error_time: DeviceNanos,
    error_kv: BlockNanos,
}

/// The epochs so far, as of the last commit.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Totals {
    pub currency: String,
    pub models: BTreeMap<String, ModelTotals>,
    /// In the order of the engines and their devices.
    pub devices: Vec<DeviceTotals>,
    /// What requests with status `error` cost the house.
    pub error_cost: Picos,
}

impl Totals {
    pub(super) fn new(currency: &str, devices: impl IntoIterator<Item = String>) -> Self {
        let devices = devices.into_iter().map(|device| DeviceTotals { device, ..DeviceTotals::default() });
        Self { currency: currency.to_owned(), devices: devices.collect(), ..Self::default() }
    }

    pub(super) fn add(&mut self, record: &Record) {
        if let Record::Receipt { receipt, transaction, .. } = record {
            debug_assert_eq!(transaction.kind, Kind::Receipt);
            self.add_receipt(receipt);
        }
    }

    fn add_receipt(&mut self, receipt: &Receipt) {
        let used = &receipt.usage;
        let model = self.models.entry(receipt.attribution.model.clone()).or_default();
        *model.requests.entry(used.status.as_str()).or_default() += 1;
        let tokens = &mut model.tokens;
        tokens.prompt += used.tokens.prompt;
        tokens.cached += used.tokens.cached;
        tokens.completion += used.tokens.completion;
        tokens.draft_accepted += used.tokens.draft_accepted;
        tokens.draft_rejected += used.tokens.draft_rejected;
        if let Some(used) = used.energy_mj {
            *model.energy_mj.get_or_insert(0) += used;
        }
        if used.status == Finish::Error {
            self.error_cost += receipt.total();
        } else {
            model.cost += receipt.total();
        }
        for line in &receipt.lines {
            let device = self.devices.iter_mut().find(|device| device.device == line.device);
            let device = device.expect("a receipt's lines are of this ledger's devices; this is a bug");
            device.settled_time += line.device_time;
            device.settled_kv += line.kv;
            if used.status == Finish::Error {
                device.error_time += line.device_time;
                device.error_kv += line.kv;
                continue;
            }
            // Devices that run a request's steps together are charged alike, so its phases are divided as its
            // time is.
            let decode = DeviceNanos(used.decode.0 / receipt.lines.len() as u64);
            let of_model = device.used.entry(receipt.attribution.model.clone()).or_default();
            of_model.prefill += line.device_time - decode;
            of_model.decode += decode;
            of_model.kv_byte_nanos += line.kv.0 * u128::from(receipt.bytes_per_block);
        }
    }

    /// Where the devices stand, in their order.
    pub(super) fn stand<'a>(&mut self, at: impl Iterator<Item = &'a Snapshot>) {
        self.devices.iter_mut().zip(at).for_each(|(device, at)| device.stands(at));
    }
}

impl DeviceTotals {
    fn stands(&mut self, at: &Snapshot) {
        let account = HouseTime::ALL.iter().map(|class| class.account());
        self.house_time = account.zip(at.house_time).collect();
        self.house_time.insert(super::entry::ERROR, self.error_time);
        let account = HouseKv::ALL.iter().map(|class| class.account());
        self.house_kv = account.zip(at.house_kv).collect();
        self.house_kv.insert(super::entry::ERROR, self.error_kv);
        let house: u64 = at.house_time.iter().map(|time| time.0).sum();
        let open: u64 = at.open.iter().map(|open| open.device.0).sum();
        self.conservation_error_ns =
            i128::from(at.now.0) - i128::from(house) - i128::from(open) - i128::from(self.settled_time.0);
        let house: u128 = at.house_kv.iter().map(|kv| kv.0).sum();
        let open: u128 = at.open.iter().map(|open| open.kv.0).sum();
        let accounted = house + open + self.settled_kv.0;
        self.kv_conservation_error = signed(elapsed_kv(at.pool, at.now).0) - signed(accounted);
    }
}

fn signed(value: u128) -> i128 {
    i128::try_from(value).expect("block-nanoseconds stay below 2^127")
}
