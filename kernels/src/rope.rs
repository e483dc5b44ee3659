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

/// Cosines and sines of all positions' angles.
#[derive(Debug, Clone)]
pub struct RopeTable {
    rotary_dim: usize,
    positions: usize,
    /// (positions, rotary_dim / 2)
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
}

impl RopeTable {
    /// Angles `position * base^(-2 i / rotary_dim) / factor` for positions under `max_positions`.
    ///
    /// # Panics
    /// When `rotary_dim` is odd or 0, or the factors are not (rotary_dim / 2).
    pub fn new(rotary_dim: usize, base: f32, max_positions: usize, scaling: &RopeScaling) -> Self {
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
        let frequencies: Vec<f64> = (0..half)
            .map(|i| f64::from(base).powf(-2.0 * i as f64 / rotary_dim as f64) / factor(i))
            .collect();
        Self::from_frequencies(rotary_dim, &frequencies, 1.0, max_positions)
    }

    /// Angles `position * frequency` for positions under `max_positions`; `attention_factor` multiplies every
    /// cosine and sine, so that scores grow by its square (YaRN: Peng et al., 2023; longrope).
    ///
    /// # Panics
    /// When `rotary_dim` is odd or 0, or the frequencies are not (rotary_dim / 2).
    pub fn from_frequencies(
        rotary_dim: usize,
        frequencies: &[f64],
        attention_factor: f64,
        max_positions: usize,
    ) -> Self {
        assert!(rotary_dim > 0 && rotary_dim.is_multiple_of(2), "rope: rotary_dim {rotary_dim} is odd or 0");
        assert_eq!(frequencies.len(), rotary_dim / 2, "rope: wrong number of frequencies");
        let mut cos = Vec::with_capacity(max_positions * frequencies.len());
        let mut sin = Vec::with_capacity(max_positions * frequencies.len());
        for position in 0..max_positions {
            for frequency in frequencies {
                let (s, c) = (position as f64 * frequency).sin_cos();
                cos.push((attention_factor * c) as f32);
                sin.push((attention_factor * s) as f32);
            }
        }
        Self { rotary_dim, positions: max_positions, cos, sin }
    }

    /// Leading elements of each head that are rotated.
    pub fn rotary_dim(&self) -> usize {
        self.rotary_dim
    }

    /// Positions the table covers.
    pub fn positions(&self) -> usize {
        self.positions
    }
}
