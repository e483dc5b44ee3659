//! The product of f32 rows and dense weights: tiles of rows times output columns, 16 lanes along k.
//!
//! Each output has its own 16 running sums over k, added up at the end in one fixed order; so the tile that
//! it falls in cannot be seen in the result. 16-bit weights are widened in registers.

#![expect(clippy::needless_range_loop, reason = "tiles are indexed by row and column")]

use half::slice::HalfFloatSliceExt;

use crate::cpu::SharedMut;
use crate::element::{Brain, Element, Half, Single};
use crate::simd::{Kernel, LANES, Simd, load_part, split};
use crate::{Dense, DenseData};

/// Output columns of a task.
pub(crate) const TASK_COLUMNS: usize = 32;
const ROWS: usize = 4;
const COLUMNS: usize = 4;

/// One task of a product: all rows, [`TASK_COLUMNS`] columns.
pub(crate) struct DenseTask<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) w: &'a Dense,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) y: &'a SharedMut<'a, f32>,
    pub(crate) task: usize,
}

impl Kernel for DenseTask<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.w.data() {
            DenseData::F32(w) => columns(s, &self, Single, w),
            DenseData::F16(w) => columns(s, &self, Half, w.reinterpret_cast()),
            DenseData::Bf16(w) => columns(s, &self, Brain, w.reinterpret_cast()),
        }
    }
}

#[inline(always)]
fn columns<S: Simd, W: Element>(s: S, t: &DenseTask<'_>, weights: W, w: &[W::Item]) {
    let (m, n) = (t.x.len() / t.w.k(), t.w.n());
    let end = n.min((t.task + 1) * TASK_COLUMNS);
    let mut column = t.task * TASK_COLUMNS;
    while column < end {
        let wide = column + COLUMNS <= end;
        let mut row = 0;
        while row < m {
            let high = row + ROWS <= m;
            // SAFETY: rows and columns exist; only this task writes them.
            unsafe {
                match (high, wide) {
                    (true, true) => tile::<S, W, ROWS, COLUMNS>(s, t, weights, w, row, column),
                    (true, false) => tile::<S, W, ROWS, 1>(s, t, weights, w, row, column),
                    (false, true) => tile::<S, W, 1, COLUMNS>(s, t, weights, w, row, column),
                    (false, false) => tile::<S, W, 1, 1>(s, t, weights, w, row, column),
                }
            }
            row += if high { ROWS } else { 1 };
        }
        column += if wide { COLUMNS } else { 1 };
    }
}

/// `MR` rows times `NC` columns.
///
/// # Safety
/// They exist, and nobody else reads or writes these outputs.
#[inline(always)]
unsafe fn tile<S: Simd, W: Element, const MR: usize, const NC: usize>(
    s: S,
    t: &DenseTask<'_>,
    weights: W,
    w: &[W::Item],
    row: usize,
    column: usize,
) {
    let k = t.w.k();
    let (full, rest) = split(k);
    let mut sums = [[s.zero(); NC]; MR];
    // SAFETY: row + MR <= m, column + NC <= n, and i < k.
    unsafe {
        let (x, w) = (t.x.as_ptr().add(row * k), w.as_ptr().add(column * k));
        let mut i = 0;
        while i < full {
            let mut loaded = [s.zero(); NC];
            for c in 0..NC {
                loaded[c] = weights.load(s, w.add(c * k + i));
            }
            for r in 0..MR {
                let x = s.load(x.add(r * k + i));
                for c in 0..NC {
                    sums[r][c] = s.fma(x, loaded[c], sums[r][c]);
                }
            }
            i += LANES;
        }
        if rest > 0 {
            for c in 0..NC {
                let mut part: [std::mem::MaybeUninit<W::Item>; LANES] = std::mem::zeroed();
                std::ptr::copy_nonoverlapping(w.add(c * k + full), part.as_mut_ptr().cast(), rest);
                let loaded = weights.load(s, part.as_ptr().cast());
                for r in 0..MR {
                    let x = load_part(s, x.add(r * k + full), rest);
                    sums[r][c] = s.fma(x, loaded, sums[r][c]);
                }
            }
        }
        for r in 0..MR {
            let y = t.y.slice((row + r) * t.w.n() + column, NC);
            for c in 0..NC {
                let sum = s.sum(sums[r][c]);
                y[c] = t.bias.map_or(sum, |bias| sum + bias[column + c]);
            }
        }
    }
}
