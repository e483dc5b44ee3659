//! Quantised weight matrices in the one layout that the products read.
//!
//! A weight is `scale * q + min` with unsigned `q`, scale and min per output row and group of 32 along k.
//! 16 output rows make a panel; a panel's groups follow each other. In a group, byte `4 * column + b` of
//! vector `j` (64 bytes) holds, with 8 bits, `q[column][4 * j + b]`; with 4 bits its low nibble holds
//! `q[column][4 * j + b]` and its high nibble `q[column][16 + 4 * j + b]`. So each 32-bit lane of a vector is
//! four consecutive weights of one column, as `vpdpbusd` wants them.
//!
//! Scales of two steps, for each 16 weights if need be, are in `super_scales`: with either width a group's first
//! half is what comes first in each vector's order, the low nibbles or vectors 0 to 3.
//!
//! Knows no file format: the caller hands over integers and scales.

use half::f16;

use crate::Cpu;
use crate::cpu::SharedMut;
use crate::memory::{Piece, Plain};
use crate::super_scales::SuperScales;

/// Weights along k that share a scale.
pub const GROUP: usize = 32;

/// Output rows interleaved in a panel.
pub(crate) const PANEL: usize = 16;

/// Width of a packed weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bits {
    Four,
    Eight,
}

impl Bits {
    /// Bytes of one panel's group.
    pub(crate) fn group_bytes(self) -> usize {
        match self {
            Self::Four => PANEL * GROUP / 2,
            Self::Eight => PANEL * GROUP,
        }
    }

    /// The `q` of weight zero under [`ScaleKind::F16Centred`].
    pub fn centre(self) -> u8 {
        match self {
            Self::Four => 8,
            Self::Eight => 128,
        }
    }
}

/// How scale and min are kept; choose the smallest that holds the source's values exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleKind {
    /// Scale in f16, min = -centre * scale (Q4_0, Q8_0); the min that was handed over is not read.
    F16Centred,
    /// Scale and min in f16 (Q4_1, Q5_1).
    F16,
    /// Scale and min in f32 (Q4_K, Q5_K and the like, whose scales are products).
    F32,
}

#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(crate) struct Line([u8; 64]);

// SAFETY: bytes.
unsafe impl Plain for Line {}

pub(crate) enum Scales {
    /// (panels, groups, 16)
    F16Centred(Piece<u16>),
    /// (panels, groups, 2, 16): 16 scales, then 16 mins
    F16(Piece<u16>),
    /// (panels, groups, 2, 16)
    F32(Piece<f32>),
    Super(SuperScales),
}

impl Scales {
    fn bytes(&self) -> usize {
        match self {
            Self::F16Centred(halves) | Self::F16(halves) => halves.len() * 2,
            Self::F32(singles) => singles.len() * 4,
            Self::Super(scales) => scales.bytes(),
        }
    }

    pub(crate) fn start(&self) -> *const u8 {
        match self {
            Self::F16Centred(halves) | Self::F16(halves) => halves.as_ptr().cast(),
            Self::F32(singles) => singles.as_ptr().cast(),
            Self::Super(scales) => scales.start(),
        }
    }
}

/// A row's group as it is kept: weight `i` is `scale * q[i] + min` with the scale and min of its half.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    pub q: [u8; GROUP],
    /// (scale, min) of the first and the last 16; mostly the same.
    pub halves: [(f32, f32); 2],
}

impl Group {
    pub fn value(&self, i: usize) -> f32 {
        let (scale, min) = self.halves[i / (GROUP / 2)];
        scale * f32::from(self.q[i]) + min
    }
}

/// Writes the 32 integers of (row, group) and returns (scale, min).
pub type Fill<'a> = &'a (dyn Fn(usize, usize, &mut [u8; GROUP]) -> (f32, f32) + Sync);

/// A quantised weight matrix (n, k), packed for the products.
pub struct Packed {
    n: usize,
    k: usize,
    bits: Bits,
    /// (panels, groups, group_bytes)
    quants: Piece<Line>,
    scales: Scales,
}

impl Packed {
    /// Packs a matrix of `n` output rows and `k` inputs, panels in parallel.
    ///
    /// `fill(row, group, q)` writes the group's 32 integers (0..=15 or 0..=255) and returns (scale, min).
    ///
    /// # Panics
    /// When `k` is no multiple of 32 or either size is 0.
    pub fn build(cpu: &Cpu, n: usize, k: usize, bits: Bits, kind: ScaleKind, fill: Fill<'_>) -> Self {
        assert!(n > 0 && k > 0, "packed weights: empty matrix ({n}, {k})");
        assert!(k.is_multiple_of(GROUP), "packed weights: k = {k} is no multiple of {GROUP}");
        let (panels, groups) = (n.div_ceil(PANEL), k / GROUP);
        let tiles = panels * groups;
        let mut quants = Piece::<Line>::zeroed(tiles * bits.group_bytes() / 64);
        let mut halves = Piece::<u16>::zeroed(match kind {
            ScaleKind::F16Centred => tiles * PANEL,
            ScaleKind::F16 => tiles * PANEL * 2,
            ScaleKind::F32 => 0,
        });
        let mut singles = Piece::<f32>::zeroed(if kind == ScaleKind::F32 { tiles * PANEL * 2 } else { 0 });
        let quants_out = SharedMut::new(&mut quants);
        let halves_out = SharedMut::new(&mut halves);
        let singles_out = SharedMut::new(&mut singles);
        cpu.pool().run(panels, &|panel| {
            for group in 0..groups {
                let tile = panel * groups + group;
                let lines = bits.group_bytes() / 64;
                // SAFETY: a tile's lines are written by its panel's task alone.
                let lines = unsafe { quants_out.slice(tile * lines, lines) };
                for column in 0..PANEL.min(n - panel * PANEL) {
                    let mut q = [0u8; GROUP];
                    let (scale, min) = fill(panel * PANEL + column, group, &mut q);
                    interleave(bits, column, &q, lines);
                    // SAFETY: as above.
                    unsafe {
                        match kind {
                            ScaleKind::F16Centred => {
                                halves_out.slice(tile * PANEL + column, 1)[0] = half_bits(scale);
                            }
                            ScaleKind::F16 => {
                                halves_out.slice(tile * PANEL * 2 + column, 1)[0] = half_bits(scale);
                                halves_out.slice(tile * PANEL * 2 + PANEL + column, 1)[0] = half_bits(min);
                            }
                            ScaleKind::F32 => {
                                singles_out.slice(tile * PANEL * 2 + column, 1)[0] = scale;
                                singles_out.slice(tile * PANEL * 2 + PANEL + column, 1)[0] = min;
                            }
                        }
                    }
                }
            }
        });
        let scales = match kind {
            ScaleKind::F16Centred => Scales::F16Centred(halves),
            ScaleKind::F16 => Scales::F16(halves),
            ScaleKind::F32 => Scales::F32(singles),
        };
        Self::from_parts(n, k, bits, quants, scales)
    }

    pub(crate) fn from_parts(n: usize, k: usize, bits: Bits, quants: Piece<Line>, scales: Scales) -> Self {
        Self { n, k, bits, quants, scales }
    }

    /// Output features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features.
    pub fn k(&self) -> usize {
        self.k
    }

    pub fn bits(&self) -> Bits {
        self.bits
    }

    /// Bytes really held.
    pub fn bytes(&self) -> usize {
        self.quants.len() * 64 + self.scales.bytes()
    }

    pub(crate) fn groups(&self) -> usize {
        self.k / GROUP
    }

    pub(crate) fn scales(&self) -> &Scales {
        &self.scales
    }

    /// The packed integers, 64-byte aligned.
    pub(crate) fn quants(&self) -> &[u8] {
        // SAFETY: a `Line` is 64 plain bytes.
        unsafe { std::slice::from_raw_parts(self.quants.as_ptr().cast(), self.quants.len() * 64) }
    }

    /// Bytes of the scales of a tile (panel's group): with scales of two steps, its part of a super-block's.
    pub(crate) fn scale_bytes(&self) -> usize {
        self.scales.bytes() / (self.n.div_ceil(PANEL) * self.groups())
    }

    /// Whether the two halves of a group have scales of their own.
    pub(crate) fn has_halves(&self) -> bool {
        matches!(&self.scales, Scales::Super(scales) if scales.has_halves())
    }

    /// The integers of `row`'s `group`, and their scales.
    pub fn group(&self, row: usize, group: usize) -> Group {
        assert!(row < self.n && group < self.groups(), "packed weights: no group ({row}, {group})");
        let (tile, column) = ((row / PANEL) * self.groups() + group, row % PANEL);
        let bytes = &self.quants()[tile * self.bits.group_bytes()..][..self.bits.group_bytes()];
        let mut q = [0; GROUP];
        for j in 0..GROUP / 4 {
            for b in 0..4 {
                q[4 * j + b] = match self.bits {
                    Bits::Eight => bytes[64 * j + 4 * column + b],
                    Bits::Four if j < 4 => bytes[64 * j + 4 * column + b] & 15,
                    Bits::Four => bytes[64 * (j - 4) + 4 * column + b] >> 4,
                };
            }
        }
        let single = |bits: u16| f16::from_bits(bits).to_f32();
        let both = match &self.scales {
            Scales::Super(scales) => {
                let halves = [0, 1].map(|half| scales.scale_min_of(tile, half, column));
                return Group { q, halves };
            }
            Scales::F16Centred(s) => {
                let scale = single(s[tile * PANEL + column]);
                (scale, -f32::from(self.bits.centre()) * scale)
            }
            Scales::F16(s) => {
                (single(s[tile * PANEL * 2 + column]), single(s[tile * PANEL * 2 + PANEL + column]))
            }
            Scales::F32(s) => (s[tile * PANEL * 2 + column], s[tile * PANEL * 2 + PANEL + column]),
        };
        Group { q, halves: [both; 2] }
    }

    /// Writes the weights of output row `row` (k): an embedding's row, say.
    ///
    /// # Panics
    /// When there is no such row or `out` is not (k).
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.k, "dequantized row: wrong length");
        for (group, out) in out.chunks_exact_mut(GROUP).enumerate() {
            let group = self.group(row, group);
            for (i, out) in out.iter_mut().enumerate() {
                *out = group.value(i);
            }
        }
    }
}

fn half_bits(value: f32) -> u16 {
    let half = f16::from_f32(value);
    debug_assert!(half.to_f32() == value || value.is_nan(), "{value} is not exact in f16");
    half.to_bits()
}

pub(crate) fn interleave(bits: Bits, column: usize, q: &[u8; GROUP], lines: &mut [Line]) {
    for (j, line) in lines.iter_mut().enumerate() {
        for b in 0..4 {
            line.0[4 * column + b] = match bits {
                Bits::Eight => q[4 * j + b],
                Bits::Four => {
                    debug_assert!(q[4 * j + b] < 16 && q[16 + 4 * j + b] < 16, "a 4-bit weight is over 15");
                    q[4 * j + b] | q[16 + 4 * j + b] << 4
                }
            };
        }
    }
}
