//! The encoder beside the model: found, loaded and calibrated.

use std::time::Duration;

use obol_models::device::DeviceId;
use obol_models::encoder::{EncoderInfo, LoadedEncoder, TextEncoder, load_encoder};

use crate::config::Config;
use crate::meter::calibration;
use crate::meter::share::Coefficients;
use crate::pipeline::{Embedder, Served};

use super::devices::Engines;
use super::parts::Ready;
use super::{Directories, Failure, model};

/// How long calibrating may take.
const CALIBRATION: Duration = Duration::from_millis(500);

/// An encoder for each engine.
pub(super) struct Embedding {
    encoders: Vec<Box<dyn TextEncoder>>,
    coefficients: Coefficients,
    pub(super) embedder: Embedder,
    /// For the banner.
    pub(super) line: String,
}

/// Whether the configured devices can have one.
///
/// # Errors
/// When they are no CPUs.
pub(super) fn check(config: &Config, engines: &Engines) -> Result<(), Failure> {
    if config.embedding_model.is_some() && matches!(engines[0][0], DeviceId::Cuda(_)) {
        return Err(Failure::usage(
            "--embedding-model: it computes on the CPU, and a CUDA device would wait for it; serve it beside the model \
             with --device cpu, or by a server of its own",
        ));
    }
    Ok(())
}

/// Loads the configured encoder, if there is one, for so many engines with `threads` threads each.
pub(super) fn load(
    config: &Config,
    directories: &Directories,
    (engines, threads): (usize, usize),
    created: u64,
    device: String,
) -> Result<Option<Embedding>, Failure> {
    let Some(argument) = &config.embedding_model else { return Ok(None) };
    let located = model::locate_encoder(argument, directories)?;
    let loaded = load_encoder(&located.file, threads, engines - 1);
    let LoadedEncoder { mut encoder, replicas, tokenizer, info } = loaded.map_err(|error| {
        Failure::failed(format!("--embedding-model: cannot load {}: {error}", located.file.display()))
    })?;
    let coefficients = coefficients(config, &mut *encoder, &info, threads)?;
    let EncoderInfo { precision, context_length, width, weight_bytes, fingerprint } = info;
    let mib = weight_bytes as f64 / f64::from(1 << 20);
    let line = format!(
        "encoder   {}: vectors of {width} values, texts of up to {context_length} tokens, {precision}, {mib:.0} MiB of \
         weights",
        located.id
    );
    let served = Served {
        id: located.id,
        aliases: located.alias.into_iter().collect(),
        created,
        precision,
        device,
        context_length,
        pooling: config.pooling,
        row_invariant: true,
        fingerprint: fingerprint[..12].to_owned(),
    };
    let encoders = std::iter::once(encoder).chain(replicas).collect();
    Ok(Some(Embedding { encoders, coefficients, embedder: Embedder { served, tokenizer, width }, line }))
}

/// Measured once per encoder, thread count and build.
fn coefficients(
    config: &Config,
    encoder: &mut dyn TextEncoder,
    info: &EncoderInfo,
    threads: usize,
) -> Result<Coefficients, Failure> {
    let version = (env!("CARGO_PKG_VERSION"), calibration::VERSION);
    let key = format!("encoder {} {threads} {} {}", info.fingerprint, version.0, version.1);
    let name = format!("{}.json", &blake3::hash(key.as_bytes()).to_hex()[..24]);
    let file = config.data_dir.join("calibration").join(name);
    if let Some(kept) = calibration::cached(&file) {
        return Ok(kept);
    }
    let fresh = calibration::measure_encoder(encoder, CALIBRATION)
        .map_err(|error| Failure::failed(format!("calibration of the encoder: {error}")))?;
    if let Err(error) = calibration::keep(&fresh, &file) {
        let file = file.display();
        tracing::warn!("calibration could not be kept in {file}: {error}; it is measured again next time");
    }
    Ok(fresh)
}

impl Embedding {
    /// Gives each engine its encoder.
    pub(super) fn equip(&mut self, ready: &mut [Ready]) {
        for (ready, encoder) in ready.iter_mut().zip(self.encoders.drain(..)) {
            ready.encoder = Some(encoder);
            ready.calibration.embed = Some(self.coefficients);
        }
    }
}
