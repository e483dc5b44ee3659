//! A warp: 32 lanes that run in lock-step under a mask. Lanes that part each keep their own program
//! counter, and the lanes that are furthest back run first, so that they meet again.

use super::async_copy::AsyncCopies;
use super::instruction::{Instruction, Kind, Outcome, Stop};
use super::memory_access::RangeCache;
use super::program::{Constant, Program, Special};
use super::registers::{ALL, LANES, Registers, Row, lanes};
use super::shared::Shared;
use crate::fault::FaultKind;
use crate::memory::Memory;

/// Backward jumps before another warp gets its turn: it may have to write what this one polls.
const SLICE: u32 = 10_000;

/// What all warps of a launch have in common.
pub(crate) struct Context<'a> {
    pub(crate) program: &'a Program,
    pub(crate) memory: &'a Memory,
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) dynamic_shared: u32,
    pub(crate) params: &'a [u8],
}

impl Context<'_> {
    /// Threads of a block.
    pub(crate) fn threads(&self) -> u32 {
        self.block.iter().product()
    }
}

/// A warp at a barrier of its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AtBarrier {
    pub(crate) barrier: u32,
    /// Threads that it waits for; none for all of the block.
    pub(crate) threads: Option<u32>,
    /// Its lanes, and those of them whose predicate is true (`bar.red`).
    pub(crate) arrived: u32,
    pub(crate) votes: u32,
    pub(crate) answer: Answer,
}

/// What a barrier tells the lanes that waited, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    None,
    /// How many threads voted yes.
    Count(Row),
    /// Whether all did, or any.
    All(Row),
    Any(Row),
}

/// Why a warp gave up its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pause {
    Done,
    Barrier,
    SliceOver,
}

pub(crate) struct Warp<'a> {
    pub(crate) context: &'a Context<'a>,
    pub(crate) shared: &'a Shared,
    pub(crate) registers: Registers,
    /// Local memory of its lanes, one behind the other, `local_stride` bytes each.
    pub(crate) local: Box<[u64]>,
    /// Index in its block.
    pub(crate) index: u32,
    /// Index of its block in the grid.
    pub(crate) block_index: [u32; 3],
    pub(crate) ranges: RangeCache,
    pub(crate) copies: AsyncCopies,
    /// Carry flag of each lane (`add.cc`).
    pub(crate) carry: u32,
    /// The barrier it waits at.
    pub(crate) at_barrier: Option<AtBarrier>,
    /// Threads that arrived at barriers without waiting (`bar.arrive`), to be counted by the block.
    pub(crate) arrivals: Vec<(u32, u32)>,
    /// Program counters of the lanes.
    counters: [u32; LANES],
    /// Lanes that the block has, and those that have not ended.
    pub(crate) started: u32,
    pub(crate) live: u32,
    /// Lanes that wait at a `.sync` operation for the rest of its members.
    parked: u32,
    /// Program counter of the instruction that runs, for faults and calls.
    pub(crate) current: u32,
    pub(crate) executed: u64,
}

impl<'a> Warp<'a> {
    /// A warp of some block, to be started before it runs.
    pub(crate) fn new(context: &'a Context<'a>, shared: &'a Shared, index: u32) -> Self {
        let program = context.program;
        let mut registers = Registers::new(program.register_units);
        for &Constant { row, bytes, value } in &program.constants {
            registers.fill(row, bytes, value);
        }
        Self {
            context,
            shared,
            registers,
            local: vec![0; LANES * program.local_stride as usize / 8].into_boxed_slice(),
            index,
            block_index: [0; 3],
            ranges: RangeCache::default(),
            copies: AsyncCopies::default(),
            carry: 0,
            at_barrier: None,
            arrivals: Vec::new(),
            counters: [0; LANES],
            started: 0,
            live: 0,
            parked: 0,
            current: 0,
            executed: 0,
        }
    }

    /// Puts the warp at the entry of the kernel, as one of block `block_index`.
    pub(crate) fn start(&mut self, block_index: [u32; 3]) {
        self.block_index = block_index;
        let threads = self.context.threads() - self.index * LANES as u32;
        self.started = if threads >= LANES as u32 { ALL } else { (1 << threads) - 1 };
        self.live = self.started;
        self.parked = 0;
        self.carry = 0;
        self.at_barrier = None;
        self.copies.clear();
        self.counters = [self.context.program.entry; LANES];
        self.local.fill(u64::MAX);
        let context = self.context;
        for &(row, special) in &context.program.specials {
            *self.registers.row_mut(row) = self.special(special);
        }
    }

    /// The lanes of a special register that does not change while a warp runs.
    fn special(&self, special: Special) -> [u32; LANES] {
        let [width, height, _] = self.context.block;
        let first = self.index * LANES as u32;
        let each = |f: &dyn Fn(u32) -> u32| std::array::from_fn(|lane| f(lane as u32));
        match special {
            Special::ThreadX => each(&|lane| (first + lane) % width),
            Special::ThreadY => each(&|lane| (first + lane) / width % height),
            Special::ThreadZ => each(&|lane| (first + lane) / (width * height)),
            Special::BlockSize(axis) => [self.context.block[axis]; LANES],
            Special::BlockIndex(axis) => [self.block_index[axis]; LANES],
            Special::GridSize(axis) => [self.context.grid[axis]; LANES],
            Special::Lane => each(&|lane| lane),
            Special::Warp => [self.index; LANES],
            Special::Warps => [self.context.threads().div_ceil(LANES as u32); LANES],
            Special::LanesEqual => each(&|lane| 1 << lane),
            Special::LanesBelow => each(&|lane| (1 << lane) - 1),
            Special::LanesUpTo => each(&|lane| ((1 << lane) - 1) | 1 << lane),
            Special::LanesAbove => each(&|lane| !(((1 << lane) - 1) | 1 << lane)),
            Special::LanesFrom => each(&|lane| !((1 << lane) - 1)),
            Special::DynamicShared => [self.context.dynamic_shared; LANES],
            Special::TotalShared => [self.shared.bytes(); LANES],
            Special::Zero => [0; LANES],
            Special::One => [1; LANES],
        }
    }

    /// Index in its block of the thread in `lane`.
    pub(crate) fn thread(&self, lane: usize) -> [u32; 3] {
        let [width, height, _] = self.context.block;
        let thread = self.index * LANES as u32 + lane as u32;
        [thread % width, thread / width % height, thread / (width * height)]
    }

    /// Runs until the warp ends, waits at a barrier or has had its turn.
    ///
    /// # Errors
    /// What stopped it; `current` is then the instruction.
    pub(crate) fn run(&mut self) -> Result<Pause, Box<Stop>> {
        self.ranges.refresh(self.context.memory);
        let mut jumps = SLICE;
        loop {
            let ready = self.live & !self.parked;
            if ready == 0 {
                return if self.parked == 0 { Ok(Pause::Done) } else { Err(self.missing_lanes()) };
            }
            if let Some(pause) = self.run_group(ready, &mut jumps)? {
                return Ok(pause);
            }
        }
    }

    fn missing_lanes(&mut self) -> Box<Stop> {
        let lane = self.parked.trailing_zeros() as usize;
        self.current = self.counters[lane];
        let i = &self.context.program.code[self.current as usize];
        let arrived = lanes(self.parked).filter(|&l| self.counters[l] == self.current);
        let arrived = arrived.fold(0, |mask, l| mask | 1 << l);
        let kind = if i.kind == Kind::Barrier {
            let missing = (self.started & !arrived).count_ones();
            FaultKind::Barrier { waiting: arrived.count_ones(), missing }
        } else {
            FaultKind::MissingLanes { members: self.members(i, lane), arrived }
        };
        Stop::at(lane, kind)
    }

    /// The member mask that a lane gives to a `.sync` operation.
    pub(crate) fn members(&self, i: &Instruction, lane: usize) -> u32 {
        if i.members.exists() { self.registers.row::<u32>(i.members)[lane] } else { ALL }
    }

    fn leave(&mut self, mask: u32, at: u32) {
        if mask == ALL {
            self.counters = [at; LANES];
        } else {
            lanes(mask).for_each(|lane| self.counters[lane] = at);
        }
    }

    /// Runs the lanes that are furthest back, until they part, wait, or reach others.
    fn run_group(&mut self, ready: u32, jumps: &mut u32) -> Result<Option<Pause>, Box<Stop>> {
        let (mut pc, group, meet) = self.furthest_back(ready);
        let code = &self.context.program.code[..];
        loop {
            let i = &code[pc as usize];
            self.executed += 1;
            let mask = if i.guard.exists() {
                let holds = self.registers.mask(i.guard);
                group & if i.guard_negated { !holds } else { holds }
            } else {
                group
            };
            self.current = pc;
            match i.kind {
                Kind::Plain => {
                    if mask != 0 {
                        self.call(i, mask)?;
                    }
                    pc += 1;
                }
                Kind::Branch | Kind::Call => {
                    if mask != 0 && i.kind == Kind::Call {
                        self.call(i, mask)?;
                    }
                    let backward = mask != 0 && i.target <= pc;
                    if mask == group {
                        pc = i.target;
                    } else if mask == 0 {
                        pc += 1;
                    } else {
                        self.leave(mask, i.target);
                        self.leave(group & !mask, pc + 1);
                        return Ok(None);
                    }
                    if backward {
                        if self.parked != 0 {
                            // Between here and the others, some may wait for this group.
                            self.leave(group, pc);
                            return Ok(None);
                        }
                        *jumps -= 1;
                        if *jumps == 0 {
                            self.leave(group, pc);
                            return Ok(Some(Pause::SliceOver));
                        }
                    }
                }
                Kind::BranchIndexed | Kind::Return => {
                    self.leave(group & !mask, pc + 1);
                    for lane in lanes(mask) {
                        let value = self.registers.row::<u32>(i.s[0])[lane];
                        self.counters[lane] = match i.kind {
                            Kind::Return => value,
                            _ => i.wide.get(value as usize).ok_or_else(|| outside(lane))?.0,
                        };
                    }
                    return Ok(None);
                }
                Kind::Exit => {
                    self.live &= !mask;
                    self.leave(group & !mask, pc + 1);
                    return Ok(None);
                }
                Kind::Sync => {
                    let waits = self.waiting_lanes(i, mask);
                    if mask & !waits != 0 {
                        self.call(i, mask & !waits)?;
                    }
                    if waits != 0 {
                        self.parked |= waits;
                        self.leave(waits, pc);
                        self.leave(group & !waits, pc + 1);
                        return Ok(None);
                    }
                    pc += 1;
                }
                Kind::Barrier => {
                    if mask == 0 {
                        pc += 1;
                    } else if mask != self.started {
                        // Some lanes ended or are elsewhere: the barrier is for all of them.
                        self.parked |= mask;
                        self.leave(mask, pc);
                        self.leave(group & !mask, pc + 1);
                        return Ok(None);
                    } else {
                        self.call(i, mask)?;
                        self.leave(mask, pc + 1);
                        if self.at_barrier.is_some() {
                            return Ok(Some(Pause::Barrier));
                        }
                        pc += 1;
                    }
                }
            }
            if pc >= meet {
                self.leave(group, pc);
                return Ok(None);
            }
        }
    }

    #[inline(always)]
    fn call(&mut self, i: &Instruction, mask: u32) -> Outcome {
        // SAFETY: `handler!` took the version for this host.
        unsafe { (i.run)(self, i, mask) }
    }

    /// The lowest program counter of the ready lanes, the lanes that are there, and the next higher
    /// one of all others.
    fn furthest_back(&mut self, ready: u32) -> (u32, u32, u32) {
        let pc = lanes(ready).map(|l| self.counters[l]).min().expect("some lane is ready");
        let (mut group, mut meet) = (0, u32::MAX);
        for lane in lanes(self.live) {
            if self.counters[lane] == pc {
                group |= 1 << lane;
            } else if self.counters[lane] > pc {
                meet = meet.min(self.counters[lane]);
            }
        }
        self.parked &= !group;
        (pc, group, meet)
    }

    /// Lanes of `mask` whose fellow members are not all there. Lanes that have ended are not awaited.
    fn waiting_lanes(&self, i: &Instruction, mask: u32) -> u32 {
        if !i.members.exists() {
            // The whole warp, ended or not.
            return if mask == ALL { 0 } else { mask };
        }
        let members = self.registers.row::<u32>(i.members);
        lanes(mask).filter(|&l| members[l] & self.live & !mask != 0).fold(0, |waits, l| waits | 1 << l)
    }

    /// Lets the warp go on from its barrier, at which `votes` of `threads` threads said yes.
    pub(crate) fn release(&mut self, votes: u32, threads: u32) {
        let Some(at) = self.at_barrier.take() else { return };
        match at.answer {
            Answer::None => {}
            Answer::Count(row) => self.registers.write(row, at.arrived, &[votes; LANES]),
            Answer::All(row) => self.registers.write(row, at.arrived, &[u8::from(votes == threads); LANES]),
            Answer::Any(row) => self.registers.write(row, at.arrived, &[u8::from(votes > 0); LANES]),
        }
    }

    /// Local memory of a lane.
    pub(crate) fn local_bytes(&mut self, lane: usize) -> &mut [u8] {
        let stride = self.context.program.local_stride as usize;
        let start = self.local.as_mut_ptr().cast::<u8>();
        // SAFETY: the box holds `LANES` times `stride` bytes, and any bytes are words.
        let all = unsafe { std::slice::from_raw_parts_mut(start, LANES * stride) };
        &mut all[lane * stride..][..stride]
    }

    /// The text of device memory from `address` to its closing zero.
    pub(crate) fn text_at(&self, address: u64) -> String {
        let Some((_, end)) = self.context.memory.find(address) else { return "?".to_owned() };
        let start = std::ptr::with_exposed_provenance::<u8>(address as usize);
        // SAFETY: the bytes lie in a live allocation.
        let bytes = unsafe { std::slice::from_raw_parts(start, (end - address) as usize) };
        let length = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    }

    /// A row of 32-bit values.
    pub(crate) fn words(&self, row: Row) -> &[u32; LANES] {
        self.registers.row(row)
    }
}

fn outside(lane: usize) -> Box<Stop> {
    Stop::at(lane, FaultKind::Unsupported("a jump outside the table of brx".to_owned()))
}
