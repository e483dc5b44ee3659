//! Weights that are not quantised, on a device, and their products. Layouts are described in dense.cu.

use half::{bf16, f16};

use super::super::gpu::{Shape, arguments};
use super::super::{Buffer, DeviceRows, Dtype, Gpu, GpuError};
use super::{Many, Out, PANEL, SLICE_BLOCK, Slices, TILE, Terms, WARP, number};
use crate::{Dense, DenseData};

/// Elements along k of a block of 16-bit weights.
const BLOCK: usize = 32;

/// Bytes of a panel's block.
const BLOCK_BYTES: usize = PANEL * BLOCK * 2;

/// Rows of a panel that lanes number; the others are 8 further on.
const HALF: usize = PANEL / 2;

const MANY: Many = Many { rows: 128, panels: 8 };

/// Warps of a block of the f32 product, one an output.
const WARPS: usize = 8;

/// A dense weight matrix (n, k) on a device, or one of each expert.
pub struct DeviceDense {
    pub(super) matrices: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) dtype: Dtype,
    pub(super) data: Buffer,
}

impl DeviceDense {
    /// Output features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features.
    pub fn k(&self) -> usize {
        self.k
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Bytes held on the device.
    pub fn bytes(&self) -> usize {
        self.data.bytes()
    }
}

/// As in dense.cu.
#[repr(C)]
struct DenseArguments {
    weights: u64,
    x: u64,
    x_stride: u64,
    bias: u64,
    ends: u64,
    y: Out,
    n: u32,
    k: u32,
    slice_blocks: u32,
    rows: u32,
}

impl Gpu {
    /// Copies a matrix to the device as `dtype`, rounding to it where the host's numbers have another type, in the
    /// order in which its kernels read it.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`], or when the copy fails.
    pub fn upload_dense(&self, w: &Dense, dtype: Dtype) -> Result<DeviceDense, GpuError> {
        self.upload_dense_experts(&[w], dtype)
    }

    /// As [`Gpu::upload_dense`], of all experts' matrices, which [`Gpu::matmul_dense_experts`] multiplies at once.
    ///
    /// # Errors
    /// As [`Gpu::upload_dense`].
    ///
    /// # Panics
    /// When there is no matrix, or they differ in shape.
    pub fn upload_dense_experts(&self, matrices: &[&Dense], dtype: Dtype) -> Result<DeviceDense, GpuError> {
        let first = matrices.first().expect("upload: no matrix");
        let (n, k) = (first.n(), first.k());
        let mut data = None;
        for (i, w) in matrices.iter().enumerate() {
            assert!(
                (w.n(), w.k()) == (n, k),
                "upload: matrix {i} is ({}, {}), the first ({n}, {k})",
                w.n(),
                w.k()
            );
            let bytes = bytes_of(w, dtype);
            if data.is_none() {
                data = Some(self.allocate(matrices.len() * bytes.len())?);
            }
            if let Some(data) = &data {
                self.write(data, i * bytes.len(), &bytes)?;
            }
        }
        let data = data.expect("there is a matrix");
        Ok(DeviceDense { matrices: matrices.len(), n, k, dtype, data })
    }

    /// y (rows, n) = x (rows, k) * w^T + bias (n f32). `x` has the type of `w`; f32 sums, rounded to `y`'s type.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When shapes or types do not fit together, or, with 16-bit types, rows of `x` do not start at multiples of 16
    /// bytes or `k` is no multiple of 8.
    pub fn matmul_dense(
        &self,
        x: DeviceRows<'_>,
        rows: usize,
        w: &DeviceDense,
        bias: Option<&Buffer>,
        y: DeviceRows<'_>,
    ) -> Result<(), GpuError> {
        self.multiply_dense(x, w, Terms { rows, bias, ends: None }, y)
    }

    /// As [`Gpu::matmul_dense`], of rows that are sorted by experts: those of expert `e` end before row `ends[e]`
    /// (u32, ascending, at most `rows`) and are multiplied by its matrix; `bias` is (experts, n). Rows that no
    /// expert has are left as they are.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// As [`Gpu::matmul_dense`].
    pub fn matmul_dense_experts(
        &self,
        x: DeviceRows<'_>,
        rows: usize,
        ends: &Buffer,
        w: &DeviceDense,
        bias: Option<&Buffer>,
        y: DeviceRows<'_>,
    ) -> Result<(), GpuError> {
        self.multiply_dense(x, w, Terms { rows, bias, ends: Some(ends) }, y)
    }

    fn multiply_dense(
        &self,
        x: DeviceRows<'_>,
        w: &DeviceDense,
        terms: Terms<'_>,
        y: DeviceRows<'_>,
    ) -> Result<(), GpuError> {
        let Terms { rows, bias, ends } = terms;
        assert!(x.dtype == w.dtype, "dense product: x is {:?}, the weights are {:?}", x.dtype, w.dtype);
        x.check("dense product x", rows, w.k);
        y.check("dense product y", rows, w.n);
        terms.check("dense product", w.matrices, w.n);
        if w.dtype != Dtype::F32 {
            let aligned = [x.start, x.stride, w.k].iter().all(|at| at.is_multiple_of(8));
            assert!(
                aligned,
                "dense product: rows of {} from {} at a distance of {}; all must be multiples of 8",
                w.k, x.start, x.stride
            );
        }
        let slices = Slices::of(w.k);
        let products = &self.kernels().products;
        let (kernel, shape) = match w.dtype {
            Dtype::F16 => products.dense_f16.choose(rows, w.n, slices, w.matrices, MANY),
            Dtype::Bf16 => products.dense_bf16.choose(rows, w.n, slices, w.matrices, MANY),
            Dtype::F32 => {
                let grid = [number(w.n.div_ceil(WARPS)), number(rows.div_ceil(TILE)), number(w.matrices)];
                (products.dense_f32, Shape::new(grid, WARPS as u32 * WARP))
            }
        };
        let arguments = DenseArguments {
            weights: w.data.address(),
            x: x.address(),
            x_stride: x.stride as u64,
            bias: bias.map_or(0, Buffer::address),
            ends: ends.map_or(0, Buffer::address),
            y: Out::of(y),
            n: number(w.n),
            k: number(w.k),
            slice_blocks: number(slices.blocks * SLICE_BLOCK / BLOCK),
            rows: number(rows),
        };
        // SAFETY: the arguments are the kernel's; all it reads and writes was checked above.
        unsafe { self.launch(kernel, shape, &mut arguments![arguments]) }
    }
}

/// The matrix as its kernels read it.
fn bytes_of(w: &Dense, dtype: Dtype) -> Vec<u8> {
    let (half, brain) = (|x: f32| f16::from_f32(x).to_bits(), |x: f32| bf16::from_f32(x).to_bits());
    match (dtype, w.data()) {
        (Dtype::F32, _) => single_bytes(w),
        (Dtype::F16, DenseData::F32(v)) => repack(v, w.k(), |x| half(*x)),
        (Dtype::F16, DenseData::F16(v)) => repack(v, w.k(), |x| x.to_bits()),
        (Dtype::F16, DenseData::Bf16(v)) => repack(v, w.k(), |x| half(x.to_f32())),
        (Dtype::Bf16, DenseData::F32(v)) => repack(v, w.k(), |x| brain(*x)),
        (Dtype::Bf16, DenseData::F16(v)) => repack(v, w.k(), |x| brain(x.to_f32())),
        (Dtype::Bf16, DenseData::Bf16(v)) => repack(v, w.k(), |x| x.to_bits()),
    }
}

/// The matrix as it is, in f32.
fn single_bytes(w: &Dense) -> Vec<u8> {
    let mut row = vec![0.0; w.k()];
    let mut out = Vec::with_capacity(w.n() * w.k() * size_of::<f32>());
    for r in 0..w.n() {
        w.dequantize_row(r, &mut row);
        row.iter().for_each(|x| out.extend(x.to_ne_bytes()));
    }
    out
}

/// Rows of `k` in lane order, as 16 bits each.
fn repack<T>(values: &[T], k: usize, bits: impl Fn(&T) -> u16) -> Vec<u8> {
    let blocks = k.div_ceil(BLOCK);
    let mut out = vec![0; (values.len() / k).div_ceil(PANEL) * PANEL * blocks * BLOCK * 2];
    for (row, values) in values.chunks_exact(k).enumerate() {
        let (panel, g, high) = (row / PANEL, row % HALF, row % PANEL / HALF);
        for (block, values) in values.chunks(BLOCK).enumerate() {
            let to = &mut out[(panel * blocks + block) * BLOCK_BYTES..][..BLOCK_BYTES];
            // Four at a time are two words of a lane's piece.
            for (i, four) in values.chunks(4).enumerate() {
                let start = i % 2 * BLOCK_BYTES / 2 + (g * 4 + i / 2) * 16 + high * 4;
                for (at, value) in four.iter().enumerate() {
                    to[start + at / 2 * 8 + at % 2 * 2..][..2].copy_from_slice(&bits(value).to_ne_bytes());
                }
            }
        }
    }
    out
}
