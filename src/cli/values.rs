//! How flags of several commands are read: each says what it takes.

use clap::Args;
use obol_models::device::ComputeDtype;

use crate::config::Devices;

/// More clients at once than any measurement here needs; the engine's queue holds them all.
pub(super) const CLIENTS_MAX: usize = 1024;

pub(super) fn at_least<const MIN: usize>(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number >= MIN => Ok(number),
        _ => Err(format!("`{text}` is not a number from {MIN} on")),
    }
}

pub(super) fn between<const MIN: usize, const MAX: usize>(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if (MIN..=MAX).contains(&number) => Ok(number),
        _ => Err(format!("`{text}` is not a number from {MIN} to {MAX}")),
    }
}

pub(super) fn clients(text: &str) -> Result<usize, String> {
    between::<1, CLIENTS_MAX>(text)
}

/// As a part of 1. The sign is asked for: 0.02 could be either.
pub(super) fn percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').and_then(|number| number.trim_end().parse::<f64>().ok());
    let percent = number.filter(|number| number.is_finite() && *number >= 0.0);
    percent
        .map(|number| number / 100.0)
        .ok_or_else(|| format!("`{text}` is no percentage; write one like 2%"))
}

/// Where an engine in this process computes.
#[derive(Debug, Clone, Args)]
pub(super) struct DeviceFlags {
    /// Device that computes: auto, cpu or cuda:0 [default: auto, a CUDA device if there is one]
    #[arg(long, env = "OBOL_DEVICE", value_name = "DEVICE")]
    pub(super) device: Option<Devices>,
    /// Devices that compute each layer of the model together, with a part of it each [default: 1]
    #[arg(long, alias = "tensor-parallel-size", env = "OBOL_TENSOR_PARALLEL", value_name = "DEVICES")]
    pub(super) tensor_parallel: Option<usize>,
    /// Type of activations on a CUDA device: f32, f16 or bf16 [default: the weights' own, bf16 with int8 and int4]
    #[arg(long, env = "OBOL_DTYPE", value_name = "TYPE")]
    pub(super) dtype: Option<ComputeDtype>,
}
