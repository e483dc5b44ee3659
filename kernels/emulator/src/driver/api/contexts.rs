//! Devices and contexts.

use std::ffi::{c_char, c_int, c_void};

use super::{exports, get, set, set_if, set_text};
use crate::driver::config::{COMPUTE_CAPABILITY, DEVICE_NAME};
use crate::driver::streams::PRIORITIES;
use crate::driver::{Driver, Error, Result};

/// The version of the API that contexts have.
const API_VERSION: u32 = 13_000;
/// Last of the limits a context has.
const LIMIT_LAST: u32 = 9;

fn ordinal(driver: &Driver, device: c_int) -> Result<usize> {
    driver.is_started()?;
    let device = usize::try_from(device).map_err(|_| Error::INVALID_DEVICE)?;
    driver.device(device).map(|device| device.ordinal)
}

exports! {
    /// The device of an ordinal.
    fn cuDeviceGet(device: *mut c_int, number: c_int) |driver| {
        ordinal(driver, number)?;
        set(device, number)
    }

    /// Number of devices.
    fn cuDeviceGetCount(count: *mut c_int) |driver| {
        driver.is_started()?;
        set(count, driver.devices.len() as c_int)
    }

    /// Name of a device.
    fn cuDeviceGetName(name: *mut c_char, capacity: c_int, device: c_int) |driver| {
        ordinal(driver, device)?;
        set_text(name, usize::try_from(capacity).map_err(|_| Error::INVALID_VALUE)?, DEVICE_NAME)
    }

    /// The bytes that tell a device from others.
    fn cuDeviceGetUuid(uuid: *mut [u8; 16], device: c_int) |driver| {
        set(uuid, Driver::uuid(ordinal(driver, device)?))
    }

    /// The bytes that tell a device from others.
    fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) |driver| {
        set(uuid, Driver::uuid(ordinal(driver, device)?))
    }

    /// Memory of a device in bytes.
    fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) |driver| {
        ordinal(driver, device)?;
        set(bytes, driver.config.memory_bytes as usize)
    }

    /// A property of a device.
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: u32, device: c_int) |driver| {
        set(value, driver.attribute(ordinal(driver, device)?, attribute)?)
    }

    /// Compute capability of a device.
    fn cuDeviceComputeCapability(major: *mut c_int, minor: *mut c_int, device: c_int) |driver| {
        ordinal(driver, device)?;
        set(major, COMPUTE_CAPABILITY.0 as c_int)?;
        set(minor, COMPUTE_CAPABILITY.1 as c_int)
    }

    /// Bus address of a device.
    fn cuDeviceGetPCIBusId(address: *mut c_char, capacity: c_int, device: c_int) |driver| {
        let bus = ordinal(driver, device)? + 1;
        set_text(address, usize::try_from(capacity).map_err(|_| Error::INVALID_VALUE)?, &format!("0000:{bus:02X}:00.0"))
    }

    /// Whether kernels of one device can use memory of another: they cannot.
    fn cuDeviceCanAccessPeer(can: *mut c_int, device: c_int, peer: c_int) |driver| {
        ordinal(driver, device)?;
        ordinal(driver, peer)?;
        set(can, 0)
    }

    /// Lets kernels use memory of another device: refused.
    fn cuCtxEnablePeerAccess(_peer: u64, _flags: u32) |driver| {
        driver.device_here()?;
        Err(Error::PEER_ACCESS_UNSUPPORTED)
    }

    /// A relation of two devices: there is none.
    fn cuDeviceGetP2PAttribute(value: *mut c_int, _attribute: u32, device: c_int, peer: c_int) |driver| {
        ordinal(driver, device)?;
        ordinal(driver, peer)?;
        set(value, 0)
    }

    /// Keeps a device's primary context alive.
    fn cuDevicePrimaryCtxRetain(context: *mut u64, device: c_int) |driver| {
        let device = ordinal(driver, device)?;
        set(context, driver.retain(device)?)
    }

    /// Lets go of a device's primary context.
    fn cuDevicePrimaryCtxRelease_v2(device: c_int) |driver| {
        let device = ordinal(driver, device)?;
        driver.release(device)
    }

    /// Frees all that is on a device.
    fn cuDevicePrimaryCtxReset_v2(device: c_int) |driver| {
        let device = ordinal(driver, device)?;
        driver.reset(device)
    }

    /// Whether a device's primary context is alive.
    fn cuDevicePrimaryCtxGetState(device: c_int, flags: *mut u32, active: *mut c_int) |driver| {
        let device = ordinal(driver, device)?;
        set(flags, 0)?;
        set(active, c_int::from(driver.is_retained(device)))
    }

    /// Sets how a primary context's waiting threads wait: they do the work themselves.
    fn cuDevicePrimaryCtxSetFlags_v2(device: c_int, _flags: u32) |driver| {
        ordinal(driver, device).map(drop)
    }

    /// Makes a context that shares what is on the device.
    fn cuCtxCreate_v4(context: *mut u64, parameters: *const c_void, _flags: u32, device: c_int) |driver| {
        let device = ordinal(driver, device)?;
        if !parameters.is_null() {
            return Err(Error::NOT_SUPPORTED);
        }
        set(context, driver.create_context(device)?)
    }

    /// Ends a context that was made, and not retained.
    fn cuCtxDestroy_v2(context: u64) |driver| {
        driver.destroy_context(context)
    }

    /// The context of the calling thread.
    fn cuCtxGetCurrent(context: *mut u64) |driver| {
        driver.is_started()?;
        set(context, driver.current_context())
    }

    /// Sets the context of the calling thread.
    fn cuCtxSetCurrent(context: u64) |driver| {
        driver.set_context(context)
    }

    /// Makes a context the thread's until it is popped.
    fn cuCtxPushCurrent_v2(context: u64) |driver| {
        driver.is_started()?;
        driver.push_context(context)
    }

    /// Goes back to the context before the last push.
    fn cuCtxPopCurrent_v2(context: *mut u64) |driver| {
        driver.is_started()?;
        set_if(context, driver.pop_context()?)
    }

    /// The device of the thread's context.
    fn cuCtxGetDevice(device: *mut c_int) |driver| {
        set(device, driver.device_here()? as c_int)
    }

    /// The API version of a context.
    fn cuCtxGetApiVersion(_context: u64, version: *mut u32) |driver| {
        driver.is_started()?;
        set(version, API_VERSION)
    }

    /// How the context's waiting threads wait.
    fn cuCtxGetFlags(flags: *mut u32) |driver| {
        driver.device_here()?;
        set(flags, 0)
    }

    /// Sets how the context's waiting threads wait: they do the work themselves.
    fn cuCtxSetFlags(_flags: u32) |driver| {
        driver.device_here().map(drop)
    }

    /// A limit of the context.
    fn cuCtxGetLimit(value: *mut usize, limit: u32) |driver| {
        let device = driver.device_here()?;
        set(value, driver.limit(device, limit)?)
    }

    /// Sets a limit of the context. None of them binds here.
    fn cuCtxSetLimit(limit: u32, value: usize) |driver| {
        let device = driver.device_here()?;
        driver.set_limit(device, limit, value)
    }

    /// How the context divides cache and shared memory: as it likes.
    fn cuCtxGetCacheConfig(config: *mut u32) |driver| {
        driver.device_here()?;
        set(config, 0)
    }

    /// Sets how the context divides cache and shared memory: nothing comes of it.
    fn cuCtxSetCacheConfig(config: u32) |driver| {
        driver.device_here()?;
        if config <= 3 { Ok(()) } else { Err(Error::INVALID_VALUE) }
    }

    /// Least and greatest priority of streams.
    fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) |driver| {
        driver.device_here()?;
        set_if(least, PRIORITIES.0)?;
        set_if(greatest, PRIORITIES.1)
    }

    /// Waits for all work of the context's device.
    fn cuCtxSynchronize() |driver| {
        let device = driver.device_here()?;
        driver.synchronize(device)
    }

    /// A device by its bus address.
    fn cuDeviceGetByPCIBusId(device: *mut c_int, address: *const c_char) |driver| {
        driver.is_started()?;
        let fields: Vec<&str> = super::text(address)?.split([':', '.']).collect();
        let [_, bus, ..] = fields[..] else { return Err(Error::INVALID_VALUE) };
        let bus = usize::from_str_radix(bus, 16).map_err(|_| Error::INVALID_VALUE)?;
        let found = bus.checked_sub(1).and_then(|ordinal| driver.device(ordinal).ok());
        set(device, found.ok_or(Error::INVALID_DEVICE)?.ordinal as c_int)
    }

    /// Sets how the calling thread's calls get on with captures, and gives how they did.
    fn cuThreadExchangeStreamCaptureMode(mode: *mut u32) |_| {
        set(mode, crate::driver::capture::exchange_mode(get(mode)?)?)
    }
}

impl Driver {
    fn limit(&self, device: usize, limit: u32) -> Result<usize> {
        if limit > LIMIT_LAST {
            return Err(Error::UNSUPPORTED_LIMIT);
        }
        Ok(self.lock().limits.get(&(device, limit)).copied().unwrap_or_default())
    }

    fn set_limit(&self, device: usize, limit: u32, value: usize) -> Result<()> {
        if limit > LIMIT_LAST {
            return Err(Error::UNSUPPORTED_LIMIT);
        }
        self.lock().limits.insert((device, limit), value);
        Ok(())
    }
}
