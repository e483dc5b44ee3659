//! NVML: what a monitor asks of devices. Shares everything with the driver of its process.
//!
//! Energy is a model: idle watts all the time and more while kernels run, over real time. The functions
//! are those that programs of ours call, by their C names and signatures.

use std::ffi::{CStr, c_char, c_int, c_uint};
use std::sync::atomic::Ordering;

use crate::driver::config::{COMPUTE_CAPABILITY, DEVICE_NAME};
use crate::driver::{Device, Driver};

const UNINITIALIZED: Status = Status(1);
const INVALID_ARGUMENT: Status = Status(2);
const NOT_SUPPORTED: Status = Status(3);
const NOT_FOUND: Status = Status(6);
const INSUFFICIENT_SIZE: Status = Status(7);
const DRIVER_NOT_LOADED: Status = Status(9);

/// Degrees Celsius of each device.
const CELSIUS: u32 = 40;
/// Version of the library and of the driver's package; the latter ends in the CUDA version.
const NVML_VERSION: &str = "13.580.0";

/// A result other than success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Status(u32);

type Result<T> = std::result::Result<T, Status>;

/// `nvmlMemory_t`, in bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryInfo {
    pub total: u64,
    pub free: u64,
    pub used: u64,
}

/// `nvmlMemory_v2_t`, in bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryInfoV2 {
    pub version: c_uint,
    pub total: u64,
    pub reserved: u64,
    pub free: u64,
    pub used: u64,
}

/// `nvmlUtilization_t`, in percent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Utilization {
    pub gpu: c_uint,
    pub memory: c_uint,
}

/// `nvmlPciInfo_t`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciInfo {
    pub bus_id_legacy: [c_char; 16],
    pub domain: c_uint,
    pub bus: c_uint,
    pub device: c_uint,
    pub device_id: c_uint,
    pub subsystem_id: c_uint,
    pub bus_id: [c_char; 32],
}

macro_rules! nvml {
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

fn set_text(to: *mut c_char, capacity: c_uint, value: &str) -> Result<()> {
    if to.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    if value.len() >= capacity as usize {
        return Err(INSUFFICIENT_SIZE);
    }
    // SAFETY: the caller promised `capacity` bytes.
    unsafe {
        std::ptr::copy_nonoverlapping(value.as_ptr().cast(), to, value.len());
        to.add(value.len()).write(0);
    }
    Ok(())
}

fn text<'a>(start: *const c_char) -> Result<&'a str> {
    if start.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    // SAFETY: the caller promised a string that ends in a null.
    unsafe { CStr::from_ptr(start) }.to_str().map_err(|_| INVALID_ARGUMENT)
}

fn ready(driver: &Driver) -> Result<()> {
    if driver.monitors.load(Ordering::Acquire) == 0 { Err(UNINITIALIZED) } else { Ok(()) }
}

/// Handle of a device.
fn handle(device: &Device) -> u64 {
    device.ordinal as u64 + 1
}

/// The device of a handle.
fn device(driver: &Driver, handle: u64) -> Result<&Device> {
    ready(driver)?;
    let ordinal = handle.checked_sub(1).ok_or(INVALID_ARGUMENT)?;
    driver.devices.get(ordinal as usize).map(|device| &**device).ok_or(INVALID_ARGUMENT)
}

/// The first device of which something holds.
fn find(driver: &Driver, holds: impl Fn(&Device) -> bool) -> Result<u64> {
    ready(driver)?;
    driver.devices.iter().find(|device| holds(device)).map(|device| handle(device)).ok_or(NOT_FOUND)
}

fn uuid(device: &Device) -> String {
    let digits: String = Driver::uuid(device.ordinal).iter().map(|byte| format!("{byte:02x}")).collect();
    let groups = [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]];
    format!("GPU-{}", groups.join("-"))
}

fn bus_id(device: &Device) -> String {
    format!("00000000:{:02X}:00.0", device.ordinal + 1)
}

fn characters<const N: usize>(text: &str) -> [c_char; N] {
    let mut characters = [0; N];
    for (to, &from) in characters.iter_mut().zip(text.as_bytes()) {
        *to = from as c_char;
    }
    characters
}

fn start(driver: &Driver) -> Result<()> {
    if driver.devices.is_empty() {
        return Err(DRIVER_NOT_LOADED);
    }
    driver.monitors.fetch_add(1, Ordering::AcqRel);
    Ok(())
}

nvml! {
    /// Starts monitoring.
    fn nvmlInit_v2() |driver| { start(driver) }

    /// Starts monitoring. No flag changes anything here.
    fn nvmlInitWithFlags(_flags: c_uint) |driver| { start(driver) }

    /// Ends what one start began.
    fn nvmlShutdown() |driver| {
        let fewer = |users: usize| users.checked_sub(1);
        driver.monitors.fetch_update(Ordering::AcqRel, Ordering::Acquire, fewer).map(drop).map_err(|_| UNINITIALIZED)
    }

    /// Version of the driver's package.
    fn nvmlSystemGetDriverVersion(version: *mut c_char, capacity: c_uint) |driver| {
        ready(driver)?;
        let cuda = driver.config.driver_version;
        set_text(version, capacity, &format!("580.{}.{}", cuda / 1000, cuda % 1000 / 10))
    }

    /// Version of this library.
    fn nvmlSystemGetNVMLVersion(version: *mut c_char, capacity: c_uint) |driver| {
        ready(driver)?;
        set_text(version, capacity, NVML_VERSION)
    }

    /// Version of CUDA that the driver has, as 1000 x major + 10 x minor.
    fn nvmlSystemGetCudaDriverVersion(version: *mut c_int) |driver| {
        set(version, driver.config.driver_version as c_int)
    }

    /// Version of CUDA that the driver has, as 1000 x major + 10 x minor.
    fn nvmlSystemGetCudaDriverVersion_v2(version: *mut c_int) |driver| {
        set(version, driver.config.driver_version as c_int)
    }

    /// Number of devices.
    fn nvmlDeviceGetCount_v2(count: *mut c_uint) |driver| {
        ready(driver)?;
        set(count, driver.devices.len() as c_uint)
    }

    /// The device of an index.
    fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, found: *mut u64) |driver| {
        ready(driver)?;
        let device = driver.devices.get(index as usize).ok_or(INVALID_ARGUMENT)?;
        set(found, handle(device))
    }

    /// The device of a UUID, `GPU-` and hexadecimal digits.
    fn nvmlDeviceGetHandleByUUID(name: *const c_char, found: *mut u64) |driver| {
        let name = text(name)?;
        set(found, find(driver, |device| uuid(device) == name)?)
    }

    /// The device of a bus address; the domain may be written with four or eight digits.
    fn nvmlDeviceGetHandleByPciBusId_v2(address: *const c_char, found: *mut u64) |driver| {
        let address = text(address)?;
        set(found, find(driver, |device| {
            let full = bus_id(device);
            full.eq_ignore_ascii_case(address) || full[4..].eq_ignore_ascii_case(address)
        })?)
    }

    /// Index of a device.
    fn nvmlDeviceGetIndex(handle: u64, index: *mut c_uint) |driver| {
        set(index, device(driver, handle)?.ordinal as c_uint)
    }

    /// Name of a device.
    fn nvmlDeviceGetName(handle: u64, name: *mut c_char, capacity: c_uint) |driver| {
        device(driver, handle)?;
        set_text(name, capacity, DEVICE_NAME)
    }

    /// UUID of a device.
    fn nvmlDeviceGetUUID(handle: u64, name: *mut c_char, capacity: c_uint) |driver| {
        set_text(name, capacity, &uuid(device(driver, handle)?))
    }

    /// Bus address of a device.
    fn nvmlDeviceGetPciInfo_v3(handle: u64, info: *mut PciInfo) |driver| {
        let device = device(driver, handle)?;
        let bus_id = bus_id(device);
        set(info, PciInfo {
            bus_id_legacy: characters(&bus_id[4..]),
            domain: 0,
            bus: device.ordinal as c_uint + 1,
            device: 0,
            device_id: 0,
            subsystem_id: 0,
            bus_id: characters(&bus_id),
        })
    }

    /// Compute capability of a device.
    fn nvmlDeviceGetCudaComputeCapability(handle: u64, major: *mut c_int, minor: *mut c_int) |driver| {
        device(driver, handle)?;
        set(major, COMPUTE_CAPABILITY.0 as c_int)?;
        set(minor, COMPUTE_CAPABILITY.1 as c_int)
    }

    /// Memory of a device.
    fn nvmlDeviceGetMemoryInfo(handle: u64, info: *mut MemoryInfo) |driver| {
        let (free, total) = driver.memory_info(device(driver, handle)?.ordinal);
        set(info, MemoryInfo { total, free, used: total - free })
    }

    /// Memory of a device. None of it is the system's own.
    fn nvmlDeviceGetMemoryInfo_v2(handle: u64, info: *mut MemoryInfoV2) |driver| {
        let (free, total) = driver.memory_info(device(driver, handle)?.ordinal);
        // SAFETY: the caller promised that the pointer is null or valid.
        let version = unsafe { info.as_ref() }.ok_or(INVALID_ARGUMENT)?.version;
        set(info, MemoryInfoV2 { version, total, reserved: 0, free, used: total - free })
    }

    /// Share of the last second in which kernels ran, in percent.
    fn nvmlDeviceGetUtilizationRates(handle: u64, rates: *mut Utilization) |driver| {
        let gpu = device(driver, handle)?.activity.busy_percent();
        set(rates, Utilization { gpu, memory: gpu })
    }

    /// Millijoules since the driver was loaded.
    fn nvmlDeviceGetTotalEnergyConsumption(handle: u64, energy: *mut u64) |driver| {
        set(energy, device(driver, handle)?.activity.millijoules())
    }

    /// Milliwatts now.
    fn nvmlDeviceGetPowerUsage(handle: u64, power: *mut c_uint) |driver| {
        set(power, device(driver, handle)?.activity.milliwatts())
    }

    /// Degrees Celsius, of the one sensor there is.
    fn nvmlDeviceGetTemperature(handle: u64, sensor: c_uint, celsius: *mut c_uint) |driver| {
        device(driver, handle)?;
        if sensor != 0 {
            return Err(NOT_SUPPORTED);
        }
        set(celsius, CELSIUS)
    }
}

/// What a result means.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlErrorString(status: u32) -> *const c_char {
    let meaning = match Status(status) {
        Status(0) => c"success",
        UNINITIALIZED => c"not initialized",
        INVALID_ARGUMENT => c"invalid argument",
        NOT_SUPPORTED => c"not supported",
        NOT_FOUND => c"not found",
        INSUFFICIENT_SIZE => c"insufficient size",
        DRIVER_NOT_LOADED => c"driver not loaded",
        Status(_) => c"unknown error",
    };
    meaning.as_ptr()
}
