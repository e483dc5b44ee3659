//! What a batch's attention is, as the kernels read it, and how their work is cut.
//!
//! A kv head's query heads share its K and V: the queries of a span are (row, head of the group) pairs, rows
//! first. They are cut into tiles. The context is cut into parts of 256 positions, from position 0.
//!
//! - Spans of few queries are *split*: tiles of 16 queries, and each part of the context by itself; the parts
//!   are merged afterwards from a workspace.
//! - Other spans, and those that the workspace has no room for, have tiles of 64 queries that walk over all
//!   parts.
//!
//! Both give the same bits. Knows no layer: windows narrow the work on the device.

use std::ops::Range;

use super::{DeviceKv, number};
use crate::Span;
use crate::cuda::{Buffer, Gpu, GpuError, Pinned};

/// Positions of a part of a context: as `PART` in attention.cuh.
pub(super) const PART: usize = 256;

/// Queries of a split tile: as in attention.cuh.
pub(super) const SPLIT_QUERIES: usize = 16;

/// Queries of other tiles: as in attention.cuh.
pub(super) const TILE_QUERIES: usize = 64;

/// The position of rows that no span covers.
const NO_ROW: u32 = u32::MAX;

/// What batches may have. Sizes of buffers follow from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionLimits {
    pub rows: usize,
    pub spans: usize,
    /// Entries of all block tables of a batch.
    pub table_entries: usize,
    /// Positions of a sequence.
    pub context: usize,
    /// Query heads that share a kv head.
    pub group: usize,
    /// Blocks of the cache.
    pub blocks: usize,
    /// Positions of a block.
    pub block_size: usize,
    /// Parts of 256 positions, times rows, that the workspace holds for spans that are split.
    pub partials: usize,
}

impl AttentionLimits {
    /// Words of the description's sections; the tables come last, as their length varies most.
    fn sections(&self) -> Sections {
        let mut end = 0;
        let mut section = |words: usize| {
            let start = end;
            // Aligned for reads of 4 words.
            end += words.next_multiple_of(4);
            start..start + words
        };
        Sections {
            spans: section(self.spans * SPAN_WORDS),
            positions: section(self.rows),
            row_tables: section(self.rows),
            split: section(self.split_tiles() * TILE_WORDS),
            tiles: section(self.tiles() * TILE_WORDS),
            tables: section(self.table_entries),
        }
    }

    /// Split tiles of as many spans as may be.
    fn split_tiles(&self) -> usize {
        self.spans * self.group.div_ceil(SPLIT_QUERIES)
    }

    /// Other tiles: of as many rows as may be, each span's last one perhaps not full.
    fn tiles(&self) -> usize {
        self.rows * self.group / TILE_QUERIES + self.spans
    }
}

const SPAN_WORDS: usize = 8;
const TILE_WORDS: usize = 2;

#[derive(Debug, Clone)]
struct Sections {
    spans: Range<usize>,
    positions: Range<usize>,
    row_tables: Range<usize>,
    split: Range<usize>,
    tiles: Range<usize>,
    tables: Range<usize>,
}

/// What launches depend on. A captured graph may be launched for all batches of the same shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct BatchShape {
    /// Rows, those included that no span covers.
    pub rows: u32,
    /// Tiles of spans that are split.
    pub split_tiles: u32,
    /// Parts of the longest context of those.
    pub parts: u32,
    /// Tiles of other spans.
    pub tiles: u32,
}

/// A shape that decoded batches are padded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DecodeBucket {
    /// Spans of one row each.
    pub sequences: usize,
    /// Parts of 256 positions of the longest context.
    pub parts: usize,
}

impl DecodeBucket {
    /// Parts of a context of `positions`.
    pub fn parts_of(positions: usize) -> usize {
        positions.div_ceil(PART)
    }

    /// The shape of batches planned for it, with `group` query heads to a kv head.
    pub fn shape(&self, group: usize) -> BatchShape {
        BatchShape {
            rows: number(self.sequences),
            split_tiles: number(self.sequences * group.div_ceil(SPLIT_QUERIES)),
            parts: number(self.parts),
            tiles: 0,
        }
    }
}

/// A batch's description on the host.
pub struct AttentionPlan {
    limits: AttentionLimits,
    sections: Sections,
    words: Vec<u32>,
    /// Entries of `tables` in use.
    table_entries: usize,
    shape: BatchShape,
    partials: usize,
}

impl AttentionPlan {
    /// Of no batch yet.
    pub fn new(limits: AttentionLimits) -> Self {
        assert!(limits.group > 0 && limits.block_size > 0, "attention plan: no heads or no blocks");
        let sections = limits.sections();
        let words = vec![0; sections.tables.end];
        Self { limits, sections, words, table_entries: 0, shape: BatchShape::default(), partials: 0 }
    }

    /// Plans a batch of any spans; their rows do not overlap. Does not allocate.
    ///
    /// # Panics
    /// When it is over the limits, or a span's positions are not consecutive or not covered by its blocks.
    pub fn plan(&mut self, spans: &[Span], positions: &[u32], block_tables: &[u32]) -> BatchShape {
        self.start(spans, positions, block_tables);
        for (i, span) in spans.iter().enumerate() {
            self.add(i, span, positions);
        }
        self.shape
    }

    /// Plans a batch of spans of one row each, padded to the bucket's shape. Does not allocate.
    ///
    /// # Panics
    /// As [`AttentionPlan::plan`], or when the batch does not fit into the bucket.
    pub fn plan_decode(
        &mut self,
        spans: &[Span],
        positions: &[u32],
        block_tables: &[u32],
        bucket: DecodeBucket,
    ) -> BatchShape {
        let DecodeBucket { sequences, parts } = bucket;
        let Self { limits, .. } = self;
        assert!(
            sequences <= limits.rows.min(limits.spans) && sequences * parts <= limits.partials,
            "attention plan: {bucket:?} is over the limits {limits:?}"
        );
        assert!(
            spans.len() <= sequences && positions.len() <= sequences,
            "attention plan: {} spans of {} rows are over {bucket:?}",
            spans.len(),
            positions.len()
        );
        assert!(spans.iter().all(|span| span.rows.len() == 1), "attention plan: a decoding span is one row");
        self.plan(spans, positions, block_tables);
        let shape = bucket.shape(self.limits.group);
        assert!(
            self.shape.parts <= shape.parts && self.shape.tiles == 0,
            "attention plan: {:?} is over {bucket:?}",
            self.shape
        );
        // The tiles of what is not there belong to a span without rows.
        let empty = spans.len();
        if empty < sequences {
            self.words[self.sections.spans.start + empty * SPAN_WORDS..][..SPAN_WORDS].fill(0);
        }
        let split = self.sections.split.start;
        for tile in self.shape.split_tiles..shape.split_tiles {
            let at = split + tile as usize * TILE_WORDS;
            self.words[at..at + TILE_WORDS].copy_from_slice(&[number(empty), 0]);
        }
        for row in positions.len()..sequences {
            self.words[self.sections.positions.start + row] = NO_ROW;
        }
        self.shape = shape;
        shape
    }

    /// Shape of the batch planned last.
    pub fn shape(&self) -> BatchShape {
        self.shape
    }

    pub fn limits(&self) -> &AttentionLimits {
        &self.limits
    }

    /// Bytes of [`AttentionPlan::copy_to`], at most.
    pub fn bytes_most(&self) -> usize {
        self.words.len() * size_of::<u32>()
    }

    /// Writes the description of the batch planned last; the bytes written.
    ///
    /// # Panics
    /// When `to` is too short.
    pub fn copy_to(&self, to: &mut [u8]) -> usize {
        let words = &self.words[..self.sections.tables.start + self.table_entries];
        let (to, _) = to[..size_of_val(words)].as_chunks_mut::<4>();
        for (to, word) in to.iter_mut().zip(words) {
            *to = word.to_le_bytes();
        }
        size_of_val(words)
    }

    fn start(&mut self, spans: &[Span], positions: &[u32], block_tables: &[u32]) {
        let Self { limits, sections, words, .. } = self;
        assert!(
            positions.len() <= limits.rows
                && spans.len() <= limits.spans
                && block_tables.len() <= limits.table_entries,
            "attention plan: {} rows, {} spans, {} table entries are over {limits:?}",
            positions.len(),
            spans.len(),
            block_tables.len()
        );
        words[sections.positions.clone()][..positions.len()].fill(NO_ROW);
        words[sections.tables.clone()][..block_tables.len()].copy_from_slice(block_tables);
        self.table_entries = block_tables.len();
        self.shape = BatchShape { rows: number(positions.len()), ..BatchShape::default() };
        self.partials = 0;
    }

    fn add(&mut self, i: usize, span: &Span, positions: &[u32]) {
        let (rows, table) = (span.rows.len(), span.table.start);
        let first = check_span(
            &self.limits,
            span,
            positions,
            &self.words[self.sections.tables.clone()][..self.table_entries],
        );
        let queries = rows * self.limits.group;
        let parts = (first + rows).div_ceil(PART);
        let few = rows == 1 || queries <= SPLIT_QUERIES;
        let is_split = few && self.partials + rows * parts <= self.limits.partials;
        let slot = if is_split { self.partials } else { 0 };
        let words = [span.rows.start, rows, first, table, slot, 0, 0, 0].map(number);
        self.words[self.sections.spans.start + i * SPAN_WORDS..][..SPAN_WORDS].copy_from_slice(&words);
        for row in 0..rows {
            self.words[self.sections.positions.start + span.rows.start + row] = number(first + row);
            self.words[self.sections.row_tables.start + span.rows.start + row] = number(table);
        }
        let (section, count, each) = match is_split {
            true => (&self.sections.split, &mut self.shape.split_tiles, SPLIT_QUERIES),
            false => (&self.sections.tiles, &mut self.shape.tiles, TILE_QUERIES),
        };
        // Last first: those have the longest contexts, and should not be the last to end.
        for tile in (0..queries.div_ceil(each)).rev() {
            let at = section.start + *count as usize * TILE_WORDS;
            self.words[at..at + TILE_WORDS].copy_from_slice(&[number(i), number(tile * each)]);
            *count += 1;
        }
        if is_split {
            self.partials += rows * parts;
            self.shape.parts = self.shape.parts.max(number(parts));
        }
    }
}

/// The position of a span's first row; 0 if it has none.
fn check_span(limits: &AttentionLimits, span: &Span, positions: &[u32], tables: &[u32]) -> usize {
    assert!(
        span.rows.end <= positions.len(),
        "attention plan: span {span:?} has rows past {}",
        positions.len()
    );
    let table = &tables[span.table.clone()];
    let positions = &positions[span.rows.clone()];
    let (Some(first), Some(last)) = (positions.first(), positions.last()) else { return 0 };
    for pair in positions.windows(2) {
        assert!(pair[1] == pair[0] + 1, "attention plan: a span's positions are not consecutive");
    }
    let last = *last as usize;
    assert!(last < limits.context, "attention plan: position {last} is past a context of {}", limits.context);
    let need = last / limits.block_size + 1;
    assert!(table.len() >= need, "attention plan: {} blocks, position {last} needs {need}", table.len());
    for block in &table[..need] {
        let block = *block as usize;
        assert!(block < limits.blocks, "attention plan: no block {block} in {}", limits.blocks);
    }
    *first as usize
}

/// A batch's description on a device, at an address that does not change.
pub struct DeviceBatch {
    buffer: Buffer,
    limits: AttentionLimits,
    sections: Sections,
}

/// As `BatchRows` in attention_types.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct RowArguments {
    positions: u64,
    tables: u64,
    pub(super) block_tables: u64,
}

impl DeviceBatch {
    /// Of no batch yet.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`]
    pub fn new(gpu: &Gpu, limits: AttentionLimits) -> Result<Self, GpuError> {
        let sections = limits.sections();
        let buffer = gpu.allocate(sections.tables.end * size_of::<u32>())?;
        Ok(Self { buffer, limits, sections })
    }

    pub fn limits(&self) -> &AttentionLimits {
        &self.limits
    }

    pub fn bytes(&self) -> usize {
        self.buffer.bytes()
    }

    fn address(&self, section: &Range<usize>) -> u64 {
        self.buffer.address() + (section.start * size_of::<u32>()) as u64
    }

    pub(super) fn spans(&self) -> u64 {
        self.address(&self.sections.spans)
    }

    pub(super) fn split_tiles(&self) -> u64 {
        self.address(&self.sections.split)
    }

    pub(super) fn tiles(&self) -> u64 {
        self.address(&self.sections.tiles)
    }

    pub(super) fn rows(&self) -> RowArguments {
        RowArguments {
            positions: self.address(&self.sections.positions),
            tables: self.address(&self.sections.row_tables),
            block_tables: self.address(&self.sections.tables),
        }
    }

    /// # Panics
    /// When `shape` or the cache is not as the limits say.
    pub(super) fn check(&self, what: &str, kv: &DeviceKv, shape: &BatchShape) {
        let AttentionLimits { rows, blocks, block_size, partials, .. } = self.limits;
        assert!(
            shape.rows as usize <= rows
                && shape.split_tiles as usize <= self.limits.split_tiles()
                && shape.tiles as usize <= self.limits.tiles()
                && shape.parts as usize <= partials,
            "{what}: {shape:?} is over {:?}",
            self.limits
        );
        assert!(
            kv.blocks() >= blocks && kv.shape().block_size == block_size,
            "{what}: planned for {blocks} blocks of {block_size}"
        );
    }
}

impl Gpu {
    /// Copies the plan's batch to the device by way of `staging`, in the stream's order; does not wait. The
    /// caller leaves `staging` as it is until the copy is done.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When the plan is not for the batch's limits, or `staging` is shorter than [`AttentionPlan::bytes_most`].
    pub fn send_batch(
        &self,
        plan: &AttentionPlan,
        staging: &mut Pinned,
        batch: &DeviceBatch,
    ) -> Result<(), GpuError> {
        assert!(plan.limits == batch.limits, "attention: a plan and a batch of different limits");
        let bytes = plan.copy_to(staging.bytes_mut());
        self.send(staging, bytes, &batch.buffer, 0)
    }
}
