//! Rotating q and k, and writing K and V into the cache, rounded to its type.

use crate::attention::Span;
use crate::cpu::SharedMut;
use crate::element::{Brain, Byte, Element, Half, Single};
use crate::kv::{KvData, Parts};
use crate::rows::rotate;
use crate::simd::{Kernel, LANES, Simd, load_part, split};
use crate::{KvLayer, KvShape, Place, RopeStyle, RopeTable};

/// A layer that several tasks write, each another kv head.
pub(crate) struct SharedLayer<'a> {
    shape: KvShape,
    data: SharedData<'a>,
}

enum SharedData<'a> {
    Half(SharedParts<'a, u16>),
    Brain(SharedParts<'a, u16>),
    Single(SharedParts<'a, f32>),
    Byte(SharedParts<'a, i8>),
}

struct SharedParts<'a, T> {
    k: SharedMut<'a, T>,
    v: SharedMut<'a, T>,
    k_scales: SharedMut<'a, f32>,
    v_scales: SharedMut<'a, f32>,
}

impl<'a> SharedLayer<'a> {
    pub(crate) fn new(layer: &'a mut KvLayer) -> Self {
        let shape = layer.shape();
        let data = match &mut layer.data {
            KvData::Half(parts) => SharedData::Half(SharedParts::new(parts)),
            KvData::Brain(parts) => SharedData::Brain(SharedParts::new(parts)),
            KvData::Single(parts) => SharedData::Single(SharedParts::new(parts)),
            KvData::Byte(parts) => SharedData::Byte(SharedParts::new(parts)),
        };
        Self { shape, data }
    }
}

impl<'a, T> SharedParts<'a, T> {
    fn new(parts: &'a mut Parts<T>) -> Self {
        Self {
            k: SharedMut::new(&mut parts.k),
            v: SharedMut::new(&mut parts.v),
            k_scales: SharedMut::new(&mut parts.k_scales),
            v_scales: SharedMut::new(&mut parts.v_scales),
        }
    }
}

/// A rotation's angles and pairs.
pub(crate) type Turn<'a> = Option<(&'a RopeTable, RopeStyle)>;

/// One kv head of all spans' rows: k is rotated where it lies, then both are written.
pub(crate) struct WriteHead<'a> {
    pub(crate) layer: &'a SharedLayer<'a>,
    pub(crate) kv_head: usize,
    /// Holds k and v; of them this task has its kv head's.
    pub(crate) data: &'a SharedMut<'a, f32>,
    pub(crate) k: Place,
    pub(crate) v: Place,
    pub(crate) turn: Turn<'a>,
    pub(crate) spans: &'a [Span],
    pub(crate) positions: &'a [u32],
    pub(crate) block_tables: &'a [u32],
}

impl Kernel for WriteHead<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match &self.layer.data {
            SharedData::Half(parts) => write(s, Half, parts, &self),
            SharedData::Brain(parts) => write(s, Brain, parts, &self),
            SharedData::Single(parts) => write(s, Single, parts, &self),
            SharedData::Byte(parts) => write(s, Byte, parts, &self),
        }
    }
}

/// Elements of K that are rounded before they are strewn over a strip.
const PIECE: usize = 512;

#[inline(always)]
fn write<S: Simd, E: Element>(s: S, element: E, parts: &SharedParts<'_, E::Item>, head: &WriteHead<'_>) {
    let shape = head.layer.shape;
    let at = |place: Place, row: usize| place.start + row * place.stride + head.kv_head * shape.head_dim;
    let mut rounded = [E::Item::default(); PIECE];
    for span in head.spans {
        for row in span.rows.clone() {
            let position = head.positions[row] as usize;
            let block = head.block_tables[span.table.start + position / shape.block_size] as usize;
            let slot = position % shape.block_size;
            // SAFETY: only this task has this kv head of k and v.
            let (k, v) = unsafe {
                (
                    head.data.slice(at(head.k, row), shape.head_dim),
                    &*head.data.slice(at(head.v, row), shape.head_dim),
                )
            };
            if let Some((table, style)) = head.turn {
                rotate(k, shape.head_dim, table.row(row), style);
            }
            let k = &*k;
            let k_start = shape.k_start(block, head.kv_head);
            let v_start = shape.v_start(block, head.kv_head) + slot * shape.v_dim();
            // SAFETY: only this task has this kv head, and it takes one piece of each at a time.
            let (to_k, to_v) = unsafe {
                (
                    parts.k.slice(k_start, shape.block_size * shape.head_dim),
                    parts.v.slice(v_start, shape.head_dim),
                )
            };
            let (mut k_inverse, mut v_inverse) = (1.0, 1.0);
            if E::SCALED {
                let at = shape.scale_start(block, head.kv_head) + slot;
                // SAFETY: as above.
                let (k_scale, v_scale) =
                    unsafe { (&mut parts.k_scales.slice(at, 1)[0], &mut parts.v_scales.slice(at, 1)[0]) };
                (*k_scale, k_inverse) = scale(s, k);
                (*v_scale, v_inverse) = scale(s, v);
            }
            round(s, element, v, v_inverse, to_v);
            for (start, k) in (0..).step_by(PIECE).zip(k.chunks(PIECE)) {
                let rounded = &mut rounded[..k.len()];
                round(s, element, k, k_inverse, rounded);
                for (d, item) in (start..).zip(rounded) {
                    to_k[shape.k_offset(slot, d)] = *item;
                }
            }
        }
    }
}

/// amax / 127 and its inverse, both zero where the inverse would overflow.
#[inline(always)]
fn scale<S: Simd>(s: S, x: &[f32]) -> (f32, f32) {
    let (full, rest) = split(x.len());
    let mut amax = s.zero();
    // SAFETY: `x` has full + rest elements.
    unsafe {
        let mut i = 0;
        while i < full {
            amax = s.max(amax, s.abs(s.load(x.as_ptr().add(i))));
            i += LANES;
        }
        if rest > 0 {
            amax = s.max(amax, s.abs(load_part(s, x.as_ptr().add(full), rest)));
        }
    }
    let amax = s.largest(amax);
    if amax < f32::MIN_POSITIVE * 128.0 { (0.0, 0.0) } else { (amax / 127.0, 127.0 / amax) }
}

/// to = from * factor, rounded; the factor is one for a type without scales.
#[inline(always)]
fn round<S: Simd, E: Element>(s: S, element: E, from: &[f32], factor: f32, to: &mut [E::Item]) {
    assert_eq!(from.len(), to.len(), "lengths differ; this is a bug");
    let (full, rest) = split(from.len());
    let factor = s.splat(factor);
    // SAFETY: both slices have the same length, full + rest.
    unsafe {
        let mut i = 0;
        while i < full {
            let x = s.load(from.as_ptr().add(i));
            let x = if E::SCALED { s.mul(x, factor) } else { x };
            element.store(s, to.as_mut_ptr().add(i), x);
            i += LANES;
        }
        if rest > 0 {
            let mut items = [E::Item::default(); LANES];
            let x = load_part(s, from.as_ptr().add(full), rest);
            let x = if E::SCALED { s.mul(x, factor) } else { x };
            element.store(s, items.as_mut_ptr(), x);
            to[full..].copy_from_slice(&items[..rest]);
        }
    }
}
