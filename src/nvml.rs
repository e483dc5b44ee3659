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
        Ok(Some(Self { nvml, uuid }))
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
        let Ok(device) = self.nvml.device_by_uuid(self.uuid.as_str()) else { return Reading::default() };
        let memory = device.memory_info().ok();
        Reading {
            energy_mj: device.total_energy_consumption().ok(),
            power_mw: device.power_usage().ok().map(u64::from),
            busy_percent: device.utilization_rates().ok().map(|rates| u64::from(rates.gpu)),
            memory_used: memory.as_ref().map(|memory| memory.used),
            memory_total: memory.as_ref().map(|memory| memory.total),
            temperature: device.temperature(TemperatureSensor::Gpu).ok().map(u64::from),
        }
    }

    /// Millijoules since the driver was loaded.
    #[must_use]
    #[cfg(feature = "cuda")]
    pub fn energy_mj(&self) -> Option<u64> {
        self.nvml.device_by_uuid(self.uuid.as_str()).ok()?.total_energy_consumption().ok()
    }

    /// None in a build without CUDA.
    #[must_use]
    #[cfg(not(feature = "cuda"))]
    pub fn energy_mj(&self) -> Option<u64> {
        None
    }

    #[must_use]
    #[cfg(not(feature = "cuda"))]
    pub fn read(&self) -> Reading {
        Reading::default()
    }
}
