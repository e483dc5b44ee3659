//! Plain Rust that the compiler turns into what each target has at least: SSE2, NEON. Multiply-add is not fused.
//!
//! It does so where all 16 lanes do the same without a branch, and where a vector is 16 numbers of 32 bits: so
//! weights are four bytes to a lane, taken out by shifts, and f16 are widened by arithmetic.

use half::{bf16, f16};

use super::{LANES, Simd};

#[derive(Clone, Copy)]
pub(super) struct Portable;

type V = [f32; LANES];

#[inline(always)]
fn zip(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// 1.5 * 2^23: added and taken away again, it rounds to an integer, ties to even.
const ROUNDER: f32 = 12_582_912.0;

/// An f16 as f32: its bits moved to their places, and the exponent from one bias to the other. Below the least
/// exponent it gets that exponent's leading 1 and has it subtracted again.
#[inline(always)]
fn widened(bits: u16) -> f32 {
    let bits = u32::from(bits);
    let magnitude = (bits & 0x7fff) << 13;
    let ones_if = |condition: bool| u32::from(condition).wrapping_neg();
    let small = ones_if(magnitude < 1 << 23);
    let infinite_or_nan = ones_if(magnitude >= 31 << 23);
    let shift = (112 + (small & 1)) << 23;
    let number = f32::from_bits(magnitude + shift) - f32::from_bits(shift & small);
    f32::from_bits(number.to_bits() | infinite_or_nan & 0x7f80_0000 | (bits & 0x8000) << 16)
}

impl Simd for Portable {
    type V = V;
    /// A lane's first byte lowest
    type W = [u32; LANES];
    type Dot4 = [i32; LANES];
    type Dot8 = [i32; LANES];

    const TILE_PANELS: usize = 1;
    const TILES: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> V {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<V>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: V) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<V>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> V {
        // SAFETY: the caller's promise.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(widened)
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> V {
        // SAFETY: the caller's promise.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }

    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> V {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[i8; LANES]>().read_unaligned() }.map(f32::from)
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16, v: V) {
        let bits = v.map(|x| bf16::from_f32(x).to_bits());
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(bits) }
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16, v: V) {
        let bits = v.map(|x| f16::from_f32(x).to_bits());
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(bits) }
    }

    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8, v: V) -> i32 {
        let q = self.round(v).map(|x| x as i8);
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[i8; LANES]>().write_unaligned(q) };
        q.iter().map(|q| i32::from(*q)).sum()
    }

    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn where_less(self, a: V, b: V, x: V, y: V) -> V {
        std::array::from_fn(|i| if a[i] < b[i] { x[i] } else { y[i] })
    }

    #[inline(always)]
    fn round(self, v: V) -> V {
        v.map(|x| (x + ROUNDER) - ROUNDER)
    }

    #[inline(always)]
    fn exp2_int(self, v: V) -> V {
        v.map(|x| f32::from_bits(((x as i32 + 127) << 23) as u32))
    }

    #[inline(always)]
    fn sum(self, mut v: V) -> f32 {
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                v[i] += v[i + half];
            }
            half /= 2;
        }
        v[0]
    }

    #[inline(always)]
    fn first(self, v: V) -> f32 {
        v[0]
    }

    #[inline(always)]
    unsafe fn load_bytes(self, from: *const u8) -> [u32; LANES] {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[u32; LANES]>().read_unaligned() }.map(u32::from_le)
    }

    #[inline(always)]
    fn low_nibbles(self, w: [u32; LANES]) -> [u32; LANES] {
        w.map(|w| w & 0x0f0f_0f0f)
    }

    #[inline(always)]
    fn high_nibbles(self, w: [u32; LANES]) -> [u32; LANES] {
        w.map(|w| (w >> 4) & 0x0f0f_0f0f)
    }

    #[inline(always)]
    fn dot4_zero(self) -> [i32; LANES] {
        [0; LANES]
    }

    #[inline(always)]
    unsafe fn dot4(self, acc: [i32; LANES], w: [u32; LANES], a: *const i8) -> [i32; LANES] {
        // SAFETY: the caller's promise.
        let a = unsafe { a.cast::<[i8; 4]>().read_unaligned() }.map(i32::from);
        std::array::from_fn(|i| {
            let product = |b: usize| ((w[i] >> (8 * b)) & 255) as i32 * a[b];
            // It never wraps; a check in each lane would keep the lanes apart.
            acc[i].wrapping_add((product(0) + product(1)) + (product(2) + product(3)))
        })
    }

    #[inline(always)]
    fn dot4_f32(self, acc: [i32; LANES]) -> V {
        acc.map(|x| x as f32)
    }

    #[inline(always)]
    fn dot8_zero(self) -> [i32; LANES] {
        [0; LANES]
    }

    #[inline(always)]
    unsafe fn dot8(self, acc: [i32; LANES], w: [u32; LANES], a: *const i8) -> [i32; LANES] {
        // SAFETY: the caller's promise.
        unsafe { self.dot4(acc, w, a) }
    }

    #[inline(always)]
    fn dot8_f32(self, acc: [i32; LANES]) -> V {
        acc.map(|x| x as f32)
    }

    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
}
