//! What a machine remembers between calls.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::thread::ThreadId;

use super::allocate::{Allocation, Pinned, Pool};
use super::capture::Capture;
use super::codes::{Error, Result};
use super::collective::{Cliques, Members};
use super::contexts::Context;
use super::event::Event;
use super::graph::{Graph, GraphExec};
use super::modules::{Loaded, Symbol};
use super::queue::{Stream, StreamId};

/// Everything that calls change, under one lock.
pub(crate) struct State {
    next_handle: u64,
    pub(super) contexts: BTreeMap<u64, Context>,
    /// How often each device's primary context is retained.
    pub(super) retained: Vec<u32>,
    /// The error of a kernel that failed on each device; it stays until the device is reset.
    pub(super) faults: Vec<Option<Error>>,
    pub(super) streams: BTreeMap<StreamId, Stream>,
    pub(super) thread_streams: HashMap<(ThreadId, usize), StreamId>,
    pub(super) events: BTreeMap<u64, Event>,
    pub(super) modules: BTreeMap<u64, Loaded>,
    pub(super) functions: BTreeMap<u64, Symbol>,
    pub(super) captures: BTreeMap<u64, Capture>,
    pub(super) graphs: BTreeMap<u64, Graph>,
    pub(super) execs: BTreeMap<u64, Arc<GraphExec>>,
    pub(super) allocations: BTreeMap<u64, Allocation>,
    pub(super) pinned: BTreeMap<u64, Pinned>,
    /// The default pool of each device.
    pub(super) pools: Vec<Pool>,
    pub(super) cliques: Cliques,
    pub(super) communicators: Members,
    /// Limits that were set, by device and number.
    pub(super) limits: BTreeMap<(usize, u32), usize>,
    pub(super) counts: Counts,
}

/// What was done so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Counts {
    pub(super) launches: u64,
    pub(super) bytes_up: u64,
    pub(super) bytes_down: u64,
    pub(super) bytes_between: u64,
    /// Held by contexts when they ended.
    pub(super) leaked_bytes: u64,
}

impl State {
    pub(super) fn new(devices: usize) -> Self {
        let mut state = Self {
            next_handle: 0x10000,
            contexts: BTreeMap::new(),
            retained: vec![0; devices],
            faults: vec![None; devices],
            streams: BTreeMap::new(),
            thread_streams: HashMap::new(),
            events: BTreeMap::new(),
            modules: BTreeMap::new(),
            functions: BTreeMap::new(),
            captures: BTreeMap::new(),
            graphs: BTreeMap::new(),
            execs: BTreeMap::new(),
            allocations: BTreeMap::new(),
            pinned: BTreeMap::new(),
            pools: (0..devices).map(|_| Pool::default()).collect(),
            cliques: BTreeMap::new(),
            communicators: BTreeMap::new(),
            limits: BTreeMap::new(),
            counts: Counts::default(),
        };
        for device in 0..devices {
            state.streams.insert(StreamId::legacy(device), Stream::new(device, true));
        }
        state
    }

    /// A number that no other object of this machine has, and that looks like a pointer.
    pub(super) fn handle(&mut self) -> u64 {
        self.next_handle += 16;
        self.next_handle
    }

    /// The error of a kernel that failed on the device before.
    pub(super) fn healthy(&self, device: usize) -> Result<()> {
        self.faults[device].map_or(Ok(()), Err)
    }
}
