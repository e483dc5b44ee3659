//! Model files to weights, token batches to logits. Knows no request, clock or price.

pub mod batch;
mod blocks;
mod decoder;
pub mod error;
pub mod fake;
pub mod gguf;
mod gguf_check;
mod kv_pool;
mod linear;
pub mod spec;

pub use decoder::Decoder;
