//! Rows in a device's memory at places that are not those of a matrix.

use crate::device::{download, upload};
use obol_kernels::cuda::{Buffer, DeviceRows, Dtype, Gpu};

/// Rows of `width` in memory where every other element is `FILL`.
pub(crate) struct Scattered {
    pub(crate) buffer: Buffer,
    dtype: Dtype,
    start: usize,
    stride: usize,
    width: usize,
    rows: usize,
}

/// Exact in every type.
const FILL: f32 = 77.0;

impl Scattered {
    /// `x` (rows, width) from element `start` on, at a distance of `stride`.
    pub(crate) fn new(gpu: &Gpu, x: &[f32], width: usize, dtype: Dtype, start: usize, stride: usize) -> Self {
        let rows = x.len() / width;
        let mut all = vec![FILL; start + rows * stride + 3];
        for (row, x) in x.chunks_exact(width).enumerate() {
            all[start + row * stride..][..width].copy_from_slice(x);
        }
        Self { buffer: upload(gpu, &all, dtype), dtype, start, stride, width, rows }
    }

    pub(crate) fn dense(gpu: &Gpu, x: &[f32], width: usize, dtype: Dtype) -> Self {
        Self::new(gpu, x, width, dtype, 0, width)
    }

    /// Room for results, NaN at first.
    pub(crate) fn room(
        gpu: &Gpu,
        rows: usize,
        width: usize,
        dtype: Dtype,
        start: usize,
        stride: usize,
    ) -> Self {
        Self::new(gpu, &vec![f32::NAN; rows * width], width, dtype, start, stride)
    }

    pub(crate) fn rows(&self) -> DeviceRows<'_> {
        DeviceRows { buffer: &self.buffer, dtype: self.dtype, start: self.start, stride: self.stride }
    }

    /// The rows; what lies between them must be as it was.
    pub(crate) fn read(&self, gpu: &Gpu) -> Vec<f32> {
        let all = download(gpu, &self.buffer, self.dtype);
        let mut out = Vec::new();
        for (i, x) in all.iter().enumerate() {
            let at = i.wrapping_sub(self.start);
            if i >= self.start && at / self.stride < self.rows && at % self.stride < self.width {
                out.push(*x);
            } else {
                assert_eq!(*x, FILL, "element {i} is outside the rows");
            }
        }
        out
    }
}
