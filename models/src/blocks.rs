//! The blocks of GGUF's quantised types, read into unsigned integers with scales and minima.
//!
//! Every value of a supported type is `scale * q + min` exactly as llama.cpp and candle compute it: the
//! product has at most 24 significant bits, so only the sum is rounded, once. Knows no matrix and no file.
//! Layouts: ggml's `block_q4_0` and so on, little-endian.

use candle_core::quantized::GgmlDType;
use half::f16;
use obol_kernels::{Bits, GROUP, SUPER_BLOCK, ScaleKind, SuperBlock, SuperKind};

/// How a type is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Format {
    pub bits: Bits,
    pub scales: Scales,
}

/// Which scales go with the integers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scales {
    /// For each group of 32.
    Groups(ScaleKind),
    /// In two steps, for each 256 and then each 32 or 16.
    Super(SuperKind),
}

impl Format {
    /// The packed format that holds `dtype` without loss, if there is one.
    pub(crate) fn of(dtype: GgmlDType) -> Option<Self> {
        use Scales::{Groups, Super};
        let (bits, scales) = match dtype {
            GgmlDType::Q4_0 => (Bits::Four, Groups(ScaleKind::F16Centred)),
            GgmlDType::Q4_1 => (Bits::Four, Groups(ScaleKind::F16)),
            GgmlDType::Q5_1 => (Bits::Eight, Groups(ScaleKind::F16)),
            GgmlDType::Q5_0 | GgmlDType::Q8_0 => (Bits::Eight, Groups(ScaleKind::F16Centred)),
            GgmlDType::Q2K => (Bits::Four, Super(SuperKind::HALVES_WITH_MIN)),
            GgmlDType::Q3K => (Bits::Four, Super(SuperKind::HALVES_CENTRED_4)),
            GgmlDType::Q4K => (Bits::Four, Super(SuperKind::WITH_MIN)),
            GgmlDType::Q5K => (Bits::Eight, Super(SuperKind::WITH_MIN)),
            GgmlDType::Q6K => (Bits::Eight, Super(SuperKind::HALVES_CENTRED_32)),
            _ => return None,
        };
        Some(Self { bits, scales })
    }

    /// Whether a group's scale and minimum are numbers that this format holds.
    pub(crate) fn holds(self, scale: f32, min: f32) -> bool {
        match self.scales {
            Scales::Groups(ScaleKind::F16) => {
                f16::from_f32(scale).is_finite() && f16::from_f32(min).is_finite()
            }
            _ => scale.is_finite() && min.is_finite(),
        }
    }
}

/// Reads group `group` (32 values) of the blocks in `row` into `q`; returns (scale, min) of each half.
pub(crate) fn read_group(dtype: GgmlDType, row: &[u8], group: usize, q: &mut [u8; GROUP]) -> [(f32, f32); 2] {
    let groups_a_block = dtype.block_size() / GROUP;
    let block = &row[group / groups_a_block * dtype.type_size()..][..dtype.type_size()];
    let group = group % groups_a_block;
    let both = match dtype {
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
            // Centred at 16; moved to the centre of 8-bit weights.
            q.iter_mut().for_each(|q| *q += 128 - 16);
            centred(half(block, 0), 128.0)
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
        _ => {
            super_quants(dtype, block, group, q);
            return super_group_scales(dtype, block, group);
        }
    };
    [both; 2]
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

// ---- K-quants: super-blocks of 256 ----

/// Reads a row's super-block `at` of a K-quant into `out`; false where its factors are not numbers.
pub(crate) fn read_super(dtype: GgmlDType, row: &[u8], at: usize, out: &mut SuperBlock) -> bool {
    let block = &row[at * dtype.type_size()..][..dtype.type_size()];
    let (groups, _) = out.q.as_chunks_mut::<GROUP>();
    for (group, q) in groups.iter_mut().enumerate() {
        super_quants(dtype, block, group, q);
    }
    super_scales(dtype, block, out);
    out.d.is_finite() && out.dmin.is_finite()
}

fn super_quants(dtype: GgmlDType, block: &[u8], group: usize, q: &mut [u8; GROUP]) {
    // Bytes hold the same place of each group of 128 values (`two`), or of two groups (`low` or `high`).
    let (side, two) = (group / 4 * GROUP, 2 * (group % 4));
    match dtype {
        GgmlDType::Q2K => shifted(&block[16 + side..], two, 3, q),
        GgmlDType::Q3K => {
            shifted(&block[32 + side..], two, 3, q);
            add_bits(&block[..32], group, 1, 2, q);
        }
        GgmlDType::Q4K => shifted(&block[16 + group / 2 * GROUP..], 4 * (group % 2), 15, q),
        GgmlDType::Q5K => {
            shifted(&block[48 + group / 2 * GROUP..], 4 * (group % 2), 15, q);
            add_bits(&block[16..48], group, 1, 4, q);
        }
        GgmlDType::Q6K => {
            shifted(&block[2 * side + group % 2 * GROUP..], group % 4 / 2 * 4, 15, q);
            add_bits(&block[128 + side..], two, 3, 4, q);
        }
        other => unreachable!("{other:?} has no packed format; this is a bug"),
    }
}

fn shifted(bytes: &[u8], shift: usize, mask: u8, q: &mut [u8; GROUP]) {
    for (q, byte) in q.iter_mut().zip(&bytes[..GROUP]) {
        *q = byte >> shift & mask;
    }
}

/// The bits `mask << shift` of each byte are a value's bits from `to` on.
fn add_bits(bytes: &[u8], shift: usize, mask: u8, to: usize, q: &mut [u8; GROUP]) {
    for (q, byte) in q.iter_mut().zip(&bytes[..GROUP]) {
        *q |= (byte >> shift & mask) << to;
    }
}

/// Fills in all but the integers.
fn super_scales(dtype: GgmlDType, block: &[u8], out: &mut SuperBlock) {
    let factor = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]);
    match dtype {
        GgmlDType::Q2K => {
            for (i, byte) in block[..16].iter().enumerate() {
                (out.scales[i], out.mins[i]) = ((byte & 15) as i8, byte >> 4);
            }
            (out.d, out.dmin) = (factor(80), factor(82));
        }
        GgmlDType::Q3K => {
            // 6 bits each, 32 too much: low nibbles of 8 bytes and their high ones, then 2 bits of 4 bytes.
            let packed = &block[96..108];
            for (i, scale) in out.scales.iter_mut().enumerate() {
                let low = packed[i % 8] >> (i / 8 * 4) & 15;
                let high = packed[8 + i % 4] >> (i / 4 * 2) & 3;
                *scale = (low | high << 4) as i8 - 32;
            }
            (out.d, out.dmin) = (factor(108), f16::ZERO);
        }
        GgmlDType::Q4K | GgmlDType::Q5K => {
            for group in 0..SUPER_BLOCK / GROUP {
                let (scale, min) = six_bits(&block[4..16], group);
                (out.scales[group], out.mins[group]) = (scale as i8, min);
            }
            (out.d, out.dmin) = (factor(0), factor(2));
        }
        GgmlDType::Q6K => {
            for (scale, byte) in out.scales.iter_mut().zip(&block[192..208]) {
                *scale = byte.cast_signed();
            }
            (out.d, out.dmin) = (factor(208), f16::ZERO);
        }
        other => unreachable!("{other:?} has no super-blocks; this is a bug"),
    }
}

/// Q4_K's and Q5_K's scale and minimum of a group, 6 bits each in 12 bytes.
fn six_bits(packed: &[u8], group: usize) -> (u8, u8) {
    if group < 4 {
        return (packed[group] & 63, packed[group + 4] & 63);
    }
    let (low, high) = (packed[group + 4] & 15, packed[group + 4] >> 4);
    (low | packed[group - 4] >> 6 << 4, high | packed[group] >> 6 << 4)
}

const ZERO: SuperBlock =
    SuperBlock { q: [0; SUPER_BLOCK], d: f16::ZERO, dmin: f16::ZERO, scales: [0; 16], mins: [0; 16] };

/// (scale, min) of both halves of a super-block's group.
fn super_group_scales(dtype: GgmlDType, block: &[u8], group: usize) -> [(f32, f32); 2] {
    let mut all = ZERO;
    super_scales(dtype, block, &mut all);
    let scale_min = |at: usize| {
        let scale = all.d.to_f32() * f32::from(all.scales[at]);
        match dtype {
            GgmlDType::Q3K => centred(scale, 4.0),
            GgmlDType::Q6K => centred(scale, 32.0),
            _ => (scale, -(all.dmin.to_f32() * f32::from(all.mins[at]))),
        }
    };
    match dtype {
        GgmlDType::Q4K | GgmlDType::Q5K => [scale_min(group); 2],
        _ => [scale_min(2 * group), scale_min(2 * group + 1)],
    }
}
