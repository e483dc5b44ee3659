//! Copies and fills: which of them wait, and what they may touch.

use std::ptr::with_exposed_provenance;
use std::sync::Arc;

use super::capture::Safety;
use super::codes::{Error, Result};
use super::perform::{Copy, Direction, Fill, Op};
use super::queue::StreamId;
use super::{Driver, tell};

/// Pageable bytes up to this many are copied aside, so that the caller need not wait.
const STAGED_MAX: u64 = 64 << 10;

impl Driver {
    /// A copy in the order of a stream. One from or to pageable memory returns when the caller's memory
    /// is no longer needed.
    pub(super) fn copy_ordered(&self, copy: Copy, id: StreamId) -> Result<()> {
        if copy.bytes == 0 {
            return Ok(());
        }
        self.check_copy(&copy)?;
        let host = match copy.direction {
            Direction::Up => copy.from,
            Direction::Down => copy.to,
            Direction::Between => return self.enqueue(id, Op::Copy(copy)),
        };
        let pinned = self.lock().is_pinned(host);
        if pinned {
            return self.enqueue(id, Op::Copy(copy));
        }
        self.check_not_capturing(id)?;
        if copy.direction == Direction::Up && copy.bytes <= STAGED_MAX {
            let from = with_exposed_provenance::<u8>(copy.from as usize);
            // SAFETY: the caller promises that many readable bytes.
            let data: Arc<[u8]> = unsafe { std::slice::from_raw_parts(from, copy.bytes as usize) }.into();
            return self.enqueue(id, Op::Upload { to: copy.to, data });
        }
        self.copy_and_wait(copy, id)
    }

    /// A copy that is done when the call returns, in the order of the legacy default stream.
    pub(super) fn copy(&self, device: usize, copy: Copy) -> Result<()> {
        self.lock().check_safe(Safety::Unsafe)?;
        if copy.bytes == 0 {
            return Ok(());
        }
        self.check_copy(&copy)?;
        self.copy_and_wait(copy, StreamId::legacy(device))
    }

    fn copy_and_wait(&self, copy: Copy, id: StreamId) -> Result<()> {
        self.enqueue(id, Op::Copy(copy))?;
        let (device, tail) = {
            let state = self.lock();
            (state.streams[&id].device, state.tail(id))
        };
        self.wait(device, tail)
    }

    /// What a copy between any two addresses is.
    pub(super) fn direction(&self, to: u64, from: u64) -> Result<Direction> {
        match (self.device_of(to).is_some(), self.device_of(from).is_some()) {
            (true, true) => Ok(Direction::Between),
            (true, false) => Ok(Direction::Up),
            (false, true) => Ok(Direction::Down),
            (false, false) => Err(Error::INVALID_VALUE),
        }
    }

    fn check_copy(&self, copy: &Copy) -> Result<()> {
        let Copy { to, from, bytes, direction } = *copy;
        if direction == Direction::Down {
            not_null(to)?;
        } else {
            self.check_range("copy to", to, bytes)?;
        }
        if direction == Direction::Up { not_null(from) } else { self.check_range("copy from", from, bytes) }
    }

    /// `cuMemsetD8Async` and its kin.
    pub(super) fn fill_ordered(&self, fill: Fill, id: StreamId) -> Result<()> {
        let Fill { to, width, count, .. } = fill;
        if count == 0 {
            return Ok(());
        }
        let bytes = width.checked_mul(count).ok_or(Error::INVALID_VALUE)?;
        if !to.is_multiple_of(width as u64) {
            tell(format_args!("a fill of units of {width} bytes at {to:#x}, which is no multiple"));
            return Err(Error::INVALID_VALUE);
        }
        self.check_range("fill of", to, bytes as u64)?;
        self.enqueue(id, Op::Fill(fill))
    }

    /// `cuMemsetD8` and its kin: in the order of the legacy default stream; the caller does not wait.
    pub(super) fn fill(&self, device: usize, fill: Fill) -> Result<()> {
        self.lock().check_safe(Safety::Unsafe)?;
        self.fill_ordered(fill, StreamId::legacy(device))
    }

    fn check_range(&self, what: &str, address: u64, bytes: u64) -> Result<()> {
        self.on_device(address, bytes).map_err(|out_of_range| {
            tell(format_args!("{what} {out_of_range}"));
            Error::INVALID_VALUE
        })
    }
}

fn not_null(address: u64) -> Result<()> {
    if address == 0 { Err(Error::INVALID_VALUE) } else { Ok(()) }
}
