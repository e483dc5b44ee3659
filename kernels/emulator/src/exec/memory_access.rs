//! From an address of a kernel to an address of the host, with the checks of a memory debugger.

use super::builder::Address;
use super::instruction::{Instruction, Space, Stop};
use super::registers::{ALL, LANES, Row, lanes};
use super::shared::Access;
use super::warp::Warp;
use crate::fault::FaultKind;
use crate::memory::Memory;

/// Ranges of live allocations that a warp met lately.
#[derive(Default)]
pub(crate) struct RangeCache {
    ranges: [(u64, u64); 4],
    oldest: usize,
    generation: u64,
}

impl RangeCache {
    /// Forgets the ranges if some may be gone.
    pub(crate) fn refresh(&mut self, memory: &Memory) {
        let generation = memory.generation();
        if generation != self.generation {
            *self = Self { generation, ..Self::default() };
        }
    }

    /// One allocation holds all of `start..end`.
    #[inline(always)]
    fn holds(&mut self, start: u64, end: u64, memory: &Memory) -> bool {
        self.ranges.iter().any(|r| r.0 <= start && end <= r.1) || self.look_up(start, end, memory)
    }

    #[cold]
    fn look_up(&mut self, start: u64, end: u64, memory: &Memory) -> bool {
        let Some(range) = memory.find(start) else { return false };
        self.ranges[self.oldest] = range;
        self.oldest = (self.oldest + 1) % self.ranges.len();
        end <= range.1
    }
}

impl Address {
    /// The address in `s[0]` of an instruction.
    pub(crate) fn of(i: &Instruction) -> Self {
        Self { base: i.s[0], base_64: i.base_64, offset: i.immediate, space: i.space }
    }
}

impl Warp<'_> {
    /// What the lanes state as their address, before any check.
    #[inline(always)]
    fn stated(&self, at: Address) -> [u64; LANES] {
        let mut stated = [at.offset as u64; LANES];
        if at.base_64 && at.base != Row::NONE {
            let base = self.registers.row::<u64>(at.base);
            for lane in 0..LANES {
                stated[lane] = base[lane].wrapping_add(at.offset as u64);
            }
        } else if at.base != Row::NONE {
            let base = self.registers.row::<u32>(at.base);
            for lane in 0..LANES {
                stated[lane] = u64::from(base[lane]).wrapping_add(at.offset as u64);
            }
        }
        stated
    }

    /// Host addresses of `bytes` bytes for each lane of `mask`; those of other lanes mean nothing.
    ///
    /// # Errors
    /// The first lane whose address is not aligned to `bytes`, or not inside its space.
    #[inline(always)]
    pub(crate) fn resolve(
        &mut self,
        at: Address,
        mask: u32,
        bytes: u32,
        access: Access,
    ) -> Result<[u64; LANES], Box<Stop>> {
        let mut addresses = self.stated(at);
        let unaligned = addresses.iter().fold(0, |all, a| all | a) & u64::from(bytes - 1);
        if unaligned != 0 {
            for lane in lanes(mask) {
                if addresses[lane] & u64::from(bytes - 1) != 0 {
                    return Err(Stop::at(lane, FaultKind::Misaligned { address: addresses[lane], bytes }));
                }
            }
        }
        match at.space {
            Space::Global => {
                if mask == ALL && self.all_in_one_range(&addresses, bytes) {
                    return Ok(addresses);
                }
                for lane in lanes(mask) {
                    let start = addresses[lane];
                    let end = start.wrapping_add(u64::from(bytes));
                    if end < start || !self.ranges.holds(start, end, self.context.memory) {
                        return Err(outside(lane, start, bytes));
                    }
                }
            }
            Space::Shared => {
                let highest = addresses.iter().fold(0, |high, &a| a.max(high));
                let end = highest.saturating_add(u64::from(bytes));
                if mask == ALL && end <= u64::from(self.shared.bytes()) && !self.shared.looks_for_races() {
                    let start = self.shared.start() as u64;
                    addresses.iter_mut().for_each(|address| *address += start);
                    return Ok(addresses);
                }
                for lane in lanes(mask) {
                    addresses[lane] = self.shared_address(lane, addresses[lane], bytes, access)?;
                }
            }
            Space::Local => {
                let stride = u64::from(self.context.program.local_stride);
                let start = self.local.as_mut_ptr().expose_provenance() as u64;
                for lane in lanes(mask) {
                    if addresses[lane].saturating_add(u64::from(bytes)) > stride {
                        return Err(outside(lane, addresses[lane], bytes));
                    }
                    addresses[lane] += start + lane as u64 * stride;
                }
            }
            Space::Param => {
                let params = self.context.params;
                let start = params.as_ptr().expose_provenance() as u64;
                for lane in lanes(mask) {
                    let end = addresses[lane].saturating_add(u64::from(bytes));
                    if end > params.len() as u64 || access != Access::Read {
                        return Err(outside(lane, addresses[lane], bytes));
                    }
                    addresses[lane] += start;
                }
            }
            Space::Generic => {
                for lane in lanes(mask) {
                    self.check_generic(lane, addresses[lane], bytes, access)?;
                }
            }
        }
        Ok(addresses)
    }

    /// The most frequent case: one allocation holds what all lanes ask for.
    #[inline(always)]
    fn all_in_one_range(&mut self, addresses: &[u64; LANES], bytes: u32) -> bool {
        let (lowest, highest) = addresses.iter().fold((u64::MAX, 0), |(l, h), &a| (a.min(l), a.max(h)));
        let end = highest.saturating_add(u64::from(bytes));
        self.ranges.ranges.iter().any(|r| r.0 <= lowest && end <= r.1)
    }

    /// Host address of `bytes` bytes at an offset in shared memory.
    #[inline(always)]
    pub(crate) fn shared_address(
        &self,
        lane: usize,
        offset: u64,
        bytes: u32,
        access: Access,
    ) -> Result<u64, Box<Stop>> {
        let size = self.shared.bytes();
        if offset.saturating_add(u64::from(bytes)) > u64::from(size) {
            let kind = FaultKind::SharedOutOfBounds { address: offset, bytes, size };
            return Err(Stop::at(lane, kind));
        }
        let touched = self.shared.touch(offset as u32, bytes, self.index, access);
        touched.map_err(|(address, other_warp)| Stop::at(lane, FaultKind::Race { address, other_warp }))?;
        Ok(self.shared.start() as u64 + offset)
    }

    /// Where a generic address points: into shared, local or parameter memory of the thread, else into
    /// global memory.
    fn check_generic(
        &mut self,
        lane: usize,
        address: u64,
        bytes: u32,
        access: Access,
    ) -> Result<(), Box<Stop>> {
        let within = |start: u64, size: u64| address >= start && address - start < size;
        let shared = self.shared.start() as u64;
        if within(shared, u64::from(self.shared.bytes())) {
            return self.shared_address(lane, address - shared, bytes, access).map(drop);
        }
        let end = address.wrapping_add(u64::from(bytes));
        let (local, stride) = self.local_window(lane);
        let params = self.context.params;
        let held = if within(local, stride) {
            end <= local + stride
        } else if within(params.as_ptr().expose_provenance() as u64, params.len() as u64) {
            access == Access::Read && end <= params.as_ptr_range().end as u64
        } else {
            end >= address && self.ranges.holds(address, end, self.context.memory)
        };
        if held { Ok(()) } else { Err(outside(lane, address, bytes)) }
    }

    /// Generic address and bytes of a lane's local memory.
    pub(crate) fn local_window(&mut self, lane: usize) -> (u64, u64) {
        let stride = u64::from(self.context.program.local_stride);
        (self.local.as_mut_ptr().expose_provenance() as u64 + lane as u64 * stride, stride)
    }
}

fn outside(lane: usize, address: u64, bytes: u32) -> Box<Stop> {
    Stop::at(lane, FaultKind::OutOfBounds { address, bytes })
}
