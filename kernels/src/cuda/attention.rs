//! Rope, the KV cache and paged attention.

use super::GpuError;
use super::gpu::Modules;

pub(crate) struct AttentionKernels {}

impl AttentionKernels {
    pub(crate) fn load(_modules: &Modules) -> Result<Self, GpuError> {
        Ok(Self {})
    }
}
