//! Rows of a matrix on the device by their indices: embeddings of tokens, learned positions.

use super::super::gpu::{Shape, arguments};
use super::super::{Buffer, DeviceRows, Dtype, Gpu, GpuError};
use super::packed::Kind;
use super::{DeviceDense, DevicePacked, number};
use crate::Bits;

const THREADS: usize = 256;

/// A matrix whose rows can be picked.
#[derive(Clone, Copy)]
pub enum DeviceTable<'a> {
    Packed(&'a DevicePacked),
    Dense(&'a DeviceDense),
}

/// Rows of a table: those that the u32 from element `start` of `indices` name.
#[derive(Clone, Copy)]
pub struct DevicePick<'a> {
    pub table: DeviceTable<'a>,
    pub indices: &'a Buffer,
    pub start: usize,
}

/// As `Table` in embed.cu.
#[repr(C)]
struct Table {
    data: u64,
    scales: u64,
    factors: u64,
    rows: u32,
    k: u32,
    format: u32,
    kind: u32,
    centre: i32,
}

/// As in embed.cu.
#[repr(C)]
struct EmbedArguments {
    table: Table,
    indices: u64,
    out: u64,
    stride: u64,
    factor: f32,
    add: u32,
}

impl DeviceTable<'_> {
    fn k(&self) -> usize {
        match self {
            Self::Packed(w) => w.k,
            Self::Dense(w) => w.k,
        }
    }

    fn arguments(&self) -> Table {
        match self {
            Self::Packed(w) => Table {
                data: w.quants.address(),
                scales: w.scales.address(),
                factors: w.factors.address(),
                rows: number(w.n),
                k: number(w.k),
                format: u32::from(w.bits == Bits::Eight),
                kind: w.kind as u32,
                centre: i32::from(w.centre),
            },
            Self::Dense(w) => Table {
                data: w.data.address(),
                scales: 0,
                factors: 0,
                rows: number(w.n),
                k: number(w.k),
                format: match w.dtype {
                    Dtype::F16 => 2,
                    Dtype::Bf16 => 3,
                    Dtype::F32 => 4,
                },
                kind: Kind::Centred as u32,
                centre: 0,
            },
        }
    }
}

impl Gpu {
    /// out (rows, k f32) = factor * the tokens' rows, plus the positions' rows where there are some. A row that a
    /// table does not have is NaN.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When shapes do not fit together.
    pub fn embed(
        &self,
        tokens: DevicePick<'_>,
        factor: f32,
        positions: Option<DevicePick<'_>>,
        rows: usize,
        out: DeviceRows<'_>,
    ) -> Result<(), GpuError> {
        self.pick(tokens, factor, false, rows, out)?;
        positions.map_or(Ok(()), |positions| self.pick(positions, 1.0, true, rows, out))
    }

    fn pick(
        &self,
        from: DevicePick<'_>,
        factor: f32,
        add: bool,
        rows: usize,
        out: DeviceRows<'_>,
    ) -> Result<(), GpuError> {
        let k = from.table.k();
        assert!(out.dtype == Dtype::F32, "embedding: the rows are {:?}, not f32", out.dtype);
        out.check("embedding", rows, k);
        let have = from.indices.bytes() / size_of::<u32>();
        assert!(have >= from.start + rows, "embedding: {have} indices, need {}", from.start + rows);
        let arguments = EmbedArguments {
            table: from.table.arguments(),
            indices: from.indices.address() + (from.start * size_of::<u32>()) as u64,
            out: out.address(),
            stride: out.stride as u64,
            factor,
            add: u32::from(add),
        };
        let shape = Shape::new([number(rows), number(k.div_ceil(THREADS)), 1], THREADS as u32);
        // SAFETY: the arguments are the kernel's; all it writes was checked above, and it checks the indices.
        unsafe { self.launch(self.kernels().products.embed, shape, &mut arguments![arguments]) }
    }
}
