//! What a matrix becomes at loading.
//!
//! Rules, by [`Quant`]: `file` keeps what the file has, without loss. `f32`, `f16` and `bf16` are dense.
//! `int8` is a symmetric scale in f16 for each group of 32. `int4` is a scale and a minimum in f16 for each
//! group of 32; embedding and head get int8. Under both, a router of experts is dense f32 (it decides, and is
//! small), and a matrix whose inputs are no multiple of 32 stays dense: in the file's type if that is dense.
//! A source that has the wanted format already keeps its integers. Knows no file and no layer; the rounding itself is the
//! kernels'.

use candle_core::quantized::GgmlDType;
use obol_kernels::{Bits, GROUP, SUPER_BLOCK, ScaleKind};

use crate::blocks::{Format, Scales};
use crate::matrix::Matrix;
use crate::quant::Quant;

/// Groups of 32 with a symmetric scale.
pub(crate) const INT8: Format = Format { bits: Bits::Eight, scales: Scales::Groups(ScaleKind::F16Centred) };
/// Groups of 32 with a scale and a minimum.
pub(crate) const INT4: Format = Format { bits: Bits::Four, scales: Scales::Groups(ScaleKind::F16) };
/// Groups of 32 with a symmetric scale: Q4_0, and GPTQ where it is symmetric.
const CENTRED_INT4: Format = Format { bits: Bits::Four, scales: Scales::Groups(ScaleKind::F16Centred) };

/// The form in which a matrix is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// The source's own integers and scales, which this format holds exactly.
    Kept(Format),
    /// Rounded to [`INT8`] or [`INT4`].
    Rounded(Format),
    Dense(DenseType),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DenseType {
    F32,
    F16,
    Bf16,
}

impl DenseType {
    /// The type of a dense source.
    pub(crate) fn of(dtype: GgmlDType) -> Option<Self> {
        match dtype {
            GgmlDType::F32 => Some(Self::F32),
            GgmlDType::F16 => Some(Self::F16),
            GgmlDType::BF16 => Some(Self::Bf16),
            _ => None,
        }
    }
}

impl Target {
    /// What the matrix called `name` (`blk.0.attn_q`, without `.weight`) becomes; none where its type is not
    /// supported.
    pub(crate) fn of(quant: Quant, name: &str, matrix: &Matrix<'_>) -> Option<Self> {
        let own = matrix.own_target()?;
        let wanted = match quant {
            Quant::File => return Some(own),
            Quant::F32 => return Some(Self::Dense(DenseType::F32)),
            Quant::F16 => return Some(Self::Dense(DenseType::F16)),
            Quant::Bf16 => return Some(Self::Dense(DenseType::Bf16)),
            Quant::Int8 | Quant::Int4 if is_router(name) => return Some(Self::Dense(DenseType::F32)),
            Quant::Int4 if !is_end(name) => INT4,
            Quant::Int8 | Quant::Int4 => INT8,
        };
        Some(match own {
            Self::Dense(_) if !matrix.k.is_multiple_of(GROUP) => own,
            Self::Kept(format) if format == wanted => own,
            // A minimum of -8 scales is a number of f16 too.
            Self::Kept(CENTRED_INT4) if wanted == INT4 => Self::Kept(INT4),
            _ => Self::Rounded(wanted),
        })
    }

    /// Inputs of a row that share scales.
    pub(crate) fn group(self) -> usize {
        match self {
            Self::Dense(_) => 1,
            Self::Kept(format) | Self::Rounded(format) => match format.scales {
                Scales::Groups(_) => GROUP,
                Scales::Super(_) => SUPER_BLOCK,
            },
        }
    }

    /// Whether matrices of both forms can be one product.
    pub(crate) fn fuses_with(self, other: Self) -> bool {
        match (self, other) {
            (Self::Dense(a), Self::Dense(b)) => a == b,
            (Self::Kept(a) | Self::Rounded(a), Self::Kept(b) | Self::Rounded(b)) => a == b,
            _ => false,
        }
    }
}

/// Embeddings and head: each of their rows is one token, whose error nothing averages out.
fn is_end(name: &str) -> bool {
    matches!(name, "token_embd" | "position_embd" | "output")
}

fn is_router(name: &str) -> bool {
    name.ends_with(".ffn_gate_inp")
}
