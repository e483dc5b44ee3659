//! Plain Rust: arrays that the compiler may vectorise. Multiply-add is not fused.

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

impl Simd for Portable {
    type V = V;
    type W = [u8; 64];
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
        bits.map(|bits| f16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> V {
        // SAFETY: the caller's promise.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|bits| bf16::from_bits(bits).to_f32())
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
    unsafe fn load_bytes(self, from: *const u8) -> [u8; 64] {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[u8; 64]>().read_unaligned() }
    }

    #[inline(always)]
    fn low_nibbles(self, w: [u8; 64]) -> [u8; 64] {
        w.map(|w| w & 15)
    }

    #[inline(always)]
    fn high_nibbles(self, w: [u8; 64]) -> [u8; 64] {
        w.map(|w| w >> 4)
    }

    #[inline(always)]
    fn dot4_zero(self) -> [i32; LANES] {
        [0; LANES]
    }

    #[inline(always)]
    unsafe fn dot4(self, mut acc: [i32; LANES], w: [u8; 64], a: *const i8) -> [i32; LANES] {
        // SAFETY: the caller's promise.
        let a = unsafe { a.cast::<[i8; 4]>().read_unaligned() }.map(i32::from);
        for (i, acc) in acc.iter_mut().enumerate() {
            for (b, a) in a.iter().enumerate() {
                *acc += i32::from(w[4 * i + b]) * a;
            }
        }
        acc
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
    unsafe fn dot8(self, acc: [i32; LANES], w: [u8; 64], a: *const i8) -> [i32; LANES] {
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
