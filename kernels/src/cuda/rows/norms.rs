//! Norms of rows.

use super::{Rows, count};
use crate::cuda::gpu::{Shape, arguments};
use crate::cuda::{Buffer, DeviceRows, Dtype, Gpu, GpuError};

/// What a norm does with a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// x / sqrt(mean(x^2) + eps) * weight
    Rms,
    /// (x - mean) / sqrt(variance + eps) * weight + bias
    Layer,
}

/// A norm whose weights are on a device.
#[derive(Clone, Copy)]
pub struct DeviceNorm<'a> {
    pub kind: NormKind,
    /// (width) f32
    pub weight: &'a Buffer,
    /// (width) f32, of a layer norm only.
    pub bias: Option<&'a Buffer>,
    pub width: usize,
    pub eps: f32,
}

/// As the kernels take it.
#[repr(C)]
struct Norm {
    weight: u64,
    bias: u64,
    eps: f32,
    width: u32,
}

impl Norm {
    fn of(norm: &DeviceNorm<'_>) -> Self {
        let holds = |what: &str, buffer: &Buffer| {
            assert!(
                norm.width > 0 && buffer.bytes() >= norm.width * 4,
                "norm: the {what} is not ({})",
                norm.width
            );
        };
        holds("weight", norm.weight);
        norm.bias.iter().for_each(|bias| holds("bias", bias));
        assert!(norm.bias.is_none() || norm.kind == NormKind::Layer, "norm: an RMS norm has no bias");
        Self {
            weight: norm.weight.address(),
            bias: norm.bias.map_or(0, Buffer::address),
            eps: norm.eps,
            width: count("norm", norm.width),
        }
    }
}

/// Threads for a row. They decide the order of a row's sums, so they depend on nothing but the width.
fn row_threads(width: usize) -> u32 {
    match width {
        0..=256 => 32,
        257..=2048 => 128,
        2049..=8192 => 512,
        _ => 1024,
    }
}

fn norm_shape(rows: usize, width: usize) -> Shape {
    let threads = row_threads(width);
    let together: u32 = if threads == 32 { 4 } else { 1 };
    let blocks = count("norm", rows.div_ceil(together as usize));
    Shape { grid: [blocks, 1, 1], block: [threads, together, 1], shared: 0 }
}

impl Gpu {
    /// out (rows, width) = the norm of x (rows, width), f32.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When shapes or types do not fit.
    pub fn norm(
        &self,
        norm: &DeviceNorm<'_>,
        x: DeviceRows<'_>,
        rows: usize,
        out: DeviceRows<'_>,
    ) -> Result<(), GpuError> {
        check_residual(norm, x, rows);
        out.check("norm: out", rows, norm.width);
        let kernels = &self.kernels().rows;
        let kernels = if norm.kind == NormKind::Rms { &kernels.rms_norm } else { &kernels.layer_norm };
        let (of, count, from, to) = (Norm::of(norm), rows as u64, Rows::of(x), Rows::of(out));
        let shape = norm_shape(rows, norm.width);
        // SAFETY: these are the kernel's arguments; all rows are inside their buffers.
        unsafe { self.launch(kernels[out.dtype as usize], shape, &mut arguments![of, count, from, to]) }
    }

    /// residual (rows, width) f32 += delta, then out = the norm of residual. `delta` and `out` have one type.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When shapes or types do not fit.
    pub fn add_norm(
        &self,
        norm: &DeviceNorm<'_>,
        residual: DeviceRows<'_>,
        delta: DeviceRows<'_>,
        rows: usize,
        out: DeviceRows<'_>,
    ) -> Result<(), GpuError> {
        check_residual(norm, residual, rows);
        delta.check("norm: delta", rows, norm.width);
        out.check("norm: out", rows, norm.width);
        assert_eq!(delta.dtype, out.dtype, "norm: delta and out have different types");
        let kernels = &self.kernels().rows;
        let kernels =
            if norm.kind == NormKind::Rms { &kernels.add_rms_norm } else { &kernels.add_layer_norm };
        let (of, count) = (Norm::of(norm), rows as u64);
        let (residual, delta, to) = (Rows::of(residual), Rows::of(delta), Rows::of(out));
        let shape = norm_shape(rows, norm.width);
        let mut arguments = arguments![of, count, residual, delta, to];
        // SAFETY: these are the kernel's arguments; all rows are inside their buffers.
        unsafe { self.launch(kernels[out.dtype as usize], shape, &mut arguments) }
    }

    /// Norms in place the first `heads` heads (`norm.width` each) of every row of x (q/k norm). One head: the
    /// row itself. RMS norms only.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When shapes do not fit, or it is a layer norm.
    pub fn norm_heads(
        &self,
        norm: &DeviceNorm<'_>,
        x: DeviceRows<'_>,
        rows: usize,
        heads: usize,
    ) -> Result<(), GpuError> {
        assert_eq!(norm.kind, NormKind::Rms, "a layer norm in place; this is a bug");
        x.check("head norm", rows, heads * norm.width);
        let of = Norm::of(norm);
        let (many, each, to) = (rows as u64, count("head norm", heads), Rows::of(x));
        let shape = norm_shape(rows * heads, norm.width);
        let kernel = self.kernels().rows.norm_heads[x.dtype as usize];
        // SAFETY: these are the kernel's arguments; all heads are inside the buffer.
        unsafe { self.launch(kernel, shape, &mut arguments![of, many, each, to]) }
    }
}

fn check_residual(norm: &DeviceNorm<'_>, x: DeviceRows<'_>, rows: usize) {
    assert_eq!(x.dtype, Dtype::F32, "norm: the residual is f32");
    x.check("norm: the residual", rows, norm.width);
}
