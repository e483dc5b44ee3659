//! Operations on single rows and elements: norms, activations, sums, copies, feeding.

mod elements;
mod experts;
mod norms;

pub use elements::Feeds;
pub use experts::{DeviceRouting, ExpertChoice};
pub use norms::{DeviceNorm, NormKind};

use experts::ExpertKernels;

use super::gpu::{Kernel, Modules, Shape};
use super::{DeviceRows, Dtype, GpuError};
use crate::Act;

/// One kernel for each type of activations.
type EachDtype = [Kernel; 3];

pub(crate) struct RowKernels {
    rms_norm: EachDtype,
    layer_norm: EachDtype,
    add_rms_norm: EachDtype,
    add_layer_norm: EachDtype,
    norm_heads: EachDtype,
    /// By [`Act`].
    act_mul: [EachDtype; 3],
    act: [EachDtype; 3],
    add: EachDtype,
    scale: EachDtype,
    softcap: Kernel,
    /// Of elements of 2 and of 4 bytes.
    gather: [Kernel; 2],
    feed: Kernel,
    experts: ExpertKernels,
}

const ACTS: [(Act, &str); 3] = [(Act::Silu, "silu"), (Act::GeluTanh, "gelu_tanh"), (Act::Gelu, "gelu")];

impl RowKernels {
    pub(crate) fn load(modules: &Modules) -> Result<Self, GpuError> {
        let each = |module: &str, name: &str| each_dtype(modules, module, name);
        let acts = |suffix: &str| -> Result<[EachDtype; 3], GpuError> {
            let [silu, gelu_tanh, gelu] = ACTS.map(|(_, name)| each("act", &format!("{name}{suffix}")));
            Ok([silu?, gelu_tanh?, gelu?])
        };
        Ok(Self {
            rms_norm: each("norm", "rms_norm")?,
            layer_norm: each("norm", "layer_norm")?,
            add_rms_norm: each("norm", "add_rms_norm")?,
            add_layer_norm: each("norm", "add_layer_norm")?,
            norm_heads: each("norm", "norm_heads")?,
            act_mul: acts("_mul")?,
            act: acts("")?,
            add: each("rows", "add")?,
            scale: each("rows", "scale")?,
            softcap: modules.kernel("rows", "softcap", 0)?,
            gather: [modules.kernel("rows", "gather_2", 0)?, modules.kernel("rows", "gather_4", 0)?],
            feed: modules.kernel("rows", "feed", 0)?,
            experts: ExpertKernels::load(modules)?,
        })
    }
}

fn each_dtype(modules: &Modules, module: &str, name: &str) -> Result<EachDtype, GpuError> {
    let [f32, f16, bf16] =
        Dtype::ALL.map(|dtype| modules.kernel(module, &format!("{name}_{}", dtype.name()), 0));
    Ok([f32?, f16?, bf16?])
}

fn act_index(act: Act) -> usize {
    ACTS.iter().position(|(known, _)| *known == act).expect("all are there")
}

/// Rows as the kernels take them.
#[repr(C)]
#[derive(Clone, Copy)]
struct Rows {
    start: u64,
    stride: u64,
}

impl Rows {
    const NONE: Self = Self { start: 0, stride: 0 };

    fn of(rows: DeviceRows<'_>) -> Self {
        Self { start: rows.address(), stride: rows.stride as u64 }
    }
}

/// A count as the kernels take it.
fn count(what: &str, n: usize) -> u32 {
    u32::try_from(n).unwrap_or_else(|_| panic!("{what}: {n} is too many"))
}

/// Blocks of 128 threads, each with `vector` elements of a row.
fn elements_shape(what: &str, rows: usize, width: usize, vector: usize) -> Shape {
    let pieces = count(what, width.div_ceil(128 * vector));
    assert!(pieces <= 65_535, "{what}: rows of {width} are too long");
    Shape::new([count(what, rows), pieces, 1], 128)
}
