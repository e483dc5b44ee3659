//! Device memory: ranges of host memory which kernels and copies may touch, and nothing else.
//!
//! A device pointer is the host address of its bytes. Fresh memory holds 0xff in every byte, a NaN in each
//! floating-point format, so a read of what was never written shows. Between two allocations lies space that
//! belongs to none, so an index too large meets no neighbour. Large allocations map one shared block of 0xff
//! again and again, private to the allocation: only pages that are written cost memory, and a device of many
//! gigabytes fits a small machine.
//!
//! This module knows nothing of streams or pools.

use std::alloc::Layout;
use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Alignment of each allocation in bytes.
pub const ALIGNMENT: u64 = 256;
/// Bytes before and after a small allocation that belong to no allocation.
const GUARD: usize = 256;
/// Allocations of at least this many bytes are mapped, smaller ones come from the heap.
const MAPPED_FROM: u64 = 1 << 20;
/// Bytes of the shared block of 0xff.
const TEMPLATE_BYTES: usize = 16 << 20;
const PAGE: usize = 4096;

/// Not enough device memory is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfMemory {
    /// Bytes asked for.
    pub asked: u64,
    /// Bytes left on the device.
    pub free: u64,
}

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes asked for, {} left", self.asked, self.free)
    }
}

impl std::error::Error for OutOfMemory {}

/// What a device's memory holds, in bytes unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Size of the memory.
    pub limit: u64,
    /// Held by allocations.
    pub used: u64,
    /// The most that was ever held.
    pub peak: u64,
    /// Number of allocations made so far.
    pub allocations: u64,
}

/// The memory of one device. Safe to use from several threads.
pub struct Memory {
    limit: u64,
    table: RwLock<Table>,
    generation: AtomicU64,
}

#[derive(Default)]
struct Table {
    blocks: BTreeMap<u64, Block>,
    /// Freed while something ran that may still hold their addresses.
    limbo: Vec<Block>,
    holds: usize,
    used: u64,
    peak: u64,
    allocations: u64,
}

impl Memory {
    /// A memory of `limit` bytes, all free.
    pub fn new(limit: u64) -> Self {
        Self { limit, table: RwLock::default(), generation: AtomicU64::new(0) }
    }

    /// Bytes of the memory.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes in allocations.
    pub fn used(&self) -> u64 {
        self.read().used
    }

    /// Allocates `bytes` bytes and gives the address of the first, a multiple of [`ALIGNMENT`]. Nothing
    /// gets an address too, at which nothing may be touched.
    ///
    /// # Errors
    /// When less than that is left on the device, or the host has no room.
    pub fn alloc(&self, bytes: u64) -> Result<u64, OutOfMemory> {
        let mut table = self.write();
        let free = self.limit - table.used;
        let out_of_memory = OutOfMemory { asked: bytes, free };
        if bytes > free {
            return Err(out_of_memory);
        }
        let block = Block::new(bytes).ok_or(out_of_memory)?;
        let address = block.address();
        table.used += bytes;
        table.peak = table.peak.max(table.used);
        table.allocations += 1;
        table.blocks.insert(address, block);
        Ok(address)
    }

    /// Frees the allocation that begins at `address`; false where none does: never made, or freed before.
    pub fn free(&self, address: u64) -> bool {
        let mut table = self.write();
        let Some(block) = table.blocks.remove(&address) else { return false };
        table.used -= block.bytes;
        if table.holds > 0 {
            table.limbo.push(block);
        }
        self.generation.fetch_add(1, Ordering::Release);
        true
    }

    /// Frees everything.
    pub fn clear(&self) {
        let mut table = self.write();
        let blocks = std::mem::take(&mut table.blocks);
        table.used = 0;
        if table.holds > 0 {
            table.limbo.extend(blocks.into_values());
        }
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// First address and end (exclusive) of the allocation that holds `address`.
    pub fn find(&self, address: u64) -> Option<(u64, u64)> {
        self.read().find(address)
    }

    /// Grows with each free: ranges found before may be gone then.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Checks that `bytes` bytes at `address` lie inside one allocation.
    ///
    /// # Errors
    /// Says what lies there instead.
    pub fn check(&self, address: u64, bytes: u64) -> Result<(), OutOfRange> {
        if bytes == 0 {
            return Ok(());
        }
        let table = self.read();
        let nearest = table.blocks.range(..=address).next_back().map(|(&start, block)| (start, block.bytes));
        match nearest {
            Some((start, size)) if address - start < size && bytes <= size - (address - start) => Ok(()),
            _ => Err(OutOfRange { address, bytes, nearest }),
        }
    }

    /// Keeps the bytes of allocations that are freed meanwhile in place until the hold is dropped.
    pub fn hold(&self) -> Hold<'_> {
        self.write().holds += 1;
        Hold(self)
    }

    /// Fills the allocation that begins at `address` with 0xff again; false where none does.
    pub fn refresh(&self, address: u64) -> bool {
        let table = self.read();
        let Some(block) = table.blocks.get(&address) else { return false };
        // SAFETY: the block owns `bytes` bytes at its address, and the read lock keeps it alive.
        unsafe { std::ptr::write_bytes(address as *mut u8, 0xff, block.bytes as usize) };
        true
    }

    /// What is held now, and the most that ever was.
    pub fn usage(&self) -> Usage {
        let table = self.read();
        Usage { limit: self.limit, used: table.used, peak: table.peak, allocations: table.allocations }
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn find(&self, address: u64) -> Option<(u64, u64)> {
        let (&start, block) = self.blocks.range(..=address).next_back()?;
        (address - start < block.bytes).then_some((start, start + block.bytes))
    }
}

/// While this lives no byte of the memory is given back to the host.
#[must_use]
pub struct Hold<'m>(&'m Memory);

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let mut table = self.0.write();
        table.holds -= 1;
        if table.holds == 0 {
            table.limbo.clear();
        }
    }
}

/// Bytes outside of each allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfRange {
    /// The first byte.
    pub address: u64,
    /// How many.
    pub bytes: u64,
    /// The last allocation that begins at or before the first byte: its address and size.
    pub nearest: Option<(u64, u64)>,
}

impl fmt::Display for OutOfRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {:#x} are not device memory", self.bytes, self.address)?;
        match self.nearest {
            Some((start, size)) => {
                let offset = self.address - start;
                write!(f, ": the nearest allocation below begins {offset} bytes before and holds {size}")
            }
            None => write!(f, ": no allocation lies below"),
        }
    }
}

impl std::error::Error for OutOfRange {}

/// One allocation.
struct Block {
    bytes: u64,
    place: Place,
}

enum Place {
    Heap { start: NonNull<u8>, layout: Layout },
    Mapped(Mapping),
}

// SAFETY: a block owns its bytes; nothing about them is bound to a thread.
unsafe impl Send for Block {}
// SAFETY: through a shared block only its address and size are read.
unsafe impl Sync for Block {}

impl Block {
    fn new(bytes: u64) -> Option<Self> {
        let size = usize::try_from(bytes).ok()?;
        let place = if bytes < MAPPED_FROM { Self::heap(size)? } else { Place::Mapped(Mapping::new(size)?) };
        Some(Self { bytes, place })
    }

    fn heap(size: usize) -> Option<Place> {
        let layout = Layout::from_size_align(size + 2 * GUARD, ALIGNMENT as usize).ok()?;
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { std::alloc::alloc(layout) })?;
        // SAFETY: the allocation has the layout's size.
        unsafe { std::ptr::write_bytes(start.as_ptr(), 0xff, layout.size()) };
        Some(Place::Heap { start, layout })
    }

    fn address(&self) -> u64 {
        match &self.place {
            Place::Heap { start, .. } => start.as_ptr() as u64 + GUARD as u64,
            Place::Mapped(mapping) => mapping.start + PAGE as u64,
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Place::Heap { start, layout } = self.place {
            // SAFETY: made in `heap` with this layout, and freed once.
            unsafe { std::alloc::dealloc(start.as_ptr(), layout) };
        }
    }
}

/// Address space of one large allocation with a page that cannot be touched on either side.
struct Mapping {
    start: u64,
    bytes: usize,
}

impl Mapping {
    fn new(size: usize) -> Option<Self> {
        let template = template()?;
        let size = size.checked_next_multiple_of(PAGE)?;
        let bytes = size.checked_add(2 * PAGE)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory in use.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return None;
        }
        let mapping = Self { start: start as u64, bytes };
        for offset in (0..size).step_by(TEMPLATE_BYTES) {
            let address = mapping.start + (PAGE + offset) as u64;
            let length = TEMPLATE_BYTES.min(size - offset);
            let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
            let access = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: the pages replaced are the ones just mapped, and nobody has their address yet.
            let piece =
                unsafe { libc::mmap(address as *mut libc::c_void, length, access, flags, template, 0) };
            if piece == libc::MAP_FAILED {
                return None;
            }
        }
        Some(mapping)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing uses it any more.
        let status = unsafe { libc::munmap(self.start as *mut libc::c_void, self.bytes) };
        assert_eq!(status, 0, "an own mapping can be undone");
    }
}

/// A file in memory of [`TEMPLATE_BYTES`] bytes 0xff, made once in a process.
fn template() -> Option<i32> {
    static TEMPLATE: OnceLock<Option<OwnedFd>> = OnceLock::new();
    TEMPLATE.get_or_init(make_template).as_ref().map(AsRawFd::as_raw_fd)
}

fn make_template() -> Option<OwnedFd> {
    // SAFETY: the name is a C string; the call touches no other memory.
    let fd = unsafe { libc::memfd_create(c"obol-emulator".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return None;
    }
    // SAFETY: the descriptor is new and owned by nobody else.
    let file = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let piece = vec![0xff; 1 << 20];
    for offset in (0..TEMPLATE_BYTES as u64).step_by(piece.len()) {
        std::os::unix::fs::FileExt::write_all_at(&file, &piece, offset).ok()?;
    }
    Some(file.into())
}
