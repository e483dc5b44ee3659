//! How a model is cut among devices that compute each layer together.
//!
//! A device has some of the heads and some of each MLP's width: the rows of the matrices that make them, and the
//! columns of those that read them, whose partial sums are then added up over the devices. Knows sizes alone.

use std::ops::Range;

/// One of several devices, in the order in which sums are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rank {
    pub index: usize,
    /// How many devices there are.
    pub of: usize,
}

/// What a device has of a matrix (out_features, in_features).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Part {
    Whole,
    /// These outputs, with their biases.
    Rows(Range<usize>),
    /// What these inputs add to all outputs. One device alone adds the bias.
    Columns {
        columns: Range<usize>,
        with_bias: bool,
    },
}

impl Rank {
    /// A device that has everything.
    pub(crate) const ALONE: Self = Self { index: 0, of: 1 };

    pub(crate) fn all(of: usize) -> impl Iterator<Item = Self> {
        (0..of).map(move |index| Self { index, of })
    }

    /// Its share of `total`; shares differ by at most one, and follow each other.
    pub(crate) fn share(self, total: usize) -> Range<usize> {
        let start = |index: usize| index * total / self.of;
        start(self.index)..start(self.index + 1)
    }

    /// Its share of `total` in whole units; the last unit may be cut short.
    pub(crate) fn share_in(self, total: usize, unit: usize) -> Range<usize> {
        let units = self.share(total.div_ceil(unit));
        units.start * unit..(units.end * unit).min(total)
    }

    pub(crate) fn rows(self, total: usize) -> Part {
        if self.of == 1 { Part::Whole } else { Part::Rows(self.share(total)) }
    }

    /// These inputs of a matrix whose outputs all devices add up.
    pub(crate) fn columns(self, columns: Range<usize>) -> Part {
        if self.of == 1 { Part::Whole } else { Part::Columns { columns, with_bias: self.index == 0 } }
    }
}

/// What of `size` has no remainder: "1 and 3".
pub(crate) fn divisors(size: usize) -> String {
    let divisors: Vec<String> =
        (1..=size).filter(|n| size.is_multiple_of(*n)).map(|n| n.to_string()).collect();
    match divisors.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, others)) => format!("{} and {last}", others.join(", ")),
        None => "none".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_follow_each_other_in_whole_units() {
        for of in 1..6 {
            for (total, unit) in [(64, 32), (96, 32), (1536, 32), (100, 32), (7, 1), (49_152, 1)] {
                let mut next = 0;
                for rank in Rank::all(of) {
                    let share = rank.share_in(total, unit);
                    assert_eq!(share.start, next, "{rank:?} of {total}");
                    assert!(share.end == total || share.end % unit == 0, "{rank:?} of {total}: {share:?}");
                    next = share.end;
                }
                assert_eq!(next, total);
            }
        }
    }

    #[test]
    fn divisors_are_listed() {
        assert_eq!(["1", "1 and 3", "1, 2 and 4"].map(String::from), [1, 3, 4].map(divisors));
    }
}
