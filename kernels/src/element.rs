//! Element types of dense weights and of the KV cache: widened to f32 in registers, rounded when written.
//!
//! A kernel that is generic over [`Element`] is compiled for each; which one is chosen outside its loops.

use crate::simd::Simd;

pub(crate) trait Element: Copy {
    type Item: Copy + Default + Send + Sync;
    /// Whether the numbers are to be multiplied by a scale that is kept beside them.
    const SCALED: bool = false;
    /// Whether attention gets tiles of every height; else of one query and of four, which compile sooner.
    const EVERY_TILE: bool = false;

    /// # Safety
    /// 16 elements can be read.
    unsafe fn load<S: Simd>(self, s: S, from: *const Self::Item) -> S::V;

    /// Rounds to nearest, ties to even.
    ///
    /// # Safety
    /// 16 elements can be written.
    unsafe fn store<S: Simd>(self, s: S, to: *mut Self::Item, v: S::V);
}

#[derive(Clone, Copy)]
pub(crate) struct Single;
#[derive(Clone, Copy)]
pub(crate) struct Half;
#[derive(Clone, Copy)]
pub(crate) struct Brain;
/// Integers in -127..=127
#[derive(Clone, Copy)]
pub(crate) struct Byte;

macro_rules! element {
    ($name:ident, $item:ty, $scaled:expr, $every:expr, $load:ident, $store:ident) => {
        impl Element for $name {
            type Item = $item;
            const SCALED: bool = $scaled;
            const EVERY_TILE: bool = $every;

            #[inline(always)]
            unsafe fn load<S: Simd>(self, s: S, from: *const $item) -> S::V {
                // SAFETY: the caller's promise.
                unsafe { s.$load(from) }
            }

            #[inline(always)]
            unsafe fn store<S: Simd>(self, s: S, to: *mut $item, v: S::V) {
                // SAFETY: the caller's promise.
                unsafe {
                    s.$store(to, v);
                }
            }
        }
    };
}

element!(Single, f32, false, false, load, store);
element!(Half, u16, false, true, load_f16, store_f16);
element!(Brain, u16, false, false, load_bf16, store_bf16);
element!(Byte, i8, true, false, load_i8, store_i8);
