//! A layer's weights: norms, projections and MLP.
//!
//! Knows how they are loaded and how a norm is applied; the order of the operations is the decoder's.

use obol_kernels::Cpu;

use crate::checkpoint::Checkpoint;
use crate::error::LoadError;
use crate::linear::{Linear, Loader, Named};
use crate::spec::{self, ModelSpec, QkNorm};

use super::mlp::Ffn;

pub(super) struct Layer {
    /// None: attention reads the residual as it is.
    pub(super) attention_norm: Option<Norm>,
    pub(super) qkv: Linear,
    pub(super) qk_norm: Option<QkNorms>,
    pub(super) attention_out: Linear,
    /// Of what attention adds.
    pub(super) attention_post_norm: Option<Norm>,
    /// None: the MLP reads the residual as it is.
    pub(super) ffn_norm: Option<Norm>,
    pub(super) ffn: Ffn,
    /// Of what the MLP adds.
    pub(super) ffn_post_norm: Option<Norm>,
}

/// A norm of rows of the residual's width.
pub(super) struct Norm {
    pub(super) kind: spec::Norm,
    pub(super) weight: Vec<f32>,
    pub(super) bias: Option<Vec<f32>>,
    eps: f32,
}

/// The norms of q and k, in pieces of their weights' length: of all heads, where they are normed as one row.
pub(super) struct QkNorms {
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
}

impl Norm {
    /// Loads `NAME.weight`, and `NAME.bias` where the kind has one.
    pub(super) fn load(weights: &Checkpoint<'_>, spec: &ModelSpec, name: &str) -> Result<Self, LoadError> {
        let weight = norm_weight(weights, spec, name, spec.hidden)?;
        let bias = match spec.norm {
            spec::Norm::Rms => None,
            spec::Norm::Layer => Some(weights.vector(&format!("{name}.bias"), spec.hidden)?),
        };
        Ok(Self { kind: spec.norm, weight, bias, eps: spec.norm_eps })
    }

    pub(super) fn bytes(&self) -> usize {
        (self.weight.len() + self.bias.as_ref().map_or(0, Vec::len)) * 4
    }

    /// out = the norm of x.
    pub(super) fn apply(&self, cpu: &Cpu, x: &[f32], out: &mut [f32]) {
        match self.kind {
            spec::Norm::Rms => cpu.rms_norm(x, &self.weight, self.eps, out),
            spec::Norm::Layer => cpu.layer_norm(x, &self.weight, self.bias.as_deref(), self.eps, out),
        }
    }

    /// residual += delta, then out = the norm of residual.
    pub(super) fn add_and_apply(&self, cpu: &Cpu, residual: &mut [f32], delta: &[f32], out: &mut [f32]) {
        match self.kind {
            spec::Norm::Rms => cpu.add_rms_norm(residual, delta, &self.weight, self.eps, out),
            spec::Norm::Layer => {
                cpu.add(residual, delta);
                self.apply(cpu, residual, out);
            }
        }
    }

    /// x = the norm of x.
    pub(super) fn apply_in_place(&self, cpu: &Cpu, x: &mut [f32]) {
        // The only norm that families use so.
        assert_eq!(self.kind, spec::Norm::Rms, "a layer norm in place; this is a bug");
        cpu.rms_norm_heads(x, self.weight.len(), 1, &self.weight, self.eps);
    }
}

fn norm_weight(
    weights: &Checkpoint<'_>,
    spec: &ModelSpec,
    name: &str,
    len: usize,
) -> Result<Vec<f32>, LoadError> {
    let mut weight = weights.vector(&format!("{name}.weight"), len)?;
    if spec.norm_offset != 0.0 {
        weight.iter_mut().for_each(|weight| *weight += spec.norm_offset);
    }
    Ok(weight)
}

impl Layer {
    pub(super) fn load(loader: &Loader<'_>, spec: &ModelSpec, index: usize) -> Result<Self, LoadError> {
        let name = |name: &str| format!("blk.{index}.{name}");
        let norm = |wanted: bool, norm: &str| {
            wanted.then(|| Norm::load(loader.weights, spec, &name(norm))).transpose()
        };
        let (rank, q_width, kv_width) = (loader.rank, spec.q_width(), spec.kv_width());
        let [q, k, v] = ["attn_q", "attn_k", "attn_v"].map(name);
        // Whole heads: they divide by the number of devices.
        let projection = |name, out_features| Named {
            name,
            out_features,
            bias: spec.qkv_bias,
            part: rank.rows(out_features),
        };
        let qkv = [projection(&q, q_width), projection(&k, kv_width), projection(&v, kv_width)];
        let output = Named {
            name: &name("attn_output"),
            out_features: spec.hidden,
            bias: spec.output_bias,
            part: rank.columns(rank.share(q_width)),
        };
        let qk_weights = |q_len, k_len| -> Result<_, LoadError> {
            let weight = |part, len| norm_weight(loader.weights, spec, &name(part), len);
            Ok(Some(QkNorms { q: weight("attn_q_norm", q_len)?, k: weight("attn_k_norm", k_len)? }))
        };
        Ok(Self {
            attention_norm: norm(spec.pre_norms, "attn_norm")?,
            qkv: Linear::load(loader, spec.hidden, &qkv)?,
            qk_norm: match spec.qk_norm {
                QkNorm::None => None,
                QkNorm::Heads => qk_weights(spec.head_dim, spec.head_dim)?,
                QkNorm::Full => qk_weights(q_width, kv_width)?,
            },
            attention_out: Linear::load(loader, q_width, &[output])?,
            attention_post_norm: norm(spec.post_norms, "post_attention_norm")?,
            ffn_norm: norm(spec.pre_norms, "ffn_norm")?,
            ffn: Ffn::load(loader, spec, index)?,
            ffn_post_norm: norm(spec.post_norms, "post_ffw_norm")?,
        })
    }

    pub(super) fn bytes(&self) -> usize {
        let norms = [&self.attention_norm, &self.attention_post_norm, &self.ffn_norm, &self.ffn_post_norm];
        let norms: usize = norms.into_iter().flatten().map(Norm::bytes).sum();
        let qk_norm = self.qk_norm.as_ref().map_or(0, |norm| (norm.q.len() + norm.k.len()) * 4);
        self.qkv.bytes() + self.attention_out.bytes() + self.ffn.bytes() + norms + qk_norm
    }
}
