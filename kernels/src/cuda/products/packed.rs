//! Packed weights on a device, and their product with quantised rows. Layouts are described in packed.cuh.

use super::super::gpu::arguments;
use super::super::{Buffer, DeviceRows, Gpu, GpuError};
use super::activations::PAIR;
use super::{DeviceActivations, Many, Out, PANEL, SLICE_BLOCK, Slices, Terms, number};
use crate::packed::Scales;
use crate::super_scales::SuperScales;
use crate::{Bits, GROUP, Packed, SUPER_BLOCK};

/// Rows of a panel that lanes number; the others are 8 further on.
const HALF: usize = PANEL / 2;

const MANY: Many = Many { rows: 64, panels: 8 };

/// How the kernels take scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// f16 scales; weights signed, without minima.
    Centred,
    F16Min,
    F32Min,
    SuperMin,
    /// Weights signed, without minima.
    SuperHalves,
    SuperHalvesMin,
}

impl Kind {
    fn of(scales: &Scales) -> Self {
        match scales {
            Scales::F16Centred(_) => Self::Centred,
            Scales::F16(_) => Self::F16Min,
            Scales::F32(_) => Self::F32Min,
            Scales::Super(scales) => match (scales.kind().has_min, scales.kind().halves) {
                (true, false) => Self::SuperMin,
                (true, true) => Self::SuperHalvesMin,
                (false, _) => Self::SuperHalves,
            },
        }
    }

    fn is_signed(self) -> bool {
        matches!(self, Self::Centred | Self::SuperHalves)
    }
}

/// Whether the matrices of two experts can be multiplied at once: they have the same shape and kind.
pub fn packed_alike(one: &Packed, other: &Packed) -> bool {
    Like::of(one) == Like::of(other)
}

/// What experts' matrices have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Like {
    n: usize,
    k: usize,
    bits: Bits,
    kind: Kind,
    centre: u8,
}

impl Like {
    fn of(w: &Packed) -> Self {
        let centre = match w.scales() {
            Scales::Super(scales) => scales.kind().centre,
            _ => w.bits().centre(),
        };
        Self { n: w.n(), k: w.k(), bits: w.bits(), kind: Kind::of(w.scales()), centre }
    }
}

/// A packed weight matrix (n, k) on a device, or one of each expert.
pub struct DevicePacked {
    pub(super) matrices: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) bits: Bits,
    pub(super) kind: Kind,
    /// The q of weight zero where there are no minima.
    pub(super) centre: u8,
    pub(super) quants: Buffer,
    pub(super) scales: Buffer,
    pub(super) factors: Buffer,
}

impl DevicePacked {
    /// Output features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes held on the device.
    pub fn bytes(&self) -> usize {
        self.quants.bytes() + self.scales.bytes() + self.factors.bytes()
    }
}

/// As in packed.cuh.
#[repr(C)]
struct PackedArguments {
    quants: u64,
    scales: u64,
    factors: u64,
    panels: u32,
    pairs: u32,
    x_quants: u64,
    x_scales: u64,
    x_sums: u64,
    x_half_sums: u64,
    bias: u64,
    ends: u64,
    y: Out,
    n: u32,
    slice_pairs: u32,
    rows: u32,
}

impl Gpu {
    /// Copies a matrix to the device, in the order in which its kernels read it.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`], or when the copy fails.
    ///
    /// # Panics
    /// When the matrix has scales without minima and an integer too far from their centre: more than 7 above it or 8
    /// below with 4 bits, 127 and 128 with 8.
    pub fn upload_packed(&self, w: &Packed) -> Result<DevicePacked, GpuError> {
        self.upload_packed_experts(&[w])
    }

    /// As [`Gpu::upload_packed`], of all experts' matrices, which [`Gpu::matmul_packed_experts`] multiplies at once.
    ///
    /// # Errors
    /// As [`Gpu::upload_packed`].
    ///
    /// # Panics
    /// As [`Gpu::upload_packed`], and when there is no matrix or they differ in shape or kind.
    pub fn upload_packed_experts(&self, matrices: &[&Packed]) -> Result<DevicePacked, GpuError> {
        let first = matrices.first().expect("upload: no matrix");
        let like = Like::of(first);
        let Like { n, k, bits, kind, centre } = like;
        let room = |bytes: usize| self.allocate(matrices.len() * bytes);
        let mut buffers = None;
        for (i, w) in matrices.iter().enumerate() {
            assert!(Like::of(w) == like, "upload: matrix {i} is {:?}, the first {like:?}", Like::of(w));
            let quants = repack_quants(w, kind.is_signed().then_some(centre));
            let (scales, factors) = repack_scales(w, kind);
            if buffers.is_none() {
                buffers = Some([room(quants.len())?, room(scales.len())?, room(factors.len())?]);
            }
            for (buffer, bytes) in buffers.iter().flatten().zip([quants, scales, factors]) {
                self.write(buffer, i * bytes.len(), &bytes)?;
            }
        }
        let [quants, scales, factors] = buffers.expect("there is a matrix");
        Ok(DevicePacked { matrices: matrices.len(), n, k, bits, kind, centre, quants, scales, factors })
    }

    /// y (rows, n) = x * w^T + bias (n f32), of rows that [`Gpu::quantize`] has quantised.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When shapes do not fit together.
    pub fn matmul_packed(
        &self,
        x: &DeviceActivations,
        rows: usize,
        w: &DevicePacked,
        bias: Option<&Buffer>,
        y: DeviceRows<'_>,
    ) -> Result<(), GpuError> {
        self.multiply_packed(x, w, Terms { rows, bias, ends: None }, y)
    }

    /// As [`Gpu::matmul_packed`], of rows that are sorted by experts: those of expert `e` end before row `ends[e]`
    /// (u32, ascending, at most `rows`) and are multiplied by its matrix; `bias` is (experts, n). Rows that no
    /// expert has are left as they are.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When shapes do not fit together.
    pub fn matmul_packed_experts(
        &self,
        x: &DeviceActivations,
        rows: usize,
        ends: &Buffer,
        w: &DevicePacked,
        bias: Option<&Buffer>,
        y: DeviceRows<'_>,
    ) -> Result<(), GpuError> {
        self.multiply_packed(x, w, Terms { rows, bias, ends: Some(ends) }, y)
    }

    fn multiply_packed(
        &self,
        x: &DeviceActivations,
        w: &DevicePacked,
        terms: Terms<'_>,
        y: DeviceRows<'_>,
    ) -> Result<(), GpuError> {
        let Terms { rows, bias, ends } = terms;
        assert!(x.k() == w.k, "packed product: k differs, {} and {}", x.k(), w.k);
        assert!(rows <= x.rows(), "packed product: {rows} rows, {} are quantised", x.rows());
        terms.check("packed product", w.matrices, w.n);
        y.check("packed product", rows, w.n);
        let slices = Slices::of(w.k);
        let bits = usize::from(w.bits == Bits::Eight);
        let variants = self.kernels().products.packed[bits][w.kind as usize];
        let (kernel, shape) = variants.choose(rows, w.n, slices, w.matrices, MANY);
        let arguments = PackedArguments {
            quants: w.quants.address(),
            scales: w.scales.address(),
            factors: w.factors.address(),
            panels: number(w.n.div_ceil(PANEL)),
            pairs: number(w.k.div_ceil(PAIR)),
            x_quants: x.quants.address(),
            x_scales: x.scales.address(),
            x_sums: x.sums.address(),
            x_half_sums: x.half_sums.address(),
            bias: bias.map_or(0, Buffer::address),
            ends: ends.map_or(0, Buffer::address),
            y: Out::of(y),
            n: number(w.n),
            slice_pairs: number(slices.blocks * SLICE_BLOCK / PAIR),
            rows: number(rows),
        };
        // SAFETY: the arguments are the kernel's; all it reads and writes was checked above.
        unsafe { self.launch(kernel, shape, &mut arguments![arguments]) }
    }
}

/// The integers in lane order, less `centre` where there is one.
fn repack_quants(w: &Packed, centre: Option<u8>) -> Vec<u8> {
    let (panels, groups, pairs) = (w.n().div_ceil(PANEL), w.k() / GROUP, w.k().div_ceil(PAIR));
    let group_bytes = w.bits().group_bytes();
    let mut out = vec![0; panels * pairs * 2 * group_bytes];
    let signed = centre.map(|centre| signed_bytes(w.bits(), centre));
    for panel in 0..panels {
        for group in 0..groups {
            let from = &w.quants()[(panel * groups + group) * group_bytes..][..group_bytes];
            let pair = panel * pairs + group / 2;
            let to = &mut out[pair * 2 * group_bytes..][..2 * group_bytes];
            for (j, vector) in from.as_chunks::<64>().0.iter().enumerate() {
                for (column, word) in vector.as_chunks::<4>().0.iter().enumerate() {
                    let lane = column % HALF * 4 + j % 4;
                    let high = column / HALF;
                    let at = match w.bits() {
                        Bits::Four => lane * 16 + (group % 2 * 2 + high) * 4,
                        Bits::Eight => group % 2 * group_bytes + lane * 16 + (j / 4 * 2 + high) * 4,
                    };
                    let word = signed.as_ref().map_or(*word, |table| word.map(|byte| table.of(byte)));
                    to[at..at + 4].copy_from_slice(&word);
                }
            }
        }
    }
    out
}

/// Each byte of quants, its integers less the centre.
struct SignedBytes {
    bits: Bits,
    centre: u8,
    bytes: [Option<u8>; 256],
}

impl SignedBytes {
    #[inline]
    fn of(&self, byte: u8) -> u8 {
        self.bytes[usize::from(byte)].unwrap_or_else(|| {
            panic!(
                "upload: {byte:#x} holds a {:?}-bit weight too far from the centre {}",
                self.bits, self.centre
            )
        })
    }
}

fn signed_bytes(bits: Bits, centre: u8) -> SignedBytes {
    let less = |q: u8| i16::from(q) - i16::from(centre);
    let nibble = |q: u8| (-8..8).contains(&less(q)).then(|| (less(q) & 15) as u8);
    let bytes = std::array::from_fn(|byte| {
        let byte = byte as u8;
        match bits {
            Bits::Four => Some(nibble(byte & 15)? | nibble(byte >> 4)? << 4),
            Bits::Eight => i8::try_from(less(byte)).ok().map(i8::cast_unsigned),
        }
    });
    SignedBytes { bits, centre, bytes }
}

/// Scales in lane order, and the factors of two-step scales.
fn repack_scales(w: &Packed, kind: Kind) -> (Vec<u8>, Vec<u8>) {
    let (panels, groups, pairs) = (w.n().div_ceil(PANEL), w.k() / GROUP, w.k().div_ceil(PAIR));
    let mut scales = Vec::new();
    for panel in 0..panels {
        for pair in 0..pairs {
            for g in 0..HALF {
                for group in [2 * pair, 2 * pair + 1] {
                    let start = scales.len();
                    // A group that is there only to fill the pair has scale zero.
                    let tile = panel * groups + group.min(groups - 1);
                    put_group(&mut scales, w, kind, tile, g);
                    if group >= groups {
                        scales[start..].fill(0);
                    }
                }
            }
        }
    }
    let mut factors = Vec::new();
    if let Scales::Super(two_step) = w.scales() {
        for index in 0..panels * (w.k() / SUPER_BLOCK) {
            put_factors(&mut factors, two_step, index);
        }
    }
    (scales, factors)
}

/// What lanes of rows `g` and `g + 8` read of a tile.
fn put_group(out: &mut Vec<u8>, w: &Packed, kind: Kind, tile: usize, g: usize) {
    match w.scales() {
        Scales::F16Centred(s) => {
            let s = &s[tile * PANEL..];
            out.extend([s[g], s[g + HALF]].map(u16::to_ne_bytes).as_flattened());
        }
        Scales::F16(s) => {
            let s = &s[tile * 2 * PANEL..];
            let four = [s[g], s[g + HALF], s[PANEL + g], s[PANEL + g + HALF]];
            out.extend(four.map(u16::to_ne_bytes).as_flattened());
        }
        Scales::F32(s) => {
            let s = &s[tile * 2 * PANEL..];
            let four = [s[g], s[g + HALF], s[PANEL + g], s[PANEL + g + HALF]];
            out.extend(four.map(f32::to_ne_bytes).as_flattened());
        }
        Scales::Super(scales) => {
            let super_groups = SUPER_BLOCK / GROUP;
            let (_, parts) = scales.super_block(tile / super_groups);
            let group_bytes = parts.len() / super_groups;
            let parts = &parts[tile % super_groups * group_bytes..][..group_bytes];
            let rows = |part: &[u8]| [part[g], part[g + HALF]];
            if kind == Kind::SuperHalves {
                // Without halves the one part serves for both.
                let last = if scales.has_halves() { &parts[PANEL..] } else { parts };
                out.extend([rows(parts), rows(last)].as_flattened());
            } else {
                for part in parts.chunks_exact(2 * PANEL) {
                    out.extend([rows(part), rows(&part[PANEL..])].as_flattened());
                }
            }
        }
    }
}

fn put_factors(out: &mut Vec<u8>, scales: &SuperScales, index: usize) {
    let (factors, _) = scales.super_block(index);
    for g in 0..HALF {
        for factors in factors.chunks_exact(2 * PANEL) {
            out.extend(&factors[2 * g..][..2]);
            out.extend(&factors[2 * (g + HALF)..][..2]);
        }
    }
}
