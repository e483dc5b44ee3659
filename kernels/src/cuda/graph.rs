//! A stretch of the stream's work, recorded once and launched as one.

use cudarc::driver::{CudaGraph, sys};

use super::{Gpu, GpuError};

/// Recorded work; the buffers it names must outlive it.
pub struct Graph(CudaGraph);

// SAFETY: the graph's handles may be used from any thread, one at a time, which `&mut` or a single owner sees to.
unsafe impl Send for Graph {}

impl Gpu {
    /// Records what `work` puts into the stream, instead of doing it.
    ///
    /// # Errors
    /// When `work` fails or does what cannot be recorded, or the device has no memory for the graph.
    pub fn capture(&self, work: impl FnOnce() -> Result<(), GpuError>) -> Result<Graph, GpuError> {
        let failed = |error| GpuError::of("recording a graph", 0, error);
        self.bind()?;
        self.stream()
            .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .map_err(failed)?;
        let done = work();
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        // Ended in any case, so that the stream can be used again.
        let graph = self.stream().end_capture(flags).map_err(failed);
        done?;
        graph?.map(Graph).ok_or_else(|| GpuError::Failed {
            what: "recording a graph".into(),
            code: 0,
            said: "nothing was recorded".into(),
        })
    }
}

impl Graph {
    /// Puts the recorded work into the stream.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn launch(&self) -> Result<(), GpuError> {
        self.0.launch().map_err(|error| GpuError::of("launching a graph", 0, error))
    }
}
