//! Byte-pair merging of one piece: the pair with the lowest rank first, the leftmost of equals, until no pair of
//! neighbours has a rank. O(n log n) in the piece's length, so a megabyte without a space is no attack. Knows
//! ids only: whether a rank comes from a list of merges or from scores, or what an id stands for, is not its matter.
//! (Sennrich et al. 2016, arXiv:1508.07909; byte level as in GPT-2.)

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

/// The merges of a vocabulary, by the ids of the pair.
#[derive(Debug, Default)]
pub(super) struct Merges {
    table: HashMap<u64, Merge, BuildHasherDefault<PairHasher>>,
}

#[derive(Debug, Clone, Copy)]
struct Merge {
    rank: u32,
    result: u32,
}

impl Merges {
    pub(super) fn with_capacity(merges: usize) -> Self {
        Self { table: HashMap::with_capacity_and_hasher(merges, BuildHasherDefault::default()) }
    }

    /// Adds a merge; of two for the same pair the first stays.
    pub(super) fn add(&mut self, left: u32, right: u32, rank: u32, result: u32) {
        self.table.entry(pair(left, right)).or_insert(Merge { rank, result });
    }

    fn get(&self, left: u32, right: u32) -> Option<Merge> {
        self.table.get(&pair(left, right)).copied()
    }
}

fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// Multiplies and folds: enough for pairs of ids, which users cannot add to the table.
#[derive(Debug, Default)]
struct PairHasher(u64);

impl Hasher for PairHasher {
    fn write(&mut self, _: &[u8]) {
        unreachable!("only u64 keys are hashed; this is a bug")
    }

    fn write_u64(&mut self, key: u64) {
        let product = u128::from(key) * 0x9E37_79B9_7F4A_7C15;
        self.0 = product as u64 ^ (product >> 64) as u64;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// One piece while it is merged. Kept between pieces, so that they share buffers.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Reverse<Candidate>>,
}

/// A symbol of the piece, in a list linked by index.
#[derive(Debug, Clone, Copy)]
struct Symbol {
    id: u32,
    previous: u32,
    next: u32,
}

/// No neighbour; as an id: merged into its left neighbour.
const NONE: u32 = u32::MAX;

/// A pair that could be merged: ordered by rank, then place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    rank: u32,
    place: u32,
    left: u32,
    right: u32,
    result: u32,
}

impl Scratch {
    /// Adds a token to the end of the piece.
    pub(super) fn push(&mut self, id: u32) {
        let place = self.symbols.len() as u32;
        self.symbols.push(Symbol { id, previous: place.wrapping_sub(1), next: place + 1 });
    }

    /// Merges what was pushed, appends what is left to `out`, and is empty again.
    pub(super) fn merge(&mut self, merges: &Merges, out: &mut Vec<u32>) {
        let Some(last) = self.symbols.last_mut() else { return };
        last.next = NONE;
        for place in 0..self.symbols.len() as u32 {
            self.consider(merges, place);
        }
        while let Some(Reverse(candidate)) = self.queue.pop() {
            self.apply(merges, candidate);
        }
        let mut place = 0;
        while place != NONE {
            let symbol = self.symbols[place as usize];
            out.push(symbol.id);
            place = symbol.next;
        }
        self.symbols.clear();
    }

    /// Queues the pair that begins at `place`, if it can be merged.
    fn consider(&mut self, merges: &Merges, place: u32) {
        let Symbol { id: left, next, .. } = self.symbols[place as usize];
        if next == NONE {
            return;
        }
        let right = self.symbols[next as usize].id;
        if let Some(Merge { rank, result }) = merges.get(left, right) {
            self.queue.push(Reverse(Candidate { rank, place, left, right, result }));
        }
    }

    /// Merges the pair if it is still there: an earlier merge may have taken either side.
    fn apply(&mut self, merges: &Merges, candidate: Candidate) {
        let Candidate { place, left, right, result, .. } = candidate;
        let symbol = self.symbols[place as usize];
        if symbol.id != left || symbol.next == NONE || self.symbols[symbol.next as usize].id != right {
            return;
        }
        let after = self.symbols[symbol.next as usize].next;
        self.symbols[symbol.next as usize].id = NONE;
        self.symbols[place as usize].id = result;
        self.symbols[place as usize].next = after;
        if after != NONE {
            self.symbols[after as usize].previous = place;
        }
        if symbol.previous != NONE {
            self.consider(merges, symbol.previous);
        }
        self.consider(merges, place);
    }
}
