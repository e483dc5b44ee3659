//! An allocator that counts each thread's allocations, for tests of what must not allocate.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

thread_local! {
    pub(crate) static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
    /// This thread's place among those that have allocated.
    static PLACE: Cell<usize> = const { Cell::new(NOWHERE) };
}

const NOWHERE: usize = usize::MAX;

/// Each thread's allocations, in the order in which the threads first allocated.
pub(crate) static BY_THREAD: [AtomicUsize; 64] = [const { AtomicUsize::new(0) }; 64];
/// How many threads have allocated so far.
pub(crate) static THREADS: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: everything is handed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        if PLACE.get() == NOWHERE {
            PLACE.set(THREADS.fetch_add(1, Relaxed));
        }
        // Threads past the last place are not told apart.
        BY_THREAD[PLACE.get().min(BY_THREAD.len() - 1)].fetch_add(1, Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;
