//! The device, and rows in its memory.

use half::{bf16, f16};
use obol_kernels::cuda::{Buffer, DeviceRows, Dtype, Gpu};
use std::sync::OnceLock;

pub(crate) fn gpu() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    let gpu =
        GPU.get_or_init(|| Gpu::open(0).unwrap_or_else(|error| panic!("these tests need a device: {error}")));
    gpu.bind().unwrap();
    gpu
}

pub(crate) fn bytes_of(x: &[f32], dtype: Dtype) -> Vec<u8> {
    let bytes = |x: &f32| match dtype {
        Dtype::F32 => x.to_ne_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(*x).to_ne_bytes().to_vec(),
        Dtype::Bf16 => bf16::from_f32(*x).to_ne_bytes().to_vec(),
    };
    x.iter().flat_map(bytes).collect()
}

/// What a number is after rounding to the type.
pub(crate) fn rounded(x: &[f32], dtype: Dtype) -> Vec<f32> {
    x.iter()
        .map(|x| match dtype {
            Dtype::F32 => *x,
            Dtype::F16 => f16::from_f32(*x).to_f32(),
            Dtype::Bf16 => bf16::from_f32(*x).to_f32(),
        })
        .collect()
}

pub(crate) fn upload(x: &[f32], dtype: Dtype) -> Buffer {
    gpu().upload(&bytes_of(x, dtype)).unwrap()
}

pub(crate) fn download(buffer: &Buffer, dtype: Dtype) -> Vec<f32> {
    let mut bytes = vec![0; buffer.bytes()];
    gpu().read(buffer, 0, &mut bytes).unwrap();
    bytes
        .chunks_exact(dtype.bytes())
        .map(|b| match dtype {
            Dtype::F32 => f32::from_ne_bytes(b.try_into().unwrap()),
            Dtype::F16 => f16::from_ne_bytes(b.try_into().unwrap()).to_f32(),
            Dtype::Bf16 => bf16::from_ne_bytes(b.try_into().unwrap()).to_f32(),
        })
        .collect()
}

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
    pub(crate) fn new(x: &[f32], width: usize, dtype: Dtype, start: usize, stride: usize) -> Self {
        let rows = x.len() / width;
        let mut all = vec![FILL; start + rows * stride + 3];
        for (row, x) in x.chunks_exact(width).enumerate() {
            all[start + row * stride..][..width].copy_from_slice(x);
        }
        Self { buffer: upload(&all, dtype), dtype, start, stride, width, rows }
    }

    pub(crate) fn dense(x: &[f32], width: usize, dtype: Dtype) -> Self {
        Self::new(x, width, dtype, 0, width)
    }

    /// Room for results, NaN at first.
    pub(crate) fn room(rows: usize, width: usize, dtype: Dtype, start: usize, stride: usize) -> Self {
        Self::new(&vec![f32::NAN; rows * width], width, dtype, start, stride)
    }

    pub(crate) fn rows(&self) -> DeviceRows<'_> {
        DeviceRows { buffer: &self.buffer, dtype: self.dtype, start: self.start, stride: self.stride }
    }

    /// The rows; what lies between them must be as it was.
    pub(crate) fn read(&self) -> Vec<f32> {
        let all = download(&self.buffer, self.dtype);
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
