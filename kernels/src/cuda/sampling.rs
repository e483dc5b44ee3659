//! Drawing tokens from rows of logits: by the rules of the host's sampler and with its bits, whatever shares the
//! launch. Nothing but packed draws goes to the device, and nothing but records comes back.

mod draws;
mod workspace;

pub use draws::{DrawLayout, DrawLists, DrawRecord, RECORD_BYTES, SamplingPasses, TOP_MAX};
pub use workspace::{DeviceSampler, PackedDraws, StepTokens};

use super::GpuError;
use super::gpu::{Kernel, Modules};

pub(crate) struct SamplingKernels {
    peaks: Kernel,
    survey: Kernel,
    narrow: Kernel,
    keep: Kernel,
    pick: Kernel,
}

impl SamplingKernels {
    pub(crate) fn load(modules: &Modules) -> Result<Self, GpuError> {
        let kernel = |name: &str| modules.kernel("sampling", name, 0);
        Ok(Self {
            peaks: kernel("sample_peaks")?,
            survey: kernel("sample_survey")?,
            narrow: kernel("sample_narrow")?,
            keep: kernel("sample_keep")?,
            pick: kernel("sample_pick")?,
        })
    }
}
