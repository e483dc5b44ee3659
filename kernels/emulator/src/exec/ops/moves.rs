//! Moves between registers, packing and unpacking included, and between views of an address.

use std::sync::OnceLock;
use std::time::Instant;

use super::convert::{read_lanes, write_lanes};
use super::words;
use crate::exec::builder::{Builder, Problem};
use crate::exec::instruction::{Instruction, Outcome, Space, handler, map};
use crate::exec::registers::{LANES, lanes};
use crate::exec::warp::Warp;
use crate::ptx::{Statement, Type};

pub(super) fn decode<'a>(
    builder: &mut Builder<'a>,
    statement: &Statement<'a>,
) -> Result<Instruction, Problem> {
    match statement.name {
        "cvta" => convert_address(builder, statement),
        "isspacep" => is_space(builder, statement),
        _ => {
            let kind = statement.types().next().ok_or("no type")?;
            let operand = |k: usize| statement.operand(k).ok_or("an operand is missing");
            match (operand(0)?.starts_with('{'), operand(1)?.starts_with('{')) {
                (true, false) => unpack(builder, statement, kind),
                (false, true) => pack(builder, statement, kind),
                (true, true) => Err("a move between vectors".to_owned()),
                (false, false) => plain(builder, statement, kind),
            }
        }
    }
}

fn plain<'a>(
    builder: &mut Builder<'a>,
    statement: &Statement<'a>,
    kind: Type,
) -> Result<Instruction, Problem> {
    let source = statement.operand(1).ok_or("an operand is missing")?;
    let clock = match source {
        "%clock" | "%clock64" => Some(handler!(|w, i, m| {
            // Instructions stand for cycles.
            let now = w.executed;
            write_lanes(w, i.d[0], i.bytes, m, &[now; LANES]);
            Ok(())
        })),
        "%clock_hi" | "%globaltimer_hi" => Some(handler!(|w, i, m| {
            write_lanes(w, i.d[0], i.bytes, m, &[0; LANES]);
            Ok(())
        })),
        "%globaltimer" | "%globaltimer_lo" => Some(handler!(|w, i, m| {
            write_lanes(w, i.d[0], i.bytes, m, &[nanoseconds(); LANES]);
            Ok(())
        })),
        _ => None,
    };
    if let Some(code) = clock {
        let mut instruction = Instruction::new(code);
        instruction.d[0] = builder.target(statement.operand(0).unwrap_or_default(), kind)?;
        instruction.bytes = kind.bytes() as u8;
        return Ok(instruction);
    }
    let code = words!(kind, T => map!(|a: T| a)).ok_or_else(|| format!("mov of {kind:?}"))?;
    builder.operands(Instruction::new(code), statement, kind, &[kind])
}

/// Nanoseconds since the first question.
fn nanoseconds() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

/// `mov.b32 %r1, {%rs1, %rs2}`: the first is the lowest.
fn pack<'a>(
    builder: &mut Builder<'a>,
    statement: &Statement<'a>,
    kind: Type,
) -> Result<Instruction, Problem> {
    let parts = Builder::list(statement.operands[1]);
    let part = part(kind, parts.len())?;
    let rows = parts.into_iter().map(|name| builder.source(name, part)).collect::<Result<_, _>>()?;
    let code = match (kind.bytes(), part.bytes()) {
        (8, 4) => handler!(|w, i, m| {
            let (low, high) = (w.words(i.wide[0]), w.words(i.wide[1]));
            let values: [u64; LANES] = std::array::from_fn(|l| u64::from(high[l]) << 32 | u64::from(low[l]));
            w.registers.write(i.d[0], m, &values);
            Ok(())
        }),
        (4, 2) => handler!(|w, i, m| {
            let (low, high) = (w.registers.row::<u16>(i.wide[0]), w.registers.row::<u16>(i.wide[1]));
            let values: [u32; LANES] = std::array::from_fn(|l| u32::from(high[l]) << 16 | u32::from(low[l]));
            w.registers.write(i.d[0], m, &values);
            Ok(())
        }),
        _ => handler!(|w, i, m| pack_any(w, i, m)),
    };
    let mut instruction = Instruction::new(code);
    instruction.d[0] = builder.target(statement.operands[0], kind)?;
    instruction.wide = rows;
    instruction.bytes = part.bytes() as u8;
    instruction.count = kind.bytes() as u8;
    Ok(instruction)
}

fn pack_any(warp: &mut Warp<'_>, i: &Instruction, mask: u32) -> Outcome {
    let mut values = [0; LANES];
    for (k, &row) in i.wide.iter().enumerate() {
        let part = read_lanes(warp, row, i.bytes);
        values.iter_mut().zip(part).for_each(|(value, part)| *value |= part << (8 * k * i.bytes as usize));
    }
    write_lanes(warp, i.d[0], i.count, mask, &values);
    Ok(())
}

/// `mov.b32 {%rs1, %rs2}, %r1`.
fn unpack<'a>(
    builder: &mut Builder<'a>,
    statement: &Statement<'a>,
    kind: Type,
) -> Result<Instruction, Problem> {
    let parts = Builder::list(statement.operands[0]);
    let part = part(kind, parts.len())?;
    let rows = parts.into_iter().map(|name| builder.target(name, part)).collect::<Result<_, _>>()?;
    let mut instruction = Instruction::new(handler!(|w, i, m| {
        let whole = read_lanes(w, i.s[0], i.count);
        for (k, &row) in i.wide.iter().enumerate().filter(|(_, row)| row.exists()) {
            write_lanes(w, row, i.bytes, m, &whole.map(|v| v >> (8 * k * i.bytes as usize)));
        }
        Ok(())
    }));
    instruction.s[0] = builder.source(statement.operands[1], kind)?;
    instruction.wide = rows;
    instruction.bytes = part.bytes() as u8;
    instruction.count = kind.bytes() as u8;
    Ok(instruction)
}

/// The type of one of `count` parts.
fn part(whole: Type, count: usize) -> Result<Type, Problem> {
    match whole.bytes() as usize / count.max(1) {
        1 => Ok(Type::B8),
        2 => Ok(Type::B16),
        4 if whole.bytes() == 8 => Ok(Type::B32),
        _ => Err(format!("{count} parts of {whole:?}")),
    }
}

/// `cvta`: generic addresses are those of the host, so only shared, local and parameter memory differ.
fn convert_address<'a>(builder: &mut Builder<'a>, statement: &Statement<'a>) -> Result<Instruction, Problem> {
    let kind = statement.types().next().ok_or("no type")?;
    let space = space(statement)?;
    let code = match space {
        Space::Global => map!(|a: u64| a),
        _ => handler!(|w, i, m| {
            let mut values = *w.registers.row::<u64>(i.s[0]);
            for lane in lanes(m) {
                let start = window(w, i.space, lane).0;
                values[lane] =
                    if i.saturate { values[lane].wrapping_sub(start) } else { values[lane] + start };
            }
            w.registers.write(i.d[0], m, &values);
            Ok(())
        }),
    };
    if kind != Type::U64 {
        return Err("addresses have 64 bits".to_owned());
    }
    let mut instruction = Instruction::new(code);
    instruction.space = space;
    instruction.saturate = statement.has("to");
    builder.operands(instruction, statement, kind, &[kind])
}

fn space(statement: &Statement<'_>) -> Result<Space, Problem> {
    statement
        .modifiers
        .iter()
        .find_map(|m| match m.split(':').next() {
            Some("global" | "const") => Some(Space::Global),
            Some("shared") => Some(Space::Shared),
            Some("local") => Some(Space::Local),
            Some("param") => Some(Space::Param),
            _ => None,
        })
        .ok_or_else(|| "no space".to_owned())
}

/// Generic address and bytes of a space that is not global.
fn window(warp: &mut Warp<'_>, space: Space, lane: usize) -> (u64, u64) {
    match space {
        Space::Shared => (warp.shared.start() as u64, u64::from(warp.shared.bytes())),
        Space::Local => warp.local_window(lane),
        _ => (warp.context.params.as_ptr().expose_provenance() as u64, warp.context.params.len() as u64),
    }
}

fn is_space<'a>(builder: &mut Builder<'a>, statement: &Statement<'a>) -> Result<Instruction, Problem> {
    let mut instruction = Instruction::new(handler!(|w, i, m| {
        let addresses = *w.registers.row::<u64>(i.s[0]);
        let mut inside = [0_u8; LANES];
        for lane in lanes(m) {
            let address = addresses[lane];
            let mut within = |space| {
                let (start, size) = window(w, space, lane);
                address >= start && address - start < size
            };
            inside[lane] = u8::from(match i.space {
                Space::Global => ![Space::Shared, Space::Local, Space::Param].into_iter().any(within),
                space => within(space),
            });
        }
        w.registers.write(i.d[0], m, &inside);
        Ok(())
    }));
    instruction.space = space(statement)?;
    builder.operands(instruction, statement, Type::Pred, &[Type::U64])
}
