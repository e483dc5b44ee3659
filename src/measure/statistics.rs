//! Figures of many values: percentiles, means, their errors.

/// Of ascending values, interpolated between neighbours; NaN of none. `part` is from 0 to 1.
#[must_use]
pub fn percentile(sorted: &[f64], part: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = part * last as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

/// Of values in any order.
#[must_use]
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    percentile(&values, 0.5)
}

/// Mean and its standard error; 0 for a single value.
#[must_use]
pub fn mean_and_error(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let (mean, deviation) = mean_and_deviation(values);
    (mean, if values.len() > 1 { deviation / (count - 1.0).sqrt() } else { 0.0 })
}

/// Mean and standard deviation (of the values themselves, not of a sample); NaN of none.
#[must_use]
pub fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
    (mean, variance.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_lie_between_neighbours() {
        let of = |values: &[f64], part| percentile(values, part);
        assert!(of(&[], 0.5).is_nan());
        for part in [0.0, 0.3, 1.0] {
            assert!((of(&[7.0], part) - 7.0).abs() < 1e-12);
        }
        let values = [1.0, 2.0, 4.0, 8.0, 16.0];
        assert!((of(&values, 0.5) - 4.0).abs() < 1e-12);
        assert!((of(&values, 0.99) - (8.0 + 0.96 * 8.0)).abs() < 1e-12);
        assert!((of(&values, 1.0) - 16.0).abs() < 1e-12);
        assert!((median(vec![3.0, 1.0, 2.0, 4.0]) - 2.5).abs() < 1e-12);
    }

    #[test]
    fn spread_is_of_the_values_and_its_error_of_the_mean() {
        let (mean, deviation) = mean_and_deviation(&[1.0, 3.0]);
        assert!((mean - 2.0).abs() < 1e-12 && (deviation - 1.0).abs() < 1e-12);
        let (_, error) = mean_and_error(&[1.0, 3.0]);
        assert!((error - 1.0).abs() < 1e-12);
        assert!(mean_and_error(&[5.0]).1.abs() < 1e-12);
    }
}
