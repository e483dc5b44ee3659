//! The blocks of K and V of all layers, in f16, and what they cost in bytes.
//!
//! Does not know which sequence holds a block. Invariant: what lies in a block before it is written never
//! matters, because attention reads only positions that its sequence has written.

use obol_kernels::{KvDtype, KvLayer, KvShape};

use crate::batch::ForwardError;
use crate::spec::ModelSpec;

/// Blocks are whole strips of this many positions, the unit in which attention reads K.
const BLOCK_SIZE_UNIT: usize = 16;

/// One `KvLayer` a layer, all with the same blocks.
pub(crate) struct KvPool {
    layers: Vec<KvLayer>,
    blocks: usize,
    block_size: usize,
}

/// Bytes of K and V that one token takes in all layers.
pub(crate) fn bytes_per_token(spec: &ModelSpec) -> u64 {
    let values = 2 * spec.layers * spec.kv_heads * spec.head_dim;
    (values * size_of::<half::f16>()) as u64
}

impl KvPool {
    /// No blocks at all.
    pub(crate) fn empty() -> Self {
        Self { layers: Vec::new(), blocks: 0, block_size: BLOCK_SIZE_UNIT }
    }

    /// A pool of `blocks` blocks of `block_size` tokens.
    ///
    /// # Errors
    /// When `block_size` does not suit the kernels or the memory cannot be had.
    pub(crate) fn new(spec: &ModelSpec, blocks: usize, block_size: usize) -> Result<Self, ForwardError> {
        if block_size == 0 || !block_size.is_multiple_of(BLOCK_SIZE_UNIT) {
            let problem = format!("a block size of {block_size} is no multiple of {BLOCK_SIZE_UNIT}");
            return Err(ForwardError(problem));
        }
        check_memory(spec, blocks, block_size)?;
        let shape =
            KvShape { kv_heads: spec.kv_heads, head_dim: spec.head_dim, block_size, dtype: KvDtype::F16 };
        let layers = (0..spec.layers).map(|_| KvLayer::new(shape, blocks)).collect();
        Ok(Self { layers, blocks, block_size })
    }

    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    pub(crate) fn block_size(&self) -> usize {
        self.block_size
    }

    pub(crate) fn layer(&self, layer: usize) -> &KvLayer {
        &self.layers[layer]
    }

    pub(crate) fn layer_mut(&mut self, layer: usize) -> &mut KvLayer {
        &mut self.layers[layer]
    }
}

/// Asks for the whole pool's memory once and gives it back: a request that cannot be met must be an error,
/// and the layers' own allocation would end the process instead.
fn check_memory(spec: &ModelSpec, blocks: usize, block_size: usize) -> Result<(), ForwardError> {
    let bytes = (blocks as u64)
        .checked_mul(block_size as u64)
        .and_then(|tokens| tokens.checked_mul(bytes_per_token(spec)))
        .and_then(|bytes| usize::try_from(bytes).ok())
        .ok_or_else(|| {
            ForwardError(format!("{blocks} KV blocks of {block_size} tokens are absurdly many"))
        })?;
    Vec::<u8>::new()
        .try_reserve_exact(bytes)
        .map_err(|_| ForwardError(format!("no memory for {blocks} KV blocks ({} MiB)", bytes >> 20)))
}
