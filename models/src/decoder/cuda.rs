//! The decoder on a CUDA device: the same operations in the same order as on the CPU, put into one stream.
//!
//! Weights are loaded on the host, layer by layer, and sent over. All memory of steps is had by
//! [`CausalLm::reserve`] and [`CausalLm::allocate_kv`], so that no step can run out of it. The residual is f32; other
//! activations are of one chosen type. Invariant: as on the CPU, a row's logits depend only on its sequence's
//! tokens, bit for bit.

mod forward;
mod graphs;
mod inputs;
mod queue;
mod steps;
mod tensor_parallel;
mod weights;
mod work;

use obol_kernels::cuda::{
    AttentionLimits, AttentionPlan, AttentionWorkspace, DecodeBucket, DeviceBatch, DeviceFacts, DeviceKv,
    DeviceRope, DrawLayout, Dtype, ExpertChoice, Gpu, GpuError,
};
use obol_kernels::{DenseData, KvDtype, KvShape};

use super::Weights as HostWeights;
use super::layer::Layer;
use crate::batch::{Batch, BatchLimits, CausalLm, DeviceMemory, ForwardError};
use crate::device::ComputeDtype;
use crate::error::LoadError;
use crate::linear::Linear;
use crate::load::LoadOptions;
use crate::queue::{StepLimits, StepQueue};
use crate::spec::{ModelSpec, RopeSpec};
use crate::weight::Weight;

use forward::{Cache, Stage, Weights};
use graphs::Graphs;
use queue::Queue;
use tensor_parallel::Member;
use weights::{DeviceLayer, DeviceLinear, NormWeights};
use work::{Widths, Work};

pub use tensor_parallel::CudaTensorParallel;

/// Steps are of so many rows and sequences, and blocks so large, until it is said.
const ROWS: usize = 512;
const SEQUENCES: usize = 64;
const BLOCK_SIZE: usize = 16;

/// Parts of contexts, times rows, that attention keeps to be merged, at most: more work is not split.
const PARTIALS_MOST: usize = 4096;

/// A model on a CUDA device.
pub struct CudaDecoder {
    gpu: Gpu,
    spec: ModelSpec,
    kv_dtype: KvDtype,
    dtype: Dtype,
    /// Decode steps are recorded.
    graphs: bool,
    weights: Weights,
    widths: Widths,
    work: Option<Work>,
    pool: Option<Pool>,
    /// (logit rows, vocab), on the host.
    logits: Vec<f32>,
    /// With others that share each layer's work. Behind the graphs, which are dropped before it.
    member: Option<Member>,
}

/// What depends on the number of blocks.
struct Pool {
    cache: Cache,
    plan: AttentionPlan,
    queue: Queue,
    graphs: Graphs,
    blocks: usize,
    block_size: usize,
}

impl Pool {
    fn new(decoder: &CudaDecoder, kv: DeviceKv) -> Result<Self, GpuError> {
        let (blocks, block_size) = (kv.blocks(), kv.shape().block_size);
        let CudaDecoder { gpu, spec, .. } = decoder;
        let StepLimits { rows, sequences, table_entries } = decoder.limits();
        let parts = DecodeBucket::parts_of(spec.context);
        let limits = AttentionLimits {
            rows,
            spans: sequences,
            table_entries,
            context: spec.context,
            group: decoder.group(),
            blocks,
            block_size,
            partials: (sequences * parts).min(PARTIALS_MOST.max(parts)),
        };
        let plan = AttentionPlan::new(limits);
        let cache = Cache {
            kv,
            batch: DeviceBatch::new(gpu, limits)?,
            workspace: AttentionWorkspace::new(gpu, &limits, spec.heads, spec.head_dim)?,
        };
        let draws = sequences.min(rows);
        let words = draws * DrawLayout::words_of(16, 16, 128);
        let queue = Queue::new(gpu, spec.vocab, rows, draws, plan.bytes_most(), words)?;
        Ok(Self { cache, plan, queue, graphs: Graphs::none(), blocks, block_size })
    }
}

fn failed(error: GpuError) -> ForwardError {
    ForwardError(error.to_string())
}

fn not_loaded(error: GpuError) -> LoadError {
    LoadError::Device(match error {
        GpuError::OutOfMemory { .. } => {
            format!("{error}: the weights do not fit; choose --quant int8 or int4, or a smaller model")
        }
        error => error.to_string(),
    })
}

impl CudaDecoder {
    /// Sends the weights to device `ordinal`, each layer given up on the host when it is there. Activations are of
    /// `options.dtype`; none: of the type in which they lose nothing that the weights have, bf16 for int8 and int4.
    ///
    /// # Errors
    /// When the device cannot be used, has no memory, or does not run such models.
    ///
    /// # Panics
    /// When the weights are cut for several ranks: those are [`CudaTensorParallel`]'s.
    pub fn new(mut host: HostWeights, ordinal: usize, options: &LoadOptions) -> Result<Self, LoadError> {
        assert_eq!(host.ranks(), 1, "weights of one device");
        let layers = host.ranks.remove(0);
        let spec = host.spec.clone();
        Self::of_rank(&host, spec, layers, ordinal, options)
    }

    /// As [`CudaDecoder::new`], of the layers of a rank, with its spec; the rest of `host` is what all ranks have.
    fn of_rank(
        host: &HostWeights,
        spec: ModelSpec,
        host_layers: Vec<Layer>,
        ordinal: usize,
        options: &LoadOptions,
    ) -> Result<Self, LoadError> {
        let gpu = Gpu::open(ordinal).map_err(not_loaded)?;
        let HostWeights { kv_dtype, embedding, positions, final_norm, head, .. } = host;
        let kv_dtype = *kv_dtype;
        let dtype = options.dtype.map_or_else(|| own_dtype(&host_layers[0].qkv), dtype_of);
        let mut layers = Vec::with_capacity(host_layers.len());
        for layer in host_layers {
            layers.push(DeviceLayer::upload(&gpu, &layer, &spec, dtype)?);
        }
        let upload = |linear: &Linear| DeviceLinear::upload(&gpu, linear, 1, spec.hidden, dtype);
        let head = head.as_ref().map(|head| upload(head.part(0)));
        let rope =
            |rope: &RopeSpec| DeviceRope::new(&gpu, &rope.table(spec.context), rope.style, spec.context);
        let ropes = spec.ropes.iter().map(rope).collect::<Result<_, _>>().map_err(not_loaded)?;
        let weights = Weights {
            embedding: upload(embedding.part(0)).map_err(not_loaded)?,
            positions: positions.as_ref().map(upload).transpose().map_err(not_loaded)?,
            layers,
            final_norm: NormWeights::upload(&gpu, final_norm, spec.norm_eps).map_err(not_loaded)?,
            head: head.transpose().map_err(not_loaded)?,
            ropes,
        };
        let widest = |of: &dyn Fn(&DeviceLayer) -> usize| weights.layers.iter().map(of).max().unwrap_or(0);
        let widths = Widths {
            qkv: widest(&|layer| layer.qkv.out_features()),
            gate_up: widest(&|layer| layer.used() * layer.ffn.up.out_features()),
            ffn: widest(&|layer| layer.used() * layer.ffn.width),
            experts: {
                let mut choices: Vec<ExpertChoice> = Vec::new();
                for (_, choice) in weights.layers.iter().filter_map(|layer| layer.router.as_ref()) {
                    if !choices.contains(choice) {
                        choices.push(*choice);
                    }
                }
                choices
            },
        };
        let (graphs, logits) = (options.graphs, Vec::new());
        let (work, pool, member) = (None, None, None);
        Ok(Self { gpu, spec, kv_dtype, dtype, graphs, weights, widths, work, pool, logits, member })
    }

    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Bytes of weights on the device.
    pub fn weight_bytes(&self) -> u64 {
        self.weights.bytes() as u64
    }

    /// What computes, and how: changes when its speed may.
    pub fn device(&self) -> String {
        let DeviceFacts { name, driver_cuda, .. } = self.gpu.facts();
        format!("{name}, CUDA {driver_cuda}, {}", self.dtype.name())
    }

    fn kv_shape(&self, block_size: usize) -> KvShape {
        let ModelSpec { kv_heads, head_dim, .. } = self.spec;
        KvShape { kv_heads, head_dim, block_size, dtype: self.kv_dtype }
    }

    fn group(&self) -> usize {
        self.spec.heads / self.spec.kv_heads
    }

    /// What steps may have; a default of its own until [`CausalLm::reserve`] is called.
    fn limits(&self) -> StepLimits {
        let table_entries = SEQUENCES * self.spec.context.div_ceil(BLOCK_SIZE);
        let default = StepLimits { rows: ROWS, sequences: SEQUENCES, table_entries };
        self.work.as_ref().map_or(default, |work| work.limits)
    }

    /// Works with these blocks from now on.
    fn use_pool(&mut self, kv: DeviceKv) -> Result<(), ForwardError> {
        self.pool = Some(Pool::new(self, kv).map_err(failed)?);
        self.record();
        Ok(())
    }

    /// What a batch is checked against.
    fn batch_limits(&self) -> Result<BatchLimits, ForwardError> {
        let Some(pool) = &self.pool else { return Err(ForwardError("there is no KV pool yet".into())) };
        Ok(BatchLimits {
            vocab_size: self.spec.vocab,
            context_length: self.spec.context,
            blocks: pool.blocks,
            block_size: pool.block_size,
        })
    }

    /// Has the memory for a batch that is larger than what was reserved; nothing may be in flight.
    fn make_room(&mut self, batch: &Batch) -> Result<(), ForwardError> {
        let StepLimits { rows, sequences, table_entries } = self.limits();
        let larger = StepLimits {
            rows: rows.max(batch.tokens.len()),
            sequences: sequences.max(batch.spans.len()),
            table_entries: table_entries.max(batch.block_tables.len()),
        };
        if larger == self.limits() { Ok(()) } else { self.reserve(larger) }
    }

    fn stage(&self) -> Stage<'_> {
        let (Some(work), Some(pool)) = (&self.work, &self.pool) else {
            unreachable!("a batch is admitted before it runs")
        };
        let Self { gpu, spec, weights, .. } = self;
        let others = self.member.as_ref().and_then(Member::communicator);
        Stage { gpu, spec, weights, cache: &pool.cache, work, others }
    }

    /// Runs a batch and reads its logits.
    fn run(&mut self, batch: &Batch) -> Result<(), GpuError> {
        self.gpu.bind()?;
        let (Some(work), Some(pool)) = (&self.work, &mut self.pool) else {
            unreachable!("a batch is admitted before it runs")
        };
        let shape = pool.plan.plan(&batch.spans, &batch.positions, &batch.block_tables);
        // The time until the next step's end is not that step's.
        pool.queue.clear();
        self.gpu.send_batch(&pool.plan, &mut pool.queue.slot().plan, &pool.cache.batch)?;
        pool.queue.slot().inputs.send(&self.gpu, work, batch, 0)?;
        let (logit_rows, most) = (batch.logit_rows.len(), work.logit_rows_most());
        self.stage().run_layers(shape, logit_rows)?;
        let vocab = self.spec.vocab;
        self.logits.clear();
        let mut bytes = vec![0; most.min(logit_rows) * vocab * size_of::<f32>()];
        for first in (0..logit_rows).step_by(most) {
            let rows = most.min(logit_rows - first);
            let stage = self.stage();
            stage.run_head(first, rows, logit_rows)?;
            let bytes = &mut bytes[..rows * vocab * size_of::<f32>()];
            self.gpu.read(&stage.work.logits, 0, bytes)?;
            self.logits.extend(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)));
        }
        // The staging memory is free for the next batch.
        self.gpu.synchronize()
    }
}

/// The type in which a model's activations lose nothing that its weights have.
fn own_dtype(linear: &Linear) -> Dtype {
    let dense = linear.products().find_map(|(weight, ..)| match weight {
        Weight::Dense(weight) => Some(weight.data()),
        Weight::Packed(_) => None,
    });
    match dense {
        Some(DenseData::F32(_)) => Dtype::F32,
        Some(DenseData::F16(_)) => Dtype::F16,
        Some(DenseData::Bf16(_)) | None => Dtype::Bf16,
    }
}

fn dtype_of(dtype: ComputeDtype) -> Dtype {
    match dtype {
        ComputeDtype::F32 => Dtype::F32,
        ComputeDtype::F16 => Dtype::F16,
        ComputeDtype::Bf16 => Dtype::Bf16,
    }
}

impl CausalLm for CudaDecoder {
    fn reserve(&mut self, limits: StepLimits) -> Result<(), ForwardError> {
        // The old memory goes first, as both together may not fit; K and V stay.
        let kv = self.pool.take().map(|pool| pool.cache.kv);
        self.work = None;
        let work = Work::new(&self.gpu, &self.spec, &self.widths, limits, self.dtype);
        self.work = Some(work.map_err(failed)?);
        kv.map_or(Ok(()), |kv| self.use_pool(kv))
    }

    fn device_memory(&self) -> Result<Option<DeviceMemory>, ForwardError> {
        self.gpu.bind().map_err(failed)?;
        let (free, total) = self.gpu.memory().map_err(failed)?;
        Ok(Some(DeviceMemory { free, total }))
    }

    fn queue(&mut self) -> Option<&mut dyn StepQueue> {
        Some(self)
    }

    fn vocab_size(&self) -> usize {
        self.spec.vocab
    }

    fn context_length(&self) -> usize {
        self.spec.context
    }

    fn kv_bytes_per_token(&self) -> u64 {
        (self.spec.layers.len() * DeviceKv::token_bytes(self.kv_shape(BLOCK_SIZE))) as u64
    }

    fn allocate_kv(&mut self, blocks: usize, block_size: usize) -> Result<(), ForwardError> {
        self.pool = None;
        if self.work.is_none() {
            self.reserve(self.limits())?;
        }
        let kv = DeviceKv::new(&self.gpu, self.kv_shape(block_size), self.spec.layers.len(), blocks);
        self.use_pool(kv.map_err(failed)?)
    }

    fn forward(&mut self, batch: &Batch) -> Result<&[f32], ForwardError> {
        batch.check(self.batch_limits()?)?;
        self.make_room(batch)?;
        self.logits.clear();
        if !batch.tokens.is_empty() {
            self.run(batch).map_err(failed)?;
        }
        Ok(&self.logits)
    }
}
