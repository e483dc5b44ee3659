//! What the crate promises, tested through its public interface.

mod bad_configs;
mod bad_directories;
mod bad_files;
#[cfg(feature = "cuda")]
mod cuda_tensor_parallel;
mod decoder;
mod encoder;
mod families;
mod load;
mod parts;
mod precision;
mod support;
mod tensor_parallel;
