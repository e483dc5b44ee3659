//! The device's memory between operations, all of it had before the first step.

use std::cell::RefCell;

use obol_kernels::cuda::{
    Buffer, DeviceActivations, DeviceRouting, DeviceRows, Dtype, ExpertChoice, Gpu, GpuError,
};

use crate::queue::StepLimits;
use crate::spec::ModelSpec;

/// Logit rows that are computed at a time, where more are asked for: their product's memory is
/// (rows, vocab) f32.
const LOGIT_ROWS: usize = 64;

/// Widths of a model's buffers, beyond what its spec says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Widths {
    /// Of q, k and v.
    pub(super) qkv: usize,
    /// Of gate and up, of all experts that a row takes.
    pub(super) gate_up: usize,
    /// Of an MLP's activations, likewise.
    pub(super) ffn: usize,
    /// The ways in which layers choose experts; mostly one or none.
    pub(super) experts: Vec<ExpertChoice>,
}

/// What layers with experts need.
pub(super) struct ExpertWork {
    choice: ExpertChoice,
    pub(super) routing: DeviceRouting,
    /// (rows, experts) f32
    pub(super) logits: Buffer,
    /// The experts' inputs, (rows * used, hidden).
    pub(super) gathered: Buffer,
    /// Their outputs.
    pub(super) output: Buffer,
}

/// Buffers between operations, (rows, width) for the most rows of a step.
pub(super) struct Work {
    pub(super) limits: StepLimits,
    pub(super) dtype: Dtype,
    /// (rows) u32
    pub(super) tokens: Buffer,
    /// (rows) u32
    pub(super) positions: Buffer,
    /// (rows) u32: which rows' logits are wanted.
    pub(super) logit_rows: Buffer,
    /// Borrowed for a product at a time.
    pub(super) quantized: RefCell<DeviceActivations>,
    /// The sum of all layers' outputs so far, but for the last: hidden, f32.
    residual: Buffer,
    /// The residual of the logit rows: hidden, f32.
    kept_residual: Buffer,
    /// hidden
    normed: Buffer,
    pub(super) qkv: Buffer,
    /// heads * head_dim
    attended: Buffer,
    /// The same of the logit rows.
    kept_attended: Buffer,
    /// What a layer's half adds to the residual: hidden.
    delta: Buffer,
    pub(super) gate_up: Buffer,
    pub(super) activated: Buffer,
    experts: Vec<ExpertWork>,
    /// ([`Work::logit_rows_most`], vocab) f32
    pub(super) logits: Buffer,
    hidden: usize,
    q_width: usize,
    vocab: usize,
}

impl Work {
    pub(super) fn new(
        gpu: &Gpu,
        spec: &ModelSpec,
        widths: &Widths,
        limits: StepLimits,
        dtype: Dtype,
    ) -> Result<Self, GpuError> {
        let rows = limits.rows;
        let (hidden, q_width) = (spec.hidden, spec.q_width());
        let of = |width: usize| gpu.allocate(rows * width * dtype.bytes());
        let single = |rows: usize, width: usize| gpu.allocate(rows * width * Dtype::F32.bytes());
        let expert = |choice: &ExpertChoice| {
            Ok(ExpertWork {
                choice: *choice,
                routing: gpu.routing(rows, *choice)?,
                logits: single(rows, choice.count)?,
                gathered: of(choice.used * hidden)?,
                output: of(choice.used * hidden)?,
            })
        };
        let experts = widths.experts.iter().map(expert).collect::<Result<Vec<_>, GpuError>>()?;
        let used = widths.experts.iter().map(|choice| choice.used).max().unwrap_or(1);
        let widest = (hidden * used).max(q_width).max(widths.ffn);
        Ok(Self {
            limits,
            dtype,
            tokens: single(rows, 1)?,
            positions: single(rows, 1)?,
            logit_rows: single(rows, 1)?,
            quantized: RefCell::new(DeviceActivations::new(gpu, rows, widest.next_multiple_of(32))?),
            residual: single(rows, hidden)?,
            kept_residual: single(rows, hidden)?,
            normed: of(hidden)?,
            qkv: of(widths.qkv)?,
            attended: of(q_width)?,
            kept_attended: of(q_width)?,
            delta: of(hidden)?,
            gate_up: of(widths.gate_up)?,
            activated: of(widths.ffn)?,
            experts,
            logits: single(logit_rows_most(limits), spec.vocab)?,
            hidden,
            q_width,
            vocab: spec.vocab,
        })
    }

    /// Rows that `logits` holds.
    pub(super) fn logit_rows_most(&self) -> usize {
        logit_rows_most(self.limits)
    }

    pub(super) fn residual(&self) -> DeviceRows<'_> {
        DeviceRows::new(&self.residual, Dtype::F32, self.hidden)
    }

    pub(super) fn kept_residual(&self) -> DeviceRows<'_> {
        DeviceRows::new(&self.kept_residual, Dtype::F32, self.hidden)
    }

    pub(super) fn normed(&self) -> DeviceRows<'_> {
        DeviceRows::new(&self.normed, self.dtype, self.hidden)
    }

    pub(super) fn attended(&self) -> DeviceRows<'_> {
        DeviceRows::new(&self.attended, self.dtype, self.q_width)
    }

    pub(super) fn kept_attended(&self) -> DeviceRows<'_> {
        DeviceRows::new(&self.kept_attended, self.dtype, self.q_width)
    }

    pub(super) fn delta(&self) -> DeviceRows<'_> {
        DeviceRows::new(&self.delta, self.dtype, self.hidden)
    }

    /// What layers that choose so need.
    pub(super) fn experts(&self, choice: &ExpertChoice) -> Option<&ExpertWork> {
        self.experts.iter().find(|experts| experts.choice == *choice)
    }

    pub(super) fn logits(&self) -> DeviceRows<'_> {
        DeviceRows::new(&self.logits, Dtype::F32, self.vocab)
    }
}

fn logit_rows_most(limits: StepLimits) -> usize {
    limits.sequences.max(LOGIT_ROWS).min(limits.rows.max(1))
}
