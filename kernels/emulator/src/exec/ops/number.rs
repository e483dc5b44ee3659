//! Half-precision floats, and roundings that the host has no instruction for.
//!
//! Rounding twice is exact where the first goes to odd: the last bit then says that something was cut
//! off (Boldo and Melquiond, "When double rounding is odd", 2005).

use super::Rounding;
use crate::exec::registers::Word;

/// A 16-bit float, as its bits.
pub(crate) trait Half: Word {
    fn to_f32(self) -> f32;
    /// Rounded to nearest, ties to even; each NaN becomes 0x7fff.
    fn from_f32(value: f32) -> Self;
    fn bits(self) -> u16;
    fn from_bits(bits: u16) -> Self;
    /// The bits below which a magnitude is subnormal, and those of infinity.
    const NORMAL: u16;
    const INFINITY: u16;
}

#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct F16(u16);

#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct Bf16(u16);

macro_rules! words {
    ($($T:ty: $zero:expr),*) => {$(
        // SAFETY: 16 bits, all of them values, or a pair of them without padding.
        unsafe impl Word for $T {
            #[inline(always)]
            fn zero() -> Self {
                $zero
            }
        }
    )*};
}
words!(F16: F16(0), Bf16: Bf16(0), [F16; 2]: [F16(0); 2], [Bf16; 2]: [Bf16(0); 2]);

const NAN: u16 = 0x7fff;

impl Half for F16 {
    const NORMAL: u16 = 0x0400;
    const INFINITY: u16 = 0x7c00;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        let magnitude = u32::from(self.0 & 0x7fff);
        // As an f32 the exponent is too low by 112; the product also makes subnormals right.
        let scaled = f32::from_bits(magnitude << 13) * f32::from_bits(0x7780_0000);
        let value = if magnitude >= 0x7c00 { magnitude << 13 | 0x7f80_0000 } else { scaled.to_bits() };
        f32::from_bits(value | u32::from(self.0 & 0x8000) << 16)
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let (sign, magnitude) = ((bits >> 16) as u16 & 0x8000, bits & 0x7fff_ffff);
        // Below 2^-14 the sum with 0.5 rounds to multiples of 2^-24, f16's least step.
        let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5_f32.to_bits());
        // Above, the exponent is moved and what is cut off is rounded to even.
        let normal = magnitude.wrapping_add(0xc800_0fff).wrapping_add(magnitude >> 13 & 1) >> 13;
        let finite = if magnitude < 0x3880_0000 { subnormal } else { normal };
        let all = if magnitude >= 0x4780_0000 { 0x7c00 } else { finite } as u16;
        Self(if magnitude > 0x7f80_0000 { NAN } else { all | sign })
    }

    #[inline(always)]
    fn bits(self) -> u16 {
        self.0
    }

    #[inline(always)]
    fn from_bits(bits: u16) -> Self {
        Self(bits)
    }
}

impl Half for Bf16 {
    const NORMAL: u16 = 0x0080;
    const INFINITY: u16 = 0x7f80;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff).wrapping_add(bits >> 16 & 1) >> 16;
        Self(if value.is_nan() { NAN } else { rounded as u16 })
    }

    #[inline(always)]
    fn bits(self) -> u16 {
        self.0
    }

    #[inline(always)]
    fn from_bits(bits: u16) -> Self {
        Self(bits)
    }
}

/// `sum` moved to the odd neighbour on the side of what it lacks, `rest`, if it lacks anything.
#[inline(always)]
pub(crate) fn to_odd(sum: f64, rest: f64) -> f64 {
    let bits = sum.to_bits();
    if rest == 0.0 || !sum.is_finite() || !rest.is_finite() || bits & 1 == 1 {
        return sum;
    }
    f64::from_bits(if (rest > 0.0) == (sum > 0.0) { bits + 1 } else { bits - 1 })
}

/// `a + b` in f64, rounded to odd.
#[inline(always)]
pub(crate) fn add_to_odd(a: f64, b: f64) -> f64 {
    let sum = a + b;
    let b_part = sum - a;
    let rest = (a - (sum - b_part)) + (b - b_part);
    to_odd(sum, rest)
}

/// An f64 as f32, rounded to odd.
#[inline(always)]
fn f32_to_odd(value: f64) -> f32 {
    let near = value as f32;
    let bits = near.to_bits();
    if f64::from(near) == value || !near.is_finite() || bits & 1 == 1 {
        // An infinity that was finite keeps the side of every half's overflow.
        return near;
    }
    f32::from_bits(if near.abs() as f64 > value.abs() { bits - 1 } else { bits + 1 })
}

/// A result that is exact, or rounded to odd, in f64 as f32.
pub(crate) fn round_to_f32(value: f64, rounding: Rounding) -> f32 {
    let near = value as f32;
    let exact = f64::from(near);
    match rounding {
        Rounding::Down if exact > value => near.next_down(),
        Rounding::Up if exact < value => near.next_up(),
        Rounding::Zero if exact.abs() > value.abs() => f32::from_bits(near.to_bits() - 1),
        _ => near,
    }
}

/// The same as a half.
pub(crate) fn round_to_half<H: Half>(value: f64, rounding: Rounding) -> H {
    let near = H::from_f32(f32_to_odd(value));
    let exact = f64::from(near.to_f32());
    let toward_zero = || H::from_bits(near.bits() - 1);
    let away = || H::from_bits(near.bits() + 1);
    match rounding {
        Rounding::Zero if exact.abs() > value.abs() => toward_zero(),
        Rounding::Down if exact > value && exact > 0.0 => toward_zero(),
        Rounding::Up if exact < value && exact < 0.0 => toward_zero(),
        // From zero the step is to the least subnormal of the value's sign.
        Rounding::Down if exact > value => {
            if exact == 0.0 {
                H::from_bits(0x8001)
            } else {
                away()
            }
        }
        Rounding::Up if exact < value => {
            if exact == 0.0 {
                H::from_bits(1)
            } else {
                away()
            }
        }
        _ => near,
    }
}

/// `a * b + c` rounded once.
#[inline(always)]
pub(crate) fn fma_half<H: Half>(a: H, b: H, c: H) -> H {
    let product = f64::from(a.to_f32()) * f64::from(b.to_f32());
    H::from_f32(f32_to_odd(add_to_odd(product, f64::from(c.to_f32()))))
}

/// Floats that PTX orders: a NaN gives way to a number, and -0 is below +0.
pub(crate) trait Ordered: Word + PartialOrd {
    fn nan() -> Self;
    fn is_nan(self) -> bool;
    fn is_negative(self) -> bool;
}

macro_rules! ordered {
    ($T:ty, $nan:expr) => {
        impl Ordered for $T {
            #[inline(always)]
            fn nan() -> Self {
                <$T>::from_bits($nan)
            }
            #[inline(always)]
            fn is_nan(self) -> bool {
                self != self
            }
            #[inline(always)]
            fn is_negative(self) -> bool {
                self.is_sign_negative()
            }
        }
    };
}
ordered!(f32, 0x7fff_ffff);
ordered!(f64, 0x7fff_ffff_ffff_ffff);

/// The lesser of two; with `propagate` a NaN wins.
#[inline(always)]
pub(crate) fn least<T: Ordered>(a: T, b: T, propagate: bool) -> T {
    if a.is_nan() || b.is_nan() {
        if propagate || (a.is_nan() && b.is_nan()) {
            T::nan()
        } else if a.is_nan() {
            b
        } else {
            a
        }
    } else if a < b || (a == b && a.is_negative()) {
        a
    } else {
        b
    }
}

/// The greater of two; with `propagate` a NaN wins.
#[inline(always)]
pub(crate) fn greatest<T: Ordered>(a: T, b: T, propagate: bool) -> T {
    if a.is_nan() || b.is_nan() {
        if propagate || (a.is_nan() && b.is_nan()) {
            T::nan()
        } else if a.is_nan() {
            b
        } else {
            a
        }
    } else if a > b || (a == b && !a.is_negative()) {
        a
    } else {
        b
    }
}
