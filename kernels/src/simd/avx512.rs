//! AVX-512 with VNNI: one register a vector, `vpdpbusd` for the integer dots.

use std::arch::x86_64::*;

use super::{Kernel, Simd};

/// Proof of AVX-512 F, BW, VL, DQ and VNNI; made in [`run`] alone.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

/// # Safety
/// The machine has these features.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run(Avx512(()));
}

/// An intrinsic that needs no more than the instruction set (and what the caller promised of pointers).
macro_rules! with {
    ($($body:tt)*) => {
        // SAFETY: `self` proves the instruction set; pointers are good by the trait's contract.
        unsafe { $($body)* }
    };
}

/// `vpdpbusd` with the four bytes at `a` as an operand in memory: as an intrinsic they are loaded into registers
/// far ahead, which then do not hold the tile.
///
/// # Safety
/// The machine has AVX-512 VNNI, and 4 bytes can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn dot_in_memory(mut acc: __m512i, w: __m512i, a: *const i8) -> __m512i {
    // SAFETY: the caller's promise; nothing is written.
    unsafe {
        std::arch::asm!(
            "vpdpbusd {acc}, {w}, dword ptr [{a}]{{1to16}}",
            acc = inout(zmm_reg) acc,
            w = in(zmm_reg) w,
            a = in(reg) a,
            options(pure, readonly, nostack, preserves_flags)
        );
    }
    acc
}

impl Simd for Avx512 {
    type V = __m512;
    type W = __m512i;
    type Dot4 = __m512i;
    type Dot8 = __m512i;

    const TILE_PANELS: usize = 2;
    const TILE_ROWS: usize = 6;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        with!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m512 {
        with!(_mm512_loadu_ps(from))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: __m512) {
        with!(_mm512_storeu_ps(to, v))
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> __m512 {
        with!(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast())))
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> __m512 {
        with!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(
            from.cast()
        )))))
    }

    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> __m512 {
        with!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))))
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16, v: __m512) {
        with!({
            // Half of the last kept place, less one where that place is even; a NaN stays one.
            let bits = _mm512_castps_si512(v);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            let number = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, up));
            let nan = _mm512_or_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(0x40));
            let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            let words = _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(is_nan, number, nan));
            _mm256_storeu_si256(to.cast(), words);
        })
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16, v: __m512) {
        with!(_mm256_storeu_si256(
            to.cast(),
            _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v)
        ))
    }

    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8, v: __m512) -> i32 {
        with!({
            let q = _mm512_cvtps_epi32(v);
            _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(q));
            _mm512_reduce_add_epi32(q)
        })
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        with!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        with!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        with!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        with!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        with!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        with!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        with!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn where_less(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        with!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x))
    }

    #[inline(always)]
    fn round(self, v: __m512) -> __m512 {
        with!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v))
    }

    #[inline(always)]
    fn exp2_int(self, v: __m512) -> __m512 {
        with!(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(
            _mm512_cvtps_epi32(v),
            _mm512_set1_epi32(127)
        ))))
    }

    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        with!({
            let v = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            super::avx2::sum8(v)
        })
    }

    #[inline(always)]
    fn largest(self, v: __m512) -> f32 {
        with!(_mm512_reduce_max_ps(v))
    }

    #[inline(always)]
    fn first(self, v: __m512) -> f32 {
        with!(_mm512_cvtss_f32(v))
    }

    #[inline(always)]
    unsafe fn load_bytes(self, from: *const u8) -> __m512i {
        with!(_mm512_loadu_si512(from.cast()))
    }

    #[inline(always)]
    fn low_nibbles(self, w: __m512i) -> __m512i {
        with!(_mm512_and_si512(w, _mm512_set1_epi8(15)))
    }

    #[inline(always)]
    fn high_nibbles(self, w: __m512i) -> __m512i {
        with!(_mm512_and_si512(_mm512_srli_epi16::<4>(w), _mm512_set1_epi8(15)))
    }

    #[inline(always)]
    fn dot4_zero(self) -> __m512i {
        with!(_mm512_setzero_si512())
    }

    #[inline(always)]
    unsafe fn dot4(self, acc: __m512i, w: __m512i, a: *const i8) -> __m512i {
        with!(dot_in_memory(acc, w, a))
    }

    #[inline(always)]
    fn dot4_f32(self, acc: __m512i) -> __m512 {
        with!(_mm512_cvtepi32_ps(acc))
    }

    #[inline(always)]
    fn dot8_zero(self) -> __m512i {
        self.dot4_zero()
    }

    #[inline(always)]
    unsafe fn dot8(self, acc: __m512i, w: __m512i, a: *const i8) -> __m512i {
        with!(self.dot4(acc, w, a))
    }

    #[inline(always)]
    fn dot8_f32(self, acc: __m512i) -> __m512 {
        self.dot4_f32(acc)
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        with!(_mm_prefetch::<_MM_HINT_T1>(at.cast()))
    }
}
