//! The product of int8 rows and packed weights: tiles of a few rows and one or two panels of 16 columns.
//!
//! Per group the integer dots are exact; then, in the order of the groups, `sum += scale * a_scale * dot` and
//! `sum += min * a_sum`, both fused where the instruction set fuses. Where the halves of a group have scales of
//! their own, so for each half. Every tile size does the same for a row, so the tiling cannot be seen in the
//! result.

#![expect(clippy::needless_range_loop, reason = "tiles are indexed by row and column")]

use std::ops::Range;

use crate::cpu::SharedMut;
use crate::packed::{Bits, PANEL, Scales};
use crate::simd::{Kernel, LANES, Simd, dispatch, store_part};
use crate::super_scales::SuperScales;
use crate::{Activations, GROUP, Isa, Packed};

/// Rows of a task: their integers stay in the second-level cache while the panels go by.
const ROW_BLOCK: usize = 128;

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
    /// [`scratch_len`] long.
    pub(crate) scratch: &'a mut [f32],
}

/// Weights to be fetched while others are computed with, a piece a group; they need not exist.
#[derive(Clone, Copy)]
struct Ahead {
    /// Quants and scales: where they begin, and bytes of a piece.
    parts: [(*const u8, usize); 2],
}

impl Ahead {
    /// `panels` panels from `panel` on.
    fn of(w: &Packed, panel: usize, panels: usize) -> Self {
        let part = |start: *const u8, tile_bytes: usize| {
            (start.wrapping_add(panel * w.groups() * tile_bytes), panels * tile_bytes)
        };
        let quants = part(w.quants().as_ptr(), w.bits().group_bytes());
        Self { parts: [quants, part(w.scales().start(), w.scale_bytes())] }
    }

    #[inline(always)]
    fn fetch<S: Simd>(self, s: S, group: usize) {
        for (start, bytes) in self.parts {
            let from = start.wrapping_add(group * bytes);
            for line in 0..bytes.div_ceil(64) {
                s.prefetch(from.wrapping_add(line * 64));
            }
        }
    }
}

/// f32 of scratch that a task needs: the scales and minima of two panels.
pub(crate) fn scratch_len(w: &Packed) -> usize {
    w.groups() * halves(w) * 2 * SCALE_MIN
}

/// A scale and a minimum of each of 16 columns.
const SCALE_MIN: usize = 2 * LANES;

fn halves(w: &Packed) -> usize {
    1 + usize::from(w.has_halves())
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
        let PackedTask { x, w, bias, y, cut, task, scratch } = task;
        let row_start = task / cut.column_tasks * cut.rows_each;
        let rows = row_start..(row_start + cut.rows_each).min(x.m());
        let panel_start = task % cut.column_tasks * cut.panels_each;
        let panels = panel_start..(panel_start + cut.panels_each).min(w.n().div_ceil(PANEL));
        let product = Product::<EIGHT, HALVES> { x, w, bias, y };
        product.panels(s, rows, panels, scratch);
    }
}

/// Where scales and minima come from.
trait ScaleSource: Copy {
    /// Scale and min of a tile's 16 columns, in its half `half` (0 without halves).
    ///
    /// # Safety
    /// The tile and the half exist.
    unsafe fn scale_min<S: Simd>(self, s: S, tile: usize, half: usize) -> (S::V, S::V);
}

#[derive(Clone, Copy)]
struct Centred<'a> {
    scales: &'a [u16],
    minus_centre: f32,
}

impl<'a> Centred<'a> {
    fn new(w: &Packed, scales: &'a [u16]) -> Self {
        Self { scales, minus_centre: -f32::from(w.bits().centre()) }
    }
}

impl ScaleSource for Centred<'_> {
    #[inline(always)]
    unsafe fn scale_min<S: Simd>(self, s: S, tile: usize, _: usize) -> (S::V, S::V) {
        // SAFETY: the tile exists.
        let scale = unsafe { s.load_f16(self.scales.as_ptr().add(tile * PANEL)) };
        (scale, s.mul(scale, s.splat(self.minus_centre)))
    }
}

#[derive(Clone, Copy)]
struct Pair16<'a>(&'a [u16]);

impl ScaleSource for Pair16<'_> {
    #[inline(always)]
    unsafe fn scale_min<S: Simd>(self, s: S, tile: usize, _: usize) -> (S::V, S::V) {
        // SAFETY: the tile exists.
        unsafe {
            let at = self.0.as_ptr().add(tile * PANEL * 2);
            (s.load_f16(at), s.load_f16(at.add(PANEL)))
        }
    }
}

#[derive(Clone, Copy)]
struct Pair32<'a>(&'a [f32]);

impl ScaleSource for Pair32<'_> {
    #[inline(always)]
    unsafe fn scale_min<S: Simd>(self, s: S, tile: usize, _: usize) -> (S::V, S::V) {
        // SAFETY: the tile exists.
        unsafe {
            let at = self.0.as_ptr().add(tile * PANEL * 2);
            (s.load(at), s.load(at.add(PANEL)))
        }
    }
}

impl ScaleSource for &SuperScales {
    #[inline(always)]
    unsafe fn scale_min<S: Simd>(self, s: S, tile: usize, half: usize) -> (S::V, S::V) {
        // SAFETY: the caller's promise.
        unsafe { SuperScales::scale_min(self, s, tile, half) }
    }
}

/// The scales of one tile's panels, as f32 in scratch: (groups, halves, panels, 2, 16).
#[derive(Clone, Copy)]
struct Unpacked<const NR: usize, const HALVES: bool>(*const f32);

/// What a tile reads its scales from: panel `p` of the tile's.
trait TileScales<const NR: usize>: Copy {
    /// # Safety
    /// They exist.
    unsafe fn of<S: Simd>(self, s: S, group: usize, half: usize, p: usize) -> (S::V, S::V);
}

impl<const NR: usize, const HALVES: bool> TileScales<NR> for Unpacked<NR, HALVES> {
    #[inline(always)]
    unsafe fn of<S: Simd>(self, s: S, group: usize, half: usize, p: usize) -> (S::V, S::V) {
        let index = (group * (1 + usize::from(HALVES)) + half) * NR + p;
        // SAFETY: scratch holds all of them.
        unsafe {
            let at = self.0.add(index * SCALE_MIN);
            (s.load(at), s.load(at.add(LANES)))
        }
    }
}

/// Straight from the weights: for the one row that reads them.
#[derive(Clone, Copy)]
struct Direct<F: ScaleSource> {
    source: F,
    panel: usize,
    groups: usize,
}

impl<F: ScaleSource, const NR: usize> TileScales<NR> for Direct<F> {
    #[inline(always)]
    unsafe fn of<S: Simd>(self, s: S, group: usize, half: usize, p: usize) -> (S::V, S::V) {
        // SAFETY: the caller's promise.
        unsafe { self.source.scale_min(s, (self.panel + p) * self.groups + group, half) }
    }
}

struct Product<'a, const EIGHT: bool, const HALVES: bool> {
    x: &'a Activations,
    w: &'a Packed,
    bias: Option<&'a [f32]>,
    y: &'a SharedMut<'a, f32>,
}

impl<const EIGHT: bool, const HALVES: bool> Product<'_, EIGHT, HALVES> {
    /// `rows` times `panels`.
    #[inline(always)]
    fn panels<S: Simd>(&self, s: S, rows: Range<usize>, panels: Range<usize>, scratch: &mut [f32]) {
        assert!(scratch.len() >= scratch_len(self.w), "too little scratch; this is a bug");
        let all = self.w.n().div_ceil(PANEL);
        assert!(rows.end <= self.x.m() && panels.end <= all, "no such task; this is a bug");
        let mut panel = panels.start;
        while panel < panels.end {
            let pair = S::TILE_PANELS == 2 && panel + 2 <= panels.end;
            // SAFETY: rows and panels exist; only this task writes them; the scratch is long enough.
            unsafe {
                if pair {
                    self.columns::<S, 2>(s, rows.clone(), panel, scratch.as_mut_ptr());
                } else {
                    self.columns::<S, 1>(s, rows.clone(), panel, scratch.as_mut_ptr());
                }
            }
            panel += if pair { 2 } else { 1 };
        }
    }

    /// `rows` times `NR` panels from `panel` on.
    ///
    /// # Safety
    /// They exist, nobody else reads or writes their outputs, and the scratch holds their scales.
    #[inline(always)]
    unsafe fn columns<S: Simd, const NR: usize>(
        &self,
        s: S,
        rows: Range<usize>,
        panel: usize,
        scratch: *mut f32,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            if rows.len() == 1 || !S::TILES {
                return match self.w.scales() {
                    Scales::F16Centred(v) => {
                        self.single::<S, _, NR>(s, rows, panel, Centred::new(self.w, v));
                    }
                    Scales::F16(v) => self.single::<S, _, NR>(s, rows, panel, Pair16(v)),
                    Scales::F32(v) => self.single::<S, _, NR>(s, rows, panel, Pair32(v)),
                    Scales::Super(scales) => self.single::<S, _, NR>(s, rows, panel, scales),
                };
            }
            match self.w.scales() {
                Scales::F16Centred(v) => self.unpack::<S, _, NR>(s, panel, Centred::new(self.w, v), scratch),
                Scales::F16(v) => self.unpack::<S, _, NR>(s, panel, Pair16(v), scratch),
                Scales::F32(v) => self.unpack::<S, _, NR>(s, panel, Pair32(v), scratch),
                Scales::Super(scales) => self.unpack::<S, _, NR>(s, panel, scales, scratch),
            };
            // The first tile to read its panels has the next ones fetched.
            let mut ahead = Some(Ahead::of(self.w, panel + NR, NR));
            let mut row = rows.start;
            while row < rows.end {
                let left = rows.end - row;
                let height = left.div_ceil(left.div_ceil(S::TILE_ROWS));
                row += self.rows(s, row, height, panel, Unpacked::<NR, HALVES>(scratch), ahead.take());
            }
        }
    }

    /// `rows` one by one, each reading the scales where they are kept.
    ///
    /// # Safety
    /// As `columns`'s.
    #[inline(always)]
    unsafe fn single<S: Simd, F: ScaleSource, const NR: usize>(
        &self,
        s: S,
        rows: Range<usize>,
        panel: usize,
        source: F,
    ) {
        let scales = Direct { source, panel, groups: self.w.groups() };
        let mut ahead = Some(Ahead::of(self.w, panel + NR, NR));
        for row in rows {
            // SAFETY: the caller's promise.
            unsafe { self.tile::<S, _, 1, NR>(s, row, panel, scales, ahead.take()) };
        }
    }

    /// Writes the scales of `NR` panels to scratch, as [`Unpacked`] has them.
    ///
    /// # Safety
    /// As `columns`'s.
    #[inline(always)]
    unsafe fn unpack<S: Simd, F: ScaleSource, const NR: usize>(
        &self,
        s: S,
        panel: usize,
        source: F,
        mut to: *mut f32,
    ) {
        let groups = self.w.groups();
        for group in 0..groups {
            for half in 0..1 + usize::from(HALVES) {
                for p in 0..NR {
                    // SAFETY: the caller's promise.
                    unsafe {
                        let (scale, min) = source.scale_min(s, (panel + p) * groups + group, half);
                        s.store(to, scale);
                        s.store(to.add(LANES), min);
                        to = to.add(SCALE_MIN);
                    }
                }
            }
        }
    }

    /// A tile of `height` rows, or fewer where there is none so high; returns how many.
    ///
    /// # Safety
    /// As `tile`'s.
    #[inline(always)]
    unsafe fn rows<S: Simd, const NR: usize>(
        &self,
        s: S,
        row: usize,
        height: usize,
        panel: usize,
        scales: Unpacked<NR, HALVES>,
        ahead: Option<Ahead>,
    ) -> usize {
        // SAFETY: the caller's promise.
        unsafe {
            match height {
                6.. if S::TILE_ROWS >= 6 && !HALVES => {
                    self.tile::<S, _, 6, NR>(s, row, panel, scales, ahead);
                    6
                }
                5 if S::TILE_ROWS >= 6 && !HALVES => {
                    self.tile::<S, _, 5, NR>(s, row, panel, scales, ahead);
                    5
                }
                4.. => {
                    self.tile::<S, _, 4, NR>(s, row, panel, scales, ahead);
                    4
                }
                // Halves have no tile of three: rare weights are not worth its compile time.
                3 if !HALVES => {
                    self.tile::<S, _, 3, NR>(s, row, panel, scales, ahead);
                    3
                }
                2 | 3 => {
                    self.tile::<S, _, 2, NR>(s, row, panel, scales, ahead);
                    2
                }
                _ => {
                    self.tile::<S, _, 1, NR>(s, row, panel, scales, ahead);
                    1
                }
            }
        }
    }

    /// `MR` rows from `row` on times `NR` panels from `panel` on, while what is `ahead` is fetched.
    ///
    /// # Safety
    /// They exist, and nobody else reads or writes these outputs.
    #[inline(always)]
    unsafe fn tile<S: Simd, T: TileScales<NR>, const MR: usize, const NR: usize>(
        &self,
        s: S,
        row: usize,
        panel: usize,
        scales: T,
        ahead: Option<Ahead>,
    ) {
        let (x, w) = (self.x, self.w);
        let groups = w.groups();
        let group_bytes = if EIGHT { PANEL * GROUP } else { PANEL * GROUP / 2 };
        let halves = 1 + usize::from(HALVES);
        let quants = w.quants().as_ptr();
        let mut sums = [[s.zero(); NR]; MR];
        // SAFETY: all pointers below stay within row < m, group < groups, panel < panels of x and w.
        unsafe {
            let a = x.q.as_ptr().add(row * x.k);
            let a_scales = x.scales.as_ptr().add(row * groups);
            let a_sums = if HALVES { &x.half_sums } else { &x.sums };
            let a_sums = a_sums.as_ptr().add(halves * row * groups);
            for group in 0..groups {
                let a = a.add(group * GROUP);
                let mut at = [quants; NR];
                for p in 0..NR {
                    at[p] = quants.add(((panel + p) * groups + group) * group_bytes);
                }
                if let Some(ahead) = ahead {
                    ahead.fetch(s, group);
                }
                for half in 0..halves {
                    let dots = dots::<S, MR, NR, EIGHT, HALVES>(s, at, a, x.k, half);
                    let mut scale_min = [(s.zero(), s.zero()); NR];
                    for p in 0..NR {
                        scale_min[p] = scales.of(s, group, half, p);
                    }
                    for r in 0..MR {
                        let a_scale = s.splat(*a_scales.add(r * groups + group));
                        let a_sum = s.splat(*a_sums.add((r * groups + group) * halves + half));
                        for p in 0..NR {
                            let (scale, min) = scale_min[p];
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
                    let y = self.y.slice((row + r) * w.n() + column, width);
                    if width == PANEL {
                        s.store(y.as_mut_ptr(), sums[r][p]);
                    } else {
                        store_part(s, y.as_mut_ptr(), width, sums[r][p]);
                    }
                    if let Some(bias) = self.bias {
                        for (y, bias) in y.iter_mut().zip(&bias[column..]) {
                            *y += bias;
                        }
                    }
                }
            }
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
