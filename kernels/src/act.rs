//! Nonlinear functions of single elements: an MLP's activation, gated or not, and the cap on scores.
//!
//! Each element by itself, so neither its neighbours nor its place among the lanes can be seen in the result.

use crate::simd::{Kernel, LANES, Simd, load_part, split, store_part};

/// An MLP's activation function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// x / (1 + e^-x), also called swish.
    Silu,
    /// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))): `gelu_new`, `gelu_pytorch_tanh`.
    /// (Hendrycks and Gimpel, "Gaussian error linear units", 2016)
    GeluTanh,
    /// x / 2 (1 + erf(x / sqrt(2))).
    Gelu,
}

/// An element's function.
trait Function: Copy {
    fn of<S: Simd>(self, s: S, x: S::V) -> S::V;
}

#[derive(Clone, Copy)]
struct Silu;
#[derive(Clone, Copy)]
struct GeluTanh;
#[derive(Clone, Copy)]
struct Gelu;
/// cap * tanh(x / cap)
#[derive(Clone, Copy)]
pub(crate) struct Cap(pub(crate) f32);

/// x / (1 + e^-y)
#[inline(always)]
fn times_sigmoid<S: Simd>(s: S, x: S::V, y: S::V) -> S::V {
    s.div(x, s.add(s.splat(1.0), s.exp(s.sub(s.zero(), y))))
}

impl Function for Silu {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::V) -> S::V {
        times_sigmoid(s, x, x)
    }
}

impl Function for GeluTanh {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::V) -> S::V {
        // (1 + tanh(u)) / 2 = 1 / (1 + e^(-2 u))
        let factor = s.fma(s.mul(x, x), s.splat(2.0 * 0.797_884_6 * 0.044_715), s.splat(2.0 * 0.797_884_6));
        times_sigmoid(s, x, s.mul(x, factor))
    }
}

impl Function for Gelu {
    /// The tail erfc(z), z = |x| / sqrt(2), has the form of formula 7.1.26 of Abramowitz and Stegun's "Handbook
    /// of mathematical functions" (1964), e^(-z^2) t p(t) with t = 1 / (1 + c z); c = 0.33 and p of degree 7,
    /// interpolated at Chebyshev's nodes of z in 0..9, are ours: relative error 1.3e-7. Both signs take the
    /// tail as it is, so nothing cancels.
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::V) -> S::V {
        let magnitude = s.abs(x);
        let below = s.fma(magnitude, s.splat(0.33 * std::f32::consts::FRAC_1_SQRT_2), s.splat(1.0));
        let t = s.div(s.splat(1.0), below);
        let mut p = s.splat(-0.137_481_07);
        p = s.fma(p, t, s.splat(0.469_585_48));
        p = s.fma(p, t, s.splat(-0.368_194_73));
        p = s.fma(p, t, s.splat(0.425_233_42));
        p = s.fma(p, t, s.splat(0.037_694_404));
        p = s.fma(p, t, s.splat(0.204_360_56));
        p = s.fma(p, t, s.splat(0.182_404_06));
        p = s.fma(p, t, s.splat(0.186_397_77));
        let erfc = s.mul(s.mul(p, t), s.exp(s.mul(s.mul(x, x), s.splat(-0.5))));
        let tail = s.mul(s.mul(x, s.splat(0.5)), erfc);
        s.where_less(x, s.zero(), tail, s.sub(x, tail))
    }
}

impl Function for Cap {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::V) -> S::V {
        s.mul(s.tanh(s.mul(x, s.splat(1.0 / self.0))), s.splat(self.0))
    }
}

/// Scores capped where they lie, 16 at a time.
#[inline(always)]
pub(crate) fn cap_vector<S: Simd>(s: S, cap: f32, x: S::V) -> S::V {
    Cap(cap).of(s, x)
}

/// out = act(gate) * up, one row.
pub(crate) struct ActMul<'a> {
    pub(crate) act: Act,
    pub(crate) gate: &'a [f32],
    pub(crate) up: &'a [f32],
    pub(crate) out: &'a mut [f32],
}

impl Kernel for ActMul<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.act {
            Act::Silu => gated(s, Silu, self),
            Act::GeluTanh => gated(s, GeluTanh, self),
            Act::Gelu => gated(s, Gelu, self),
        }
    }
}

#[inline(always)]
fn gated<S: Simd, F: Function>(s: S, f: F, row: ActMul<'_>) {
    let ActMul { gate, up, out, .. } = row;
    let width = out.len();
    assert!(gate.len() == width && up.len() == width, "rows differ; this is a bug");
    let (full, rest) = split(width);
    let (gate, up, out) = (gate.as_ptr(), up.as_ptr(), out.as_mut_ptr());
    // SAFETY: all three rows have `width` elements.
    unsafe {
        let mut i = 0;
        while i < full {
            s.store(out.add(i), s.mul(f.of(s, s.load(gate.add(i))), s.load(up.add(i))));
            i += LANES;
        }
        if rest > 0 {
            let (gate, up) = (load_part(s, gate.add(full), rest), load_part(s, up.add(full), rest));
            store_part(s, out.add(full), rest, s.mul(f.of(s, gate), up));
        }
    }
}

/// x = act(x), some elements.
pub(crate) struct ActInPlace<'a> {
    pub(crate) act: Act,
    pub(crate) x: &'a mut [f32],
}

impl Kernel for ActInPlace<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.act {
            Act::Silu => in_place(s, Silu, self.x),
            Act::GeluTanh => in_place(s, GeluTanh, self.x),
            Act::Gelu => in_place(s, Gelu, self.x),
        }
    }
}

/// x = cap * tanh(x / cap), some elements.
pub(crate) struct Softcap<'a> {
    pub(crate) cap: f32,
    pub(crate) x: &'a mut [f32],
}

impl Kernel for Softcap<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        in_place(s, Cap(self.cap), self.x);
    }
}

#[inline(always)]
fn in_place<S: Simd, F: Function>(s: S, f: F, x: &mut [f32]) {
    let (full, rest) = split(x.len());
    let x = x.as_mut_ptr();
    // SAFETY: `x` has full + rest elements.
    unsafe {
        let mut i = 0;
        while i < full {
            s.store(x.add(i), f.of(s, s.load(x.add(i))));
            i += LANES;
        }
        if rest > 0 {
            store_part(s, x.add(full), rest, f.of(s, load_part(s, x.add(full), rest)));
        }
    }
}
