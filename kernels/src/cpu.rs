//! Products, the KV cache and attention as safe functions: shapes are checked here, the work is shared out
//! over the pool. Operations on single rows and elements are in `row_ops`.

use std::marker::PhantomData;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::attention::{Attention, check_spans};
use crate::attention_kernel::{AttendTile, MergeTile, Sizes, Tile, Todo, attend, parts};
use crate::dense_product::{DenseTask, TASK_COLUMNS};
use crate::kv_write::{SharedLayer, WriteHead};
use crate::packed_product::{Cut, PackedTask, multiply, scratch_len};
use crate::rows::{Quantize, Rotate};
use crate::simd::dispatch;
use crate::{Activations, Dense, GROUP, Isa, KvLayer, Packed, Pool, Qkv, RopeStyle, RopeTable, Rows, Span};

/// Elements of row-wise work that make a task worth while.
pub(crate) const TASK_ELEMENTS: usize = 8 * 1024;

/// A number of threads and an instruction set: every operation is a method.
pub struct Cpu {
    pool: Pool,
    isa: Isa,
    /// Each worker's own; locked only by the worker, so never waited for.
    scratch: Vec<Mutex<Vec<f32>>>,
    /// Attention's.
    work: Mutex<AttentionWork>,
}

/// What attention keeps from one call to the next.
#[derive(Default)]
struct AttentionWork {
    tiles: Vec<Tile>,
    /// Figures of parts that are merged later.
    kept: Vec<f32>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Scratch memory holds nothing that a panic could spoil.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cpu {
    /// With the best instruction set of this machine.
    pub fn new(threads: usize) -> Self {
        Self::with_isa(threads, Isa::detect())
    }

    /// # Panics
    /// When this machine has no such instruction set.
    pub fn with_isa(threads: usize, isa: Isa) -> Self {
        assert!(isa.is_available(), "this machine has no {isa}");
        let pool = Pool::new(threads);
        let scratch = (0..pool.threads()).map(|_| Mutex::default()).collect();
        Self { pool, isa, scratch, work: Mutex::default() }
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// `f(row)` for every row of `width` elements' work, in parallel where that pays.
    pub(crate) fn each_row(&self, rows: usize, width: usize, f: &(dyn Fn(usize) + Sync)) {
        let each = self.rows_each(rows, width);
        self.pool.run(rows.div_ceil(each), &|task| {
            (task * each..((task + 1) * each).min(rows)).for_each(f);
        });
    }

    /// Rows of a task where each is `width` elements' work: all, or a part that keeps all threads busy alike.
    fn rows_each(&self, rows: usize, width: usize) -> usize {
        let tasks = rows * width / TASK_ELEMENTS;
        if tasks < 2 { rows.max(1) } else { rows.div_ceil(tasks.next_multiple_of(self.pool.threads())) }
    }

    /// Quantises `x` (m, k) to int8: per group of 32 one scale, amax / 127, rounding half to even.
    pub fn quantize(&self, x: &[f32], k: usize, out: &mut Activations) {
        assert!(k > 0 && k.is_multiple_of(GROUP), "quantize: k = {k} is no multiple of {GROUP}");
        assert!(x.len().is_multiple_of(k), "quantize: {} values are no rows of {k}", x.len());
        out.resize(x.len() / k, k);
        let (m, groups) = (out.m, k / GROUP);
        let q = SharedMut::new(&mut out.q);
        let scales = SharedMut::new(&mut out.scales);
        let sums = SharedMut::new(&mut out.sums);
        let half_sums = SharedMut::new(&mut out.half_sums);
        self.each_row(m, 2 * k, &|row| {
            // SAFETY: each row is handed out once.
            let (q, scales) = unsafe { (q.slice(row * k, k), scales.slice(row * groups, groups)) };
            // SAFETY: as above.
            let (sums, half_sums) =
                unsafe { (sums.slice(row * groups, groups), half_sums.slice(2 * row * groups, 2 * groups)) };
            dispatch(self.isa, Quantize { x: &x[row * k..][..k], q, scales, sums, half_sums });
        });
    }

    /// y (m, n) = x (m, k) * w^T + bias (n).
    pub fn matmul_packed(&self, x: &Activations, w: &Packed, bias: Option<&[f32]>, y: &mut [f32]) {
        assert_eq!(x.k(), w.k(), "packed product: k differs");
        check_product(x.m(), w.n(), bias, y);
        let cut = Cut::new(x.m(), w, self.pool.threads());
        let y = SharedMut::new(y);
        self.pool.run_indexed(cut.tasks(), &|worker, task| {
            let mut scratch = lock(&self.scratch[worker]);
            let scratch = at_least(&mut scratch, scratch_len(w));
            multiply(self.isa, PackedTask { x, w, bias, y: &y, cut: &cut, task, scratch });
        });
    }

    /// y (m, n) = x (m, k) * w^T + bias (n).
    pub fn matmul_dense(&self, x: &[f32], w: &Dense, bias: Option<&[f32]>, y: &mut [f32]) {
        assert!(x.len().is_multiple_of(w.k()), "dense product: {} values are no rows of {}", x.len(), w.k());
        check_product(x.len() / w.k(), w.n(), bias, y);
        if x.is_empty() {
            return;
        }
        let y = SharedMut::new(y);
        self.pool.run(w.n().div_ceil(TASK_COLUMNS), &|task| {
            dispatch(self.isa, DenseTask { x, w, bias, y: &y, task });
        });
    }

    /// Rotates q and k by the angles of the table's rows, where there is one, and writes k and v, rounded to the
    /// layer's type, at the rows' positions. Elements of a head past the table's rotary_dim stay as they are.
    ///
    /// With int8 K and V of each position and kv head have a scale, amax / 127, and are rounded half to even.
    /// Rows that no span covers are not written, and their k is not rotated.
    pub fn rope_kv_write(
        &self,
        qkv: Qkv<'_>,
        turn: Option<(&RopeTable, RopeStyle)>,
        layer: &mut KvLayer,
        spans: &[Span],
        positions: &[u32],
        block_tables: &[u32],
    ) {
        let (rows, shape) = (positions.len(), layer.shape());
        let Qkv { data, heads, q, k, v } = qkv;
        let (q_width, width) = (heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        q.check("kv write q", rows, q_width, data);
        k.check("kv write k", rows, width, data);
        v.check("kv write v", rows, width, data);
        let apart = q.is_apart(rows, q_width, k, width)
            && q.is_apart(rows, q_width, v, width)
            && k.is_apart(rows, width, v, width);
        assert!(apart, "kv write: q at {q:?}, k at {k:?} and v at {v:?} overlap");
        check_spans("kv write", layer, spans, positions, block_tables);
        if let Some((table, _)) = turn {
            assert!(table.rows() == rows, "rope: angles of {} rows, not {rows}", table.rows());
            assert!(table.rotary_dim() <= shape.head_dim, "rope: rotary_dim is over head_dim");
        }
        let (isa, data, layer) = (self.isa, &SharedMut::new(data), &SharedLayer::new(layer));
        let each = self.rows_each(rows, 2 * q_width);
        let q_tasks = if turn.is_some() && heads > 0 { rows.div_ceil(each) } else { 0 };
        let run = |task: usize| {
            if task < shape.kv_heads {
                let head =
                    WriteHead { layer, kv_head: task, data, k, v, turn, spans, positions, block_tables };
                return dispatch(isa, head);
            }
            let Some((table, style)) = turn else { return };
            let first = (task - shape.kv_heads) * each;
            for row in first..(first + each).min(rows) {
                // SAFETY: each row's q is handed out once, and lies apart from k and v.
                let x = unsafe { data.slice(q.start + row * q.stride, q_width) };
                dispatch(isa, Rotate { x, head_dim: shape.head_dim, angles: table.row(row), style });
            }
        };
        if rows * (q_width + 2 * width) < TASK_ELEMENTS {
            (0..shape.kv_heads + q_tasks).for_each(run);
        } else {
            self.pool.run(shape.kv_heads + q_tasks, &run);
        }
    }

    /// out (rows, heads, head_dim) of queries q (rows, heads, head_dim): a row at position p attends to
    /// positions `max(0, p + 1 - window)..=p` of its sequence, through its block table.
    ///
    /// Rows that no span covers are left as they are.
    pub fn paged_attention(&self, q: Rows<'_>, attention: &Attention<'_>, out: &mut [f32]) {
        let Attention { layer, spans, positions, block_tables, heads, window, .. } = *attention;
        let shape = layer.shape();
        assert!(
            heads > 0 && heads.is_multiple_of(shape.kv_heads),
            "attention: {heads} heads do not share kv heads"
        );
        assert!(window != Some(0), "attention: a window of 0 positions");
        q.check("attention q", positions.len(), heads * shape.head_dim);
        assert_eq!(out.len(), positions.len() * heads * shape.head_dim, "attention: wrong output length");
        check_spans("attention", layer, spans, positions, block_tables);
        self.attend(q, attention, out);
    }

    /// As [`Cpu::paged_attention`], checked.
    fn attend(&self, q: Rows<'_>, attention: &Attention<'_>, out: &mut [f32]) {
        let sizes = Sizes::of(attention);
        let kv_heads = attention.layer.shape().kv_heads;
        let mut work = lock(&self.work);
        let AttentionWork { tiles, kept } = &mut *work;
        tiles.clear();
        for span in attention.spans {
            let mut row = span.rows.start;
            while row < span.rows.end {
                let rows = sizes.tile_rows().min(span.rows.end - row);
                tiles.push(Tile { row, rows, table: span.table.start });
                row += rows;
            }
        }
        let tiles = &*tiles;
        let out = SharedMut::new(out);
        let parts_most = tiles.iter().map(|tile| parts(attention, *tile).len()).max().unwrap_or(0);
        // Tiles by themselves keep all threads busy, or there is nothing to cut.
        if self.pool.threads() == 1 || parts_most < 2 || tiles.len() * kv_heads >= 4 * self.pool.threads() {
            return self.pool.run_indexed(tiles.len() * kv_heads, &|worker, task| {
                let mut scratch = lock(&self.scratch[worker]);
                let scratch = at_least(&mut scratch, sizes.scratch());
                let (tile, kv_head) = (tiles[task / kv_heads], task % kv_heads);
                let todo = Todo::All(&out);
                let (q, q_stride) = (q.data, q.stride);
                attend(self.isa, AttendTile { q, q_stride, attention, tile, kv_head, scratch, todo });
            });
        }
        let part_size = sizes.tile_queries() * sizes.figures();
        let tile_size = parts_most * part_size;
        let kept = at_least(kept, tiles.len() * kv_heads * tile_size);
        let kept_out = SharedMut::new(kept);
        self.pool.run_indexed(tiles.len() * kv_heads * parts_most, &|worker, task| {
            let (tile_head, i) = (task / parts_most, task % parts_most);
            let (tile, kv_head) = (tiles[tile_head / kv_heads], tile_head % kv_heads);
            let Some(part) = parts(attention, tile).nth(i) else { return };
            let mut scratch = lock(&self.scratch[worker]);
            let scratch = at_least(&mut scratch, sizes.scratch());
            // SAFETY: each task has its own piece.
            let figures = unsafe { kept_out.slice(tile_head * tile_size + i * part_size, part_size) };
            let todo = Todo::Part(part, figures);
            let (q, q_stride) = (q.data, q.stride);
            attend(self.isa, AttendTile { q, q_stride, attention, tile, kv_head, scratch, todo });
        });
        self.each_row(tiles.len() * kv_heads, tile_size, &|task| {
            let (tile, kv_head) = (tiles[task / kv_heads], task % kv_heads);
            let len = parts(attention, tile).len() * part_size;
            // SAFETY: the parts are done, and each task has its own tile.
            let kept = unsafe { kept_out.slice(task * tile_size, len) };
            dispatch(self.isa, MergeTile { attention, tile, kv_head, kept, out: &out });
        });
    }
}

/// The first `len` elements, after growing to hold them.
fn at_least(scratch: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if scratch.len() < len {
        scratch.resize(len, 0.0);
    }
    &mut scratch[..len]
}

fn check_product(m: usize, n: usize, bias: Option<&[f32]>, y: &[f32]) {
    assert_eq!(y.len(), m * n, "product: the output is not ({m}, {n})");
    assert!(bias.is_none_or(|bias| bias.len() == n), "product: the bias is not ({n})");
}

/// A slice that tasks write at places they promise to be disjoint.
pub(crate) struct SharedMut<'a, T> {
    start: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a slice handed out in pieces; `slice` makes the caller promise that they do not overlap.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), owner: PhantomData }
    }

    /// `len` elements from `start`.
    ///
    /// # Safety
    /// No other piece that overlaps this one is alive.
    #[expect(clippy::mut_from_ref, reason = "the pieces are disjoint, by the caller's promise")]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "a piece past the slice's end; this is a bug");
        // SAFETY: in bounds, and by the caller's promise nobody else's.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}
