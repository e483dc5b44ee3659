//! What the engine tells the ledger and the gauges, and when.
//!
//! Invariant: requests that ended and the snapshot of the meter just after travel in one message, and
//! no message leaves that does not add up.

use std::collections::BTreeMap;

use crate::units::{BlockNanos, DeviceNanos};
use crate::usage::{HouseTime, MeterReport, Snapshot};

use super::super::sequence::RequestKey;
use super::Engine;

/// How long between checkpoints when the device works, and when only time passes.
const BUSY_REPORT: DeviceNanos = DeviceNanos(1_000_000_000);
const IDLE_REPORT: DeviceNanos = DeviceNanos(10_000_000_000);
/// Requests that end within this time of each other share a report while others run.
const TOGETHER: DeviceNanos = DeviceNanos(10_000_000);

impl Engine {
    /// Between steps.
    pub(super) fn report_if_due(&mut self) {
        if self.is_due() { self.report() } else { self.publish_stats() }
    }

    /// While a step runs the books stand at its start, and so does the report.
    pub(super) fn report_in_step_if_due(&mut self) {
        if self.is_due() { self.report_as_of_the_cursor() } else { self.publish_stats() }
    }

    fn is_due(&self) -> bool {
        let pause = match (self.finished.is_empty(), self.is_idle()) {
            (false, true) => DeviceNanos::ZERO,
            (false, false) => TOGETHER,
            (true, _) if self.changed => BUSY_REPORT,
            (true, _) => IDLE_REPORT,
        };
        self.clock.now() >= self.reported + pause
    }

    /// Books the time up to now, which no step took, and reports.
    pub(super) fn report(&mut self) {
        let class = if self.is_idle() { HouseTime::Idle } else { HouseTime::HostGap };
        self.partition.book(class, self.clock.now());
        self.report_as_of_the_cursor();
    }

    fn report_as_of_the_cursor(&mut self) {
        let now = self.partition.cursor();
        self.blocks.tick(now);
        let snapshot = self.snapshot(now);
        if let Err(difference) = snapshot.check() {
            panic!("the meter's books do not balance: {difference}; this is a bug");
        }
        self.reported = now;
        self.changed = false;
        let report = MeterReport { finished: std::mem::take(&mut self.finished), snapshot };
        if self.reports.send(report).is_err() {
            tracing::error!("the ledger is gone; a report was lost");
        }
        self.gather_stats();
        self.shared.stats().clone_from(&self.stats);
    }

    fn snapshot(&self, now: DeviceNanos) -> Snapshot {
        let mut held: BTreeMap<RequestKey, BlockNanos> = BTreeMap::new();
        for sequence in &self.running {
            *held.entry(sequence.request).or_default() += sequence.lease.owed();
        }
        // After the leases were asked what they owe.
        let house_kv = self.blocks.house();
        let open = self
            .requests
            .iter()
            .map(|(key, request)| request.accrual(held.get(key).copied().unwrap_or_default()))
            .collect();
        Snapshot {
            now,
            wall: self.wall_at(now),
            pool: Some(self.config.pool(self.since)),
            house_time: *self.partition.house(),
            house_kv,
            settled_device: self.settled_device,
            settled_kv: self.settled_kv,
            open,
            energy: self.energy.totals(&self.requests).map(Box::new),
        }
    }

    /// For gauges, which are as well served by the next step: a reader is not waited for.
    fn publish_stats(&mut self) {
        self.gather_stats();
        if let Ok(mut stats) = self.shared.stats.try_lock() {
            stats.clone_from(&self.stats);
        }
    }

    fn gather_stats(&mut self) {
        self.stats.running = self.running.len() + self.encoding;
        self.stats.waiting = self.waiting.len() + self.texts.len();
        self.stats.blocks = self.blocks.counts();
        self.stats.blocks_total = self.config.blocks as u64;
        self.stats.house = *self.partition.house();
        self.stats.charged = self.partition.charged();
        self.stats.now = self.partition.cursor();
    }
}
