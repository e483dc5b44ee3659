//! Marks in the stream, with the device's time at which it reached them.

use cudarc::driver::{CudaEvent, sys};

use super::{Gpu, GpuError};

/// A mark that can be set again and again.
pub struct Event(CudaEvent);

impl Gpu {
    /// # Errors
    /// When the device refuses.
    pub fn event(&self) -> Result<Event, GpuError> {
        // With timing; a waiting host sleeps instead of spinning on a core that others could use.
        let event = self.context().new_event(Some(sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC));
        event.map(Event).map_err(|error| GpuError::of("making an event", 0, error))
    }

    /// Sets the mark after all work so far.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn record(&self, event: &Event) -> Result<(), GpuError> {
        event.0.record(self.stream()).map_err(|error| GpuError::of("recording an event", 0, error))
    }
}

impl Event {
    /// Waits until the stream has reached the mark.
    ///
    /// # Errors
    /// When work before it failed.
    pub fn wait(&self) -> Result<(), GpuError> {
        self.0.synchronize().map_err(|error| GpuError::of("waiting for the device", 0, error))
    }

    /// Whether the stream has reached the mark.
    ///
    /// # Errors
    /// When work before it failed.
    pub fn is_reached(&self) -> Result<bool, GpuError> {
        self.0.try_is_complete().map_err(|error| GpuError::of("asking for an event", 0, error))
    }

    /// Nanoseconds from here to `end`, both reached; never negative.
    ///
    /// # Errors
    /// When one of them was not recorded or not reached.
    pub fn nanos_until(&self, end: &Self) -> Result<u64, GpuError> {
        let ms = self.0.elapsed_ms(&end.0).map_err(|error| GpuError::of("reading an event", 0, error))?;
        Ok((f64::from(ms.max(0.0)) * 1e6).round() as u64)
    }
}
