//! Products on a CUDA device, or the emulator of one, against the reference and against the CPU.

#[path = "../kernels/common.rs"]
#[expect(dead_code, reason = "it serves the CPU's tests too")]
mod common;
#[path = "../device/mod.rs"]
mod device;
#[path = "../numbers/mod.rs"]
mod numbers;

mod dense;
mod embed;
mod experts;
mod packed;
mod quantize;
mod scattered;
