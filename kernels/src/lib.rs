//! Operations on tensors behind safe functions, with run-time dispatch.
//!
//! One safe function (a method of [`Cpu`]) per operation; shapes are checked there and nowhere else.
//! Tensors are plain row-major `f32` slices. This crate knows tensors only: no request, file format or
//! price, reads no environment, and no clock but to measure the machine itself in [`peak`].
//!
//! Invariant, for each [`Isa`]: a row of a result depends, bit for bit, only on that row of the input (and for
//! attention on its sequence's KV), never on the other rows, the tile it falls in, the number of threads or
//! the order in which tasks run.

mod act;
mod activations;
mod attention;
mod attention_kernel;
mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod dense;
mod dense_product;
mod element;
mod isa;
mod kv;
mod kv_dtype;
mod kv_write;
mod memory;
mod packed;
mod packed_product;
pub mod peak;
mod pool;
mod quantize_weights;
pub mod reference;
mod rope;
mod row_draw;
mod row_ops;
mod rows;
mod simd;
mod super_scales;

pub use act::Act;
pub use activations::Activations;
pub use attention::{Attention, Span};
pub use cpu::Cpu;
pub use dense::{Dense, DenseData};
pub use isa::Isa;
pub use kv::{KvLayer, KvShape, OutOfMemory};
pub use kv_dtype::KvDtype;
pub use packed::{Bits, Fill, GROUP, Group, Packed, ScaleKind};
pub use pool::Pool;
pub use rope::{RopeScaling, RopeStyle, RopeTable};
pub use row_draw::RowDraw;
pub use super_scales::{FillSuper, SUPER_BLOCK, SuperBlock, SuperKind};

/// Rows of equal length at a fixed distance in a larger slice: row `i` starts at `data[i * stride]`.
///
/// So q, k and v can be read where one fused product wrote them.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    pub data: &'a [f32],
    pub stride: usize,
}

/// Rows at a fixed distance in a slice that is named elsewhere: row `i` starts at `start + i * stride`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub start: usize,
    pub stride: usize,
}

impl Place {
    fn check(&self, what: &str, rows: usize, width: usize, data: &[f32]) {
        let data = data.get(self.start..).unwrap_or_else(|| panic!("{what}: starts at {}", self.start));
        Rows::new(data, self.stride).check(what, rows, width);
    }

    /// Whether `rows` rows of `width` here and of `other_width` at `other` share no element: side by side in the
    /// same rows, or one after the other.
    fn is_apart(&self, rows: usize, width: usize, other: Self, other_width: usize) -> bool {
        let (first, first_width, second, second_width) = match self.start <= other.start {
            true => (*self, width, other, other_width),
            false => (other, other_width, *self, width),
        };
        let distance = second.start - first.start;
        let beside = first.stride == second.stride
            && distance >= first_width
            && distance + second_width <= first.stride;
        rows == 0 || beside || distance >= (rows - 1) * first.stride + first_width
    }
}

/// Queries, keys and values of a batch's rows, each (heads, head_dim), where products wrote them in one slice.
#[derive(Debug)]
pub struct Qkv<'a> {
    pub data: &'a mut [f32],
    /// Query heads.
    pub heads: usize,
    pub q: Place,
    pub k: Place,
    pub v: Place,
}

impl<'a> Rows<'a> {
    pub fn new(data: &'a [f32], stride: usize) -> Self {
        Self { data, stride }
    }

    fn check(&self, what: &str, rows: usize, width: usize) {
        assert!(self.stride >= width, "{what}: stride {} is less than a row's width {width}", self.stride);
        let need = if rows == 0 { 0 } else { (rows - 1) * self.stride + width };
        assert!(self.data.len() >= need, "{what}: {} values, need {need}", self.data.len());
    }

    fn row(&self, i: usize, width: usize) -> &'a [f32] {
        &self.data[i * self.stride..][..width]
    }
}
