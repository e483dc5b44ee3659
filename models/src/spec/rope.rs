//! How positions are turned into angles: the frequencies of each way of stretching them.
//!
//! Knows no file. Invariant: frequencies are a function of the spec and the served context alone, never of a
//! sequence, so a position's angles are the same in every batch.

use std::f64::consts::TAU;

use obol_kernels::{RopeStyle, RopeTable};

/// One rope.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Leading elements of a head that are rotated.
    pub dim: usize,
    pub base: f32,
    pub style: RopeStyle,
    pub scaling: RopeScaling,
}

/// How the angles are changed for contexts longer than those trained on.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    /// Positions divided by a factor.
    Linear(f64),
    /// Each pair's frequency divided by its factor (`rope_freqs.weight` in GGUF): (dim / 2).
    Factors(Vec<f32>),
    /// Long waves divided by `factor`, short ones as they are, a ramp between (llama 3.1).
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        original: f64,
    },
    /// As llama 3's, with the ramp over dimensions, and louder. (Peng et al., "YaRN", 2023)
    Yarn {
        factor: f64,
        fast: f64,
        slow: f64,
        original: f64,
        truncated: bool,
        attention: f64,
    },
    /// Each pair's frequency divided by one of two factors, and louder. (Ding et al., "LongRoPE", 2024)
    Long {
        short: Vec<f32>,
        long: Vec<f32>,
        original: usize,
        attention: f64,
    },
}

impl RopeSpec {
    /// The table, of no rows yet, for a served context of `context` positions.
    pub fn table(&self, context: usize) -> RopeTable {
        let half = self.dim / 2;
        let base = f64::from(self.base);
        let plain = |i: usize| base.powf(-2.0 * i as f64 / self.dim as f64);
        let over =
            |factors: &[f32]| -> Vec<f64> { (0..half).map(|i| plain(i) / f64::from(factors[i])).collect() };
        let (frequencies, attention) = match &self.scaling {
            RopeScaling::None => ((0..half).map(plain).collect(), 1.0),
            RopeScaling::Linear(factor) => ((0..half).map(|i| plain(i) / factor).collect(), 1.0),
            RopeScaling::Factors(factors) => (over(factors), 1.0),
            &RopeScaling::Llama3 { factor, low, high, original } => {
                let each = |i| {
                    let turns = original * plain(i) / TAU;
                    let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    plain(i) * (kept + (1.0 - kept) / factor)
                };
                ((0..half).map(each).collect(), 1.0)
            }
            &RopeScaling::Yarn { factor, fast, slow, original, truncated, attention } => {
                let dim = self.dim as f64;
                // The dimension whose wave turns so many times in the original context.
                let at = |turns: f64| dim * (original / (turns * TAU)).ln() / (2.0 * base.ln());
                let (mut first, mut last) = (at(fast), at(slow));
                if truncated {
                    (first, last) = (first.floor(), last.ceil());
                }
                let (first, last) = (first.max(0.0), last.min(dim - 1.0));
                let width = if first == last { 0.001 } else { last - first };
                let each = |i: usize| {
                    let divided = ((i as f64 - first) / width).clamp(0.0, 1.0);
                    plain(i) * (1.0 - divided + divided / factor)
                };
                ((0..half).map(each).collect(), attention)
            }
            // Transformers changes from short to long when a sequence grows past the original context; the
            // keys that it has kept are then of the wrong kind, and an answer depends on when. Here the served
            // context decides once, so that a row depends on its tokens alone. (llama.cpp does the same.)
            RopeScaling::Long { short, long, original, attention } => {
                (over(if context > *original { long } else { short }), *attention)
            }
        };
        RopeTable::from_frequencies(frequencies, attention)
    }
}
