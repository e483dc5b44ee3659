//! What a CUDA device says of itself through NVML: energy, power, load, memory, temperature.
//!
//! NVML is loaded at run time and belongs to the driver; without it the figures are simply not there. A figure
//! that one device does not have (energy on older ones) does not keep the others away.

use obol_models::device::DeviceId;

/// The figures at one moment; none where the device does not say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reading {
    /// Since the driver was loaded, in millijoules.
    pub energy_mj: Option<u64>,
    /// In milliwatts.
    pub power_mw: Option<u64>,
    /// Per cent of the last sampling period in which a kernel ran.
    pub busy_percent: Option<u64>,
    /// Bytes in use by all processes.
    pub memory_used: Option<u64>,
    /// Bytes.
    pub memory_total: Option<u64>,
    /// Degrees Celsius.
    pub temperature: Option<u64>,
}

/// A device, as NVML knows it.
pub struct Probe {
    #[cfg(feature = "cuda")]
    nvml: nvml_wrapper::Nvml,
    #[cfg(feature = "cuda")]
    uuid: String,
    /// What could not be read, and was said so.
    #[cfg(feature = "cuda")]
    said: std::sync::Mutex<Vec<&'static str>>,
}

impl Probe {
    /// The probe of a CUDA device; none of any other.
    ///
    /// # Errors
    /// Why NVML cannot be asked.
    #[cfg(feature = "cuda")]
    pub fn open(device: DeviceId) -> Result<Option<Self>, String> {
        let DeviceId::Cuda(index) = device else { return Ok(None) };
        let uuid = obol_models::device::cuda_facts(index)?.uuid;
        let nvml = nvml_wrapper::Nvml::init().map_err(|error| error.to_string())?;
        nvml.device_by_uuid(uuid.as_str()).map_err(|error| format!("{uuid}: {error}"))?;
        Ok(Some(Self { nvml, uuid, said: std::sync::Mutex::default() }))
    }

    /// There is none in a build without CUDA.
    ///
    /// # Errors
    /// Never.
    #[cfg(not(feature = "cuda"))]
    pub fn open(_device: DeviceId) -> Result<Option<Self>, String> {
        Ok(None)
    }

    #[must_use]
    #[cfg(feature = "cuda")]
    pub fn read(&self) -> Reading {
        use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
        let device = self.figure("the device", self.nvml.device_by_uuid(self.uuid.as_str()));
        let Some(device) = device else { return Reading::default() };
        let memory = self.figure("its memory", device.memory_info());
        Reading {
            energy_mj: self.figure("its energy", device.total_energy_consumption()),
            power_mw: self.figure("its power", device.power_usage()).map(u64::from),
            busy_percent: self
                .figure("its load", device.utilization_rates())
                .map(|rates| u64::from(rates.gpu)),
            memory_used: memory.as_ref().map(|memory| memory.used),
            memory_total: memory.as_ref().map(|memory| memory.total),
            temperature: self
                .figure("its temperature", device.temperature(TemperatureSensor::Gpu))
                .map(u64::from),
        }
    }

    /// Millijoules since the driver was loaded.
    #[must_use]
    #[cfg(feature = "cuda")]
    pub fn energy_mj(&self) -> Option<u64> {
        let device = self.figure("the device", self.nvml.device_by_uuid(self.uuid.as_str()))?;
        self.figure("its energy", device.total_energy_consumption())
    }

    /// None in a build without CUDA.
    #[must_use]
    #[cfg(not(feature = "cuda"))]
    pub fn energy_mj(&self) -> Option<u64> {
        None
    }

    /// What NVML answered. Where the device does not have it, that is all; any other error is said, but once.
    #[cfg(feature = "cuda")]
    fn figure<T>(&self, what: &'static str, answer: Result<T, nvml_wrapper::error::NvmlError>) -> Option<T> {
        let error = match answer {
            Ok(figure) => return Some(figure),
            Err(nvml_wrapper::error::NvmlError::NotSupported) => return None,
            Err(error) => error,
        };
        let mut said = self.said.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !said.contains(&what) {
            said.push(what);
            tracing::warn!("{}: NVML cannot read {what}: {error}", self.uuid);
        }
        None
    }

    #[must_use]
    #[cfg(not(feature = "cuda"))]
    pub fn read(&self) -> Reading {
        Reading::default()
    }
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use nvml_wrapper::error::NvmlError;

    use super::*;

    #[test]
    fn figures_are_read_and_errors_said_once() {
        let probe = Probe::open(DeviceId::Cuda(0)).expect("a CUDA device, or the emulator's libraries");
        let probe = probe.expect("NVML knows CUDA devices");
        let Reading { power_mw, memory_used, memory_total, .. } = probe.read();
        assert!(power_mw.is_some() && memory_used <= memory_total && memory_total > Some(0));
        let said = || probe.said.lock().unwrap().clone();
        assert!(said().is_empty(), "{:?}", said());
        assert_eq!(probe.figure("its a", Ok(1)), Some(1));
        assert_eq!(probe.figure::<u64>("its b", Err(NvmlError::NotSupported)), None);
        for _ in 0..2 {
            assert_eq!(probe.figure::<u64>("its c", Err(NvmlError::GpuLost)), None);
        }
        assert_eq!(said(), ["its c"]);
    }
}
