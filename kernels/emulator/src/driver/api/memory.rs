//! Memory: allocations, copies, fills, pools.

use std::ffi::{c_int, c_uint, c_void};

use super::{exports, get, set, set_if};
use crate::driver::perform::{Copy, Direction, Fill};
use crate::driver::{Driver, Error, Result};

/// Handles of the devices' default pools begin here.
const POOLS: u64 = 0xb001_0000_0000;
/// Attributes of pools: release threshold, reserved now and at most, used now and at most.
const THRESHOLD: u32 = 4;
const RESERVED: u32 = 5;
const RESERVED_HIGH: u32 = 6;
const USED: u32 = 7;
const USED_HIGH: u32 = 8;

fn pool_of(device: usize) -> u64 {
    POOLS + 16 * device as u64
}

fn device_of_pool(driver: &Driver, pool: u64) -> Result<usize> {
    let device = pool.checked_sub(POOLS).ok_or(Error::INVALID_VALUE)? / 16;
    driver.device(device as usize).map(|device| device.ordinal).map_err(|_| Error::INVALID_VALUE)
}

fn ordinal(driver: &Driver, device: c_int) -> Result<usize> {
    driver.is_started()?;
    let device = usize::try_from(device).map_err(|_| Error::INVALID_DEVICE)?;
    driver.device(device).map(|device| device.ordinal)
}

fn up(to: u64, from: *const c_void, bytes: usize) -> Copy {
    Copy { to, from: from as u64, bytes: bytes as u64, direction: Direction::Up }
}

fn down(to: *mut c_void, from: u64, bytes: usize) -> Copy {
    Copy { to: to as u64, from, bytes: bytes as u64, direction: Direction::Down }
}

fn between(to: u64, from: u64, bytes: usize) -> Copy {
    Copy { to, from, bytes: bytes as u64, direction: Direction::Between }
}

fn fill(to: u64, value: u32, width: usize, count: usize) -> Fill {
    Fill { to, value, width, count }
}

exports! {
    /// Free and total memory of the context's device in bytes.
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) |driver| {
        let (free_bytes, total_bytes) = driver.memory_info(driver.device_here()?);
        set_if(free, free_bytes as usize)?;
        set_if(total, total_bytes as usize)
    }

    /// Allocates device memory.
    fn cuMemAlloc_v2(address: *mut u64, bytes: usize) |driver| {
        let device = driver.device_here()?;
        set(address, driver.allocate(device, bytes as u64)?)
    }

    /// Frees device memory.
    fn cuMemFree_v2(address: u64) |driver| {
        let device = driver.device_here()?;
        driver.free(device, address)
    }

    /// Allocates device memory in the order of a stream.
    fn cuMemAllocAsync(address: *mut u64, bytes: usize, stream: u64) |driver| {
        let stream = driver.stream(stream)?;
        set(address, driver.allocate_ordered(stream, bytes as u64)?)
    }

    /// Allocates memory of a pool in the order of a stream.
    fn cuMemAllocFromPoolAsync(address: *mut u64, bytes: usize, pool: u64, stream: u64) |driver| {
        let stream = driver.stream(stream)?;
        if device_of_pool(driver, pool)? != driver.stream_properties(stream).0 {
            return Err(Error::INVALID_VALUE);
        }
        set(address, driver.allocate_ordered(stream, bytes as u64)?)
    }

    /// Frees device memory in the order of a stream.
    fn cuMemFreeAsync(address: u64, stream: u64) |driver| {
        let stream = driver.stream(stream)?;
        driver.free_ordered(stream, address)
    }

    /// First address and size of the allocation that holds an address.
    fn cuMemGetAddressRange_v2(start: *mut u64, bytes: *mut usize, address: u64) |driver| {
        driver.device_here()?;
        let range = driver.devices.iter().find_map(|device| device.memory.find(address));
        let (first, end) = range.ok_or(Error::NOT_FOUND)?;
        set_if(start, first)?;
        set_if(bytes, (end - first) as usize)
    }

    /// What is known of an address: context, kind of memory, device, allocation.
    fn cuPointerGetAttribute(value: *mut c_void, attribute: u32, address: u64) |driver| {
        driver.is_started()?;
        let home = driver.devices.iter().find_map(|device| Some((device.ordinal, device.memory.find(address)?)));
        match (attribute, home) {
            // Kinds: 1 is host memory that is page-locked, 2 device memory.
            (2, Some(_)) => set(value.cast::<c_uint>(), 2),
            (2, None) if driver.is_pinned(address) => set(value.cast::<c_uint>(), 1),
            (3, Some(_)) => set(value.cast::<u64>(), address),
            (8, Some(_)) => set(value.cast::<c_uint>(), 0),
            (9, Some((device, _))) => set(value.cast::<c_int>(), device as c_int),
            (11, Some((_, (start, _)))) => set(value.cast::<u64>(), start),
            (12, Some((_, (start, end)))) => set(value.cast::<usize>(), (end - start) as usize),
            _ => Err(Error::INVALID_VALUE),
        }
    }

    /// Allocates page-locked host memory.
    fn cuMemHostAlloc(address: *mut *mut c_void, bytes: usize, flags: c_uint) |driver| {
        driver.device_here()?;
        if flags > 7 {
            return Err(Error::INVALID_VALUE);
        }
        set(address, driver.allocate_pinned(bytes)? as *mut c_void)
    }

    /// Allocates page-locked host memory.
    fn cuMemAllocHost_v2(address: *mut *mut c_void, bytes: usize) |driver| {
        driver.device_here()?;
        set(address, driver.allocate_pinned(bytes)? as *mut c_void)
    }

    /// Frees page-locked host memory.
    fn cuMemFreeHost(address: *mut c_void) |driver| {
        driver.device_here()?;
        driver.free_pinned(address as u64)
    }

    /// Page-locks memory of the program.
    fn cuMemHostRegister_v2(address: *mut c_void, bytes: usize, _flags: c_uint) |driver| {
        driver.device_here()?;
        driver.register_pinned(address as u64, bytes)
    }

    /// Undoes the page-locking of the program's memory.
    fn cuMemHostUnregister(address: *mut c_void) |driver| {
        driver.device_here()?;
        driver.unregister_pinned(address as u64)
    }

    /// Copies to a device.
    fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, bytes: usize) |driver| {
        let device = driver.device_here()?;
        driver.copy(device, up(to, from, bytes))
    }

    /// Copies from a device.
    fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, bytes: usize) |driver| {
        let device = driver.device_here()?;
        driver.copy(device, down(to, from, bytes))
    }

    /// Copies within and between devices.
    fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize) |driver| {
        let device = driver.device_here()?;
        driver.copy(device, between(to, from, bytes))
    }

    /// Copies between any two addresses.
    fn cuMemcpy(to: u64, from: u64, bytes: usize) |driver| {
        let device = driver.device_here()?;
        let direction = driver.direction(to, from)?;
        driver.copy(device, Copy { to, from, bytes: bytes as u64, direction })
    }

    /// Copies to a device in the order of a stream.
    fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: u64) |driver| {
        let stream = driver.stream(stream)?;
        driver.copy_ordered(up(to, from, bytes), stream)
    }

    /// Copies from a device in the order of a stream.
    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: u64) |driver| {
        let stream = driver.stream(stream)?;
        driver.copy_ordered(down(to, from, bytes), stream)
    }

    /// Copies within and between devices in the order of a stream.
    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) |driver| {
        let stream = driver.stream(stream)?;
        driver.copy_ordered(between(to, from, bytes), stream)
    }

    /// Copies between any two addresses in the order of a stream.
    fn cuMemcpyAsync(to: u64, from: u64, bytes: usize, stream: u64) |driver| {
        let stream = driver.stream(stream)?;
        let direction = driver.direction(to, from)?;
        driver.copy_ordered(Copy { to, from, bytes: bytes as u64, direction }, stream)
    }

    /// Copies from one context's device to another's.
    fn cuMemcpyPeer(to: u64, _to_context: u64, from: u64, _from_context: u64, bytes: usize) |driver| {
        let device = driver.device_here()?;
        driver.copy(device, between(to, from, bytes))
    }

    /// Copies from one context's device to another's in the order of a stream.
    fn cuMemcpyPeerAsync(to: u64, _to_context: u64, from: u64, _from_context: u64, bytes: usize, stream: u64) |driver| {
        let stream = driver.stream(stream)?;
        driver.copy_ordered(between(to, from, bytes), stream)
    }

    /// Fills with a byte.
    fn cuMemsetD8_v2(to: u64, value: u8, count: usize) |driver| {
        let device = driver.device_here()?;
        driver.fill(device, fill(to, value.into(), 1, count))
    }

    /// Fills with two bytes.
    fn cuMemsetD16_v2(to: u64, value: u16, count: usize) |driver| {
        let device = driver.device_here()?;
        driver.fill(device, fill(to, value.into(), 2, count))
    }

    /// Fills with four bytes.
    fn cuMemsetD32_v2(to: u64, value: u32, count: usize) |driver| {
        let device = driver.device_here()?;
        driver.fill(device, fill(to, value, 4, count))
    }

    /// Fills with a byte in the order of a stream.
    fn cuMemsetD8Async(to: u64, value: u8, count: usize, stream: u64) |driver| {
        let stream = driver.stream(stream)?;
        driver.fill_ordered(fill(to, value.into(), 1, count), stream)
    }

    /// Fills with two bytes in the order of a stream.
    fn cuMemsetD16Async(to: u64, value: u16, count: usize, stream: u64) |driver| {
        let stream = driver.stream(stream)?;
        driver.fill_ordered(fill(to, value.into(), 2, count), stream)
    }

    /// Fills with four bytes in the order of a stream.
    fn cuMemsetD32Async(to: u64, value: u32, count: usize, stream: u64) |driver| {
        let stream = driver.stream(stream)?;
        driver.fill_ordered(fill(to, value, 4, count), stream)
    }

    /// The default pool of a device.
    fn cuDeviceGetDefaultMemPool(pool: *mut u64, device: c_int) |driver| {
        set(pool, pool_of(ordinal(driver, device)?))
    }

    /// The pool that allocations in the order of streams come from: the default one.
    fn cuDeviceGetMemPool(pool: *mut u64, device: c_int) |driver| {
        set(pool, pool_of(ordinal(driver, device)?))
    }

    /// A figure of a pool.
    fn cuMemPoolGetAttribute(pool: u64, attribute: u32, value: *mut c_void) |driver| {
        let pool = driver.pool(device_of_pool(driver, pool)?);
        match attribute {
            // Whether memory is reused along events, by chance, by making streams wait.
            1..=3 => set(value.cast::<c_int>(), 1),
            THRESHOLD => set(value.cast::<u64>(), pool.threshold),
            RESERVED => set(value.cast::<u64>(), pool.reserved),
            RESERVED_HIGH => set(value.cast::<u64>(), pool.reserved_high),
            USED => set(value.cast::<u64>(), pool.used),
            USED_HIGH => set(value.cast::<u64>(), pool.used_high),
            _ => Err(Error::INVALID_VALUE),
        }
    }

    /// Sets a figure of a pool: the threshold, or a maximum back to now.
    fn cuMemPoolSetAttribute(pool: u64, attribute: u32, value: *const c_void) |driver| {
        let device = device_of_pool(driver, pool)?;
        if (1..=3).contains(&attribute) {
            return get(value.cast::<c_int>()).map(drop);
        }
        let value: u64 = get(value.cast())?;
        driver.with_pool(device, |pool| {
            match (attribute, value) {
                (THRESHOLD, _) => pool.threshold = value,
                (RESERVED_HIGH, 0) => pool.reserved_high = pool.reserved,
                (USED_HIGH, 0) => pool.used_high = pool.used,
                _ => return Err(Error::INVALID_VALUE),
            }
            Ok(())
        })
    }

    /// Gives unused memory of a pool back to the device, down to as many bytes.
    fn cuMemPoolTrimTo(pool: u64, bytes: usize) |driver| {
        let device = device_of_pool(driver, pool)?;
        driver.with_pool(device, |pool| {
            pool.trim_to(bytes as u64);
            Ok(())
        })
    }
}
