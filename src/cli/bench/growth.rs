//! `obol bench --growth`: how steps grow with batch and context, beside the calibration's fit.

use std::process::ExitCode;
use std::sync::{Arc, mpsc};

use obol_kernels::Cpu;
use obol_kernels::peak::{Peaks, read_speed};
use obol_models::device::DeviceId;

use crate::bench::growth::{self, Growth, Limits, Setting};
use crate::cli::files::{self, Format};
use crate::cli::parts::{self, Early};
use crate::cli::{Directories, Failure, devices, model, print};
use crate::clock::SystemClock;
use crate::config::Config;
use crate::measure::progress::Progress;
use crate::meter::calibration;
use crate::meter::partition::Partition;

use super::BenchFlags;

pub(super) fn run(
    flags: &BenchFlags,
    config: &Config,
    directories: &Directories,
    command: Vec<String>,
) -> Result<ExitCode, Failure> {
    for file in flags.json.iter().chain(&flags.svg) {
        files::writable(file)?;
    }
    let file = model::locate(&config.model, config.revision.as_deref(), directories)?.file;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = config.threads.unwrap_or(cores);
    let progress = Progress::stderr();
    progress.stage("growth", "loading and calibrating", 1);
    let loaded = parts::load_model(&file, config, threads, &[])?;
    let (sender, _reports) = mpsc::channel();
    let clock = Arc::new(SystemClock::start());
    let mut early = Early { clock, partition: Partition::default(), reports: sender };
    let ends = loaded.tokenizer.end_tokens();
    let mut ready = parts::prepare(loaded.model, &loaded.info, ends, config, threads, &mut early)?;
    let (blocks, block_size) = (ready.config.blocks, ready.config.block_size);
    let model = ready.model.as_mut();
    // Not the one that is kept: the machine may have been busy with something else when that was measured.
    let failed = |error| Failure::failed(format!("growth: {error}"));
    let calibration = calibration::measure(model, blocks, block_size, parts::CALIBRATION).map_err(failed)?;
    let points = growth::measure(model, blocks, block_size, &calibration, &progress).map_err(failed)?;
    drop(progress);
    let weight_bytes = loaded.info.weight_bytes;
    let device = devices::first(config);
    let limits = matches!(device, DeviceId::Cpu(_)).then(|| limits(threads, weight_bytes));
    let setting = Setting {
        model: loaded.info.name,
        precision: loaded.info.precision,
        machine: devices::name(device)?,
        threads,
        command,
    };
    let growth = Growth { setting, calibration, limits, weight_bytes, points };
    print(&match flags.format {
        Format::Table => growth.to_table(),
        Format::Json => files::pretty(&growth.to_json())?,
    })?;
    if let Some(file) = &flags.json {
        files::write(file, &(files::pretty(&growth.to_json())? + "\n"))?;
    }
    if let Some(file) = &flags.svg {
        files::write(file, &growth.to_svg().map_err(Failure::failed)?)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn limits(threads: usize, weight_bytes: u64) -> Limits {
    let cpu = Cpu::new(threads);
    let Peaks { int8_ops, f32_ops } = Peaks::measure(&cpu);
    // A cache line each at least, for a model that has next to no weights.
    let buffer = vec![1; (weight_bytes as usize).max(64 * threads)];
    Limits { int8_ops, f32_ops, read: read_speed(&cpu, &buffer) }
}
