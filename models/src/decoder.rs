//! The one decoder for all families: a token batch to logits.
//!
//! Knows no file format but through `Linear` and `ModelSpec`, and no sequence beyond a span's block table.
//! Invariants: each row's logits depend only on its sequence's tokens, bit for bit (every operation of the
//! kernels keeps rows apart); buffers grow to the largest batch seen and are then reused, so that a steady
//! state allocates nothing.

mod layer;
mod mlp;

use obol_kernels::{Activations, Attention, Cpu, KvDtype, Place, Pool, Qkv, RopeTable, Rows};

use crate::batch::{Batch, BatchLimits, CausalLm, EachSpan, ForwardError};
use crate::error::LoadError;
use crate::kv_pool::{KvPool, bytes_per_token};
use crate::linear::{Linear, Loader, Named};
use crate::load::LoadOptions;
use crate::model_files::ModelFiles;
use crate::spec::{LayerSpec, ModelSpec};

use layer::{Layer, Norm, QkNorms};
use mlp::MlpWork;

/// A model's weights, KV pool and working memory.
pub struct Decoder {
    spec: ModelSpec,
    kv_dtype: KvDtype,
    cpu: Cpu,
    embedding: Linear,
    positions: Option<Linear>,
    layers: Vec<Layer>,
    final_norm: Norm,
    /// None: the embedding's matrix is the head.
    head: Option<Linear>,
    ropes: Vec<RopeTable>,
    kv: KvPool,
    work: Work,
}

/// Buffers between operations, all (rows, width) unless said otherwise.
#[derive(Default)]
struct Work {
    quantized: Activations,
    /// The sum of all layers' outputs so far, but for the last: hidden.
    residual: Vec<f32>,
    /// A norm's output: hidden.
    normed: Vec<f32>,
    /// As [`Linear::place`] says: q, k and v.
    qkv: Vec<f32>,
    /// heads * head_dim
    attended: Vec<f32>,
    /// What a layer's half adds to the residual: hidden.
    delta: Vec<f32>,
    mlp: MlpWork,
    /// (logit rows, vocab)
    logits: Vec<f32>,
}

impl Decoder {
    /// Loads the weights of `files`, packing them with the threads of `cpu`. The KV pool is empty until
    /// [`CausalLm::allocate_kv`].
    ///
    /// # Errors
    /// When the model or a tensor's type is not supported, a key or tensor is missing or wrong, or the
    /// options do not suit the model.
    pub fn load(files: &ModelFiles, cpu: Cpu, options: &LoadOptions) -> Result<Self, LoadError> {
        let mut spec = files.spec()?;
        if let Some(length) = options.max_model_len {
            if length == 0 || length > spec.context {
                return Err(LoadError::Options(format!(
                    "a maximum length of {length} tokens; this model's context has {}",
                    spec.context
                )));
            }
            spec.context = length;
        }
        let weights = files.checkpoint(&spec)?;
        let loader = Loader { cpu: &cpu, weights: &weights, quant: options.quant };
        let one = |name: &str, out_features, in_features| {
            Linear::load(&loader, in_features, &[Named { name, out_features, bias: false }])
        };
        let embedding = one("token_embd", spec.vocab, spec.hidden)?;
        let positions = spec.learned_positions.map(|rows| one("position_embd", rows, spec.hidden));
        let positions = positions.transpose()?;
        let head = if spec.tied_head { None } else { Some(one("output", spec.vocab, spec.hidden)?) };
        let final_norm = Norm::load(&weights, &spec, "output_norm")?;
        let layers = (0..spec.layers.len())
            .map(|index| Layer::load(&loader, &spec, index))
            .collect::<Result<_, _>>()?;
        let count = spec.layers.len();
        let plural = if count == 1 { "" } else { "s" };
        weights.refuse_unread(&format!("a {} model of {count} layer{plural}", spec.architecture))?;
        let ropes = spec.ropes.iter().map(|rope| rope.table(spec.context)).collect();
        let (kv, work, kv_dtype) = (KvPool::empty(), Work::default(), options.kv_dtype);
        Ok(Self { spec, kv_dtype, cpu, embedding, positions, layers, final_norm, head, ropes, kv, work })
    }

    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Bytes of weights held in memory.
    pub fn weight_bytes(&self) -> u64 {
        let layers: usize = self.layers.iter().map(Layer::bytes).sum();
        let ends = self.head.iter().chain(&self.positions).map(Linear::bytes).sum::<usize>();
        (layers + ends + self.embedding.bytes() + self.final_norm.bytes()) as u64
    }

    /// The rows' tokens, and positions where they are learned, into the residual.
    fn embed(&mut self, batch: &Batch) {
        let Self { spec, cpu, embedding, positions, work, .. } = self;
        let rows = batch.tokens.len();
        let residual = fit(&mut work.residual, rows * spec.hidden);
        for (&token, row) in batch.tokens.iter().zip(residual.chunks_exact_mut(spec.hidden)) {
            embedding.row(token as usize, row);
        }
        if spec.embedding_scale != 1.0 {
            cpu.scale(residual, spec.embedding_scale);
        }
        if let Some(positions) = positions {
            let learned = fit(&mut work.delta, rows * spec.hidden);
            for (&position, row) in batch.positions.iter().zip(learned.chunks_exact_mut(spec.hidden)) {
                positions.row(position as usize, row);
            }
            cpu.add(residual, learned);
        }
    }

    /// The residual of the logit rows after all layers, but for the last addition, which is left in `delta`.
    fn run_layers(&mut self, batch: &Batch) {
        let Self { spec, cpu, layers, kv, work, ropes, .. } = self;
        ropes.iter_mut().for_each(|table| table.turn_to(&batch.positions));
        let last = layers.len() - 1;
        for (index, (layer, of)) in layers.iter().zip(&spec.layers).enumerate() {
            let mut rows = batch.tokens.len();
            let residual = fit(&mut work.residual, rows * spec.hidden);
            let normed = fit(&mut work.normed, rows * spec.hidden);
            let delta = fit(&mut work.delta, rows * spec.hidden);
            // ---- attention ----
            let pending = (index > 0).then_some(&*delta);
            let x = read(cpu, layer.attention_norm.as_ref(), residual, pending, normed);
            let qkv = fit(&mut work.qkv, rows * layer.qkv.out_features());
            layer.qkv.forward(cpu, x, &mut work.quantized, qkv);
            let places @ [q, k, v] = [0, 1, 2].map(|output| layer.qkv.place(output, rows));
            if let Some(norms) = &layer.qk_norm {
                norm_heads(cpu, spec, norms, qkv, places, rows);
            }
            cpu.rope_kv_write(
                Qkv { data: &mut *qkv, heads: spec.heads, q, k, v },
                of.rope.map(|rope| (&ropes[rope], spec.ropes[rope].style)),
                kv.layer_mut(index),
                &batch.spans,
                &batch.positions,
                &batch.block_tables,
            );
            if index == last && batch.logit_rows.is_empty() {
                return;
            }
            let mut attended = fit(&mut work.attended, rows * spec.q_width());
            let attention = attention(spec, of, kv, index, batch);
            cpu.paged_attention(Rows::new(&qkv[q.start..], q.stride), &attention, attended);
            let (mut residual, mut delta) = (residual, delta);
            if index == last {
                // What follows keeps rows apart, so only those that are asked for need it.
                rows = batch.logit_rows.len();
                attended = keep_rows(attended, &batch.logit_rows, spec.q_width());
                residual = keep_rows(residual, &batch.logit_rows, spec.hidden);
                delta = &mut delta[..rows * spec.hidden];
            }
            layer.attention_out.forward(cpu, attended, &mut work.quantized, delta);
            settle(cpu, spec, layer.attention_post_norm.as_ref(), delta);
            // ---- MLP ----
            let normed = fit(&mut work.normed, rows * spec.hidden);
            let x = read(cpu, layer.ffn_norm.as_ref(), residual, Some(&*delta), normed);
            layer.ffn.forward(cpu, x, &mut work.quantized, &mut work.mlp, delta);
            settle(cpu, spec, layer.ffn_post_norm.as_ref(), delta);
        }
    }

    /// Logits of the batch's logit rows, from what [`Decoder::run_layers`] left.
    fn run_head(&mut self, batch: &Batch) -> &[f32] {
        let Self { spec, cpu, embedding, final_norm, head, work, .. } = self;
        let rows = batch.logit_rows.len();
        let normed = fit(&mut work.normed, rows * spec.hidden);
        let residual = fit(&mut work.residual, rows * spec.hidden);
        let delta = fit(&mut work.delta, rows * spec.hidden);
        final_norm.add_and_apply(cpu, residual, delta, normed);
        let logits = fit(&mut work.logits, rows * spec.vocab);
        head.as_ref().unwrap_or(embedding).forward(cpu, normed, &mut work.quantized, logits);
        if spec.logits_scale != 1.0 {
            cpu.scale(logits, spec.logits_scale);
        }
        if let Some(cap) = spec.logits_softcap {
            cpu.softcap(logits, cap);
        }
        logits
    }
}

/// residual += what is pending; then what a layer's half reads: the norm of the residual, or itself.
fn read<'a>(
    cpu: &Cpu,
    norm: Option<&Norm>,
    residual: &'a mut [f32],
    pending: Option<&[f32]>,
    normed: &'a mut [f32],
) -> &'a [f32] {
    match (norm, pending) {
        (Some(norm), Some(pending)) => norm.add_and_apply(cpu, residual, pending, normed),
        (Some(norm), None) => norm.apply(cpu, residual, normed),
        (None, Some(pending)) => {
            cpu.add(residual, pending);
            return residual;
        }
        (None, None) => return residual,
    }
    normed
}

/// What a layer's half adds to the residual, as the family has it.
fn settle(cpu: &Cpu, spec: &ModelSpec, norm: Option<&Norm>, delta: &mut [f32]) {
    if let Some(norm) = norm {
        norm.apply_in_place(cpu, delta);
    }
    if spec.residual_scale != 1.0 {
        cpu.scale(delta, spec.residual_scale);
    }
}

/// Norms q and k where they lie.
fn norm_heads(
    cpu: &Cpu,
    spec: &ModelSpec,
    norms: &QkNorms,
    qkv: &mut [f32],
    [q, k, _]: [Place; 3],
    rows: usize,
) {
    for (place, width, weight) in [(q, spec.q_width(), &norms.q), (k, spec.kv_width(), &norms.k)] {
        let x = &mut qkv[place.start..][..(rows - 1) * place.stride + width];
        cpu.rms_norm_heads(x, place.stride, width / weight.len(), weight, spec.norm_eps);
    }
}

fn attention<'a>(
    spec: &ModelSpec,
    of: &LayerSpec,
    kv: &'a KvPool,
    layer: usize,
    batch: &'a Batch,
) -> Attention<'a> {
    Attention {
        layer: kv.layer(layer),
        spans: &batch.spans,
        positions: &batch.positions,
        block_tables: &batch.block_tables,
        heads: spec.heads,
        scale: spec.attention_scale,
        window: of.window,
        softcap: spec.attention_softcap,
    }
}

/// Moves these rows, which ascend, to the front, and leaves the others out.
fn keep_rows<'a>(x: &'a mut [f32], rows: &[usize], width: usize) -> &'a mut [f32] {
    for (to, &from) in rows.iter().enumerate() {
        x.copy_within(from * width..(from + 1) * width, to * width);
    }
    &mut x[..rows.len() * width]
}

impl CausalLm for Decoder {
    fn vocab_size(&self) -> usize {
        self.spec.vocab
    }

    fn context_length(&self) -> usize {
        self.spec.context
    }

    fn kv_bytes_per_token(&self) -> u64 {
        bytes_per_token(&self.spec, self.kv_dtype)
    }

    fn allocate_kv(&mut self, blocks: usize, block_size: usize) -> Result<(), ForwardError> {
        // The old pool goes first: both together may not fit.
        self.kv = KvPool::empty();
        self.kv = KvPool::new(&self.spec, self.kv_dtype, blocks, block_size)?;
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
        self.embed(batch);
        self.run_layers(batch);
        if batch.logit_rows.is_empty() {
            return Ok(&[]);
        }
        Ok(self.run_head(batch))
    }

    fn workers(&self) -> usize {
        self.cpu.pool().threads()
    }

    fn overlaps(&self) -> bool {
        self.cpu.pool().threads() > 1
    }

    fn forward_each(
        &mut self,
        batch: &Batch,
        meanwhile: &mut dyn FnMut(),
        each: EachSpan<'_>,
    ) -> Result<(), ForwardError> {
        Pool::beside(meanwhile, || self.forward(batch).map(drop))?;
        let (vocab, logits) = (self.spec.vocab, &self.work.logits);
        self.cpu.pool().run_indexed(batch.spans.len(), &|worker, span| {
            let rows = batch.logits_of(span);
            if !rows.is_empty() {
                each(worker, span, &logits[rows.start * vocab..rows.end * vocab]);
            }
        });
        Ok(())
    }
}

/// The first `len` values of a buffer that grows when needed.
fn fit(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}
