//! The families that the one decoder runs, as data: what neither GGUF metadata nor config.json say.
//!
//! Knows no file. A new family is an entry here and a golden test.

use obol_kernels::Act;

use super::{Norm, QkNorm};

/// What all models of a family share.
pub(crate) struct Family {
    /// `model_type` in config.json.
    pub model_type: &'static str,
    /// `general.architecture` in GGUF.
    pub architecture: &'static str,
    /// GGUF's converters permute the rows of q and k for adjacent pairs.
    pub interleaved_in_gguf: bool,
    pub norm: Norm,
    /// Safetensors hold w of norms by 1 + w; GGUF's converters add the 1.
    pub norm_plus_one: bool,
    pub qk_norm: QkNorm,
    pub pre_norms: bool,
    pub post_norms: bool,
    pub biases: Biases,
    pub act: Act,
    pub gated: bool,
    pub positions: Positions,
    /// The embedding is multiplied by the root of its width.
    pub scaled_embedding: bool,
    pub attention_scale: AttentionScale,
    /// Scores may be capped.
    pub attention_softcap: bool,
    pub windows: Windows,
    pub experts: Experts,
    /// The head is the embedding where config.json does not say.
    pub tied: bool,
    /// Values of config.json where it does not have the key.
    pub defaults: &'static [(&'static str, f64)],
}

/// Which projections have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Biases {
    None,
    /// q, k and v.
    Qkv,
    /// config.json says so: `attention_bias` of q, k, v and the output, `mlp_bias` of the MLP.
    Stated,
    All,
}

/// How a row knows its position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Positions {
    Rope,
    /// Rope of a leading part of each head.
    PartialRope,
    /// Rope, but for every fourth layer where nothing else is said.
    RopeButEveryFourth,
    /// Rope with another base in layers with a window.
    RopeByWindow,
    /// A table that is added to the embedding.
    Learned,
}

/// The factor on the scores; 1 / sqrt(head_dim) where the model states none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AttentionScale {
    HeadDim,
    /// 1 / sqrt(`query_pre_attn_scalar`). GGUF does not hold it; it is the width over the heads for the
    /// largest of the family, which has this many layers, and head_dim for the others.
    QueryScalar {
        largest_layers: usize,
    },
    /// As stated: `attention_multiplier`, `attention.scale`.
    Multiplier,
}

/// Which layers have the sliding window, if the model states one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Windows {
    /// The family has none.
    None,
    /// All layers.
    All,
    /// All layers where `use_sliding_window` says so.
    AllIfUsed,
    /// Where `use_sliding_window` says so, those from `max_window_layers` on.
    FromIfUsed,
    /// Where `use_sliding_window` says so, those without rope.
    UnrotatedIfUsed,
    /// All but each n-th.
    ButEach(usize),
}

/// Whether MLPs are mixtures of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Experts {
    None,
    /// In all layers, weights made to sum to 1.
    All,
    /// In the layers and in the manner that config.json says.
    Stated,
}

const LLAMA: Family = Family {
    model_type: "llama",
    architecture: "llama",
    interleaved_in_gguf: true,
    norm: Norm::Rms,
    norm_plus_one: false,
    qk_norm: QkNorm::None,
    pre_norms: true,
    post_norms: false,
    biases: Biases::Stated,
    act: Act::Silu,
    gated: true,
    positions: Positions::Rope,
    scaled_embedding: false,
    attention_scale: AttentionScale::HeadDim,
    attention_softcap: false,
    windows: Windows::None,
    experts: Experts::None,
    tied: false,
    defaults: &[],
};

const QWEN2: Family = Family {
    model_type: "qwen2",
    architecture: "qwen2",
    interleaved_in_gguf: false,
    biases: Biases::Qkv,
    windows: Windows::FromIfUsed,
    defaults: &[("sliding_window", 4096.0), ("max_window_layers", 28.0)],
    ..LLAMA
};

const QWEN3: Family = Family {
    model_type: "qwen3",
    architecture: "qwen3",
    qk_norm: QkNorm::Heads,
    biases: Biases::Stated,
    defaults: &[("head_dim", 128.0), ("sliding_window", 4096.0), ("max_window_layers", 28.0)],
    ..QWEN2
};

const MISTRAL: Family = Family {
    model_type: "mistral",
    biases: Biases::None,
    windows: Windows::All,
    defaults: &[("sliding_window", 4096.0)],
    ..LLAMA
};

const GEMMA: Family = Family {
    model_type: "gemma",
    architecture: "gemma",
    interleaved_in_gguf: false,
    norm_plus_one: true,
    act: Act::GeluTanh,
    scaled_embedding: true,
    tied: true,
    defaults: &[("head_dim", 256.0)],
    ..LLAMA
};

const GEMMA2: Family = Family {
    model_type: "gemma2",
    architecture: "gemma2",
    post_norms: true,
    attention_scale: AttentionScale::QueryScalar { largest_layers: 46 },
    attention_softcap: true,
    windows: Windows::ButEach(2),
    defaults: &[
        ("head_dim", 256.0),
        ("query_pre_attn_scalar", 256.0),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("sliding_window", 4096.0),
    ],
    ..GEMMA
};

const GEMMA3: Family = Family {
    model_type: "gemma3_text",
    architecture: "gemma3",
    qk_norm: QkNorm::Heads,
    positions: Positions::RopeByWindow,
    attention_scale: AttentionScale::QueryScalar { largest_layers: 62 },
    attention_softcap: false,
    windows: Windows::ButEach(6),
    // The published files leave out whatever is as in the configuration class.
    defaults: &[
        ("vocab_size", 262_208.0),
        ("hidden_size", 2304.0),
        ("intermediate_size", 9216.0),
        ("num_hidden_layers", 26.0),
        ("num_attention_heads", 8.0),
        ("num_key_value_heads", 4.0),
        ("head_dim", 256.0),
        ("max_position_embeddings", 131_072.0),
        ("rms_norm_eps", 1e-6),
        ("query_pre_attn_scalar", 256.0),
        ("sliding_window", 4096.0),
        ("rope_theta", 1e6),
        ("rope_local_base_freq", 1e4),
    ],
    ..GEMMA2
};

/// Every family; of those with one architecture the first is GGUF's.
pub(crate) const FAMILIES: [Family; 14] = [
    LLAMA,
    QWEN2,
    QWEN3,
    Family {
        model_type: "qwen3_moe",
        architecture: "qwen3moe",
        windows: Windows::AllIfUsed,
        experts: Experts::Stated,
        defaults: &[("sliding_window", 4096.0)],
        ..QWEN3
    },
    MISTRAL,
    Family { model_type: "mixtral", experts: Experts::All, defaults: &[("rope_theta", 1e6)], ..MISTRAL },
    GEMMA,
    GEMMA2,
    GEMMA3,
    Family {
        model_type: "phi3",
        architecture: "phi3",
        interleaved_in_gguf: false,
        positions: Positions::PartialRope,
        windows: Windows::All,
        biases: Biases::None,
        ..LLAMA
    },
    Family {
        model_type: "granite",
        architecture: "granite",
        attention_scale: AttentionScale::Multiplier,
        ..LLAMA
    },
    Family {
        model_type: "olmo2",
        architecture: "olmo2",
        interleaved_in_gguf: false,
        qk_norm: QkNorm::Full,
        pre_norms: false,
        post_norms: true,
        ..LLAMA
    },
    Family {
        model_type: "smollm3",
        architecture: "smollm3",
        positions: Positions::RopeButEveryFourth,
        windows: Windows::UnrotatedIfUsed,
        tied: true,
        defaults: &[("rope_theta", 2e6)],
        ..LLAMA
    },
    Family {
        model_type: "gpt2",
        architecture: "gpt2",
        interleaved_in_gguf: false,
        norm: Norm::Layer,
        biases: Biases::All,
        act: Act::GeluTanh,
        gated: false,
        positions: Positions::Learned,
        tied: true,
        ..LLAMA
    },
];

impl Family {
    /// The family's value of a key of config.json.
    pub(super) fn default_of(&self, key: &str) -> Option<f64> {
        self.defaults.iter().find(|(name, _)| *name == key).map(|&(_, value)| value)
    }
}
