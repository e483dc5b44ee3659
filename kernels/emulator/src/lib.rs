//! A CUDA device in host memory: it runs the very PTX that ships, so that CUDA code is tested where no
//! GPU is. Test-only, never shipped.
//!
//! [`ptx`] reads the text of a module, [`exec`] runs one launch of a kernel, [`memory`] holds what a
//! kernel may touch, [`fault`] says what a kernel did wrong. It checks more than a device does: fresh
//! memory is NaN, each access must lie inside an allocation, and a barrier or shuffle that waits for
//! lanes that never come stops the kernel.
//!
//! It knows nothing of speed, of machine code (SASS) and its registers, or of weak memory order; and
//! `*.approx` operations are as exact here as the host's.

pub mod exec;
pub mod fault;
pub mod memory;
pub mod ptx;
