//! Making, finding and waiting for streams.

use std::thread;

use super::Driver;
use super::capture::Safety;
use super::codes::{Error, Result};
use super::queue::{Stream, StreamId};
use super::state::State;

/// Handle of the default stream that all threads share; the null handle means it too.
const LEGACY: u64 = 1;
/// Handle of the default stream that each thread has of its own.
const PER_THREAD: u64 = 2;
/// The stream does not wait for the legacy default stream.
const NON_BLOCKING: u32 = 1;
/// Least and greatest priority of streams.
pub(super) const PRIORITIES: (i32, i32) = (0, -5);

impl State {
    /// Forgets a stream whose owner gave it back, now or once its work is done.
    pub(super) fn retire(&mut self, id: StreamId) {
        let tail = self.tail(id);
        if self.passed(tail) {
            self.streams.remove(&id);
        } else {
            self.stream_mut(id).destroyed = true;
        }
    }
}

impl Driver {
    /// The stream of a handle, on the thread's device where it is a default stream.
    ///
    /// # Errors
    /// Without a context, after a fault, and for a handle of no living stream.
    pub(super) fn stream(&self, handle: u64) -> Result<StreamId> {
        let here = self.device_here()?;
        let mut state = self.lock();
        match handle {
            0 | LEGACY => Ok(StreamId::legacy(here)),
            PER_THREAD => Ok(state.thread_stream(here)),
            _ => {
                let id = StreamId(handle);
                let stream = state.streams.get(&id).filter(|stream| !stream.destroyed);
                let device = stream.ok_or(Error::INVALID_HANDLE)?.device;
                state.healthy(device)?;
                Ok(id)
            }
        }
    }

    /// `cuStreamCreateWithPriority`.
    pub(super) fn create_stream(&self, device: usize, flags: u32, priority: i32) -> Result<u64> {
        if flags & !NON_BLOCKING != 0 {
            return Err(Error::INVALID_VALUE);
        }
        let mut state = self.lock();
        let handle = state.handle();
        let mut stream = Stream::new(device, flags & NON_BLOCKING == 0);
        stream.priority = priority.clamp(PRIORITIES.1, PRIORITIES.0);
        state.streams.insert(StreamId(handle), stream);
        Ok(handle)
    }

    /// `cuStreamSynchronize`.
    pub(super) fn synchronize_stream(&self, id: StreamId) -> Result<()> {
        self.check_not_capturing(id)?;
        let mut state = self.lock();
        state.check_safe(Safety::Unsafe)?;
        state.check_legacy(id)?;
        let (device, tail) = (state.streams[&id].device, state.tail(id));
        let ordered = state.implicit_order(id);
        drop(state);
        for point in ordered {
            self.wait(device, point)?;
        }
        self.wait(device, tail)?;
        self.lock().pools[device].trim();
        Ok(())
    }

    /// `cuStreamQuery`.
    pub(super) fn query_stream(&self, id: StreamId) -> Result<()> {
        self.check_not_capturing(id)?;
        let mut state = self.lock();
        state.check_safe(Safety::Unsafe)?;
        state.check_legacy(id)?;
        let (device, tail) = (state.streams[&id].device, state.tail(id));
        drop(state);
        self.query(device, tail)
    }

    /// The device, flags and priority of a stream.
    pub(super) fn stream_properties(&self, id: StreamId) -> (usize, u32, i32) {
        let state = self.lock();
        let stream = &state.streams[&id];
        (stream.device, stream.flags, stream.priority)
    }
}

impl State {
    fn thread_stream(&mut self, device: usize) -> StreamId {
        let key = (thread::current().id(), device);
        if let Some(&id) = self.thread_streams.get(&key) {
            return id;
        }
        let id = StreamId(self.handle());
        self.streams.insert(id, Stream::new(device, true));
        self.thread_streams.insert(key, id);
        id
    }
}
