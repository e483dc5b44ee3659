//! NCCL: collectives of several devices of one process. Each is an entry in the streams of all ranks,
//! done when all of them have come to it; sums are taken in the order of ranks.
//!
//! Sums of 16-bit floats are kept in 32 bits until the end. Sends, receives and splits are not there.
//! The functions are exported by their C names and signatures.

use std::ffi::{c_char, c_int, c_void};

use crate::driver::{Call, Clique, Driver, Element, Error, Reduction, Shape, tell};

const UNHANDLED_CUDA_ERROR: Status = Status(1);
const INVALID_ARGUMENT: Status = Status(4);
const INVALID_USAGE: Status = Status(5);

/// The version this is said to be, as 10000 x major + 100 x minor + patch.
const VERSION: c_int = 22_803;
/// First bytes of an identity.
const MAGIC: [u8; 8] = *b"obolnccl";

/// A result other than success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Status(u32);

type Result<T> = std::result::Result<T, Status>;

impl From<Error> for Status {
    fn from(_: Error) -> Self {
        UNHANDLED_CUDA_ERROR
    }
}

/// `ncclUniqueId`: names the ranks that belong together.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UniqueId {
    pub bytes: [u8; 128],
}

impl UniqueId {
    fn of(clique: u64) -> Self {
        let mut bytes = [0; 128];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&clique.to_le_bytes());
        Self { bytes }
    }

    fn clique(&self) -> Result<u64> {
        let number = self.bytes.strip_prefix(&MAGIC).ok_or(INVALID_ARGUMENT)?;
        Ok(u64::from_le_bytes(number[..8].try_into().expect("eight bytes")))
    }
}

/// One rank's membership in a clique.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Communicator {
    clique: u64,
    rank: usize,
    device: usize,
}

macro_rules! nccl {
    ($($(#[$doc:meta])* fn $name:ident($($argument:ident: $type:ty),* $(,)?) |$driver:pat_param| $body:block)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// As the API says: pointers are null or valid for what the call reads and writes.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($argument: $type),*) -> u32 {
            status(|$driver: &Driver| $body)
        }
    )*};
}

fn status(call: impl FnOnce(&Driver) -> Result<()>) -> u32 {
    call(&Driver::current()).map_or_else(|status| status.0, |()| 0)
}

/// Writes a result where the caller wants it. Only for pointers that a caller of this API gave.
fn set<T>(to: *mut T, value: T) -> Result<()> {
    if to.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    // SAFETY: the caller promised that the pointer is null or valid.
    unsafe { to.write(value) };
    Ok(())
}

fn element(code: u32) -> Result<Element> {
    const BY_CODE: [Element; 10] = [
        Element::I8,
        Element::U8,
        Element::I32,
        Element::U32,
        Element::I64,
        Element::U64,
        Element::F16,
        Element::F32,
        Element::F64,
        Element::Bf16,
    ];
    BY_CODE.get(code as usize).copied().ok_or(INVALID_ARGUMENT)
}

fn reduction(code: u32) -> Result<Reduction> {
    const BY_CODE: [Reduction; 5] =
        [Reduction::Sum, Reduction::Product, Reduction::Maximum, Reduction::Minimum, Reduction::Average];
    BY_CODE.get(code as usize).copied().ok_or(INVALID_ARGUMENT)
}

/// Adds a rank on a device to a clique, which the first one to come gives its size.
fn join(driver: &Driver, clique: u64, size: c_int, rank: c_int, device: usize) -> Result<u64> {
    let size = usize::try_from(size).ok().filter(|&size| size > 0).ok_or(INVALID_ARGUMENT)?;
    let rank = usize::try_from(rank).ok().filter(|&rank| rank < size).ok_or(INVALID_ARGUMENT)?;
    driver.with_cliques(|cliques, communicators, next_handle| {
        let members = cliques.entry(clique).or_insert_with(|| Clique::of_size(size));
        if members.devices.len() != size || members.devices[rank].is_some() {
            tell(format_args!("rank {rank} of {size} joins a clique of {:?}", members.devices));
            return Err(INVALID_USAGE);
        }
        if members.devices.contains(&Some(device)) {
            tell(format_args!("two ranks of a clique on device {device}"));
            return Err(INVALID_USAGE);
        }
        members.devices[rank] = Some(device);
        communicators.insert(next_handle, Communicator { clique, rank, device });
        Ok(next_handle)
    })
}

fn communicator(driver: &Driver, handle: u64) -> Result<Communicator> {
    driver.with_cliques(|_, communicators, _| communicators.get(&handle).copied().ok_or(INVALID_ARGUMENT))
}

/// Forgets a rank, and its clique with the last one.
fn leave(driver: &Driver, handle: u64) -> Result<()> {
    driver.with_cliques(|cliques, communicators, _| {
        let Communicator { clique, .. } = communicators.remove(&handle).ok_or(INVALID_ARGUMENT)?;
        if !communicators.values().any(|other| other.clique == clique) {
            cliques.remove(&clique);
        }
        Ok(())
    })
}

/// What the ranks of a call give and get.
struct Buffers {
    send: *const c_void,
    receive: *mut c_void,
    count: usize,
    element: u32,
}

fn call(driver: &Driver, handle: u64, stream: u64, buffers: &Buffers, shape: Shape) -> Result<()> {
    let Communicator { clique, rank, device } = communicator(driver, handle)?;
    let Buffers { send, receive, count, element: code } = *buffers;
    let element = element(code)?;
    let (send, receive) = (send as u64, receive as u64);
    driver.call(Call { clique, rank, device, send, receive, count, element, shape }, stream)?;
    Ok(())
}

fn root(driver: &Driver, handle: u64, root: c_int) -> Result<usize> {
    let clique = communicator(driver, handle)?.clique;
    let size = size(driver, clique)?;
    usize::try_from(root).ok().filter(|&root| root < size).ok_or(INVALID_ARGUMENT)
}

fn size(driver: &Driver, clique: u64) -> Result<usize> {
    driver.with_cliques(|cliques, _, _| {
        cliques.get(&clique).map(|clique| clique.devices.len()).ok_or(INVALID_ARGUMENT)
    })
}

nccl! {
    /// Version of the library.
    fn ncclGetVersion(version: *mut c_int) |_| { set(version, VERSION) }

    /// A name for ranks that will belong together.
    fn ncclGetUniqueId(id: *mut UniqueId) |driver| {
        set(id, UniqueId::of(driver.with_cliques(|_, _, next_handle| next_handle)))
    }

    /// Joins the ranks of a name, on the device of the thread's context. Does not wait for the others.
    fn ncclCommInitRank(handle: *mut u64, size: c_int, id: UniqueId, rank: c_int) |driver| {
        let device = driver.device_here()?;
        set(handle, join(driver, id.clique()?, size, rank, device)?)
    }

    /// Joins the ranks of a name. No setting changes anything here.
    fn ncclCommInitRankConfig(handle: *mut u64, size: c_int, id: UniqueId, rank: c_int, _config: *mut c_void) |driver| {
        let device = driver.device_here()?;
        set(handle, join(driver, id.clique()?, size, rank, device)?)
    }

    /// Makes all ranks of a clique, each on its device: those listed, or the first ones.
    fn ncclCommInitAll(handles: *mut u64, size: c_int, devices: *const c_int) |driver| {
        if handles.is_null() {
            return Err(INVALID_ARGUMENT);
        }
        let clique = driver.with_cliques(|_, _, next_handle| next_handle);
        for rank in 0..size {
            let index = rank as usize;
            // SAFETY: the caller promised as many devices, or none.
            let device = if devices.is_null() { rank } else { unsafe { *devices.add(index) } };
            let device = usize::try_from(device).map_err(|_| INVALID_ARGUMENT)?;
            driver.device(device)?;
            let handle = join(driver, clique, size, rank, device)?;
            // SAFETY: the caller promised room for as many handles.
            unsafe { handles.add(index).write(handle) };
        }
        Ok(())
    }

    /// Ends a rank's calls.
    fn ncclCommFinalize(handle: u64) |driver| { communicator(driver, handle).map(drop) }

    /// Leaves a clique.
    fn ncclCommDestroy(handle: u64) |driver| { leave(driver, handle) }

    /// Leaves a clique, none of whose collectives is done any more.
    fn ncclCommAbort(handle: u64) |driver| {
        driver.give_up(communicator(driver, handle)?.clique);
        leave(driver, handle)
    }

    /// Number of ranks.
    fn ncclCommCount(handle: u64, count: *mut c_int) |driver| {
        let clique = communicator(driver, handle)?.clique;
        set(count, size(driver, clique)? as c_int)
    }

    /// Device of a rank.
    fn ncclCommCuDevice(handle: u64, device: *mut c_int) |driver| {
        set(device, communicator(driver, handle)?.device as c_int)
    }

    /// Number of a rank.
    fn ncclCommUserRank(handle: u64, rank: *mut c_int) |driver| {
        set(rank, communicator(driver, handle)?.rank as c_int)
    }

    /// What went wrong since: a failed collective is the device's error.
    fn ncclCommGetAsyncError(handle: u64, error: *mut u32) |driver| {
        let device = communicator(driver, handle)?.device;
        set(error, if driver.has_failed(device) { UNHANDLED_CUDA_ERROR.0 } else { 0 })
    }

    /// Starts a group of calls. They need none: no call waits for another.
    fn ncclGroupStart() |_| { Ok(()) }

    /// Ends a group of calls.
    fn ncclGroupEnd() |_| { Ok(()) }

    /// Reduces `count` elements of each rank for all.
    fn ncclAllReduce(send: *const c_void, receive: *mut c_void, count: usize, element: u32, op: u32, handle: u64, stream: u64) |driver| {
        let shape = Shape::AllReduce(reduction(op)?);
        call(driver, handle, stream, &Buffers { send, receive, count, element }, shape)
    }

    /// Reduces `count` elements of each rank for the root.
    fn ncclReduce(send: *const c_void, receive: *mut c_void, count: usize, element: u32, op: u32, to: c_int, handle: u64, stream: u64) |driver| {
        let shape = Shape::Reduce(reduction(op)?, root(driver, handle, to)?);
        call(driver, handle, stream, &Buffers { send, receive, count, element }, shape)
    }

    /// Gives `count` elements of the root to all.
    fn ncclBroadcast(send: *const c_void, receive: *mut c_void, count: usize, element: u32, from: c_int, handle: u64, stream: u64) |driver| {
        let shape = Shape::Broadcast(root(driver, handle, from)?);
        call(driver, handle, stream, &Buffers { send, receive, count, element }, shape)
    }

    /// Gives `count` elements of each rank to all.
    fn ncclAllGather(send: *const c_void, receive: *mut c_void, count: usize, element: u32, handle: u64, stream: u64) |driver| {
        call(driver, handle, stream, &Buffers { send, receive, count, element }, Shape::AllGather)
    }

    /// Reduces `count` elements for each rank.
    fn ncclReduceScatter(send: *const c_void, receive: *mut c_void, count: usize, element: u32, op: u32, handle: u64, stream: u64) |driver| {
        let shape = Shape::ReduceScatter(reduction(op)?);
        call(driver, handle, stream, &Buffers { send, receive, count, element }, shape)
    }
}

/// What a result means.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGetErrorString(status: u32) -> *const c_char {
    let meaning = match Status(status) {
        Status(0) => c"no error",
        UNHANDLED_CUDA_ERROR => c"unhandled cuda error",
        INVALID_ARGUMENT => c"invalid argument",
        INVALID_USAGE => c"invalid usage",
        Status(_) => c"unknown result code",
    };
    meaning.as_ptr()
}
