//! Scales in two steps, as the K-quants have them: per output row and super-block of 256 along k an f16 factor,
//! and per 32 (or 16) weights a small integer that it multiplies.
//!
//! So a super-block's scales are exact products of two short numbers and are never stored themselves. For a
//! panel's super-block lie together: 16 f16 `d`; with minima 16 f16 `-dmin`; then for each group, for each
//! half where halves differ, 16 i8 scales and, with minima, 16 more bytes of them.

use half::f16;

use crate::cpu::SharedMut;
use crate::memory::Piece;
use crate::packed::{Bits, Line, PANEL, Packed, Scales, interleave};
use crate::simd::Simd;
use crate::{Cpu, GROUP};

/// Weights along k of a super-block.
pub const SUPER_BLOCK: usize = 256;

/// Groups of a super-block.
const GROUPS: usize = SUPER_BLOCK / GROUP;

/// Bytes of a panel's f16 factors.
const FACTORS: usize = 2 * PANEL;

/// Which scales and minima a super-block has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SuperKind {
    /// One scale (and minimum) for each 16 weights instead of each 32.
    pub halves: bool,
    /// With minima; else weight zero is `centre`.
    pub has_min: bool,
    pub centre: u8,
}

impl SuperKind {
    /// Q4_K (4 bits) and Q5_K (8 bits).
    pub const WITH_MIN: Self = Self { halves: false, has_min: true, centre: 0 };
    /// Q2_K (4 bits).
    pub const HALVES_WITH_MIN: Self = Self { halves: true, has_min: true, centre: 0 };
    /// Q6_K (8 bits).
    pub const HALVES_CENTRED_32: Self = Self { halves: true, has_min: false, centre: 32 };
    /// Q3_K (4 bits).
    pub const HALVES_CENTRED_4: Self = Self { halves: true, has_min: false, centre: 4 };

    fn factors_bytes(self) -> usize {
        FACTORS * (1 + usize::from(self.has_min))
    }

    /// Bytes of a panel's scales and minima of one group or, with halves, half a group.
    fn part_bytes(self) -> usize {
        PANEL * (1 + usize::from(self.has_min))
    }

    fn parts_a_group(self) -> usize {
        1 + usize::from(self.halves)
    }

    fn bytes(self) -> usize {
        self.factors_bytes() + GROUPS * self.parts_a_group() * self.part_bytes()
    }
}

/// One output row's super-block: weight `i` is `d * scales[j] * q[i] - dmin * mins[j]`, or without minima
/// `d * scales[j] * (q[i] - centre)`, where `j` is `i / 16` with halves and else `i / 32`.
#[derive(Debug, Clone)]
pub struct SuperBlock {
    /// 0..=15 with 4 bits
    pub q: [u8; SUPER_BLOCK],
    pub d: f16,
    /// Not read without minima.
    pub dmin: f16,
    /// The first 8 without halves.
    pub scales: [i8; 16],
    /// 0..=127; as `scales`, not read without minima.
    pub mins: [u8; 16],
}

/// Writes all of (row, super-block).
pub type FillSuper<'a> = &'a (dyn Fn(usize, usize, &mut SuperBlock) + Sync);

/// All scales of a matrix.
pub(crate) struct SuperScales {
    kind: SuperKind,
    /// (panels, super-blocks, kind.bytes())
    data: Piece<u8>,
}

impl Packed {
    /// Packs a matrix of `n` output rows and `k` inputs whose scales have two steps, panels in parallel.
    ///
    /// # Panics
    /// When `k` is no multiple of 256, either size is 0, or a minimum is over 127.
    pub fn build_super(
        cpu: &Cpu,
        n: usize,
        k: usize,
        bits: Bits,
        kind: SuperKind,
        fill: FillSuper<'_>,
    ) -> Self {
        assert!(n > 0 && k > 0, "packed weights: empty matrix ({n}, {k})");
        assert!(k.is_multiple_of(SUPER_BLOCK), "packed weights: k = {k} is no multiple of {SUPER_BLOCK}");
        let (panels, supers) = (n.div_ceil(PANEL), k / SUPER_BLOCK);
        let lines_each = GROUPS * bits.group_bytes() / 64;
        let mut quants = Piece::<Line>::zeroed(panels * supers * lines_each);
        let mut data = Piece::<u8>::zeroed(panels * supers * kind.bytes());
        let (quants_out, data_out) = (SharedMut::new(&mut quants), SharedMut::new(&mut data));
        cpu.pool().run(panels, &|panel| {
            for at in 0..supers {
                let index = panel * supers + at;
                // SAFETY: a panel's super-blocks are written by its task alone.
                let (lines, bytes) = unsafe {
                    (
                        quants_out.slice(index * lines_each, lines_each),
                        data_out.slice(index * kind.bytes(), kind.bytes()),
                    )
                };
                for column in 0..PANEL.min(n - panel * PANEL) {
                    let mut block = SuperBlock::ZERO;
                    fill(panel * PANEL + column, at, &mut block);
                    let (groups, _) = block.q.as_chunks::<GROUP>();
                    for (q, lines) in groups.iter().zip(lines.chunks_exact_mut(lines_each / GROUPS)) {
                        interleave(bits, column, q, lines);
                    }
                    block.put_scales(kind, column, bytes);
                }
            }
        });
        Self::from_parts(n, k, bits, quants, Scales::Super(SuperScales { kind, data }))
    }
}

impl SuperBlock {
    const ZERO: Self =
        Self { q: [0; SUPER_BLOCK], d: f16::ZERO, dmin: f16::ZERO, scales: [0; 16], mins: [0; 16] };

    fn put_scales(&self, kind: SuperKind, column: usize, bytes: &mut [u8]) {
        let (factors, parts) = bytes.split_at_mut(kind.factors_bytes());
        factors[2 * column..][..2].copy_from_slice(&self.d.to_bits().to_ne_bytes());
        if kind.has_min {
            factors[FACTORS + 2 * column..][..2].copy_from_slice(&(-self.dmin).to_bits().to_ne_bytes());
        }
        for (j, part) in parts.chunks_exact_mut(kind.part_bytes()).enumerate() {
            part[column] = self.scales[j].cast_unsigned();
            if kind.has_min {
                assert!(self.mins[j] < 128, "a super-block's minimum {} is over 127", self.mins[j]);
                part[PANEL + column] = self.mins[j];
            }
        }
    }
}

impl SuperScales {
    pub(crate) fn bytes(&self) -> usize {
        self.data.len()
    }

    pub(crate) fn has_halves(&self) -> bool {
        self.kind.halves
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn kind(&self) -> SuperKind {
        self.kind
    }

    /// A panel's super-block: its factors, and what each (half) group has.
    #[cfg(feature = "cuda")]
    pub(crate) fn super_block(&self, index: usize) -> (&[u8], &[u8]) {
        self.data[index * self.kind.bytes()..][..self.kind.bytes()].split_at(self.kind.factors_bytes())
    }

    pub(crate) fn start(&self) -> *const u8 {
        self.data.as_ptr()
    }

    /// Scale and min of a tile's 16 columns, in its half `half` (0 without halves).
    ///
    /// # Safety
    /// The tile and the half exist.
    #[inline(always)]
    pub(crate) unsafe fn scale_min<S: Simd>(&self, s: S, tile: usize, half: usize) -> (S::V, S::V) {
        let kind = self.kind;
        let part = tile % GROUPS * kind.parts_a_group() + half;
        // SAFETY: by the caller's promise all is inside `data`; loads need no alignment.
        unsafe {
            let start = self.data.as_ptr().add(tile / GROUPS * kind.bytes());
            let at = start.add(kind.factors_bytes() + part * kind.part_bytes()).cast::<i8>();
            let scale = s.mul(s.load_f16(start.cast()), s.load_i8(at));
            let min = if kind.has_min {
                s.mul(s.load_f16(start.add(FACTORS).cast()), s.load_i8(at.add(PANEL)))
            } else {
                s.mul(scale, s.splat(-f32::from(kind.centre)))
            };
            (scale, min)
        }
    }

    /// The same of one column.
    pub(crate) fn scale_min_of(&self, tile: usize, half: usize, column: usize) -> (f32, f32) {
        let kind = self.kind;
        let bytes = &self.data[tile / GROUPS * kind.bytes()..][..kind.bytes()];
        let (factors, parts) = bytes.split_at(kind.factors_bytes());
        let factor = |at: usize| f16::from_ne_bytes([factors[at], factors[at + 1]]).to_f32();
        let half = if kind.halves { half } else { 0 };
        let part = &parts[(tile % GROUPS * kind.parts_a_group() + half) * kind.part_bytes()..];
        let scale = factor(2 * column) * f32::from(part[column].cast_signed());
        let min = if kind.has_min {
            factor(FACTORS + 2 * column) * f32::from(part[PANEL + column])
        } else {
            scale * -f32::from(kind.centre)
        };
        (scale, min)
    }
}
