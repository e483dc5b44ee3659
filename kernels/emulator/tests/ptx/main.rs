//! Kernels written as PTX text, run and compared with plain Rust.

mod control;
mod faults;
mod module;
mod support;
