//! Decode steps as recorded graphs: one launch instead of hundreds, for each bucket of sequences and context.
//!
//! A graph's addresses and grids are fixed: a batch is padded to its bucket with rows that nobody asks for.

use obol_kernels::cuda::{DecodeBucket, Gpu, GpuError, Graph};

/// Batches over this are long enough on the device to hide their launches.
const SEQUENCES_MOST: usize = 256;

/// Recorded decode steps.
pub(super) struct Graphs {
    /// Ascending by sequences, then parts.
    recorded: Vec<(DecodeBucket, Graph)>,
}

impl Graphs {
    pub(super) fn none() -> Self {
        Self { recorded: Vec::new() }
    }

    /// Records `step` for each bucket of up to `sequences` sequences of up to `parts` parts of context, of which
    /// attention keeps `partials` in all.
    pub(super) fn record(
        gpu: &Gpu,
        sequences: usize,
        parts: usize,
        partials: usize,
        step: impl Fn(DecodeBucket) -> Result<(), GpuError>,
    ) -> Result<Self, GpuError> {
        let mut recorded = Vec::new();
        for sequences in sizes(sequences.min(SEQUENCES_MOST)) {
            for parts in lengths(parts).filter(|parts| sequences * parts <= partials) {
                let bucket = DecodeBucket { sequences, parts };
                recorded.push((bucket, gpu.capture(|| step(bucket))?));
            }
        }
        Ok(Self { recorded })
    }

    /// The smallest bucket that holds so many sequences of so many parts.
    pub(super) fn find(&self, sequences: usize, parts: usize) -> Option<(DecodeBucket, &Graph)> {
        let fits =
            |(bucket, _): &&(DecodeBucket, Graph)| bucket.sequences >= sequences && bucket.parts >= parts;
        self.recorded.iter().find(fits).map(|(bucket, graph)| (*bucket, graph))
    }

    pub(super) fn len(&self) -> usize {
        self.recorded.len()
    }
}

/// 1, 2, 4, 8, then by eights to 64 and by 32 above, and `most` itself.
fn sizes(most: usize) -> impl Iterator<Item = usize> {
    let next = |size: &usize| {
        Some(match *size {
            0..8 => size * 2,
            8..64 => size + 8,
            _ => size + 32,
        })
    };
    std::iter::successors(Some(1), next).take_while(move |size| *size < most).chain([most])
}

/// 1, 4, 16 and so on, and `most` itself.
fn lengths(most: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(1), |length| Some(length * 4))
        .take_while(move |length| *length < most)
        .chain([most])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_end_with_the_most_and_waste_less_than_half() {
        assert_eq!(sizes(1).collect::<Vec<_>>(), [1]);
        assert_eq!(sizes(6).collect::<Vec<_>>(), [1, 2, 4, 6]);
        assert_eq!(sizes(70).collect::<Vec<_>>(), [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 70]);
        assert_eq!(sizes(130).last(), Some(130));
        assert_eq!(lengths(1).collect::<Vec<_>>(), [1]);
        assert_eq!(lengths(20).collect::<Vec<_>>(), [1, 4, 16, 20]);
    }
}
