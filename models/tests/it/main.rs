//! What the crate promises, tested through its public interface.

mod bad_files;
mod decoder;
mod load;
mod parts;
mod support;
