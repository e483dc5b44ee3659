//! The blocks of K and V of all layers, and what they cost in bytes.
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

/// One layer's KV.
fn shape(spec: &ModelSpec, dtype: KvDtype, block_size: usize) -> KvShape {
    KvShape { kv_heads: spec.kv_heads, head_dim: spec.head_dim, block_size, dtype }
}

/// Bytes of K and V that one token takes in all layers, scales and padding included.
pub(crate) fn bytes_per_token(spec: &ModelSpec, dtype: KvDtype) -> u64 {
    (spec.layers.len() * shape(spec, dtype, BLOCK_SIZE_UNIT).token_bytes()) as u64
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
    pub(crate) fn new(
        spec: &ModelSpec,
        dtype: KvDtype,
        blocks: usize,
        block_size: usize,
    ) -> Result<Self, ForwardError> {
        if block_size == 0 || !block_size.is_multiple_of(BLOCK_SIZE_UNIT) {
            let problem = format!("a block size of {block_size} is no multiple of {BLOCK_SIZE_UNIT}");
            return Err(ForwardError(problem));
        }
        check_memory(spec, dtype, blocks, block_size)?;
        let shape = shape(spec, dtype, block_size);
        let layers = spec.layers.iter().map(|_| KvLayer::try_new(shape, blocks));
        let layers = layers.collect::<Result<_, _>>().map_err(|error| ForwardError(error.to_string()))?;
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

/// Asks for the whole pool's memory once and gives it back: each layer's may be had where all together may
/// not, and then the pages would be missing when they are written.
fn check_memory(
    spec: &ModelSpec,
    dtype: KvDtype,
    blocks: usize,
    block_size: usize,
) -> Result<(), ForwardError> {
    let bytes = (blocks as u64)
        .checked_mul(block_size as u64)
        .and_then(|tokens| tokens.checked_mul(bytes_per_token(spec, dtype)))
        .and_then(|bytes| usize::try_from(bytes).ok())
        .ok_or_else(|| {
            ForwardError(format!("{blocks} KV blocks of {block_size} tokens are absurdly many"))
        })?;
    Vec::<u8>::new()
        .try_reserve_exact(bytes)
        .map_err(|_| ForwardError(format!("no memory for {blocks} KV blocks ({} MiB)", bytes >> 20)))
}
