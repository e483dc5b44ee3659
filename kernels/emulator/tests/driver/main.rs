//! The driver API by its exported functions, on machines that each test makes for itself.

mod capture;
mod kernels;
mod launches;
mod library;
mod memory;
mod modules;
mod nccl;
mod nvml;
mod streams;
mod support;
