//! Operations on single rows and elements: norms, activations, sums, gathering.

use super::GpuError;
use super::gpu::Modules;

pub(crate) struct RowKernels {}

impl RowKernels {
    pub(crate) fn load(_modules: &Modules) -> Result<Self, GpuError> {
        Ok(Self {})
    }
}
