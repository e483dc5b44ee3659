//! The operations on CUDA devices: safe functions over the kernels of `kernels/cuda/`.
//!
//! As on the CPU, shapes are checked here and nowhere else. All work of a [`Gpu`] goes to one stream, in
//! order: a buffer may be read by the operation after the one that writes it, without further ado. Nothing is
//! allocated by an operation. Knows tensors only.
//!
//! Invariant: a row of a result depends, bit for bit, only on that row of the input (and for attention on its
//! sequence's KV), never on the other rows, the kernel's variant or the grid.

mod attention;
mod buffer;
mod collective;
mod error;
mod event;
mod gpu;
mod graph;
mod products;
mod rows;
mod sampling;

pub use attention::{
    AttentionLimits, AttentionPlan, AttentionWorkspace, BatchShape, DecodeBucket, DeviceAttention,
    DeviceBatch, DeviceKv, DeviceQkv, DeviceRope,
};
pub use buffer::{Buffer, Pinned};
pub use collective::{Communicator, GroupId};
pub use error::GpuError;
pub use event::Event;
pub use gpu::{DeviceFacts, Gpu, MemoryView};
pub use graph::Graph;
pub use products::{
    DeviceActivations, DeviceDense, DevicePacked, DevicePick, DeviceTable, HostActivations, packed_alike,
};
pub use rows::{DeviceNorm, DeviceRouting, ExpertChoice, Feeds, NormKind};
pub use sampling::{
    DeviceSampler, DrawLayout, DrawLists, DrawRecord, PackedDraws, RECORD_BYTES, SamplingPasses, StepTokens,
    TOP_MAX,
};

/// The type of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// As kernels' names end.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

/// Rows of equal length at a fixed distance in a buffer: row `i` starts at element `start + i * stride`.
#[derive(Clone, Copy)]
pub struct DeviceRows<'a> {
    pub buffer: &'a Buffer,
    pub dtype: Dtype,
    pub start: usize,
    pub stride: usize,
}

impl<'a> DeviceRows<'a> {
    pub fn new(buffer: &'a Buffer, dtype: Dtype, stride: usize) -> Self {
        Self { buffer, dtype, start: 0, stride }
    }

    /// # Panics
    /// When `rows` rows of `width` are not all inside the buffer.
    pub(crate) fn check(&self, what: &str, rows: usize, width: usize) {
        assert!(self.stride >= width, "{what}: stride {} is less than a row's width {width}", self.stride);
        let need = if rows == 0 { 0 } else { self.start + (rows - 1) * self.stride + width };
        let have = self.buffer.bytes() / self.dtype.bytes();
        assert!(have >= need, "{what}: {have} elements, need {need}");
    }

    /// Address of the first row.
    pub(crate) fn address(&self) -> u64 {
        self.buffer.address() + (self.start * self.dtype.bytes()) as u64
    }
}

/// What ptxas said of each kernel: registers, shared memory, spills.
pub const PTXAS: &str = include_str!(concat!(env!("OUT_DIR"), "/ptxas.txt"));
