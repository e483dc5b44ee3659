//! Kernels written as PTX text, run and compared with plain Rust.

mod control;
mod convert;
mod faults;
mod float;
mod integer;
mod module;
mod opcode;
mod support;
mod tensor;
