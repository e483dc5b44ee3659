//! The product of int8 rows and packed weights: tiles of a few rows and one or two panels of 16 columns.
//!
//! Per group the integer dots are exact; then, in the order of the groups, `sum += scale * a_scale * dot` and
//! `sum += min * a_sum`, both fused where the instruction set fuses. Where the halves of a group have scales of
//! their own, so for each half. Every tile size does the same for a row, so the tiling cannot be seen in the
//! result.

#![expect(clippy::needless_range_loop, reason = "tiles are indexed by row and column")]

use crate::cpu::SharedMut;
use crate::packed::{Bits, PANEL, Scales};
use crate::simd::{Kernel, Simd, dispatch, store_part};
use crate::{Activations, GROUP, Isa, Packed};

/// Rows of a task: their integers stay in the second-level cache while the panels go by.
const ROW_BLOCK: usize = 128;

/// Most rows of a tile: with two panels the sums of both kinds just fit the registers.
const TILE_ROWS: usize = 4;

/// Weight bytes that make a task worth while.
const TASK_BYTES: usize = 24 * 1024;

/// How a product is cut into tasks.
pub(crate) struct Cut {
    column_tasks: usize,
    panels_each: usize,
    row_tasks: usize,
    rows_each: usize,
}

impl Cut {
    pub(crate) fn new(m: usize, w: &Packed, threads: usize) -> Self {
        let panels = w.n().div_ceil(PANEL);
        let panel_bytes = w.groups() * w.bits().group_bytes();
        let row_tasks = m.div_ceil(ROW_BLOCK);
        let rows_each = m.div_ceil(row_tasks.max(1));
        // Eight tasks a thread, so that a thread that loses its core holds up little; pairs of panels.
        let wanted = (8 * threads).div_ceil(row_tasks.max(1));
        let least = (TASK_BYTES / (panel_bytes * rows_each.clamp(1, 8))).max(1);
        let panels_each = panels.div_ceil(wanted).max(least).next_multiple_of(2).min(panels.max(1));
        Self { column_tasks: panels.div_ceil(panels_each), panels_each, row_tasks, rows_each }
    }

    pub(crate) fn tasks(&self) -> usize {
        self.column_tasks * self.row_tasks
    }
}

/// One task of a product.
pub(crate) struct PackedTask<'a> {
    pub(crate) x: &'a Activations,
    pub(crate) w: &'a Packed,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) y: &'a SharedMut<'a, f32>,
    pub(crate) cut: &'a Cut,
    pub(crate) task: usize,
}

/// Computes a task, each kind of weights in a function of its own.
pub(crate) fn multiply(isa: Isa, task: PackedTask<'_>) {
    match (task.w.bits(), task.w.has_halves()) {
        (Bits::Four, false) => dispatch(isa, TypedTask::<false, false>(task)),
        (Bits::Eight, false) => dispatch(isa, TypedTask::<true, false>(task)),
        (Bits::Four, true) => dispatch(isa, TypedTask::<false, true>(task)),
        (Bits::Eight, true) => dispatch(isa, TypedTask::<true, true>(task)),
    }
}

struct TypedTask<'a, const EIGHT: bool, const HALVES: bool>(PackedTask<'a>);

impl<const EIGHT: bool, const HALVES: bool> Kernel for TypedTask<'_, EIGHT, HALVES> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self(task) = self;
        let cut = task.cut;
        let panels = task.w.n().div_ceil(PANEL);
        let row_start = task.task / cut.column_tasks * cut.rows_each;
        let row_end = (row_start + cut.rows_each).min(task.x.m());
        let panel_start = task.task % cut.column_tasks * cut.panels_each;
        let panel_end = (panel_start + cut.panels_each).min(panels);
        let mut panel = panel_start;
        while panel < panel_end {
            let pair = S::TILE_PANELS == 2 && panel + 2 <= panel_end;
            let mut row = row_start;
            while row < row_end {
                // SAFETY: rows and panels exist; only this task writes them.
                row += unsafe {
                    if S::TILE_PANELS == 2 && pair {
                        rows_tile::<S, 2, EIGHT, HALVES>(s, &task, row, row_end - row, panel)
                    } else {
                        rows_tile::<S, 1, EIGHT, HALVES>(s, &task, row, row_end - row, panel)
                    }
                };
            }
            panel += if pair { 2 } else { 1 };
        }
    }
}

/// The next rows of `left`, in tiles of nearly equal height; returns how many.
///
/// # Safety
/// They exist, and nobody else reads or writes their outputs.
#[inline(always)]
unsafe fn rows_tile<S: Simd, const NR: usize, const EIGHT: bool, const HALVES: bool>(
    s: S,
    t: &PackedTask<'_>,
    row: usize,
    left: usize,
    panel: usize,
) -> usize {
    let rows = if S::TILES { left.div_ceil(left.div_ceil(TILE_ROWS)) } else { 1 };
    // SAFETY: the caller's promise.
    unsafe {
        match rows {
            4 if S::TILES => {
                tile::<S, 4, NR, EIGHT, HALVES>(s, t, row, panel);
                4
            }
            // Halves have no tile of three: rare weights are not worth its compile time.
            3 if S::TILES && !HALVES => {
                tile::<S, 3, NR, EIGHT, HALVES>(s, t, row, panel);
                3
            }
            2 | 3 if S::TILES => {
                tile::<S, 2, NR, EIGHT, HALVES>(s, t, row, panel);
                2
            }
            _ => {
                tile::<S, 1, NR, EIGHT, HALVES>(s, t, row, panel);
                1
            }
        }
    }
}

/// Where a tile's scales lie; it need not exist.
#[inline(always)]
fn scale_at(w: &Packed, tile: usize) -> *const u8 {
    match w.scales() {
        Scales::F16Centred(v) => v.as_ptr().wrapping_add(tile * PANEL).cast(),
        Scales::F16(v) => v.as_ptr().wrapping_add(tile * PANEL * 2).cast(),
        Scales::F32(v) => v.as_ptr().wrapping_add(tile * PANEL * 2).cast(),
        Scales::Super(scales) => scales.near(tile),
    }
}

/// Scale and min of a tile's 16 columns in one group; `half` counts where halves differ.
#[inline(always)]
unsafe fn scale_min<S: Simd>(s: S, w: &Packed, tile: usize, half: usize) -> (S::V, S::V) {
    // SAFETY: the tile exists: the caller's promise.
    unsafe {
        match w.scales() {
            Scales::F16Centred(v) => {
                let scale = s.load_f16(v.as_ptr().add(tile * PANEL));
                (scale, s.mul(scale, s.splat(-f32::from(w.bits().centre()))))
            }
            Scales::F16(v) => {
                let at = v.as_ptr().add(tile * PANEL * 2);
                (s.load_f16(at), s.load_f16(at.add(PANEL)))
            }
            Scales::F32(v) => {
                let at = v.as_ptr().add(tile * PANEL * 2);
                (s.load(at), s.load(at.add(PANEL)))
            }
            Scales::Super(scales) => scales.scale_min(s, tile, half),
        }
    }
}

/// Integer dots of one group, or of its half `half` with `HALVES`: rows `stride` apart from `a` on times panels
/// whose integers start at `at`.
///
/// # Safety
/// The rows' and panels' group can be read.
#[inline(always)]
unsafe fn dots<S: Simd, const MR: usize, const NR: usize, const EIGHT: bool, const HALVES: bool>(
    s: S,
    at: [*const u8; NR],
    a: *const i8,
    stride: usize,
    half: usize,
) -> [[S::V; NR]; MR] {
    let mut dots = [[s.zero(); NR]; MR];
    // SAFETY: the caller's promise; a group has 8 lines with 8 bits, else 4.
    unsafe {
        if EIGHT {
            let mut acc = [[s.dot8_zero(); NR]; MR];
            let (first, count) = if HALVES { (4 * half, 4) } else { (0, 8) };
            for j in first..first + count {
                let mut bytes = [s.load_bytes(at[0].add(64 * j)); NR];
                for p in 1..NR {
                    bytes[p] = s.load_bytes(at[p].add(64 * j));
                }
                for r in 0..MR {
                    for p in 0..NR {
                        acc[r][p] = s.dot8(acc[r][p], bytes[p], a.add(r * stride + 4 * j));
                    }
                }
            }
            for r in 0..MR {
                for p in 0..NR {
                    dots[r][p] = s.dot8_f32(acc[r][p]);
                }
            }
        } else {
            let mut acc = [[s.dot4_zero(); NR]; MR];
            for j in 0..4 {
                let bytes = s.load_bytes(at[0].add(64 * j));
                let (mut low, mut high) = ([s.low_nibbles(bytes); NR], [s.high_nibbles(bytes); NR]);
                for p in 1..NR {
                    let bytes = s.load_bytes(at[p].add(64 * j));
                    (low[p], high[p]) = (s.low_nibbles(bytes), s.high_nibbles(bytes));
                }
                for r in 0..MR {
                    for p in 0..NR {
                        if !HALVES || half == 0 {
                            acc[r][p] = s.dot4(acc[r][p], low[p], a.add(r * stride + 4 * j));
                        }
                        if !HALVES || half == 1 {
                            acc[r][p] = s.dot4(acc[r][p], high[p], a.add(r * stride + 16 + 4 * j));
                        }
                    }
                }
            }
            for r in 0..MR {
                for p in 0..NR {
                    dots[r][p] = s.dot4_f32(acc[r][p]);
                }
            }
        }
    }
    dots
}

/// `MR` rows from `row` on times `NR` panels from `panel` on.
///
/// # Safety
/// They exist, and nobody else reads or writes these outputs.
#[inline(always)]
unsafe fn tile<S: Simd, const MR: usize, const NR: usize, const EIGHT: bool, const HALVES: bool>(
    s: S,
    t: &PackedTask<'_>,
    row: usize,
    panel: usize,
) {
    let (x, w) = (t.x, t.w);
    let groups = w.groups();
    let group_bytes = w.bits().group_bytes();
    let quants = w.quants().as_ptr();
    // The first tile to read its panels has the next ones fetched.
    let first = row == t.task / t.cut.column_tasks * t.cut.rows_each;
    let mut sums = [[s.zero(); NR]; MR];
    // SAFETY: all pointers below stay within row < m, group < groups, panel < panels of x and w.
    unsafe {
        let a = x.q.as_ptr().add(row * x.k);
        let a_scales = x.scales.as_ptr().add(row * groups);
        let (a_sums, halves) = if HALVES {
            (x.half_sums.as_ptr().add(2 * row * groups), 2)
        } else {
            (x.sums.as_ptr().add(row * groups), 1)
        };
        for group in 0..groups {
            let a = a.add(group * GROUP);
            let mut at = [quants; NR];
            for p in 0..NR {
                at[p] = quants.add(((panel + p) * groups + group) * group_bytes);
                if first {
                    // The same group of the panels that come next.
                    for line in 0..group_bytes / 64 {
                        s.prefetch(at[p].wrapping_add(NR * groups * group_bytes + line * 64));
                    }
                    s.prefetch(scale_at(w, (panel + NR + p) * groups + group));
                }
            }
            for half in 0..halves {
                let dots = dots::<S, MR, NR, EIGHT, HALVES>(s, at, a, x.k, half);
                for p in 0..NR {
                    let (scale, min) = scale_min(s, w, (panel + p) * groups + group, half);
                    for r in 0..MR {
                        let a_scale = s.splat(*a_scales.add(r * groups + group));
                        let a_sum = s.splat(*a_sums.add((r * groups + group) * halves + half));
                        sums[r][p] = s.fma(s.mul(scale, a_scale), dots[r][p], sums[r][p]);
                        sums[r][p] = s.fma(min, a_sum, sums[r][p]);
                    }
                }
            }
        }
        for r in 0..MR {
            for p in 0..NR {
                let column = (panel + p) * PANEL;
                let width = PANEL.min(w.n() - column);
                let y = t.y.slice((row + r) * w.n() + column, width);
                if width == PANEL {
                    s.store(y.as_mut_ptr(), sums[r][p]);
                } else {
                    store_part(s, y.as_mut_ptr(), width, sums[r][p]);
                }
                if let Some(bias) = t.bias {
                    for (y, bias) in y.iter_mut().zip(&bias[column..]) {
                        *y += bias;
                    }
                }
            }
        }
    }
}
