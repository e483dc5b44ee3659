//! The instructions, by family: each file decodes its opcodes and holds their code.

mod atomic;
mod bits;
mod collective;
mod compare;
pub(crate) mod control;
mod convert;
mod copy;
mod float;
mod half;
mod integer;
mod memory;
mod moves;
mod number;
mod tensor;

use super::builder::{Builder, Problem};
use super::instruction::{Instruction, Stop, handler};
use crate::fault::FaultKind;
use crate::ptx::{Statement, Type};

/// The instructions of one statement, the first of which will be number `at` of the program.
pub(crate) fn decode<'a>(
    builder: &mut Builder<'a>,
    statement: &Statement<'a>,
    at: usize,
) -> Result<Vec<Instruction>, Problem> {
    let one = match statement.name {
        "add" | "sub" | "mul" | "div" | "min" | "max" | "neg" | "abs" => {
            let kind = statement.types().last().ok_or("no type")?;
            match kind {
                Type::F32 | Type::F64 => float::decode(builder, statement, kind)?,
                _ if kind.is_float() => half::decode(builder, statement, kind)?,
                _ => integer::decode(builder, statement, kind)?,
            }
        }
        "fma" | "mad" | "sqrt" | "rsqrt" | "rcp" | "ex2" | "lg2" | "sin" | "cos" | "tanh" | "copysign"
        | "testp" => {
            let kind = statement.types().last().ok_or("no type")?;
            match kind {
                Type::F32 | Type::F64 => float::decode(builder, statement, kind)?,
                _ if kind.is_float() => half::decode(builder, statement, kind)?,
                _ => integer::decode(builder, statement, kind)?,
            }
        }
        "rem" | "mul24" | "mad24" | "sad" | "dp4a" | "dp2a" | "addc" | "subc" | "madc" | "vabsdiff4" => {
            let kind = statement.types().next().ok_or("no type")?;
            integer::decode(builder, statement, kind)?
        }
        "and" | "or" | "xor" | "not" | "cnot" | "shl" | "shr" | "shf" | "bfe" | "bfi" | "brev" | "clz"
        | "popc" | "bfind" | "prmt" | "lop3" | "fns" | "bmsk" | "szext" => bits::decode(builder, statement)?,
        "setp" | "set" | "selp" | "slct" => compare::decode(builder, statement)?,
        "cvt" => convert::decode(builder, statement)?,
        "mov" | "cvta" | "isspacep" => moves::decode(builder, statement)?,
        "ld" | "ldu" | "st" => memory::decode(builder, statement)?,
        "atom" | "red" => atomic::decode(builder, statement)?,
        "shfl" | "vote" | "match" | "redux" | "activemask" | "elect" => {
            collective::decode(builder, statement)?
        }
        "cp" => copy::decode(builder, statement)?,
        "mma" | "ldmatrix" | "stmatrix" | "movmatrix" => tensor::decode(builder, statement)?,
        _ => return control::decode(builder, statement, at),
    };
    Ok(vec![one])
}

/// An instruction that this interpreter does not have: it stops the warp that comes to it.
pub(crate) fn unsupported() -> Instruction {
    Instruction::new(handler!(|warp, _, mask| {
        let problem = warp.context.program.problem(warp.current).to_owned();
        Err(Stop::at(mask.trailing_zeros() as usize, FaultKind::Unsupported(problem)))
    }))
}

/// Rounding of a result that its type cannot hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    /// To nearest, ties to even.
    Nearest,
    /// To nearest, ties away from zero.
    NearestAway,
    Zero,
    Down,
    Up,
}

/// The rounding that an opcode's modifiers name; to an integer with `i`.
pub(crate) fn rounding(statement: &Statement<'_>) -> Option<Rounding> {
    statement.modifiers.iter().find_map(|m| match *m {
        "rn" | "rni" => Some(Rounding::Nearest),
        "rna" => Some(Rounding::NearestAway),
        "rz" | "rzi" => Some(Rounding::Zero),
        "rm" | "rmi" => Some(Rounding::Down),
        "rp" | "rpi" => Some(Rounding::Up),
        _ => None,
    })
}

/// Runs `$code` with `$T` as the integer of a PTX type; `None` for other types.
macro_rules! integers {
    ($kind:expr, $T:ident => $code:expr) => {{
        use $crate::ptx::Type;
        match $kind {
            Type::B16 | Type::U16 => {
                type $T = u16;
                Some($code)
            }
            Type::S16 => {
                type $T = i16;
                Some($code)
            }
            Type::B32 | Type::U32 => {
                type $T = u32;
                Some($code)
            }
            Type::S32 => {
                type $T = i32;
                Some($code)
            }
            Type::B64 | Type::U64 => {
                type $T = u64;
                Some($code)
            }
            Type::S64 => {
                type $T = i64;
                Some($code)
            }
            _ => None,
        }
    }};
}

/// The same with the unsigned integer of as many bytes, predicates and half pairs included.
macro_rules! words {
    ($kind:expr, $T:ident => $code:expr) => {
        match $kind.bytes() {
            1 => {
                type $T = u8;
                Some($code)
            }
            2 => {
                type $T = u16;
                Some($code)
            }
            4 => {
                type $T = u32;
                Some($code)
            }
            8 => {
                type $T = u64;
                Some($code)
            }
            _ => None,
        }
    };
}

pub(crate) use {integers, words};
