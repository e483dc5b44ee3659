//! Weight matrices that are not quantised; 16-bit ones stay 16-bit in memory.

use half::{bf16, f16};

/// A dense weight matrix's values, row-major (n, k).
pub enum DenseData {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

/// A dense weight matrix (n, k).
pub struct Dense {
    n: usize,
    k: usize,
    data: DenseData,
}

impl Dense {
    /// # Panics
    /// When `data` is not (n, k).
    pub fn new(n: usize, k: usize, data: DenseData) -> Self {
        let len = match &data {
            DenseData::F32(v) => v.len(),
            DenseData::F16(v) => v.len(),
            DenseData::Bf16(v) => v.len(),
        };
        assert_eq!(len, n * k, "dense weights: wrong length for ({n}, {k})");
        Self { n, k, data }
    }

    /// Output features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features.
    pub fn k(&self) -> usize {
        self.k
    }

    pub fn data(&self) -> &DenseData {
        &self.data
    }

    /// Bytes really held.
    pub fn bytes(&self) -> usize {
        self.n * self.k * if matches!(self.data, DenseData::F32(_)) { 4 } else { 2 }
    }

    /// Writes output row `row` (k) as f32.
    ///
    /// # Panics
    /// When there is no such row or `out` is not (k).
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.n, "dense weights: no row {row} in {}", self.n);
        assert_eq!(out.len(), self.k, "dense row: wrong length");
        let range = row * self.k..(row + 1) * self.k;
        match &self.data {
            DenseData::F32(v) => out.copy_from_slice(&v[range]),
            DenseData::F16(v) => out.iter_mut().zip(&v[range]).for_each(|(o, w)| *o = w.to_f32()),
            DenseData::Bf16(v) => out.iter_mut().zip(&v[range]).for_each(|(o, w)| *o = w.to_f32()),
        }
    }
}
