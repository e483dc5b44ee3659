//! Dense weights rounded to a packed format, a group of 32 at a time.
//!
//! Scales and minima are rounded to f16 first and the integers chosen for the rounded ones, so packing loses
//! nothing more. Nothing is fused and sums have one order: the result is the same on every instruction set.
//! Knows no matrix. A group that f16 scales cannot hold, or with a NaN or an infinity, is nobody's: `None`.

use half::f16;

use crate::simd::{Kernel, LANES, Simd, dispatch};
use crate::{Cpu, GROUP};

type Values = [f32; GROUP];

/// Shares of a group's range that a search starts without, at the low and at the high end.
const MARGINS: [(f32, f32); 4] = [(0.0, 0.0), (0.06, 0.0), (0.0, 0.06), (0.06, 0.06)];

/// Rounds of choosing integers for a scale and minimum, then these for the integers.
const REFITS: usize = 2;

impl Cpu {
    /// Rounds a group to 8 bits for [`crate::ScaleKind::F16Centred`]: the weights are `scale * (q - 128)`,
    /// returns the scale.
    pub fn quantize_int8(&self, x: &[f32; GROUP], q: &mut [u8; GROUP]) -> Option<f32> {
        let [low, high] = extremes(x)?;
        let amax = if high > -low { high } else { -low };
        let mut scale = f16::from_f32(amax / 127.0);
        // Only among the smallest f16 numbers the nearest can be this much too small.
        if scale.to_f32() * 127.5 < amax {
            scale = f16::from_bits(scale.to_bits() + 1);
        }
        let scale = Some(scale).filter(|scale| scale.is_finite())?.to_f32();
        let inverse = invert(scale);
        for (q, x) in q.iter_mut().zip(x) {
            *q = (round(clamp(x * inverse, -127.0, 127.0)) + 128.0) as u8;
        }
        Some(scale)
    }

    /// Rounds a group to 4 bits for [`crate::ScaleKind::F16`]: the weights are `scale * q + min`, returns
    /// (scale, min).
    ///
    /// Searches for a small sum of squared errors, which is never more than that of spanning the group's range.
    pub fn quantize_int4(&self, x: &[f32; GROUP], q: &mut [u8; GROUP]) -> Option<(f32, f32)> {
        let [low, high] = extremes(x)?;
        let mut found = (nearest_half((high - low) / 15.0)?, nearest_half(low)?);
        dispatch(self.isa(), Search { x, low, range: high - low, q, found: &mut found });
        Some(found)
    }
}

/// The search for a group's scale and minimum.
struct Search<'a> {
    x: &'a Values,
    low: f32,
    range: f32,
    q: &'a mut [u8; GROUP],
    /// At first those that span the range.
    found: &'a mut (f32, f32),
}

impl Kernel for Search<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { x, low, range, q, found } = self;
        // SAFETY: a group has 2 * 16 elements.
        let x = Group { s, a: unsafe { s.load(x.as_ptr()) }, b: unsafe { s.load(x.as_ptr().add(LANES)) } };
        let mut best = Best { scale: found.0, min: found.1, error: x.error(found.0, found.1) };
        if range == 0.0 {
            // What the minimum loses by rounding is one step.
            best.challenge(&x, low - best.min, best.min);
        }
        let above = Group { s, a: s.sub(x.a, s.splat(low)), b: s.sub(x.b, s.splat(low)) };
        let total = s.sum(s.add(above.a, above.b));
        for (bottom, top) in MARGINS {
            let (mut scale, mut min) = (range * (1.0 - bottom - top) / 15.0, range * bottom);
            let mut moments = above.moments(scale, min);
            for _ in 0..REFITS {
                let Some(line) = moments.line(total) else { break };
                (scale, min) = line;
                moments = above.moments(scale, min);
            }
            // With the minimum rounded another slope is best.
            let min = f16::from_f32(low + min).to_f32();
            best.challenge(&x, moments.slope(min - low).unwrap_or(scale), min);
        }
        let inverse = invert(best.scale);
        let mut integers = [0f32; GROUP];
        // SAFETY: 2 * 16 elements.
        unsafe {
            s.store(integers.as_mut_ptr(), x.nearest(x.a, inverse, best.min));
            s.store(integers.as_mut_ptr().add(LANES), x.nearest(x.b, inverse, best.min));
        }
        for (q, integer) in q.iter_mut().zip(integers) {
            *q = integer as u8;
        }
        *found = (best.scale, best.min);
    }
}

/// The best scale and minimum so far, both as f16 holds them.
struct Best {
    scale: f32,
    min: f32,
    error: f32,
}

impl Best {
    /// Takes scale and min, rounded to f16, if they are better.
    #[inline(always)]
    fn challenge<S: Simd>(&mut self, x: &Group<S>, scale: f32, min: f32) {
        let (scale, min) = (f16::from_f32(scale).to_f32(), f16::from_f32(min).to_f32());
        if scale.is_finite() && min.is_finite() {
            let error = x.error(scale, min);
            if error < self.error {
                *self = Self { scale, min, error };
            }
        }
    }
}

/// A group's values in registers. Nothing is fused, and sums are added up alike on every instruction set.
/// (No closures: they would not be compiled for the instruction set.)
struct Group<S: Simd> {
    s: S,
    a: S::V,
    b: S::V,
}

impl<S: Simd> Group<S> {
    /// The integers in 0..=15 that are nearest to x = scale * q + min.
    #[inline(always)]
    fn nearest(&self, x: S::V, inverse: f32, min: f32) -> S::V {
        let s = self.s;
        let exact = s.mul(s.sub(x, s.splat(min)), s.splat(inverse));
        s.round(s.min(s.splat(15.0), s.max(s.zero(), exact)))
    }

    /// (x - (scale * q + min))^2
    #[inline(always)]
    fn square(&self, x: S::V, scale: f32, min: f32) -> S::V {
        let s = self.s;
        let q = self.nearest(x, invert(scale), min);
        let error = s.sub(x, s.add(s.mul(s.splat(scale), q), s.splat(min)));
        s.mul(error, error)
    }

    /// The sum of squared errors with the nearest integers.
    #[inline(always)]
    fn error(&self, scale: f32, min: f32) -> f32 {
        let s = self.s;
        s.sum(s.add(self.square(self.a, scale, min), self.square(self.b, scale, min)))
    }

    #[inline(always)]
    fn moments(&self, scale: f32, min: f32) -> Moments {
        let (s, inverse) = (self.s, invert(scale));
        let (a, b) = (self.nearest(self.a, inverse, min), self.nearest(self.b, inverse, min));
        Moments {
            q: s.sum(s.add(a, b)),
            qq: s.sum(s.add(s.mul(a, a), s.mul(b, b))),
            qx: s.sum(s.add(s.mul(a, self.a), s.mul(b, self.b))),
        }
    }
}

/// Sums over the integers q that are nearest for some scale and minimum: what least squares asks of them.
struct Moments {
    q: f32,
    qq: f32,
    qx: f32,
}

impl Moments {
    /// The (scale, min) of least squares for these integers and the sum `x` of the values; none unless the
    /// scale is over zero.
    #[inline(always)]
    fn line(&self, x: f32) -> Option<(f32, f32)> {
        let count = GROUP as f32;
        let below = count * self.qq - self.q * self.q;
        let scale = (count * self.qx - self.q * x) / below;
        (below > 0.0 && scale > 0.0).then_some((scale, (x - scale * self.q) / count))
    }

    /// The scale of least squares for these integers and this minimum.
    #[inline(always)]
    fn slope(&self, min: f32) -> Option<f32> {
        let scale = (self.qx - min * self.q) / self.qq;
        (scale > 0.0).then_some(scale)
    }
}

/// Least and greatest, if all are finite.
fn extremes(x: &Values) -> Option<[f32; 2]> {
    let mut finite = true;
    let (mut low, mut high) = (x[0], x[0]);
    for x in x {
        finite &= x.is_finite();
        low = if *x < low { *x } else { low };
        high = if *x > high { *x } else { high };
    }
    finite.then_some([low, high])
}

/// Rounded to f16, if it does not overflow.
fn nearest_half(x: f32) -> Option<f32> {
    Some(f16::from_f32(x).to_f32()).filter(|half| half.is_finite())
}

/// 1 / scale, or zero where that is no number.
#[inline(always)]
fn invert(scale: f32) -> f32 {
    let inverse = 1.0 / scale;
    if inverse.is_finite() { inverse } else { 0.0 }
}

#[inline(always)]
fn clamp(x: f32, low: f32, high: f32) -> f32 {
    let x = if x > low { x } else { low };
    if x < high { x } else { high }
}

/// To an integer, ties to even; |x| < 2^22.
#[inline(always)]
fn round(x: f32) -> f32 {
    const ROUNDER: f32 = 12_582_912.0;
    (x + ROUNDER) - ROUNDER
}
