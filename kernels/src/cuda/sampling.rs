//! Drawing tokens from rows of logits.

use super::GpuError;
use super::gpu::Modules;

/// The most likely tokens that a draw can ask for.
pub const TOP_MAX: usize = 20;

/// Bytes of what a draw leaves: token, its log-probability, how many of the most likely follow, one word unused,
/// then those as (token, log-probability), all of 4 bytes.
pub const RECORD_BYTES: usize = 16 + 8 * TOP_MAX;

pub(crate) struct SamplingKernels {}

impl SamplingKernels {
    pub(crate) fn load(_modules: &Modules) -> Result<Self, GpuError> {
        Ok(Self {})
    }
}
