//! One layer's paged K and V.
//!
//! A block holds `block_size` positions of one sequence, in strips of 16. K is laid out (block, kv head,
//! strip, head_dim, 16) so that 16 positions' scores are computed side by side; V is (block, kv head,
//! block_size, head_dim padded to a multiple of 16). With int8 each position's K and V of a kv head have a
//! scale, (block, kv head, block_size). Knows no sequence: who owns a block is the caller's matter.

use std::alloc::{Layout, alloc_zeroed};

use half::{bf16, f16};

use crate::KvDtype;

/// Positions side by side in a strip of K.
pub(crate) const STRIP: usize = 16;

/// The sizes of a layer's KV.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Positions in a block: a multiple of 16.
    pub block_size: usize,
    pub dtype: KvDtype,
}

impl KvShape {
    /// Bytes that one position takes: K and V, padding and scales included.
    pub fn token_bytes(&self) -> usize {
        let scales = if self.dtype == KvDtype::Int8 { 2 * size_of::<f32>() } else { 0 };
        self.kv_heads * (self.dtype.bytes() * (self.head_dim + self.v_dim()) + scales)
    }

    /// Bytes of one block.
    pub fn block_bytes(&self) -> usize {
        self.block_size * self.token_bytes()
    }

    /// Length of a row of V.
    pub(crate) fn v_dim(&self) -> usize {
        self.head_dim.next_multiple_of(16)
    }

    /// Where `block`'s K of `kv_head` starts.
    pub(crate) fn k_start(&self, block: usize, kv_head: usize) -> usize {
        self.scale_start(block, kv_head) * self.head_dim
    }

    /// Where `block`'s V of `kv_head` starts.
    pub(crate) fn v_start(&self, block: usize, kv_head: usize) -> usize {
        self.scale_start(block, kv_head) * self.v_dim()
    }

    /// Where the scales of `block`'s `kv_head` start.
    pub(crate) fn scale_start(&self, block: usize, kv_head: usize) -> usize {
        (block * self.kv_heads + kv_head) * self.block_size
    }

    /// Offset of K's element `d` at `slot` of a block.
    pub(crate) fn k_offset(&self, slot: usize, d: usize) -> usize {
        ((slot / STRIP) * self.head_dim + d) * STRIP + slot % STRIP
    }
}

/// K and V for memory that cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutOfMemory {
    /// What was asked for; `usize::MAX` where that is more than a `usize` holds.
    pub bytes: usize,
}

impl std::fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "no memory for {} MiB of KV cache", self.bytes >> 20)
    }
}

impl std::error::Error for OutOfMemory {}

/// One type's elements; the scales are empty where it has none.
pub(crate) struct Parts<T> {
    pub(crate) k: Vec<T>,
    pub(crate) v: Vec<T>,
    pub(crate) k_scales: Vec<f32>,
    pub(crate) v_scales: Vec<f32>,
}

pub(crate) enum KvData {
    Half(Parts<u16>),
    Brain(Parts<u16>),
    Single(Parts<f32>),
    Byte(Parts<i8>),
}

/// One layer's blocks.
pub struct KvLayer {
    shape: KvShape,
    blocks: usize,
    pub(crate) data: KvData,
}

impl KvLayer {
    /// All zero.
    ///
    /// # Panics
    /// When the block size is 0 or no multiple of 16, or there is no memory.
    pub fn new(shape: KvShape, blocks: usize) -> Self {
        Self::try_new(shape, blocks).unwrap_or_else(|error| panic!("kv: {error}"))
    }

    /// All zero; pages that the system hands out zeroed are not touched.
    ///
    /// # Errors
    /// When there is no memory.
    ///
    /// # Panics
    /// When the block size is 0 or no multiple of 16.
    pub fn try_new(shape: KvShape, blocks: usize) -> Result<Self, OutOfMemory> {
        assert!(
            shape.block_size > 0 && shape.block_size.is_multiple_of(STRIP),
            "kv: block size {} is no multiple of {STRIP}",
            shape.block_size
        );
        // With this known to fit, no product below overflows.
        let bytes = blocks.checked_mul(shape.block_bytes()).ok_or(OutOfMemory { bytes: usize::MAX })?;
        let data = match shape.dtype {
            KvDtype::F16 => Parts::zeroed(shape, blocks, false).map(KvData::Half),
            KvDtype::Bf16 => Parts::zeroed(shape, blocks, false).map(KvData::Brain),
            KvDtype::F32 => Parts::zeroed(shape, blocks, false).map(KvData::Single),
            KvDtype::Int8 => Parts::zeroed(shape, blocks, true).map(KvData::Byte),
        };
        Ok(Self { shape, blocks, data: data.ok_or(OutOfMemory { bytes })? })
    }

    pub fn shape(&self) -> KvShape {
        self.shape
    }

    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match &self.data {
            KvData::Half(parts) | KvData::Brain(parts) => parts.bytes(),
            KvData::Single(parts) => parts.bytes(),
            KvData::Byte(parts) => parts.bytes(),
        }
    }

    /// K and V (head_dim each) of `kv_head` at `slot` of `block`: slow, for tests.
    pub fn read(&self, block: usize, kv_head: usize, slot: usize) -> (Vec<f32>, Vec<f32>) {
        let at = (self.shape, block, kv_head, slot);
        match &self.data {
            KvData::Half(parts) => parts.read(at, |bits| f16::from_bits(bits).to_f32()),
            KvData::Brain(parts) => parts.read(at, |bits| bf16::from_bits(bits).to_f32()),
            KvData::Single(parts) => parts.read(at, |x| x),
            KvData::Byte(parts) => parts.read(at, f32::from),
        }
    }
}

impl<T: Zero> Parts<T> {
    fn zeroed(shape: KvShape, blocks: usize, scaled: bool) -> Option<Self> {
        let positions = blocks * shape.kv_heads * shape.block_size;
        let scales = if scaled { positions } else { 0 };
        Some(Self {
            k: zeroed(positions * shape.head_dim)?,
            v: zeroed(positions * shape.v_dim())?,
            k_scales: zeroed(scales)?,
            v_scales: zeroed(scales)?,
        })
    }

    fn bytes(&self) -> usize {
        size_of::<T>() * (self.k.len() + self.v.len())
            + size_of::<f32>() * (self.k_scales.len() + self.v_scales.len())
    }

    fn read(
        &self,
        (shape, block, kv_head, slot): (KvShape, usize, usize, usize),
        single: impl Fn(T) -> f32,
    ) -> (Vec<f32>, Vec<f32>) {
        let (k_start, v_start) = (shape.k_start(block, kv_head), shape.v_start(block, kv_head));
        let scale_at = shape.scale_start(block, kv_head) + slot;
        let scale = |scales: &[f32]| scales.get(scale_at).copied().unwrap_or(1.0);
        let (k_scale, v_scale) = (scale(&self.k_scales), scale(&self.v_scales));
        let k = |d| single(self.k[k_start + shape.k_offset(slot, d)]) * k_scale;
        let v = |d| single(self.v[v_start + slot * shape.v_dim() + d]) * v_scale;
        ((0..shape.head_dim).map(k).collect(), (0..shape.head_dim).map(v).collect())
    }
}

/// A number whose zero is all zero bytes.
///
/// # Safety
/// That is so.
pub(crate) unsafe trait Zero: Copy {}
// SAFETY: as the trait asks.
unsafe impl Zero for u16 {}
// SAFETY: as the trait asks.
unsafe impl Zero for i8 {}
// SAFETY: as the trait asks.
unsafe impl Zero for f32 {}

/// `len` zeros, or none where there is no memory for them.
fn zeroed<T: Zero>(len: usize) -> Option<Vec<T>> {
    if len == 0 {
        return Some(Vec::new());
    }
    let layout = Layout::array::<T>(len).ok()?;
    // SAFETY: the layout has a size; the memory is the global allocator's, of the layout that a vector of
    // this capacity has, and zero bytes are `len` zeros.
    unsafe {
        let start = alloc_zeroed(layout).cast::<T>();
        (!start.is_null()).then(|| Vec::from_raw_parts(start, len, len))
    }
}
