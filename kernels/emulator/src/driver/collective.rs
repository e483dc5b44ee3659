//! Collectives: entries of several streams that are done together, once all ranks have come.

use std::collections::BTreeMap;
use std::ptr::{with_exposed_provenance, with_exposed_provenance_mut};

use half::{bf16, f16};

use super::codes::Error;
use super::perform::{Failure, Op};
use super::queue::{Entry, StreamId};
use super::state::State;
use super::{Driver, tell};
use crate::nccl::Communicator;

/// Handle of a clique.
pub(crate) type CliqueId = u64;

/// Cliques by handle.
pub(crate) type Cliques = BTreeMap<CliqueId, Clique>;
/// Ranks by handle.
pub(crate) type Members = BTreeMap<u64, Communicator>;

/// Ranks that call collectives together.
#[derive(Default)]
pub(crate) struct Clique {
    /// The device of each rank that has joined.
    pub(crate) devices: Vec<Option<usize>>,
    /// Calls each rank has made.
    calls: Vec<u64>,
    /// Calls that not all ranks have made or come to, by number.
    open: BTreeMap<u64, Vec<Option<Arrival>>>,
    /// A rank gave up: nobody waits for another any more.
    aborted: bool,
}

#[derive(Clone, Copy)]
struct Arrival {
    call: Call,
    stream: StreamId,
    /// The entry is first in its stream.
    ready: bool,
}

/// One rank's part in a collective.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) clique: CliqueId,
    pub(crate) rank: usize,
    pub(crate) device: usize,
    /// Address of what the rank gives.
    pub(crate) send: u64,
    /// Address of what it gets.
    pub(crate) receive: u64,
    /// Elements, as the shape counts them.
    pub(crate) count: usize,
    pub(crate) element: Element,
    pub(crate) shape: Shape,
}

/// What goes from whom to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// `count` elements each, reduced to `count` for all.
    AllReduce(Reduction),
    /// `count` elements each, reduced to `count` for the root.
    Reduce(Reduction, usize),
    /// `count` elements of the root for all.
    Broadcast(usize),
    /// `count` elements each, one behind the other for all.
    AllGather,
    /// `count` elements for each rank, reduced.
    ReduceScatter(Reduction),
}

/// How elements of the ranks become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reduction {
    Sum,
    Product,
    Maximum,
    Minimum,
    Average,
}

/// Type of elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Element {
    I8,
    U8,
    I32,
    U32,
    I64,
    U64,
    F16,
    F32,
    F64,
    Bf16,
}

impl Element {
    fn bytes(self) -> usize {
        match self {
            Self::I8 | Self::U8 => 1,
            Self::F16 | Self::Bf16 => 2,
            Self::I32 | Self::U32 | Self::F32 => 4,
            Self::I64 | Self::U64 | Self::F64 => 8,
        }
    }
}

/// How far a collective is.
pub(super) enum Meeting {
    /// All have come, in these streams.
    Complete(Vec<StreamId>),
    /// These streams have calls that others wait for.
    Waiting(Vec<StreamId>),
    /// A rank gave up, or all have left: it will not be done.
    Over,
}

impl Clique {
    pub(crate) fn of_size(size: usize) -> Self {
        Self { devices: vec![None; size], calls: vec![0; size], open: Default::default(), aborted: false }
    }
}

impl State {
    /// An operation as an entry of a stream. Collectives are numbered here, in the order of their calls.
    pub(super) fn entry(&mut self, stream: StreamId, op: Op) -> super::Result<Entry> {
        let Op::Collective(call) = op else { return Ok(Entry::Work(op)) };
        let clique = self.cliques.get_mut(&call.clique).ok_or(Error::INVALID_HANDLE)?;
        let number = clique.calls[call.rank];
        clique.calls[call.rank] += 1;
        let size = clique.devices.len();
        let arrivals = clique.open.entry(number).or_insert_with(|| vec![None; size]);
        arrivals[call.rank] = Some(Arrival { call, stream, ready: false });
        Ok(Entry::Meet { clique: call.clique, number, rank: call.rank })
    }

    /// A rank's entry is the first of its stream.
    pub(super) fn arrive(&mut self, clique: CliqueId, number: u64, rank: usize) -> Meeting {
        let Some(clique) = self.cliques.get_mut(&clique).filter(|clique| !clique.aborted) else {
            return Meeting::Over;
        };
        let Some(arrivals) = clique.open.get_mut(&number) else { return Meeting::Waiting(Vec::new()) };
        if let Some(own) = &mut arrivals[rank] {
            own.ready = true;
        }
        if arrivals.iter().all(|arrival| arrival.is_some_and(|arrival| arrival.ready)) {
            return Meeting::Complete(arrivals.iter().flatten().map(|arrival| arrival.stream).collect());
        }
        Meeting::Waiting(
            arrivals.iter().flatten().filter(|late| !late.ready).map(|late| late.stream).collect(),
        )
    }

    /// The calls of a complete meeting, by rank, and their streams.
    pub(super) fn take_meeting(&mut self, clique: CliqueId, number: u64) -> (Vec<Call>, Vec<StreamId>) {
        let clique = self.cliques.get_mut(&clique).expect("a clique with entries in streams lives");
        let arrivals = clique.open.remove(&number).expect("a meeting is taken once");
        arrivals.into_iter().flatten().map(|arrival| (arrival.call, arrival.stream)).unzip()
    }
}

impl Driver {
    /// Puts a rank's part of a collective into the stream of a handle.
    pub(crate) fn call(&self, call: Call, stream: u64) -> super::Result<()> {
        let stream = self.stream(stream)?;
        if self.stream_properties(stream).0 != call.device {
            tell(format_args!(
                "rank {} of device {} calls on another device's stream",
                call.rank, call.device
            ));
            return Err(Error::INVALID_HANDLE);
        }
        self.enqueue(stream, Op::Collective(call))
    }

    /// Gives the cliques, their members and a fresh handle to `change`.
    pub(crate) fn with_cliques<T>(&self, change: impl FnOnce(&mut Cliques, &mut Members, u64) -> T) -> T {
        let mut state = self.lock();
        let handle = state.handle();
        let State { cliques, communicators, .. } = &mut *state;
        change(cliques, communicators, handle)
    }

    /// Lets all ranks of a clique go on without what they wait for.
    pub(crate) fn give_up(&self, clique: CliqueId) {
        if let Some(clique) = self.lock().cliques.get_mut(&clique) {
            clique.aborted = true;
        }
        self.changed.notify_all();
    }

    /// Does a collective for all ranks; `calls` are in the order of ranks.
    pub(super) fn perform_collective(&self, calls: &[Call]) -> Result<(), Failure> {
        let _spans: Vec<_> = calls.iter().map(|call| self.devices[call.device].activity.begin()).collect();
        let _holds: Vec<_> = self.devices.iter().map(|device| device.memory.hold()).collect();
        let (first, size) = (calls[0], calls.len());
        let same = |call: &&Call| {
            (call.count, call.element, call.shape) != (first.count, first.element, first.shape)
        };
        if let Some(other) = calls.iter().find(same) {
            let text = format!("ranks disagree on a collective: {first:?} and {other:?}");
            return Err(Failure { error: Error::LAUNCH_FAILED, text });
        }
        let bytes = first.count * first.element.bytes();
        let (sent, received) = match first.shape {
            Shape::AllReduce(_) | Shape::Reduce(..) | Shape::Broadcast(_) => (bytes, bytes),
            Shape::AllGather => (bytes, bytes * size),
            Shape::ReduceScatter(_) => (bytes * size, bytes),
        };
        let root = match first.shape {
            Shape::Reduce(_, root) | Shape::Broadcast(root) => Some(root),
            _ => None,
        };
        let sends = |rank: usize| !matches!(first.shape, Shape::Broadcast(root) if root != rank);
        let receives = |rank: usize| !matches!(first.shape, Shape::Reduce(_, root) if root != rank);
        let mut given = Vec::with_capacity(size);
        for call in calls {
            given.push(if sends(call.rank) { self.read(call.send, sent)? } else { Vec::new() });
        }
        let result = match first.shape {
            Shape::Broadcast(_) => std::mem::take(&mut given[root.unwrap_or(0)]),
            Shape::AllGather => given.concat(),
            Shape::AllReduce(op) | Shape::Reduce(op, _) | Shape::ReduceScatter(op) => {
                reduce(&given, first.element, op)
            }
        };
        for call in calls.iter().filter(|call| receives(call.rank)) {
            let start = if received < result.len() { received * call.rank } else { 0 };
            self.write(call.receive, &result[start..start + received])?;
        }
        Ok(())
    }

    fn read(&self, address: u64, bytes: usize) -> Result<Vec<u8>, Failure> {
        self.on_device(address, bytes as u64)?;
        let start = with_exposed_provenance::<u8>(address as usize);
        // SAFETY: the range was checked and is held.
        Ok(unsafe { std::slice::from_raw_parts(start, bytes) }.to_vec())
    }

    fn write(&self, address: u64, data: &[u8]) -> Result<(), Failure> {
        self.on_device(address, data.len() as u64)?;
        let start = with_exposed_provenance_mut::<u8>(address as usize);
        // SAFETY: the range was checked and is held.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), start, data.len()) };
        Ok(())
    }
}

/// Reduces the ranks' bytes element by element, in the order of ranks.
fn reduce(given: &[Vec<u8>], element: Element, op: Reduction) -> Vec<u8> {
    macro_rules! reduce_as {
        ($type:ty, $wide:ty, $widen:expr, $narrow:expr, $operate:path) => {{
            const BYTES: usize = size_of::<$type>();
            let mut result = Vec::with_capacity(given[0].len());
            for at in (0..given[0].len()).step_by(BYTES) {
                let value = |data: &Vec<u8>| -> $wide {
                    let bytes = data[at..at + BYTES].try_into().expect("a whole element");
                    $widen(<$type>::from_le_bytes(bytes))
                };
                let mut all = given.iter().map(value);
                let first = all.next().expect("a clique has a rank");
                let sum = all.fold(first, |sum, next| $operate(op, sum, next));
                let sum = if op == Reduction::Average { sum / given.len() as $wide } else { sum };
                result.extend_from_slice(&<$type>::to_le_bytes($narrow(sum)));
            }
            result
        }};
    }
    match element {
        Element::I8 => reduce_as!(i8, i64, i64::from, |v| v as i8, integer),
        Element::U8 => reduce_as!(u8, i64, i64::from, |v| v as u8, integer),
        Element::I32 => reduce_as!(i32, i64, i64::from, |v| v as i32, integer),
        Element::U32 => reduce_as!(u32, i64, i64::from, |v| v as u32, integer),
        Element::I64 => reduce_as!(i64, i64, |v| v, |v| v, integer),
        Element::U64 => reduce_as!(u64, u64, |v| v, |v| v, unsigned),
        Element::F16 => reduce_as!(f16, f32, f32::from, f16::from_f32, single),
        Element::Bf16 => reduce_as!(bf16, f32, f32::from, bf16::from_f32, single),
        Element::F32 => reduce_as!(f32, f32, |v| v, |v| v, single),
        Element::F64 => reduce_as!(f64, f64, |v| v, |v| v, double),
    }
}

macro_rules! operation {
    ($name:ident, $type:ty, $add:expr, $multiply:expr) => {
        fn $name(op: Reduction, left: $type, right: $type) -> $type {
            match op {
                Reduction::Sum | Reduction::Average => $add(left, right),
                Reduction::Product => $multiply(left, right),
                Reduction::Maximum => left.max(right),
                Reduction::Minimum => left.min(right),
            }
        }
    };
}

operation!(integer, i64, i64::wrapping_add, i64::wrapping_mul);
operation!(unsigned, u64, u64::wrapping_add, u64::wrapping_mul);
operation!(single, f32, |l, r| l + r, |l, r| l * r);
operation!(double, f64, |l, r| l + r, |l, r| l * r);
