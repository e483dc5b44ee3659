//! The kernels against the reference, for each instruction set of this machine.

mod attention;
mod common;
#[path = "../numbers/mod.rs"]
mod numbers;
mod packed;
mod peak;
mod pool;
mod quantize_weights;
mod rows;
mod super_scales;
