//! Memory for weights: many matrices side by side in large pieces, for which the system is asked for huge pages.
//!
//! A product streams through its weights; with pages of 4 KiB each of them costs a walk through the page table
//! and stops the processor from reading ahead. Knows nothing of what is kept.
//!
//! Invariants: a piece is zero when handed out and nobody else's; a chunk lives as long as a piece of it.

use std::alloc::{Layout, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of a chunk, unless a piece wants more. Only pages that are written take memory.
const CHUNK: usize = 64 << 20;

/// A huge page, as x86-64 and most aarch64 have them.
const HUGE: usize = 2 << 20;

/// Pieces begin at multiples of a cache line.
const ALIGN: usize = 64;

/// Pages from the system, zero; the first piece begins at a huge page.
struct Chunk {
    start: NonNull<u8>,
    bytes: usize,
    /// What the system gave: `start` is inside.
    mapped: *mut libc::c_void,
    mapped_bytes: usize,
}

// SAFETY: it is memory; pieces of it are handed out once each.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

impl Chunk {
    /// At least `bytes`.
    fn new(bytes: usize) -> Self {
        let bytes = bytes.next_multiple_of(HUGE);
        let layout = Layout::from_size_align(bytes + HUGE, HUGE).expect("weights fit the address space");
        // SAFETY: new private pages wherever the system likes.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                layout.size(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANON,
                -1,
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            handle_alloc_error(layout);
        }
        let first = mapped.cast::<u8>();
        let start = first.wrapping_add(first.align_offset(HUGE));
        #[cfg(target_os = "linux")]
        // SAFETY: the range was mapped above; the advice changes no content.
        unsafe {
            // A system without huge pages says so, and nothing is lost.
            let _advice = libc::madvise(start.cast(), bytes, libc::MADV_HUGEPAGE);
        }
        let start = NonNull::new(start).expect("the system gives no page at zero");
        Self { start, bytes, mapped, mapped_bytes: layout.size() }
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: mapped so, and no piece is left. It fails only for a range that is not mapped.
        unsafe { libc::munmap(self.mapped, self.mapped_bytes) };
    }
}

/// The chunk that pieces are cut from, and how much of it is taken. The pieces keep it alive.
static CURRENT: Mutex<Option<(std::sync::Weak<Chunk>, usize)>> = Mutex::new(None);

/// `len` elements that are zero at first.
pub(crate) struct Piece<T> {
    start: NonNull<T>,
    len: usize,
    _chunk: Option<Arc<Chunk>>,
}

/// Types whose zero bytes are a value.
///
/// # Safety
/// They are, and nothing is to be dropped.
pub(crate) unsafe trait Plain: Copy {}

// SAFETY: numbers.
unsafe impl Plain for u8 {}
// SAFETY: numbers.
unsafe impl Plain for u16 {}
// SAFETY: numbers.
unsafe impl Plain for f32 {}

impl<T: Plain> Piece<T> {
    /// Aborts, as a `Vec` does, when there is no memory.
    pub(crate) fn zeroed(len: usize) -> Self {
        const { assert!(align_of::<T>() <= ALIGN && size_of::<T>() > 0) };
        if len == 0 {
            return Self { start: NonNull::dangling(), len, _chunk: None };
        }
        let bytes = len.checked_mul(size_of::<T>()).expect("weights fit the address space");
        let bytes = bytes.checked_next_multiple_of(ALIGN).expect("weights fit the address space");
        // Nothing in the mutex can be spoilt by a panic.
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        let open = current.as_ref().and_then(|(chunk, taken)| Some((chunk.upgrade()?, *taken)));
        let (chunk, taken) = match open {
            Some((chunk, taken)) if chunk.bytes - taken >= bytes => (chunk, taken),
            _ => (Arc::new(Chunk::new(bytes.max(CHUNK))), 0),
        };
        *current = Some((Arc::downgrade(&chunk), taken + bytes));
        // SAFETY: inside the chunk: `taken + bytes` is at most its size.
        let start = unsafe { chunk.start.add(taken).cast() };
        Self { start, len, _chunk: Some(chunk) }
    }
}

impl<T> Deref for Piece<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the piece is this one's alone and holds values from the start: zero bytes are some.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Piece<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

// SAFETY: it owns its elements.
unsafe impl<T: Send> Send for Piece<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Piece<T> {}
