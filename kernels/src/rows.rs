//! Kernels that work on single rows: quantising, norms, rotation. Each row by itself, in a fixed order.

use crate::rope::Angles;
use crate::simd::{Kernel, LANES, Simd, load_part, split, store_part};
use crate::{GROUP, RopeStyle};

/// Quantises one row to int8 (groups of 32).
pub(crate) struct Quantize<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) q: &'a mut [i8],
    pub(crate) scales: &'a mut [f32],
    pub(crate) sums: &'a mut [f32],
    pub(crate) half_sums: &'a mut [f32],
}

impl Kernel for Quantize<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for group in 0..self.scales.len() {
            let x = &self.x[group * GROUP..][..GROUP];
            let q = &mut self.q[group * GROUP..][..GROUP];
            // SAFETY: both slices have 2 * 16 elements.
            unsafe {
                let (a, b) = (s.load(x.as_ptr()), s.load(x.as_ptr().add(LANES)));
                let amax = s.largest(s.max(s.abs(a), s.abs(b)));
                // Under this the inverse overflows; such values are zero beside any other.
                let inverse = if amax < f32::MIN_POSITIVE * 128.0 { 0.0 } else { 127.0 / amax };
                let scale = if inverse == 0.0 { 0.0 } else { amax / 127.0 };
                let v = s.splat(inverse);
                let first = s.store_i8(q.as_mut_ptr(), s.mul(a, v));
                let second = s.store_i8(q.as_mut_ptr().add(LANES), s.mul(b, v));
                self.scales[group] = scale;
                // Sums of what is no number may be anything.
                self.sums[group] = scale * first.wrapping_add(second) as f32;
                self.half_sums[2 * group] = scale * first as f32;
                self.half_sums[2 * group + 1] = scale * second as f32;
            }
        }
    }
}

/// residual += delta (if any), then out = residual / rms * weight, one row.
pub(crate) struct Norm<'a> {
    pub(crate) x: *const f32,
    /// Where the sum goes, and what is added.
    pub(crate) add: Option<(*mut f32, &'a [f32])>,
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
    /// May be `x`.
    pub(crate) out: *mut f32,
}

impl Kernel for Norm<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = self.weight.len();
        let (full, rest) = split(width);
        let mut squares = s.zero();
        // SAFETY: all rows have `width` elements: checked where the kernel is made. Loads come before the
        // stores to the same place.
        unsafe {
            if let Some((residual, delta)) = self.add {
                let mut i = 0;
                while i < full {
                    let sum = s.add(s.load(self.x.add(i)), s.load(delta.as_ptr().add(i)));
                    s.store(residual.add(i), sum);
                    squares = s.fma(sum, sum, squares);
                    i += LANES;
                }
                if rest > 0 {
                    let x = load_part(s, self.x.add(full), rest);
                    let sum = s.add(x, load_part(s, delta.as_ptr().add(full), rest));
                    store_part(s, residual.add(full), rest, sum);
                    squares = s.fma(sum, sum, squares);
                }
            } else {
                let mut i = 0;
                while i < full {
                    let x = s.load(self.x.add(i));
                    squares = s.fma(x, x, squares);
                    i += LANES;
                }
                if rest > 0 {
                    let x = load_part(s, self.x.add(full), rest);
                    squares = s.fma(x, x, squares);
                }
            }
            let factor = s.splat(1.0 / (s.sum(squares) / width as f32 + self.eps).sqrt());
            let weight = self.weight.as_ptr();
            let mut i = 0;
            while i < full {
                let x = s.mul(s.load(self.x.add(i)), factor);
                s.store(self.out.add(i), s.mul(x, s.load(weight.add(i))));
                i += LANES;
            }
            if rest > 0 {
                let x = s.mul(load_part(s, self.x.add(full), rest), factor);
                store_part(s, self.out.add(full), rest, s.mul(x, load_part(s, weight.add(full), rest)));
            }
        }
    }
}

/// out = (x - mean) / deviation * weight + bias, one row.
pub(crate) struct LayerNorm<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) eps: f32,
    pub(crate) out: &'a mut [f32],
}

impl Kernel for LayerNorm<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = self.weight.len();
        assert!(self.x.len() == width && self.out.len() == width, "rows differ; this is a bug");
        let (full, rest) = split(width);
        let (x, weight, out) = (self.x.as_ptr(), self.weight.as_ptr(), self.out.as_mut_ptr());
        // SAFETY: x, weight and out have `width` elements.
        unsafe {
            let mut total = s.zero();
            let mut i = 0;
            while i < full {
                total = s.add(total, s.load(x.add(i)));
                i += LANES;
            }
            if rest > 0 {
                total = s.add(total, load_part(s, x.add(full), rest));
            }
            let mean = s.splat(s.sum(total) / width as f32);
            // The deviations wait in `out`.
            let mut squares = s.zero();
            let mut i = 0;
            while i < full {
                let deviation = s.sub(s.load(x.add(i)), mean);
                s.store(out.add(i), deviation);
                squares = s.fma(deviation, deviation, squares);
                i += LANES;
            }
            if rest > 0 {
                store_part(s, out.add(full), rest, s.sub(load_part(s, x.add(full), rest), mean));
                let deviation = load_part(s, out.add(full), rest);
                squares = s.fma(deviation, deviation, squares);
            }
            let factor = s.splat(1.0 / (s.sum(squares) / width as f32 + self.eps).sqrt());
            let mut i = 0;
            while i < full {
                let deviation = s.mul(s.load(out.add(i)), factor);
                s.store(out.add(i), s.mul(deviation, s.load(weight.add(i))));
                i += LANES;
            }
            if rest > 0 {
                let deviation = s.mul(load_part(s, out.add(full), rest), factor);
                store_part(s, out.add(full), rest, s.mul(deviation, load_part(s, weight.add(full), rest)));
            }
        }
        if let Some(bias) = self.bias {
            for (out, bias) in self.out.iter_mut().zip(bias) {
                *out += bias;
            }
        }
    }
}

/// Rotates the heads of one row.
pub(crate) struct Rotate<'a> {
    /// (heads, head_dim)
    pub(crate) x: &'a mut [f32],
    pub(crate) head_dim: usize,
    pub(crate) angles: Angles<'a>,
    pub(crate) style: RopeStyle,
}

impl Kernel for Rotate<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        rotate(self.x, self.head_dim, self.angles, self.style);
    }
}

/// Rotates heads by a row's angles.
#[inline(always)]
pub(crate) fn rotate(x: &mut [f32], head_dim: usize, Angles { cos, sin }: Angles<'_>, style: RopeStyle) {
    let half = cos.len();
    assert!(sin.len() == half && 2 * half <= head_dim, "wrong angles; this is a bug");
    for head in x.chunks_exact_mut(head_dim) {
        match style {
            RopeStyle::Interleaved => {
                for ((pair, cos), sin) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
                    let (a, b) = (pair[0], pair[1]);
                    pair[0] = a * cos - b * sin;
                    pair[1] = a * sin + b * cos;
                }
            }
            RopeStyle::Halves => {
                let (first, second) = head.split_at_mut(half);
                for i in 0..half {
                    let (a, b) = (first[i], second[i]);
                    first[i] = a * cos[i] - b * sin[i];
                    second[i] = a * sin[i] + b * cos[i];
                }
            }
        }
    }
}
