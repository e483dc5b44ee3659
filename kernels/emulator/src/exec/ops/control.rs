//! Jumps, calls, ends, barriers, and instructions that ask nothing of this interpreter.

use crate::exec::builder::{Builder, Problem};
use crate::exec::instruction::{Instruction, Kind, Outcome, Stop, handler, map};
use crate::exec::registers::{LANES, Row, lanes};
use crate::exec::warp::{Answer, AtBarrier, Warp};
use crate::fault::FaultKind;
use crate::ptx::{Statement, Type};

pub(super) fn decode<'a>(
    builder: &mut Builder<'a>,
    statement: &Statement<'a>,
    at: usize,
) -> Result<Vec<Instruction>, Problem> {
    let operand = |k: usize| statement.operand(k).ok_or("an operand is missing");
    let one = match statement.name {
        "bra" => {
            let mut instruction = nothing();
            instruction.kind = Kind::Branch;
            builder.jump(at, operand(0)?);
            instruction
        }
        "brx" if statement.has("idx") => {
            let mut instruction = nothing();
            instruction.kind = Kind::BranchIndexed;
            instruction.s[0] = builder.source(operand(0)?, Type::U32)?;
            builder.jump_table(at, operand(1)?)?;
            instruction
        }
        "exit" => exit(),
        "ret" => leave(builder),
        "call" => return call(builder, statement),
        "trap" | "brkpt" => Instruction::new(handler!(|_, _, m| {
            Err(Stop::at(m.trailing_zeros() as usize, FaultKind::Trap))
        })),
        "bar" | "barrier" => barrier(builder, statement)?,
        "createpolicy" => {
            // A policy says how to cache, which nothing here does.
            let mut instruction = Instruction::new(map!(|a: u64| a));
            instruction.d[0] = builder.target(operand(0)?, Type::B64)?;
            instruction.s[0] = builder.layout.constant(0, 8);
            instruction
        }
        "membar" | "fence" | "nanosleep" | "prefetch" | "prefetchu" | "applypriority" | "discard"
        | "griddepcontrol" | "pmevent" | "setmaxnreg" => nothing(),
        name => return Err(format!("{name} is not known")),
    };
    Ok(vec![one])
}

fn nothing() -> Instruction {
    Instruction::new(handler!(|_, _, _| Ok(())))
}

fn exit() -> Instruction {
    let mut instruction = nothing();
    instruction.kind = Kind::Exit;
    instruction
}

/// The end of the function that is being decoded: of the lanes, if it is the kernel.
pub(crate) fn leave(builder: &Builder<'_>) -> Instruction {
    let Some(frame) = builder.frame() else { return exit() };
    let mut instruction = nothing();
    instruction.kind = Kind::Return;
    instruction.s[0] = frame.return_to;
    instruction
}

/// `call (results), name, (arguments)`: the call, and a copy of the results behind it.
fn call<'a>(builder: &mut Builder<'a>, statement: &Statement<'a>) -> Result<Vec<Instruction>, Problem> {
    let operand = |k: usize| statement.operand(k).ok_or("an operand is missing");
    let list = |text: &'a str| {
        let inner = text.strip_prefix('(').and_then(|t| t.strip_suffix(')')).unwrap_or_default();
        crate::ptx::split(inner, b',')
    };
    let results = list(operand(0)?);
    let arguments = list(statement.operand(2).unwrap_or("()"));
    let offsets = |names: Vec<&'a str>| {
        names.into_iter().map(|name| builder.local_offset(name)).collect::<Result<Vec<_>, _>>()
    };
    let (results, arguments) = (offsets(results)?, offsets(arguments)?);
    let name = operand(1)?;
    let Some(frame) = builder.layout.frames.get(name) else {
        let mut instruction = Instruction::new(match name {
            "__assertfail" => handler!(|w, i, m| assertion(w, i, m)),
            // What a kernel prints goes nowhere.
            "vprintf" => return Ok(vec![nothing()]),
            _ => return Err(format!("{name} is not in the module, or calls itself")),
        });
        instruction.wide = arguments.into_iter().map(Row).collect();
        return Ok(vec![instruction]);
    };
    let callee = &frame.function;
    if arguments.len() != callee.params.len() || results.len() != callee.returns.len() {
        return Err(format!("{name} takes other arguments"));
    }
    let mut into = Instruction::new(handler!(|w, i, m| {
        copy_locals(w, i, m);
        w.registers.write(i.d[0], m, &[w.current + 1; LANES]);
        Ok(())
    }));
    into.kind = Kind::Call;
    into.target = frame.start;
    into.d[0] = frame.return_to;
    let taken = arguments.iter().zip(&callee.params);
    into.wide = taken.flat_map(|(&from, p)| [Row(from), Row(frame.params + p.offset), Row(p.size)]).collect();
    let mut back = Instruction::new(handler!(|w, i, m| {
        copy_locals(w, i, m);
        Ok(())
    }));
    let given = results.iter().zip(&callee.returns);
    back.wide = given.flat_map(|(&to, r)| [Row(frame.returns + r.offset), Row(to), Row(r.size)]).collect();
    Ok(vec![into, back])
}

/// Copies in local memory what `wide` lists: from, to, bytes, and so on.
fn copy_locals(warp: &mut Warp<'_>, i: &Instruction, mask: u32) {
    for lane in lanes(mask) {
        let local = warp.local_bytes(lane);
        for copy in i.wide.as_chunks::<3>().0 {
            let [from, to, bytes] = copy.map(|row| row.0 as usize);
            local.copy_within(from..from + bytes, to);
        }
    }
}

/// `__assertfail(message, file, line, function, size of a character)`.
fn assertion(warp: &mut Warp<'_>, i: &Instruction, mask: u32) -> Outcome {
    let lane = mask.trailing_zeros() as usize;
    let mut argument = |k: usize| {
        let at = i.wide.get(k).map_or(0, |row| row.0 as usize);
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&warp.local_bytes(lane)[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    let (message, file, line) = (argument(0), argument(1), argument(2) as u32);
    let text = format!("{} ({}:{line})", warp.text_at(message), warp.text_at(file));
    Err(Stop::at(lane, FaultKind::Assert(text)))
}

/// `bar` and `barrier`: of the block, with a vote or without, and of the warp.
fn barrier<'a>(builder: &mut Builder<'a>, statement: &Statement<'a>) -> Result<Instruction, Problem> {
    let operand = |k: usize| statement.operand(k).ok_or("an operand is missing");
    let word = Type::U32;
    if statement.has("cluster") {
        return Err("clusters".to_owned());
    }
    if statement.has("warp") {
        let mut instruction = nothing();
        instruction.kind = Kind::Sync;
        instruction.members = builder.source(operand(0)?, word)?;
        return Ok(instruction);
    }
    if statement.has("arrive") {
        let mut instruction = Instruction::new(handler!(|w, i, m| {
            let lane = m.trailing_zeros() as usize;
            let barrier = w.words(i.s[0])[lane];
            check_number(barrier, lane)?;
            w.arrivals.push((barrier, LANES as u32));
            Ok(())
        }));
        instruction.s[0] = builder.source(operand(0)?, word)?;
        return Ok(instruction);
    }
    let mut instruction = Instruction::new(handler!(|w, i, m| wait(w, i, m)));
    instruction.kind = Kind::Barrier;
    let votes = statement.has("red");
    let first = usize::from(votes);
    let mut last = statement.operands.len();
    if votes {
        last -= 1;
        let (number, target) = match () {
            () if statement.has("popc") => (COUNT, word),
            () if statement.has("and") => (EVERY, Type::Pred),
            () => (SOME, Type::Pred),
        };
        instruction.count = number;
        instruction.d[0] = builder.target(operand(0)?, target)?;
        let vote = operand(last)?;
        let negated = vote.strip_prefix('!');
        instruction.saturate = negated.is_some();
        instruction.s[2] = builder.source(negated.unwrap_or(vote), Type::Pred)?;
    } else {
        instruction.count = NO_VOTE;
    }
    instruction.s[0] = builder.source(operand(first)?, word)?;
    if last > first + 1 {
        instruction.s[1] = builder.source(operand(first + 1)?, word)?;
    }
    Ok(instruction)
}

const NO_VOTE: u8 = 0;
const COUNT: u8 = 1;
const EVERY: u8 = 2;
const SOME: u8 = 3;

fn check_number(barrier: u32, lane: usize) -> Outcome {
    if barrier < 16 {
        return Ok(());
    }
    Err(Stop::at(lane, FaultKind::Unsupported(format!("barrier {barrier}, there are 16"))))
}

fn wait(warp: &mut Warp<'_>, i: &Instruction, mask: u32) -> Outcome {
    let lane = mask.trailing_zeros() as usize;
    let barrier = warp.words(i.s[0])[lane];
    check_number(barrier, lane)?;
    let holds = if i.s[2].exists() { warp.registers.mask(i.s[2]) } else { 0 };
    warp.at_barrier = Some(AtBarrier {
        barrier,
        threads: i.s[1].exists().then(|| warp.words(i.s[1])[lane]),
        arrived: mask,
        votes: mask & if i.saturate { !holds } else { holds },
        answer: match i.count {
            COUNT => Answer::Count(i.d[0]),
            EVERY => Answer::All(i.d[0]),
            SOME => Answer::Any(i.d[0]),
            _ => Answer::None,
        },
    });
    Ok(())
}
