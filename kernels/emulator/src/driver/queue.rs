//! Streams as queues: entries are run, in order, when somebody waits for them.
//!
//! An entry may have to wait for a point of another stream, or for the other ranks of a collective; then
//! the stream that holds it up is run first. Whoever waits does the work, so two threads may run two
//! streams at once, and a stream is never run by two.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, MutexGuard};

use super::codes::{Error, Result};
use super::collective::{CliqueId, Meeting};
use super::perform::{Failure, Op};
use super::state::State;
use super::{Driver, tell};

/// Entries a stream holds before enqueueing one more waits for it, as on a device.
const QUEUE_MAX: usize = 1024;

/// A stream of this machine. The first few numbers are the devices' legacy default streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct StreamId(pub(super) u64);

impl StreamId {
    /// The default stream of a device that all threads share.
    pub(super) fn legacy(device: usize) -> Self {
        Self(device as u64)
    }

    /// A number that no other stream has.
    pub(super) fn number(self) -> u64 {
        self.0
    }
}

/// What a stream has done once its first `position` entries are done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Point {
    pub(super) stream: StreamId,
    pub(super) position: u64,
}

/// One entry of a stream.
pub(super) enum Entry {
    Work(Op),
    Wait(Point),
    /// The call number `number` of `rank` in a clique.
    Meet {
        clique: CliqueId,
        number: u64,
        rank: usize,
    },
}

/// A queue of work on one device.
pub(super) struct Stream {
    pub(super) device: usize,
    /// Ordered with the legacy default stream.
    pub(super) blocking: bool,
    pub(super) flags: u32,
    pub(super) priority: i32,
    /// The capture that collects this stream's entries.
    pub(super) capture: Option<u64>,
    /// Destroyed by its owner; forgotten when its work is done.
    pub(super) destroyed: bool,
    queue: VecDeque<Entry>,
    enqueued: u64,
    completed: u64,
    /// Somebody runs the first entry.
    busy: bool,
}

impl Stream {
    pub(super) fn new(device: usize, blocking: bool) -> Self {
        Self {
            device,
            blocking,
            flags: u32::from(!blocking),
            priority: 0,
            capture: None,
            destroyed: false,
            queue: VecDeque::new(),
            enqueued: 0,
            completed: 0,
            busy: false,
        }
    }

    fn is_done(&self) -> bool {
        self.completed == self.enqueued
    }

    fn push(&mut self, entry: Entry) {
        self.queue.push_back(entry);
        self.enqueued += 1;
    }

    fn pop(&mut self) {
        self.queue.pop_front().expect("the first entry was just done");
        self.completed += 1;
        self.busy = false;
    }
}

/// Whether a caller stays until the work is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    Wait,
    /// Does what can be done now.
    Try,
}

/// What there is to do for a stream.
enum Next {
    /// An entry without work was done.
    Moved,
    /// The first entry of the stream.
    Run(StreamId, Op),
    /// All ranks have come.
    Meet(CliqueId, u64),
    /// Somebody else must come first.
    Blocked,
}

impl State {
    /// Where the stream ends now.
    pub(super) fn tail(&self, stream: StreamId) -> Point {
        let position = self.streams.get(&stream).map_or(0, |stream| stream.enqueued);
        Point { stream, position }
    }

    /// Where all streams of the device end now.
    pub(super) fn tails(&self, device: usize) -> Vec<Point> {
        let of_device = self.streams.iter().filter(|(_, stream)| stream.device == device);
        of_device.map(|(&stream, _)| self.tail(stream)).collect()
    }

    /// Whether the stream has got there. One that is forgotten has.
    pub(super) fn passed(&self, point: Point) -> bool {
        self.streams.get(&point.stream).is_none_or(|stream| stream.completed >= point.position)
    }

    /// Puts work at the end of the stream, behind what it is implicitly ordered with.
    pub(super) fn push(&mut self, id: StreamId, entry: Entry) -> Point {
        for point in self.implicit_order(id) {
            self.stream_mut(id).push(Entry::Wait(point));
        }
        self.stream_mut(id).push(entry);
        self.tail(id)
    }

    /// The ends of the streams that the legacy default stream, or a stream it blocks, must wait for.
    pub(super) fn implicit_order(&self, id: StreamId) -> Vec<Point> {
        let stream = &self.streams[&id];
        let legacy = StreamId::legacy(stream.device);
        let ordered = |other: &StreamId, with: &Stream| {
            with.device == stream.device
                && with.blocking
                && !with.is_done()
                && (id == legacy) != (*other == legacy)
        };
        if !stream.blocking {
            return Vec::new();
        }
        self.streams
            .iter()
            .filter(|(other, with)| ordered(other, with))
            .map(|(&other, _)| self.tail(other))
            .collect()
    }

    pub(super) fn stream_mut(&mut self, id: StreamId) -> &mut Stream {
        self.streams.get_mut(&id).expect("a stream is looked up before it is used")
    }

    /// What to do so that the stream moves on.
    fn next(&mut self, id: StreamId, asked: &mut BTreeSet<StreamId>) -> Next {
        if !asked.insert(id) {
            return Next::Blocked;
        }
        let Some(stream) = self.streams.get(&id) else { return Next::Blocked };
        if stream.busy {
            return Next::Blocked;
        }
        match stream.queue.front() {
            None => Next::Blocked,
            Some(Entry::Work(op)) => {
                let op = op.clone();
                self.stream_mut(id).busy = true;
                Next::Run(id, op)
            }
            Some(&Entry::Wait(point)) if self.passed(point) => {
                self.done(id);
                Next::Moved
            }
            Some(&Entry::Wait(point)) => self.next(point.stream, asked),
            Some(&Entry::Meet { clique, number, rank }) => {
                self.next_meeting(id, (clique, number, rank), asked)
            }
        }
    }

    fn next_meeting(
        &mut self,
        id: StreamId,
        (clique, number, rank): (CliqueId, u64, usize),
        asked: &mut BTreeSet<StreamId>,
    ) -> Next {
        match self.arrive(clique, number, rank) {
            Meeting::Complete(streams) => {
                for stream in streams {
                    self.stream_mut(stream).busy = true;
                }
                Next::Meet(clique, number)
            }
            Meeting::Waiting(streams) => {
                for stream in streams {
                    match self.next(stream, asked) {
                        Next::Blocked => {}
                        next => return next,
                    }
                }
                Next::Blocked
            }
            Meeting::Over => {
                self.done(id);
                Next::Moved
            }
        }
    }

    /// The first entry of the stream is done.
    pub(super) fn done(&mut self, id: StreamId) {
        let stream = self.stream_mut(id);
        stream.pop();
        if stream.destroyed && stream.is_done() {
            self.streams.remove(&id);
        }
    }

    /// Drops all that the device still had to do: after a fault nothing more is run.
    pub(super) fn abandon(&mut self, device: usize) {
        for stream in self.streams.values_mut().filter(|stream| stream.device == device) {
            // An entry that somebody runs is taken out by them.
            let kept = usize::from(stream.busy);
            stream.queue.truncate(kept);
            stream.completed = stream.enqueued - stream.queue.len() as u64;
        }
        self.streams.retain(|_, stream| !(stream.destroyed && stream.is_done()));
    }
}

impl Driver {
    /// Puts an entry into the stream, or into the capture that collects it.
    pub(super) fn enqueue(&self, id: StreamId, op: Op) -> Result<()> {
        let mut state = self.lock();
        if state.captured(id, &op)? {
            return Ok(());
        }
        state.healthy(state.streams[&id].device)?;
        let entry = state.entry(id, op)?;
        state.push(id, entry);
        self.pushed(state, id)
    }

    /// Wakes whoever waits for more entries, and runs them where that is due.
    pub(super) fn pushed(&self, state: MutexGuard<'_, State>, id: StreamId) -> Result<()> {
        let stream = &state.streams[&id];
        let (device, full, tail) = (stream.device, stream.queue.len() > QUEUE_MAX, state.tail(id));
        drop(state);
        self.changed.notify_all();
        if self.config.eager || full {
            self.reach(tail, Patience::Try);
            self.lock().healthy(device)?;
        }
        Ok(())
    }

    /// Runs what must be run until the stream has got to the point; false where others must come first.
    pub(super) fn reach(&self, point: Point, patience: Patience) -> bool {
        let mut state = self.lock();
        loop {
            if state.passed(point) {
                return true;
            }
            match state.next(point.stream, &mut BTreeSet::new()) {
                Next::Moved => self.changed.notify_all(),
                Next::Run(stream, op) => {
                    let device = Arc::clone(&self.devices[state.streams[&stream].device]);
                    drop(state);
                    let outcome = self.perform(&device, &op);
                    state = self.lock();
                    state.done(stream);
                    self.settle(&mut state, &[device.ordinal], outcome);
                }
                Next::Meet(clique, number) => {
                    let (calls, streams) = state.take_meeting(clique, number);
                    let devices: Vec<usize> = calls.iter().map(|call| call.device).collect();
                    drop(state);
                    let outcome = self.perform_collective(&calls);
                    state = self.lock();
                    for stream in streams {
                        state.done(stream);
                    }
                    self.settle(&mut state, &devices, outcome);
                }
                Next::Blocked if patience == Patience::Try => return false,
                Next::Blocked => {
                    state = self.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
                }
            }
        }
    }

    fn settle(&self, state: &mut State, devices: &[usize], outcome: std::result::Result<(), Failure>) {
        if let Err(failure) = outcome {
            let Failure { error, text } = failure;
            tell(format_args!("{}: {text}", error.name().to_string_lossy()));
            for &device in devices {
                state.faults[device].get_or_insert(error);
                state.abandon(device);
            }
        }
        self.changed.notify_all();
    }

    /// Waits for the point, then says whether the device still works.
    pub(super) fn wait(&self, device: usize, point: Point) -> Result<()> {
        self.reach(point, Patience::Wait);
        self.lock().healthy(device)
    }

    /// Waits for all that the device has to do.
    pub(super) fn wait_device(&self, device: usize) -> Result<()> {
        let tails = self.lock().tails(device);
        for tail in tails {
            self.reach(tail, Patience::Wait);
        }
        let mut state = self.lock();
        state.pools[device].trim();
        state.healthy(device)
    }

    /// One try to get to the point.
    ///
    /// # Errors
    /// [`Error::NOT_READY`] where it had not been reached when this was called.
    pub(super) fn query(&self, device: usize, point: Point) -> Result<()> {
        let state = self.lock();
        state.healthy(device)?;
        if state.passed(point) {
            return Ok(());
        }
        drop(state);
        self.reach(point, Patience::Try);
        self.lock().healthy(device)?;
        Err(Error::NOT_READY)
    }
}
