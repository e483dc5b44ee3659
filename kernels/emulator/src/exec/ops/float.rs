//! Arithmetic of f32 and f64.

use super::number::{add_to_odd, greatest, least, round_to_f32};
use super::{Rounding, rounding};
use crate::exec::builder::{Builder, Problem};
use crate::exec::instruction::{Handler, Instruction, handler, map};
use crate::ptx::{Statement, Type};

pub(super) fn decode<'a>(
    builder: &mut Builder<'a>,
    statement: &Statement<'a>,
    kind: Type,
) -> Result<Instruction, Problem> {
    if statement.has("xorsign") {
        return Err("xorsign".to_owned());
    }
    if statement.name == "testp" {
        return test(builder, statement, kind);
    }
    let directed = rounding(statement).filter(|&r| r != Rounding::Nearest);
    let plain = !statement.has("ftz") && !statement.has("sat");
    let code = match (kind, directed) {
        (Type::F32, None) => single(statement, plain),
        (Type::F32, Some(rounding)) => directed_single(statement.name, rounding),
        // An f64 has neither `.ftz` nor `.sat`, but for approximations that flush.
        (Type::F64, None) => double(statement),
        _ => None,
    };
    let code = code.ok_or_else(|| format!("this {} of {kind:?}", statement.name))?;
    let mut instruction = Instruction::new(code);
    instruction.ftz = statement.has("ftz");
    instruction.saturate = statement.has("sat");
    let sources = match statement.name {
        "add" | "sub" | "mul" | "div" | "min" | "max" | "copysign" => 2,
        "fma" | "mad" => 3,
        _ => 1,
    };
    builder.operands(instruction, statement, kind, &[kind; 3][..sources])
}

#[inline(always)]
fn flush(value: f32) -> f32 {
    if value.abs() < f32::MIN_POSITIVE { 0.0_f32.copysign(value) } else { value }
}

impl Instruction {
    /// A source as `.ftz` sees it.
    #[inline(always)]
    fn enter(&self, value: f32) -> f32 {
        if self.ftz { flush(value) } else { value }
    }

    /// A result as `.ftz` and `.sat` leave it; `.sat` makes a NaN zero.
    #[inline(always)]
    fn finish(&self, value: f32) -> f32 {
        let value = if self.ftz { flush(value) } else { value };
        if !self.saturate {
            value
        } else if value > 0.0 {
            value.min(1.0)
        } else {
            0.0
        }
    }
}

/// The handler of an f32 operation, with `.ftz` and `.sat` where they are asked for.
macro_rules! single {
    ($plain:expr, |$($x:ident),+| $body:expr) => {
        if $plain {
            map!(|$($x: f32),+| $body)
        } else {
            map!(i; |$($x: f32),+| {
                $(let $x = i.enter($x);)+
                i.finish($body)
            })
        }
    };
}

fn single(statement: &Statement<'_>, plain: bool) -> Option<Handler> {
    let propagate = statement.has("NaN");
    Some(match statement.name {
        "add" => single!(plain, |a, b| a + b),
        "sub" => single!(plain, |a, b| a - b),
        "mul" => single!(plain, |a, b| a * b),
        "div" => single!(plain, |a, b| a / b),
        "fma" | "mad" => single!(plain, |a, b, c| a.mul_add(b, c)),
        "min" if statement.has("abs") => return None,
        "max" if statement.has("abs") => return None,
        "min" if propagate => single!(plain, |a, b| least(a, b, true)),
        "min" => single!(plain, |a, b| least(a, b, false)),
        "max" if propagate => single!(plain, |a, b| greatest(a, b, true)),
        "max" => single!(plain, |a, b| greatest(a, b, false)),
        "copysign" => single!(plain, |a, b| b.copysign(a)),
        "neg" => single!(plain, |a| -a),
        "abs" => single!(plain, |a| a.abs()),
        "sqrt" => single!(plain, |a| a.sqrt()),
        "rcp" => single!(plain, |a| 1.0 / a),
        // Through f64, so that the quotient of a rounded root is not rounded twice by much.
        "rsqrt" => single!(plain, |a| (1.0 / f64::from(a).sqrt()) as f32),
        "ex2" => single!(plain, |a| a.exp2()),
        "lg2" => single!(plain, |a| a.log2()),
        "sin" => single!(plain, |a| a.sin()),
        "cos" => single!(plain, |a| a.cos()),
        "tanh" => single!(plain, |a| a.tanh()),
        _ => return None,
    })
}

/// Operations of f32 that round to one side, by way of f64.
fn directed_single(name: &str, rounding: Rounding) -> Option<Handler> {
    macro_rules! directed {
        (|$($a:ident),+| $exact:expr) => {
            match rounding {
                Rounding::Down => single!(false, |$($a),+| {
                    $(let $a = f64::from($a);)+
                    round_to_f32($exact, Rounding::Down)
                }),
                Rounding::Up => single!(false, |$($a),+| {
                    $(let $a = f64::from($a);)+
                    round_to_f32($exact, Rounding::Up)
                }),
                Rounding::Zero => single!(false, |$($a),+| {
                    $(let $a = f64::from($a);)+
                    round_to_f32($exact, Rounding::Zero)
                }),
                Rounding::Nearest | Rounding::NearestAway => return None,
            }
        };
    }
    // A quotient or root of f32s is never so near to an f32, unless it is one, that rounding it to
    // f64 first would change its side.
    Some(match name {
        "add" => directed!(|a, b| add_to_odd(a, b)),
        "sub" => directed!(|a, b| add_to_odd(a, -b)),
        "mul" => directed!(|a, b| a * b),
        "fma" | "mad" => directed!(|a, b, c| add_to_odd(a * b, c)),
        "div" => directed!(|a, b| a / b),
        "rcp" => directed!(|a| 1.0 / a),
        "sqrt" => directed!(|a| a.sqrt()),
        _ => return None,
    })
}

fn double(statement: &Statement<'_>) -> Option<Handler> {
    Some(match statement.name {
        "add" => map!(|a: f64, b: f64| a + b),
        "sub" => map!(|a: f64, b: f64| a - b),
        "mul" => map!(|a: f64, b: f64| a * b),
        "div" => map!(|a: f64, b: f64| a / b),
        "fma" | "mad" => map!(|a: f64, b: f64, c: f64| a.mul_add(b, c)),
        "min" => map!(|a: f64, b: f64| least(a, b, false)),
        "max" => map!(|a: f64, b: f64| greatest(a, b, false)),
        "copysign" => map!(|a: f64, b: f64| b.copysign(a)),
        "neg" => map!(|a: f64| -a),
        "abs" => map!(|a: f64| a.abs()),
        "sqrt" => map!(|a: f64| a.sqrt()),
        // The approximations keep the upper half of the result.
        "rcp" if statement.has("approx") => map!(|a: f64| upper(1.0 / a)),
        "rsqrt" if statement.has("approx") && statement.has("ftz") => map!(|a: f64| upper(1.0 / a.sqrt())),
        "rsqrt" => map!(|a: f64| 1.0 / a.sqrt()),
        "rcp" => map!(|a: f64| 1.0 / a),
        _ => return None,
    })
}

#[inline(always)]
fn upper(value: f64) -> f64 {
    f64::from_bits(value.to_bits() >> 32 << 32)
}

/// `testp`: what kind of number a float is.
fn test<'a>(
    builder: &mut Builder<'a>,
    statement: &Statement<'a>,
    kind: Type,
) -> Result<Instruction, Problem> {
    macro_rules! test {
        ($T:ty) => {
            match statement.modifiers[0] {
                "finite" => map!(|a: $T| u8::from(a.is_finite())),
                "infinite" => map!(|a: $T| u8::from(a.is_infinite())),
                "number" => map!(|a: $T| u8::from(!a.is_nan())),
                "notanumber" => map!(|a: $T| u8::from(a.is_nan())),
                "normal" => map!(|a: $T| u8::from(a.is_normal())),
                "subnormal" => map!(|a: $T| u8::from(a.is_subnormal())),
                other => return Err(format!("testp of {other}")),
            }
        };
    }
    let code = if kind == Type::F32 { test!(f32) } else { test!(f64) };
    builder.operands(Instruction::new(code), statement, Type::Pred, &[kind])
}
