//! Devices by name, and which of them are here.

use std::fmt;
use std::str::FromStr;

/// A device that can hold a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceId {
    /// This machine's processor, or a part of its cores.
    Cpu(usize),
    /// A CUDA device, by its number.
    Cuda(usize),
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu(index) => write!(f, "cpu:{index}"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl FromStr for DeviceId {
    type Err = String;

    /// `cpu`, `cpu:1`, `cuda`, `cuda:1`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no device; choose auto, cpu, or cuda:0, cuda:1 and so on");
        let (kind, index) = text.split_once(':').unwrap_or((text, "0"));
        let index = index.parse().map_err(|_| wrong())?;
        match kind {
            "cpu" => Ok(Self::Cpu(index)),
            "cuda" => Ok(Self::Cuda(index)),
            _ => Err(wrong()),
        }
    }
}

/// What activations are kept in between operations. Sums are always in f32, and so is the CPU's everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ComputeDtype {
    F32,
    F16,
    Bf16,
}

impl ComputeDtype {
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

impl fmt::Display for ComputeDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ComputeDtype {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|dtype| dtype.name() == text);
        found.ok_or_else(|| format!("`{text}` is no type of activations; choose f32, f16 or bf16"))
    }
}

/// CUDA devices of this machine.
///
/// # Errors
/// Why none can be used: this build has no CUDA, there is no driver or an old one, or there is no device.
pub fn cuda_count() -> Result<usize, String> {
    #[cfg(feature = "cuda")]
    {
        use obol_kernels::cuda::{Gpu, GpuError};
        match Gpu::count() {
            Ok(0) => Err(GpuError::NoDevice { ordinal: 0, count: 0 }.to_string()),
            Ok(count) => Ok(count),
            Err(error) => Err(error.to_string()),
        }
    }
    #[cfg(not(feature = "cuda"))]
    Err("this build has no CUDA: build it with --features cuda, or use --device cpu".into())
}

/// What a CUDA device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaFacts {
    /// For people.
    pub name: String,
    /// As NVML and nvidia-smi say it.
    pub uuid: String,
    /// Bytes that are free now.
    pub free: u64,
}

/// Asks CUDA device `index` what it is.
///
/// # Errors
/// When the device cannot be used.
pub fn cuda_facts(index: usize) -> Result<CudaFacts, String> {
    #[cfg(feature = "cuda")]
    {
        use obol_kernels::cuda::{DeviceFacts, Gpu};
        let (facts, memory) = Gpu::examine(index).map_err(|error| error.to_string())?;
        let (free, _) = memory.memory().map_err(|error| error.to_string())?;
        let DeviceFacts { name, uuid, .. } = facts;
        Ok(CudaFacts { name, uuid, free })
    }
    #[cfg(not(feature = "cuda"))]
    cuda_count().and(Err(format!("there is no device cuda:{index}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_they_are_written() {
        for id in [DeviceId::Cpu(0), DeviceId::Cpu(3), DeviceId::Cuda(0), DeviceId::Cuda(12)] {
            assert_eq!(id.to_string().parse(), Ok(id));
        }
        assert_eq!("cuda".parse(), Ok(DeviceId::Cuda(0)));
        for wrong in ["gpu", "cuda:", "cuda:-1", "cpu:x", "", "cuda:0:1"] {
            assert!(wrong.parse::<DeviceId>().is_err_and(|said| said.contains("cuda:0")), "{wrong}");
        }
    }
}
