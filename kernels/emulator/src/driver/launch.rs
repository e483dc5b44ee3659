//! Launches of kernels: what a device takes, and the bytes of the arguments.

use std::ffi::c_void;
use std::sync::Arc;

use super::codes::{Error, Result};
use super::modules::Symbol;
use super::perform::{HostCall, Op};
use super::queue::StreamId;
use super::{Driver, tell};
use crate::exec;
use crate::ptx::Function;

/// Threads a block may have.
pub(super) const BLOCK_THREADS_MAX: u32 = 1024;
/// Threads a block may have along x, y, z.
pub(super) const BLOCK_MAX: [u32; 3] = [1024, 1024, 64];
/// Blocks a grid may have along x, y, z.
pub(super) const GRID_MAX: [u32; 3] = [0x7fff_ffff, 65_535, 65_535];

/// A launch with its arguments.
#[derive(Debug)]
pub(super) struct Launch {
    pub(super) function: Arc<Function>,
    pub(super) grid: [u32; 3],
    pub(super) block: [u32; 3],
    dynamic_shared: u32,
    params: Vec<u8>,
}

impl Launch {
    pub(super) fn as_exec(&self) -> exec::Launch<'_> {
        exec::Launch {
            function: &self.function,
            grid: self.grid,
            block: self.block,
            dynamic_shared: self.dynamic_shared,
            params: &self.params,
        }
    }
}

/// Size of a launch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    /// Blocks along x, y, z.
    pub(super) grid: [u32; 3],
    /// Threads of a block along x, y, z.
    pub(super) block: [u32; 3],
    /// Dynamic shared memory of a block in bytes.
    pub(super) dynamic_shared: u32,
}

/// Where a program keeps the arguments of a launch.
#[derive(Clone, Copy, Debug)]
pub(super) enum Arguments {
    /// An array with the address of each.
    Addresses(*const *const c_void),
    /// All of them, laid out as the kernel wants them.
    Bytes(*const c_void, usize),
}

impl Symbol {
    /// Refuses what a device would refuse.
    fn check(&self, size: &Size) -> std::result::Result<(), String> {
        let Size { grid, block, dynamic_shared } = *size;
        let threads = block.iter().map(|&count| u64::from(count)).product::<u64>();
        let within =
            |counts: [u32; 3], max: [u32; 3]| counts.iter().zip(max).all(|(&n, max)| n > 0 && n <= max);
        let (max_threads, max_shared) = (self.function.max_threads, self.dynamic_shared_max);
        if !within(grid, GRID_MAX) {
            return Err(format!("a grid of {grid:?} blocks; each count must lie from 1 to {GRID_MAX:?}"));
        }
        if !within(block, BLOCK_MAX) || threads > u64::from(BLOCK_THREADS_MAX) {
            return Err(format!(
                "blocks of {block:?} threads; at most {BLOCK_MAX:?} and {BLOCK_THREADS_MAX} in all"
            ));
        }
        if threads > u64::from(max_threads) {
            return Err(format!(
                "blocks of {threads} threads, but the kernel was compiled for at most {max_threads}"
            ));
        }
        if dynamic_shared > max_shared {
            return Err(format!(
                "{dynamic_shared} bytes of dynamic shared memory; its limit is set to {max_shared}"
            ));
        }
        Ok(())
    }

    /// Lays the arguments out as the kernel wants them.
    fn params(&self, arguments: Arguments) -> std::result::Result<Vec<u8>, String> {
        let mut bytes = vec![0; self.function.param_bytes as usize];
        match arguments {
            Arguments::Bytes(start, size) => {
                if size > bytes.len() || size == 0 && !bytes.is_empty() {
                    return Err(format!(
                        "{size} bytes of arguments, but its parameters take {}",
                        bytes.len()
                    ));
                }
                if size > 0 {
                    // SAFETY: the program promises that many bytes.
                    let given = unsafe { std::slice::from_raw_parts(start.cast::<u8>(), size) };
                    bytes[..size].copy_from_slice(given);
                }
            }
            Arguments::Addresses(addresses) => {
                if addresses.is_null() && !self.function.params.is_empty() {
                    return Err(format!(
                        "no arguments, but it has {} parameters",
                        self.function.params.len()
                    ));
                }
                for (index, param) in self.function.params.iter().enumerate() {
                    // SAFETY: the program promises an address for each parameter.
                    let address = unsafe { *addresses.add(index) };
                    if address.is_null() {
                        return Err(format!("a null address for parameter {index}"));
                    }
                    let (start, size) = (param.offset as usize, param.size as usize);
                    // SAFETY: the program promises as many bytes there as the parameter has.
                    let given = unsafe { std::slice::from_raw_parts(address.cast::<u8>(), size) };
                    bytes[start..start + size].copy_from_slice(given);
                }
            }
        }
        Ok(bytes)
    }
}

impl Driver {
    /// `cuLaunchKernel`.
    pub(super) fn launch(
        &self,
        function: u64,
        size: &Size,
        id: StreamId,
        arguments: Arguments,
    ) -> Result<()> {
        let (symbol, device) = {
            let state = self.lock();
            (state.symbol(function)?.clone(), state.streams[&id].device)
        };
        if symbol.device != device {
            tell(format_args!("a launch of {} on a stream of another device", symbol.function.name));
            return Err(Error::INVALID_HANDLE);
        }
        let refuse = |why: String| {
            tell(format_args!("a launch of {}: {why}", symbol.function.name));
            Error::INVALID_VALUE
        };
        symbol.check(size).map_err(refuse)?;
        let params = symbol.params(arguments).map_err(refuse)?;
        let Size { grid, block, dynamic_shared } = *size;
        let launch = Launch { function: Arc::clone(&symbol.function), grid, block, dynamic_shared, params };
        self.enqueue(id, Op::Launch(Arc::new(launch)))
    }

    /// `cuLaunchHostFunc`.
    pub(super) fn launch_host(&self, call: HostCall, id: StreamId) -> Result<()> {
        self.enqueue(id, Op::Host(call))
    }
}
