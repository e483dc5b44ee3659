//! Memory of a device, and memory of the host that the device copies to and from by itself.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{CudaContext, result, sys};

use super::GpuError;
use super::gpu::Gpu;

/// Bytes on a device, 256-byte aligned; what is in them at first is not known.
pub struct Buffer {
    address: sys::CUdeviceptr,
    bytes: usize,
    context: Arc<CudaContext>,
}

impl Buffer {
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        self.context.record_err(self.context.bind_to_thread());
        // SAFETY: it was allocated by `Gpu::allocate` and is freed once. Freeing waits for what uses it.
        self.context.record_err(unsafe { result::free_sync(self.address) });
    }
}

/// Host memory that cannot be paged out, so that copies need not wait for the host.
pub struct Pinned {
    start: *mut u8,
    bytes: usize,
    context: Arc<CudaContext>,
}

// SAFETY: it owns its memory, as a vector does.
unsafe impl Send for Pinned {}

impl Pinned {
    /// What is in it. A copy that the device has not finished may still change it.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `bytes` bytes of its own, which were zeroed.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.context.record_err(self.context.bind_to_thread());
        // SAFETY: it was allocated by `Gpu::pin` and is freed once.
        self.context.record_err(unsafe { result::free_host(self.start.cast::<c_void>()) });
    }
}

impl Gpu {
    /// # Errors
    /// [`GpuError::OutOfMemory`] when the device has not so much.
    pub fn allocate(&self, bytes: usize) -> Result<Buffer, GpuError> {
        self.bind()?;
        let address = if bytes == 0 {
            0
        } else {
            // SAFETY: the context is bound to this thread.
            unsafe { result::malloc_sync(bytes) }.map_err(|error| GpuError::of("allocating", bytes, error))?
        };
        Ok(Buffer { address, bytes, context: self.context().clone() })
    }

    /// A buffer that holds `data`.
    ///
    /// # Errors
    /// As [`Gpu::allocate`].
    pub fn upload(&self, data: &[u8]) -> Result<Buffer, GpuError> {
        let buffer = self.allocate(data.len())?;
        self.write(&buffer, 0, data)?;
        Ok(buffer)
    }

    /// Copies `data` to byte `start` of the buffer, and waits for that.
    ///
    /// # Errors
    /// When the copy fails.
    ///
    /// # Panics
    /// When the buffer is too small.
    pub fn write(&self, buffer: &Buffer, start: usize, data: &[u8]) -> Result<(), GpuError> {
        assert!(
            start <= buffer.bytes && data.len() <= buffer.bytes - start,
            "upload: the buffer is too small"
        );
        if data.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: in bounds, and `data` outlives the copy, as the stream is waited for.
        unsafe { result::memcpy_htod_async(buffer.address + start as u64, data, self.raw_stream()) }
            .map_err(|error| GpuError::of("copying to the device", 0, error))?;
        self.synchronize()
    }

    /// Copies from byte `start` of the buffer, after all work before, and waits for that.
    ///
    /// # Errors
    /// When the copy, or work before it, fails.
    ///
    /// # Panics
    /// When the buffer is too small.
    pub fn read(&self, buffer: &Buffer, start: usize, out: &mut [u8]) -> Result<(), GpuError> {
        assert!(
            start <= buffer.bytes && out.len() <= buffer.bytes - start,
            "download: the buffer is too small"
        );
        if out.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: in bounds, and `out` outlives the copy, as the stream is waited for.
        unsafe { result::memcpy_dtoh_async(out, buffer.address + start as u64, self.raw_stream()) }
            .map_err(|error| GpuError::of("copying from the device", 0, error))?;
        self.synchronize()
    }

    /// Sets all bytes of the buffer, in the stream's order.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn fill(&self, buffer: &Buffer, byte: u8) -> Result<(), GpuError> {
        if buffer.bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the buffer's own bytes.
        unsafe { result::memset_d8_async(buffer.address, byte, buffer.bytes, self.raw_stream()) }
            .map_err(|error| GpuError::of("filling memory", 0, error))
    }

    /// Zeroed host memory for copies that nobody waits for.
    ///
    /// # Errors
    /// When the system has not so much.
    ///
    /// # Panics
    /// When `bytes` is 0.
    pub fn pin(&self, bytes: usize) -> Result<Pinned, GpuError> {
        assert!(bytes > 0, "no host memory to pin");
        self.bind()?;
        // SAFETY: the context is bound to this thread.
        let start = unsafe { result::malloc_host(bytes, 0) }
            .map_err(|error| GpuError::of("allocating pinned host memory", bytes, error))?
            .cast::<u8>();
        // SAFETY: fresh memory of that size.
        unsafe { start.write_bytes(0, bytes) };
        Ok(Pinned { start, bytes, context: self.context().clone() })
    }

    /// Copies the first `bytes` bytes to byte `start` of the buffer, in the stream's order; does not wait. The
    /// caller leaves `from` as it is until the copy is done.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When one of them is too small.
    pub fn send(&self, from: &Pinned, bytes: usize, buffer: &Buffer, start: usize) -> Result<(), GpuError> {
        assert!(start <= buffer.bytes && bytes <= buffer.bytes - start, "send: the buffer is too small");
        let data = &from.bytes()[..bytes];
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: in bounds; pinned memory lives until it is dropped, by an owner that waits for its copies.
        unsafe { result::memcpy_htod_async(buffer.address + start as u64, data, self.raw_stream()) }
            .map_err(|error| GpuError::of("copying to the device", 0, error))
    }

    /// Copies `bytes` bytes from byte `start` of the buffer to `to`, in the stream's order; does not wait.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When one of them is too small.
    pub fn receive(
        &self,
        buffer: &Buffer,
        start: usize,
        to: &mut Pinned,
        bytes: usize,
    ) -> Result<(), GpuError> {
        assert!(start <= buffer.bytes && bytes <= buffer.bytes - start, "receive: the buffer is too small");
        let out = &mut to.bytes_mut()[..bytes];
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: as in `send`.
        unsafe { result::memcpy_dtoh_async(out, buffer.address + start as u64, self.raw_stream()) }
            .map_err(|error| GpuError::of("copying from the device", 0, error))
    }

    /// Copies between buffers, in the stream's order.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When one of them is too small.
    pub fn copy(
        &self,
        from: &Buffer,
        from_start: usize,
        to: &Buffer,
        to_start: usize,
        bytes: usize,
    ) -> Result<(), GpuError> {
        assert!(
            from_start + bytes <= from.bytes && to_start + bytes <= to.bytes,
            "copy: past a buffer's end"
        );
        if bytes == 0 {
            return Ok(());
        }
        let (source, target) = (from.address + from_start as u64, to.address + to_start as u64);
        // SAFETY: in bounds of both.
        unsafe { result::memcpy_dtod_async(target, source, bytes, self.raw_stream()) }
            .map_err(|error| GpuError::of("copying on the device", 0, error))
    }
}
