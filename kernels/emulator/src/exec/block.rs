//! A block: its warps in turn, and its barriers.

use super::WarpOrder;
use super::instruction::Stop;
use super::registers::LANES;
use super::shared::Shared;
use super::warp::{Context, Pause, Warp};
use crate::fault::FaultKind;

/// Barriers that a block has.
const BARRIERS: usize = 16;

/// Runs blocks, one after the other, with the same warps.
pub(crate) struct Block<'a> {
    context: &'a Context<'a>,
    shared: &'a Shared,
    warps: Vec<Warp<'a>>,
    done: Vec<bool>,
    /// Threads that arrived at a barrier and went on (`bar.arrive`).
    arrived: [u32; BARRIERS],
    order: WarpOrder,
}

/// The warp that could not go on, and why.
pub(crate) struct Stopped {
    pub(crate) stop: Box<Stop>,
    pub(crate) warp: usize,
}

impl<'a> Block<'a> {
    pub(crate) fn new(context: &'a Context<'a>, shared: &'a Shared, order: WarpOrder) -> Self {
        let warps = context.threads().div_ceil(LANES as u32);
        let warps: Vec<_> = (0..warps).map(|index| Warp::new(context, shared, index)).collect();
        let done = vec![false; warps.len()];
        Self { context, shared, warps, done, arrived: [0; BARRIERS], order }
    }

    /// Instructions that its warps have run so far.
    pub(crate) fn executed(&self) -> u64 {
        self.warps.iter().map(|w| w.executed).sum()
    }

    pub(crate) fn warp(&self, index: usize) -> &Warp<'a> {
        &self.warps[index]
    }

    /// Runs block `index` of the grid to its end.
    pub(crate) fn run(&mut self, index: [u32; 3]) -> Result<(), Stopped> {
        self.shared.refresh();
        self.arrived = [0; BARRIERS];
        self.done.fill(false);
        self.warps.iter_mut().for_each(|warp| warp.start(index));
        loop {
            let mut progress = false;
            for turn in 0..self.warps.len() {
                let warp = match self.order {
                    WarpOrder::Forward => turn,
                    WarpOrder::Reverse => self.warps.len() - 1 - turn,
                };
                if self.done[warp] || self.warps[warp].at_barrier.is_some() {
                    continue;
                }
                progress = true;
                let pause = self.warps[warp].run().map_err(|stop| Stopped { stop, warp })?;
                self.done[warp] = pause == Pause::Done;
                for (barrier, threads) in std::mem::take(&mut self.warps[warp].arrivals) {
                    self.arrived[barrier as usize] += threads;
                }
            }
            if self.done.iter().all(|&done| done) {
                return Ok(());
            }
            let opened = (0..BARRIERS as u32).filter(|&barrier| self.open(barrier)).count();
            if opened == 0 && !progress {
                return Err(self.stuck());
            }
        }
    }

    /// Opens a barrier that all its threads have reached.
    fn open(&mut self, barrier: u32) -> bool {
        let waiting = || self.warps.iter().filter_map(|w| w.at_barrier).filter(|at| at.barrier == barrier);
        let Some(first) = waiting().next() else { return false };
        let reached = match first.threads {
            None => waiting().map(|at| at.arrived.count_ones()).sum::<u32>() == self.context.threads(),
            // A warp counts whole where the number of threads is stated.
            Some(threads) => {
                waiting().count() as u32 * LANES as u32 + self.arrived[barrier as usize] >= threads
            }
        };
        if !reached {
            return false;
        }
        let votes = waiting().map(|at| at.votes.count_ones()).sum();
        let threads = waiting().map(|at| at.arrived.count_ones()).sum();
        self.arrived[barrier as usize] = 0;
        for warp in &mut self.warps {
            if warp.at_barrier.is_some_and(|at| at.barrier == barrier) {
                warp.release(votes, threads);
            }
        }
        self.shared.next_phase();
        true
    }

    /// The barrier of the first warp that waits, and waits for ever.
    fn stuck(&self) -> Stopped {
        let waits = |warp: &Warp<'_>| warp.at_barrier.map(|at| at.barrier);
        let warp = self.warps.iter().position(|w| waits(w).is_some()).expect("else a warp had run");
        let barrier = waits(&self.warps[warp]);
        let same = self.warps.iter().filter(|w| waits(w) == barrier);
        let waiting: u32 = same.filter_map(|w| w.at_barrier).map(|at| at.arrived.count_ones()).sum();
        let expected = self.warps[warp].at_barrier.and_then(|at| at.threads);
        let missing = expected.unwrap_or(self.context.threads()).saturating_sub(waiting);
        Stopped { stop: Stop::at(0, FaultKind::Barrier { waiting, missing }), warp }
    }
}
