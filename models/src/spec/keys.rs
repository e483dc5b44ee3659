//! The sizes and factors that both kinds of file state, under each one's names, and their checks.
//!
//! Knows no file but through [`Source`]. Invariant: what comes out of here is positive, bounded and fits
//! together.

use crate::error::LoadError;

use super::family::{Experts, Family};
use super::{ExpertsSpec, FfnSpec};

/// Bounds far above any real model, so that a broken file cannot ask for absurd tables.
pub(super) const LAYERS_MAX: u32 = 1 << 10;
pub(super) const WIDTH_MAX: u32 = 1 << 20;
pub(super) const CONTEXT_MAX: u32 = 1 << 21;
const VOCAB_MAX: u32 = 1 << 24;
const EXPERTS_MAX: u32 = 1 << 10;

/// A value's key in GGUF, after the architecture's name, and its names in config.json.
pub(super) struct Key {
    pub gguf: &'static str,
    pub config: &'static [&'static str],
}

macro_rules! keys {
    ($($name:ident = $gguf:literal, [$($config:literal),*];)*) => {
        $(pub(super) const $name: Key = Key { gguf: $gguf, config: &[$($config),*] };)*
    };
}

keys! {
    LAYERS = "block_count", ["num_hidden_layers", "n_layer"];
    HIDDEN = "embedding_length", ["hidden_size", "n_embd"];
    FFN = "feed_forward_length", ["intermediate_size", "n_inner"];
    HEADS = "attention.head_count", ["num_attention_heads", "n_head"];
    KV_HEADS = "attention.head_count_kv", ["num_key_value_heads"];
    HEAD_DIM = "attention.key_length", ["head_dim"];
    CONTEXT = "context_length", ["max_position_embeddings", "n_positions"];
    VOCAB = "vocab_size", ["vocab_size"];
    RMS_EPS = "attention.layer_norm_rms_epsilon", ["rms_norm_eps"];
    LAYER_EPS = "attention.layer_norm_epsilon", ["layer_norm_epsilon"];
    WINDOW = "attention.sliding_window", ["sliding_window"];
    ATTENTION_SCALE = "attention.scale", ["attention_multiplier"];
    ATTENTION_SOFTCAP = "attn_logit_softcapping", ["attn_logit_softcapping"];
    EMBEDDING_SCALE = "embedding_scale", ["embedding_multiplier"];
    RESIDUAL_SCALE = "residual_scale", ["residual_multiplier"];
    LOGITS_SCALE = "logit_scale", ["logits_scaling"];
    LOGITS_SOFTCAP = "final_logit_softcapping", ["final_logit_softcapping"];
    EXPERTS = "expert_count", ["num_local_experts", "num_experts"];
    EXPERTS_USED = "expert_used_count", ["num_experts_per_tok"];
    EXPERT_FFN = "expert_feed_forward_length", ["moe_intermediate_size"];
    EXPERTS_NORMALIZED = "expert_weights_norm", ["norm_topk_prob"];
    ROPE_DIM = "rope.dimension_count", ["partial_rotary_factor"];
    ROPE_BASE = "rope.freq_base", ["rope_theta"];
}

/// Where values come from; none where the key is absent.
pub(super) trait Source {
    fn find_u32(&self, key: &Key) -> Result<Option<u32>, LoadError>;
    fn find_f32(&self, key: &Key) -> Result<Option<f32>, LoadError>;
    fn find_bool(&self, key: &Key) -> Result<Option<bool>, LoadError>;
    fn missing(&self, key: &Key) -> LoadError;
    /// A value that has the right type but makes no sense.
    fn bad(&self, key: &Key, problem: String) -> LoadError;

    /// An integer from 1 to `max`, if there.
    fn find_size(&self, key: &Key, max: u32) -> Result<Option<usize>, LoadError> {
        match self.find_u32(key)? {
            Some(value) if value == 0 || value > max => {
                Err(self.bad(key, format!("{value} is outside 1 to {max}")))
            }
            found => Ok(found.map(|value| value as usize)),
        }
    }

    fn size(&self, key: &Key, max: u32) -> Result<usize, LoadError> {
        self.find_size(key, max)?.ok_or_else(|| self.missing(key))
    }

    /// A positive number, if there.
    fn find_factor(&self, key: &Key) -> Result<Option<f32>, LoadError> {
        match self.find_f32(key)? {
            Some(value) if !(value.is_finite() && value > 0.0) => {
                Err(self.bad(key, format!("{value} is no factor")))
            }
            found => Ok(found),
        }
    }

    fn epsilon(&self, key: &Key) -> Result<f32, LoadError> {
        let eps = self.find_f32(key)?.ok_or_else(|| self.missing(key))?;
        if !(0.0..=1.0).contains(&eps) {
            return Err(self.bad(key, format!("{eps} is no epsilon")));
        }
        Ok(eps)
    }
}

/// What every file states.
pub(super) struct Sizes {
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub ffn: usize,
    pub context: usize,
}

impl Sizes {
    /// Reads and checks them.
    pub(super) fn read(source: &dyn Source, family: &Family) -> Result<Self, LoadError> {
        let hidden = source.size(&HIDDEN, WIDTH_MAX)?;
        let heads = source.size(&HEADS, WIDTH_MAX)?;
        let kv_heads = source.find_size(&KV_HEADS, WIDTH_MAX)?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(source.bad(&KV_HEADS, format!("{kv_heads} kv heads do not divide {heads} heads")));
        }
        let head_dim = match source.find_size(&HEAD_DIM, WIDTH_MAX)? {
            Some(head_dim) => head_dim,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                return Err(source.bad(&HEADS, format!("{heads} heads do not divide the width {hidden}")));
            }
        };
        if heads * head_dim > WIDTH_MAX as usize || !head_dim.is_multiple_of(2) {
            return Err(source.bad(&HEADS, format!("{heads} heads of {head_dim} are not supported")));
        }
        let ffn = match source.find_size(&FFN, WIDTH_MAX)? {
            Some(ffn) => ffn,
            // Ungated MLPs are four times as wide where nothing else is said.
            None if !family.gated => 4 * hidden,
            None => return Err(source.missing(&FFN)),
        };
        let layers = source.size(&LAYERS, LAYERS_MAX)?;
        let context = source.size(&CONTEXT, CONTEXT_MAX)?;
        Ok(Self { layers, hidden, heads, kv_heads, head_dim, ffn, context })
    }

    /// Each layer's MLP; `sparse` says which layers are mixtures, if any is, and `normalized` whether their
    /// weights are made to sum to 1 where the file does not say.
    pub(super) fn ffns(
        &self,
        source: &dyn Source,
        family: &Family,
        normalized: bool,
        sparse: impl Fn(usize) -> bool,
    ) -> Result<Vec<FfnSpec>, LoadError> {
        let count = source.find_u32(&EXPERTS)?.unwrap_or(0);
        let dense = FfnSpec::Dense { width: self.ffn };
        if family.experts == Experts::None && count > 0 {
            let problem = format!("{count} experts: a {} model has none", family.model_type);
            return Err(source.bad(&EXPERTS, problem));
        }
        if family.experts == Experts::None {
            return Ok(vec![dense; self.layers]);
        }
        let count = source.size(&EXPERTS, EXPERTS_MAX)?;
        let used = source.size(&EXPERTS_USED, EXPERTS_MAX)?;
        if used > count {
            return Err(source.bad(&EXPERTS_USED, format!("{used} of {count} experts")));
        }
        let experts = match family.experts {
            Experts::Stated => ExpertsSpec {
                count,
                used,
                width: source.size(&EXPERT_FFN, WIDTH_MAX)?,
                normalized: source.find_bool(&EXPERTS_NORMALIZED)?.unwrap_or(normalized),
            },
            _ => ExpertsSpec { count, used, width: self.ffn, normalized: true },
        };
        let each = |layer| if sparse(layer) { FfnSpec::Experts(experts) } else { dense };
        Ok((0..self.layers).map(each).collect())
    }
}

/// Rows of the embedding, as the file states them; none where it does not.
pub(super) fn find_vocab(source: &dyn Source) -> Result<Option<usize>, LoadError> {
    source.find_size(&VOCAB, VOCAB_MAX)
}
