//! Rows quantised to int8 on a device, in the order in which packed products want them.

use super::super::gpu::{Shape, arguments};
use super::super::{Buffer, DeviceRows, Gpu, GpuError};
use super::{TILE, dtype_number, number};
use crate::GROUP;

/// Groups that lie together.
pub(super) const PAIR: usize = 2 * GROUP;

/// Bytes of a tile's pair: integers, scales, sums, sums of halves of groups.
const QUANT_BYTES: usize = TILE * PAIR;
const SCALE_BYTES: usize = TILE * 2 * size_of::<f32>();

/// Threads of a block that quantises, 4 elements each.
const THREADS: usize = 256;

/// Room for quantised rows. Filled by [`Gpu::quantize`].
pub struct DeviceActivations {
    pub(super) quants: Buffer,
    pub(super) scales: Buffer,
    pub(super) sums: Buffer,
    pub(super) half_sums: Buffer,
    /// (row, pair) pairs, in whole tiles.
    tile_pairs_max: usize,
    rows: usize,
    k: usize,
}

impl DeviceActivations {
    /// Room for `rows` rows of `k`, or as many elements of another shape.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`]
    pub fn new(gpu: &Gpu, rows: usize, k: usize) -> Result<Self, GpuError> {
        let tile_pairs = tile_pairs(rows, k);
        Ok(Self {
            quants: gpu.allocate(tile_pairs * QUANT_BYTES)?,
            scales: gpu.allocate(tile_pairs * SCALE_BYTES)?,
            sums: gpu.allocate(tile_pairs * SCALE_BYTES)?,
            half_sums: gpu.allocate(tile_pairs * 2 * SCALE_BYTES)?,
            tile_pairs_max: tile_pairs,
            rows: 0,
            k: 0,
        })
    }

    /// Bytes of the room for `rows` rows of `k`.
    pub fn size(rows: usize, k: usize) -> usize {
        tile_pairs(rows, k) * (QUANT_BYTES + 4 * SCALE_BYTES)
    }

    /// Rows that were quantised last.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Features of a row that was quantised last.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Copies to the host what [`Gpu::quantize`] wrote, and waits for that: for each row its integers (rows, k),
    /// scales (rows, k / 32), sums (rows, k / 32) and sums of halves (rows, k / 32, 2).
    ///
    /// # Errors
    /// When the copy, or work before it, fails.
    pub fn download(&self, gpu: &Gpu) -> Result<HostActivations, GpuError> {
        let pairs = self.k.div_ceil(PAIR);
        let tile_pairs = tile_pairs(self.rows, self.k);
        let read = |buffer: &Buffer, bytes: usize| {
            let mut out = vec![0; tile_pairs * bytes];
            gpu.read(buffer, 0, &mut out).map(|()| out)
        };
        let (quants, scales) = (read(&self.quants, QUANT_BYTES)?, read(&self.scales, SCALE_BYTES)?);
        let (sums, half_sums) = (read(&self.sums, SCALE_BYTES)?, read(&self.half_sums, 2 * SCALE_BYTES)?);
        let single = |bytes: &[u8], at: usize| {
            f32::from_ne_bytes(bytes[4 * at..][..4].try_into().expect("four bytes"))
        };
        let mut host = HostActivations::default();
        for row in 0..self.rows {
            for group in 0..self.k / GROUP {
                let tile_pair = row / TILE * pairs + group / 2;
                let start = tile_pair * QUANT_BYTES + row % TILE * PAIR;
                for i in 0..GROUP {
                    let word = i / 4 % 4 * 16 + (group % 2 * 2 + i / 16) * 4;
                    host.q.push(quants[start + word + i % 4].cast_signed());
                }
                let at = (tile_pair * TILE + row % TILE) * 2 + group % 2;
                host.scales.push(single(&scales, at));
                host.sums.push(single(&sums, at));
                host.half_sums.extend([single(&half_sums, 2 * at), single(&half_sums, 2 * at + 1)]);
            }
        }
        Ok(host)
    }
}

/// Quantised rows as the host lays them out.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct HostActivations {
    pub q: Vec<i8>,
    pub scales: Vec<f32>,
    /// scale * (sum of the group's integers)
    pub sums: Vec<f32>,
    pub half_sums: Vec<f32>,
}

fn tile_pairs(rows: usize, k: usize) -> usize {
    rows.div_ceil(TILE) * k.div_ceil(PAIR)
}

impl Gpu {
    /// Quantises `rows` rows of `x` to int8: per group of 32 one scale, amax / 127, rounding half to even; as the
    /// CPU, bit for bit. A group that holds what is no number gets scale NaN.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When `k` is no multiple of 32, or `x` or `out` is too small.
    pub fn quantize(
        &self,
        x: DeviceRows<'_>,
        rows: usize,
        k: usize,
        out: &mut DeviceActivations,
    ) -> Result<(), GpuError> {
        assert!(k > 0 && k.is_multiple_of(GROUP), "quantize: k = {k} is no multiple of {GROUP}");
        x.check("quantize", rows, k);
        assert!(
            tile_pairs(rows, k) <= out.tile_pairs_max,
            "quantize: no room for ({rows}, {k}) in {} tiles' pairs of groups",
            out.tile_pairs_max
        );
        (out.rows, out.k) = (rows, k);
        let lanes = k.next_multiple_of(PAIR) / 4;
        let grid = [number(rows.next_multiple_of(TILE)), number(lanes.div_ceil(THREADS)), 1];
        let kernel = self.kernels().products.quantize[dtype_number(x.dtype) as usize];
        let (rows, k) = (number(rows), number(k));
        // SAFETY: the arguments are the kernel's; all it reads and writes was checked above.
        unsafe {
            self.launch(
                kernel,
                Shape::new(grid, THREADS as u32),
                &mut arguments![
                    x.address(),
                    x.stride as u64,
                    rows,
                    k,
                    out.quants.address(),
                    out.scales.address(),
                    out.sums.address(),
                    out.half_sums.address(),
                ],
            )
        }
    }
}
