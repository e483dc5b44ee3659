//! Model files to weights, token batches to logits. Knows no request, clock or price.

pub mod batch;
mod blocks;
pub mod catalog;
pub mod chat_template;
mod checkpoint;
mod communicator;
mod cut;
mod decoder;
pub mod device;
pub mod encoder;
pub mod error;
pub mod fake;
pub mod fetch;
mod foreign;
pub mod gguf;
mod gguf_check;
mod gptq;
mod kv_pool;
mod linear;
pub mod load;
mod matrix;
mod model_files;
mod names;
pub mod quant;
mod quantize;
pub mod queue;
pub mod safetensors;
mod safetensors_check;
pub mod spec;
pub mod text_files;
pub mod tokenizer;
mod weight;

#[cfg(feature = "cuda")]
pub use decoder::{CudaDecoder, CudaTensorParallel};
pub use decoder::{Decoder, TensorParallel, Weights};
pub use model_files::ModelFiles;
pub use obol_kernels::KvDtype;
