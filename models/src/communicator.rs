//! Sums over the devices that share each layer's work, for devices that are threads of this process.
//!
//! Sums are taken in the order of the ranks, by every rank for itself: all hold the same bits, and a row's sum
//! depends on that row alone. Nothing is allocated once the largest sum has been seen. Knows no model.
//!
//! Invariant: all ranks ask for the same things in the same order. Between two meetings a rank writes only its own
//! slot, and slots alternate, so that nobody overwrites what another still reads.

mod bell;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

pub(crate) use bell::Bell;

/// A device failed, so that what the others wait for will not come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("another device of the group failed")]
pub(crate) struct Aborted;

/// What the ranks of one group exchange values through.
pub(crate) struct Communicator {
    /// Each rank's values, by turns.
    slots: Vec<[RwLock<Vec<f32>>; 2]>,
    /// Ranks that have come to the next meeting.
    arrived: AtomicUsize,
    /// Rings when a meeting is complete, and when one is given up.
    met: Bell,
    aborted: AtomicBool,
}

impl Communicator {
    pub(crate) fn new(ranks: usize) -> Self {
        Self {
            slots: (0..ranks).map(|_| Default::default()).collect(),
            arrived: AtomicUsize::new(0),
            met: Bell::default(),
            aborted: AtomicBool::new(false),
        }
    }

    pub(crate) fn ranks(&self) -> usize {
        self.slots.len()
    }

    /// Adds up `data` of all ranks, element by element, and leaves the sum with each.
    ///
    /// # Errors
    /// When a rank has given up.
    pub(crate) fn all_reduce(&self, rank: usize, data: &mut [f32]) -> Result<(), Aborted> {
        let turn = self.exchange(rank, data)?;
        for other in 0..self.ranks() {
            let slot = self.read(other, turn);
            assert_eq!(slot.len(), data.len(), "rank {other} adds up something else; this is a bug");
            if other == 0 {
                data.copy_from_slice(&slot);
            } else {
                data.iter_mut().zip(slot.iter()).for_each(|(sum, value)| *sum += value);
            }
        }
        Ok(())
    }

    /// Puts the columns that the ranks have of `rows` rows side by side into rank 0's `whole`; the others' is
    /// left as it is.
    ///
    /// # Errors
    /// When a rank has given up.
    pub(crate) fn gather(
        &self,
        rank: usize,
        part: &[f32],
        rows: usize,
        whole: &mut [f32],
    ) -> Result<(), Aborted> {
        let turn = self.exchange(rank, part)?;
        if rank != 0 {
            return Ok(());
        }
        let (width, mut first) = (whole.len() / rows, 0);
        for other in 0..self.ranks() {
            let slot = self.read(other, turn);
            let columns = slot.len() / rows;
            for (to, from) in whole.chunks_exact_mut(width).zip(slot.chunks_exact(columns)) {
                to[first..first + columns].copy_from_slice(from);
            }
            first += columns;
        }
        assert_eq!(first, width, "the ranks' columns are the whole; this is a bug");
        Ok(())
    }

    /// Lets all ranks that wait, and that come later, give up.
    pub(crate) fn abort(&self) {
        self.aborted.store(true, Ordering::SeqCst);
        self.met.ring();
    }

    /// Forgets what was given up; for when no rank is at work.
    pub(crate) fn reset(&self) {
        self.arrived.store(0, Ordering::SeqCst);
        self.aborted.store(false, Ordering::SeqCst);
    }

    /// Shows `data` to the others, and waits until all have shown theirs. Returns which slots they are in.
    fn exchange(&self, rank: usize, data: &[f32]) -> Result<usize, Aborted> {
        // The same for all, as it rings only when all have come.
        let meeting = self.met.count();
        let turn = meeting as usize % 2;
        {
            let mut slot = self.slots[rank][turn].write().unwrap_or_else(PoisonError::into_inner);
            slot.clear();
            slot.extend_from_slice(data);
        }
        if self.aborted.load(Ordering::SeqCst) {
            return Err(Aborted);
        }
        if self.arrived.fetch_add(1, Ordering::SeqCst) + 1 == self.ranks() {
            self.arrived.store(0, Ordering::SeqCst);
            self.met.ring();
        } else {
            self.met.wait_past(meeting);
        }
        if self.aborted.load(Ordering::SeqCst) { Err(Aborted) } else { Ok(turn) }
    }

    fn read(&self, rank: usize, turn: usize) -> RwLockReadGuard<'_, Vec<f32>> {
        // A slot is only ever wholly written by its rank before the others come to read it.
        self.slots[rank][turn].read().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// Each rank's values of a round: large and small, so that another order of sums shows.
    fn values(rank: usize, round: usize, len: usize) -> Vec<f32> {
        let exponent = |i: usize| ((i * 7 + rank * 5 + round * 3) % 40) as i32 - 20;
        (0..len)
            .map(|i| 1.7f32.powi(exponent(i)) * if (i + rank).is_multiple_of(3) { -1.0 } else { 1.0 })
            .collect()
    }

    #[test]
    fn all_ranks_get_the_sum_in_the_order_of_ranks() {
        for ranks in [1, 2, 3, 5] {
            let communicator = Communicator::new(ranks);
            thread::scope(|scope| {
                for rank in 0..ranks {
                    let communicator = &communicator;
                    scope.spawn(move || {
                        for round in 0..300 {
                            let len = [1, 17, 640][round % 3];
                            let mut data = values(rank, round, len);
                            communicator.all_reduce(rank, &mut data).expect("nobody gives up");
                            let mut expected = values(0, round, len);
                            for other in 1..ranks {
                                let other = values(other, round, len);
                                expected.iter_mut().zip(other).for_each(|(sum, value)| *sum += value);
                            }
                            assert!(data == expected, "rank {rank} of {ranks}, round {round}");
                        }
                    });
                }
            });
        }
    }

    #[test]
    fn columns_are_gathered_side_by_side() {
        let communicator = Communicator::new(3);
        let part = |rank: usize| -> Vec<f32> {
            let columns = rank + 1;
            (0..2 * columns).map(|i| (100 * rank + 10 * (i / columns) + i % columns) as f32).collect()
        };
        let whole = thread::scope(|scope| {
            for rank in [1, 2] {
                let communicator = &communicator;
                scope.spawn(move || communicator.gather(rank, &part(rank), 2, &mut []));
            }
            let mut whole = vec![0.0; 12];
            communicator.gather(0, &part(0), 2, &mut whole).expect("nobody gives up");
            whole
        });
        assert_eq!(whole, [0., 100., 101., 200., 201., 202., 10., 110., 111., 210., 211., 212.]);
    }

    #[test]
    fn a_rank_that_gives_up_frees_those_that_wait_and_the_next_step_works() {
        let communicator = Communicator::new(3);
        for round in 0..200 {
            communicator.reset();
            let results = thread::scope(|scope| {
                let ranks = [0, 1, 2].map(|rank| {
                    let communicator = &communicator;
                    scope.spawn(move || {
                        for meeting in 0..6 {
                            if rank == round % 3 && meeting == round % 5 {
                                communicator.abort();
                                return Err(Aborted);
                            }
                            communicator.all_reduce(rank, &mut [1.0; 8])?;
                        }
                        Ok(())
                    })
                });
                ranks.map(|rank| rank.join().expect("no panic"))
            });
            assert_eq!(results, [Err(Aborted); 3]);
            communicator.reset();
            thread::scope(|scope| {
                for rank in 0..3 {
                    let communicator = &communicator;
                    scope.spawn(move || {
                        let mut data = [rank as f32; 4];
                        assert_eq!(communicator.all_reduce(rank, &mut data), Ok(()));
                        assert_eq!(data, [3.0; 4]);
                    });
                }
            });
        }
    }
}
