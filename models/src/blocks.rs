//! The blocks of GGUF's quantised types, read into 32 unsigned integers with a scale and a minimum.
//!
//! Every value of a supported type is `scale * q + min` exactly as llama.cpp and candle compute it: the
//! product has at most 22 significant bits, so only the sum is rounded, once. Knows no matrix and no file.
//! Layouts: ggml's `block_q4_0` and so on, little-endian.

use candle_core::quantized::GgmlDType;
use half::f16;
use obol_kernels::{Bits, GROUP, ScaleKind};

/// How a type is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Format {
    pub bits: Bits,
    pub scales: ScaleKind,
}

impl Format {
    /// The packed format that holds `dtype` without loss, if there is one.
    pub(crate) fn of(dtype: GgmlDType) -> Option<Self> {
        let (bits, scales) = match dtype {
            GgmlDType::Q4_0 => (Bits::Four, ScaleKind::F16Centred),
            GgmlDType::Q4_1 => (Bits::Four, ScaleKind::F16),
            GgmlDType::Q4K => (Bits::Four, ScaleKind::F32),
            // Q5_0 is centred at 16, not at an 8-bit weight's 128, so its minimum is stored.
            GgmlDType::Q5_0 | GgmlDType::Q5_1 => (Bits::Eight, ScaleKind::F16),
            GgmlDType::Q5K => (Bits::Eight, ScaleKind::F32),
            GgmlDType::Q8_0 => (Bits::Eight, ScaleKind::F16Centred),
            _ => return None,
        };
        Some(Self { bits, scales })
    }

    /// Whether a group's scale and minimum are numbers that this format holds.
    pub(crate) fn holds(self, scale: f32, min: f32) -> bool {
        match self.scales {
            ScaleKind::F16 => f16::from_f32(scale).is_finite() && f16::from_f32(min).is_finite(),
            ScaleKind::F16Centred | ScaleKind::F32 => scale.is_finite() && min.is_finite(),
        }
    }
}

/// Reads group `group` (32 values) of the blocks in `row` into `q`; returns (scale, min).
pub(crate) fn read_group(dtype: GgmlDType, row: &[u8], group: usize, q: &mut [u8; GROUP]) -> (f32, f32) {
    let groups_a_block = dtype.block_size() / GROUP;
    let block = &row[group / groups_a_block * dtype.type_size()..][..dtype.type_size()];
    let group = group % groups_a_block;
    match dtype {
        GgmlDType::Q4_0 => {
            nibbles(&block[2..], q);
            centred(half(block, 0), 8.0)
        }
        GgmlDType::Q4_1 => {
            nibbles(&block[4..], q);
            (half(block, 0), half(block, 2))
        }
        GgmlDType::Q5_0 => {
            nibbles(&block[6..], q);
            fifth_bits(&block[2..6], q);
            centred(half(block, 0), 16.0)
        }
        GgmlDType::Q5_1 => {
            nibbles(&block[8..], q);
            fifth_bits(&block[4..8], q);
            (half(block, 0), half(block, 2))
        }
        GgmlDType::Q8_0 => {
            for (q, byte) in q.iter_mut().zip(&block[2..]) {
                *q = byte ^ 0x80;
            }
            centred(half(block, 0), 128.0)
        }
        GgmlDType::Q4K => {
            super_nibbles(&block[16..], group, q);
            super_scale(block, group)
        }
        GgmlDType::Q5K => {
            super_nibbles(&block[48..], group, q);
            for (q, high) in q.iter_mut().zip(&block[16..48]) {
                *q |= (high >> group & 1) << 4;
            }
            super_scale(block, group)
        }
        other => unreachable!("{other:?} has no packed format; this is a bug"),
    }
}

fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn centred(scale: f32, centre: f32) -> (f32, f32) {
    (scale, -centre * scale)
}

/// 16 bytes: the low nibbles are values 0 to 15, the high ones 16 to 31.
fn nibbles(bytes: &[u8], q: &mut [u8; GROUP]) {
    for (i, byte) in bytes[..GROUP / 2].iter().enumerate() {
        q[i] = byte & 15;
        q[i + GROUP / 2] = byte >> 4;
    }
}

/// Bit `i` of 4 bytes is value `i`'s fifth bit.
fn fifth_bits(bytes: &[u8], q: &mut [u8; GROUP]) {
    let bits = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    for (i, q) in q.iter_mut().enumerate() {
        *q |= ((bits >> i & 1) as u8) << 4;
    }
}

/// K-quants: 32 bytes hold group `2 i` in their low nibbles and `2 i + 1` in their high ones.
fn super_nibbles(bytes: &[u8], group: usize, q: &mut [u8; GROUP]) {
    let shift = 4 * (group % 2);
    for (q, byte) in q.iter_mut().zip(&bytes[group / 2 * GROUP..][..GROUP]) {
        *q = byte >> shift & 15;
    }
}

/// K-quants: a super-block's d and dmin times the group's 6-bit scale and minimum, which are subtracted.
fn super_scale(block: &[u8], group: usize) -> (f32, f32) {
    let packed = &block[4..16];
    let (scale, min) = if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        (
            packed[group + 4] & 15 | packed[group - 4] >> 6 << 4,
            packed[group + 4] >> 4 | packed[group] >> 6 << 4,
        )
    };
    (half(block, 0) * f32::from(scale), -(half(block, 2) * f32::from(min)))
}
