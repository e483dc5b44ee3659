//! The one decoder for all families: a token batch to logits.
//!
//! Knows no file format but through `Linear` and `ModelSpec`, and no sequence beyond a span's block table.
//! Invariants: each row's logits depend only on its sequence's tokens, bit for bit (every operation of the
//! kernels keeps rows apart); buffers grow to the largest batch seen and are then reused, so that a steady
//! state allocates nothing.

use obol_kernels::{Act, Activations, Attention, Cpu, RopeTable, Rows};

use crate::batch::{Batch, BatchLimits, CausalLm, ForwardError};
use crate::checkpoint::{Checkpoint, OwnNames};
use crate::error::LoadError;
use crate::gguf::GgufFile;
use crate::kv_pool::{KvPool, bytes_per_token};
use crate::linear::{Linear, Loader, Named};
use crate::spec::ModelSpec;

/// A model's weights, KV pool and working memory.
pub struct Decoder {
    spec: ModelSpec,
    cpu: Cpu,
    embedding: Linear,
    layers: Vec<Layer>,
    final_norm: Vec<f32>,
    /// None: the embedding's matrix is the head.
    head: Option<Linear>,
    rope: RopeTable,
    kv: KvPool,
    work: Work,
}

struct Layer {
    attention_norm: Vec<f32>,
    qkv: Linear,
    attention_out: Linear,
    ffn_norm: Vec<f32>,
    gate_up: Linear,
    down: Linear,
}

/// Buffers between operations, all (rows, width) unless said otherwise.
#[derive(Default)]
struct Work {
    quantized: Activations,
    /// The sum of all layers' outputs so far: hidden.
    residual: Vec<f32>,
    /// A norm's output: hidden.
    normed: Vec<f32>,
    /// As [`Linear::place`] says: q, k and v.
    qkv: Vec<f32>,
    /// heads * head_dim
    attended: Vec<f32>,
    /// What a layer's half adds to the residual: hidden.
    delta: Vec<f32>,
    /// As [`Linear::place`] says: gate and up.
    gate_up: Vec<f32>,
    /// ffn
    activated: Vec<f32>,
    /// (logit rows, vocab)
    logits: Vec<f32>,
}

impl Decoder {
    /// Loads the weights of `file`, packing them with the threads of `cpu`; `max_model_len` shortens the
    /// context. The KV pool is empty until [`CausalLm::allocate_kv`].
    ///
    /// # Errors
    /// When the architecture or a tensor's type is not supported, or a key or tensor is missing or wrong.
    pub fn load(file: &GgufFile, cpu: Cpu, max_model_len: Option<usize>) -> Result<Self, LoadError> {
        let mut spec = ModelSpec::from_gguf(file)?;
        if let Some(length) = max_model_len {
            if length == 0 || length > spec.context {
                return Err(LoadError::Options(format!(
                    "a maximum length of {length} tokens; this model's context has {}",
                    spec.context
                )));
            }
            spec.context = length;
        }
        let weights = Checkpoint::new(file, OwnNames);
        let loader = Loader { cpu: &cpu, weights: &weights };
        let one = |name: &str, out_features, in_features| {
            Linear::load(&loader, in_features, &[Named { name, out_features, bias: false }])
        };
        let embedding = one("token_embd", spec.vocab, spec.hidden)?;
        let head = if spec.tied_head { None } else { Some(one("output", spec.vocab, spec.hidden)?) };
        let final_norm = weights.vector("output_norm.weight", spec.hidden)?;
        let layers =
            (0..spec.layers).map(|index| Layer::load(&loader, &spec, index)).collect::<Result<_, _>>()?;
        weights.refuse_unread(&format!("a {} model of {} layers", spec.architecture, spec.layers))?;
        let rope = RopeTable::new(spec.rope.dim, spec.rope.base, spec.context, &spec.rope.scaling);
        let (kv, work) = (KvPool::empty(), Work::default());
        Ok(Self { spec, cpu, embedding, layers, final_norm, head, rope, kv, work })
    }

    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Bytes of weights held in memory.
    pub fn weight_bytes(&self) -> u64 {
        let layers: usize = self.layers.iter().map(Layer::bytes).sum();
        let ends = self.embedding.bytes() + self.head.as_ref().map_or(0, Linear::bytes);
        (layers + ends + self.final_norm.len() * 4) as u64
    }

    /// The residual after all layers but for the last addition, which is left in `delta`.
    fn run_layers(&mut self, batch: &Batch) {
        let Self { spec, cpu, layers, kv, work, rope, .. } = self;
        let rows = batch.tokens.len();
        let eps = spec.norm_eps;
        let residual = fit(&mut work.residual, rows * spec.hidden);
        let normed = fit(&mut work.normed, rows * spec.hidden);
        let attended = fit(&mut work.attended, rows * spec.heads * spec.head_dim);
        let delta = fit(&mut work.delta, rows * spec.hidden);
        let activated = fit(&mut work.activated, rows * spec.ffn);
        for (index, layer) in layers.iter().enumerate() {
            if index == 0 {
                cpu.rms_norm(residual, &layer.attention_norm, eps, normed);
            } else {
                cpu.add_rms_norm(residual, delta, &layer.attention_norm, eps, normed);
            }
            let qkv = fit(&mut work.qkv, rows * layer.qkv.out_features());
            layer.qkv.forward(cpu, normed, &mut work.quantized, qkv);
            let [q, k, v] = [0, 1, 2].map(|output| layer.qkv.place(output, rows));
            for (place, heads) in [(q, spec.heads), (k, spec.kv_heads)] {
                let x = &mut qkv[place.start..];
                cpu.rope(x, place.stride, heads, spec.head_dim, &batch.positions, rope, spec.rope.style);
            }
            cpu.kv_write(
                kv.layer_mut(index),
                Rows::new(&qkv[k.start..], k.stride),
                Rows::new(&qkv[v.start..], v.stride),
                &batch.spans,
                &batch.positions,
                &batch.block_tables,
            );
            let attention = Attention {
                layer: kv.layer(index),
                spans: &batch.spans,
                positions: &batch.positions,
                block_tables: &batch.block_tables,
                heads: spec.heads,
                scale: (spec.head_dim as f32).sqrt().recip(),
                window: None,
                softcap: None,
            };
            cpu.paged_attention(Rows::new(&qkv[q.start..], q.stride), &attention, attended);
            layer.attention_out.forward(cpu, attended, &mut work.quantized, delta);
            cpu.add_rms_norm(residual, delta, &layer.ffn_norm, eps, normed);
            let gate_up = fit(&mut work.gate_up, rows * layer.gate_up.out_features());
            layer.gate_up.forward(cpu, normed, &mut work.quantized, gate_up);
            if layer.gate_up.is_fused() {
                cpu.act_mul(Act::Silu, gate_up, spec.ffn, activated);
            } else {
                let (gate, up) = gate_up.split_at(rows * spec.ffn);
                cpu.act_mul_split(Act::Silu, gate, up, spec.ffn, activated);
            }
            layer.down.forward(cpu, activated, &mut work.quantized, delta);
        }
    }

    /// Logits of the batch's logit rows, from what [`Decoder::run_layers`] left.
    fn run_head(&mut self, batch: &Batch) -> &[f32] {
        let Self { spec, cpu, embedding, final_norm, head, work, .. } = self;
        let rows = batch.logit_rows.len();
        // Ascending rows, so each is moved to a place at or before its own, in order.
        for (to, &from) in batch.logit_rows.iter().enumerate() {
            let from = from * spec.hidden..(from + 1) * spec.hidden;
            work.residual.copy_within(from.clone(), to * spec.hidden);
            work.delta.copy_within(from, to * spec.hidden);
        }
        let normed = fit(&mut work.normed, rows * spec.hidden);
        let residual = fit(&mut work.residual, rows * spec.hidden);
        let delta = fit(&mut work.delta, rows * spec.hidden);
        cpu.add_rms_norm(residual, delta, final_norm, spec.norm_eps, normed);
        let logits = fit(&mut work.logits, rows * spec.vocab);
        head.as_ref().unwrap_or(embedding).forward(cpu, normed, &mut work.quantized, logits);
        logits
    }
}

impl CausalLm for Decoder {
    fn vocab_size(&self) -> usize {
        self.spec.vocab
    }

    fn context_length(&self) -> usize {
        self.spec.context
    }

    fn kv_bytes_per_token(&self) -> u64 {
        bytes_per_token(&self.spec)
    }

    fn allocate_kv(&mut self, blocks: usize, block_size: usize) -> Result<(), ForwardError> {
        // The old pool goes first: both together may not fit.
        self.kv = KvPool::empty();
        self.kv = KvPool::new(&self.spec, blocks, block_size)?;
        Ok(())
    }

    fn forward(&mut self, batch: &Batch) -> Result<&[f32], ForwardError> {
        batch.check(BatchLimits {
            vocab_size: self.spec.vocab,
            context_length: self.spec.context,
            blocks: self.kv.blocks(),
            block_size: self.kv.block_size(),
        })?;
        if batch.tokens.is_empty() {
            return Ok(&[]);
        }
        let residual = fit(&mut self.work.residual, batch.tokens.len() * self.spec.hidden);
        for (&token, row) in batch.tokens.iter().zip(residual.chunks_exact_mut(self.spec.hidden)) {
            self.embedding.row(token as usize, row);
        }
        self.run_layers(batch);
        if batch.logit_rows.is_empty() {
            return Ok(&[]);
        }
        Ok(self.run_head(batch))
    }
}

impl Layer {
    fn load(loader: &Loader<'_>, spec: &ModelSpec, index: usize) -> Result<Self, LoadError> {
        let norm = |name: &str| loader.weights.vector(&format!("blk.{index}.{name}.weight"), spec.hidden);
        let linear = |in_features: usize, matrices: &[(&str, usize, bool)]| {
            let names: Vec<String> =
                matrices.iter().map(|(name, ..)| format!("blk.{index}.{name}")).collect();
            let matrices: Vec<Named<'_>> = names
                .iter()
                .zip(matrices)
                .map(|(name, &(_, out_features, bias))| Named { name, out_features, bias })
                .collect();
            Linear::load(loader, in_features, &matrices)
        };
        let (q_width, kv_width) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let bias = spec.qkv_bias;
        Ok(Self {
            attention_norm: norm("attn_norm")?,
            qkv: linear(
                spec.hidden,
                &[("attn_q", q_width, bias), ("attn_k", kv_width, bias), ("attn_v", kv_width, bias)],
            )?,
            attention_out: linear(q_width, &[("attn_output", spec.hidden, false)])?,
            ffn_norm: norm("ffn_norm")?,
            gate_up: linear(spec.hidden, &[("ffn_gate", spec.ffn, false), ("ffn_up", spec.ffn, false)])?,
            down: linear(spec.ffn, &[("ffn_down", spec.hidden, false)])?,
        })
    }

    fn bytes(&self) -> usize {
        let linears = [&self.qkv, &self.attention_out, &self.gate_up, &self.down];
        linears.iter().map(|linear| linear.bytes()).sum::<usize>()
            + (self.attention_norm.len() + self.ffn_norm.len()) * 4
    }
}

/// The first `len` values of a buffer that grows when needed.
fn fit(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}
