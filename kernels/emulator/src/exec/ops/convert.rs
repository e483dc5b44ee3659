//! `cvt`. The common conversions have code of their own; one slow function knows all the others.

use super::number::{Bf16, F16, Half, round_to_f32, round_to_half, to_odd};
use super::{Rounding, rounding};
use crate::exec::builder::{Builder, Problem};
use crate::exec::instruction::{Handler, Instruction, Outcome, handler, map};
use crate::exec::registers::{LANES, Row};
use crate::exec::warp::Warp;
use crate::ptx::{Statement, Type};

pub(super) fn decode<'a>(
    builder: &mut Builder<'a>,
    statement: &Statement<'a>,
) -> Result<Instruction, Problem> {
    if statement.has("pack") {
        return pack(builder, statement);
    }
    let mut types = statement.types();
    let (to, from) = types.next().zip(types.next()).ok_or("cvt takes two types")?;
    if matches!(to, Type::F16x2 | Type::Bf16x2) && from == Type::F32 {
        return pair(builder, statement, to);
    }
    let scalar = |kind| !matches!(kind, Type::F16x2 | Type::Bf16x2 | Type::Pred | Type::B128);
    if !scalar(to) || !scalar(from) || from == Type::Tf32 {
        return Err(format!("cvt of {from:?} to {to:?}"));
    }
    let operand = |k: usize| statement.operand(k).ok_or("an operand is missing");
    let (target, target_bytes) = builder.register(operand(0)?).ok_or("its target is no register")?;
    let (source, source_bytes) = match builder.register(operand(1)?) {
        Some(found) => found,
        None => (builder.source(operand(1)?, from)?, from.bytes()),
    };
    let exact = target_bytes == to.bytes() && source_bytes == from.bytes();
    let quick = if exact { quick(statement, to, from) } else { None };
    let slow = || handler!(|w, i, m| any(w, i, m));
    let mut instruction = Instruction::new(quick.unwrap_or_else(slow));
    instruction.d[0] = target;
    instruction.s[0] = source;
    instruction.from = from;
    instruction.to = to;
    instruction.rounding = rounding(statement).unwrap_or(Rounding::Nearest);
    // Between floats `.rni` and its like ask for a whole number.
    instruction.immediate = i64::from(statement.modifiers.iter().any(|m| m.len() == 3 && m.ends_with('i')));
    instruction.bytes = source_bytes as u8;
    instruction.count = target_bytes as u8;
    instruction.ftz = statement.has("ftz");
    instruction.saturate = statement.has("sat");
    instruction.relu = statement.has("relu");
    instruction.finite = statement.has("satfinite");
    Ok(instruction)
}

/// Conversions between registers of exactly the types' sizes, without `.sat` and its like.
fn quick(statement: &Statement<'_>, to: Type, from: Type) -> Option<Handler> {
    if ["sat", "ftz", "relu", "satfinite"].iter().any(|m| statement.has(m)) {
        return None;
    }
    let nearest = rounding(statement).is_none_or(|r| r == Rounding::Nearest);
    let whole = |r| to.is_signed() && rounding(statement) == Some(r);
    Some(match (to, from) {
        (Type::F32, Type::F16) => map!(|a: F16| a.to_f32()),
        (Type::F32, Type::Bf16) => map!(|a: Bf16| a.to_f32()),
        (Type::F64, Type::F32) => map!(|a: f32| f64::from(a)),
        (Type::F16, Type::F32) if nearest => map!(|a: f32| F16::from_f32(a)),
        (Type::Bf16, Type::F32) if nearest => map!(|a: f32| Bf16::from_f32(a)),
        (Type::F32, Type::F64) if nearest => map!(|a: f64| a as f32),
        (Type::F32, Type::S32) if nearest => map!(|a: i32| a as f32),
        (Type::F32, Type::U32) if nearest => map!(|a: u32| a as f32),
        (Type::F64, Type::S32) if nearest => map!(|a: i32| f64::from(a)),
        (Type::F64, Type::U32) if nearest => map!(|a: u32| f64::from(a)),
        (Type::S32, Type::F32) if whole(Rounding::Zero) => map!(|a: f32| a as i32),
        (Type::S32, Type::F32) if whole(Rounding::Nearest) => map!(|a: f32| a.round_ties_even() as i32),
        (Type::S32, Type::F32) if whole(Rounding::Down) => map!(|a: f32| a.floor() as i32),
        (Type::S32, Type::F32) if whole(Rounding::Up) => map!(|a: f32| a.ceil() as i32),
        (Type::S64 | Type::U64, Type::S32) => map!(|a: i32| i64::from(a)),
        (Type::S64 | Type::U64, Type::U32) => map!(|a: u32| u64::from(a)),
        (Type::S32 | Type::U32, Type::S64 | Type::U64) => map!(|a: u64| a as u32),
        (Type::S32 | Type::U32, Type::U16) => map!(|a: u16| u32::from(a)),
        (Type::S32 | Type::U32, Type::S16) => map!(|a: i16| i32::from(a)),
        (Type::S16 | Type::U16, Type::S32 | Type::U32) => map!(|a: u32| a as u16),
        (Type::S64 | Type::U64, Type::U16) => map!(|a: u16| u64::from(a)),
        (Type::S64 | Type::U64, Type::S16) => map!(|a: i16| i64::from(a)),
        _ => return None,
    })
}

/// The lanes of a row of `bytes` a lane, zero-extended.
pub(super) fn read_lanes(warp: &Warp<'_>, row: Row, bytes: u8) -> [u64; LANES] {
    match bytes {
        1 => warp.registers.row::<u8>(row).map(u64::from),
        2 => warp.registers.row::<u16>(row).map(u64::from),
        4 => warp.registers.row::<u32>(row).map(u64::from),
        _ => *warp.registers.row::<u64>(row),
    }
}

/// Writes the low `bytes` bytes of each lane.
pub(super) fn write_lanes(warp: &mut Warp<'_>, row: Row, bytes: u8, mask: u32, values: &[u64; LANES]) {
    match bytes {
        1 => warp.registers.write(row, mask, &values.map(|v| v as u8)),
        2 => warp.registers.write(row, mask, &values.map(|v| v as u16)),
        4 => warp.registers.write(row, mask, &values.map(|v| v as u32)),
        _ => warp.registers.write(row, mask, values),
    }
}

fn any(warp: &mut Warp<'_>, i: &Instruction, mask: u32) -> Outcome {
    let values = read_lanes(warp, i.s[0], i.bytes).map(|bits| convert(i, bits));
    write_lanes(warp, i.d[0], i.count, mask, &values);
    Ok(())
}

/// A value before its conversion; both hold what they stand for exactly.
enum Value {
    Integer(i128),
    Float(f64),
}

fn value(i: &Instruction, bits: u64) -> Value {
    let flush = |v: f32| if i.ftz && v.abs() < f32::MIN_POSITIVE { 0.0_f32.copysign(v) } else { v };
    match i.from {
        Type::F16 => Value::Float(f64::from(F16::from_bits(bits as u16).to_f32())),
        Type::Bf16 => Value::Float(f64::from(Bf16::from_bits(bits as u16).to_f32())),
        Type::F32 => Value::Float(f64::from(flush(f32::from_bits(bits as u32)))),
        Type::F64 => Value::Float(f64::from_bits(bits)),
        kind => {
            let unused = 64 - 8 * kind.bytes();
            let shifted = bits << unused;
            Value::Integer(if kind.is_signed() {
                i128::from((shifted as i64) >> unused)
            } else {
                i128::from(shifted >> unused)
            })
        }
    }
}

/// One value, given and returned as bits; integers are extended to 64 bits as their type is.
fn convert(i: &Instruction, bits: u64) -> u64 {
    match value(i, bits) {
        Value::Integer(number) if !i.to.is_float() => {
            let number = if i.saturate { clamp(number, i.to) } else { number };
            let unused = 64 - 8 * i.to.bytes();
            let shifted = (number as u64) << unused;
            if i.to.is_signed() { ((shifted as i64) >> unused) as u64 } else { shifted >> unused }
        }
        Value::Integer(number) => {
            let near = number as f64;
            let rest = (number - near as i128) as f64;
            if i.to == Type::F64 && i.rounding == Rounding::Nearest {
                near.to_bits()
            } else {
                float(i, to_odd(near, rest))
            }
        }
        Value::Float(number) if !i.to.is_float() => {
            let whole = to_whole(number, i.rounding);
            // The cast makes NaN zero and stops at its own ends, which lie beyond those of `to`.
            clamp(whole as i128, i.to) as u64
        }
        Value::Float(number) => {
            let number = if i.immediate != 0 { to_whole(number, i.rounding) } else { number };
            float(i, number)
        }
    }
}

fn to_whole(number: f64, rounding: Rounding) -> f64 {
    match rounding {
        Rounding::Nearest => number.round_ties_even(),
        Rounding::NearestAway => number.round(),
        Rounding::Zero => number.trunc(),
        Rounding::Down => number.floor(),
        Rounding::Up => number.ceil(),
    }
}

fn clamp(number: i128, to: Type) -> i128 {
    let bits = 8 * to.bytes();
    if to.is_signed() {
        number.clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    } else {
        number.clamp(0, (1 << bits) - 1)
    }
}

/// Rounds to the target's float, clamped and flushed as the instruction asks.
fn float(i: &Instruction, number: f64) -> u64 {
    let number = match () {
        () if i.saturate && number > 0.0 => number.min(1.0),
        () if i.saturate => 0.0,
        () if i.relu && number <= 0.0 => 0.0,
        () => number,
    };
    match i.to {
        Type::F64 => number.to_bits(),
        Type::F16 => u64::from(half::<F16>(i, number)),
        Type::Bf16 => u64::from(half::<Bf16>(i, number)),
        Type::Tf32 => u64::from(tf32(number as f32, i.rounding)),
        _ => {
            let value = round_to_f32(number, i.rounding);
            let subnormal = i.ftz && value.abs() < f32::MIN_POSITIVE;
            u64::from(if subnormal { 0.0_f32.copysign(value) } else { value }.to_bits())
        }
    }
}

fn half<H: Half>(i: &Instruction, number: f64) -> u16 {
    let bits = round_to_half::<H>(number, i.rounding).bits();
    if i.finite && bits & 0x7fff == H::INFINITY { bits - 1 } else { bits }
}

/// An f32 with the ten bits of fraction that tensor cores read.
fn tf32(number: f32, rounding: Rounding) -> u32 {
    const CUT: u32 = 13;
    let bits = number.to_bits();
    if !number.is_finite() {
        return bits;
    }
    let half = 1 << (CUT - 1);
    let rounded = match rounding {
        Rounding::NearestAway => bits + half,
        Rounding::Nearest => bits + half - 1 + (bits >> CUT & 1),
        _ => bits,
    };
    rounded >> CUT << CUT
}

/// `cvt.rn.f16x2.f32 d, a, b`: `a` to the upper half, `b` to the lower one.
fn pair<'a>(builder: &mut Builder<'a>, statement: &Statement<'a>, to: Type) -> Result<Instruction, Problem> {
    let nearest = rounding(statement) == Some(Rounding::Nearest);
    let other = ["relu", "satfinite"].iter().any(|m| statement.has(m));
    let code = match to {
        Type::F16x2 if nearest && !other => {
            map!(|a: f32, b: f32| [F16::from_f32(b), F16::from_f32(a)])
        }
        Type::Bf16x2 if nearest && !other => {
            map!(|a: f32, b: f32| [Bf16::from_f32(b), Bf16::from_f32(a)])
        }
        _ => handler!(|w, i, m| {
            let (a, b) = (*w.registers.row::<f32>(i.s[0]), *w.registers.row::<f32>(i.s[1]));
            let one = |v: f32| float(i, f64::from(v)) as u32;
            w.registers.write(i.d[0], m, &std::array::from_fn(|l| one(a[l]) << 16 | one(b[l])));
            Ok(())
        }),
    };
    let mut instruction = Instruction::new(code);
    instruction.to = if to == Type::F16x2 { Type::F16 } else { Type::Bf16 };
    instruction.rounding = rounding(statement).unwrap_or(Rounding::Nearest);
    instruction.relu = statement.has("relu");
    instruction.finite = statement.has("satfinite");
    builder.operands(instruction, statement, to, &[Type::F32, Type::F32])
}

/// `cvt.pack.sat`: two 32-bit integers clamped, `a` above `b`, and the lower half of `c` above both.
fn pack<'a>(builder: &mut Builder<'a>, statement: &Statement<'a>) -> Result<Instruction, Problem> {
    let kinds: Vec<_> = statement.types().collect();
    let bytes = [Type::S32; 3];
    match kinds[..] {
        [Type::S8, Type::S32, Type::B32] => {
            let code = map!(|a: i32, b: i32, c: u32| {
                let one = |v: i32| v.clamp(-128, 127) as u32 & 0xff;
                c << 16 | one(a) << 8 | one(b)
            });
            builder.operands(Instruction::new(code), statement, Type::B32, &bytes)
        }
        [Type::U8, Type::S32, Type::B32] => {
            let code = map!(|a: i32, b: i32, c: u32| {
                let one = |v: i32| v.clamp(0, 255) as u32;
                c << 16 | one(a) << 8 | one(b)
            });
            builder.operands(Instruction::new(code), statement, Type::B32, &bytes)
        }
        [Type::S16, Type::S32] => {
            let code = map!(|a: i32, b: i32| {
                let one = |v: i32| v.clamp(-32768, 32767) as u32 & 0xffff;
                one(a) << 16 | one(b)
            });
            builder.operands(Instruction::new(code), statement, Type::B32, &bytes[..2])
        }
        _ => Err("this cvt.pack".to_owned()),
    }
}
