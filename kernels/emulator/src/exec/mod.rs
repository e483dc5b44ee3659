//! Running one launch of a kernel.

mod async_copy;
mod block;
mod builder;
mod instruction;
mod memory_access;
mod ops;
mod program;
mod registers;
mod shared;
mod warp;

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::fault::{Fault, FaultKind, Place};
use crate::memory::Memory;
use crate::ptx::{Function, Scope};
use block::{Block, Stopped};
pub(crate) use program::Program;
pub(crate) use program::link;
use shared::Shared;
use warp::Context;

/// Which warp of a block goes first. Kernels must give the same result either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WarpOrder {
    #[default]
    Forward,
    Reverse,
}

/// How launches are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Operating-system threads that share the blocks of a launch.
    pub threads: usize,
    pub warp_order: WarpOrder,
    /// Stop where two warps touch a byte of shared memory between two barriers and one writes.
    pub racecheck: bool,
}

/// A kernel with its grid and arguments.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    pub function: &'a Function,
    /// Blocks along x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block along x, y, z.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block, in bytes.
    pub dynamic_shared: u32,
    /// The parameters' bytes, laid out as [`Function::params`] says.
    pub params: &'a [u8],
}

/// What a launch took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaunchStats {
    /// Instructions that warps ran.
    pub warp_instructions: u64,
}

/// Runs a launch to its end.
///
/// # Errors
/// The first [`Fault`] that stopped it; memory then holds whatever was written before.
pub fn launch(launch: &Launch<'_>, memory: &Memory, options: &Options) -> Result<LaunchStats, Fault> {
    let refuse = |why: String| Fault {
        kind: FaultKind::Launch(why),
        kernel: launch.function.name.clone(),
        place: Place::default(),
    };
    let scope = launch.function.scope.upgrade().ok_or_else(|| refuse("its module is gone".to_owned()))?;
    let program =
        launch.function.program(&scope).map_err(|text| refuse(format!("not understood: {text}")))?;
    check(launch).map_err(refuse)?;
    let context = Context {
        program,
        memory,
        grid: launch.grid,
        block: launch.block,
        dynamic_shared: launch.dynamic_shared,
        params: launch.params,
    };
    let grid = Grid {
        context: &context,
        scope: &scope,
        launch,
        options,
        next: AtomicU64::new(0),
        stopped: AtomicBool::new(false),
        fault: Mutex::new(None),
        executed: AtomicU64::new(0),
    };
    let threads = (options.threads.max(1) as u64).min(grid.blocks());
    std::thread::scope(|threads_of| {
        for _ in 1..threads {
            threads_of.spawn(|| grid.work());
        }
        grid.work();
    });
    match grid.fault.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(fault) => Err(fault),
        None => Ok(LaunchStats { warp_instructions: grid.executed.into_inner() }),
    }
}

/// What no device would take.
fn check(launch: &Launch<'_>) -> Result<(), String> {
    let threads: u64 = launch.block.iter().map(|&n| u64::from(n)).product();
    let limit = launch.function.max_threads;
    if threads == 0 || threads > u64::from(limit) {
        return Err(format!("{threads} threads in a block, 1 to {limit} are possible"));
    }
    if launch.grid.contains(&0) {
        return Err("no block in the grid".to_owned());
    }
    if launch.params.len() < launch.function.param_bytes as usize {
        let needed = launch.function.param_bytes;
        return Err(format!("{} bytes of parameters, {needed} are needed", launch.params.len()));
    }
    Ok(())
}

/// The blocks of a launch, to be taken by workers.
struct Grid<'a> {
    context: &'a Context<'a>,
    scope: &'a Scope,
    launch: &'a Launch<'a>,
    options: &'a Options,
    /// Index of the next block that nobody has.
    next: AtomicU64,
    stopped: AtomicBool,
    fault: Mutex<Option<Fault>>,
    executed: AtomicU64,
}

impl Grid<'_> {
    fn blocks(&self) -> u64 {
        self.context.grid.iter().map(|&n| u64::from(n)).product()
    }

    /// Takes block after block until none is left or one stopped.
    fn work(&self) {
        let shared_bytes = self.context.program.shared_bytes(self.launch.dynamic_shared);
        let shared = Shared::new(shared_bytes, self.options.racecheck);
        let mut block = Block::new(self.context, &shared, self.options.warp_order);
        let [width, height, _] = self.context.grid.map(u64::from);
        while !self.stopped.load(Ordering::Relaxed) {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.blocks() {
                break;
            }
            let place = [index % width, index / width % height, index / (width * height)];
            let place = place.map(|n| n as u32);
            if let Err(stopped) = block.run(place) {
                self.stopped.store(true, Ordering::Relaxed);
                let mut fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
                fault.get_or_insert_with(|| self.fault(&block, place, stopped));
            }
        }
        self.executed.fetch_add(block.executed(), Ordering::Relaxed);
    }

    fn fault(&self, block: &Block<'_>, place: [u32; 3], stopped: Stopped) -> Fault {
        let warp = block.warp(stopped.warp);
        let (start, end) = self.context.program.places[warp.current as usize];
        let text = self.scope.text[start as usize..end as usize].split_whitespace();
        Fault {
            kind: stopped.stop.kind,
            kernel: self.launch.function.name.clone(),
            place: Place {
                block: Some(place),
                thread: stopped.stop.lane.map(|lane| warp.thread(lane)),
                instruction: Some(text.collect::<Vec<_>>().join(" ")),
            },
        }
    }
}
