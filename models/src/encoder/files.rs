//! An encoder's files: its sizes and weights, as Hugging Face and sentence-transformers name them.

use std::path::{Path, PathBuf};

use half::{bf16, f16};
use obol_kernels::{Act, Cpu, Dense, DenseData};
use safetensors::tensor::Dtype;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::error::LoadError;
use crate::safetensors::Safetensors;

/// Bounds far above any real encoder, so that a broken file cannot ask for absurd buffers.
const WIDTH_MAX: usize = 1 << 16;
const LAYERS_MAX: usize = 1 << 10;
const CONTEXT_MAX: usize = 1 << 16;

/// What of config.json an encoder needs.
#[derive(Debug, Deserialize)]
struct Config {
    model_type: String,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    max_position_embeddings: usize,
    vocab_size: usize,
    #[serde(default = "gelu")]
    hidden_act: String,
    #[serde(default = "eps")]
    layer_norm_eps: f32,
    #[serde(default = "absolute")]
    position_embedding_type: String,
}

fn gelu() -> String {
    "gelu".into()
}

fn eps() -> f32 {
    1e-12
}

fn absolute() -> String {
    "absolute".into()
}

/// What of `1_Pooling/config.json`.
#[derive(Debug, Deserialize)]
struct PoolingConfig {
    #[serde(default)]
    pooling_mode_cls_token: bool,
    #[serde(default)]
    pooling_mode_mean_tokens: bool,
}

/// What of `sentence_bert_config.json`.
#[derive(Debug, Deserialize)]
struct SentenceConfig {
    max_seq_length: Option<usize>,
}

/// Which hidden states a text's vector is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EncoderPooling {
    Mean,
    First,
}

/// A matrix with its bias.
pub(super) struct Project {
    weight: Dense,
    bias: Vec<f32>,
}

/// A norm with its bias.
pub(super) struct LayerNorm {
    weight: Vec<f32>,
    bias: Vec<f32>,
    eps: f32,
}

pub(super) struct Layer {
    /// q, k and v, side by side.
    pub(super) qkv: Project,
    pub(super) out: Project,
    pub(super) attention_norm: LayerNorm,
    pub(super) up: Project,
    pub(super) down: Project,
    pub(super) norm: LayerNorm,
}

/// All that an encoder is; several may read the same.
pub struct EncoderWeights {
    pub(super) vocab: usize,
    pub(super) width: usize,
    pub(super) heads: usize,
    /// Most tokens of a text.
    pub(super) context: usize,
    pub(super) act: Act,
    pub(super) pooling: EncoderPooling,
    pub(super) words: Dense,
    /// (context, width) the embedding of each position and of the first token type together.
    pub(super) places: Vec<f32>,
    pub(super) norm: LayerNorm,
    pub(super) layers: Vec<Layer>,
    pub(super) precision: String,
    pub(super) fingerprint: String,
}

impl Project {
    /// y = x w^T + b for rows of x.
    pub(super) fn forward(&self, cpu: &Cpu, x: &[f32], y: &mut [f32]) {
        cpu.matmul_dense(x, &self.weight, Some(&self.bias), y);
    }

    /// Columns of its output.
    pub(super) fn width(&self) -> usize {
        self.weight.n()
    }

    fn bytes(&self) -> usize {
        self.weight.bytes() + self.bias.len() * 4
    }
}

impl LayerNorm {
    pub(super) fn apply(&self, cpu: &Cpu, x: &[f32], out: &mut [f32]) {
        cpu.layer_norm(x, &self.weight, Some(&self.bias), self.eps, out);
    }

    fn bytes(&self) -> usize {
        (self.weight.len() + self.bias.len()) * 4
    }
}

impl EncoderWeights {
    /// Reads the directory.
    ///
    /// # Errors
    /// When a file is missing or broken, or the model is no BERT.
    pub fn load(directory: &Path) -> Result<Self, LoadError> {
        let file = directory.join("config.json");
        let (config, text): (Config, _) = read(&file)?.ok_or_else(|| LoadError::Directory {
            directory: directory.into(),
            missing: "config.json; download it".into(),
        })?;
        config.check(&file)?;
        let act = config.act(&file)?;
        let file = directory.join("1_Pooling/config.json");
        let pooling = read::<PoolingConfig>(&file)?;
        let pooling = match &pooling {
            None => EncoderPooling::Mean,
            Some((modes, _)) => match (modes.pooling_mode_mean_tokens, modes.pooling_mode_cls_token) {
                (true, false) => EncoderPooling::Mean,
                (false, true) => EncoderPooling::First,
                _ => {
                    let problem =
                        "says neither mean nor cls alone; other kinds of pooling are not supported".into();
                    return Err(LoadError::File { file, problem });
                }
            },
        };
        let sentence = read::<SentenceConfig>(&directory.join("sentence_bert_config.json"))?;
        let longest = sentence.and_then(|(sentence, _)| sentence.max_seq_length);
        let context =
            longest.unwrap_or(config.max_position_embeddings).clamp(1, config.max_position_embeddings);
        let tensors = Safetensors::open(directory)?;
        let mut hasher = blake3::Hasher::new();
        for header in tensors.headers() {
            hasher.update(header);
        }
        hasher.update(&text);
        hasher.update(&tensors.file_bytes().to_le_bytes());
        let reader = Reader::new(&tensors, config.layer_norm_eps);
        let width = config.hidden_size;
        let words = reader.dense("embeddings.word_embeddings", config.vocab_size, width)?;
        let positions = config.max_position_embeddings;
        let mut places = reader.values("embeddings.position_embeddings.weight", &[positions, width])?;
        places.truncate(context * width);
        let kind = reader.first_row("embeddings.token_type_embeddings.weight", width)?;
        for row in places.chunks_exact_mut(width) {
            row.iter_mut().zip(&kind).for_each(|(value, kind)| *value += kind);
        }
        let layers = (0..config.num_hidden_layers).map(|index| reader.layer(index, &config));
        Ok(Self {
            vocab: config.vocab_size,
            width,
            heads: config.num_attention_heads,
            context,
            act,
            pooling,
            places,
            norm: reader.norm("embeddings.LayerNorm", width)?,
            layers: layers.collect::<Result<_, _>>()?,
            precision: reader.precision(&words),
            words,
            fingerprint: hasher.finalize().to_hex().to_string(),
        })
    }

    /// Held in memory.
    pub(super) fn bytes(&self) -> u64 {
        let layer = |layer: &Layer| {
            let Layer { qkv, out, attention_norm, up, down, norm } = layer;
            let projects: usize = [qkv, out, up, down].map(Project::bytes).iter().sum();
            projects + attention_norm.bytes() + norm.bytes()
        };
        let layers: usize = self.layers.iter().map(layer).sum();
        (self.words.bytes() + self.places.len() * 4 + self.norm.bytes() + layers) as u64
    }
}

impl Config {
    fn check(&self, file: &Path) -> Result<(), LoadError> {
        let wrong = |key: &str, problem: String| {
            Err(LoadError::ConfigValue { file: file.into(), key: key.into(), problem })
        };
        if self.model_type != "bert" {
            let problem = format!("{:?}: embedding models of the type bert are supported", self.model_type);
            return wrong("model_type", problem);
        }
        if self.position_embedding_type != "absolute" {
            return wrong(
                "position_embedding_type",
                format!("{:?} is not supported", self.position_embedding_type),
            );
        }
        let sizes = [
            ("hidden_size", self.hidden_size, WIDTH_MAX),
            ("intermediate_size", self.intermediate_size, WIDTH_MAX),
            ("num_hidden_layers", self.num_hidden_layers, LAYERS_MAX),
            ("num_attention_heads", self.num_attention_heads, WIDTH_MAX),
            ("max_position_embeddings", self.max_position_embeddings, CONTEXT_MAX),
            ("vocab_size", self.vocab_size, 1 << 24),
        ];
        if let Some((key, size, most)) = sizes.into_iter().find(|(_, size, most)| !(1..=*most).contains(size))
        {
            return wrong(key, format!("{size} is not between 1 and {most}"));
        }
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            let problem = format!("{} heads do not share {}", self.num_attention_heads, self.hidden_size);
            return wrong("num_attention_heads", problem);
        }
        Ok(())
    }

    fn act(&self, file: &Path) -> Result<Act, LoadError> {
        match self.hidden_act.as_str() {
            "gelu" => Ok(Act::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" => Ok(Act::GeluTanh),
            "silu" => Ok(Act::Silu),
            other => Err(LoadError::ConfigValue {
                file: file.into(),
                key: "hidden_act".into(),
                problem: format!("{other:?} is not supported; gelu, gelu_new and silu are"),
            }),
        }
    }
}

/// The JSON file, if it is there, and its bytes.
fn read<T: DeserializeOwned>(file: &PathBuf) -> Result<Option<(T, Vec<u8>)>, LoadError> {
    let bytes = match std::fs::read(file) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(LoadError::Io { path: file.clone(), source }),
    };
    match serde_json::from_slice(&bytes) {
        Ok(value) => Ok(Some((value, bytes))),
        Err(error) => {
            Err(LoadError::File { file: file.clone(), problem: format!("{error}; download it again") })
        }
    }
}

/// Tensors by their names, which may begin with `bert.`.
struct Reader<'a> {
    tensors: &'a Safetensors,
    prefix: &'static str,
    eps: f32,
}

impl<'a> Reader<'a> {
    fn new(tensors: &'a Safetensors, eps: f32) -> Self {
        let prefixed = tensors.find_raw("bert.embeddings.word_embeddings.weight").is_some();
        Self { tensors, prefix: if prefixed { "bert." } else { "" }, eps }
    }

    fn data(&self, name: &str, shape: &[usize]) -> Result<DenseData, LoadError> {
        let name = format!("{}{name}", self.prefix);
        let raw = self.tensors.find_raw(&name).ok_or_else(|| LoadError::MissingTensor(name.clone()))?;
        if raw.shape != shape {
            let (expected, found) = (shape.to_vec(), raw.shape.to_vec());
            return Err(LoadError::TensorShape { tensor: name, expected, found });
        }
        let pairs = raw.data.chunks_exact(2).map(|bytes| [bytes[0], bytes[1]]);
        match raw.dtype {
            Dtype::F32 => {
                let fours = raw.data.chunks_exact(4);
                Ok(DenseData::F32(fours.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()))
            }
            Dtype::F16 => Ok(DenseData::F16(pairs.map(f16::from_le_bytes).collect())),
            Dtype::BF16 => Ok(DenseData::Bf16(pairs.map(bf16::from_le_bytes).collect())),
            other => Err(LoadError::TensorType {
                tensor: name,
                dtype: format!("{other:?}"),
                supported: "F32, F16, BF16",
            }),
        }
    }

    fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, LoadError> {
        Ok(match self.data(name, shape)? {
            DenseData::F32(values) => values,
            DenseData::F16(values) => values.into_iter().map(f16::to_f32).collect(),
            DenseData::Bf16(values) => values.into_iter().map(bf16::to_f32).collect(),
        })
    }

    /// The first row of a matrix with any number of them.
    fn first_row(&self, name: &str, width: usize) -> Result<Vec<f32>, LoadError> {
        let found = self.tensors.find_raw(&format!("{}{name}", self.prefix));
        let rows = found.and_then(|raw| raw.shape.first().copied()).unwrap_or(1).max(1);
        let mut values = self.values(name, &[rows, width])?;
        values.truncate(width);
        Ok(values)
    }

    fn dense(&self, name: &str, n: usize, k: usize) -> Result<Dense, LoadError> {
        Ok(Dense::new(n, k, self.data(&format!("{name}.weight"), &[n, k])?))
    }

    fn project(&self, name: &str, n: usize, k: usize) -> Result<Project, LoadError> {
        Ok(Project { weight: self.dense(name, n, k)?, bias: self.values(&format!("{name}.bias"), &[n])? })
    }

    fn norm(&self, name: &str, width: usize) -> Result<LayerNorm, LoadError> {
        let weight = self.values(&format!("{name}.weight"), &[width])?;
        Ok(LayerNorm { weight, bias: self.values(&format!("{name}.bias"), &[width])?, eps: self.eps })
    }

    fn layer(&self, index: usize, config: &Config) -> Result<Layer, LoadError> {
        let (width, wide) = (config.hidden_size, config.intermediate_size);
        let of = |name: &str| format!("encoder.layer.{index}.{name}");
        let (mut weight, mut bias) = (Vec::new(), Vec::new());
        for part in ["query", "key", "value"] {
            let name = of(&format!("attention.self.{part}"));
            weight.extend(self.values(&format!("{name}.weight"), &[width, width])?);
            bias.extend(self.values(&format!("{name}.bias"), &[width])?);
        }
        Ok(Layer {
            qkv: Project { weight: Dense::new(3 * width, width, DenseData::F32(weight)), bias },
            out: self.project(&of("attention.output.dense"), width, width)?,
            attention_norm: self.norm(&of("attention.output.LayerNorm"), width)?,
            up: self.project(&of("intermediate.dense"), wide, width)?,
            down: self.project(&of("output.dense"), width, wide)?,
            norm: self.norm(&of("output.LayerNorm"), width)?,
        })
    }

    fn precision(&self, words: &Dense) -> String {
        match words.data() {
            DenseData::F32(_) => "F32",
            DenseData::F16(_) => "F16",
            DenseData::Bf16(_) => "BF16",
        }
        .into()
    }
}
