//! The KV cache on a device, the table of rope's angles, and writing both into the cache.
//!
//! Knows no sequence: who owns a block is the caller's matter.

use super::plan::{BatchShape, DeviceBatch, RowArguments};
use super::{dtype_number, kv_dtype_number, number};
use crate::cuda::gpu::{Shape, arguments};
use crate::cuda::{Buffer, DeviceRows, Gpu, GpuError};
use crate::{KvDtype, KvShape, RopeStyle, RopeTable};

/// The longest head that the kernels take.
const HEAD_DIM_MOST: usize = 256;

/// Heads of a row that a block of `rope_kv_write` has, one a warp.
const WRITE_WARPS: u32 = 8;

/// Positions whose angles are uploaded at once.
const POSITIONS_EACH: usize = 4096;

/// K and V of all layers: of each layer K and V (block, kv head, slot, head_dim), then with int8 the scales of K
/// and of V (block, kv head, slot) in f32.
pub struct DeviceKv {
    buffer: Buffer,
    shape: KvShape,
    layers: usize,
    blocks: usize,
}

/// As `KvLayer` in attention_types.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct LayerArguments {
    k: u64,
    v: u64,
    k_scales: u64,
    v_scales: u64,
    kv_heads: u32,
    head_dim: u32,
    block_size: u32,
    dtype: u32,
}

impl DeviceKv {
    /// Room for `blocks` blocks in each layer; what is in them at first is not known.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`] when the device has not so much.
    ///
    /// # Panics
    /// When the block size is 0 or no multiple of 16, or the head size is odd, 0 or over 256.
    pub fn new(gpu: &Gpu, shape: KvShape, layers: usize, blocks: usize) -> Result<Self, GpuError> {
        assert!(
            shape.block_size > 0 && shape.block_size.is_multiple_of(16),
            "kv: block size {} is no multiple of 16",
            shape.block_size
        );
        assert!(
            shape.head_dim > 0 && shape.head_dim.is_multiple_of(2) && shape.head_dim <= HEAD_DIM_MOST,
            "kv: heads of {} are odd or over {HEAD_DIM_MOST}",
            shape.head_dim
        );
        let bytes = Self::token_bytes(shape)
            .checked_mul(shape.block_size)
            .and_then(|block| block.checked_mul(blocks))
            .and_then(|layer| layer.checked_mul(layers))
            .ok_or(GpuError::OutOfMemory { bytes: usize::MAX })?;
        Ok(Self { buffer: gpu.allocate(bytes)?, shape, layers, blocks })
    }

    /// Bytes that one position takes in one layer: K and V, scales included.
    pub fn token_bytes(shape: KvShape) -> usize {
        let scale = if shape.dtype == KvDtype::Int8 { size_of::<f32>() } else { 0 };
        2 * shape.kv_heads * (shape.dtype.bytes() * shape.head_dim + scale)
    }

    pub fn shape(&self) -> KvShape {
        self.shape
    }

    pub fn layers(&self) -> usize {
        self.layers
    }

    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Bytes held, of all layers.
    pub fn bytes(&self) -> usize {
        self.buffer.bytes()
    }

    /// Where a layer's K, V, scales of K and scales of V start, in bytes.
    fn starts(&self, layer: usize) -> [usize; 4] {
        assert!(layer < self.layers, "kv: no layer {layer} in {}", self.layers);
        let slots = self.blocks * self.shape.block_size * self.shape.kv_heads;
        let start = layer * self.blocks * self.shape.block_size * Self::token_bytes(self.shape);
        let elements = slots * self.shape.head_dim * self.shape.dtype.bytes();
        let scales = if self.shape.dtype == KvDtype::Int8 { slots * size_of::<f32>() } else { 0 };
        [start, start + elements, start + 2 * elements, start + 2 * elements + scales]
    }

    pub(super) fn layer(&self, layer: usize) -> LayerArguments {
        let [k, v, k_scales, v_scales] = self.starts(layer).map(|start| self.buffer.address() + start as u64);
        LayerArguments {
            k,
            v,
            k_scales,
            v_scales,
            kv_heads: number(self.shape.kv_heads),
            head_dim: number(self.shape.head_dim),
            block_size: number(self.shape.block_size),
            dtype: kv_dtype_number(self.shape.dtype),
        }
    }

    /// K and V (head_dim each) of `kv_head` at `slot` of `block`: slow, for tests.
    ///
    /// # Errors
    /// When the device refuses, or work before failed.
    pub fn read(
        &self,
        gpu: &Gpu,
        layer: usize,
        block: usize,
        kv_head: usize,
        slot: usize,
    ) -> Result<(Vec<f32>, Vec<f32>), GpuError> {
        let [k, v, k_scales, v_scales] = self.starts(layer);
        let at = (block * self.shape.kv_heads + kv_head) * self.shape.block_size + slot;
        Ok((self.read_slot(gpu, k, k_scales, at)?, self.read_slot(gpu, v, v_scales, at)?))
    }

    fn read_slot(&self, gpu: &Gpu, data: usize, scales: usize, at: usize) -> Result<Vec<f32>, GpuError> {
        let width = self.shape.head_dim * self.shape.dtype.bytes();
        let mut bytes = vec![0; width];
        gpu.read(&self.buffer, data + at * width, &mut bytes)?;
        let mut scale = 1f32.to_le_bytes();
        if self.shape.dtype == KvDtype::Int8 {
            gpu.read(&self.buffer, scales + at * size_of::<f32>(), &mut scale)?;
        }
        let scale = f32::from_le_bytes(scale);
        let pairs = || bytes.as_chunks::<2>().0.iter();
        Ok(match self.shape.dtype {
            KvDtype::F16 => pairs().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
            KvDtype::Bf16 => pairs().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
            KvDtype::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            KvDtype::Int8 => bytes.iter().map(|b| f32::from(b.cast_signed()) * scale).collect(),
        })
    }
}

/// Cosines and sines of rope's angles at the positions 0..positions: f32 pairs (position, rotary_dim / 2).
pub struct DeviceRope {
    angles: Buffer,
    rotary_dim: usize,
    positions: usize,
    style: RopeStyle,
}

impl DeviceRope {
    /// The angles of `table`, whatever rows it was turned to.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`], or when the copy fails.
    pub fn new(gpu: &Gpu, table: &RopeTable, style: RopeStyle, positions: usize) -> Result<Self, GpuError> {
        let rotary_dim = table.rotary_dim();
        let row = rotary_dim * size_of::<f32>();
        let angles = gpu.allocate(positions * row)?;
        let mut table = table.clone();
        let (mut some, mut bytes) = (Vec::new(), Vec::new());
        for first in (0..positions).step_by(POSITIONS_EACH) {
            some.clear();
            bytes.clear();
            some.extend((first..positions.min(first + POSITIONS_EACH)).map(number));
            table.turn_to(&some);
            for (cos, sin) in table.cos.iter().zip(&table.sin) {
                bytes.extend_from_slice(&cos.to_le_bytes());
                bytes.extend_from_slice(&sin.to_le_bytes());
            }
            gpu.write(&angles, first * row, &bytes)?;
        }
        Ok(Self { angles, rotary_dim, positions, style })
    }

    /// Positions it has the angles of.
    pub fn positions(&self) -> usize {
        self.positions
    }

    pub fn bytes(&self) -> usize {
        self.angles.bytes()
    }
}

/// Queries, keys and values of a batch's rows, each (heads, head_dim), where products wrote them.
#[derive(Clone, Copy)]
pub struct DeviceQkv<'a> {
    /// Query heads.
    pub heads: usize,
    pub q: DeviceRows<'a>,
    pub k: DeviceRows<'a>,
    pub v: DeviceRows<'a>,
}

/// As `Write` in kv.cu.
#[repr(C)]
struct WriteArguments {
    q: u64,
    k: u64,
    v: u64,
    q_stride: u64,
    k_stride: u64,
    v_stride: u64,
    angles: u64,
    rows: RowArguments,
    kv: LayerArguments,
    heads: u32,
    dtype: u32,
    half: u32,
    halves: u32,
}

impl Gpu {
    /// Rotates q in place, where there is a rope, and writes k, rotated likewise, and v at the rows' positions of
    /// a layer of the cache, rounded to its type. k and v stay as they are. Elements of a head past the rope's
    /// rotary_dim are not rotated.
    ///
    /// With int8 K and V of each position and kv head have a scale, amax / 127, and are rounded half to even.
    /// Rows that no span covers are neither rotated nor written.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When shapes do not fit together.
    pub fn rope_kv_write(
        &self,
        qkv: DeviceQkv<'_>,
        rope: Option<&DeviceRope>,
        (kv, layer): (&DeviceKv, usize),
        batch: &DeviceBatch,
        shape: BatchShape,
    ) -> Result<(), GpuError> {
        check(qkv, rope, kv, batch, shape);
        let DeviceQkv { heads, q, k, v } = qkv;
        let arguments = WriteArguments {
            q: q.address(),
            k: k.address(),
            v: v.address(),
            q_stride: q.stride as u64,
            k_stride: k.stride as u64,
            v_stride: v.stride as u64,
            angles: rope.map_or(0, |rope| rope.angles.address()),
            rows: batch.rows(),
            kv: kv.layer(layer),
            heads: number(heads),
            dtype: dtype_number(q.dtype),
            half: rope.map_or(0, |rope| number(rope.rotary_dim / 2)),
            halves: u32::from(rope.is_some_and(|rope| rope.style == RopeStyle::Halves)),
        };
        let heads = number(heads + 2 * kv.shape.kv_heads);
        let blocks = [shape.rows, heads.div_ceil(WRITE_WARPS), 1];
        let kernel = self.kernels().attention.rope_kv_write;
        // SAFETY: the arguments are the kernel's; the plan has checked what the batch points to, `check` the rest.
        unsafe { self.launch(kernel, Shape::new(blocks, 32 * WRITE_WARPS), &mut arguments![arguments]) }
    }
}

fn check(
    qkv: DeviceQkv<'_>,
    rope: Option<&DeviceRope>,
    kv: &DeviceKv,
    batch: &DeviceBatch,
    shape: BatchShape,
) {
    let DeviceQkv { heads, q, k, v } = qkv;
    let head_dim = kv.shape.head_dim;
    let rows = shape.rows as usize;
    assert!(q.dtype == k.dtype && q.dtype == v.dtype, "kv write: q, k and v are of different types");
    for (what, rows_of, heads) in
        [("kv write q", q, heads), ("kv write k", k, kv.shape.kv_heads), ("kv write v", v, kv.shape.kv_heads)]
    {
        rows_of.check(what, rows, heads * head_dim);
        assert!(
            rows_of.start.is_multiple_of(2) && rows_of.stride.is_multiple_of(2),
            "{what}: rows start at odd elements"
        );
    }
    batch.check("kv write", kv, &shape);
    if let Some(rope) = rope {
        assert!(rope.rotary_dim <= head_dim, "rope: rotary_dim is over head_dim");
        assert!(
            rope.positions >= batch.limits().context,
            "rope: angles of {} positions, contexts have up to {}",
            rope.positions,
            batch.limits().context
        );
    }
}
