//! Arithmetic of f16, bf16 and pairs of them. Sums and products are exact enough in f32 that rounding
//! them once more is no second error; fused ones go through f64.

use super::number::{Bf16, F16, Half, fma_half, greatest, least};
use super::{Rounding, rounding};
use crate::exec::builder::{Builder, Problem};
use crate::exec::instruction::{Handler, Instruction, handler, map};
use crate::ptx::{Statement, Type};

pub(super) fn decode<'a>(
    builder: &mut Builder<'a>,
    statement: &Statement<'a>,
    kind: Type,
) -> Result<Instruction, Problem> {
    let code = match kind {
        Type::F16 => scalar_f16(statement),
        Type::Bf16 => scalar_bf16(statement),
        Type::F16x2 => pair_f16(statement),
        Type::Bf16x2 => pair_bf16(statement),
        _ => None,
    };
    let odd = statement.has("xorsign") || rounding(statement).is_some_and(|r| r != Rounding::Nearest);
    let code = code.filter(|_| !odd).ok_or_else(|| format!("this {} of {kind:?}", statement.name))?;
    let mut instruction = Instruction::new(code);
    instruction.ftz = statement.has("ftz");
    instruction.saturate = statement.has("sat");
    instruction.relu = statement.has("relu");
    let sources = match statement.name {
        "add" | "sub" | "mul" | "min" | "max" => 2,
        "fma" => 3,
        _ => 1,
    };
    builder.operands(instruction, statement, kind, &[kind; 3][..sources])
}

#[inline(always)]
fn flush<H: Half>(value: H) -> H {
    let bits = value.bits();
    if bits & 0x7fff < H::NORMAL { H::from_bits(bits & 0x8000) } else { value }
}

impl Instruction {
    #[inline(always)]
    fn enter_half<H: Half>(&self, value: H) -> H {
        if self.ftz { flush(value) } else { value }
    }

    #[inline(always)]
    fn finish_half<H: Half>(&self, value: H) -> H {
        let value = if self.ftz { flush(value) } else { value };
        if !self.saturate && !self.relu {
            return value;
        }
        let number = value.to_f32();
        if self.saturate {
            H::from_f32(if number > 0.0 { number.min(1.0) } else { 0.0 })
        } else if number < 0.0 || value.bits() == 0x8000 {
            H::from_bits(0) // `.relu`
        } else {
            value
        }
    }
}

/// The handler of one operation, for a half or for both halves of a pair.
macro_rules! one {
    ($H:ty, scalar, |$($x:ident),+| $body:expr) => {
        map!(i; |$($x: $H),+| {
            $(let $x = i.enter_half($x);)+
            i.finish_half($body)
        })
    };
    ($H:ty, pair, |$($x:ident),+| $body:expr) => {
        map!(i; |$($x: [$H; 2]),+| {
            let low = {
                $(let $x = i.enter_half($x[0]);)+
                i.finish_half($body)
            };
            $(let $x = i.enter_half($x[1]);)+
            [low, i.finish_half($body)]
        })
    };
}

macro_rules! operations {
    ($name:ident, $H:ty, $form:ident) => {
        fn $name(statement: &Statement<'_>) -> Option<Handler> {
            let propagate = statement.has("NaN");
            Some(match statement.name {
                "add" => one!($H, $form, |a, b| <$H>::from_f32(a.to_f32() + b.to_f32())),
                "sub" => one!($H, $form, |a, b| <$H>::from_f32(a.to_f32() - b.to_f32())),
                "mul" => one!($H, $form, |a, b| <$H>::from_f32(a.to_f32() * b.to_f32())),
                "fma" => one!($H, $form, |a, b, c| fma_half(a, b, c)),
                "neg" => one!($H, $form, |a| <$H>::from_bits(a.bits() ^ 0x8000)),
                "abs" => one!($H, $form, |a| <$H>::from_bits(a.bits() & 0x7fff)),
                "min" if propagate => {
                    one!($H, $form, |a, b| <$H>::from_f32(least(a.to_f32(), b.to_f32(), true)))
                }
                "min" => one!($H, $form, |a, b| <$H>::from_f32(least(a.to_f32(), b.to_f32(), false))),
                "max" if propagate => {
                    one!($H, $form, |a, b| <$H>::from_f32(greatest(a.to_f32(), b.to_f32(), true)))
                }
                "max" => one!($H, $form, |a, b| <$H>::from_f32(greatest(a.to_f32(), b.to_f32(), false))),
                "ex2" => one!($H, $form, |a| <$H>::from_f32(a.to_f32().exp2())),
                "tanh" => one!($H, $form, |a| <$H>::from_f32(a.to_f32().tanh())),
                _ => return None,
            })
        }
    };
}
operations!(scalar_f16, F16, scalar);
operations!(scalar_bf16, Bf16, scalar);
operations!(pair_f16, F16, pair);
operations!(pair_bf16, Bf16, pair);
