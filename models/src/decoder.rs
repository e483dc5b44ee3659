//! The one decoder for all families: a token batch to logits.
//!
//! Knows no file format but through `Linear` and `ModelSpec`, and no sequence beyond a span's block table.
//! Invariants: each row's logits depend only on its sequence's tokens, bit for bit (every operation of the
//! kernels keeps rows apart); buffers grow to the largest batch seen and are then reused, so that a steady
//! state allocates nothing. Where several share each layer's work (`tensor_parallel`), each holds the same
//! residual, bit for bit, and adds its heads' and its MLP's part to it together with the others.

#[cfg(feature = "cuda")]
mod cuda;
mod group;
mod layer;
mod mlp;
mod tensor_parallel;
mod weights;

use std::sync::Arc;

use obol_kernels::{Activations, Attention, Cpu, Place, Pool, Qkv, RopeTable, Rows};

use crate::batch::{Batch, BatchLimits, CausalLm, EachSpan, ForwardError, Made};
use crate::communicator::{Aborted, Communicator};
use crate::cut::Rank;
use crate::error::LoadError;
use crate::kv_pool::{KvPool, bytes_per_token};
use crate::linear::Linear;
use crate::load::LoadOptions;
use crate::model_files::ModelFiles;
use crate::spec::{LayerSpec, ModelSpec, QkNorm};

use layer::{Norm, QkNorms};
use mlp::MlpWork;

#[cfg(feature = "cuda")]
pub use cuda::{CudaDecoder, CudaTensorParallel};
pub use tensor_parallel::TensorParallel;
pub use weights::Weights;

/// A model's weights, or a rank's part of them, with a KV pool and working memory.
pub struct Decoder {
    /// With this rank's heads.
    spec: ModelSpec,
    cpu: Cpu,
    weights: Arc<Weights>,
    member: Member,
    ropes: Vec<RopeTable>,
    kv: KvPool,
    work: Work,
}

/// Which of the devices that share each layer's work this is.
struct Member {
    rank: Rank,
    /// None for one that is alone.
    others: Option<Arc<Communicator>>,
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
    /// All ranks' q, or k, where they are normed as one row.
    whole: Vec<f32>,
    /// (logit rows, this rank's part of the vocabulary)
    logits_part: Vec<f32>,
    /// (logit rows, vocab)
    logits: Vec<f32>,
    /// Rows that are computed to their end: logit rows and hidden rows, ascending.
    kept: Vec<usize>,
    /// (hidden rows, hidden)
    hidden: Vec<f32>,
}

impl Member {
    const ALONE: Self = Self { rank: Rank::ALONE, others: None };

    /// Adds up what all ranks have.
    fn all_reduce(&self, data: &mut [f32]) -> Result<(), Aborted> {
        self.others.as_ref().map_or(Ok(()), |others| others.all_reduce(self.rank.index, data))
    }
}

impl Decoder {
    /// Loads the weights of `files` for this device alone, packing them with the threads of `cpu`. The KV pool is
    /// empty until [`CausalLm::allocate_kv`].
    ///
    /// # Errors
    /// As [`Weights::load`].
    pub fn load(files: &ModelFiles, cpu: Cpu, options: &LoadOptions) -> Result<Self, LoadError> {
        let options = LoadOptions { tensor_parallel: 1, ..*options };
        let weights = Weights::load(files, &cpu, &options)?;
        Ok(Self::new(Arc::new(weights), cpu))
    }

    /// A decoder of its own, with weights that others may read too.
    ///
    /// # Panics
    /// When the weights are cut for several ranks: those are [`TensorParallel`]'s.
    pub fn new(weights: Arc<Weights>, cpu: Cpu) -> Self {
        assert_eq!(weights.ranks(), 1, "weights of one device");
        Self::of_rank(weights, cpu, Member::ALONE)
    }

    fn of_rank(weights: Arc<Weights>, cpu: Cpu, member: Member) -> Self {
        let spec = weights.spec_of_rank();
        let ropes = spec.ropes.iter().map(|rope| rope.table(spec.context)).collect();
        Self { spec, cpu, weights, member, ropes, kv: KvPool::empty(), work: Work::default() }
    }

    pub fn spec(&self) -> &ModelSpec {
        self.weights.spec()
    }

    /// Bytes of weights held in memory.
    pub fn weight_bytes(&self) -> u64 {
        self.weights.bytes()
    }

    /// The rows' tokens, and positions where they are learned, into the residual.
    fn embed(&mut self, batch: &Batch) {
        let Self { spec, cpu, weights, work, .. } = self;
        let rows = batch.tokens.len();
        let residual = fit(&mut work.residual, rows * spec.hidden);
        for (&token, row) in batch.tokens.iter().zip(residual.chunks_exact_mut(spec.hidden)) {
            weights.embedding.row(token as usize, row);
        }
        if spec.embedding_scale != 1.0 {
            cpu.scale(residual, spec.embedding_scale);
        }
        if let Some(positions) = &weights.positions {
            let learned = fit(&mut work.delta, rows * spec.hidden);
            for (&position, row) in batch.positions.iter().zip(learned.chunks_exact_mut(spec.hidden)) {
                positions.row(position as usize, row);
            }
            cpu.add(residual, learned);
        }
    }

    /// The residual of the kept rows after all layers, but for the last addition, which is left in `delta`.
    fn run_layers(&mut self, batch: &Batch) -> Result<(), Aborted> {
        let Self { spec, cpu, weights, member, kv, work, ropes, .. } = self;
        let layers = &weights.ranks[member.rank.index];
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
                match (spec.qk_norm, &member.others) {
                    (QkNorm::Full, Some(_)) => {
                        norm_all_heads(cpu, spec, member, norms, qkv, places, rows, &mut work.whole)?;
                    }
                    _ => norm_heads(cpu, spec, norms, qkv, places, rows),
                }
            }
            cpu.rope_kv_write(
                Qkv { data: &mut *qkv, heads: spec.heads, q, k, v },
                of.rope.map(|rope| (&ropes[rope], spec.ropes[rope].style)),
                kv.layer_mut(index),
                &batch.spans,
                &batch.positions,
                &batch.block_tables,
            );
            if index == last && work.kept.is_empty() {
                return Ok(());
            }
            let mut attended = fit(&mut work.attended, rows * spec.q_width());
            let attention = attention(spec, of, kv, index, batch);
            cpu.paged_attention(Rows::new(&qkv[q.start..], q.stride), &attention, attended);
            let (mut residual, mut delta) = (residual, delta);
            if index == last {
                // What follows keeps rows apart, so only those that are asked for need it.
                rows = work.kept.len();
                attended = keep_rows(attended, &work.kept, spec.q_width());
                residual = keep_rows(residual, &work.kept, spec.hidden);
                delta = &mut delta[..rows * spec.hidden];
            }
            layer.attention_out.forward(cpu, attended, &mut work.quantized, delta);
            member.all_reduce(delta)?;
            settle(cpu, spec, layer.attention_post_norm.as_ref(), delta);
            // ---- MLP ----
            let normed = fit(&mut work.normed, rows * spec.hidden);
            let x = read(cpu, layer.ffn_norm.as_ref(), residual, Some(&*delta), normed);
            layer.ffn.forward(cpu, x, &mut work.quantized, &mut work.mlp, delta);
            member.all_reduce(delta)?;
            settle(cpu, spec, layer.ffn_post_norm.as_ref(), delta);
        }
        Ok(())
    }

    /// The last norm of the kept rows, from what [`Decoder::run_layers`] left: hidden rows are then in `hidden`, logit
    /// rows in `normed`.
    fn run_norm(&mut self, batch: &Batch) {
        let Self { spec, cpu, weights, work, .. } = self;
        let kept = work.kept.len();
        let normed = fit(&mut work.normed, kept * spec.hidden);
        let residual = fit(&mut work.residual, kept * spec.hidden);
        let delta = fit(&mut work.delta, kept * spec.hidden);
        weights.final_norm.add_and_apply(cpu, residual, delta, normed);
        let mut hidden =
            fit(&mut work.hidden, batch.hidden_rows.len() * spec.hidden).chunks_exact_mut(spec.hidden);
        let mut logits = 0;
        for (at, row) in work.kept.iter().enumerate() {
            let from = at * spec.hidden..(at + 1) * spec.hidden;
            if batch.hidden_rows.binary_search(row).is_ok() {
                hidden.next().expect("as many as hidden rows").copy_from_slice(&normed[from]);
            } else {
                normed.copy_within(from, logits * spec.hidden);
                logits += 1;
            }
        }
    }

    /// Logits of the batch's logit rows, from what [`Decoder::run_norm`] left; only the first rank has them.
    fn run_head(&mut self, batch: &Batch) -> Result<&[f32], Aborted> {
        let Self { spec, cpu, weights, member, work, .. } = self;
        let rows = batch.logit_rows.len();
        let normed = fit(&mut work.normed, rows * spec.hidden);
        let head = weights.head().part(member.rank.index);
        let Some(others) = &member.others else {
            let logits = fit(&mut work.logits, rows * spec.vocab);
            make_logits(cpu, spec, head, normed, &mut work.quantized, logits);
            return Ok(logits);
        };
        let part = fit(&mut work.logits_part, rows * head.out_features());
        make_logits(cpu, spec, head, normed, &mut work.quantized, part);
        let whole = if member.rank.index == 0 { rows * spec.vocab } else { 0 };
        let logits = fit(&mut work.logits, whole);
        others.gather(member.rank.index, part, rows, logits)?;
        Ok(logits)
    }

    /// Gives `each` what each span asked for of the batch that was run last.
    fn give_each(&self, batch: &Batch, each: EachSpan<'_>) {
        let Work { logits, hidden, .. } = &self.work;
        let made = Made { logits, vocab: self.spec.vocab, hidden, width: self.spec.hidden };
        let give = |worker: usize, span: usize| batch.give(worker, span, made, each);
        self.cpu.pool().run_indexed(batch.spans.len(), &give);
    }

    fn limits(&self) -> BatchLimits {
        BatchLimits {
            vocab_size: self.spec.vocab,
            context_length: self.spec.context,
            blocks: self.kv.blocks(),
            block_size: self.kv.block_size(),
        }
    }
}

/// The logits that `head` makes of x (rows, hidden), as the family has them.
fn make_logits(
    cpu: &Cpu,
    spec: &ModelSpec,
    head: &Linear,
    x: &[f32],
    quantized: &mut Activations,
    logits: &mut [f32],
) {
    head.forward(cpu, x, quantized, logits);
    if spec.logits_scale != 1.0 {
        cpu.scale(logits, spec.logits_scale);
    }
    if let Some(cap) = spec.logits_softcap {
        cpu.softcap(logits, cap);
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

/// As [`norm_heads`], where a row's norm is over the heads of all ranks.
fn norm_all_heads(
    cpu: &Cpu,
    spec: &ModelSpec,
    member: &Member,
    norms: &QkNorms,
    qkv: &mut [f32],
    [q, k, _]: [Place; 3],
    rows: usize,
    whole: &mut Vec<f32>,
) -> Result<(), Aborted> {
    for (place, width, weight) in [(q, spec.q_width(), &norms.q), (k, spec.kv_width(), &norms.k)] {
        let whole = fit(whole, rows * weight.len());
        // The others' parts are zero here, so that the sum is what each has.
        whole.fill(0.0);
        let first = member.rank.index * width;
        for (row, whole) in whole.chunks_exact_mut(weight.len()).enumerate() {
            whole[first..first + width].copy_from_slice(&qkv[place.start + row * place.stride..][..width]);
        }
        member.all_reduce(whole)?;
        cpu.rms_norm_heads(whole, weight.len(), 1, weight, spec.norm_eps);
        for (row, whole) in whole.chunks_exact(weight.len()).enumerate() {
            qkv[place.start + row * place.stride..][..width].copy_from_slice(&whole[first..first + width]);
        }
    }
    Ok(())
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

    fn hidden_size(&self) -> Option<usize> {
        Some(self.spec.hidden)
    }

    fn context_length(&self) -> usize {
        self.spec.context
    }

    fn kv_bytes_per_token(&self) -> u64 {
        bytes_per_token(&self.spec, self.weights.kv_dtype)
    }

    fn allocate_kv(&mut self, blocks: usize, block_size: usize) -> Result<(), ForwardError> {
        // The old pool goes first: both together may not fit.
        self.kv = KvPool::empty();
        self.kv = KvPool::new(&self.spec, self.weights.kv_dtype, blocks, block_size)?;
        Ok(())
    }

    fn forward(&mut self, batch: &Batch) -> Result<&[f32], ForwardError> {
        batch.check(self.limits())?;
        if batch.tokens.is_empty() {
            return Ok(&[]);
        }
        let kept = &mut self.work.kept;
        kept.clear();
        kept.extend_from_slice(&batch.logit_rows);
        kept.extend_from_slice(&batch.hidden_rows);
        kept.sort_unstable();
        self.embed(batch);
        self.run_layers(batch)?;
        if self.work.kept.is_empty() {
            return Ok(&[]);
        }
        self.run_norm(batch);
        if batch.logit_rows.is_empty() {
            return Ok(&[]);
        }
        Ok(self.run_head(batch)?)
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
        self.give_each(batch, each);
        Ok(())
    }
}

impl From<Aborted> for ForwardError {
    fn from(aborted: Aborted) -> Self {
        Self(aborted.to_string())
    }
}

/// The first `len` values of a buffer that grows when needed.
fn fit(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}
