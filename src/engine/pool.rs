//! One vector of a prompt, from the hidden states of its rows as they are computed.
//!
//! Invariant: rows are added in order of position into sums of twice their precision, so that the vector depends, bit
//! for bit, on the rows alone and not on the steps in which they came.

use super::sampler::NotFinite;

/// Of the rows so far. How many are added decides what it is: the last one, or all for their mean.
#[derive(Debug, Default)]
pub(super) struct Pool {
    sum: Vec<f64>,
}

impl Pool {
    /// Adds `rows` (rows, hidden), of which there are `count`.
    pub(super) fn add(&mut self, rows: &[f32], count: usize) {
        let width = rows.len() / count.max(1);
        self.sum.resize(width, 0.0);
        for row in rows.chunks_exact(width.max(1)) {
            self.sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += f64::from(*value));
        }
    }

    /// The vector, of length 1: a sum and a mean then are the same.
    ///
    /// # Errors
    /// When the rows are no numbers, or all zero.
    pub(super) fn finish(&mut self) -> Result<Vec<f32>, NotFinite> {
        let length = self.sum.iter().map(|value| value * value).sum::<f64>().sqrt();
        if !length.is_finite() || length == 0.0 {
            return Err(NotFinite);
        }
        Ok(self.sum.drain(..).map(|value| (value / length) as f32).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vector_has_length_1_however_its_rows_came() {
        let rows = [3.0, -1.0, 0.5, 4.0, 2.0, 1e-3];
        let of = |parts: &[&[f32]]| {
            let mut pool = Pool::default();
            parts.iter().for_each(|part| pool.add(part, part.len() / 2));
            pool.finish().expect("numbers")
        };
        let whole = of(&[&rows]);
        assert_eq!(whole, of(&[&rows[..2], &rows[2..]]));
        assert_eq!(whole, of(&[&rows[..4], &rows[4..]]));
        let (x, y) = (5.5f64, 3.0 + f64::from(1e-3f32));
        let length = x.hypot(y);
        assert_eq!(whole, [(x / length) as f32, (y / length) as f32]);
    }

    #[test]
    fn what_has_no_direction_is_refused() {
        for row in [[0.0, 0.0], [f32::NAN, 1.0], [f32::INFINITY, 1.0]] {
            let mut pool = Pool::default();
            pool.add(&row, 1);
            assert_eq!(pool.finish(), Err(NotFinite), "{row:?}");
        }
    }
}
