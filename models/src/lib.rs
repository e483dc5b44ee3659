//! Model files to weights, token batches to logits. Knows no request, clock or price.

pub mod batch;
