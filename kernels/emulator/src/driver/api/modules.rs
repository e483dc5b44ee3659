//! Modules, functions and launches.

use std::ffi::{c_char, c_int, c_uint, c_void};

use super::{exports, get, set, set_if, set_text, text};
use crate::driver::attributes::MULTIPROCESSORS;
use crate::driver::launch::{Arguments, Size};
use crate::driver::{Driver, Error, Result};
use crate::fatbin;

/// Options of loading: where a log of errors goes, and its capacity.
const ERROR_LOG: u32 = 5;
const ERROR_LOG_BYTES: u32 = 6;
/// Keys of an array of packed arguments: its end, their address, the address of their size.
const ARGUMENTS_END: usize = 0;
const ARGUMENTS_ADDRESS: usize = 1;
const ARGUMENTS_SIZE: usize = 2;
/// Launch attributes that have no effect here: none, priority, programmatic order and more; and those
/// that are looked at.
const CLUSTER_DIMENSION: u32 = 4;

/// `CUlaunchConfig`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct LaunchConfig {
    /// Blocks along x, y, z.
    pub grid: [c_uint; 3],
    /// Threads of a block along x, y, z.
    pub block: [c_uint; 3],
    /// Dynamic shared memory of a block in bytes.
    pub shared_bytes: c_uint,
    pub stream: u64,
    pub attributes: *const LaunchAttribute,
    pub attribute_count: c_uint,
}

/// `CUlaunchAttribute`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct LaunchAttribute {
    pub id: u32,
    pub padding: u32,
    pub value: [u32; 16],
}

/// The image at an address that the caller gave.
fn image<'a>(start: *const c_void) -> Result<&'a [u8]> {
    if start.is_null() {
        return Err(Error::INVALID_VALUE);
    }
    // SAFETY: the caller promised an image.
    Ok(unsafe { fatbin::image(start.cast()) })
}

/// Loads a module and writes what went wrong into the caller's log.
fn load(driver: &Driver, module: *mut u64, image: &[u8], options: &[(u32, usize)]) -> Result<()> {
    let device = driver.device_here()?;
    match driver.load_module(device, image) {
        Ok(handle) => set(module, handle),
        Err((error, why)) => {
            let option = |key| options.iter().find(|option| option.0 == key).map(|option| option.1);
            if let (Some(log), Some(capacity)) = (option(ERROR_LOG), option(ERROR_LOG_BYTES)) {
                set_text(log as *mut c_char, capacity, &why)?;
            }
            Err(error)
        }
    }
}

/// The packed arguments that an array of keys and values describes.
fn packed(mut extra: *const *const c_void) -> Result<Arguments> {
    let (mut start, mut size) = (std::ptr::null(), 0);
    loop {
        let key = get(extra)? as usize;
        if key == ARGUMENTS_END {
            return Ok(Arguments::Bytes(start, size));
        }
        // SAFETY: the caller promised that a value follows each key but the end.
        let value = unsafe { *extra.add(1) };
        match key {
            ARGUMENTS_ADDRESS => start = value,
            ARGUMENTS_SIZE => size = get(value.cast::<usize>())?,
            _ => return Err(Error::INVALID_VALUE),
        }
        // SAFETY: as above; the end has not come.
        extra = unsafe { extra.add(2) };
    }
}

fn arguments(addresses: *const *const c_void, extra: *const *const c_void) -> Result<Arguments> {
    match (addresses.is_null(), extra.is_null()) {
        (_, true) => Ok(Arguments::Addresses(addresses)),
        (true, false) => packed(extra),
        (false, false) => Err(Error::INVALID_VALUE),
    }
}

exports! {
    /// Loads a module from PTX or a fat binary in memory.
    fn cuModuleLoadData(module: *mut u64, start: *const c_void) |driver| {
        load(driver, module, image(start)?, &[])
    }

    /// Loads a module from PTX or a fat binary in memory, with options; the log of errors is written.
    fn cuModuleLoadDataEx(module: *mut u64, start: *const c_void, count: c_uint, keys: *const u32, values: *const *const c_void) |driver| {
        let mut options = Vec::new();
        for index in 0..count as usize {
            if keys.is_null() || values.is_null() {
                return Err(Error::INVALID_VALUE);
            }
            // SAFETY: the caller promised `count` keys and values.
            options.push(unsafe { (*keys.add(index), *values.add(index) as usize) });
        }
        load(driver, module, image(start)?, &options)
    }

    /// Loads a module from a fat binary in memory.
    fn cuModuleLoadFatBinary(module: *mut u64, start: *const c_void) |driver| {
        load(driver, module, image(start)?, &[])
    }

    /// Loads a module from a file.
    fn cuModuleLoad(module: *mut u64, path: *const c_char) |driver| {
        driver.device_here()?;
        let file = std::fs::read(text(path)?).map_err(|_| Error::FILE_NOT_FOUND)?;
        load(driver, module, &file, &[])
    }

    /// Ends a module.
    fn cuModuleUnload(module: u64) |driver| {
        driver.device_here()?;
        driver.unload_module(module)
    }

    /// A kernel of a module.
    fn cuModuleGetFunction(function: *mut u64, module: u64, name: *const c_char) |driver| {
        driver.device_here()?;
        set(function, driver.function(module, text(name)?)?)
    }

    /// Address and bytes of a module's variable.
    fn cuModuleGetGlobal_v2(address: *mut u64, bytes: *mut usize, module: u64, name: *const c_char) |driver| {
        driver.device_here()?;
        let (start, size) = driver.variable(module, text(name)?)?;
        set_if(address, start)?;
        set_if(bytes, size as usize)
    }

    /// A property of a kernel.
    fn cuFuncGetAttribute(value: *mut c_int, attribute: u32, function: u64) |driver| {
        set(value, driver.function_attribute(function, attribute)?)
    }

    /// Sets a property of a kernel.
    fn cuFuncSetAttribute(function: u64, attribute: u32, value: c_int) |driver| {
        driver.device_here()?;
        driver.set_function_attribute(function, attribute, value)
    }

    /// Sets how a kernel divides cache and shared memory: nothing comes of it.
    fn cuFuncSetCacheConfig(function: u64, config: u32) |driver| {
        driver.device_here()?;
        driver.check_function(function)?;
        if config <= 3 { Ok(()) } else { Err(Error::INVALID_VALUE) }
    }

    /// Launches a kernel.
    fn cuLaunchKernel(
        function: u64,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared_bytes: c_uint,
        stream: u64,
        addresses: *const *const c_void,
        extra: *const *const c_void,
    ) |driver| {
        let stream = driver.stream(stream)?;
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        driver.launch(function, &Size { grid, block, dynamic_shared: shared_bytes }, stream, arguments(addresses, extra)?)
    }

    /// Launches a kernel with attributes. Clusters of more than one block are refused.
    fn cuLaunchKernelEx(config: *const LaunchConfig, function: u64, addresses: *const *const c_void, extra: *const *const c_void) |driver| {
        let LaunchConfig { grid, block, shared_bytes, stream, attributes, attribute_count } = get(config)?;
        let stream = driver.stream(stream)?;
        for index in 0..attribute_count as usize {
            if attributes.is_null() {
                return Err(Error::INVALID_VALUE);
            }
            // SAFETY: the caller promised as many attributes.
            let attribute = unsafe { *attributes.add(index) };
            if attribute.id == CLUSTER_DIMENSION && attribute.value[..3] != [1, 1, 1] {
                return Err(Error::NOT_SUPPORTED);
            }
        }
        driver.launch(function, &Size { grid, block, dynamic_shared: shared_bytes }, stream, arguments(addresses, extra)?)
    }

    /// Blocks of a kernel that one multiprocessor holds.
    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks: *mut c_int, function: u64, threads: c_int, shared_bytes: usize) |driver| {
        set(blocks, occupancy(driver, function, threads, shared_bytes)?)
    }

    /// Blocks of a kernel that one multiprocessor holds.
    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks: *mut c_int, function: u64, threads: c_int, shared_bytes: usize, _flags: c_uint) |driver| {
        set(blocks, occupancy(driver, function, threads, shared_bytes)?)
    }

    /// The block that fills a multiprocessor best, and the grid that fills the device.
    fn cuOccupancyMaxPotentialBlockSize(
        grid: *mut c_int,
        block: *mut c_int,
        function: u64,
        shared_of: Option<unsafe extern "C" fn(c_int) -> usize>,
        shared_bytes: usize,
        limit: c_int,
    ) |driver| {
        potential(driver, grid, block, function, shared_of, shared_bytes, limit)
    }

    /// The block that fills a multiprocessor best, and the grid that fills the device.
    fn cuOccupancyMaxPotentialBlockSizeWithFlags(
        grid: *mut c_int,
        block: *mut c_int,
        function: u64,
        shared_of: Option<unsafe extern "C" fn(c_int) -> usize>,
        shared_bytes: usize,
        limit: c_int,
        _flags: c_uint,
    ) |driver| {
        potential(driver, grid, block, function, shared_of, shared_bytes, limit)
    }

    /// Dynamic shared memory each block may have so that one multiprocessor holds as many.
    fn cuOccupancyAvailableDynamicSMemPerBlock(bytes: *mut usize, function: u64, blocks: c_int, threads: c_int) |driver| {
        driver.device_here()?;
        let unsigned = |value: c_int| u32::try_from(value).map_err(|_| Error::INVALID_VALUE);
        set(bytes, driver.shared_for(function, unsigned(blocks)?, unsigned(threads)?)? as usize)
    }
}

fn occupancy(driver: &Driver, function: u64, threads: c_int, shared_bytes: usize) -> Result<c_int> {
    driver.device_here()?;
    let threads = u32::try_from(threads).map_err(|_| Error::INVALID_VALUE)?;
    driver.blocks_per_sm(function, threads, shared_bytes as u64).map(|blocks| blocks as c_int)
}

fn potential(
    driver: &Driver,
    grid: *mut c_int,
    block: *mut c_int,
    function: u64,
    shared_of: Option<unsafe extern "C" fn(c_int) -> usize>,
    shared_bytes: usize,
    limit: c_int,
) -> Result<()> {
    driver.device_here()?;
    let largest = driver.largest_block(function)? as c_int;
    let largest = if limit > 0 { largest.min(limit) } else { largest };
    let mut best = (0, 0, 0);
    for threads in (32..=largest).rev().filter(|threads| threads % 32 == 0) {
        let shared = match shared_of {
            // SAFETY: the caller gave the function for this.
            Some(shared_of) => unsafe { shared_of(threads) },
            None => shared_bytes,
        };
        let blocks = occupancy(driver, function, threads, shared)?;
        if blocks * threads > best.0 {
            best = (blocks * threads, threads, blocks);
        }
    }
    let (_, threads, blocks) = best;
    set(block, threads)?;
    set(grid, blocks * MULTIPROCESSORS as c_int)
}
