//! Products on a CUDA device, or the emulator of one, against the reference and against the CPU.

#[path = "../kernels/common.rs"]
#[allow(dead_code, reason = "it serves the CPU's tests too")]
mod common;

mod dense;
mod device;
mod embed;
mod packed;
mod quantize;
