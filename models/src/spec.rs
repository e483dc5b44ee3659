//! What one model family differs in from another, as data, read from GGUF metadata.
//!
//! Knows no weights beyond the shape of the embedding. Invariant: a `ModelSpec` is consistent (heads divide,
//! sizes are positive and bounded), so what is built from it need not check again.

use obol_kernels::{RopeScaling, RopeStyle};

use crate::error::LoadError;
use crate::gguf::GgufFile;

const SUPPORTED: &str = "llama, qwen2";
/// Bounds far above any real model, so that a broken file cannot ask for absurd tables.
const LAYERS_MAX: u32 = 1 << 10;
const WIDTH_MAX: u32 = 1 << 20;
const CONTEXT_MAX: u32 = 1 << 21;

/// Everything the decoder needs to know about a model besides its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// `general.architecture`.
    pub architecture: String,
    pub layers: usize,
    pub hidden: usize,
    pub ffn: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    /// Positions the model was made for.
    pub context: usize,
    pub rope: RopeSpec,
    pub norm_eps: f32,
    /// q, k and v have a bias.
    pub qkv_bias: bool,
    /// The head is the embedding's matrix.
    pub tied_head: bool,
}

/// How positions are turned into angles.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Leading elements of a head that are rotated.
    pub dim: usize,
    pub base: f32,
    pub style: RopeStyle,
    pub scaling: RopeScaling,
}

impl ModelSpec {
    /// Reads the spec of the model in `file`.
    ///
    /// # Errors
    /// When the architecture is not supported, or a key is missing or contradicts another.
    pub fn from_gguf(file: &GgufFile) -> Result<Self, LoadError> {
        let architecture = file.architecture()?;
        let (style, bias_by_family) = match architecture {
            // Converters permute the rows of q and k of this family for adjacent pairs.
            "llama" => (RopeStyle::Interleaved, false),
            "qwen2" => (RopeStyle::Halves, true),
            other => {
                return Err(LoadError::Architecture { found: other.into(), supported: SUPPORTED });
            }
        };
        let keys = Keys { file, prefix: architecture };
        if keys.find_u32("expert_count")?.unwrap_or(0) > 0 {
            return Err(LoadError::key_value(
                &keys.name("expert_count"),
                "mixtures of experts are not supported",
            ));
        }
        let hidden = keys.size("embedding_length", WIDTH_MAX)?;
        let heads = keys.size("attention.head_count", WIDTH_MAX)?;
        let kv_heads = keys.size_or("attention.head_count_kv", WIDTH_MAX, heads)?;
        if !heads.is_multiple_of(kv_heads) {
            let problem = format!("{kv_heads} kv heads do not divide {heads} heads");
            return Err(LoadError::key_value(&keys.name("attention.head_count_kv"), problem));
        }
        let head_dim = match keys.find_u32("attention.key_length")? {
            Some(_) => keys.size("attention.key_length", WIDTH_MAX)?,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                let problem = format!("{heads} heads do not divide the width {hidden}");
                return Err(LoadError::key_value(&keys.name("attention.head_count"), problem));
            }
        };
        if heads * head_dim > WIDTH_MAX as usize || !head_dim.is_multiple_of(2) {
            let problem = format!("{heads} heads of {head_dim} are not supported");
            return Err(LoadError::key_value(&keys.name("attention.head_count"), problem));
        }
        if keys.size_or("attention.value_length", WIDTH_MAX, head_dim)? != head_dim {
            let problem = "values of another width than keys are not supported";
            return Err(LoadError::key_value(&keys.name("attention.value_length"), problem));
        }
        let vocab = vocab(file, &keys, hidden)?;
        Ok(Self {
            layers: keys.size("block_count", LAYERS_MAX)?,
            hidden,
            ffn: keys.size("feed_forward_length", WIDTH_MAX)?,
            heads,
            kv_heads,
            head_dim,
            vocab,
            context: keys.size("context_length", CONTEXT_MAX)?,
            rope: rope(&keys, head_dim, style)?,
            norm_eps: norm_eps(&keys)?,
            qkv_bias: bias_by_family || file.has_tensor("blk.0.attn_q.bias"),
            tied_head: !file.has_tensor("output.weight"),
            architecture: architecture.into(),
        })
    }
}

fn vocab(file: &GgufFile, keys: &Keys<'_>, hidden: usize) -> Result<usize, LoadError> {
    let shape = file.tensor("token_embd.weight")?.shape;
    let vocab = *shape.first().unwrap_or(&0);
    if shape.len() != 2 || shape[1] != hidden || u32::try_from(vocab).is_err() {
        return Err(LoadError::TensorShape {
            tensor: "token_embd.weight".into(),
            expected: vec![vocab, hidden],
            found: shape,
        });
    }
    match keys.find_u32("vocab_size")? {
        Some(stated) if stated as usize != vocab => {
            let problem = format!("{stated}, but the embedding has {vocab} rows");
            Err(LoadError::key_value(&keys.name("vocab_size"), problem))
        }
        _ => Ok(vocab),
    }
}

fn rope(keys: &Keys<'_>, head_dim: usize, style: RopeStyle) -> Result<RopeSpec, LoadError> {
    let dim = keys.size_or("rope.dimension_count", WIDTH_MAX, head_dim)?;
    if dim > head_dim || !dim.is_multiple_of(2) {
        let problem = format!("{dim} of {head_dim} elements of a head cannot be rotated");
        return Err(LoadError::key_value(&keys.name("rope.dimension_count"), problem));
    }
    let base = keys.find_f32("rope.freq_base")?.unwrap_or(10_000.0);
    if !(base.is_finite() && base > 0.0) {
        return Err(LoadError::key_value(&keys.name("rope.freq_base"), format!("{base} is no base")));
    }
    Ok(RopeSpec { dim, base, style, scaling: rope_scaling(keys, dim)? })
}

fn rope_scaling(keys: &Keys<'_>, dim: usize) -> Result<RopeScaling, LoadError> {
    if keys.file.has_tensor("rope_freqs.weight") {
        let factors = keys.file.tensor_f32("rope_freqs.weight", &[dim / 2])?;
        if factors.iter().any(|factor| !(factor.is_finite() && *factor > 0.0)) {
            return Err(LoadError::TensorData {
                tensor: "rope_freqs.weight".into(),
                problem: "a factor is not a positive number".into(),
            });
        }
        return Ok(RopeScaling::Factors(factors));
    }
    let kind = keys.file.find_string(&keys.name("rope.scaling.type"))?;
    // Files from before `rope.scaling` have the linear factor alone, under this name.
    let factor = match keys.find_f32("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => keys.find_f32("rope.scale_linear")?,
    };
    match (kind, factor) {
        (None | Some("none"), None | Some(1.0)) | (Some("none"), _) => Ok(RopeScaling::None),
        (None | Some("linear"), Some(factor)) if factor.is_finite() && factor > 0.0 => {
            Ok(RopeScaling::Linear(factor))
        }
        (None | Some("linear"), factor) => {
            Err(LoadError::key_value(&keys.name("rope.scaling.factor"), format!("{factor:?} is no factor")))
        }
        (Some(other), _) => {
            let problem = format!("\"{other}\" is not supported; supported: none, linear");
            Err(LoadError::key_value(&keys.name("rope.scaling.type"), problem))
        }
    }
}

fn norm_eps(keys: &Keys<'_>) -> Result<f32, LoadError> {
    let key = keys.name("attention.layer_norm_rms_epsilon");
    let eps = keys.file.f32(&key)?;
    if !(0.0..=1.0).contains(&eps) {
        return Err(LoadError::key_value(&key, format!("{eps} is no epsilon")));
    }
    Ok(eps)
}

/// Metadata under the architecture's name.
struct Keys<'a> {
    file: &'a GgufFile,
    prefix: &'a str,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn find_u32(&self, key: &str) -> Result<Option<u32>, LoadError> {
        self.file.find_u32(&self.name(key))
    }

    fn find_f32(&self, key: &str) -> Result<Option<f32>, LoadError> {
        self.file.find_f32(&self.name(key))
    }

    /// An integer from 1 to `max`.
    fn size(&self, key: &str, max: u32) -> Result<usize, LoadError> {
        let value = self.file.u32(&self.name(key))?;
        if value == 0 || value > max {
            return Err(LoadError::key_value(&self.name(key), format!("{value} is outside 1 to {max}")));
        }
        Ok(value as usize)
    }

    /// As [`Keys::size`], or `default` where the key is absent.
    fn size_or(&self, key: &str, max: u32, default: usize) -> Result<usize, LoadError> {
        match self.find_u32(key)? {
            Some(_) => self.size(key, max),
            None => Ok(default),
        }
    }
}
