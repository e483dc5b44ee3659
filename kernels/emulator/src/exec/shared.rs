//! The shared memory of a block, and the record of who touched which byte since the last barrier.

use std::cell::{Cell, RefCell};

/// What an instruction does to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    Atomic,
}

/// Warps, as bits, that touched one byte in one phase between barriers.
#[derive(Clone, Copy, Default)]
struct Touched {
    phase: u32,
    readers: u32,
    writers: u32,
    atomics: u32,
}

/// Shared memory of the block that a worker runs; the next block gets the same bytes.
pub(crate) struct Shared {
    /// Sixteen bytes each, so that vectors are aligned. Cells: all warps of the block write them.
    bytes: Box<[Cell<u128>]>,
    size: u32,
    /// A record for each byte; none where races are not looked for.
    touched: Option<RefCell<Box<[Touched]>>>,
    phase: Cell<u32>,
}

impl Shared {
    /// Memory of `size` bytes.
    pub(crate) fn new(size: u32, racecheck: bool) -> Self {
        let bytes = vec![Cell::new(u128::MAX); size.div_ceil(16) as usize].into_boxed_slice();
        let records = || RefCell::new(vec![Touched::default(); size as usize].into_boxed_slice());
        Self { bytes, size, touched: racecheck.then(records), phase: Cell::new(1) }
    }

    /// Bytes of a block.
    pub(crate) fn bytes(&self) -> u32 {
        self.size
    }

    /// Host address of the first byte.
    pub(crate) fn start(&self) -> usize {
        self.bytes.as_ptr().expose_provenance()
    }

    /// Makes the memory fresh for another block: all 0xff, a float's NaN.
    pub(crate) fn refresh(&self) {
        self.bytes.iter().for_each(|cell| cell.set(u128::MAX));
        self.next_phase();
    }

    /// Writes `data` at an offset that was checked to lie inside.
    pub(crate) fn put(&self, offset: usize, data: &[u8]) {
        assert!(offset + data.len() <= self.size as usize, "checked when the copy was issued");
        let to = self.bytes.as_ptr().cast::<u8>().cast_mut();
        // SAFETY: it lies inside, and the bytes are cells that only this thread's warps touch.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to.add(offset), data.len()) };
    }

    /// A barrier: what was touched before it races with nothing behind it.
    pub(crate) fn next_phase(&self) {
        self.phase.set(self.phase.get() + 1);
    }

    /// Accesses are noted, one by one.
    pub(crate) fn looks_for_races(&self) -> bool {
        self.touched.is_some()
    }

    /// Notes an access by `warp`; the byte and the other warp where it races.
    pub(crate) fn touch(&self, offset: u32, bytes: u32, warp: u32, access: Access) -> Result<(), (u32, u32)> {
        let Some(touched) = &self.touched else { return Ok(()) };
        let phase = self.phase.get();
        let own = 1 << warp;
        for (byte, record) in (offset..).zip(&mut touched.borrow_mut()[offset as usize..][..bytes as usize]) {
            if record.phase != phase {
                *record = Touched { phase, ..Touched::default() };
            }
            let (noted, conflicts) = match access {
                Access::Read => (&mut record.readers, record.writers | record.atomics),
                Access::Write => (&mut record.writers, record.readers | record.atomics),
                Access::Atomic => (&mut record.atomics, record.readers | record.writers),
            };
            *noted |= own;
            let written = if access == Access::Write { record.writers } else { 0 };
            let others = (conflicts | written) & !own;
            if others != 0 {
                return Err((byte, others.trailing_zeros()));
            }
        }
        Ok(())
    }
}
