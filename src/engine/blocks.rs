//! The pool of KV blocks: who holds which, which are kept for prefix hits, and in what order they
//! are given away. Knows no sequence, token or request; every change of holders is metered here.
//!
//! Blocks without holders stand in one list. Those without content come first, then those kept for
//! prefix hits, least recently used first, so the free list doubles as the prefix cache.
//!
//! Invariant: held + cached + free = all blocks, and a block is in the list exactly when nobody holds it.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use crate::meter::kv::{BlockId, Hold, KvMeter};
use crate::units::{BlockNanos, DeviceNanos};

use super::prefix::PrefixKey;

const NONE: BlockId = BlockId::MAX;

#[derive(Debug, Clone)]
struct Block {
    /// The prefix that the block's content completes, once it is full and computed.
    key: Option<PrefixKey>,
    before: BlockId,
    after: BlockId,
}

#[derive(Debug)]
struct Pool {
    blocks: Vec<Block>,
    first: BlockId,
    last: BlockId,
    by_key: HashMap<PrefixKey, BlockId>,
    meter: KvMeter,
}

impl Pool {
    fn unlink(&mut self, id: BlockId) {
        let Block { before, after, .. } = self.blocks[id as usize];
        match before {
            NONE => self.first = after,
            _ => self.blocks[before as usize].after = after,
        }
        match after {
            NONE => self.last = before,
            _ => self.blocks[after as usize].before = before,
        }
    }

    fn push_first(&mut self, id: BlockId) {
        let after = self.first;
        self.blocks[id as usize].before = NONE;
        self.blocks[id as usize].after = after;
        match after {
            NONE => self.last = id,
            _ => self.blocks[after as usize].before = id,
        }
        self.first = id;
    }

    fn push_last(&mut self, id: BlockId) {
        let before = self.last;
        self.blocks[id as usize].before = before;
        self.blocks[id as usize].after = NONE;
        match before {
            NONE => self.first = id,
            _ => self.blocks[before as usize].after = id,
        }
        self.last = id;
    }

    /// A block with no content anybody needs, evicting the least recently used prefix if need be.
    fn take_fresh(&mut self) -> Hold {
        let id = self.first;
        assert_ne!(id, NONE, "the scheduler gave out more blocks than there are; this is a bug");
        self.unlink(id);
        let evicted = self.blocks[id as usize].key.take();
        if let Some(key) = &evicted {
            self.by_key.remove(key);
        }
        self.meter.take(id, evicted.is_some())
    }

    fn take_cached(&mut self, id: BlockId) -> Hold {
        if self.meter.holders(id) == 0 {
            self.unlink(id);
        }
        self.meter.take(id, true)
    }

    fn release(&mut self, hold: Hold) -> BlockNanos {
        let id = hold.block;
        let cached = self.blocks[id as usize].key.is_some();
        let owed = self.meter.release(hold, cached);
        if self.meter.holders(id) == 0 {
            if cached { self.push_last(id) } else { self.push_first(id) }
        }
        owed
    }
}

/// Held, cached and free blocks at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlockCounts {
    pub held: u64,
    pub cached: u64,
    pub free: u64,
}

/// Handle on the pool, for one thread.
#[derive(Debug, Clone)]
pub struct Blocks {
    pool: Rc<RefCell<Pool>>,
    block_size: usize,
}

impl Blocks {
    #[must_use]
    pub fn new(blocks: usize, block_size: usize, since: DeviceNanos) -> Self {
        let mut pool = Pool {
            blocks: vec![Block { key: None, before: NONE, after: NONE }; blocks],
            first: NONE,
            last: NONE,
            // Each block completes one prefix at most: the map never grows.
            by_key: HashMap::with_capacity(blocks),
            meter: KvMeter::new(blocks, since),
        };
        for id in 0..blocks {
            pool.push_last(BlockId::try_from(id).expect("fewer than 2^32 blocks"));
        }
        Self { pool: Rc::new(RefCell::new(pool)), block_size }
    }

    #[must_use]
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// What follows happens at `now`.
    pub fn tick(&self, now: DeviceNanos) {
        self.pool.borrow_mut().meter.tick(now);
    }

    #[must_use]
    pub fn counts(&self) -> BlockCounts {
        let (held, cached, free) = self.pool.borrow().meter.counts();
        BlockCounts { held, cached, free }
    }

    /// Blocks that can be given out: free ones and those kept for prefix hits.
    #[must_use]
    pub fn available(&self) -> usize {
        let counts = self.counts();
        usize::try_from(counts.cached + counts.free).expect("a pool fits in memory")
    }

    /// How many of the leading keys are in the cache, and how many of those blocks nobody holds.
    #[must_use]
    pub fn match_prefix(&self, keys: &[PrefixKey]) -> PrefixMatch {
        let pool = self.pool.borrow();
        let mut found = PrefixMatch::default();
        for id in keys.iter().map_while(|key| pool.by_key.get(key)) {
            found.blocks += 1;
            found.unheld += usize::from(pool.meter.holders(*id) == 0);
        }
        found
    }

    /// An empty lease whose block-time is paid into `account`.
    pub fn lease(&self, account: Rc<Cell<BlockNanos>>) -> BlockLease {
        BlockLease { holds: Vec::new(), pool: self.pool.clone(), block_size: self.block_size, account }
    }

    /// The house's block-time in the order of `HouseKv::ALL`; exact once every lease was asked what it owes.
    #[must_use]
    pub fn house(&self) -> [BlockNanos; 3] {
        self.pool.borrow().meter.totals().0
    }

    /// # Panics
    /// When list, cache and counts disagree: a bug that would lose blocks.
    pub fn check_integrity(&self) {
        let pool = self.pool.borrow();
        let (held, cached, free) = pool.meter.counts();
        let (mut at, mut listed, mut keyed) = (pool.first, 0, 0);
        while at != NONE {
            assert_eq!(pool.meter.holders(at), 0, "a held block is in the free list");
            listed += 1;
            keyed += u64::from(pool.blocks[at as usize].key.is_some());
            at = pool.blocks[at as usize].after;
        }
        assert_eq!(listed, cached + free, "free + cached blocks are those in the list");
        assert_eq!(keyed, cached, "cached blocks are those with a key and no holder");
        assert_eq!(held + listed, pool.blocks.len() as u64, "every block is held, cached or free");
        for (key, id) in &pool.by_key {
            assert_eq!(pool.blocks[*id as usize].key.as_ref(), Some(key), "the cache names its own blocks");
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PrefixMatch {
    pub blocks: usize,
    /// Those of them that nobody holds: taking them uses up available blocks.
    pub unheld: usize,
}

/// The blocks that one sequence holds, in order of position. Given back when dropped.
#[must_use]
#[derive(Debug)]
pub struct BlockLease {
    holds: Vec<Hold>,
    pool: Rc<RefCell<Pool>>,
    block_size: usize,
    account: Rc<Cell<BlockNanos>>,
}

impl BlockLease {
    #[must_use]
    pub fn len(&self) -> usize {
        self.holds.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.holds.is_empty()
    }

    #[must_use]
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Makes room for `blocks`, so that growing to them allocates nothing.
    pub fn reserve(&mut self, blocks: usize) {
        self.holds.reserve_exact(blocks.saturating_sub(self.holds.len()));
    }

    pub fn ids(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.holds.iter().map(|hold| hold.block)
    }

    /// How many blocks come free if this lease ends now.
    #[must_use]
    pub fn exclusive(&self) -> usize {
        let pool = self.pool.borrow();
        self.holds.iter().filter(|hold| pool.meter.holders(hold.block) == 1).count()
    }

    /// Adds the cached blocks of the leading keys; `match_prefix` said how many there are.
    pub fn take_prefix(&mut self, keys: &[PrefixKey]) {
        assert!(self.holds.is_empty(), "a prefix comes first; this is a bug");
        let mut pool = self.pool.borrow_mut();
        for key in keys {
            let id = pool.by_key[key];
            let hold = pool.take_cached(id);
            self.holds.push(hold);
        }
    }

    /// Adds fresh blocks until there are `blocks`.
    pub fn grow_to(&mut self, blocks: usize) {
        let mut pool = self.pool.borrow_mut();
        while self.holds.len() < blocks {
            let hold = pool.take_fresh();
            self.holds.push(hold);
        }
    }

    /// Gives back the last blocks until there are `blocks`, and pays for them.
    pub fn shrink_to(&mut self, blocks: usize) {
        let mut pool = self.pool.borrow_mut();
        while self.holds.len() > blocks {
            let hold = self.holds.pop().expect("more than none");
            self.account.set(self.account.get() + pool.release(hold));
        }
    }

    /// Block `index` is full and computed, and completes the prefix `key`: others may use it from
    /// now on. When the same prefix is cached already, that block stays the one.
    pub fn publish(&self, index: usize, key: PrefixKey) {
        let mut pool = self.pool.borrow_mut();
        let id = self.holds[index].block;
        if !pool.by_key.contains_key(&key) && pool.blocks[id as usize].key.is_none() {
            pool.by_key.insert(key, id);
            pool.blocks[id as usize].key = Some(key);
        }
    }

    /// What is owed for the blocks held now, up to now; not yet paid.
    #[must_use]
    pub fn owed(&self) -> BlockNanos {
        let mut pool = self.pool.borrow_mut();
        self.holds.iter().map(|hold| pool.meter.owed(hold)).sum()
    }
}

impl Drop for BlockLease {
    /// Pays and gives the blocks back, last first, so that a prefix outlives its continuation.
    fn drop(&mut self) {
        self.shrink_to(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::prefix::{self, PrefixKey};
    use crate::request::CacheSalt;

    fn keys(tokens: &[u32]) -> Vec<PrefixKey> {
        let mut keys = Vec::new();
        prefix::extend(&mut keys, prefix::root(CacheSalt([0; 32])), tokens, 2);
        keys
    }

    #[test]
    fn a_finished_prefix_is_found_again_and_the_oldest_goes_first() {
        let blocks = Blocks::new(4, 2, DeviceNanos(0));
        let account = Rc::new(Cell::new(BlockNanos::ZERO));
        let (a, b) = (keys(&[1, 2, 3, 4]), keys(&[9, 9]));
        let mut lease = blocks.lease(account.clone());
        lease.grow_to(2);
        lease.publish(0, a[0]);
        lease.publish(1, a[1]);
        blocks.tick(DeviceNanos(10));
        drop(lease);
        assert_eq!(account.get(), BlockNanos(20));
        assert_eq!(blocks.counts(), BlockCounts { held: 0, cached: 2, free: 2 });
        assert_eq!(blocks.match_prefix(&a), PrefixMatch { blocks: 2, unheld: 2 });
        assert_eq!(blocks.match_prefix(&b).blocks, 0);

        let mut other = blocks.lease(account.clone());
        other.take_prefix(&a[..1]);
        other.grow_to(4); // needs the second block of `a`, which nobody holds
        assert_eq!(blocks.match_prefix(&a), PrefixMatch { blocks: 1, unheld: 0 });
        assert_eq!(other.exclusive(), 4);
        let mut third = blocks.lease(account);
        third.take_prefix(&a[..1]);
        assert_eq!(other.exclusive(), 3);
        blocks.check_integrity();
        drop((other, third));
        blocks.check_integrity();
        assert_eq!(blocks.counts(), BlockCounts { held: 0, cached: 1, free: 3 });
    }

    #[test]
    #[should_panic(expected = "more blocks than there are")]
    fn taking_more_than_there_are_is_a_bug() {
        let blocks = Blocks::new(1, 2, DeviceNanos(0));
        blocks.lease(Rc::default()).grow_to(2);
    }
}
