//! Keeping requests within what their budgets let them use: asked when a request is first scheduled, and after
//! each step.
//!
//! Knows no money. Invariant: a request that may not go on takes part in no step that is submitted after the step
//! in which that was found out was read.

use crate::engine::flight::{self, Flight};
use crate::engine::lines::Line;
use crate::meter::share::Work;
use crate::request::{Finish, Use};
use crate::units::{BlockNanos, DeviceNanos};

use super::Engine;

/// A request asks for as many steps ahead, so that it asks rarely.
const AHEAD: u64 = 16;

/// What a request with an allowance was last known to owe for blocks, and when.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::engine) struct Allowed {
    kv: BlockNanos,
    at: DeviceNanos,
}

/// So many blocks for so long.
fn held(blocks: usize, time: DeviceNanos) -> BlockNanos {
    BlockNanos(blocks as u128 * u128::from(time.0))
}

fn times(time: DeviceNanos, steps: u64) -> DeviceNanos {
    DeviceNanos(time.0.saturating_mul(steps))
}

impl Engine {
    /// Whether the line's head may begin: it has begun before, or there is enough for its prompt and a token, if one is
    /// drawn.
    pub(super) fn may_begin(&self, line: Line) -> bool {
        let Self { waiting, requests, calibration, config, blocks, .. } = self;
        let head = waiting.get(line, 0).expect("the plan admits waiting sequences");
        let request = &requests[&head.request];
        let Some(allowance) = request.new.allowance.as_deref().filter(|_| request.has_not_begun()) else {
            return true;
        };
        let cached = match config.prefix_caching {
            true => blocks.match_prefix(head.reusable_keys(config.block_size)).blocks * config.block_size,
            false => 0,
        };
        // Estimates, as if nobody were beside it.
        let (prompt, cached) = (head.tokens.len() as u64, cached as u64);
        let prefill = Work { tokens: prompt - cached, context: cached, logits: 1 };
        let prefill = calibration.prefill.alone(prefill);
        let step = match request.new.vectors {
            Some(_) => DeviceNanos::ZERO,
            None => calibration.decode.alone(Work { tokens: 1, context: prompt, logits: 1 }),
        };
        let blocks = head.tokens.len() / config.block_size + 1;
        let first = |steps: u64| {
            let device = prefill + times(step, steps);
            Use { device, kv: held(blocks, device) }
        };
        allowance.covers(first(1), first(AHEAD))
    }

    /// Asks for each request of a step that was read whether it may go on; those that may not are in `broke`.
    pub(super) fn ask_allowances(&mut self, flight: &Flight, step: DeviceNanos) {
        if self.bounded == 0 {
            return;
        }
        let Self { running, requests, buffers, partition, .. } = self;
        let now = partition.cursor();
        let (mut index, mut asked) = (0, None);
        for (member, share) in flight.members.iter().zip(&buffers.shares) {
            index = flight::find(running, index, member);
            let request = requests.get_mut(&member.request).expect("a sequence has a request");
            let Some(allowance) = request.new.allowance.as_deref() else { continue };
            if asked.replace(member.request) == Some(member.request) {
                // Another of its choices: it was asked for all of them.
                continue;
            }
            let choices = request.open as usize;
            let blocks = (running[index].lease.len() + 1) * choices;
            let device = request.device();
            let next = |steps: u64| Use {
                device: times(*share, steps * choices as u64),
                kv: held(blocks, times(step, steps)),
            };
            // At most this, if nobody has shared its block since it was last known.
            let most = request.allowed.kv + held(blocks, now - request.allowed.at);
            if choices == 1 && allowance.has(Use { device, kv: most } + next(1)) {
                continue;
            }
            let mine = running.iter().filter(|sequence| sequence.request == member.request);
            let kv = request.kv_paid.get() + mine.map(|sequence| sequence.lease.owed()).sum();
            let used = Use { device, kv };
            if !allowance.covers(used + next(1), used + next(AHEAD)) {
                buffers.broke.push(member.request);
            }
            request.allowed = Allowed { kv, at: now };
        }
    }

    /// Ends the requests that may not go on.
    pub(super) fn end_the_broke(&mut self) {
        while let Some(key) = self.buffers.broke.pop() {
            self.end_request(key, Finish::Budget);
        }
    }
}
