//! When the requests of an open loop come.

use std::time::Duration;

use super::plan::Arrivals;
use super::random::Random;

impl Arrivals {
    /// `count` instants after the beginning, ascending; the first is one gap after it.
    pub(super) fn instants(&self, seed: u64, names: &[&str], count: usize) -> Vec<Duration> {
        let mut random = Random::new(seed, names);
        let mut at = 0.0;
        let gaps = (0..count).map(|_| random.gamma(self.burstiness) / (self.rate * self.burstiness));
        let instants = gaps.map(|gap| {
            at += gap;
            Duration::from_secs_f64(at)
        });
        instants.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::statistics::mean_and_deviation;

    #[test]
    fn arrivals_have_their_rate_and_their_burstiness_and_repeat_with_the_seed() {
        for (rate, burstiness) in [(4.0, 1.0), (100.0, 0.25), (0.5, 9.0)] {
            let arrivals = Arrivals { rate, burstiness, max_concurrency: None };
            let instants = arrivals.instants(1, &["a"], 50_000);
            assert_eq!(instants, arrivals.instants(1, &["a"], 50_000));
            assert_ne!(instants[..9], arrivals.instants(2, &["a"], 9));
            assert!(instants.is_sorted());
            let gaps: Vec<f64> = instants.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
            let (mean, deviation) = mean_and_deviation(&gaps);
            assert!((mean * rate - 1.0).abs() < 0.04, "{rate}: {mean}");
            // A gamma distribution's coefficient of variation.
            let variation = deviation / mean * burstiness.sqrt();
            assert!((variation - 1.0).abs() < 0.04, "{burstiness}: {variation}");
        }
    }
}
