//! Doing what streams hold, one entry at a time.

use std::ffi::c_void;
use std::ptr::{with_exposed_provenance, with_exposed_provenance_mut};
use std::sync::Arc;
use std::time::Instant;

use super::allocate::Allocation;
use super::codes::Error;
use super::collective::Call;
use super::event::Mark;
use super::graph::GraphExec;
use super::launch::Launch;
use super::{Device, Driver, tell};
use crate::exec;
use crate::fault::{Fault, FaultKind};
use crate::memory::OutOfRange;

/// One piece of work.
#[derive(Clone)]
pub(super) enum Op {
    Launch(Arc<Launch>),
    Copy(Copy),
    /// Bytes that were read when the copy was asked for.
    Upload {
        to: u64,
        data: Arc<[u8]>,
    },
    Fill(Fill),
    Free {
        address: u64,
        allocation: Allocation,
    },
    /// Memory that a graph allocates: fresh in each replay.
    Refresh {
        address: u64,
    },
    Record(Arc<Mark>),
    /// A function of the program.
    Host(HostCall),
    Collective(Call),
    /// Keeps a graph's memory until here.
    Keep(#[expect(dead_code, reason = "held, not read")] Arc<GraphExec>),
}

impl Op {
    /// Whether two operations differ in values only.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Launch(own), Self::Launch(other)) => own.function.name == other.function.name,
            _ => std::mem::discriminant(self) == std::mem::discriminant(other),
        }
    }
}

/// Which of a copy's ends are on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Up,
    Down,
    Between,
}

/// A copy of bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Copy {
    pub(super) to: u64,
    pub(super) from: u64,
    pub(super) bytes: u64,
    pub(super) direction: Direction,
}

/// `count` times the lowest `width` bytes of `value`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fill {
    pub(super) to: u64,
    pub(super) value: u32,
    pub(super) width: usize,
    pub(super) count: usize,
}

/// A function of the program and what it is given.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostCall {
    pub(super) function: unsafe extern "C" fn(*mut c_void),
    pub(super) data: *mut c_void,
}

// SAFETY: the program hands both to the driver to be called on a thread of the driver's choice.
unsafe impl Send for HostCall {}
// SAFETY: as above; nothing is called through a shared reference but the function itself.
unsafe impl Sync for HostCall {}

/// Work that went wrong: the error that stays with the device, and what happened.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) error: Error,
    pub(super) text: String,
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        let error = match fault.kind {
            FaultKind::OutOfBounds { .. } | FaultKind::SharedOutOfBounds { .. } => Error::ILLEGAL_ADDRESS,
            FaultKind::Misaligned { .. } => Error::MISALIGNED_ADDRESS,
            FaultKind::Assert(_) => Error::ASSERT,
            FaultKind::Unsupported(_) => Error::ILLEGAL_INSTRUCTION,
            // A device would hang at a barrier that is never reached; nobody would wait for that.
            _ => Error::LAUNCH_FAILED,
        };
        Self { error, text: fault.to_string() }
    }
}

impl From<OutOfRange> for Failure {
    fn from(out_of_range: OutOfRange) -> Self {
        Self { error: Error::ILLEGAL_ADDRESS, text: out_of_range.to_string() }
    }
}

type Outcome = Result<(), Failure>;

impl Driver {
    /// Does one piece of a device's work.
    pub(super) fn perform(&self, device: &Device, op: &Op) -> Outcome {
        let _holds: Vec<_> = self.devices.iter().map(|device| device.memory.hold()).collect();
        match op {
            Op::Launch(launch) => self.perform_launch(device, launch),
            Op::Copy(copy) => self.perform_copy(copy),
            Op::Upload { to, data } => {
                self.on_device(*to, data.len() as u64)?;
                self.lock().counts.bytes_up += data.len() as u64;
                let to = with_exposed_provenance_mut::<u8>(*to as usize);
                // SAFETY: the range was checked, the memory is held, and the data are the driver's own.
                unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
                Ok(())
            }
            Op::Fill(fill) => self.perform_fill(fill),
            Op::Free { address, allocation } => {
                self.give_back(*address, *allocation);
                Ok(())
            }
            Op::Refresh { address } => {
                let known = device.memory.refresh(*address);
                assert!(known, "a graph's memory lives as long as its launches");
                Ok(())
            }
            Op::Record(mark) => {
                mark.set(Instant::now()).expect("a mark is made for one entry");
                Ok(())
            }
            Op::Host(HostCall { function, data }) => {
                // SAFETY: the program asked for this call.
                unsafe { function(*data) };
                Ok(())
            }
            Op::Collective(_) => unreachable!("collectives are entries of their own"),
            Op::Keep(_) => Ok(()),
        }
    }

    fn perform_launch(&self, device: &Device, launch: &Launch) -> Outcome {
        self.lock().counts.launches += 1;
        let options = exec::Options {
            threads: self.config.threads,
            warp_order: if self.config.reverse_warps {
                exec::WarpOrder::Reverse
            } else {
                exec::WarpOrder::Forward
            },
            racecheck: self.config.racecheck,
        };
        let span = device.activity.begin();
        let start = Instant::now();
        let outcome = exec::launch(&launch.as_exec(), &device.memory, &options);
        drop(span);
        if self.config.trace {
            let ([gx, gy, gz], [bx, by, bz]) = (launch.grid, launch.block);
            let millis = start.elapsed().as_secs_f64() * 1e3;
            let (ordinal, name) = (device.ordinal, &launch.function.name);
            tell(format_args!(
                "device {ordinal}: {name} grid {gx},{gy},{gz} block {bx},{by},{bz} {millis:.3} ms"
            ));
        }
        outcome.map(drop).map_err(Failure::from)
    }

    fn perform_copy(&self, copy: &Copy) -> Outcome {
        let Copy { to, from, bytes, direction } = *copy;
        if direction != Direction::Down {
            self.on_device(to, bytes)?;
        }
        if direction != Direction::Up {
            self.on_device(from, bytes)?;
        }
        {
            let mut state = self.lock();
            let counts = &mut state.counts;
            match direction {
                Direction::Up => counts.bytes_up += bytes,
                Direction::Down => counts.bytes_down += bytes,
                Direction::Between => counts.bytes_between += bytes,
            }
        }
        let from = with_exposed_provenance::<u8>(from as usize);
        let to = with_exposed_provenance_mut::<u8>(to as usize);
        // SAFETY: device ranges were checked and are held; host ranges are the caller's promise.
        unsafe { std::ptr::copy(from, to, bytes as usize) };
        Ok(())
    }

    fn perform_fill(&self, fill: &Fill) -> Outcome {
        let Fill { to, value, width, count } = *fill;
        self.on_device(to, (width * count) as u64)?;
        let pattern = &value.to_le_bytes()[..width];
        let to = with_exposed_provenance_mut::<u8>(to as usize);
        // SAFETY: the range was checked and is held; only kernels and copies ordered before write to it.
        let bytes = unsafe { std::slice::from_raw_parts_mut(to, width * count) };
        match pattern {
            [byte] => bytes.fill(*byte),
            _ => bytes.chunks_exact_mut(width).for_each(|chunk| chunk.copy_from_slice(pattern)),
        }
        Ok(())
    }

    /// Checks that bytes lie inside one allocation of any device.
    pub(super) fn on_device(&self, address: u64, bytes: u64) -> Result<(), OutOfRange> {
        match self.device_of(address) {
            Some(device) => device.memory.check(address, bytes),
            None => {
                let nearest =
                    self.devices.iter().filter_map(|device| device.memory.check(address, bytes).err());
                nearest.max_by_key(|out_of_range| out_of_range.nearest).map_or(Ok(()), Err)
            }
        }
    }
}
