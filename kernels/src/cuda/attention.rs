//! Paged attention over a ragged batch.

mod kv;
mod plan;

pub use kv::{DeviceKv, DeviceQkv, DeviceRope};
pub use plan::{AttentionLimits, AttentionPlan, BatchShape, DecodeBucket, DeviceBatch};

use super::gpu::{Kernel, Modules, Shape, arguments};
use super::{Buffer, DeviceRows, Dtype, Gpu, GpuError};
use crate::{KvDtype, KvShape};
use kv::LayerArguments;
use plan::{PART, RowArguments, SPLIT_QUERIES};
use std::f32::consts::LOG2_E;

/// Heads of a row that a block of the plain kernel has, one a warp.
const PLAIN_WARPS: u32 = 4;

/// Head sizes and types of the cache that there are kernels on tensor cores for.
const HEAD_DIMS: [usize; 5] = [64, 80, 96, 128, 256];
const KV_DTYPES: [KvDtype; 3] = [KvDtype::F16, KvDtype::Bf16, KvDtype::Int8];

/// Keys of a tile in shared memory: as `TILE` in attention.cuh.
const TILE_KEYS: u32 = 32;

/// Queries of a split tile that a block of `attention_merge` has, one a warp.
const MERGE_WARPS: u32 = 4;

pub(crate) struct AttentionKernels {
    pub(super) rope_kv_write: Kernel,
    /// By the number of the cache's type.
    plain: [Kernel; 4],
    fast: Vec<FastKernels>,
    merge: Kernel,
}

/// The kernels on tensor cores for one head size and type of the cache.
#[derive(Clone, Copy)]
struct FastKernels {
    head_dim: usize,
    kv: KvDtype,
    tiles: FastKernel,
    split: FastKernel,
}

#[derive(Clone, Copy)]
struct FastKernel {
    kernel: Kernel,
    threads: u32,
    shared: u32,
}

impl FastKernel {
    /// Sizes are those of `Sizes` in attention.cuh.
    fn load(modules: &Modules, head_dim: usize, kv: KvDtype, is_split: bool) -> Result<Self, GpuError> {
        let dim = number(head_dim);
        let query_warps = if is_split { 1 } else { 4 };
        let shares = if dim > 128 { 2 } else { 1 };
        let stages = if is_split && dim <= 128 { 3 } else { 2 };
        let (chunks, scales) = match kv {
            KvDtype::Int8 => (dim / 16, 4 * TILE_KEYS),
            _ => (dim / 8, 0),
        };
        let stage = 2 * (TILE_KEYS * (chunks | 1) * 16 + scales);
        let queries = if shares > 1 { query_warps * dim / 16 * 32 * 16 } else { 0 };
        let shared = stages * stage + queries;
        let variant = if is_split { "split" } else { "tiles" };
        let name = format!("attention_{variant}_{kv}_{head_dim}");
        let kernel = modules.kernel(&format!("attention_{kv}"), &name, shared)?;
        Ok(Self { kernel, threads: 32 * query_warps * shares, shared })
    }

    fn shape(&self, grid: [u32; 3]) -> Shape {
        Shape { grid, block: [self.threads, 1, 1], shared: self.shared }
    }
}

impl AttentionKernels {
    pub(crate) fn load(modules: &Modules) -> Result<Self, GpuError> {
        let plain = |dtype: &str| modules.kernel("attention_plain", &format!("attention_plain_{dtype}"), 0);
        let mut fast = Vec::new();
        for head_dim in HEAD_DIMS {
            for kv in KV_DTYPES {
                let load = |is_split| FastKernel::load(modules, head_dim, kv, is_split);
                fast.push(FastKernels { head_dim, kv, tiles: load(false)?, split: load(true)? });
            }
        }
        Ok(Self {
            rope_kv_write: modules.kernel("kv", "rope_kv_write", 0)?,
            plain: [plain("f32")?, plain("f16")?, plain("bf16")?, plain("int8")?],
            fast,
            merge: modules.kernel("attention_merge", "attention_merge", 0)?,
        })
    }

    /// The kernels on tensor cores, where there are some for this.
    fn fast(&self, dtype: Dtype, shape: KvShape) -> Option<FastKernels> {
        let fits = |kernels: &&FastKernels| kernels.head_dim == shape.head_dim && kernels.kv == shape.dtype;
        if dtype == Dtype::F32 { None } else { self.fast.iter().find(fits).copied() }
    }
}

/// Memory for the sums of parts of contexts, until they are merged.
pub struct AttentionWorkspace {
    buffer: Buffer,
    heads: usize,
    head_dim: usize,
    partials: usize,
}

impl AttentionWorkspace {
    /// For batches of plans with these limits.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`]
    pub fn new(gpu: &Gpu, limits: &AttentionLimits, heads: usize, head_dim: usize) -> Result<Self, GpuError> {
        let partials = limits.partials;
        let buffer = gpu.allocate(Self::size(partials, heads, head_dim))?;
        Ok(Self { buffer, heads, head_dim, partials })
    }

    /// Bytes that it takes: an f32 sum of each dim, the greatest score and the total weight, for each part of a
    /// row's context and each query head.
    pub fn size(partials: usize, heads: usize, head_dim: usize) -> usize {
        partials * heads * (head_dim + 2) * size_of::<f32>()
    }

    pub fn bytes(&self) -> usize {
        self.buffer.bytes()
    }
}

/// What [`Gpu::paged_attention`] attends to.
#[derive(Clone, Copy)]
pub struct DeviceAttention<'a> {
    pub kv: &'a DeviceKv,
    pub layer: usize,
    pub batch: &'a DeviceBatch,
    pub shape: BatchShape,
    pub workspace: &'a AttentionWorkspace,
    /// Query heads: a multiple of the cache's kv heads; head `h` reads kv head `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Factor on the scores, usually 1 / sqrt(head_dim).
    pub scale: f32,
    /// Positions that a row sees, itself included; all if none.
    pub window: Option<usize>,
    /// Scores become `cap * tanh(score / cap)` (Gemma 2).
    pub softcap: Option<f32>,
}

/// As `Plain` in attention_plain.cu.
#[repr(C)]
struct PlainArguments {
    q: u64,
    out: u64,
    q_stride: u64,
    out_stride: u64,
    rows: RowArguments,
    kv: LayerArguments,
    heads: u32,
    dtype: u32,
    window: u32,
    scale: f32,
    softcap: f32,
}

/// As `Attend` in attention.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
struct FastArguments {
    q: u64,
    out: u64,
    q_stride: u64,
    out_stride: u64,
    spans: u64,
    tiles: u64,
    block_tables: u64,
    sums: u64,
    ends: u64,
    kv: LayerArguments,
    heads: u32,
    dtype: u32,
    window: u32,
    scale: f32,
    slope: f32,
    cap: f32,
}

impl Gpu {
    /// out (rows, heads, head_dim) of queries q (rows, heads, head_dim) of the same type: a row at position p
    /// attends to positions `max(0, p + 1 - window)..=p` of its sequence, through its block table.
    ///
    /// Rows that no span covers are left as they are.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When shapes do not fit together.
    pub fn paged_attention(
        &self,
        q: DeviceRows<'_>,
        attention: &DeviceAttention<'_>,
        out: DeviceRows<'_>,
    ) -> Result<(), GpuError> {
        check(q, attention, out);
        match self.kernels().attention.fast(q.dtype, attention.kv.shape()) {
            Some(kernels) => self.attend_fast(kernels, q, attention, out),
            None => self.attend_plain(q, attention, out),
        }
    }

    fn attend_fast(
        &self,
        kernels: FastKernels,
        q: DeviceRows<'_>,
        attention: &DeviceAttention<'_>,
        out: DeviceRows<'_>,
    ) -> Result<(), GpuError> {
        let DeviceAttention { kv, batch, shape, workspace, heads, scale, softcap, .. } = *attention;
        let sums = workspace.buffer.address();
        let split = FastArguments {
            q: q.address(),
            out: out.address(),
            q_stride: q.stride as u64,
            out_stride: out.stride as u64,
            spans: batch.spans(),
            tiles: batch.split_tiles(),
            block_tables: batch.rows().block_tables,
            sums,
            ends: sums + (workspace.partials * heads * kv.shape().head_dim * size_of::<f32>()) as u64,
            kv: kv.layer(attention.layer),
            heads: number(heads),
            dtype: dtype_number(q.dtype),
            window: window(attention),
            scale: scale * LOG2_E,
            slope: softcap.map_or(0.0, |cap| 2.0 * LOG2_E * scale / cap),
            cap: softcap.map_or(0.0, |cap| cap * LOG2_E),
        };
        let tiles = FastArguments { tiles: batch.tiles(), ..split };
        let kv_heads = number(kv.shape().kv_heads);
        let parts = shape.parts.min(parts_seen(attention.window));
        let launch = |kernel: Kernel, shape: Shape, arguments: FastArguments| {
            // SAFETY: the arguments are the kernel's; the plan has checked what the batch points to, `check` the rest.
            unsafe { self.launch(kernel, shape, &mut arguments![arguments]) }
        };
        launch(kernels.tiles.kernel, kernels.tiles.shape([shape.tiles, kv_heads, 1]), tiles)?;
        launch(kernels.split.kernel, kernels.split.shape([shape.split_tiles, kv_heads, parts]), split)?;
        if parts < 2 {
            return Ok(());
        }
        let grid = [shape.split_tiles, kv_heads, number(SPLIT_QUERIES) / MERGE_WARPS];
        launch(self.kernels().attention.merge, Shape::new(grid, 32 * MERGE_WARPS), split)
    }

    fn attend_plain(
        &self,
        q: DeviceRows<'_>,
        attention: &DeviceAttention<'_>,
        out: DeviceRows<'_>,
    ) -> Result<(), GpuError> {
        let arguments = PlainArguments {
            q: q.address(),
            out: out.address(),
            q_stride: q.stride as u64,
            out_stride: out.stride as u64,
            rows: attention.batch.rows(),
            kv: attention.kv.layer(attention.layer),
            heads: number(attention.heads),
            dtype: dtype_number(q.dtype),
            window: window(attention),
            scale: attention.scale,
            softcap: attention.softcap.unwrap_or(0.0),
        };
        let kernel = self.kernels().attention.plain[kv_dtype_number(attention.kv.shape().dtype) as usize];
        let blocks = [attention.shape.rows, arguments.heads.div_ceil(PLAIN_WARPS), 1];
        // SAFETY: the arguments are the kernel's; the plan has checked what the batch points to, `check` the rest.
        unsafe { self.launch(kernel, Shape::new(blocks, 32 * PLAIN_WARPS), &mut arguments![arguments]) }
    }
}

fn check(q: DeviceRows<'_>, attention: &DeviceAttention<'_>, out: DeviceRows<'_>) {
    let DeviceAttention { kv, batch, shape, workspace, heads, window, softcap, .. } = attention;
    let (kv_heads, head_dim) = (kv.shape().kv_heads, kv.shape().head_dim);
    assert!(
        *heads > 0 && heads.is_multiple_of(kv_heads),
        "attention: {heads} heads do not share {kv_heads} kv heads"
    );
    let group = heads / kv_heads;
    assert!(
        group == batch.limits().group,
        "attention: planned for groups of {}, not {group}",
        batch.limits().group
    );
    assert!(*window != Some(0), "attention: a window of 0 positions");
    assert!(softcap.is_none_or(|cap| cap > 0.0), "attention: scores capped at {softcap:?}");
    assert!(q.dtype == out.dtype, "attention: q and out are of different types");
    assert!(
        workspace.heads == *heads && workspace.head_dim == head_dim,
        "attention: the workspace is for {} heads of {}",
        workspace.heads,
        workspace.head_dim
    );
    assert!(workspace.partials >= batch.limits().partials, "attention: the workspace is too small");
    batch.check("attention", kv, shape);
    for (what, rows) in [("attention q", q), ("attention out", out)] {
        assert!(
            rows.start.is_multiple_of(2) && rows.stride.is_multiple_of(2),
            "{what}: rows start at odd elements"
        );
    }
    q.check("attention q", shape.rows as usize, heads * head_dim);
    out.check("attention out", shape.rows as usize, heads * head_dim);
}

/// Parts that a span that is split sees at most, through a window.
fn parts_seen(window: Option<usize>) -> u32 {
    // Its rows' windows together, at the worst place.
    let seen = |window: usize| window.saturating_add(SPLIT_QUERIES - 1).saturating_add(PART - 2) / PART + 1;
    window.map(seen).and_then(|parts| u32::try_from(parts).ok()).unwrap_or(u32::MAX)
}

/// The window as kernels take it.
fn window(attention: &DeviceAttention<'_>) -> u32 {
    attention.window.and_then(|window| u32::try_from(window).ok()).unwrap_or(u32::MAX)
}

fn number(n: usize) -> u32 {
    u32::try_from(n).expect("sizes of tensors fit; this is a bug")
}

/// As `Number` in attention_types.cuh.
fn dtype_number(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::Bf16 => 2,
    }
}

/// As `Number` in attention_types.cuh.
fn kv_dtype_number(dtype: KvDtype) -> u32 {
    match dtype {
        KvDtype::F32 => 0,
        KvDtype::F16 => 1,
        KvDtype::Bf16 => 2,
        KvDtype::Int8 => 3,
    }
}
