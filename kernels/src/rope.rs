//! Rotary position embedding: the table of angles. (Su et al., "RoFormer", 2021)

/// Which elements of a head make a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// (0, 1), (2, 3), ...: GGUF "norm" (llama).
    Interleaved,
    /// (0, d/2), (1, d/2 + 1), ...: "neox" (qwen2, gemma, phi).
    Halves,
}

/// How the angles are changed for contexts longer than those trained on.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    /// Positions divided by a factor.
    Linear(f32),
    /// Each pair's frequency divided by its factor (`rope_freqs.weight` in GGUF; llama 3): (rotary_dim / 2).
    Factors(Vec<f32>),
}

/// One row's cosines and sines: (rotary_dim / 2).
#[derive(Clone, Copy)]
pub(crate) struct Angles<'a> {
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
}

/// Cosines and sines of the angles of a batch's rows.
///
/// They are made anew for each batch: a table of all positions of a long context would take as much memory as
/// many a cache, and seconds to make.
#[derive(Debug, Clone)]
pub struct RopeTable {
    /// (rotary_dim / 2)
    frequencies: Vec<f64>,
    attention_factor: f64,
    rows: usize,
    /// (rows, rotary_dim / 2)
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
}

impl RopeTable {
    /// Angles `position * base^(-2 i / rotary_dim) / factor`; of no rows yet.
    ///
    /// # Panics
    /// When `rotary_dim` is odd or 0, or the factors are not (rotary_dim / 2).
    pub fn new(rotary_dim: usize, base: f32, scaling: &RopeScaling) -> Self {
        assert!(rotary_dim > 0 && rotary_dim.is_multiple_of(2), "rope: rotary_dim {rotary_dim} is odd or 0");
        let half = rotary_dim / 2;
        let factor = |i: usize| match scaling {
            RopeScaling::None => 1.0,
            RopeScaling::Linear(factor) => f64::from(*factor),
            RopeScaling::Factors(factors) => {
                assert_eq!(factors.len(), half, "rope: wrong number of frequency factors");
                f64::from(factors[i])
            }
        };
        let frequency = |i| f64::from(base).powf(-2.0 * i as f64 / rotary_dim as f64) / factor(i);
        Self::from_frequencies((0..half).map(frequency).collect(), 1.0)
    }

    /// Angles `position * frequency` (rotary_dim / 2); of no rows yet. `attention_factor` multiplies every
    /// cosine and sine, so that scores grow by its square (YaRN: Peng et al., 2023; longrope).
    ///
    /// # Panics
    /// Without frequencies.
    pub fn from_frequencies(frequencies: Vec<f64>, attention_factor: f64) -> Self {
        assert!(!frequencies.is_empty(), "rope: no frequencies");
        Self { frequencies, attention_factor, rows: 0, cos: Vec::new(), sin: Vec::new() }
    }

    /// Makes it the table of rows at `positions`. Allocates only for more rows than ever before.
    pub fn turn_to(&mut self, positions: &[u32]) {
        self.rows = positions.len();
        self.cos.clear();
        self.sin.clear();
        for position in positions {
            for frequency in &self.frequencies {
                let (s, c) = (f64::from(*position) * frequency).sin_cos();
                self.cos.push((self.attention_factor * c) as f32);
                self.sin.push((self.attention_factor * s) as f32);
            }
        }
    }

    pub(crate) fn row(&self, row: usize) -> Angles<'_> {
        let half = self.frequencies.len();
        Angles { cos: &self.cos[row * half..][..half], sin: &self.sin[row * half..][..half] }
    }

    /// Leading elements of each head that are rotated.
    pub fn rotary_dim(&self) -> usize {
        2 * self.frequencies.len()
    }

    /// Rows it has the angles of.
    pub fn rows(&self) -> usize {
        self.rows
    }
}
