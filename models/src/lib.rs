//! Model files to weights, token batches to logits. Knows no request, clock or price.

pub mod batch;
pub mod error;
pub mod fake;
pub mod gguf;
mod gguf_check;
