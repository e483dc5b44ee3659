//! Products with weights, and what they read: quantised activations, embeddings.
//!
//! y = x * w^T + bias, for any number of rows. The kernels have a variant for up to 8 rows, one for up to 32 and
//! one for more; all add up a row's products in the same order, which k alone decides.

mod activations;
mod dense;
mod embed;
mod packed;

pub use activations::{DeviceActivations, HostActivations};
pub use dense::DeviceDense;
pub use embed::{DevicePick, DeviceTable};
pub use packed::{DevicePacked, packed_alike};

use super::gpu::{Kernel, Modules, Shape};
use super::{Buffer, DeviceRows, Dtype, GpuError};

/// Weights' rows of a tensor-core operation, and its rows of activations.
const PANEL: usize = 16;
const TILE: usize = 8;

/// Elements along k of the blocks that slices consist of, and the most slices.
const SLICE_BLOCK: usize = 256;
const SLICES_MAX: usize = 8;

const WARP: u32 = 32;

pub(crate) struct ProductKernels {
    /// By bits and kind of scales.
    packed: [[Variants; 6]; 2],
    dense_f16: Variants,
    dense_bf16: Variants,
    dense_f32: Kernel,
    /// By the number of the rows' type.
    quantize: [Kernel; 3],
    embed: Kernel,
}

impl ProductKernels {
    pub(crate) fn load(modules: &Modules) -> Result<Self, GpuError> {
        let packed = |bits: u32| -> Result<[Variants; 6], GpuError> {
            let kind =
                |kind| Variants::load(modules, &format!("packed{bits}"), &format!("packed{bits}_{kind}"));
            Ok([
                kind("centred")?,
                kind("f16_min")?,
                kind("f32_min")?,
                kind("super_min")?,
                kind("super_halves")?,
                kind("super_halves_min")?,
            ])
        };
        let quantize = |dtype: Dtype| modules.kernel("quantize", &format!("quantize_{}", dtype.name()), 0);
        Ok(Self {
            packed: [packed(4)?, packed(8)?],
            dense_f16: Variants::load(modules, "dense", "dense_f16")?,
            dense_bf16: Variants::load(modules, "dense", "dense_bf16")?,
            dense_f32: modules.kernel("dense", "dense_f32", 0)?,
            quantize: [quantize(Dtype::F32)?, quantize(Dtype::F16)?, quantize(Dtype::Bf16)?],
            embed: modules.kernel("embed", "embed", 0)?,
        })
    }
}

/// One product's kernels, by the number of rows.
#[derive(Clone, Copy)]
struct Variants {
    to_8: Kernel,
    to_32: Kernel,
    many: Kernel,
}

/// Rows and panels of a block of the variant for many rows.
#[derive(Clone, Copy)]
struct Many {
    rows: usize,
    panels: usize,
}

impl Variants {
    fn load(modules: &Modules, module: &str, name: &str) -> Result<Self, GpuError> {
        let variant = |rows| modules.kernel(module, &format!("{name}_{rows}"), 0);
        Ok(Self { to_8: variant("8")?, to_32: variant("32")?, many: variant("many")? })
    }

    /// The kernel for `rows` rows, and its shape, for `n` outputs of each of `matrices` matrices, among which the
    /// rows are shared out.
    fn choose(&self, rows: usize, n: usize, slices: Slices, matrices: usize, many: Many) -> (Kernel, Shape) {
        let panels = n.div_ceil(PANEL);
        // A block of the first two has so many panels and tiles, and a warp for each slice.
        let few = |block_panels: usize, tiles: usize| {
            let grid = [number(panels.div_ceil(block_panels)), 1, number(matrices)];
            let part = tiles * TILE * (block_panels * PANEL + 4) * size_of::<f32>();
            let mut shape = Shape::new(grid, number(slices.count) * WARP);
            shape.shared = number(slices.count * part);
            shape
        };
        match rows.div_ceil(matrices) {
            0 => (self.to_8, Shape::new([0; 3], WARP)),
            1..=8 => (self.to_8, few(1, 1)),
            9..=32 => (self.to_32, few(2, 4)),
            _ => {
                // Any matrix may have all rows; they may begin inside a tile.
                let row_blocks = if matrices == 1 { rows } else { rows + TILE - 1 }.div_ceil(many.rows);
                let grid = [number(row_blocks), number(panels.div_ceil(many.panels)), number(matrices)];
                (self.many, Shape::new(grid, 256))
            }
        }
    }
}

/// How k is cut: into slices of whole blocks of 256. A slice's products are added up by themselves.
#[derive(Clone, Copy)]
struct Slices {
    count: usize,
    /// Blocks of 256 of each, the last perhaps less.
    blocks: usize,
}

impl Slices {
    fn of(k: usize) -> Self {
        let blocks = k.div_ceil(SLICE_BLOCK);
        let each = blocks.div_ceil(SLICES_MAX);
        Self { count: blocks.div_ceil(each), blocks: each }
    }
}

/// Rows of y, as `Out` in products.cuh.
#[repr(C)]
struct Out {
    start: u64,
    stride: u64,
    dtype: u32,
}

impl Out {
    fn of(y: DeviceRows<'_>) -> Self {
        Self { start: y.address(), stride: y.stride as u64, dtype: dtype_number(y.dtype) }
    }
}

/// As the kernels count them.
fn dtype_number(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::Bf16 => 2,
    }
}

fn number(size: usize) -> u32 {
    u32::try_from(size).expect("sizes of tensors fit 32 bits")
}

/// What a product is of, besides x, weights and y.
#[derive(Clone, Copy)]
struct Terms<'a> {
    rows: usize,
    /// (matrices, n) f32
    bias: Option<&'a Buffer>,
    /// Where each matrix's rows end, if there are several.
    ends: Option<&'a Buffer>,
}

impl Terms<'_> {
    fn check(&self, what: &str, matrices: usize, n: usize) {
        let Self { bias, ends, .. } = self;
        if let Some(bias) = bias {
            let (have, need) = (bias.bytes() / size_of::<f32>(), matrices * n);
            assert!(have >= need, "{what}: the bias has {have} values, need {need}");
        }
        match ends {
            None => assert!(matrices == 1, "{what}: the weights are of {matrices} experts"),
            Some(ends) => {
                let have = ends.bytes() / size_of::<u32>();
                assert!(have >= matrices, "{what}: {have} ends of rows, need {matrices}");
            }
        }
    }
}
