//! KV memory x time: who held which block for how long.
//!
//! A block with r holders charges each of them 1/r of its time, as proportional set size does for
//! shared pages. Exactly, in O(1) a change: a block keeps `acc`, nanoseconds not yet given out, and
//! `given`, the integral per holder; a holder notes `given` when it takes the block and pays the
//! difference when it lets go. Blocks without holders belong to the house.
//!
//! Invariant: paid by holders + held so far + cached + free + carry = blocks x elapsed.

use crate::units::{BlockNanos, DeviceNanos};
use crate::usage::HouseKv;

pub type BlockId = u32;

/// A holder's claim on a block: what `given` was when it took it.
#[derive(Debug)]
pub struct Hold {
    pub block: BlockId,
    given: u64,
}

#[derive(Debug, Clone, Default)]
struct BlockTime {
    holders: u32,
    acc: u64,
    given: u64,
    last: DeviceNanos,
}

impl BlockTime {
    /// Gives out what can be divided; `carry` is the sum of `acc` over all blocks.
    fn settle(&mut self, now: DeviceNanos, carry: &mut u64) {
        if self.holders > 0 {
            let holders = u64::from(self.holders);
            let before = self.acc;
            self.acc += (now - self.last).0;
            let each = self.acc / holders;
            self.given += each;
            self.acc -= each * holders;
            *carry = *carry + self.acc - before;
        }
        self.last = now;
    }
}

#[derive(Debug)]
pub struct KvMeter {
    since: DeviceNanos,
    now: DeviceNanos,
    blocks: Vec<BlockTime>,
    unheld: [u64; 2],
    house: [BlockNanos; 2],
    paid: BlockNanos,
    carry: u64,
}

const CACHED: usize = HouseKv::Cached as usize;
const FREE: usize = HouseKv::Free as usize;

impl KvMeter {
    /// A pool of free blocks that comes to be at `since`.
    #[must_use]
    pub fn new(blocks: usize, since: DeviceNanos) -> Self {
        let block = BlockTime { last: since, ..BlockTime::default() };
        Self {
            since,
            now: since,
            blocks: vec![block; blocks],
            unheld: [0, blocks as u64],
            house: [BlockNanos::ZERO; 2],
            paid: BlockNanos::ZERO,
            carry: 0,
        }
    }

    /// Moves time forward; what follows happens at `now`.
    pub fn tick(&mut self, now: DeviceNanos) {
        if now > self.now {
            let elapsed = u128::from((now - self.now).0);
            for (house, unheld) in self.house.iter_mut().zip(self.unheld) {
                *house += BlockNanos(elapsed * u128::from(unheld));
            }
            self.now = now;
        }
    }

    #[must_use]
    pub fn holders(&self, block: BlockId) -> u32 {
        self.blocks[block as usize].holders
    }

    /// One more holder of a block; `cached` says what an unheld one was until now.
    #[must_use]
    pub fn take(&mut self, block: BlockId, cached: bool) -> Hold {
        let time = &mut self.blocks[block as usize];
        time.settle(self.now, &mut self.carry);
        if time.holders == 0 {
            self.unheld[if cached { CACHED } else { FREE }] -= 1;
        }
        time.holders += 1;
        Hold { block, given: time.given }
    }

    /// A holder lets go and learns what it owes; `cached` says what the block is if nobody else holds it.
    pub fn release(&mut self, hold: Hold, cached: bool) -> BlockNanos {
        let owed = self.owed(&hold);
        let time = &mut self.blocks[hold.block as usize];
        time.holders = time.holders.checked_sub(1).expect("a hold is released once; this is a bug");
        if time.holders == 0 {
            self.unheld[if cached { CACHED } else { FREE }] += 1;
        }
        self.paid += owed;
        owed
    }

    /// What the holder owes up to now.
    pub fn owed(&mut self, hold: &Hold) -> BlockNanos {
        let time = &mut self.blocks[hold.block as usize];
        time.settle(self.now, &mut self.carry);
        BlockNanos(u128::from(time.given - hold.given))
    }

    /// An unheld block stops being kept for prefix hits.
    pub fn forget(&mut self) {
        self.unheld[CACHED] -= 1;
        self.unheld[FREE] += 1;
    }

    /// Blocks held, kept for prefix hits, and free; they sum to the pool.
    #[must_use]
    pub fn counts(&self) -> (u64, u64, u64) {
        let [cached, free] = self.unheld;
        (self.blocks.len() as u64 - cached - free, cached, free)
    }

    /// The house's block-time up to now, in the order of `HouseKv::ALL`, and all that holders have
    /// paid. What holders owe up to now must have been asked before (`owed` settles their blocks).
    #[must_use]
    pub fn totals(&self) -> ([BlockNanos; 3], BlockNanos) {
        ([self.house[CACHED], self.house[FREE], BlockNanos(u128::from(self.carry))], self.paid)
    }

    /// blocks x elapsed, what everything must sum to.
    #[must_use]
    pub fn elapsed(&self) -> BlockNanos {
        BlockNanos(self.blocks.len() as u128 * u128::from((self.now - self.since).0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_holders_pay_a_third_each_and_the_last_pays_what_was_carried() {
        let mut kv = KvMeter::new(2, DeviceNanos(0));
        let holds: Vec<Hold> = (0..3).map(|_| kv.take(0, false)).collect();
        kv.tick(DeviceNanos(100));
        assert_eq!(kv.owed(&holds[0]), BlockNanos(33));
        let (house, paid) = kv.totals();
        assert_eq!((house.map(|b| b.0), paid.0), ([0, 100, 1], 0));
        let owed: Vec<u128> = holds.into_iter().map(|h| kv.release(h, true).0).collect();
        assert_eq!(owed, [33, 33, 34]);
        kv.tick(DeviceNanos(110));
        let (house, paid) = kv.totals();
        assert_eq!((house.map(|b| b.0), paid.0), ([10, 110, 0], 100));
        assert_eq!(kv.elapsed().0, 220);
    }

    #[test]
    fn any_history_conserves_block_time() {
        for seed in 0..200u64 {
            let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
            let mut random = move |n: u64| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state % n
            };
            let mut kv = KvMeter::new(4, DeviceNanos(50));
            let mut cached = [false; 4];
            let mut holds: Vec<Hold> = Vec::new();
            let mut now = 50;
            for _ in 0..300 {
                now += random(20);
                kv.tick(DeviceNanos(now));
                if random(2) == 0 || holds.is_empty() {
                    let block = random(4) as usize;
                    holds.push(kv.take(block as u32, cached[block]));
                } else {
                    let hold = holds.swap_remove(random(holds.len() as u64) as usize);
                    let block = hold.block as usize;
                    let last = kv.holders(hold.block) == 1;
                    let keep = random(2) == 0;
                    kv.release(hold, keep);
                    if last {
                        cached[block] = keep;
                    }
                }
                let open: BlockNanos = holds.iter().map(|h| kv.owed(h)).sum();
                let (house, paid) = kv.totals();
                assert_eq!(house.into_iter().sum::<BlockNanos>() + paid + open, kv.elapsed(), "seed {seed}");
            }
        }
    }
}
