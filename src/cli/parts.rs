//! From a model file to a running engine: load, size the KV pool, calibrate. Each phase is booked.

use std::io;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use obol_models::KvDtype;
use obol_models::batch::CausalLm;
use obol_models::device::{self, DeviceId};
use obol_models::encoder::TextEncoder;
use obol_models::load::{LoadOptions, Loaded, ModelInfo, load_replicas};
use obol_models::queue::StepLimits;

use crate::clock::Clock;
use crate::config::{Config, Scheduling};
use crate::engine::{EngineConfig, EngineHandle, Parts};
use crate::meter::calibration::{self, Calibration};
use crate::meter::energy::EnergyMeter;
use crate::meter::partition::Partition;
use crate::nvml::Probe;
use crate::units::{BlockNanos, DeviceNanos};
use crate::usage::{HouseTime, MeterReport, Snapshot};

use super::{Failure, devices};

/// How long calibrating may take.
pub(super) const CALIBRATION: Duration = Duration::from_millis(1500);

/// The KV cache gets one part in this many of the free memory when nobody says otherwise.
const KV_FRACTION: u64 = 4;

/// The meter before there is an engine: time is booked as loading or warm-up.
pub(super) struct Early {
    pub(super) clock: Arc<dyn Clock>,
    pub(super) partition: Partition,
    pub(super) reports: mpsc::Sender<MeterReport>,
}

impl Early {
    /// Start-up ends here without an engine: the time so far is the house's.
    pub(super) fn give_up(mut self) {
        self.partition.book(HouseTime::Load, self.clock.now());
        let snapshot = Snapshot {
            now: self.partition.cursor(),
            wall: self.clock.wall(),
            pool: None,
            house_time: *self.partition.house(),
            house_kv: [BlockNanos::ZERO; 3],
            settled_device: DeviceNanos::ZERO,
            settled_kv: BlockNanos::ZERO,
            open: Vec::new(),
            energy: None,
        };
        if self.reports.send(MeterReport { finished: Vec::new(), snapshot }).is_err() {
            tracing::error!("the ledger is gone; the time of this start is not booked");
        }
    }
}

/// A model that is sized and calibrated.
pub(super) struct Ready {
    pub(super) model: Box<dyn CausalLm>,
    pub(super) encoder: Option<Box<dyn TextEncoder>>,
    pub(super) config: EngineConfig,
    pub(super) calibration: Calibration,
}

/// Loads the model file in the configured precisions, on the first of the configured devices and on `further`
/// ones. `info.precision` names both precisions.
pub(super) fn load_model(
    file: &Path,
    config: &Config,
    threads: usize,
    further: &[DeviceId],
) -> Result<Loaded, Failure> {
    let options = LoadOptions {
        threads,
        tensor_parallel: config.tensor_parallel,
        max_model_len: config.max_model_len,
        quant: config.quant,
        kv_dtype: config.kv_dtype,
        device: devices::first(config),
        dtype: config.dtype,
        graphs: config.cuda_graphs,
    };
    let mut loaded = load_replicas(file, &options, further)
        .map_err(|error| Failure::failed(format!("cannot load {}: {error}", file.display())))?;
    if config.kv_dtype != KvDtype::default() {
        loaded.info.precision += &format!("+kv-{}", config.kv_dtype);
    }
    Ok(loaded)
}

/// Makes the KV pool and calibrates.
pub(super) fn prepare(
    mut model: Box<dyn CausalLm>,
    info: &ModelInfo,
    end_tokens: &[u32],
    config: &Config,
    threads: usize,
    early: &mut Early,
) -> Result<Ready, Failure> {
    let longest = config.max_model_len.unwrap_or_else(|| model.context_length());
    let limits = StepLimits {
        rows: config.step_tokens,
        sequences: config.max_sequences,
        table_entries: config.max_sequences * longest.div_ceil(config.block_size),
    };
    model.reserve(limits).map_err(|error| {
        Failure::failed(format!(
            "no memory for steps ({error}); lower --step-tokens or --max-sequences, or choose int8 or int4 weights"
        ))
    })?;
    let sizes = size(model.as_ref(), end_tokens, config)?;
    model.allocate_kv(sizes.blocks, sizes.block_size).map_err(|error| {
        Failure::failed(format!("no memory for the KV cache ({error}); give it less with --kv-memory"))
    })?;
    early.partition.book(HouseTime::Load, early.clock.now());
    let key = format!(
        "{} {} {} {} {} {threads} {} {} {}",
        info.fingerprint,
        info.precision,
        config.quant,
        config.kv_dtype,
        info.device,
        sizes.block_size,
        env!("CARGO_PKG_VERSION"),
        calibration::VERSION,
    );
    let name = format!("{}.json", &blake3::hash(key.as_bytes()).to_hex()[..24]);
    let file = config.data_dir.join("calibration").join(name);
    let calibration = match calibration::cached(&file) {
        Some(calibration) => calibration,
        None => {
            let fresh = calibration::measure(model.as_mut(), sizes.blocks, sizes.block_size, CALIBRATION)
                .map_err(|error| Failure::failed(format!("calibration: {error}")))?;
            if let Err(error) = calibration::keep(&fresh, &file) {
                let file = file.display();
                tracing::warn!(
                    "calibration could not be kept in {file}: {error}; it is measured again next time"
                );
            }
            fresh
        }
    };
    early.partition.book(HouseTime::Warmup, early.clock.now());
    Ok(Ready { model, encoder: None, config: sizes, calibration })
}

/// Decides how many blocks there are and how long a request may be.
fn size(model: &dyn CausalLm, end_tokens: &[u32], config: &Config) -> Result<EngineConfig, Failure> {
    let context = model.context_length();
    let longest = config.max_model_len.unwrap_or(context);
    if longest > context {
        return Err(Failure::usage(format!(
            "max_model_len: {longest} is more than the model's context of {context}"
        )));
    }
    let bytes_per_block = model.kv_bytes_per_token() * config.block_size as u64;
    let useful = (config.max_sequences * longest.div_ceil(config.block_size)) as u64;
    let budget = kv_budget(model, config)?;
    let blocks = usize::try_from((budget / bytes_per_block).min(useful)).map_err(Failure::failed)?;
    let capacity = blocks * config.block_size;
    if blocks < 2 {
        return Err(Failure::failed(format!(
            "the KV cache would have {blocks} blocks of {bytes_per_block} bytes; \
             give it at least {} bytes with --kv-memory",
            2 * bytes_per_block
        )));
    }
    if config.max_model_len.is_some_and(|wanted| wanted > capacity) {
        return Err(Failure::usage(format!(
            "max_model_len: the KV cache holds {capacity} tokens, not {longest}; \
             raise --kv-memory or lower --max-model-len"
        )));
    }
    Ok(EngineConfig {
        blocks,
        block_size: config.block_size,
        bytes_per_block,
        max_model_len: longest.min(capacity),
        max_sequences: config.max_sequences,
        step_tokens: config.step_tokens,
        queue_depth: config.queue_depth,
        prefix_caching: config.prefix_caching,
        speculative: config.speculative,
        weights: (config.scheduling == Scheduling::Fair).then(|| config.weights.clone()),
        end_tokens: end_tokens.to_vec(),
    })
}

/// Bytes for the KV pool: as configured, or a part of what is free now.
///
/// # Errors
/// When the device does not say what it has.
pub(super) fn kv_memory(config: &Config) -> Result<u64, Failure> {
    if let Some(configured) = config.kv_memory {
        return Ok(configured);
    }
    let free = match devices::first(config) {
        DeviceId::Cpu(_) => free_memory(),
        DeviceId::Cuda(index) => device::cuda_facts(index).map_err(Failure::failed)?.free,
    };
    Ok(free / KV_FRACTION)
}

/// Bytes for the KV pool of a model that has all its other memory.
fn kv_budget(model: &dyn CausalLm, config: &Config) -> Result<u64, Failure> {
    let device = model.device_memory().map_err(Failure::failed)?;
    match (config.kv_memory, device) {
        (None, Some(memory)) => {
            // Of all that the device has, used by whomever.
            let ours = (memory.total as f64 * config.device_memory) as u64;
            Ok(ours.saturating_sub(memory.total - memory.free))
        }
        _ => kv_memory(config),
    }
}

/// Memory that this process can still take: the machine's available memory, or less in a container.
fn free_memory() -> u64 {
    const FALLBACK: u64 = 2 << 30;
    let available = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
        Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
    });
    let limit = cgroup_bytes("/sys/fs/cgroup/memory.max")
        .zip(cgroup_bytes("/sys/fs/cgroup/memory.current"))
        .map(|(max, current)| max.saturating_sub(current));
    match (available, limit) {
        (Some(machine), Some(container)) => machine.min(container),
        (one, other) => one.or(other).unwrap_or(FALLBACK),
    }
}

/// A control group's figure; `None` without such a group, or when it is `max`: no limit.
fn cgroup_bytes(path: &str) -> Option<u64> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!("the container's memory limit is not known: cannot read {path}: {error}");
            return None;
        }
    };
    match text.trim() {
        "max" => None,
        number => number
            .parse()
            .inspect_err(|error| {
                tracing::warn!("the container's memory limit is not known: {path} says `{number}`: {error}");
            })
            .ok(),
    }
}

/// Starts the engine; from here on its thread owns the meter. The energy of `devices` is counted.
pub(super) fn start(ready: Ready, early: Early, devices: &[DeviceId]) -> EngineHandle {
    EngineHandle::start(Parts {
        model: ready.model,
        encoder: ready.encoder,
        config: ready.config,
        calibration: ready.calibration,
        clock: early.clock,
        partition: early.partition,
        energy: energy_meter(devices),
        reports: early.reports,
    })
}

/// What counts the energy of an engine's devices, where all of them say.
fn energy_meter(devices: &[DeviceId]) -> Option<Box<dyn EnergyMeter>> {
    let probes: Result<Option<Vec<Probe>>, String> =
        devices.iter().map(|device| Probe::open(*device)).collect();
    match probes {
        Ok(probes) => Some(Box::new(Joules(probes.filter(|probes| !probes.is_empty())?))),
        Err(reason) => {
            tracing::warn!("no energy in the meter: NVML: {reason}");
            None
        }
    }
}

/// Of all devices together.
struct Joules(Vec<Probe>);

impl EnergyMeter for Joules {
    fn millijoules(&self) -> Option<u64> {
        self.0.iter().map(Probe::energy_mj).sum()
    }
}
