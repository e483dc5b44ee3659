//! Stream capture: what streams would do is collected, not done.
//!
//! The order of the calls is one in which a graph's nodes can run, so nodes are kept in that order, each
//! with those it follows. What a node follows is only needed to find work that was never joined.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::thread::{self, ThreadId};

use super::Driver;
use super::allocate::Source;
use super::codes::{Error, Result};
use super::graph::{Graph, GraphMemory};
use super::perform::Op;
use super::queue::StreamId;
use super::state::State;

/// How a capture restricts what threads may do meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Global,
    ThreadLocal,
    Relaxed,
}

impl Mode {
    pub(super) fn from_code(code: u32) -> Result<Self> {
        match code {
            0 => Ok(Self::Global),
            1 => Ok(Self::ThreadLocal),
            2 => Ok(Self::Relaxed),
            _ => Err(Error::INVALID_VALUE),
        }
    }

    fn code(self) -> u32 {
        self as u32
    }
}

/// What a call does while a capture is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Safety {
    /// It has an effect that the capture does not see.
    Unsafe,
    /// It waits for a whole device, captured streams included.
    WaitsForDevice(usize),
}

/// What has been captured so far.
pub(super) struct Capture {
    origin: StreamId,
    device: usize,
    mode: Mode,
    thread: ThreadId,
    nodes: Vec<Node>,
    /// The nodes that the next one of each stream follows.
    frontiers: BTreeMap<StreamId, BTreeSet<usize>>,
    invalid: bool,
}

struct Node {
    op: Op,
    after: BTreeSet<usize>,
}

impl Capture {
    /// Whether all nodes come before the origin's end.
    fn is_joined(&self) -> bool {
        let mut open: Vec<usize> = self.frontiers[&self.origin].iter().copied().collect();
        let mut reached = vec![false; self.nodes.len()];
        while let Some(node) = open.pop() {
            if !std::mem::replace(&mut reached[node], true) {
                open.extend(&self.nodes[node].after);
            }
        }
        reached.into_iter().all(|reached| reached)
    }
}

thread_local! {
    static MODE: Cell<Mode> = const { Cell::new(Mode::Global) };
}

/// `cuThreadExchangeStreamCaptureMode`.
pub(super) fn exchange_mode(code: u32) -> Result<u32> {
    let mode = Mode::from_code(code)?;
    Ok(MODE.replace(mode).code())
}

impl State {
    /// Collects the operation where the stream is capturing.
    pub(super) fn captured(&mut self, id: StreamId, op: &Op) -> Result<bool> {
        let Some(capture) = self.streams[&id].capture else {
            self.check_legacy(id)?;
            return Ok(false);
        };
        let after = self.frontier(capture, id)?;
        let capture = self.captures.get_mut(&capture).expect("streams name captures that exist");
        let node = capture.nodes.len();
        capture.nodes.push(Node { op: op.clone(), after });
        capture.frontiers.insert(id, BTreeSet::from([node]));
        Ok(true)
    }

    /// The nodes that the next one of the stream follows.
    ///
    /// # Errors
    /// When the capture was invalidated.
    pub(super) fn frontier(&self, capture: u64, id: StreamId) -> Result<BTreeSet<usize>> {
        let capture = &self.captures[&capture];
        if capture.invalid {
            Err(Error::STREAM_CAPTURE_INVALIDATED)
        } else {
            Ok(capture.frontiers[&id].clone())
        }
    }

    /// The legacy default stream cannot be used while a stream that it waits for is capturing.
    pub(super) fn check_legacy(&mut self, id: StreamId) -> Result<()> {
        let device = self.streams[&id].device;
        if id != StreamId::legacy(device) {
            return Ok(());
        }
        let mut streams = self.streams.values();
        let capture =
            streams.find_map(|stream| stream.capture.filter(|_| stream.blocking && stream.device == device));
        match capture {
            Some(capture) => {
                self.invalidate(capture);
                Err(Error::STREAM_CAPTURE_IMPLICIT)
            }
            None => Ok(()),
        }
    }

    /// Nothing more can come of the capture.
    pub(super) fn invalidate(&mut self, capture: u64) {
        if let Some(capture) = self.captures.get_mut(&capture) {
            capture.invalid = true;
        }
    }

    /// Refuses a call that an ongoing capture forbids, and invalidates that capture.
    pub(super) fn check_safe(&mut self, safety: Safety) -> Result<()> {
        let thread = thread::current().id();
        let own_mode = MODE.get();
        let forbids = |capture: &Capture| match safety {
            Safety::WaitsForDevice(device) => capture.device == device,
            Safety::Unsafe => {
                let own =
                    capture.thread == thread && capture.mode != Mode::Relaxed && own_mode != Mode::Relaxed;
                own || (own_mode == Mode::Global && capture.mode == Mode::Global)
            }
        };
        let mut refused = false;
        for capture in self.captures.values_mut().filter(|capture| forbids(capture)) {
            capture.invalid = true;
            refused = true;
        }
        if refused { Err(Error::STREAM_CAPTURE_UNSUPPORTED) } else { Ok(()) }
    }

    /// A stream waits for an event that was recorded in a capture, and becomes part of it.
    pub(super) fn join(&mut self, id: StreamId, of: u64, frontier: &BTreeSet<usize>) -> Result<()> {
        let stream = &self.streams[&id];
        let (capturing, device) = (stream.capture, stream.device);
        if !self.captures.contains_key(&of) {
            return Err(Error::CAPTURED_EVENT);
        }
        if let Some(other) = capturing.filter(|&other| other != of) {
            self.invalidate(other);
            self.invalidate(of);
            return Err(Error::STREAM_CAPTURE_MERGE);
        }
        if id == StreamId::legacy(device) {
            self.invalidate(of);
            return Err(Error::STREAM_CAPTURE_IMPLICIT);
        }
        let capture = self.captures.get_mut(&of).expect("looked up above");
        if capture.invalid {
            return Err(Error::STREAM_CAPTURE_INVALIDATED);
        }
        capture.frontiers.entry(id).or_default().extend(frontier);
        self.stream_mut(id).capture = Some(of);
        Ok(())
    }
}

impl Driver {
    /// `cuStreamBeginCapture`.
    pub(super) fn begin_capture(&self, id: StreamId, mode: Mode) -> Result<()> {
        let mut state = self.lock();
        let (device, capturing) = (state.streams[&id].device, state.streams[&id].capture);
        if id == StreamId::legacy(device) {
            return Err(Error::STREAM_CAPTURE_UNSUPPORTED);
        }
        if capturing.is_some() {
            return Err(Error::ILLEGAL_STATE);
        }
        let handle = state.handle();
        let capture = Capture {
            origin: id,
            device,
            mode,
            thread: thread::current().id(),
            nodes: Vec::new(),
            frontiers: BTreeMap::from([(id, BTreeSet::new())]),
            invalid: false,
        };
        state.captures.insert(handle, capture);
        state.stream_mut(id).capture = Some(handle);
        Ok(())
    }

    /// `cuStreamEndCapture`. Gives the graph's handle.
    pub(super) fn end_capture(&self, id: StreamId) -> Result<u64> {
        let mut state = self.lock();
        let handle = state.streams[&id].capture.ok_or(Error::ILLEGAL_STATE)?;
        let capture = &state.captures[&handle];
        if capture.origin != id {
            state.invalidate(handle);
            return Err(Error::STREAM_CAPTURE_UNMATCHED);
        }
        if capture.mode != Mode::Relaxed && capture.thread != thread::current().id() {
            return Err(Error::STREAM_CAPTURE_WRONG_THREAD);
        }
        let capture = state.captures.remove(&handle).expect("looked up above");
        for stream in state.streams.values_mut().filter(|stream| stream.capture == Some(handle)) {
            stream.capture = None;
        }
        let owned: Vec<u64> = (state.allocations.iter())
            .filter(|(_, allocation)| allocation.source == Source::Capture(handle))
            .map(|(&address, _)| address)
            .collect();
        let memory = GraphMemory::new(Arc::clone(&self.devices[capture.device]), owned.clone());
        if capture.invalid || !capture.is_joined() {
            for address in owned {
                state.allocations.remove(&address);
            }
            let unjoined = !capture.invalid;
            return Err(if unjoined {
                Error::STREAM_CAPTURE_UNJOINED
            } else {
                Error::STREAM_CAPTURE_INVALIDATED
            });
        }
        let nodes = capture.nodes.into_iter().map(|node| node.op).collect();
        let graph = state.handle();
        state.graphs.insert(graph, Graph::new(nodes, Arc::new(memory)));
        Ok(graph)
    }

    /// Status code of `cuStreamIsCapturing` and the capture's own number.
    pub(super) fn capture_status(&self, id: StreamId) -> Result<(u32, u64)> {
        let state = self.lock();
        let stream = &state.streams[&id];
        let blocked = |other: &super::queue::Stream| {
            other.device == stream.device && other.blocking && other.capture.is_some()
        };
        if id == StreamId::legacy(stream.device) && state.streams.values().any(blocked) {
            return Err(Error::STREAM_CAPTURE_IMPLICIT);
        }
        Ok(match stream.capture {
            None => (0, 0),
            Some(capture) if state.captures[&capture].invalid => (2, capture),
            Some(capture) => (1, capture),
        })
    }

    /// Refuses what cannot be done to a stream that is capturing, and invalidates its capture.
    pub(super) fn check_not_capturing(&self, id: StreamId) -> Result<()> {
        let mut state = self.lock();
        match state.streams[&id].capture {
            Some(capture) => {
                state.invalidate(capture);
                Err(Error::STREAM_CAPTURE_UNSUPPORTED)
            }
            None => Ok(()),
        }
    }
}
