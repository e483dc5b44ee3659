//! Ranks that carry out the same orders, each in a thread of its own; the first is the caller's.
//!
//! Knows nothing of what is ordered. Invariants: an order has ended on all ranks when [`Group::run`] returns;
//! one that fails on a rank, or panics there, fails on all, and the next order finds them ready.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::{self, JoinHandle};

use crate::batch::ForwardError;
use crate::communicator::{Bell, Communicator};

/// What a rank does with an order `O`.
pub(super) type Work<O> = Box<dyn FnMut(&O) -> Result<(), ForwardError> + Send>;

/// What the ranks of a group wait for each other at.
pub(super) trait Meetings: Send + Sync {
    /// Forgets what was given up; for when no rank is at work.
    fn reset(&self);

    /// Lets all ranks that wait, and that come later, give up.
    fn abort(&self);
}

impl Meetings for Communicator {
    fn reset(&self) {
        self.reset();
    }

    fn abort(&self) {
        self.abort();
    }
}

/// The ranks after the first.
pub(super) struct Group<O> {
    shared: Arc<Shared<O>>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared<O> {
    meetings: Arc<dyn Meetings>,
    /// Written while no rank is at work.
    order: RwLock<O>,
    /// Rings for each order.
    given: Bell,
    /// Ranks whose thread has not ended the order.
    pending: AtomicUsize,
    /// Rings when none is pending.
    done: Bell,
    /// Of the rank that failed first.
    failure: Mutex<Option<ForwardError>>,
    stop: AtomicBool,
}

impl<O: Default + Send + Sync + 'static> Group<O> {
    /// `others` is the work of ranks 1 and so on.
    ///
    /// # Panics
    /// When the system refuses a thread.
    pub(super) fn new(meetings: Arc<impl Meetings + 'static>, others: Vec<Work<O>>) -> Self {
        let shared = Arc::new(Shared {
            meetings,
            order: RwLock::default(),
            given: Bell::default(),
            pending: AtomicUsize::new(0),
            done: Bell::default(),
            failure: Mutex::default(),
            stop: AtomicBool::new(false),
        });
        let spawn = |(index, work)| {
            let shared = Arc::clone(&shared);
            let name = format!("obol-rank-{}", index + 1);
            let spawned = thread::Builder::new().name(name).spawn(move || shared.serve(index + 1, work));
            spawned.expect("the system refused a thread")
        };
        let threads = others.into_iter().enumerate().map(spawn).collect();
        Self { shared, threads }
    }

    /// Gives all ranks the order that `write` makes of the last one, does `first` as the first rank's part, and
    /// returns when all have ended.
    ///
    /// # Errors
    /// The first failure of a rank; a panic is one.
    pub(super) fn run(
        &mut self,
        write: impl FnOnce(&mut O),
        first: impl FnOnce() -> Result<(), ForwardError>,
    ) -> Result<(), ForwardError> {
        let shared = &*self.shared;
        shared.meetings.reset();
        write(&mut shared.order.write().unwrap_or_else(PoisonError::into_inner));
        shared.pending.store(self.threads.len(), Ordering::SeqCst);
        let mut seen = shared.done.count();
        shared.given.ring();
        shared.note(0, catch_unwind(AssertUnwindSafe(first)));
        while shared.pending.load(Ordering::SeqCst) > 0 {
            seen = shared.done.wait_past(seen);
        }
        shared.failure.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)
    }
}

impl<O> Drop for Group<O> {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.given.ring();
        for thread in self.threads.drain(..) {
            // A rank catches its work's panics.
            thread.join().expect("a rank ends by itself; this is a bug");
        }
    }
}

impl<O> Shared<O> {
    /// A rank's life.
    fn serve(&self, rank: usize, mut work: Work<O>) {
        let mut seen = 0;
        loop {
            seen = self.given.wait_past(seen);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            let order = self.order.read().unwrap_or_else(PoisonError::into_inner);
            self.note(rank, catch_unwind(AssertUnwindSafe(|| work(&order))));
            drop(order);
            if self.pending.fetch_sub(1, Ordering::SeqCst) == 1 {
                self.done.ring();
            }
        }
    }

    /// Keeps the first failure, and frees the ranks that wait for this one.
    fn note(&self, rank: usize, result: thread::Result<Result<(), ForwardError>>) {
        let failure = match result {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error,
            Err(panic) => ForwardError(format!("rank {rank} panicked: {}", message(&*panic))),
        };
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(failure);
        self.meetings.abort();
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a message")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which rank does what at which meeting.
    #[derive(Debug, Default, Clone, Copy)]
    enum Mishap {
        #[default]
        None,
        Panic(usize, usize),
        Error(usize, usize),
    }

    const MEETINGS: usize = 5;

    fn work(
        communicator: &Communicator,
        rank: usize,
        mishap: Mishap,
        sums: &AtomicUsize,
    ) -> Result<(), ForwardError> {
        for meeting in 0..MEETINGS {
            match mishap {
                Mishap::Panic(who, at) if (who, at) == (rank, meeting) => panic!("a planted panic"),
                Mishap::Error(who, at) if (who, at) == (rank, meeting) => {
                    return Err(ForwardError(format!("planted at {rank}")));
                }
                _ => {}
            }
            let mut data = [1.0; 3];
            communicator.all_reduce(rank, &mut data)?;
            sums.fetch_add(data[0] as usize, Ordering::SeqCst);
        }
        Ok(())
    }

    #[test]
    fn what_fails_on_one_rank_fails_on_all_and_is_over_then() {
        let ranks = 3;
        let communicator = Arc::new(Communicator::new(ranks));
        let sums = Arc::new(AtomicUsize::new(0));
        let others = (1..ranks).map(|rank| -> Work<Mishap> {
            let (communicator, sums) = (Arc::clone(&communicator), Arc::clone(&sums));
            Box::new(move |mishap| work(&communicator, rank, *mishap, &sums))
        });
        let mut group = Group::new(Arc::clone(&communicator), others.collect());
        let mut run = |mishap| {
            sums.store(0, Ordering::SeqCst);
            let result = group.run(|order| *order = mishap, || work(&communicator, 0, mishap, &sums));
            (result.map_err(|error| error.0), sums.load(Ordering::SeqCst))
        };
        let good = (Ok(()), ranks * ranks * MEETINGS);
        for rank in 0..ranks {
            for meeting in 0..MEETINGS {
                let (result, sums) = run(Mishap::Panic(rank, meeting));
                assert_eq!(result, Err(format!("rank {rank} panicked: a planted panic")));
                assert!(sums <= ranks * ranks * meeting, "nobody goes on: {sums}");
                assert_eq!(run(Mishap::None), good);
                assert_eq!(run(Mishap::Error(rank, meeting)).0, Err(format!("planted at {rank}")));
                assert_eq!(run(Mishap::None), good);
            }
        }
    }
}
