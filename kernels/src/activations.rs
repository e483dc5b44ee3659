//! Rows quantised to int8 for the packed product: symmetric, one scale per (row, group of 32).

use crate::GROUP;

/// Quantised rows; keeps its memory from one use to the next. Filled by `Cpu::quantize`.
#[derive(Debug, Default)]
pub struct Activations {
    pub(crate) m: usize,
    pub(crate) k: usize,
    /// (m, k) in -127..=127
    pub(crate) q: Vec<i8>,
    /// (m, k / 32) amax / 127
    pub(crate) scales: Vec<f32>,
    /// (m, k / 32) scale * (sum of the group's integers)
    pub(crate) sums: Vec<f32>,
    /// (m, k / 32, 2) the same of each half of a group
    pub(crate) half_sums: Vec<f32>,
}

impl Activations {
    pub fn new() -> Self {
        Self::default()
    }

    /// Rows.
    pub fn m(&self) -> usize {
        self.m
    }

    /// Features of a row.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The integers of a row's group and their scale.
    pub fn group(&self, row: usize, group: usize) -> (&[i8], f32) {
        let groups = self.k / GROUP;
        (&self.q[row * self.k + group * GROUP..][..GROUP], self.scales[row * groups + group])
    }

    /// Makes room for (m, k), so that no later use of that size or less allocates.
    pub fn reserve(&mut self, m: usize, k: usize) {
        let groups = m * (k / GROUP);
        self.q.reserve((m * k).saturating_sub(self.q.len()));
        self.scales.reserve(groups.saturating_sub(self.scales.len()));
        self.sums.reserve(groups.saturating_sub(self.sums.len()));
        self.half_sums.reserve((2 * groups).saturating_sub(self.half_sums.len()));
    }

    pub(crate) fn resize(&mut self, m: usize, k: usize) {
        let groups = k / GROUP;
        self.m = m;
        self.k = k;
        self.q.resize(m * k, 0);
        self.scales.resize(m * groups, 0.0);
        self.sums.resize(m * groups, 0.0);
        self.half_sums.resize(2 * m * groups, 0.0);
    }
}
