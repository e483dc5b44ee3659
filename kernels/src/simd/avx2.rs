//! AVX2 with FMA and F16C: two registers a vector.
//!
//! `vpmaddubsw` adds two products into 16 bits and saturates. With weights up to 15 a whole group's sums fit
//! (8 * 2 * 15 * 127 = 30,480), so they are added in 16 bits and widened once; 8-bit weights are split into
//! their nibbles and take two such sums.

use std::arch::x86_64::*;

use super::{Kernel, Simd};

/// Proof of AVX2, FMA and F16C; made in [`run`] alone.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// # Safety
/// The machine has these features.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run(Avx2(()));
}

/// An intrinsic that needs no more than the instruction set (and what the caller promised of pointers).
macro_rules! with {
    ($($body:tt)*) => {
        // SAFETY: `self` proves the instruction set; pointers are good by the trait's contract.
        unsafe { $($body)* }
    };
}

/// Halves added to each other.
///
/// # Safety
/// The machine has AVX.
#[inline(always)]
pub(super) unsafe fn sum8(v: __m256) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps::<1>(v, v)))
    }
}

/// Each lane rounded to bf16, in its low 16 bits.
///
/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn bf16_bits(v: __m256) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        // Half of the last kept place, less one where that place is even; a NaN stays one.
        let bits = _mm256_castps_si256(v);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        let number = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, up));
        let nan = _mm256_or_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(0x40));
        _mm256_blendv_epi8(number, nan, _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v)))
    }
}

type V = [__m256; 2];
type W = [__m256i; 2];

impl Simd for Avx2 {
    type V = V;
    type W = W;
    /// 16-bit sums of pairs
    type Dot4 = W;
    /// The same of low and of high nibbles
    type Dot8 = [W; 2];

    const TILE_PANELS: usize = 1;

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        with!([_mm256_set1_ps(x); 2])
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> V {
        with!([_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))])
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: V) {
        with!({
            _mm256_storeu_ps(to, v[0]);
            _mm256_storeu_ps(to.add(8), v[1]);
        })
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> V {
        with!([
            _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast()))
        ])
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> V {
        with!({
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8).cast()));
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            ]
        })
    }

    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> V {
        with!([
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.add(8).cast()))),
        ])
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16, v: V) {
        with!({
            let words = _mm256_packus_epi32(bf16_bits(v[0]), bf16_bits(v[1]));
            _mm256_storeu_si256(to.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(words));
        })
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16, v: V) {
        with!({
            _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[0]));
            _mm_storeu_si128(to.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[1]));
        })
    }

    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8, v: V) -> i32 {
        with!({
            let (a, b) = (_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1]));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a, b));
            let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(to.cast(), bytes);
            let sum = _mm256_add_epi32(a, b);
            let sum = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
            let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b01_00_11_10>(sum));
            _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32::<1>(sum)))
        })
    }

    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        with!([_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        with!([_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        with!([_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        with!([_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        with!([_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])])
    }

    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        with!([_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        with!([_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn where_less(self, a: V, b: V, x: V, y: V) -> V {
        with!([
            _mm256_blendv_ps(y[0], x[0], _mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0])),
            _mm256_blendv_ps(y[1], x[1], _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1]))
        ])
    }

    #[inline(always)]
    fn round(self, v: V) -> V {
        with!([
            _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v[0]),
            _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v[1])
        ])
    }

    #[inline(always)]
    fn exp2_int(self, v: V) -> V {
        with!({
            let bias = _mm256_set1_epi32(127);
            let low = _mm256_add_epi32(_mm256_cvtps_epi32(v[0]), bias);
            let high = _mm256_add_epi32(_mm256_cvtps_epi32(v[1]), bias);
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(high)),
            ]
        })
    }

    #[inline(always)]
    fn sum(self, v: V) -> f32 {
        with!(sum8(_mm256_add_ps(v[0], v[1])))
    }

    #[inline(always)]
    fn largest(self, v: V) -> f32 {
        with!({
            let v = _mm256_max_ps(v[0], v[1]);
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps::<1>(v, v)))
        })
    }

    #[inline(always)]
    fn first(self, v: V) -> f32 {
        with!(_mm256_cvtss_f32(v[0]))
    }

    #[inline(always)]
    unsafe fn load_bytes(self, from: *const u8) -> W {
        with!([_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())])
    }

    #[inline(always)]
    fn low_nibbles(self, w: W) -> W {
        with!({
            let mask = _mm256_set1_epi8(15);
            [_mm256_and_si256(w[0], mask), _mm256_and_si256(w[1], mask)]
        })
    }

    #[inline(always)]
    fn high_nibbles(self, w: W) -> W {
        with!(self.low_nibbles([_mm256_srli_epi16::<4>(w[0]), _mm256_srli_epi16::<4>(w[1])]))
    }

    #[inline(always)]
    fn dot4_zero(self) -> W {
        with!([_mm256_setzero_si256(); 2])
    }

    #[inline(always)]
    unsafe fn dot4(self, acc: W, w: W, a: *const i8) -> W {
        with!({
            let a = _mm256_set1_epi32(a.cast::<i32>().read_unaligned());
            [
                _mm256_add_epi16(acc[0], _mm256_maddubs_epi16(w[0], a)),
                _mm256_add_epi16(acc[1], _mm256_maddubs_epi16(w[1], a)),
            ]
        })
    }

    #[inline(always)]
    fn dot4_f32(self, acc: W) -> V {
        with!({
            let ones = _mm256_set1_epi16(1);
            [
                _mm256_cvtepi32_ps(_mm256_madd_epi16(acc[0], ones)),
                _mm256_cvtepi32_ps(_mm256_madd_epi16(acc[1], ones)),
            ]
        })
    }

    #[inline(always)]
    fn dot8_zero(self) -> [W; 2] {
        [self.dot4_zero(); 2]
    }

    #[inline(always)]
    unsafe fn dot8(self, acc: [W; 2], w: W, a: *const i8) -> [W; 2] {
        with!([self.dot4(acc[0], self.low_nibbles(w), a), self.dot4(acc[1], self.high_nibbles(w), a)])
    }

    #[inline(always)]
    fn dot8_f32(self, acc: [W; 2]) -> V {
        with!({
            let (ones, sixteens) = (_mm256_set1_epi16(1), _mm256_set1_epi16(16));
            let total = |i: usize| {
                let low = _mm256_madd_epi16(acc[0][i], ones);
                _mm256_cvtepi32_ps(_mm256_add_epi32(low, _mm256_madd_epi16(acc[1][i], sixteens)))
            };
            [total(0), total(1)]
        })
    }

    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        with!(_mm_prefetch::<_MM_HINT_T1>(at.cast()))
    }
}
