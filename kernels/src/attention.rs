//! The arguments of paged attention over a ragged batch.

use std::ops::Range;

use crate::KvLayer;

/// One sequence's part of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Its rows: consecutive positions of one sequence.
    pub rows: Range<usize>,
    /// Its block table in `block_tables`: block `position / block_size` holds `position`.
    pub table: Range<usize>,
}

/// What [`crate::Cpu::paged_attention`] attends to.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    pub layer: &'a KvLayer,
    pub spans: &'a [Span],
    /// (rows)
    pub positions: &'a [u32],
    pub block_tables: &'a [u32],
    /// Query heads: a multiple of the layer's kv heads; head `h` reads kv head `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Factor on the scores, usually 1 / sqrt(head_dim).
    pub scale: f32,
    /// Positions that a row sees, itself included; all if none.
    pub window: Option<usize>,
    /// Scores become `cap * tanh(score / cap)` (Gemma 2).
    pub softcap: Option<f32>,
}

impl Attention<'_> {
    /// The first position that a row at `position` sees.
    pub(crate) fn first_seen(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// Checks that every span's rows exist and that its blocks cover its positions and exist.
pub(crate) fn check_spans(
    what: &str,
    layer: &KvLayer,
    spans: &[Span],
    positions: &[u32],
    block_tables: &[u32],
) {
    let block_size = layer.shape().block_size;
    for span in spans {
        assert!(span.rows.end <= positions.len(), "{what}: span {span:?} has rows past {}", positions.len());
        let table = &block_tables[span.table.clone()];
        let Some(last) = positions[span.rows.clone()].last() else { continue };
        for pair in positions[span.rows.clone()].windows(2) {
            assert!(pair[1] == pair[0] + 1, "{what}: a span's positions are not consecutive");
        }
        let need = *last as usize / block_size + 1;
        assert!(table.len() >= need, "{what}: {} blocks, position {last} needs {need}", table.len());
        for block in &table[..need] {
            assert!((*block as usize) < layer.blocks(), "{what}: no block {block} in {}", layer.blocks());
        }
    }
}
