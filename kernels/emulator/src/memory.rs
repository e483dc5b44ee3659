//! Device memory: allocations of host memory, whose device addresses are their host addresses.
//!
//! Each allocation is filled with 0xff, so that floats read before they are written are NaN, and has
//! guard space on both sides that belongs to nobody, so that an access a little outside is found.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::fmt;
use std::ptr::with_exposed_provenance_mut;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Allocations start at multiples of this, as on a device.
const ALIGN: usize = 256;
/// Bytes before and after each allocation that no access may touch.
const GUARD: usize = 256;

/// The memory of one device. Device addresses are host addresses.
#[derive(Debug)]
pub struct Memory {
    limit: u64,
    state: RwLock<State>,
    /// Grows with each free, so that those who remember ranges know when to forget them.
    generation: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    used: u64,
    /// Bytes of each live allocation, by its first address.
    live: BTreeMap<u64, u64>,
}

/// An allocation did not fit into the device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfMemory {
    /// Bytes asked for.
    pub asked: u64,
    /// Bytes that were free.
    pub free: u64,
}

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "out of device memory: {} bytes asked, {} free", self.asked, self.free)
    }
}

impl std::error::Error for OutOfMemory {}

/// The host block behind an allocation of `bytes`, guards included; `None` where no host can have it.
fn block(bytes: u64) -> Option<Layout> {
    let size = usize::try_from(bytes).ok()?.checked_add(2 * GUARD)?;
    Layout::from_size_align(size, ALIGN).ok()
}

impl Memory {
    /// A device with `limit_bytes` of memory, all of it free.
    pub fn new(limit_bytes: u64) -> Self {
        Self { limit: limit_bytes, state: RwLock::default(), generation: AtomicU64::new(0) }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of the device.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes in live allocations.
    pub fn used(&self) -> u64 {
        self.read().used
    }

    /// The address of `bytes` fresh bytes of 0xff, a multiple of 256. Zero bytes get an address too,
    /// at which nothing may be accessed.
    ///
    /// # Errors
    /// [`OutOfMemory`] where fewer than `bytes` are free, on the device or on the host.
    pub fn alloc(&self, bytes: u64) -> Result<u64, OutOfMemory> {
        let mut state = self.write();
        let free = self.limit.saturating_sub(state.used);
        let refused = OutOfMemory { asked: bytes, free };
        let layout = block(bytes).filter(|_| bytes <= free).ok_or(refused)?;
        // SAFETY: the layout has a size above zero (the guards).
        let base = unsafe { alloc(layout) };
        if base.is_null() {
            return Err(refused);
        }
        // SAFETY: `base` is a fresh block of `layout.size()` bytes.
        unsafe { base.write_bytes(0xff, layout.size()) };
        let address = (base.expose_provenance() + GUARD) as u64;
        state.live.insert(address, bytes);
        state.used += bytes;
        Ok(address)
    }

    /// Gives back the allocation that starts at `address`; false where none does.
    pub fn free(&self, address: u64) -> bool {
        let mut state = self.write();
        let Some(bytes) = state.live.remove(&address) else { return false };
        state.used -= bytes;
        self.generation.fetch_add(1, Ordering::Release);
        release(address, bytes);
        true
    }

    /// First address and end of the live allocation that holds `address`.
    pub fn find(&self, address: u64) -> Option<(u64, u64)> {
        let state = self.read();
        let (&start, &bytes) = state.live.range(..=address).next_back()?;
        (address < start + bytes).then_some((start, start + bytes))
    }

    /// A number that grows whenever a range found before may be gone.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }
}

fn release(address: u64, bytes: u64) {
    let layout = block(bytes).expect("the block was allocated with this layout");
    let base = with_exposed_provenance_mut::<u8>(address as usize - GUARD);
    // SAFETY: `alloc` made the block at `base` with the same layout, and it was live until now.
    unsafe { dealloc(base, layout) };
}

impl Drop for Memory {
    fn drop(&mut self) {
        for (address, bytes) in std::mem::take(&mut self.write().live) {
            release(address, bytes);
        }
    }
}
