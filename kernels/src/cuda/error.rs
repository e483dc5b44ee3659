//! What can go wrong with a device, in words that say what to do.

use std::fmt;

use cudarc::driver::{DriverError, sys};

/// A device that cannot be used, or an operation that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GpuError {
    /// libcuda is not on this machine.
    NoDriver,
    /// libnccl, or a function of it, cannot be loaded.
    NoNccl { said: String },
    /// The driver supports CUDA up to `has`, as 1000 * major + 10 * minor.
    DriverTooOld { has: i32, needs: i32 },
    /// The driver sees no such device.
    NoDevice { ordinal: usize, count: usize },
    /// The device is older than the kernels are made for.
    TooOldDevice { name: String, capability: (i32, i32) },
    /// The device has no memory left for this.
    OutOfMemory { bytes: usize },
    /// The driver refused `what`.
    Failed { what: String, code: u32, said: String },
}

impl GpuError {
    /// Of the driver's answer to `what`, which asked for `bytes` of memory if it did.
    pub(crate) fn of(what: &str, bytes: usize, error: DriverError) -> Self {
        if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Self::OutOfMemory { bytes };
        }
        let text = |found: Result<&std::ffi::CStr, DriverError>| {
            found.map_or_else(|_| "an unknown error".into(), |text| text.to_string_lossy().into_owned())
        };
        let said = format!("{} ({})", text(error.error_string()), text(error.error_name()));
        Self::Failed { what: what.into(), code: error.0 as u32, said }
    }
}

impl fmt::Display for GpuError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = |v: i32| format!("{}.{}", v / 1000, v % 1000 / 10);
        match self {
            Self::NoDriver => f.write_str(
                "no NVIDIA driver: the library libcuda.so.1 is not on this machine; install the driver, or use --device cpu",
            ),
            Self::NoNccl { said } => {
                write!(f, "no NCCL: {said}; install NCCL 2, or serve without --tensor-parallel")
            }
            Self::DriverTooOld { has, needs } => write!(
                f,
                "the NVIDIA driver supports CUDA {}, these kernels need {}; install a newer driver (580 or later), or use \
                 --device cpu",
                version(*has),
                version(*needs)
            ),
            Self::NoDevice { ordinal: 0, count: 0 } => {
                f.write_str("the NVIDIA driver finds no CUDA device; see nvidia-smi, or use --device cpu")
            }
            Self::NoDevice { ordinal, count } => {
                let last = count.saturating_sub(1);
                write!(f, "there is no device cuda:{ordinal}; this machine has cuda:0 to cuda:{last}")
            }
            Self::TooOldDevice { name, capability: (major, minor) } => write!(
                f,
                "{name} has compute capability {major}.{minor}; 8.0 (Ampere) or newer is needed, or use --device cpu"
            ),
            Self::OutOfMemory { bytes } => {
                write!(f, "the device has no memory for {:.1} MiB more", *bytes as f64 / f64::from(1 << 20))
            }
            Self::Failed { what, said, .. } => write!(f, "{what}: {said}"),
        }
    }
}

impl std::error::Error for GpuError {}
