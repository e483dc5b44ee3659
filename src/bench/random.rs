//! Numbers that a seed decides, the same on every machine and in every version: prompts and arrivals must
//! be the same in a rerun.

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    /// A stream of its own for each list of names under a seed.
    pub(super) fn new(seed: u64, names: &[&str]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        for name in names {
            hasher.update(&(name.len() as u64).to_le_bytes());
            hasher.update(name.as_bytes());
        }
        let hash = hasher.finalize();
        let head: [u8; 8] = hash.as_bytes()[..8].try_into().expect("a hash has 32 bytes");
        Self(u64::from_le_bytes(head))
    }

    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to below `count`, which is far below 2^32: the bias does not show.
    pub(super) fn below(&mut self, count: usize) -> usize {
        ((u128::from(self.bits()) * count as u128) >> 64) as usize
    }

    /// Above 0 and at most 1, so that its logarithm is finite.
    fn unit(&mut self) -> f64 {
        ((self.bits() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }

    /// Mean 0, variance 1 (Box and Muller, 1958).
    fn normal(&mut self) -> f64 {
        let radius = (-2.0 * self.unit().ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// Mean `shape`, variance `shape` (Marsaglia and Tsang, "A simple method for generating gamma
    /// variables", 2000).
    pub(super) fn gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            let lifted = self.gamma(shape + 1.0);
            return lifted * self.unit().powf(1.0 / shape);
        }
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let x = self.normal();
            let v = (1.0 + c * x).powi(3);
            if v > 0.0 && self.unit().ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                return d * v;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_and_its_names_decide_the_stream() {
        let draw = |seed, names: &[&str]| {
            let mut random = Random::new(seed, names);
            [0; 8].map(|_| random.below(1000))
        };
        assert_eq!(draw(1, &["a", "b"]), draw(1, &["a", "b"]));
        assert_ne!(draw(1, &["a", "b"]), draw(2, &["a", "b"]));
        assert_ne!(draw(1, &["a", "b"]), draw(1, &["ab"]));
        // Reports from other machines are compared with ours: the stream may never change.
        assert_eq!(draw(7, &[]), [637, 379, 223, 698, 846, 63, 29, 582]);
    }

    #[test]
    fn gamma_has_its_mean_and_its_variance() {
        for shape in [0.3, 1.0, 4.0] {
            let mut random = Random::new(3, &["gamma"]);
            let values: Vec<f64> = (0..200_000).map(|_| random.gamma(shape)).collect();
            let (mean, deviation) = crate::measure::statistics::mean_and_deviation(&values);
            let error = (shape / values.len() as f64).sqrt();
            assert!((mean - shape).abs() < 5.0 * error, "{shape}: {mean}");
            assert!((deviation.powi(2) / shape - 1.0).abs() < 0.05, "{shape}: {deviation}");
            assert!(values.iter().all(|value| *value >= 0.0 && value.is_finite()));
        }
    }
}
