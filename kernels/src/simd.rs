//! Sixteen f32 lanes on every instruction set, so that a kernel is written once.
//!
//! A [`Simd`] value is proof that the machine has its instructions: [`dispatch`] alone makes one. Kernels and
//! all they call are `#[inline(always)]`, so that they are compiled inside the function that has the
//! target features. Multiply-add is fused on AVX2 and AVX-512 and not on the portable path: results
//! differ between instruction sets, never within one.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

use crate::Isa;
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::sdot;

pub(crate) const LANES: usize = 16;

/// A kernel to be compiled for each instruction set.
pub(crate) trait Kernel {
    fn run<S: Simd>(self, s: S);
}

/// Runs `kernel` with the instructions of `isa`, which the machine must have (`Cpu` checks it once).
#[inline]
pub(crate) fn dispatch<K: Kernel>(isa: Isa, kernel: K) {
    match isa {
        Isa::Portable => kernel.run(portable::Portable),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a `Cpu` is only made with an instruction set that the machine has.
        Isa::Avx2 => unsafe { avx2::run(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512Vnni => unsafe { avx512::run(kernel) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above.
        Isa::Neon => unsafe { neon::run(kernel) },
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512Vnni => unreachable!("a Cpu is never made with an absent instruction set"),
        #[cfg(not(target_arch = "aarch64"))]
        Isa::Neon => unreachable!("a Cpu is never made with an absent instruction set"),
    }
}

/// Operations on 16 lanes.
///
/// # Safety of the pointer operations
/// `load*` read and `store*` write 16 elements from the pointer on (`load_bytes` 64, `dot*` 4 bytes of `a`).
pub(crate) trait Simd: Copy {
    /// 16 f32
    type V: Copy;
    /// 64 u8
    type W: Copy;
    /// 16 columns' dots of one group, weights up to 15
    type Dot4: Copy;
    /// 16 columns' dots of one group, weights up to 255
    type Dot8: Copy;

    /// Panels of a packed product's tile.
    const TILE_PANELS: usize;

    /// Most rows of a packed product's tile: as many as the registers hold both kinds of sums of.
    const TILE_ROWS: usize = 4;

    /// Whether larger tiles are worth their compile time: they are not where nothing is fast.
    const TILES: bool = true;

    fn splat(self, x: f32) -> Self::V;
    unsafe fn load(self, from: *const f32) -> Self::V;
    unsafe fn store(self, to: *mut f32, v: Self::V);
    unsafe fn load_f16(self, from: *const u16) -> Self::V;
    unsafe fn load_bf16(self, from: *const u16) -> Self::V;
    unsafe fn load_i8(self, from: *const i8) -> Self::V;
    /// Rounds to nearest, ties to even.
    unsafe fn store_bf16(self, to: *mut u16, v: Self::V);
    /// Rounds to nearest, ties to even.
    unsafe fn store_f16(self, to: *mut u16, v: Self::V);
    /// Rounds to nearest, ties to even; returns the sum of the integers. Lanes must be within -127..=127.
    unsafe fn store_i8(self, to: *mut i8, v: Self::V) -> i32;

    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// a * b + c
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// a if a > b, else b (so b where either is NaN)
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// a if a < b, else b (so b where either is NaN)
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// x where a < b, else y
    fn where_less(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// To an integer, ties to even; |v| < 2^22.
    fn round(self, v: Self::V) -> Self::V;
    /// 2^v of integers in -126..=127
    fn exp2_int(self, v: Self::V) -> Self::V;
    /// Halves added to each other: 16 -> 8 -> 4 -> 2 -> 1.
    fn sum(self, v: Self::V) -> f32;
    fn first(self, v: Self::V) -> f32;

    unsafe fn load_bytes(self, from: *const u8) -> Self::W;
    fn low_nibbles(self, w: Self::W) -> Self::W;
    fn high_nibbles(self, w: Self::W) -> Self::W;

    fn dot4_zero(self) -> Self::Dot4;
    /// Adds each lane's four weights (up to 15) times the four int8 at `a`; at most 8 times from zero.
    unsafe fn dot4(self, acc: Self::Dot4, w: Self::W, a: *const i8) -> Self::Dot4;
    fn dot4_f32(self, acc: Self::Dot4) -> Self::V;
    fn dot8_zero(self) -> Self::Dot8;
    /// Adds each lane's four weights times the four int8 at `a`; at most 8 times from zero.
    unsafe fn dot8(self, acc: Self::Dot8, w: Self::W, a: *const i8) -> Self::Dot8;
    fn dot8_f32(self, acc: Self::Dot8) -> Self::V;

    /// Asks for the cache line at `at`, which need not exist, in the second-level cache.
    fn prefetch(self, at: *const u8);

    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    #[inline(always)]
    fn abs(self, v: Self::V) -> Self::V {
        self.max(self.sub(self.zero(), v), v)
    }

    /// The largest lane.
    #[inline(always)]
    fn largest(self, v: Self::V) -> f32 {
        let mut lanes = [0f32; LANES];
        // SAFETY: 16 lanes.
        unsafe { self.store(lanes.as_mut_ptr(), v) };
        let mut largest = lanes[0];
        let mut i = 1;
        while i < LANES {
            largest = if largest > lanes[i] { largest } else { lanes[i] };
            i += 1;
        }
        largest
    }

    /// e^x to about 2 units in the last place; 0 under -80, e^88 over 88. (Cody-Waite reduction and the
    /// polynomial of Moshier's Cephes `expf`.)
    #[inline(always)]
    fn exp(self, x: Self::V) -> Self::V {
        let floor = self.splat(-80.0);
        let bounded = self.min(self.splat(88.0), self.max(floor, x));
        let n = self.round(self.mul(bounded, self.splat(std::f32::consts::LOG2_E)));
        let r = self.fma(n, self.splat(-0.693_359_4), bounded);
        let r = self.fma(n, self.splat(2.121_944_4e-4), r);
        let mut p = self.splat(1.987_569_1e-4);
        p = self.fma(p, r, self.splat(1.398_199_9e-3));
        p = self.fma(p, r, self.splat(8.333_452e-3));
        p = self.fma(p, r, self.splat(4.166_579_6e-2));
        p = self.fma(p, r, self.splat(1.666_666_5e-1));
        p = self.fma(p, r, self.splat(0.5));
        let y = self.fma(p, self.mul(r, r), self.add(r, self.splat(1.0)));
        self.where_less(x, floor, self.zero(), self.mul(y, self.exp2_int(n)))
    }

    /// tanh x to a few units in the last place: near zero the polynomial of Moshier's Cephes `tanhf`, else
    /// 1 - 2 / (e^(2 x) + 1).
    #[inline(always)]
    fn tanh(self, x: Self::V) -> Self::V {
        let square = self.mul(x, x);
        let mut p = self.splat(-5.704_988_7e-3);
        p = self.fma(p, square, self.splat(2.063_909e-2));
        p = self.fma(p, square, self.splat(-5.373_971_6e-2));
        p = self.fma(p, square, self.splat(1.333_144_2e-1));
        p = self.fma(p, square, self.splat(-3.333_328e-1));
        let near = self.fma(self.mul(p, square), x, x);
        let below = self.add(self.exp(self.add(x, x)), self.splat(1.0));
        let far = self.sub(self.splat(1.0), self.div(self.splat(2.0), below));
        self.where_less(self.abs(x), self.splat(0.625), near, far)
    }
}

/// How many of `len` elements fill whole vectors, and the rest.
#[inline(always)]
pub(crate) fn split(len: usize) -> (usize, usize) {
    (len / LANES * LANES, len % LANES)
}

/// The first `len` < 16 elements at `from`, then zeros.
///
/// # Safety
/// `len` elements can be read.
#[inline(always)]
pub(crate) unsafe fn load_part<S: Simd>(s: S, from: *const f32, len: usize) -> S::V {
    let mut lanes = [0f32; LANES];
    // SAFETY: by the caller's promise, and len < 16; then the local array's 16 lanes.
    unsafe {
        std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), len);
        s.load(lanes.as_ptr())
    }
}

/// The first `len` < 16 lanes to `to`.
///
/// # Safety
/// `len` elements can be written.
#[inline(always)]
pub(crate) unsafe fn store_part<S: Simd>(s: S, to: *mut f32, len: usize, v: S::V) {
    let mut lanes = [0f32; LANES];
    // SAFETY: the local array's 16 lanes; then by the caller's promise, and len < 16.
    unsafe {
        s.store(lanes.as_mut_ptr(), v);
        std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, len);
    }
}
