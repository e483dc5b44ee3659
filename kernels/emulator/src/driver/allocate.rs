//! Device memory given out and taken back, at once or in the order of a stream, and page-locked host
//! memory.

use std::alloc::Layout;

use super::capture::Safety;
use super::codes::{Error, Result};
use super::perform::Op;
use super::queue::{Patience, StreamId};
use super::state::State;
use super::{Driver, tell};

/// Alignment of page-locked memory in bytes.
const PAGE: usize = 4096;

/// Device memory that its owner has not given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Allocation {
    pub(super) device: usize,
    pub(super) bytes: u64,
    pub(super) source: Source,
}

/// Who gave an allocation out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Device,
    Pool,
    /// A capture; the graph made of it owns the memory.
    Capture(u64),
}

/// Host memory that copies can read and write while the caller goes on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pinned {
    pub(super) bytes: usize,
    /// Given out here, and not by the program's own allocator.
    pub(super) layout: Option<Layout>,
}

/// The stream-ordered allocator of a device: how much it holds, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pool {
    /// Unused memory above this is given back when somebody waits for the device.
    pub(crate) threshold: u64,
    pub(crate) used: u64,
    pub(crate) used_high: u64,
    pub(crate) reserved: u64,
    pub(crate) reserved_high: u64,
}

impl Pool {
    fn take(&mut self, bytes: u64) {
        self.used += bytes;
        self.used_high = self.used_high.max(self.used);
        self.reserved = self.reserved.max(self.used);
        self.reserved_high = self.reserved_high.max(self.reserved);
    }

    pub(super) fn give(&mut self, bytes: u64) {
        self.used -= bytes;
    }

    /// Gives back what is unused above the threshold.
    pub(super) fn trim(&mut self) {
        self.trim_to(self.threshold);
    }

    /// Gives back what is unused above `bytes`.
    pub(crate) fn trim_to(&mut self, bytes: u64) {
        self.reserved = self.reserved.min(self.used.max(bytes));
    }

    /// Held for allocations to come.
    fn spare(&self) -> u64 {
        self.reserved - self.used
    }
}

impl State {
    fn remember(&mut self, address: u64, allocation: Allocation) {
        if allocation.source == Source::Pool {
            self.pools[allocation.device].take(allocation.bytes);
        }
        self.allocations.insert(address, allocation);
    }

    /// Takes an allocation back from its owner.
    ///
    /// # Errors
    /// When it is not theirs: never given out, or given back before.
    fn forget(&mut self, address: u64) -> Result<Allocation> {
        self.allocations.remove(&address).ok_or_else(|| {
            tell(format_args!("a free of {address:#x}, which is no allocation or was freed before"));
            Error::INVALID_VALUE
        })
    }

    /// Whether `address` lies in page-locked memory.
    pub(super) fn is_pinned(&self, address: u64) -> bool {
        let below = self.pinned.range(..=address).next_back();
        below.is_some_and(|(&start, pinned)| address - start < pinned.bytes as u64)
    }
}

impl Driver {
    /// `cuMemAlloc`.
    pub(super) fn allocate(&self, device: usize, bytes: u64) -> Result<u64> {
        self.lock().check_safe(Safety::Unsafe)?;
        if bytes == 0 {
            return Err(Error::INVALID_VALUE);
        }
        let address = self.allocate_now(device, bytes)?;
        let allocation = Allocation { device, bytes, source: Source::Device };
        self.lock().remember(address, allocation);
        Ok(address)
    }

    /// `cuMemAllocAsync`. Nothing gets the null pointer.
    pub(super) fn allocate_ordered(&self, stream: StreamId, bytes: u64) -> Result<u64> {
        let (device, capture) = {
            let state = self.lock();
            let stream = &state.streams[&stream];
            (stream.device, stream.capture)
        };
        if bytes == 0 {
            return Ok(0);
        }
        let address = match (self.allocate_now(device, bytes), capture) {
            (Err(Error::OUT_OF_MEMORY), None) => {
                // What the stream frees before can be given out again.
                let tail = self.lock().tail(stream);
                self.reach(tail, Patience::Try);
                self.allocate_now(device, bytes)?
            }
            (outcome, _) => outcome?,
        };
        let source = capture.map_or(Source::Pool, Source::Capture);
        self.lock().remember(address, Allocation { device, bytes, source });
        if capture.is_some() {
            self.enqueue(stream, Op::Refresh { address })?;
        }
        Ok(address)
    }

    fn allocate_now(&self, device: usize, bytes: u64) -> Result<u64> {
        self.devices[device].memory.alloc(bytes).map_err(|_| Error::OUT_OF_MEMORY)
    }

    /// `cuMemFree`: waits for all work of the device, as any of it may use the memory.
    pub(super) fn free(&self, device: usize, address: u64) -> Result<()> {
        self.lock().check_safe(Safety::Unsafe)?;
        let source = self.lock().allocations.get(&address).map(|allocation| allocation.source);
        // The graph keeps its memory: it is there again in each replay.
        if address == 0 || matches!(source, Some(Source::Capture(_))) {
            return Ok(());
        }
        let allocation = self.lock().forget(address)?;
        let waited = self.wait_device(allocation.device);
        self.give_back(address, allocation);
        self.lock().healthy(device).and(waited)
    }

    /// `cuMemFreeAsync`.
    pub(super) fn free_ordered(&self, stream: StreamId, address: u64) -> Result<()> {
        if address == 0 {
            return Ok(());
        }
        let mut state = self.lock();
        let capture = state.streams[&stream].capture;
        let source = state.allocations.get(&address).map(|allocation| allocation.source);
        match (capture, source) {
            // The graph keeps the memory: it is there again in each replay.
            (Some(capturing), Some(Source::Capture(owner))) if owner == capturing => Ok(()),
            (None, Some(Source::Capture(_))) => Ok(()),
            (Some(capturing), _) => {
                state.invalidate(capturing);
                tell(format_args!(
                    "a free of {address:#x} was captured, which the captured graph did not allocate"
                ));
                Err(Error::INVALID_VALUE)
            }
            (None, _) => {
                let allocation = state.forget(address)?;
                drop(state);
                self.enqueue(stream, Op::Free { address, allocation })
            }
        }
    }

    /// Gives the memory of an allocation that its owner no longer has back to the device.
    pub(super) fn give_back(&self, address: u64, allocation: Allocation) {
        // A reset of the device may have freed it before.
        if self.devices[allocation.device].memory.free(address) && allocation.source == Source::Pool {
            self.lock().pools[allocation.device].give(allocation.bytes);
        }
    }

    /// Free and total bytes of a device. What its pool holds for later is not free.
    pub(crate) fn memory_info(&self, device: usize) -> (u64, u64) {
        let usage = self.devices[device].memory.usage();
        let spare = self.lock().pools[device].spare();
        ((usage.limit - usage.used).saturating_sub(spare), usage.limit)
    }

    /// `cuMemHostAlloc`.
    pub(super) fn allocate_pinned(&self, bytes: usize) -> Result<u64> {
        let mut state = self.lock();
        state.check_safe(Safety::Unsafe)?;
        if bytes == 0 {
            return Err(Error::INVALID_VALUE);
        }
        let layout = Layout::from_size_align(bytes, PAGE).map_err(|_| Error::OUT_OF_MEMORY)?;
        // SAFETY: the layout's size is not zero.
        let start = unsafe { std::alloc::alloc(layout) };
        if start.is_null() {
            return Err(Error::OUT_OF_MEMORY);
        }
        // SAFETY: the allocation has the layout's size. Stale contents would look like results.
        unsafe { std::ptr::write_bytes(start, 0xff, bytes) };
        state.pinned.insert(start as u64, Pinned { bytes, layout: Some(layout) });
        Ok(start as u64)
    }

    /// `cuMemFreeHost`: waits for all work, as any of it may use the memory.
    pub(super) fn free_pinned(&self, address: u64) -> Result<()> {
        self.lock().check_safe(Safety::Unsafe)?;
        if address == 0 {
            return Ok(());
        }
        let owned = self.lock().pinned.get(&address).and_then(|pinned| pinned.layout);
        let Some(layout) = owned else {
            tell(format_args!("a free of {address:#x}, which is no page-locked memory of the driver"));
            return Err(Error::INVALID_VALUE);
        };
        for device in 0..self.devices.len() {
            self.wait_device(device)?;
        }
        if self.lock().pinned.remove(&address).is_some() {
            // SAFETY: made by `allocate_pinned` with this layout, and just taken out of the table.
            unsafe { std::alloc::dealloc(address as *mut u8, layout) };
        }
        Ok(())
    }

    /// `cuMemHostRegister`.
    pub(super) fn register_pinned(&self, address: u64, bytes: usize) -> Result<()> {
        let mut state = self.lock();
        state.check_safe(Safety::Unsafe)?;
        if address == 0 || bytes == 0 {
            return Err(Error::INVALID_VALUE);
        }
        let end = address.checked_add(bytes as u64).ok_or(Error::INVALID_VALUE)?;
        let below = state.pinned.range(..end).next_back();
        if below.is_some_and(|(&start, pinned)| start + pinned.bytes as u64 > address) {
            return Err(Error::HOST_MEMORY_ALREADY_REGISTERED);
        }
        state.pinned.insert(address, Pinned { bytes, layout: None });
        Ok(())
    }

    /// `cuMemHostUnregister`.
    pub(super) fn unregister_pinned(&self, address: u64) -> Result<()> {
        self.lock().check_safe(Safety::Unsafe)?;
        for device in 0..self.devices.len() {
            self.wait_device(device)?;
        }
        let mut state = self.lock();
        match state.pinned.get(&address) {
            Some(Pinned { layout: None, .. }) => {
                state.pinned.remove(&address);
                Ok(())
            }
            _ => Err(Error::HOST_MEMORY_NOT_REGISTERED),
        }
    }

    /// What the default pool of a device holds.
    pub(super) fn pool(&self, device: usize) -> Pool {
        self.lock().pools[device]
    }

    /// Changes the default pool of a device.
    pub(super) fn with_pool(
        &self,
        device: usize,
        change: impl FnOnce(&mut Pool) -> Result<()>,
    ) -> Result<()> {
        change(&mut self.lock().pools[device])
    }

    /// Whether `address` lies in page-locked memory.
    pub(super) fn is_pinned(&self, address: u64) -> bool {
        self.lock().is_pinned(address)
    }
}
