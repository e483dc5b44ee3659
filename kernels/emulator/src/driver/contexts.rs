//! Contexts: what belongs to a program on one device, and which of them a thread works in.

use std::cell::RefCell;

use super::Driver;
use super::capture::Safety;
use super::codes::{Error, Result};
use super::queue::{Stream, StreamId};

/// Handles of primary contexts begin here; other objects' handles are made by counting up from less.
const PRIMARY: u64 = 0xc0de_0000_0000;

/// A context. All contexts of a device share what is on it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Context {
    pub(super) device: usize,
}

thread_local! {
    /// The contexts of each machine that this thread has pushed, the current one last.
    static CONTEXTS: RefCell<Vec<(u64, u64)>> = const { RefCell::new(Vec::new()) };
}

impl Driver {
    /// The device the thread works on.
    ///
    /// # Errors
    /// Without a living context, and after a fault on the device.
    pub(crate) fn device_here(&self) -> Result<usize> {
        self.is_started()?;
        let handle = self.current_context();
        if handle == 0 {
            return Err(Error::INVALID_CONTEXT);
        }
        let state = self.lock();
        let device = state.contexts.get(&handle).ok_or(Error::CONTEXT_IS_DESTROYED)?.device;
        state.healthy(device)?;
        Ok(device)
    }

    /// The thread's current context, 0 for none.
    pub(super) fn current_context(&self) -> u64 {
        CONTEXTS.with_borrow(|stack| {
            stack.iter().rev().find(|entry| entry.0 == self.id).map_or(0, |entry| entry.1)
        })
    }

    /// `cuCtxSetCurrent`.
    pub(super) fn set_context(&self, handle: u64) -> Result<()> {
        self.is_started()?;
        if handle != 0 && !self.lock().contexts.contains_key(&handle) {
            return Err(Error::INVALID_CONTEXT);
        }
        CONTEXTS.with_borrow_mut(|stack| {
            match stack.iter_mut().rev().find(|entry| entry.0 == self.id) {
                Some(entry) => entry.1 = handle,
                None => stack.push((self.id, handle)),
            };
        });
        Ok(())
    }

    /// `cuCtxPushCurrent`.
    pub(super) fn push_context(&self, handle: u64) -> Result<()> {
        if !self.lock().contexts.contains_key(&handle) {
            return Err(Error::INVALID_CONTEXT);
        }
        CONTEXTS.with_borrow_mut(|stack| stack.push((self.id, handle)));
        Ok(())
    }

    /// `cuCtxPopCurrent`. Gives the context that was current.
    pub(super) fn pop_context(&self) -> Result<u64> {
        CONTEXTS.with_borrow_mut(|stack| {
            let last = stack.iter().rposition(|entry| entry.0 == self.id).ok_or(Error::INVALID_CONTEXT)?;
            Ok(stack.remove(last).1)
        })
    }

    /// `cuDevicePrimaryCtxRetain`.
    pub(super) fn retain(&self, device: usize) -> Result<u64> {
        self.is_started()?;
        self.device(device)?;
        let mut state = self.lock();
        state.retained[device] += 1;
        let handle = PRIMARY + 16 * device as u64;
        state.contexts.insert(handle, Context { device });
        Ok(handle)
    }

    /// `cuDevicePrimaryCtxRelease`: with the last holder all that the context owns goes.
    pub(super) fn release(&self, device: usize) -> Result<()> {
        self.is_started()?;
        self.device(device)?;
        let mut state = self.lock();
        let Some(left) = state.retained[device].checked_sub(1) else { return Err(Error::INVALID_CONTEXT) };
        state.retained[device] = left;
        drop(state);
        if left == 0 { self.reset(device) } else { Ok(()) }
    }

    /// `cuDevicePrimaryCtxReset`: frees all that is on the device, and forgets its fault. Holders of the
    /// context keep it.
    pub(super) fn reset(&self, device: usize) -> Result<()> {
        self.is_started()?;
        self.device(device)?;
        self.lock().check_safe(Safety::WaitsForDevice(device))?;
        // A fault has been given to whoever asked; here it ends.
        let _fault: Result<()> = self.wait_device(device);
        let memory = &self.devices[device].memory;
        let mut state = self.lock();
        state.counts.leaked_bytes += memory.usage().used;
        let own: Vec<u64> =
            state.modules.iter().filter(|(_, loaded)| loaded.device == device).map(|(&h, _)| h).collect();
        for module in own {
            if let Some((_, module)) = state.take_module(module) {
                module.unload(memory);
            }
        }
        // Graphs give their memory back before it is all cleared, and so never another's at its address.
        state.graphs.retain(|_, graph| graph.device() != device);
        state.execs.retain(|_, exec| exec.device() != device);
        state.allocations.retain(|_, allocation| allocation.device != device);
        state.streams.retain(|_, stream| stream.device != device);
        state.streams.insert(StreamId::legacy(device), Stream::new(device, true));
        state.thread_streams.retain(|key, _| key.1 != device);
        state.pools[device] = super::allocate::Pool { threshold: 0, ..Default::default() };
        state.faults[device] = None;
        if state.retained[device] == 0 {
            state.contexts.retain(|&handle, context| context.device != device || handle < PRIMARY);
            state.limits.retain(|key, _| key.0 != device);
        }
        memory.clear();
        Ok(())
    }

    /// `cuCtxCreate`: a context that shares what is on the device.
    pub(super) fn create_context(&self, device: usize) -> Result<u64> {
        self.is_started()?;
        self.device(device)?;
        let mut state = self.lock();
        let handle = state.handle();
        state.contexts.insert(handle, Context { device });
        drop(state);
        self.push_context(handle)?;
        Ok(handle)
    }

    /// `cuCtxDestroy`.
    pub(super) fn destroy_context(&self, handle: u64) -> Result<()> {
        let context = self.lock().contexts.get(&handle).copied().filter(|_| handle < PRIMARY);
        let device = context.ok_or(Error::INVALID_CONTEXT)?.device;
        // What was left undone is told by later calls.
        let _fault: Result<()> = self.wait_device(device);
        self.lock().contexts.remove(&handle);
        CONTEXTS.with_borrow_mut(|stack| stack.retain(|&entry| entry != (self.id, handle)));
        Ok(())
    }

    /// Whether a device's primary context is alive.
    pub(super) fn is_retained(&self, device: usize) -> bool {
        self.lock().retained[device] > 0
    }

    /// `cuCtxSynchronize`.
    pub(super) fn synchronize(&self, device: usize) -> Result<()> {
        self.lock().check_safe(Safety::WaitsForDevice(device))?;
        self.wait_device(device)
    }
}
