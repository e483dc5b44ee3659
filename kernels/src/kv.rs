//! One layer's paged K and V in f16.
//!
//! A block holds `block_size` positions of one sequence, in strips of 16. K is laid out (block, kv head,
//! strip, head_dim, 16) so that 16 positions' scores are computed side by side; V is (block, kv head,
//! block_size, head_dim padded to a multiple of 16). Knows no sequence: who owns a block is the caller's matter.

use half::f16;

/// Positions side by side in a strip of K.
pub(crate) const STRIP: usize = 16;

/// The sizes of a layer's KV.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Positions in a block: a multiple of 16.
    pub block_size: usize,
}

impl KvShape {
    /// Bytes of one block, K and V.
    pub fn block_bytes(&self) -> usize {
        2 * self.kv_heads * self.block_size * (self.head_dim + self.v_dim())
    }

    /// Length of a row of V.
    pub(crate) fn v_dim(&self) -> usize {
        self.head_dim.next_multiple_of(16)
    }

    /// Where `block`'s K of `kv_head` starts.
    pub(crate) fn k_start(&self, block: usize, kv_head: usize) -> usize {
        (block * self.kv_heads + kv_head) * self.block_size * self.head_dim
    }

    /// Where `block`'s V of `kv_head` starts.
    pub(crate) fn v_start(&self, block: usize, kv_head: usize) -> usize {
        (block * self.kv_heads + kv_head) * self.block_size * self.v_dim()
    }

    /// Offset of K's element `d` at `slot` of a block.
    pub(crate) fn k_offset(&self, slot: usize, d: usize) -> usize {
        ((slot / STRIP) * self.head_dim + d) * STRIP + slot % STRIP
    }
}

/// One layer's blocks.
pub struct KvLayer {
    shape: KvShape,
    blocks: usize,
    pub(crate) k: Vec<u16>,
    pub(crate) v: Vec<u16>,
}

impl KvLayer {
    /// All zero.
    ///
    /// # Panics
    /// When the block size is 0 or no multiple of 16.
    pub fn new(shape: KvShape, blocks: usize) -> Self {
        assert!(
            shape.block_size > 0 && shape.block_size.is_multiple_of(STRIP),
            "kv: block size {} is no multiple of {STRIP}",
            shape.block_size
        );
        let positions = blocks * shape.kv_heads * shape.block_size;
        let (k, v) = (vec![0; positions * shape.head_dim], vec![0; positions * shape.v_dim()]);
        Self { shape, blocks, k, v }
    }

    pub fn shape(&self) -> KvShape {
        self.shape
    }

    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        2 * (self.k.len() + self.v.len())
    }

    /// K and V (head_dim each) of `kv_head` at `slot` of `block`: slow, for tests.
    pub fn read(&self, block: usize, kv_head: usize, slot: usize) -> (Vec<f32>, Vec<f32>) {
        let (k_start, v_start) = (self.shape.k_start(block, kv_head), self.shape.v_start(block, kv_head));
        let single = |bits: u16| f16::from_bits(bits).to_f32();
        let k = |d| single(self.k[k_start + self.shape.k_offset(slot, d)]);
        let v = |d| single(self.v[v_start + slot * self.shape.v_dim() + d]);
        ((0..self.shape.head_dim).map(k).collect(), (0..self.shape.head_dim).map(v).collect())
    }
}
