//! A model file to everything that serving needs: weights, tokenizer, chat template, and what it is.
//!
//! Knows the order in which the parts are read and nothing of their insides.

use std::path::Path;
use std::sync::Arc;
use std::thread;

use obol_kernels::{Cpu, KvDtype};

use crate::batch::CausalLm;
use crate::chat_template::ChatTemplate;
use crate::decoder::Decoder;
use crate::error::LoadError;
use crate::gguf::{GgufFile, type_name};
use crate::quant::Quant;
use crate::text_files::{self, Text};
use crate::tokenizer::Tokenizer;

/// More threads than any machine has.
const THREADS_MAX: usize = 1024;

/// What can be chosen at loading.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// Threads that compute, the caller's included.
    pub threads: usize,
    /// Largest number of positions in a sequence, if less than the model's.
    pub max_model_len: Option<usize>,
    /// What becomes of the file's weights.
    pub quant: Quant,
    /// The KV cache's type.
    pub kv_dtype: KvDtype,
}

impl Default for LoadOptions {
    /// One thread a core that this process may use, the model's whole context.
    fn default() -> Self {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        Self { threads, max_model_len: None, quant: Quant::default(), kv_dtype: KvDtype::default() }
    }
}

/// A model ready to serve, but for its KV pool.
pub struct Loaded {
    pub model: Box<dyn CausalLm>,
    pub tokenizer: Arc<Tokenizer>,
    /// The file's own, else ChatML where the vocabulary has its markers, else none.
    pub template: Option<ChatTemplate>,
    pub info: ModelInfo,
}

/// What a loaded model is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelInfo {
    /// `general.name`, or the file's name without its ending.
    pub name: String,
    pub architecture: String,
    /// The type that holds most of the file's weights: "Q4_1", "BF16".
    pub precision: String,
    /// Bytes of weights held in memory.
    pub weight_bytes: u64,
    /// Positions a sequence can have, after `max_model_len`.
    pub context_length: usize,
    pub vocab_size: usize,
    pub layers: usize,
    /// blake3, in hex, of the file's header, tensor table and length: tells models apart without reading
    /// all their weights.
    pub fingerprint: String,
}

/// Loads the GGUF file at `path`.
///
/// # Errors
/// When the file cannot be read, is broken, or holds something that is not supported; or the options do not
/// suit the model.
pub fn load(path: &Path, options: &LoadOptions) -> Result<Loaded, LoadError> {
    if options.threads == 0 || options.threads > THREADS_MAX {
        return Err(LoadError::Options(format!(
            "{} threads; choose from 1 to {THREADS_MAX}",
            options.threads
        )));
    }
    if options.quant != Quant::File || options.kv_dtype != KvDtype::F16 {
        return Err(LoadError::Options("other precisions than the file's are not supported yet".into()));
    }
    let file = GgufFile::open(path)?;
    // The tokenizer's tables are built on one thread while the weights are packed on the others.
    let (model, text) = thread::scope(|scope| {
        let text = scope.spawn(|| text_files::from_gguf(&file));
        let model = Decoder::load(&file, Cpu::new(options.threads), options.max_model_len);
        (model, text.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    let (model, Text { tokenizer, template }) = (model?, text?);
    let spec = model.spec();
    if tokenizer.vocab_size() > spec.vocab {
        return Err(LoadError::Tokenizer(format!(
            "it has {} tokens, the embedding {} rows",
            tokenizer.vocab_size(),
            spec.vocab
        )));
    }
    let info = ModelInfo {
        name: name(&file)?,
        architecture: spec.architecture.clone(),
        precision: precision(&file)?,
        weight_bytes: model.weight_bytes(),
        context_length: spec.context,
        vocab_size: spec.vocab,
        layers: spec.layers,
        fingerprint: fingerprint(&file),
    };
    Ok(Loaded { model: Box::new(model), tokenizer: Arc::new(tokenizer), template, info })
}

fn name(file: &GgufFile) -> Result<String, LoadError> {
    let stated = file.find_string("general.name")?.map(str::trim).filter(|name| !name.is_empty());
    let stem = || file.path().file_stem().map(|stem| stem.to_string_lossy().into_owned());
    Ok(stated.map(String::from).or_else(stem).unwrap_or_else(|| "model".into()))
}

/// The type with the most bytes among the layers' tensors.
fn precision(file: &GgufFile) -> Result<String, LoadError> {
    let mut bytes_by_type: Vec<(String, usize)> = Vec::new();
    for name in file.tensor_names().filter(|name| name.starts_with("blk.")) {
        let tensor = file.tensor(name)?;
        let dtype = type_name(tensor.dtype);
        match bytes_by_type.iter_mut().find(|(known, _)| *known == dtype) {
            Some((_, bytes)) => *bytes += tensor.data.len(),
            None => bytes_by_type.push((dtype, tensor.data.len())),
        }
    }
    let most = bytes_by_type.into_iter().max_by(|a, b| a.1.cmp(&b.1).then_with(|| b.0.cmp(&a.0)));
    Ok(most.map_or_else(|| "F32".into(), |(dtype, _)| dtype))
}

fn fingerprint(file: &GgufFile) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(file.header());
    hasher.update(&file.file_bytes().to_le_bytes());
    hasher.finalize().to_hex().to_string()
}
