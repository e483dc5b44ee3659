//! `cp.async`: bytes on their way from global to shared memory. They arrive at the wait that covers
//! them and not before, so that a kernel that forgot to wait reads what was there.

use super::registers::{LANES, lanes};
use super::shared::Shared;

/// The most bytes that one lane copies at once.
pub(crate) const BYTES_MAX: usize = 16;

#[derive(Clone, Copy)]
struct Pending {
    lane: usize,
    /// Offset in shared memory.
    to: usize,
    bytes: usize,
    data: [u8; BYTES_MAX],
    /// Groups that its lane had committed before.
    group: u32,
}

/// What the lanes of one warp have under way.
#[derive(Default)]
pub(crate) struct AsyncCopies {
    pending: Vec<Pending>,
    committed: [u32; LANES],
}

impl AsyncCopies {
    /// Forgets all: another block starts.
    pub(crate) fn clear(&mut self) {
        self.pending.clear();
        self.committed = [0; LANES];
    }

    /// `data` is to arrive at offset `to` of shared memory.
    pub(crate) fn issue(&mut self, lane: usize, to: usize, data: &[u8]) {
        let mut padded = [0; BYTES_MAX];
        padded[..data.len()].copy_from_slice(data);
        let group = self.committed[lane];
        self.pending.push(Pending { lane, to, bytes: data.len(), data: padded, group });
    }

    /// Closes the group that each of these lanes has open.
    pub(crate) fn commit(&mut self, mask: u32) {
        lanes(mask).for_each(|lane| self.committed[lane] += 1);
    }

    /// Lets arrive what these lanes have under way, but for their last `newest` groups; with none, also
    /// what they have not committed.
    pub(crate) fn wait(&mut self, mask: u32, newest: Option<u32>, shared: &Shared) {
        let committed = &self.committed;
        self.pending.retain(|copy| {
            let covered = match newest {
                Some(newest) => copy.group + newest < committed[copy.lane],
                None => true,
            };
            let arrives = covered && mask >> copy.lane & 1 != 0;
            if arrives {
                shared.put(copy.to, &copy.data[..copy.bytes]);
            }
            !arrives
        });
    }
}
