//! NEON with dot products: four registers a vector, `sdot` for the integer dots.
//!
//! `sdot` takes signed bytes on both sides. Weights up to 15 are the same signed or not; of 8-bit weights 128
//! is taken off and `128 * sum(a)` added back: all in integers, so nothing is rounded. The intrinsics for
//! `sdot` and for prefetching are not stable in Rust, so these two are written as assembly.

use std::arch::aarch64::*;
use std::arch::asm;

use super::{Kernel, Simd};

/// Proof of dot products (NEON itself is always there); made in [`run`] alone.
#[derive(Clone, Copy)]
pub(super) struct Neon(());

/// # Safety
/// The machine has these features.
#[target_feature(enable = "neon,dotprod")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run(Neon(()));
}

type V = [float32x4_t; 4];
type W = [uint8x16_t; 4];

/// An intrinsic that needs no more than the instruction set (and what the caller promised of pointers).
macro_rules! with {
    ($($body:tt)*) => {
        // SAFETY: `self` proves the instruction set; pointers are good by the trait's contract.
        unsafe { $($body)* }
    };
}

/// The same for each of the four registers.
macro_rules! each {
    (|$i:ident| $body:expr) => {
        with!([each!($i, 0, $body), each!($i, 1, $body), each!($i, 2, $body), each!($i, 3, $body)])
    };
    ($i:ident, $value:literal, $body:expr) => {{
        const $i: usize = $value;
        $body
    }};
}

impl Neon {
    /// Four lanes rounded to bf16.
    #[inline(always)]
    fn bf16_bits(self, v: float32x4_t) -> uint16x4_t {
        with!({
            // Half of the last kept place, less one where that place is even; a NaN stays one.
            let bits = vreinterpretq_u32_f32(v);
            let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
            let up = vaddq_u32(odd, vdupq_n_u32(0x7fff));
            let number = vshrq_n_u32::<16>(vaddq_u32(bits, up));
            let nan = vorrq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(0x40));
            vmovn_u32(vbslq_u32(vceqq_f32(v, v), number, nan))
        })
    }
}

/// Adds to each lane its four bytes of `w` times the four bytes of `a`, all signed.
#[inline]
#[target_feature(enable = "neon,dotprod")]
pub(crate) fn sdot(acc: int32x4_t, w: int8x16_t, a: f32) -> int32x4_t {
    let mut sums = acc;
    // SAFETY: the function has dot products; only registers are touched.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {w:v}.16b, {a:v}.4b[0]",
            sums = inout(vreg) sums,
            w = in(vreg) w,
            a = in(vreg) a,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// Four int8, as a register takes them from memory.
///
/// # Safety
/// Four bytes can be read.
#[inline(always)]
unsafe fn four(a: *const i8) -> f32 {
    // SAFETY: the caller's promise.
    unsafe { a.cast::<f32>().read_unaligned() }
}

impl Simd for Neon {
    type V = V;
    type W = W;
    type Dot4 = [int32x4_t; 4];
    /// As `Dot4` of the weights less 128, and in the last the same of -128 alone.
    type Dot8 = [int32x4_t; 5];

    const TILE_PANELS: usize = 1;

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        with!([vdupq_n_f32(x); 4])
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> V {
        each!(|I| vld1q_f32(from.add(4 * I)))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: V) {
        each!(|I| vst1q_f32(to.add(4 * I), v[I]));
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> V {
        each!(|I| vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from.add(4 * I)))))
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> V {
        each!(|I| vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from.add(4 * I)))))
    }

    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> V {
        with!({
            let bytes = vld1q_s8(from);
            let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
            [
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                vcvtq_f32_s32(vmovl_high_s16(low)),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                vcvtq_f32_s32(vmovl_high_s16(high)),
            ]
        })
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16, v: V) {
        each!(|I| vst1_u16(to.add(4 * I), self.bf16_bits(v[I])));
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16, v: V) {
        each!(|I| vst1_u16(to.add(4 * I), vreinterpret_u16_f16(vcvt_f16_f32(v[I]))));
    }

    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8, v: V) -> i32 {
        let q = each!(|I| vcvtnq_s32_f32(v[I]));
        with!({
            let low = vqmovn_high_s32(vqmovn_s32(q[0]), q[1]);
            let high = vqmovn_high_s32(vqmovn_s32(q[2]), q[3]);
            vst1q_s8(to, vqmovn_high_s16(vqmovn_s16(low), high));
            vaddvq_s32(vaddq_s32(vaddq_s32(q[0], q[1]), vaddq_s32(q[2], q[3])))
        })
    }

    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        each!(|I| vaddq_f32(a[I], b[I]))
    }

    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        each!(|I| vsubq_f32(a[I], b[I]))
    }

    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        each!(|I| vmulq_f32(a[I], b[I]))
    }

    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        each!(|I| vdivq_f32(a[I], b[I]))
    }

    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        each!(|I| vfmaq_f32(c[I], a[I], b[I]))
    }

    /// Not `fmax`, which is NaN where either is.
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        each!(|I| vbslq_f32(vcgtq_f32(a[I], b[I]), a[I], b[I]))
    }

    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        each!(|I| vbslq_f32(vcltq_f32(a[I], b[I]), a[I], b[I]))
    }

    #[inline(always)]
    fn where_less(self, a: V, b: V, x: V, y: V) -> V {
        each!(|I| vbslq_f32(vcltq_f32(a[I], b[I]), x[I], y[I]))
    }

    #[inline(always)]
    fn round(self, v: V) -> V {
        each!(|I| vrndnq_f32(v[I]))
    }

    #[inline(always)]
    fn exp2_int(self, v: V) -> V {
        each!(|I| {
            let power = vaddq_s32(vcvtnq_s32_f32(v[I]), vdupq_n_s32(127));
            vreinterpretq_f32_s32(vshlq_n_s32::<23>(power))
        })
    }

    #[inline(always)]
    fn sum(self, v: V) -> f32 {
        with!({
            let four = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
            vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)))
        })
    }

    #[inline(always)]
    fn first(self, v: V) -> f32 {
        with!(vgetq_lane_f32::<0>(v[0]))
    }

    #[inline(always)]
    unsafe fn load_bytes(self, from: *const u8) -> W {
        each!(|I| vld1q_u8(from.add(16 * I)))
    }

    #[inline(always)]
    fn low_nibbles(self, w: W) -> W {
        each!(|I| vandq_u8(w[I], vdupq_n_u8(15)))
    }

    #[inline(always)]
    fn high_nibbles(self, w: W) -> W {
        each!(|I| vshrq_n_u8::<4>(w[I]))
    }

    #[inline(always)]
    fn dot4_zero(self) -> [int32x4_t; 4] {
        with!([vdupq_n_s32(0); 4])
    }

    #[inline(always)]
    unsafe fn dot4(self, acc: [int32x4_t; 4], w: W, a: *const i8) -> [int32x4_t; 4] {
        let a = with!(four(a));
        each!(|I| sdot(acc[I], vreinterpretq_s8_u8(w[I]), a))
    }

    #[inline(always)]
    fn dot4_f32(self, acc: [int32x4_t; 4]) -> V {
        each!(|I| vcvtq_f32_s32(acc[I]))
    }

    #[inline(always)]
    fn dot8_zero(self) -> [int32x4_t; 5] {
        with!([vdupq_n_s32(0); 5])
    }

    #[inline(always)]
    unsafe fn dot8(self, acc: [int32x4_t; 5], w: W, a: *const i8) -> [int32x4_t; 5] {
        let a = with!(four(a));
        let [s0, s1, s2, s3] =
            each!(|I| sdot(acc[I], vreinterpretq_s8_u8(veorq_u8(w[I], vdupq_n_u8(128))), a));
        [s0, s1, s2, s3, with!(sdot(acc[4], vdupq_n_s8(-128), a))]
    }

    #[inline(always)]
    fn dot8_f32(self, acc: [int32x4_t; 5]) -> V {
        each!(|I| vcvtq_f32_s32(vsubq_s32(acc[I], acc[4])))
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        // SAFETY: a prefetch has no effect that a program can see, and faults at no address.
        unsafe {
            asm!("prfm pldl2keep, [{at}]", at = in(reg) at, options(readonly, nostack, preserves_flags))
        };
    }
}
