//! What one model differs in from another, as data: everything the decoder must know besides the weights.
//!
//! Read from GGUF metadata (`gguf`) or a config.json (`config`), both on top of the model's family
//! (`family`). Knows no weights beyond the names and shapes of a few. Invariant: a `ModelSpec` is consistent
//! (heads divide, sizes are positive and bounded, every layer's rope exists), so what is built from it need
//! not check again.

pub(crate) mod config;
pub(crate) mod family;
mod gguf;
mod keys;
mod rope;

use obol_kernels::Act;

pub(crate) use family::Family;
pub use rope::{RopeScaling, RopeSpec};

/// Everything the decoder needs to know about a model besides its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// `general.architecture`, or config.json's `model_type`.
    pub architecture: String,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    /// Positions the model was made for.
    pub context: usize,
    pub layers: Vec<LayerSpec>,
    /// The tables that layers choose from.
    pub ropes: Vec<RopeSpec>,
    /// Rows of the table of learned positions, where the model has one.
    pub learned_positions: Option<usize>,
    pub norm: Norm,
    pub norm_eps: f32,
    /// What the file's norm weights lack: 1 where it holds w of 1 + w.
    pub norm_offset: f32,
    pub qk_norm: QkNorm,
    /// Norms before attention and before the MLP.
    pub pre_norms: bool,
    /// Norms of what attention and MLP add to the residual.
    pub post_norms: bool,
    /// q, k and v have a bias.
    pub qkv_bias: bool,
    /// Attention's output projection has a bias.
    pub output_bias: bool,
    /// The MLP's projections have a bias.
    pub ffn_bias: bool,
    pub act: Act,
    /// The activation multiplies a second projection.
    pub gated: bool,
    /// Factor on the scores.
    pub attention_scale: f32,
    /// Scores become `cap * tanh(score / cap)`.
    pub attention_softcap: Option<f32>,
    /// Factor on the embedding.
    pub embedding_scale: f32,
    /// Factor on what attention and MLP add to the residual.
    pub residual_scale: f32,
    /// Factor on the logits, before their cap.
    pub logits_scale: f32,
    pub logits_softcap: Option<f32>,
    /// The head is the embedding's matrix.
    pub tied_head: bool,
}

/// One layer's own.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    /// Positions that a row sees, itself included; all if none.
    pub window: Option<usize>,
    /// Index of its rope; none where positions are not rotated.
    pub rope: Option<usize>,
    pub ffn: FfnSpec,
}

/// A layer's MLP, or several of which each row takes a few.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FfnSpec {
    Dense { width: usize },
    Experts(ExpertsSpec),
}

/// A mixture of experts: softmax over all, the best few, their outputs summed by weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertsSpec {
    pub count: usize,
    /// Experts that a row takes.
    pub used: usize,
    /// Each expert's.
    pub width: usize,
    /// The weights of those taken are made to sum to 1.
    pub normalized: bool,
}

/// How rows are normed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norm {
    /// x / rms(x) * weight
    Rms,
    /// (x - mean) / deviation * weight + bias
    Layer,
}

/// How q and k are normed before they are rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    None,
    /// Each head by itself.
    Heads,
    /// All heads as one row.
    Full,
}

impl ModelSpec {
    /// Width of all heads' queries.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all heads' keys, or values.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}
