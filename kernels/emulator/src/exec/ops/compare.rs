//! Comparisons and choices.

use super::number::{Bf16, F16, Half};
use super::{integers, words};
use crate::exec::builder::{Builder, Problem};
use crate::exec::instruction::{Handler, Instruction, handler, map};
use crate::exec::registers::{Row, Word};
use crate::exec::warp::Warp;
use crate::ptx::{Statement, Type};

pub(super) fn decode<'a>(
    builder: &mut Builder<'a>,
    statement: &Statement<'a>,
) -> Result<Instruction, Problem> {
    match statement.name {
        "setp" => set_predicate(builder, statement),
        "set" => set(builder, statement),
        "selp" => {
            let kind = statement.types().next().ok_or("no type")?;
            let code = words!(kind, T => map!(|a: T, b: T, c: u8| if c != 0 { a } else { b }));
            let code = code.ok_or_else(|| format!("selp of {kind:?}"))?;
            builder.operands(Instruction::new(code), statement, kind, &[kind, kind, Type::Pred])
        }
        _ => {
            let mut types = statement.types();
            let (kind, by) = types.next().zip(types.next()).ok_or("slct takes two types")?;
            let code = match by {
                Type::S32 => words!(kind, T => map!(|a: T, b: T, c: i32| if c >= 0 { a } else { b })),
                Type::F32 => words!(kind, T => map!(|a: T, b: T, c: f32| if c >= 0.0 { a } else { b })),
                _ => None,
            };
            let code = code.ok_or_else(|| format!("slct by {by:?}"))?;
            builder.operands(Instruction::new(code), statement, kind, &[kind, kind, by])
        }
    }
}

/// A number as it is compared: halves as f32, all others as they are.
trait Compared: Word {
    type As: PartialOrd;
    fn compared(self) -> Self::As;
}

macro_rules! compared {
    ($($T:ty),*) => {$(
        impl Compared for $T {
            type As = Self;
            #[inline(always)]
            fn compared(self) -> Self {
                self
            }
        }
    )*};
}
compared!(u16, i16, u32, i32, u64, i64, f32, f64);

impl Compared for F16 {
    type As = f32;
    #[inline(always)]
    fn compared(self) -> f32 {
        self.to_f32()
    }
}

impl Compared for Bf16 {
    type As = f32;
    #[inline(always)]
    fn compared(self) -> f32 {
        self.to_f32()
    }
}

/// The handler of the comparison `$name` between two `$T`.
macro_rules! comparisons {
    ($name:expr, $T:ty) => {{
        macro_rules! compare {
            (|$a:ident, $b:ident| $body:expr) => {
                Some(map!(|$a: $T, $b: $T| {
                    let ($a, $b) = ($a.compared(), $b.compared());
                    u8::from($body)
                }))
            };
        }
        match $name {
            "eq" => compare!(|a, b| a == b),
            // Of NaN this says false, and `neu` true.
            "ne" => compare!(|a, b| (a < b) | (a > b)),
            "lt" | "lo" => compare!(|a, b| a < b),
            "le" | "ls" => compare!(|a, b| a <= b),
            "gt" | "hi" => compare!(|a, b| a > b),
            "ge" | "hs" => compare!(|a, b| a >= b),
            "equ" => compare!(|a, b| !((a < b) | (a > b))),
            "neu" => compare!(|a, b| a != b),
            "ltu" => compare!(|a, b| !(a >= b)),
            "leu" => compare!(|a, b| !(a > b)),
            "gtu" => compare!(|a, b| !(a <= b)),
            "geu" => compare!(|a, b| !(a < b)),
            "num" => compare!(|a, b| a.partial_cmp(&b).is_some()),
            "nan" => compare!(|a, b| a.partial_cmp(&b).is_none()),
            _ => None,
        }
    }};
}

/// The handler that writes 0 or 1 into the predicate in `d[0]`.
#[expect(clippy::neg_cmp_op_on_partial_ord, reason = "the unordered comparisons are true of NaN")]
fn comparison(name: &str, kind: Type) -> Option<Handler> {
    match kind {
        Type::F32 => comparisons!(name, f32),
        Type::F64 => comparisons!(name, f64),
        Type::F16 => comparisons!(name, F16),
        Type::Bf16 => comparisons!(name, Bf16),
        _ => integers!(kind, T => comparisons!(name, T)).flatten(),
    }
}

/// `setp`: a comparison, joined with a predicate or not, into one predicate or it and its opposite.
fn set_predicate<'a>(builder: &mut Builder<'a>, statement: &Statement<'a>) -> Result<Instruction, Problem> {
    let kind = statement.types().next().ok_or("no type")?;
    let compare = comparison(statement.modifiers[0], kind);
    let compare = compare.ok_or_else(|| format!("setp.{} of {kind:?}", statement.modifiers[0]))?;
    let operand = |k: usize| statement.operand(k).ok_or("an operand is missing");
    let (first, second) = match operand(0)?.split_once('|') {
        Some((first, second)) => (first.trim(), Some(second.trim())),
        None => (operand(0)?, None),
    };
    let joined = statement.operand(3);
    let simple = joined.is_none() && second.is_none();
    let mut instruction = Instruction::new(if simple { compare } else { handler!(|w, i, m| join(w, i, m)) });
    instruction.d[0] = builder.target(first, Type::Pred)?;
    if let Some(second) = second {
        instruction.d[1] = builder.target(second, Type::Pred)?;
    }
    instruction.s[0] = builder.source(operand(1)?, kind)?;
    instruction.s[1] = builder.source(operand(2)?, kind)?;
    if !simple {
        instruction.bytes = NONE;
        // The comparison's own result goes to a row that no name has.
        let mut inner = Instruction::new(compare);
        inner.s = instruction.s;
        inner.d[0] = builder.layout.row(1);
        instruction.inner = Some(Box::new(inner));
        if let Some(joined) = joined {
            let negated = joined.strip_prefix('!');
            instruction.s[2] = builder.source(negated.unwrap_or(joined).trim(), Type::Pred)?;
            instruction.saturate = negated.is_some();
            instruction.bytes = match () {
                () if statement.has("and") => AND,
                () if statement.has("or") => OR,
                () if statement.has("xor") => XOR,
                () => return Err("setp joins by and, or, xor".to_owned()),
            };
        }
    }
    Ok(instruction)
}

const NONE: u8 = 0;
const AND: u8 = 1;
const OR: u8 = 2;
const XOR: u8 = 3;

fn join(warp: &mut Warp<'_>, i: &Instruction, mask: u32) -> crate::exec::instruction::Outcome {
    let inner = i.inner.as_deref().expect("decoded with its comparison");
    // SAFETY: `handler!` took the version for this host.
    unsafe { (inner.run)(warp, inner, mask) }?;
    let compared = *warp.registers.row::<u8>(inner.d[0]);
    let other = if i.bytes == NONE { [0; 32] } else { *warp.registers.row::<u8>(i.s[2]) };
    let flip = u8::from(i.saturate);
    let with = |value: u8, other: u8| match i.bytes {
        AND => value & (other ^ flip),
        OR => value | (other ^ flip),
        XOR => value ^ other ^ flip,
        _ => value,
    };
    let values = std::array::from_fn(|l| with(compared[l] & 1, other[l]));
    let opposite = std::array::from_fn(|l| with((compared[l] & 1) ^ 1, other[l]));
    for (row, values) in [(i.d[0], values), (i.d[1], opposite)] {
        if row != Row::NONE {
            warp.registers.write::<u8>(row, mask, &values);
        }
    }
    Ok(())
}

/// `set`: a comparison's result as a number, all ones or 1.0 for true.
fn set<'a>(builder: &mut Builder<'a>, statement: &Statement<'a>) -> Result<Instruction, Problem> {
    let mut types = statement.types();
    let (target, kind) = types.next().zip(types.next()).ok_or("set takes two types")?;
    let halves = match kind {
        Type::F16x2 => Some(Type::F16),
        Type::Bf16x2 => Some(Type::Bf16),
        _ => None,
    };
    let name = statement.modifiers[0];
    let compare = comparison(name, halves.unwrap_or(kind));
    let compare = compare.ok_or_else(|| format!("set.{name} of {kind:?}"))?;
    if statement.operands.len() != 3 {
        return Err("set with a predicate".to_owned());
    }
    let code = match halves {
        Some(_) => handler!(|w, i, m| set_pair(w, i, m)),
        None => handler!(|w, i, m| set_one(w, i, m)),
    };
    let mut inner = Instruction::new(compare);
    let mut instruction = builder.operands(Instruction::new(code), statement, target, &[kind, kind])?;
    instruction.immediate = match target {
        Type::F32 => 0x3f80_0000,
        Type::F16 | Type::F16x2 => 0x3c00,
        Type::Bf16 | Type::Bf16x2 => 0x3f80,
        _ if halves.is_some() => 0xffff,
        _ => -1,
    };
    instruction.bytes = target.bytes() as u8;
    inner.s = instruction.s;
    if halves.is_some() {
        inner.s = [builder.layout.row(2), builder.layout.row(2), Row::NONE, Row::NONE];
    }
    inner.d[0] = builder.layout.row(1);
    instruction.inner = Some(Box::new(inner));
    Ok(instruction)
}

fn set_one(warp: &mut Warp<'_>, i: &Instruction, mask: u32) -> crate::exec::instruction::Outcome {
    let inner = i.inner.as_deref().expect("decoded with its comparison");
    // SAFETY: `handler!` took the version for this host.
    unsafe { (inner.run)(warp, inner, mask) }?;
    let holds = *warp.registers.row::<u8>(inner.d[0]);
    let value = |l: usize| if holds[l] != 0 { i.immediate as u64 } else { 0 };
    match i.bytes {
        2 => warp.registers.write(i.d[0], mask, &std::array::from_fn(|l| value(l) as u16)),
        4 => warp.registers.write(i.d[0], mask, &std::array::from_fn(|l| value(l) as u32)),
        _ => warp.registers.write(i.d[0], mask, &std::array::from_fn(value)),
    }
    Ok(())
}

/// Both halves of a pair, one after the other.
fn set_pair(warp: &mut Warp<'_>, i: &Instruction, mask: u32) -> crate::exec::instruction::Outcome {
    let inner = i.inner.as_deref().expect("decoded with its comparison");
    let mut values = [0_u32; 32];
    for half in [0, 16] {
        for (from, to) in [(i.s[0], inner.s[0]), (i.s[1], inner.s[1])] {
            let row = warp.words(from).map(|pair| (pair >> half) as u16);
            *warp.registers.row_mut(to) = row;
        }
        // SAFETY: `handler!` took the version for this host.
        unsafe { (inner.run)(warp, inner, mask) }?;
        let holds = warp.registers.row::<u8>(inner.d[0]);
        for (value, &holds) in values.iter_mut().zip(holds) {
            *value |= if holds != 0 { (i.immediate as u32) << half } else { 0 };
        }
    }
    warp.registers.write(i.d[0], mask, &values);
    Ok(())
}
