//! Graphs.

use super::{exports, set};
use crate::driver::Error;

/// What an update of a graph says: done, or the graphs differ in their shape.
const UPDATED: u32 = 0;
const TOPOLOGY_CHANGED: u32 = 2;

/// `CUgraphExecUpdateResultInfo`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UpdateInfo {
    pub result: u32,
    pub node: u64,
    pub from_node: u64,
}

exports! {
    /// Makes a graph launchable.
    fn cuGraphInstantiateWithFlags(exec: *mut u64, graph: u64, flags: u64) |driver| {
        driver.device_here()?;
        set(exec, driver.instantiate(graph, flags)?)
    }

    /// Puts a graph into a stream.
    fn cuGraphLaunch(exec: u64, stream: u64) |driver| {
        let stream = driver.stream(stream)?;
        driver.launch_graph(exec, stream)
    }

    /// Prepares a graph's first launch.
    fn cuGraphUpload(exec: u64, stream: u64) |driver| {
        driver.stream(stream)?;
        driver.upload_graph(exec)
    }

    /// Gives a graph back. What was made of it stays.
    fn cuGraphDestroy(graph: u64) |driver| {
        driver.is_started()?;
        driver.destroy_graph(graph)
    }

    /// Gives a launchable graph back. Its launches are done.
    fn cuGraphExecDestroy(exec: u64) |driver| {
        driver.is_started()?;
        driver.destroy_exec(exec)
    }

    /// Replaces a launchable graph's arguments by those of a graph of the same shape.
    fn cuGraphExecUpdate_v2(exec: u64, graph: u64, info: *mut UpdateInfo) |driver| {
        driver.device_here()?;
        let updated = driver.update_graph(exec, graph)?;
        let result = if updated { UPDATED } else { TOPOLOGY_CHANGED };
        set(info, UpdateInfo { result, ..UpdateInfo::default() })?;
        if updated { Ok(()) } else { Err(Error::GRAPH_EXEC_UPDATE_FAILURE) }
    }

    /// Number of a graph's nodes. They cannot be seen one by one.
    fn cuGraphGetNodes(graph: u64, nodes: *mut u64, count: *mut usize) |driver| {
        driver.device_here()?;
        if !nodes.is_null() {
            return Err(Error::NOT_SUPPORTED);
        }
        set(count, driver.graph_nodes(graph)?)
    }
}
