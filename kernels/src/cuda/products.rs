//! Products with weights, and what they read: quantised activations, embeddings.

use super::GpuError;
use super::gpu::Modules;

pub(crate) struct ProductKernels {}

impl ProductKernels {
    pub(crate) fn load(_modules: &Modules) -> Result<Self, GpuError> {
        Ok(Self {})
    }
}
