//! What a request used and what the device did, physically: the data that the engine's meter sends
//! to the ledger. No price, no account of a customer.

use crate::request::Finish;
use crate::units::{BlockNanos, DeviceNanos, Picos, RequestId, Ticket, UnixNanos};

/// Token counts of one request, all choices together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TokenCounts {
    /// Prompt tokens, counted once whatever the number of choices.
    pub prompt: u64,
    /// Prompt tokens whose KV came from the prefix cache when the request first ran.
    pub cached: u64,
    /// Generated tokens of all choices, the end token included.
    pub completion: u64,
    pub draft_accepted: u64,
    pub draft_rejected: u64,
}

/// Everything measured about one finished request. Receipts, headers and metrics all print this.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    pub request: RequestId,
    pub ticket: Ticket,
    pub status: Finish,
    pub seed: u64,
    pub tokens: TokenCounts,
    /// The request's share of steps in which it computed prompt tokens.
    pub prefill: DeviceNanos,
    /// The request's share of steps in which it only decoded.
    pub decode: DeviceNanos,
    /// Steps it took part in.
    pub steps: u64,
    pub kv: BlockNanos,
    pub kv_peak_blocks: u64,
    /// Submission to first scheduling, to first token, to the end (engine's clock).
    pub queue: DeviceNanos,
    pub ttft: Option<DeviceNanos>,
    pub wall: DeviceNanos,
    /// Wall-clock time of submission and of the end.
    pub submitted_at: UnixNanos,
    pub finished_at: UnixNanos,
    /// Estimates, for information only: device time not spent thanks to cached prefixes, and
    /// thanks to sharing steps with others.
    pub saved_by_prefix_cache: DeviceNanos,
    pub saved_by_batching: DeviceNanos,
    /// Its share of the energy that the device used, in millijoules, where the device has a meter.
    pub energy_mj: Option<u64>,
}

impl Usage {
    #[must_use]
    pub fn device(&self) -> DeviceNanos {
        self.prefill + self.decode
    }

    /// What it comes to where as many devices ran each step together: each for the step's whole time, with a
    /// part of every block.
    #[must_use]
    pub fn on_devices(self, devices: u64) -> Self {
        let time =
            |time: DeviceNanos| DeviceNanos(time.0.checked_mul(devices).expect("device time overflows"));
        let blocks = self.kv_peak_blocks.checked_mul(devices).expect("blocks overflow");
        let kv = self.kv.0.checked_mul(u128::from(devices)).expect("block time overflows");
        Self {
            prefill: time(self.prefill),
            decode: time(self.decode),
            kv: BlockNanos(kv),
            kv_peak_blocks: blocks,
            saved_by_prefix_cache: time(self.saved_by_prefix_cache),
            saved_by_batching: time(self.saved_by_batching),
            ..self
        }
    }
}

/// Who pays for a request, as the ledger asks when it is settled.
pub trait Purse: std::fmt::Debug + Send + Sync {
    /// What is paid of `cost`: all of it, or what a budget had set aside. Asked once.
    fn pay(&self, cost: Picos) -> Picos;
}

/// Who pays for device time that no request pays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HouseTime {
    /// Work was runnable but the device waited for the host.
    HostGap,
    /// Nothing was runnable.
    Idle,
    /// Weights were loading. Before there is a KV pool: the whole price goes to time.
    Load,
    /// Calibration. Before there is a KV pool: the whole price goes to time.
    Warmup,
    /// Recompute after a preemption: our choice, not the user's.
    Preemption,
}

impl HouseTime {
    pub const ALL: [Self; 5] = [Self::HostGap, Self::Idle, Self::Load, Self::Warmup, Self::Preemption];

    #[must_use]
    pub fn account(self) -> &'static str {
        match self {
            Self::HostGap => "house:host_gap",
            Self::Idle => "house:idle",
            Self::Load => "house:load",
            Self::Warmup => "house:warmup",
            Self::Preemption => "house:preemption",
        }
    }
}

/// Who pays for KV blocks that no request holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HouseKv {
    /// Kept for prefix hits.
    Cached,
    Free,
    /// Nanoseconds of shared blocks not yet divisible by their holders.
    Carry,
}

impl HouseKv {
    pub const ALL: [Self; 3] = [Self::Cached, Self::Free, Self::Carry];

    #[must_use]
    pub fn account(self) -> &'static str {
        match self {
            Self::Cached => "house:kv_cached",
            Self::Free => "house:kv_free",
            Self::Carry => "house:kv_carry",
        }
    }
}

/// What a request that has not finished yet has used so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accrual {
    pub request: RequestId,
    pub ticket: Ticket,
    pub device: DeviceNanos,
    pub kv: BlockNanos,
}

/// The KV pool of an epoch: fixed from the moment it exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolInfo {
    pub blocks: u64,
    pub bytes_per_block: u64,
    /// Device clock when the pool came to be; from then on part of the price goes to KV.
    pub since: DeviceNanos,
}

/// Energy since the device's meter was first read, in millijoules, as of its last reading.
///
/// Invariant (asserted as those of [`Snapshot`]): `total = house + settled + open`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EnergyTotals {
    pub total_mj: u64,
    pub house_mj: u64,
    /// Sum over all `Usage` sent so far in this epoch.
    pub settled_mj: u64,
    /// What was given to requests that have not finished yet.
    pub open_mj: u64,
}

/// The whole device at one instant, all figures cumulative since the epoch began.
///
/// Invariants (asserted by the meter when it makes one, and by the ledger when it takes one):
/// `now = sum(house_time) + settled_device + sum(open.device)` and, with a pool,
/// `blocks * (now - since) = sum(house_kv) + settled_kv + sum(open.kv)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Device clock: nanoseconds since the epoch began.
    pub now: DeviceNanos,
    /// Wall clock at the same instant.
    pub wall: UnixNanos,
    pub pool: Option<PoolInfo>,
    /// In the order of `HouseTime::ALL`.
    pub house_time: [DeviceNanos; 5],
    /// In the order of `HouseKv::ALL`.
    pub house_kv: [BlockNanos; 3],
    /// Sums over all `Usage` sent so far in this epoch.
    pub settled_device: DeviceNanos,
    pub settled_kv: BlockNanos,
    pub open: Vec<Accrual>,
    /// Where the device has a meter; boxed, as few have one.
    pub energy: Option<Box<EnergyTotals>>,
}

impl Snapshot {
    /// Checks the two laws; `Err` names the account of the difference.
    pub fn check(&self) -> Result<(), String> {
        let time = self.house_time.iter().copied().sum::<DeviceNanos>()
            + self.settled_device
            + self.open.iter().map(|a| a.device).sum::<DeviceNanos>();
        if time != self.now {
            return Err(format!("device time: {} ns accounted for, {} ns elapsed", time.0, self.now.0));
        }
        let kv = self.house_kv.iter().copied().sum::<BlockNanos>()
            + self.settled_kv
            + self.open.iter().map(|a| a.kv).sum::<BlockNanos>();
        let expected = self.pool.map_or(0, |p| u128::from(p.blocks) * u128::from((self.now - p.since).0));
        if kv.0 != expected {
            return Err(format!("KV memory: {} block-ns accounted for, {expected} elapsed", kv.0));
        }
        if let Some(EnergyTotals { total_mj, house_mj, settled_mj, open_mj }) =
            self.energy.as_deref().copied()
            && house_mj + settled_mj + open_mj != total_mj
        {
            return Err(format!("energy: {house_mj} + {settled_mj} + {open_mj} mJ of {total_mj} mJ"));
        }
        Ok(())
    }
}

/// One message from the engine to the ledger: requests that ended, then the device as of just after.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeterReport {
    pub finished: Vec<Usage>,
    pub snapshot: Snapshot,
}
