//! Graphs: captured work that can be put into streams again and again.

use std::sync::Arc;

use super::codes::{Error, Result};
use super::perform::Op;
use super::queue::{Patience, StreamId};
use super::{Device, Driver};

const AUTO_FREE_ON_LAUNCH: u64 = 1;
const DEVICE_LAUNCH: u64 = 4;
const FLAGS: u64 = 15;

/// Work in an order in which it can run.
pub(super) struct Graph {
    nodes: Arc<Vec<Op>>,
    memory: Arc<GraphMemory>,
}

impl Graph {
    pub(super) fn new(nodes: Vec<Op>, memory: Arc<GraphMemory>) -> Self {
        Self { nodes: Arc::new(nodes), memory }
    }

    /// Ordinal of the device that it was captured on.
    pub(super) fn device(&self) -> usize {
        self.memory.device.ordinal
    }
}

/// A graph that can be launched.
pub(super) struct GraphExec {
    nodes: Arc<Vec<Op>>,
    memory: Arc<GraphMemory>,
}

impl GraphExec {
    /// Ordinal of the device that it was captured on.
    pub(super) fn device(&self) -> usize {
        self.memory.device.ordinal
    }
}

/// Memory that was allocated while capturing; it lives as long as anything that may use it.
pub(super) struct GraphMemory {
    device: Arc<Device>,
    addresses: Vec<u64>,
}

impl GraphMemory {
    pub(super) fn new(device: Arc<Device>, addresses: Vec<u64>) -> Self {
        Self { device, addresses }
    }
}

impl Drop for GraphMemory {
    fn drop(&mut self) {
        for &address in &self.addresses {
            let known = self.device.memory.free(address);
            assert!(known, "a graph's memory is its own to free");
        }
    }
}

impl Driver {
    /// `cuGraphInstantiate`.
    pub(super) fn instantiate(&self, graph: u64, flags: u64) -> Result<u64> {
        if flags & !FLAGS != 0
            || flags & (AUTO_FREE_ON_LAUNCH | DEVICE_LAUNCH) == AUTO_FREE_ON_LAUNCH | DEVICE_LAUNCH
        {
            return Err(Error::INVALID_VALUE);
        }
        if flags & DEVICE_LAUNCH != 0 {
            return Err(Error::NOT_SUPPORTED);
        }
        let mut state = self.lock();
        let graph = state.graphs.get(&graph).ok_or(Error::INVALID_VALUE)?;
        let exec = GraphExec { nodes: Arc::clone(&graph.nodes), memory: Arc::clone(&graph.memory) };
        let handle = state.handle();
        state.execs.insert(handle, Arc::new(exec));
        Ok(handle)
    }

    /// `cuGraphLaunch`. A graph launched into a capture becomes part of it.
    pub(super) fn launch_graph(&self, exec: u64, stream: StreamId) -> Result<()> {
        let exec = self.lock().execs.get(&exec).cloned().ok_or(Error::INVALID_VALUE)?;
        for op in exec.nodes.iter() {
            self.enqueue(stream, op.clone())?;
        }
        // The launch may be run after its graph is destroyed.
        if exec.memory.addresses.is_empty() { Ok(()) } else { self.enqueue(stream, Op::Keep(exec)) }
    }

    /// `cuGraphExecUpdate`: false where the graph differs in more than its nodes' values.
    pub(super) fn update_graph(&self, exec: u64, graph: u64) -> Result<bool> {
        let mut state = self.lock();
        let graph = state.graphs.get(&graph).ok_or(Error::INVALID_VALUE)?;
        let updated = GraphExec { nodes: Arc::clone(&graph.nodes), memory: Arc::clone(&graph.memory) };
        let slot = state.execs.get_mut(&exec).ok_or(Error::INVALID_VALUE)?;
        let (old, new) = (&slot.nodes, &updated.nodes);
        let same = old.len() == new.len() && old.iter().zip(new.iter()).all(|(old, new)| old.is_like(new));
        if same && slot.memory.addresses.is_empty() && updated.memory.addresses.is_empty() {
            *slot = Arc::new(updated);
            return Ok(true);
        }
        Ok(false)
    }

    /// Number of nodes of a graph.
    pub(super) fn graph_nodes(&self, graph: u64) -> Result<usize> {
        self.lock().graphs.get(&graph).map(|graph| graph.nodes.len()).ok_or(Error::INVALID_VALUE)
    }

    /// `cuGraphUpload`: nothing is left to prepare.
    pub(super) fn upload_graph(&self, exec: u64) -> Result<()> {
        if self.lock().execs.contains_key(&exec) { Ok(()) } else { Err(Error::INVALID_VALUE) }
    }

    /// `cuGraphDestroy`.
    pub(super) fn destroy_graph(&self, graph: u64) -> Result<()> {
        let graph = self.lock().graphs.remove(&graph).ok_or(Error::INVALID_VALUE)?;
        drop(graph);
        Ok(())
    }

    /// `cuGraphExecDestroy`.
    pub(super) fn destroy_exec(&self, exec: u64) -> Result<()> {
        let exec = self.lock().execs.remove(&exec).ok_or(Error::INVALID_VALUE)?;
        drop(exec);
        Ok(())
    }

    /// `cuStreamDestroy`: does what can be done, and forgets the stream once nothing is left.
    pub(super) fn destroy_stream(&self, id: StreamId) -> Result<()> {
        let tail = self.lock().tail(id);
        self.reach(tail, Patience::Try);
        let mut state = self.lock();
        if let Some(capture) = state.streams[&id].capture {
            state.invalidate(capture);
        }
        state.retire(id);
        Ok(())
    }
}
