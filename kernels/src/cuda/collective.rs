//! Sums over the devices that share each layer's work, by NCCL, in the order of each device's stream.
//!
//! The library is looked for by its run-time name when the first group is made, and nothing of it is needed before.
//! Knows no model. Of two devices, a sum is one addition, so that the law of rows holds; of more, NCCL's order of
//! additions may depend on where in the buffer an element lies.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};

use cudarc::driver::sys::CUstream;

use super::{DeviceRows, Dtype, Gpu, GpuError};

/// `ncclComm_t`
type Handle = *mut c_void;

/// `ncclSum`
const SUM: u32 = 0;

/// `ncclUniqueId`
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([c_char; 128]);

/// What is used of the library, which stays loaded until the process ends. Functions return `ncclResult_t`.
struct Library {
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> u32,
    init_rank: unsafe extern "C" fn(*mut Handle, c_int, UniqueId, c_int) -> u32,
    all_reduce: unsafe extern "C" fn(*const c_void, *mut c_void, usize, u32, u32, Handle, CUstream) -> u32,
    destroy: unsafe extern "C" fn(Handle) -> u32,
    abort: unsafe extern "C" fn(Handle) -> u32,
    error_string: unsafe extern "C" fn(u32) -> *const c_char,
}

impl Library {
    /// # Errors
    /// When the library, or one of its functions, is not there.
    fn get() -> Result<&'static Self, GpuError> {
        static LIBRARY: OnceLock<Result<Library, GpuError>> = OnceLock::new();
        LIBRARY.get_or_init(Self::open).as_ref().map_err(Clone::clone)
    }

    fn open() -> Result<Self, GpuError> {
        // SAFETY: loading the library runs its initialisers, as in every program that uses it.
        let library = unsafe { libc::dlopen(c"libnccl.so.2".as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if library.is_null() {
            return Err(not_linked());
        }
        let find = |name: &CStr| {
            // SAFETY: the library is loaded and stays so.
            let address = unsafe { libc::dlsym(library, name.as_ptr()) };
            if address.is_null() { Err(not_linked()) } else { Ok(address) }
        };
        // SAFETY: the functions have had these signatures since version 2.0 of the library.
        unsafe {
            use std::mem::transmute;
            Ok(Self {
                get_unique_id: transmute::<*mut c_void, unsafe extern "C" fn(*mut UniqueId) -> u32>(find(
                    c"ncclGetUniqueId",
                )?),
                init_rank: transmute::<
                    *mut c_void,
                    unsafe extern "C" fn(*mut Handle, c_int, UniqueId, c_int) -> u32,
                >(find(c"ncclCommInitRank")?),
                all_reduce: transmute::<
                    *mut c_void,
                    unsafe extern "C" fn(
                        *const c_void,
                        *mut c_void,
                        usize,
                        u32,
                        u32,
                        Handle,
                        CUstream,
                    ) -> u32,
                >(find(c"ncclAllReduce")?),
                destroy: transmute::<*mut c_void, unsafe extern "C" fn(Handle) -> u32>(find(
                    c"ncclCommDestroy",
                )?),
                abort: transmute::<*mut c_void, unsafe extern "C" fn(Handle) -> u32>(find(c"ncclCommAbort")?),
                error_string: transmute::<*mut c_void, unsafe extern "C" fn(u32) -> *const c_char>(find(
                    c"ncclGetErrorString",
                )?),
            })
        }
    }

    fn check(&self, what: &str, code: u32) -> Result<(), GpuError> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: any code has a static text.
        let said = unsafe { CStr::from_ptr((self.error_string)(code)) }.to_string_lossy().into_owned();
        Err(GpuError::Failed { what: what.into(), code, said: format!("{said} (NCCL)") })
    }
}

/// What this thread's dynamic linker just refused.
fn not_linked() -> GpuError {
    // SAFETY: it only reads this thread's state.
    let text = unsafe { libc::dlerror() };
    let said = if text.is_null() {
        "libnccl.so.2 cannot be used".into()
    } else {
        // SAFETY: the text is this thread's until it next asks the linker.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    };
    GpuError::NoNccl { said }
}

/// Names a group of devices, so that they find each other.
#[derive(Clone, Copy)]
pub struct GroupId(UniqueId);

impl GroupId {
    /// # Errors
    /// When NCCL is not there.
    pub fn new() -> Result<Self, GpuError> {
        let library = Library::get()?;
        let mut id = UniqueId([0; 128]);
        // SAFETY: it writes the name.
        library.check("naming a group of devices", unsafe { (library.get_unique_id)(&raw mut id) })?;
        Ok(Self(id))
    }
}

/// One device's place in a group.
///
/// Graphs that were recorded with it are to be dropped before it: the library waits for that.
pub struct Communicator {
    library: &'static Library,
    state: Mutex<State>,
}

enum State {
    Joined(Handle),
    /// By a thread that ends when the last graph has.
    GivenUp(Option<JoinHandle<()>>),
}

/// A handle on its way to another thread.
struct Sent(Handle);

// SAFETY: the library lets any thread abort a communicator.
unsafe impl Send for Sent {}

// SAFETY: a handle may be used by any thread, one at a time, which the mutex sees to.
unsafe impl Send for Communicator {}
// SAFETY: as above.
unsafe impl Sync for Communicator {}

impl Communicator {
    /// Ends the sums that are under way, here and soon also with the others of the group, if they do the same; their
    /// results are not to be used. Later ones are errors. Does not wait.
    ///
    /// # Panics
    /// When the system refuses a thread.
    pub fn abort(&self) {
        let mut state = self.lock();
        let State::Joined(handle) = *state else { return };
        let (abort, sent) = (self.library.abort, Sent(handle));
        let end = move || {
            let Sent(handle) = { sent };
            // SAFETY: the handle is used no more. What it says of a group that has failed does not matter.
            let _code = unsafe { abort(handle) };
        };
        let spawned = thread::Builder::new().name("obol-abort".into()).spawn(end);
        *state = State::GivenUp(Some(spawned.expect("the system refused a thread")));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        let library = self.library;
        match self.state.get_mut().unwrap_or_else(PoisonError::into_inner) {
            State::Joined(handle) => {
                // SAFETY: the handle is used no more. A device that is lost cannot leave in order.
                let _code = unsafe { (library.destroy)(*handle) };
            }
            State::GivenUp(thread) => {
                if let Some(thread) = thread.take() {
                    thread.join().expect("the library does not panic");
                }
            }
        }
    }
}

impl Gpu {
    /// Joins a group as `rank` of `of` devices, and waits until all have.
    ///
    /// # Errors
    /// When the devices cannot reach each other, or one of them fails.
    ///
    /// # Panics
    /// When there is no such rank.
    pub fn join(&self, group: &GroupId, rank: usize, of: usize) -> Result<Communicator, GpuError> {
        assert!(rank < of, "rank {rank} of {of}");
        let library = Library::get()?;
        let number = |n: usize| c_int::try_from(n).expect("few devices");
        self.bind()?;
        let mut handle: Handle = std::ptr::null_mut();
        // SAFETY: it writes the handle; the device is this thread's.
        let code = unsafe { (library.init_rank)(&raw mut handle, number(of), group.0, number(rank)) };
        library.check("joining a group of devices", code)?;
        let communicator = Communicator { library, state: Mutex::new(State::Joined(handle)) };
        // The first sum makes connections, which cannot be done while a graph is recorded.
        let buffer = self.upload(&[0; 4])?;
        self.all_reduce(&communicator, DeviceRows::new(&buffer, Dtype::F32, 1), 1, 1)?;
        self.synchronize()?;
        Ok(communicator)
    }

    /// Adds up `x` of all devices of the group, element by element, and leaves the sum with each, the same bits
    /// everywhere. All devices ask for the same sums in the same order.
    ///
    /// # Errors
    /// When the group was given up, or the device refuses.
    ///
    /// # Panics
    /// When the rows are not inside the buffer, or not close together.
    pub fn all_reduce(
        &self,
        communicator: &Communicator,
        x: DeviceRows<'_>,
        rows: usize,
        width: usize,
    ) -> Result<(), GpuError> {
        x.check("all-reduce", rows, width);
        assert_eq!(x.stride, width, "all-reduce: rows lie close together");
        let what = "adding up over devices";
        let state = communicator.lock();
        let State::Joined(handle) = *state else {
            let said = "another device of the group failed".into();
            return Err(GpuError::Failed { what: what.into(), code: 0, said });
        };
        let dtype = match x.dtype {
            Dtype::F16 => 6,
            Dtype::F32 => 7,
            Dtype::Bf16 => 9,
        };
        let (data, library) = (x.address() as *mut c_void, communicator.library);
        // SAFETY: the elements are inside the buffer; the handle is joined.
        let code =
            unsafe { (library.all_reduce)(data, data, rows * width, dtype, SUM, handle, self.raw_stream()) };
        library.check(what, code)
    }
}
