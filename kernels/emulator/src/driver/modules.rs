//! Modules and their functions.

use std::sync::Arc;

use super::attributes::{REGISTERS_PER_THREAD, SHARED_BYTES_PER_BLOCK, SHARED_BYTES_PER_SM, THREADS_PER_SM};
use super::codes::{Error, Result};
use super::config::COMPUTE_CAPABILITY;
use super::launch::BLOCK_THREADS_MAX;
use super::state::State;
use super::{Driver, tell};
use crate::fatbin::{self, Image};
use crate::ptx::{Function, Module, ParseError};

/// Blocks that one multiprocessor holds at most.
pub(super) const BLOCKS_PER_SM: u32 = 24;

/// A module on a device.
pub(super) struct Loaded {
    pub(super) device: usize,
    module: Module,
    /// Version of the architecture that its PTX was made for, as 10 x major + minor.
    target: u32,
}

/// A kernel, and how the program set it up.
#[derive(Clone)]
pub(super) struct Symbol {
    module: u64,
    pub(super) device: usize,
    pub(super) function: Arc<Function>,
    target: u32,
    /// Dynamic shared memory that a launch may ask for, in bytes.
    pub(super) dynamic_shared_max: u32,
    carveout: i32,
}

impl State {
    pub(super) fn symbol(&self, function: u64) -> Result<&Symbol> {
        self.functions.get(&function).ok_or(Error::INVALID_HANDLE)
    }

    /// Takes a module and its functions out of the tables.
    pub(super) fn take_module(&mut self, handle: u64) -> Option<(usize, Module)> {
        let loaded = self.modules.remove(&handle)?;
        self.functions.retain(|_, symbol| symbol.module != handle);
        Some((loaded.device, loaded.module))
    }
}

impl Driver {
    /// `cuModuleLoadData`: the handle of the module, or why it could not be loaded, for the log.
    pub(super) fn load_module(
        &self,
        device: usize,
        image: &[u8],
    ) -> std::result::Result<u64, (Error, String)> {
        let failed = |error: Error, text: String| {
            tell(format_args!("loading a module: {text}"));
            (error, text)
        };
        let Image { text, target } =
            fatbin::choose(image, &self.config).map_err(|(error, text)| failed(error, text))?;
        let module = Module::parse(text, &self.devices[device].memory).map_err(|error| {
            let code = match error {
                ParseError::Memory(_) => Error::OUT_OF_MEMORY,
                _ => Error::INVALID_PTX,
            };
            failed(code, error.to_string())
        })?;
        let mut state = self.lock();
        let handle = state.handle();
        state.modules.insert(handle, Loaded { device, module, target });
        Ok(handle)
    }

    /// `cuModuleUnload`: waits for all work of the device, as any of it may be of the module.
    pub(super) fn unload_module(&self, handle: u64) -> Result<()> {
        let device = self.lock().modules.get(&handle).ok_or(Error::INVALID_HANDLE)?.device;
        let waited = self.wait_device(device);
        let (_, module) = self.lock().take_module(handle).ok_or(Error::INVALID_HANDLE)?;
        module.unload(&self.devices[device].memory);
        waited
    }

    /// `cuModuleGetFunction`. Asked twice, it gives the same function.
    pub(super) fn function(&self, module: u64, name: &str) -> Result<u64> {
        let mut state = self.lock();
        let loaded = state.modules.get(&module).ok_or(Error::INVALID_HANDLE)?;
        let (device, target) = (loaded.device, loaded.target);
        let function =
            loaded.module.function(name).filter(|function| function.entry).ok_or(Error::NOT_FOUND)?;
        let known = state.functions.iter().find(|(_, symbol)| Arc::ptr_eq(&symbol.function, &function));
        if let Some((&handle, _)) = known {
            return Ok(handle);
        }
        if function.shared_bytes > SHARED_BYTES_PER_BLOCK {
            let bytes = function.shared_bytes;
            tell(format_args!(
                "{name} has {bytes} bytes of static shared memory of {SHARED_BYTES_PER_BLOCK}"
            ));
            return Err(Error::INVALID_PTX);
        }
        let dynamic_shared_max = SHARED_BYTES_PER_BLOCK - function.shared_bytes;
        let handle = state.handle();
        let symbol = Symbol { module, device, function, target, dynamic_shared_max, carveout: -1 };
        state.functions.insert(handle, symbol);
        Ok(handle)
    }

    /// `cuModuleGetGlobal`: address and bytes of a variable.
    pub(super) fn variable(&self, module: u64, name: &str) -> Result<(u64, u64)> {
        let state = self.lock();
        let loaded = state.modules.get(&module).ok_or(Error::INVALID_HANDLE)?;
        loaded.module.variable(name).ok_or(Error::NOT_FOUND)
    }

    /// `cuFuncGetAttribute`.
    pub(super) fn function_attribute(&self, function: u64, attribute: u32) -> Result<i32> {
        let state = self.lock();
        let symbol = state.symbol(function)?;
        let (major, minor) = COMPUTE_CAPABILITY;
        let value = match attribute {
            0 => symbol.function.max_threads.min(BLOCK_THREADS_MAX),
            1 => symbol.function.shared_bytes,
            4 => REGISTERS_PER_THREAD,
            5 => symbol.target,
            6 => 10 * major + minor,
            8 => symbol.dynamic_shared_max,
            9 => return Ok(symbol.carveout),
            // Constant and local bytes, cache mode and clusters: nothing is known, and nothing is needed.
            2 | 3 | 7 | 10..=15 => 0,
            _ => return Err(Error::INVALID_VALUE),
        };
        i32::try_from(value).map_err(|_| Error::INVALID_VALUE)
    }

    /// `cuFuncSetAttribute`.
    pub(super) fn set_function_attribute(&self, function: u64, attribute: u32, value: i32) -> Result<()> {
        let shared_max = self.config.shared_bytes_max;
        let mut state = self.lock();
        let symbol = state.functions.get_mut(&function).ok_or(Error::INVALID_HANDLE)?;
        match attribute {
            8 => {
                let bytes = u32::try_from(value).map_err(|_| Error::INVALID_VALUE)?;
                let static_bytes = symbol.function.shared_bytes;
                if bytes.checked_add(static_bytes).is_none_or(|sum| sum > shared_max) {
                    let name = &symbol.function.name;
                    tell(format_args!(
                        "{bytes} bytes of dynamic and {static_bytes} of static shared memory for {name}; a block has at most {shared_max}"
                    ));
                    return Err(Error::INVALID_VALUE);
                }
                symbol.dynamic_shared_max = bytes;
            }
            9 if (-1..=100).contains(&value) => symbol.carveout = value,
            10..=15 => return Err(Error::NOT_SUPPORTED),
            _ => return Err(Error::INVALID_VALUE),
        }
        Ok(())
    }

    /// `cuFuncGetName`, without a null at its end.
    pub(super) fn check_function(&self, function: u64) -> Result<()> {
        self.lock().symbol(function).map(drop)
    }

    /// Blocks of a kernel that one multiprocessor would hold.
    pub(super) fn blocks_per_sm(&self, function: u64, threads: u32, dynamic_shared: u64) -> Result<u32> {
        let state = self.lock();
        let symbol = state.symbol(function)?;
        if threads == 0 {
            return Err(Error::INVALID_VALUE);
        }
        if threads > symbol.function.max_threads || dynamic_shared > u64::from(symbol.dynamic_shared_max) {
            return Ok(0);
        }
        let by_threads = THREADS_PER_SM / threads.next_multiple_of(32);
        let shared = dynamic_shared + u64::from(symbol.function.shared_bytes);
        let by_shared = u64::from(SHARED_BYTES_PER_SM).checked_div(shared).unwrap_or(u64::MAX);
        Ok(by_threads.min(BLOCKS_PER_SM).min(u32::try_from(by_shared).unwrap_or(u32::MAX)))
    }

    /// The dynamic shared memory each of `blocks` blocks may have so that one multiprocessor holds them all.
    pub(super) fn shared_for(&self, function: u64, blocks: u32, threads: u32) -> Result<u64> {
        if blocks == 0 || threads.saturating_mul(blocks) > THREADS_PER_SM {
            return Err(Error::INVALID_VALUE);
        }
        let state = self.lock();
        let symbol = state.symbol(function)?;
        let share = (SHARED_BYTES_PER_SM / blocks).saturating_sub(symbol.function.shared_bytes);
        Ok(u64::from(share.min(symbol.dynamic_shared_max)))
    }

    /// The largest block that a kernel takes.
    pub(super) fn largest_block(&self, function: u64) -> Result<u32> {
        Ok(self.lock().symbol(function)?.function.max_threads.min(BLOCK_THREADS_MAX))
    }
}
