//! A logit's weight against the best one: e^((logit - best) / temperature), and sums of it.
//!
//! Plain multiplications and additions, so that a compiler puts several logits in a register and every
//! machine gets the same bits: a draw is repeated anywhere from its seed. Sums are of whole numbers, so that
//! they are exact and no order of addition, not a GPU's either, can be seen in them.

use super::row::PIECE;

/// e^x to about 1 unit in the last place, for x in -87..=88; nonsense elsewhere, without a branch.
/// (Cody-Waite reduction and the polynomial of Moshier's Cephes `expf`.)
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Added to a small number, this leaves its nearest integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4;
    let r = r + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let y = p * (r * r) + (r + 1.0);
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127);
    y * f32::from_bits(exponent << 23)
}

/// Units of a weight of 1. A sum over 2^20 tokens fits in 64 bits, and the least weight that counts in a
/// draw, e^-30, is more than one unit.
pub(super) const UNITS: f64 = 17_592_186_044_416.0;

/// A weight, 0 to 1, in units, to nearest, ties to even.
#[inline(always)]
pub(super) fn units(weight: f32) -> u64 {
    // Added to a number under it, this leaves the nearest integer in the low bits of the mantissa.
    const ROUND: f64 = 4_503_599_627_370_496.0;
    (f64::from(weight) * UNITS + ROUND).to_bits().wrapping_sub(ROUND.to_bits())
}

/// Turns logits into weights.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scale {
    /// The highest finite logit.
    pub(super) best: f32,
    /// 1 / temperature
    pub(super) inverse: f32,
    /// Exponents under it weigh nothing; -80 or more.
    pub(super) floor: f32,
}

impl Scale {
    #[inline(always)]
    pub(super) fn exponent(&self, logit: f32) -> f32 {
        (logit - self.best) * self.inverse
    }

    /// 1 for the best logit; 0 for one under the floor or not a number.
    #[inline(always)]
    pub(super) fn weight(&self, logit: f32) -> f32 {
        let exponent = self.exponent(logit);
        let weight = exp(exponent);
        if exponent >= self.floor && exponent <= 0.0 { weight } else { 0.0 }
    }

    /// The weights of a piece; zeros past its end.
    pub(super) fn weights(&self, piece: &[f32]) -> [f32; PIECE] {
        let mut weights = [0.0; PIECE];
        for (weight, logit) in weights.iter_mut().zip(piece) {
            *weight = self.weight(*logit);
        }
        weights
    }

    /// The sum of the weights, in units.
    pub(super) fn mass(&self, logits: &[f32]) -> u64 {
        // Eight at a time that do not wait for each other.
        let (eights, rest) = logits.as_chunks::<8>();
        let sums = eights.iter().fold([0; 8], |sums, eight| self.add(sums, eight));
        let rest = rest.iter().map(|logit| units(self.weight(*logit)));
        sums.into_iter().chain(rest).sum()
    }

    #[inline(always)]
    fn add(&self, sums: [u64; 8], logits: &[f32; 8]) -> [u64; 8] {
        let weights: [f32; 8] = std::array::from_fn(|lane| self.weight(logits[lane]));
        std::array::from_fn(|lane| sums[lane].wrapping_add(units(weights[lane])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_right_to_about_one_unit_in_the_last_place() {
        assert_eq!(exp(0.0), 1.0);
        let mut x = -80.0f32;
        while x <= 0.0 {
            let right = f64::from(x).exp();
            let off = (f64::from(exp(x)) - right).abs() / right;
            assert!(off < 1.5e-7, "e^{x} is off by {off}");
            x += 0.003_1;
        }
    }

    #[test]
    fn a_weight_is_a_whole_number_of_units() {
        assert_eq!(units(0.0), 0);
        assert_eq!(units(1.0), 1 << 44);
        assert_eq!(units(f32::EPSILON), 1 << 21);
        assert_eq!(units(1.0 - f32::EPSILON / 2.0), (1 << 44) - (1 << 20));
        for (halves, expected) in [(1, 0), (2, 1), (3, 2), (5, 2), (7, 4)] {
            assert_eq!(units(halves as f32 * 2f32.powi(-45)), expected, "{halves} halves");
        }
        assert_eq!(units(exp(-30.0)), 2);
    }

    #[test]
    fn what_is_no_finite_number_weighs_nothing() {
        let scale = Scale { best: 3.0, inverse: 1.0, floor: -30.0 };
        for logit in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MIN, -28.0] {
            assert_eq!(scale.weight(logit), 0.0, "{logit}");
        }
        assert_eq!(scale.weight(3.0), 1.0);
        let logits: Vec<f32> = (0..21).map(|i| 3.0 - i as f32).collect();
        let right: f64 = logits.iter().map(|logit| f64::from(scale.weight(*logit))).sum();
        assert!((scale.mass(&logits) as f64 / UNITS - right).abs() < 1e-12);
    }
}
