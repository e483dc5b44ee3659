//! Paged attention: tiles of a few query rows of one kv head against the KV axis, part by part.
//!
//! The KV axis is cut into parts at absolute multiples of [`PART`] positions. In a part a query's scores are
//! computed for 16 positions side by side, then its largest score, the sum of the exponentials and the sum of
//! the values; parts are merged in ascending order. A part's figures and the order of merging depend on
//! neither the tile nor on who computes the part, so a row's result is the same in every batch.
//!
//! With int8 K and V a position's scale of K multiplies its score, and its scale of V its exponential once
//! the exponentials are added up.

#![expect(clippy::needless_range_loop, reason = "tiles are indexed by row and column")]

use crate::Isa;
use crate::act::cap_vector;
use crate::attention::Attention;
use crate::element::{Brain, Byte, Element, Half, Single};
use crate::kv::{KvData, Parts, STRIP};
use crate::simd::{Kernel, LANES, Simd, dispatch};

/// Positions of a part.
pub(crate) const PART: usize = 256;

/// Queries (rows times heads of a kv head) of a tile, unless one row has more heads.
pub(crate) const TILE_QUERIES: usize = 16;

/// Rows of one span that are worked on together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tile {
    pub(crate) row: usize,
    pub(crate) rows: usize,
    /// Where its block table starts.
    pub(crate) table: usize,
}

/// Sizes that the queries' results take in scratch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    /// Query heads of a kv head.
    pub(crate) group: usize,
    pub(crate) head_dim: usize,
    /// V's row, padded to full vectors.
    pub(crate) v_dim: usize,
}

impl Sizes {
    pub(crate) fn of(attention: &Attention<'_>) -> Self {
        let shape = attention.layer.shape();
        Self { group: attention.heads / shape.kv_heads, head_dim: shape.head_dim, v_dim: shape.v_dim() }
    }

    pub(crate) fn tile_rows(&self) -> usize {
        (TILE_QUERIES / self.group).max(1)
    }

    pub(crate) fn tile_queries(&self) -> usize {
        self.tile_rows() * self.group
    }

    /// f32 of one query's figures: the values' sum, the largest score, the exponentials' sum.
    pub(crate) fn figures(&self) -> usize {
        self.v_dim + 2
    }

    /// f32 of scratch that a tile needs: scaled queries, scores, a part's figures, merged figures.
    pub(crate) fn scratch(&self) -> usize {
        self.tile_queries() * (self.head_dim + PART + 2 * self.figures())
    }
}

/// One tile and kv head: the parts `parts`, either merged into the output or each kept by itself.
pub(crate) struct AttendTile<'a> {
    /// Queries: row `i` starts at `q[i * q_stride]`.
    pub(crate) q: &'a [f32],
    pub(crate) q_stride: usize,
    pub(crate) attention: &'a Attention<'a>,
    pub(crate) tile: Tile,
    pub(crate) kv_head: usize,
    pub(crate) scratch: &'a mut [f32],
    pub(crate) todo: Todo<'a>,
}

pub(crate) enum Todo<'a> {
    /// Every part, merged; the output of each of the tile's rows and this kv head's heads.
    All(&'a crate::cpu::SharedMut<'a, f32>),
    /// One part's figures (queries, figures).
    Part(usize, &'a mut [f32]),
}

/// Merges parts that were kept: (parts, queries, figures) to the output.
pub(crate) struct MergeTile<'a> {
    pub(crate) attention: &'a Attention<'a>,
    pub(crate) tile: Tile,
    pub(crate) kv_head: usize,
    pub(crate) kept: &'a mut [f32],
    pub(crate) out: &'a crate::cpu::SharedMut<'a, f32>,
}

/// The parts that some row of a tile sees.
pub(crate) fn parts(attention: &Attention<'_>, tile: Tile) -> std::ops::Range<usize> {
    let first = attention.positions[tile.row] as usize;
    let last = attention.positions[tile.row + tile.rows - 1] as usize;
    attention.first_seen(first) / PART..last / PART + 1
}

/// Computes a tile, each element type in a function of its own.
pub(crate) fn attend(isa: Isa, tile: AttendTile<'_>) {
    match &tile.attention.layer.data {
        KvData::Half(data) => dispatch(isa, TypedTile { tile, element: Half, data }),
        KvData::Brain(data) => dispatch(isa, TypedTile { tile, element: Brain, data }),
        KvData::Single(data) => dispatch(isa, TypedTile { tile, element: Single, data }),
        KvData::Byte(data) => dispatch(isa, TypedTile { tile, element: Byte, data }),
    }
}

struct TypedTile<'a, E: Element> {
    tile: AttendTile<'a>,
    element: E,
    data: &'a Parts<E::Item>,
}

impl<E: Element> Kernel for TypedTile<'_, E> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { tile: AttendTile { q, q_stride, attention, tile, kv_head, scratch, todo }, element, data } =
            self;
        let sizes = Sizes::of(attention);
        let queries = tile.rows * sizes.group;
        let (scaled, rest) = scratch.split_at_mut(sizes.tile_queries() * sizes.head_dim);
        let (scores, rest) = rest.split_at_mut(sizes.tile_queries() * PART);
        let (part_figures, merged) = rest.split_at_mut(sizes.tile_queries() * sizes.figures());
        for query in 0..queries {
            let (row, head) = (tile.row + query / sizes.group, query % sizes.group);
            let at = row * q_stride + (kv_head * sizes.group + head) * sizes.head_dim;
            let to = &mut scaled[query * sizes.head_dim..][..sizes.head_dim];
            for (to, q) in to.iter_mut().zip(&q[at..][..sizes.head_dim]) {
                *to = q * attention.scale;
            }
        }
        let buffers =
            Buffers { scaled, scores, part_figures, merged: &mut merged[..queries * sizes.figures()] };
        View { attention, tile, kv_head, sizes, queries, element, data }.run(s, buffers, todo);
    }
}

/// A tile's pieces of scratch.
struct Buffers<'a> {
    /// (queries, head_dim)
    scaled: &'a [f32],
    /// (queries, PART)
    scores: &'a mut [f32],
    /// (queries, figures)
    part_figures: &'a mut [f32],
    /// (queries, figures)
    merged: &'a mut [f32],
}

impl Kernel for MergeTile<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let sizes = Sizes::of(self.attention);
        let queries = self.tile.rows * sizes.group;
        let part_size = sizes.tile_queries() * sizes.figures();
        let (first, others) = self.kept.split_at_mut(part_size);
        let merged = &mut first[..queries * sizes.figures()];
        for figures in others.chunks_exact(part_size) {
            merge(s, merged, figures, sizes);
        }
        finish(self.attention, self.tile, self.kv_head, merged, self.out);
    }
}

/// Figures of no positions at all.
#[inline(always)]
fn reset(figures: &mut [f32], sizes: Sizes) {
    for figures in figures.chunks_exact_mut(sizes.figures()) {
        figures.fill(0.0);
        figures[sizes.v_dim] = f32::NEG_INFINITY;
    }
}

/// Merges a part's figures into those of the parts before it.
#[inline(always)]
fn merge<S: Simd>(s: S, merged: &mut [f32], part: &[f32], sizes: Sizes) {
    for (merged, part) in merged.chunks_exact_mut(sizes.figures()).zip(part.chunks_exact(sizes.figures())) {
        let (old, new) = (merged[sizes.v_dim], part[sizes.v_dim]);
        if new == f32::NEG_INFINITY {
            continue;
        }
        if old == f32::NEG_INFINITY {
            merged.copy_from_slice(part);
            continue;
        }
        let max = if old > new { old } else { new };
        let a = s.exp(s.splat(old - max));
        let b = s.exp(s.splat(new - max));
        let mut i = 0;
        while i < sizes.v_dim {
            // SAFETY: both have v_dim elements, a multiple of 16, and two more.
            unsafe {
                let sum = s.mul(s.load(merged.as_ptr().add(i)), a);
                s.store(merged.as_mut_ptr().add(i), s.fma(s.load(part.as_ptr().add(i)), b, sum));
            }
            i += LANES;
        }
        merged[sizes.v_dim] = max;
        merged[sizes.v_dim + 1] = merged[sizes.v_dim + 1] * s.first(a) + part[sizes.v_dim + 1] * s.first(b);
    }
}

/// A tile's queries of one kv head.
struct View<'a, E: Element> {
    attention: &'a Attention<'a>,
    tile: Tile,
    kv_head: usize,
    sizes: Sizes,
    queries: usize,
    element: E,
    data: &'a Parts<E::Item>,
}

impl<E: Element> View<'_, E> {
    #[inline(always)]
    fn run<S: Simd>(&self, s: S, buffers: Buffers<'_>, todo: Todo<'_>) {
        let Buffers { scaled, scores, part_figures, merged } = buffers;
        match todo {
            Todo::Part(part, figures) => self.part(s, part, scaled, scores, figures),
            Todo::All(out) => {
                reset(merged, self.sizes);
                for part in parts(self.attention, self.tile) {
                    self.part(s, part, scaled, scores, part_figures);
                    merge(s, merged, part_figures, self.sizes);
                }
                finish(self.attention, self.tile, self.kv_head, merged, out);
            }
        }
    }

    /// Whether there are tiles of every height.
    #[inline(always)]
    const fn every<S: Simd>() -> bool {
        E::EVERY_TILE && S::TILES
    }

    /// Queries of the next tile when `left` are left.
    #[inline(always)]
    fn height<S: Simd>(left: usize) -> usize {
        match left {
            8.. if Self::every::<S>() => 8,
            4.. => 4,
            left if Self::every::<S>() => left,
            _ => 1,
        }
    }

    /// A position's block and slot.
    #[inline(always)]
    fn place(&self, position: usize) -> (usize, usize) {
        let block_size = self.attention.layer.shape().block_size;
        let block = self.attention.block_tables[self.tile.table + position / block_size];
        (block as usize, position % block_size)
    }

    /// One part's figures of every query.
    #[inline(always)]
    fn part<S: Simd>(&self, s: S, part: usize, scaled: &[f32], scores: &mut [f32], figures: &mut [f32]) {
        let first_row = self.attention.positions[self.tile.row] as usize;
        let last_row = first_row + self.tile.rows - 1;
        // What some row sees of this part, from a strip's start on.
        let start = (self.attention.first_seen(first_row) / STRIP * STRIP).max(part * PART);
        let end = (last_row + 1).min((part + 1) * PART);
        let strips_end = end.next_multiple_of(STRIP);
        let mut query = 0;
        while query < self.queries {
            let height = Self::height::<S>(self.queries - query);
            let mut position = start;
            while position < strips_end {
                let at = position - part * PART;
                if query == 0 {
                    self.fetch(s, position, last_row);
                }
                match height {
                    8 if Self::every::<S>() => self.strip::<S, 8>(s, position, at, query, scaled, scores),
                    4 => self.strip::<S, 4>(s, position, at, query, scaled, scores),
                    3 if Self::every::<S>() => self.strip::<S, 3>(s, position, at, query, scaled, scores),
                    2 if Self::every::<S>() => self.strip::<S, 2>(s, position, at, query, scaled, scores),
                    _ => self.strip::<S, 1>(s, position, at, query, scaled, scores),
                }
                position += STRIP;
            }
            query += height;
        }
        for query in 0..self.queries {
            let position = first_row + query / self.sizes.group;
            let seen = self.attention.first_seen(position)..position + 1;
            let scores = &mut scores[query * PART..][start - part * PART..strips_end - part * PART];
            let figures = &mut figures[query * self.sizes.figures()..][..self.sizes.figures()];
            let (max, sum) = softmax(s, scores, start, seen, self.attention.softcap);
            figures[self.sizes.v_dim] = max;
            figures[self.sizes.v_dim + 1] = sum;
            if E::SCALED {
                self.scale_exponentials(s, start, scores);
            }
        }
        self.values(s, part, start, end, scores, figures);
    }

    /// Fetches K two strips after `position`, up to `last`, and V at its strip, which is read once the part's scores
    /// are known: blocks lie anywhere, so the machine cannot see what comes next.
    #[inline(always)]
    fn fetch<S: Simd>(&self, s: S, position: usize, last: usize) {
        let shape = self.attention.layer.shape();
        let line = 64 / size_of::<E::Item>();
        let lines = |from: *const E::Item, len: usize| {
            for i in (0..len).step_by(line) {
                s.prefetch(from.wrapping_add(i).cast());
            }
        };
        let ahead = position + 2 * STRIP;
        if ahead <= last {
            let (block, slot) = self.place(ahead);
            let at = shape.k_start(block, self.kv_head) + shape.k_offset(slot, 0);
            lines(self.data.k.as_ptr().wrapping_add(at), shape.head_dim * STRIP);
        }
        let (block, slot) = self.place(position);
        let at = shape.v_start(block, self.kv_head) + slot * shape.v_dim();
        lines(self.data.v.as_ptr().wrapping_add(at), STRIP * shape.v_dim());
    }

    /// Multiplies one query's exponentials (from position `start` on) by the scales of the positions' values.
    #[inline(always)]
    fn scale_exponentials<S: Simd>(&self, s: S, start: usize, exponentials: &mut [f32]) {
        for (strip, exponentials) in exponentials.chunks_exact_mut(STRIP).enumerate() {
            let (block, slot) = self.place(start + strip * STRIP);
            let at = self.attention.layer.shape().scale_start(block, self.kv_head) + slot;
            let scales = &self.data.v_scales[at..][..STRIP];
            // SAFETY: both have 16 elements.
            unsafe {
                let scaled = s.mul(s.load(exponentials.as_ptr()), s.load(scales.as_ptr()));
                s.store(exponentials.as_mut_ptr(), scaled);
            }
        }
    }

    /// Scores of `NQ` queries at a strip's 16 positions.
    #[inline(always)]
    fn strip<S: Simd, const NQ: usize>(
        &self,
        s: S,
        position: usize,
        at: usize,
        query: usize,
        scaled: &[f32],
        scores: &mut [f32],
    ) {
        let head_dim = self.sizes.head_dim;
        let (block, slot) = self.place(position);
        let shape = self.attention.layer.shape();
        let start = shape.k_start(block, self.kv_head);
        let k = &self.data.k[start + shape.k_offset(slot, 0)..][..head_dim * STRIP];
        let q = &scaled[query * head_dim..][..NQ * head_dim];
        let scores = &mut scores[query * PART..][..NQ * PART];
        assert!(at + STRIP <= PART, "a strip past its part; this is a bug");
        let mut sums = [s.zero(); NQ];
        // SAFETY: k, q and scores have the lengths of the slices taken just above.
        unsafe {
            for d in 0..head_dim {
                let k = self.element.load(s, k.as_ptr().add(d * STRIP));
                for i in 0..NQ {
                    sums[i] = s.fma(s.splat(*q.as_ptr().add(i * head_dim + d)), k, sums[i]);
                }
            }
            if E::SCALED {
                let at = shape.scale_start(block, self.kv_head) + slot;
                let scales = s.load(self.data.k_scales[at..][..STRIP].as_ptr());
                for i in 0..NQ {
                    sums[i] = s.mul(sums[i], scales);
                }
            }
            for i in 0..NQ {
                s.store(scores.as_mut_ptr().add(i * PART + at), sums[i]);
            }
        }
    }

    /// Sums of the values, weighted by the exponentials in `scores`.
    #[inline(always)]
    fn values<S: Simd>(
        &self,
        s: S,
        part: usize,
        start: usize,
        end: usize,
        scores: &[f32],
        figures: &mut [f32],
    ) {
        let v_dim = self.sizes.v_dim;
        let mut query = 0;
        while query < self.queries {
            let height = Self::height::<S>((self.queries - query).min(4));
            let mut d = 0;
            while d < v_dim {
                let wide = d + 4 * LANES <= v_dim;
                let args = Values { part, start, end, query, d, scores };
                match (height, wide) {
                    (4, true) => self.value_tile::<S, 4, 4>(s, args, figures),
                    (3, true) if Self::every::<S>() => self.value_tile::<S, 3, 4>(s, args, figures),
                    (2, true) if Self::every::<S>() => self.value_tile::<S, 2, 4>(s, args, figures),
                    (_, true) => self.value_tile::<S, 1, 4>(s, args, figures),
                    (4, false) => self.value_tile::<S, 4, 1>(s, args, figures),
                    (3, false) if Self::every::<S>() => self.value_tile::<S, 3, 1>(s, args, figures),
                    (2, false) if Self::every::<S>() => self.value_tile::<S, 2, 1>(s, args, figures),
                    (_, false) => self.value_tile::<S, 1, 1>(s, args, figures),
                }
                d += if wide { 4 * LANES } else { LANES };
            }
            query += height;
        }
    }

    /// `NQ` queries times `ND` vectors of V.
    #[inline(always)]
    fn value_tile<S: Simd, const NQ: usize, const ND: usize>(
        &self,
        s: S,
        args: Values<'_>,
        figures: &mut [f32],
    ) {
        let Values { part, start, end, query, d, scores } = args;
        let (size, v_dim) = (self.sizes.figures(), self.sizes.v_dim);
        let scores = &scores[query * PART..][..NQ * PART];
        let figures = &mut figures[query * size..][..NQ * size];
        let mut sums = [[s.zero(); ND]; NQ];
        let mut position = start;
        while position < end {
            let strip_end = (position + STRIP).min(end);
            let (block, slot) = self.place(position);
            let start = self.attention.layer.shape().v_start(block, self.kv_head);
            let v = &self.data.v[start + slot * v_dim..][..(strip_end - position) * v_dim];
            let at = position - part * PART;
            // SAFETY: v holds the strip's rows; scores hold PART of each query; d + 16 ND <= v_dim.
            unsafe {
                for i in 0..strip_end - position {
                    let v = v.as_ptr().add(i * v_dim + d);
                    let mut loaded = [s.zero(); ND];
                    for j in 0..ND {
                        loaded[j] = self.element.load(s, v.add(j * LANES));
                    }
                    for q in 0..NQ {
                        let p = s.splat(*scores.as_ptr().add(q * PART + at + i));
                        for j in 0..ND {
                            sums[q][j] = s.fma(p, loaded[j], sums[q][j]);
                        }
                    }
                }
            }
            position = strip_end;
        }
        for q in 0..NQ {
            for j in 0..ND {
                // SAFETY: figures hold v_dim + 2 of each query.
                unsafe { s.store(figures.as_mut_ptr().add(q * size + d + j * LANES), sums[q][j]) };
            }
        }
    }
}

/// Divides by the exponentials' sum and writes the rows' heads.
#[inline(always)]
fn finish(
    attention: &Attention<'_>,
    tile: Tile,
    kv_head: usize,
    merged: &[f32],
    out: &crate::cpu::SharedMut<'_, f32>,
) {
    let sizes = Sizes::of(attention);
    let Sizes { group, head_dim, v_dim } = sizes;
    for (query, figures) in merged.chunks_exact(sizes.figures()).enumerate() {
        let (row, head) = (tile.row + query / group, kv_head * group + query % group);
        let at = (row * attention.heads + head) * head_dim;
        // SAFETY: a row's head is written by its tile's and kv head's task alone.
        let out = unsafe { out.slice(at, head_dim) };
        let inverse = 1.0 / figures[v_dim + 1];
        for (out, sum) in out.iter_mut().zip(figures) {
            *out = sum * inverse;
        }
    }
}

/// What a tile of values reads.
#[derive(Clone, Copy)]
struct Values<'a> {
    part: usize,
    start: usize,
    end: usize,
    query: usize,
    d: usize,
    scores: &'a [f32],
}

/// Turns one query's scores (from position `start` on) into exponentials, zero where it does not see;
/// returns the largest score and the exponentials' sum.
#[inline(always)]
fn softmax<S: Simd>(
    s: S,
    scores: &mut [f32],
    start: usize,
    seen: std::ops::Range<usize>,
    softcap: Option<f32>,
) -> (f32, f32) {
    let end = start + scores.len();
    // Positions outside what the row sees, if any, lie at either end.
    if let Some(cap) = softcap {
        for scores in scores.chunks_exact_mut(LANES) {
            // SAFETY: 16 lanes.
            unsafe {
                s.store(scores.as_mut_ptr(), cap_vector(s, cap, s.load(scores.as_ptr())));
            }
        }
    }
    let before = seen.start.clamp(start, end) - start;
    let after = seen.end.clamp(start, end) - start;
    scores[..before].fill(f32::NEG_INFINITY);
    scores[after.max(before)..].fill(f32::NEG_INFINITY);
    let mut max = s.splat(f32::NEG_INFINITY);
    for scores in scores.chunks_exact(LANES) {
        // SAFETY: 16 lanes.
        unsafe { max = s.max(max, s.load(scores.as_ptr())) };
    }
    let max = s.largest(max);
    if max == f32::NEG_INFINITY {
        scores.fill(0.0);
        return (max, 0.0);
    }
    let mut sum = s.zero();
    for scores in scores.chunks_exact_mut(LANES) {
        // SAFETY: 16 lanes.
        unsafe {
            let e = s.exp(s.sub(s.load(scores.as_ptr()), s.splat(max)));
            s.store(scores.as_mut_ptr(), e);
            sum = s.add(sum, e);
        }
    }
    (max, s.sum(sum))
}
