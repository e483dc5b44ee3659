//! A model file to everything that serving needs: weights, tokenizer, chat template, and what it is.
//!
//! Knows the order in which the parts are read and nothing of their insides.

use std::path::Path;
use std::sync::Arc;
use std::thread;

use obol_kernels::{Cpu, KvDtype};

use crate::batch::CausalLm;
use crate::chat_template::ChatTemplate;
use crate::cut::Rank;
use crate::decoder::{Decoder, TensorParallel, Weights};
use crate::device::{ComputeDtype, DeviceId};
use crate::error::LoadError;
use crate::model_files::ModelFiles;
use crate::quant::Quant;
use crate::text_files::Text;
use crate::tokenizer::Tokenizer;

/// More threads than any machine has.
const THREADS_MAX: usize = 1024;

/// What can be chosen at loading.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// Threads that compute, the caller's included: divided among the devices, each of which has at least one.
    pub threads: usize,
    /// Devices that compute each layer together; of CUDA devices `device` and those behind it.
    pub tensor_parallel: usize,
    /// Largest number of positions in a sequence, if less than the model's.
    pub max_model_len: Option<usize>,
    /// What becomes of the file's weights.
    pub quant: Quant,
    /// The KV cache's type.
    pub kv_dtype: KvDtype,
    /// Where the model computes.
    pub device: DeviceId,
    /// The type of activations, on a device that has a choice; none: the weights' own.
    pub dtype: Option<ComputeDtype>,
    /// Decode steps are launched as recorded graphs, on a device that can.
    pub graphs: bool,
}

impl Default for LoadOptions {
    /// One thread a core that this process may use, the model's whole context.
    fn default() -> Self {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        Self {
            threads,
            tensor_parallel: 1,
            max_model_len: None,
            quant: Quant::default(),
            kv_dtype: KvDtype::default(),
            device: DeviceId::Cpu(0),
            dtype: None,
            graphs: true,
        }
    }
}

/// A model ready to serve, but for its KV pool.
pub struct Loaded {
    pub model: Box<dyn CausalLm>,
    /// The same model on further devices.
    pub replicas: Vec<Box<dyn CausalLm>>,
    pub tokenizer: Arc<Tokenizer>,
    /// The file's own, else ChatML where the vocabulary has its markers, else none.
    pub template: Option<ChatTemplate>,
    pub info: ModelInfo,
}

/// What a loaded model is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelInfo {
    /// What the files call it, else their name without its ending.
    pub name: String,
    pub architecture: String,
    /// The type that holds most of the file's weights: "Q4_1", "BF16"; or the one they were turned into:
    /// "int8".
    pub precision: String,
    /// Bytes of weights held in memory.
    pub weight_bytes: u64,
    /// Positions a sequence can have, after `max_model_len`.
    pub context_length: usize,
    pub vocab_size: usize,
    pub layers: usize,
    /// As [`ModelFiles::fingerprint`].
    pub fingerprint: String,
    /// What computes, and how: changes when its speed may.
    pub device: String,
}

/// Loads the GGUF file, or the directory of config.json and safetensors, at `path`.
///
/// # Errors
/// When the file cannot be read, is broken, or holds something that is not supported; or the options do not
/// suit the model.
pub fn load(path: &Path, options: &LoadOptions) -> Result<Loaded, LoadError> {
    load_replicas(path, options, &[])
}

/// As [`load`], and the same on each of `further` devices, of the first one's kind; on the CPU all read the same
/// weights, and each has `options.threads` threads.
///
/// # Errors
/// As [`load`].
pub fn load_replicas(path: &Path, options: &LoadOptions, further: &[DeviceId]) -> Result<Loaded, LoadError> {
    if options.threads == 0 || options.threads > THREADS_MAX {
        return Err(LoadError::Options(format!(
            "{} threads; choose from 1 to {THREADS_MAX}",
            options.threads
        )));
    }
    let files = ModelFiles::open(path)?;
    // The tokenizer's tables are built on one thread while the weights are packed on the others.
    let (weights, text) = thread::scope(|scope| {
        let text = scope.spawn(|| files.text());
        let cpu = Cpu::new(options.threads);
        let weights = Weights::load(&files, &cpu, options).map(|weights| (weights, cpu));
        (weights, text.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    let ((weights, cpu), Text { tokenizer, template }) = (weights?, text?);
    let spec = weights.spec();
    if tokenizer.vocab_size() > spec.vocab {
        return Err(LoadError::Tokenizer(format!(
            "it has {} tokens, the embedding {} rows; they are not of one model",
            tokenizer.vocab_size(),
            spec.vocab
        )));
    }
    let mut info = ModelInfo {
        name: files.name()?,
        architecture: spec.architecture.clone(),
        precision: match options.quant {
            Quant::File => files.precision()?,
            quant => quant.name().into(),
        },
        weight_bytes: weights.bytes(),
        context_length: spec.context,
        vocab_size: spec.vocab,
        layers: spec.layers.len(),
        fingerprint: files.fingerprint(),
        device: match options.tensor_parallel {
            1 => "cpu".into(),
            ranks => format!("cpu x{ranks}"),
        },
    };
    if let DeviceId::Cuda(ordinal) = options.device {
        let model = on_cuda(weights, ordinal, options, &mut info)?;
        let more = further.iter().map(|&device| {
            let DeviceId::Cuda(ordinal) = device else {
                return Err(LoadError::Options(format!(
                    "{device} beside {}; name devices of one kind",
                    options.device
                )));
            };
            let weights = Weights::load(&files, &cpu, options)?;
            on_cuda(weights, ordinal, options, &mut info.clone())
        });
        let replicas = more.collect::<Result<_, _>>()?;
        return Ok(Loaded { model, replicas, tokenizer: Arc::new(tokenizer), template, info });
    }
    let weights = Arc::new(weights);
    let replicas = further.iter().map(|_| on_cpu(&weights, Cpu::new(options.threads), options)).collect();
    let model = on_cpu(&weights, cpu, options);
    Ok(Loaded { model, replicas, tokenizer: Arc::new(tokenizer), template, info })
}

/// A model that computes with `cpu`, or with as many threads divided among its ranks.
fn on_cpu(weights: &Arc<Weights>, cpu: Cpu, options: &LoadOptions) -> Box<dyn CausalLm> {
    match options.tensor_parallel {
        1 => Box::new(Decoder::new(Arc::clone(weights), cpu)),
        ranks => Box::new(TensorParallel::new(weights, divide(options.threads, ranks))),
    }
}

#[cfg(feature = "cuda")]
fn on_cuda(
    weights: Weights,
    ordinal: usize,
    options: &LoadOptions,
    info: &mut ModelInfo,
) -> Result<Box<dyn CausalLm>, LoadError> {
    if options.tensor_parallel > 1 {
        let ordinals: Vec<usize> = (ordinal..ordinal + options.tensor_parallel).collect();
        let model = crate::decoder::CudaTensorParallel::new(weights, &ordinals, options)?;
        info.weight_bytes = model.weight_bytes();
        info.device = model.device();
        return Ok(Box::new(model));
    }
    let model = crate::decoder::CudaDecoder::new(weights, ordinal, options)?;
    info.weight_bytes = model.weight_bytes();
    info.device = model.device();
    Ok(Box::new(model))
}

#[cfg(not(feature = "cuda"))]
fn on_cuda(
    _weights: Weights,
    ordinal: usize,
    _options: &LoadOptions,
    _info: &mut ModelInfo,
) -> Result<Box<dyn CausalLm>, LoadError> {
    let missing = crate::device::cuda_facts(ordinal).err().unwrap_or_default();
    Err(LoadError::Device(missing))
}

/// `threads` divided among so many devices, as evenly as can be; each has at least one.
fn divide(threads: usize, devices: usize) -> Vec<Cpu> {
    Rank::all(devices).map(|rank| Cpu::new(rank.share(threads).len().max(1))).collect()
}
