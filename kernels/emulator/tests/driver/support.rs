//! Machines for tests, and short ways to call the exported functions.

use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use obol_emulator::driver::api::{contexts, cuInit, memory, streams};
use obol_emulator::driver::{Config, Driver, Entered};

pub(crate) const SUCCESS: u32 = 0;
pub(crate) const INVALID_VALUE: u32 = 1;
pub(crate) const OUT_OF_MEMORY: u32 = 2;
pub(crate) const NOT_READY: u32 = 600;
pub(crate) const CAPTURE_UNSUPPORTED: u32 = 900;
pub(crate) const CAPTURE_INVALIDATED: u32 = 901;
/// Stream flag: not ordered with the legacy default stream.
pub(crate) const NON_BLOCKING: u32 = 1;

/// Calls an exported function and gives its code.
macro_rules! code {
    ($function:path, $($argument:expr),* $(,)?) => {{
        // SAFETY: tests give pointers to living values of the right type and size.
        unsafe { $function($($argument),*) }
    }};
    ($function:path) => {{
        // SAFETY: there is nothing to give.
        unsafe { $function() }
    }};
}
pub(crate) use code;

/// Calls an exported function that must succeed.
macro_rules! ok {
    ($function:path $(, $argument:expr)* $(,)?) => {
        assert_eq!($crate::support::code!($function $(, $argument)*), 0, stringify!($function))
    };
}
pub(crate) use ok;

/// Calls an exported function that must succeed and whose first argument takes its result.
macro_rules! made {
    ($function:path $(, $argument:expr)* $(,)?) => {{
        let mut result = Default::default();
        $crate::support::ok!($function, &raw mut result $(, $argument)*);
        result
    }};
}
pub(crate) use made;

/// A machine with device 0 current in this thread.
pub(crate) struct Machine {
    pub(crate) driver: Arc<Driver>,
    _entered: Entered,
}

pub(crate) fn machine() -> Machine {
    machine_of(Config { threads: 1, memory_bytes: 64 << 20, ..Config::default() })
}

pub(crate) fn machine_of(config: Config) -> Machine {
    let driver = Driver::new(config);
    let entered = driver.enter();
    ok!(cuInit, 0);
    use_device(0);
    Machine { driver, _entered: entered }
}

/// Makes a device's primary context the thread's.
pub(crate) fn use_device(device: i32) {
    let context: u64 = made!(contexts::cuDevicePrimaryCtxRetain, device);
    ok!(contexts::cuCtxSetCurrent, context);
}

pub(crate) fn stream() -> u64 {
    made!(streams::cuStreamCreate, NON_BLOCKING)
}

pub(crate) fn event() -> u64 {
    made!(streams::cuEventCreate, 0)
}

pub(crate) fn synchronize(stream: u64) {
    ok!(streams::cuStreamSynchronize, stream);
}

/// Device memory that holds `values`.
pub(crate) fn device_of<T: Copy>(values: &[T]) -> u64 {
    let bytes = size_of_val(values);
    let address = made!(memory::cuMemAlloc_v2, bytes);
    ok!(memory::cuMemcpyHtoD_v2, address, values.as_ptr().cast(), bytes);
    address
}

/// What lies in device memory, by a copy that waits for the legacy default stream only.
pub(crate) fn read<T: Copy + Default>(address: u64, count: usize) -> Vec<T> {
    let mut values = vec![T::default(); count];
    ok!(memory::cuMemcpyDtoH_v2, values.as_mut_ptr().cast(), address, size_of_val(&values[..]));
    values
}

/// Page-locked host memory.
pub(crate) struct Pinned {
    start: *mut u32,
    count: usize,
}

impl Pinned {
    pub(crate) fn of(values: &[u32]) -> Self {
        let mut start = std::ptr::null_mut();
        ok!(memory::cuMemHostAlloc, &raw mut start, size_of_val(values), 0);
        let mut pinned = Self { start: start.cast(), count: values.len() };
        pinned.values_mut().copy_from_slice(values);
        pinned
    }

    pub(crate) fn address(&self) -> *mut c_void {
        self.start.cast()
    }

    pub(crate) fn bytes(&self) -> usize {
        4 * self.count
    }

    pub(crate) fn values(&self) -> &[u32] {
        // SAFETY: the driver gave that much, and the value frees it when it goes.
        unsafe { std::slice::from_raw_parts(self.start, self.count) }
    }

    pub(crate) fn values_mut(&mut self) -> &mut [u32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.count) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // After a fault a free fails as all calls do; the machine goes with its test anyway.
        let _code: u32 = code!(memory::cuMemFreeHost, self.address());
    }
}

/// Notes in the order in which streams came to them.
pub(crate) type Log = Mutex<Vec<&'static str>>;

struct Note {
    log: Arc<Log>,
    text: &'static str,
}

/// Puts a note into a stream. Each is taken once: not for captures that are replayed.
pub(crate) fn note(stream: u64, log: &Arc<Log>, text: &'static str) {
    unsafe extern "C" fn take(data: *mut c_void) {
        // SAFETY: made by `Box::into_raw` below, for this one call.
        let note = unsafe { Box::from_raw(data.cast::<Note>()) };
        note.log.lock().expect("no note panics").push(note.text);
    }
    let data = Box::into_raw(Box::new(Note { log: Arc::clone(log), text }));
    ok!(streams::cuLaunchHostFunc, stream, Some(take), data.cast());
}

pub(crate) fn notes(log: &Log) -> Vec<&'static str> {
    log.lock().expect("no note panics").clone()
}
