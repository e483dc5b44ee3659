//! Integer arithmetic.

use super::integers;
use crate::exec::builder::{Builder, Problem};
use crate::exec::instruction::{Handler, Instruction, handler, map};
use crate::exec::registers::{LANES, lanes};
use crate::ptx::{Statement, Type};

pub(super) fn decode<'a>(
    builder: &mut Builder<'a>,
    statement: &Statement<'a>,
    kind: Type,
) -> Result<Instruction, Problem> {
    let carries = statement.has("cc") || matches!(statement.name, "addc" | "subc" | "madc");
    if carries {
        return carried(builder, statement, kind);
    }
    if statement.has("wide") {
        return wide(builder, statement, kind);
    }
    match statement.name {
        "dp4a" | "dp2a" => return dot(builder, statement),
        "vabsdiff4" if statement.modifiers == ["u32"; 3] => {
            // The third source only fills bytes that a mask leaves out, and there is none.
            let code = map!(|a: u32, b: u32, _c: u32| differences(a, b));
            return builder.operands(Instruction::new(code), statement, kind, &[kind; 3]);
        }
        _ => {}
    }
    let (code, sources): (Option<Handler>, usize) = match statement.name {
        "neg" => (integers!(kind, T => map!(|a: T| a.wrapping_neg())), 1),
        "abs" => (absolute(kind), 1),
        "mad" | "mad24" | "sad" => (three(statement, kind), 3),
        _ => (two(statement, kind), 2),
    };
    let code = code.ok_or_else(|| format!("{} of {kind:?}", statement.name))?;
    builder.operands(Instruction::new(code), statement, kind, &[kind; 3][..sources])
}

fn absolute(kind: Type) -> Option<Handler> {
    Some(match kind {
        Type::S16 => map!(|a: i16| a.wrapping_abs()),
        Type::S32 => map!(|a: i32| a.wrapping_abs()),
        Type::S64 => map!(|a: i64| a.wrapping_abs()),
        _ => return None,
    })
}

/// Division as PTX leaves it open: by zero it gives all ones, as devices do.
trait Divide: Sized {
    fn divide(self, by: Self) -> Self;
    fn remainder(self, by: Self) -> Self;
    fn high_product(self, by: Self) -> Self;
}

macro_rules! divide {
    ($($T:ty, $Double:ty);*) => {$(
        impl Divide for $T {
            #[inline(always)]
            fn divide(self, by: Self) -> Self {
                if by == 0 { !0 } else { self.wrapping_div(by) }
            }
            #[inline(always)]
            fn remainder(self, by: Self) -> Self {
                if by == 0 { self } else { self.wrapping_rem(by) }
            }
            #[inline(always)]
            fn high_product(self, by: Self) -> Self {
                ((self as $Double * by as $Double) >> Self::BITS) as Self
            }
        }
    )*};
}
divide!(u16, u32; i16, i32; u32, u64; i32, i64; u64, u128; i64, i128);

fn two(statement: &Statement<'_>, kind: Type) -> Option<Handler> {
    if statement.has("sat") {
        return match (statement.name, kind) {
            ("add", Type::S32) => Some(map!(|a: i32, b: i32| a.saturating_add(b))),
            ("sub", Type::S32) => Some(map!(|a: i32, b: i32| a.saturating_sub(b))),
            _ => None,
        };
    }
    match statement.name {
        "add" => integers!(kind, T => map!(|a: T, b: T| a.wrapping_add(b))),
        "sub" => integers!(kind, T => map!(|a: T, b: T| a.wrapping_sub(b))),
        "mul" if statement.has("hi") => integers!(kind, T => map!(|a: T, b: T| a.high_product(b))),
        "mul" => integers!(kind, T => map!(|a: T, b: T| a.wrapping_mul(b))),
        "mul24" if statement.has("lo") => match kind {
            Type::U32 => Some(map!(|a: u32, b: u32| (a << 8 >> 8).wrapping_mul(b << 8 >> 8))),
            Type::S32 => Some(map!(|a: i32, b: i32| (a << 8 >> 8).wrapping_mul(b << 8 >> 8))),
            _ => None,
        },
        "div" => integers!(kind, T => map!(|a: T, b: T| a.divide(b))),
        "rem" => integers!(kind, T => map!(|a: T, b: T| a.remainder(b))),
        "min" => integers!(kind, T => map!(|a: T, b: T| a.min(b))),
        "max" => integers!(kind, T => map!(|a: T, b: T| a.max(b))),
        _ => None,
    }
}

fn three(statement: &Statement<'_>, kind: Type) -> Option<Handler> {
    match statement.name {
        "mad" if statement.has("sat") => None,
        "mad" if statement.has("hi") => {
            integers!(kind, T => map!(|a: T, b: T, c: T| a.high_product(b).wrapping_add(c)))
        }
        "mad" => integers!(kind, T => map!(|a: T, b: T, c: T| a.wrapping_mul(b).wrapping_add(c))),
        "mad24" if statement.has("lo") => match kind {
            Type::U32 => {
                Some(map!(|a: u32, b: u32, c: u32| (a << 8 >> 8).wrapping_mul(b << 8 >> 8).wrapping_add(c)))
            }
            Type::S32 => {
                Some(map!(|a: i32, b: i32, c: i32| (a << 8 >> 8).wrapping_mul(b << 8 >> 8).wrapping_add(c)))
            }
            _ => None,
        },
        "sad" => integers!(kind, T => map!(|a: T, b: T, c: T| c.wrapping_add(a.abs_diff(b) as T))),
        _ => None,
    }
}

/// The product in twice as many bits.
fn wide<'a>(
    builder: &mut Builder<'a>,
    statement: &Statement<'a>,
    kind: Type,
) -> Result<Instruction, Problem> {
    let (product, sum, double): (Handler, Handler, Type) = match kind {
        Type::U16 => (
            map!(|a: u16, b: u16| u32::from(a) * u32::from(b)),
            map!(|a: u16, b: u16, c: u32| (u32::from(a) * u32::from(b)).wrapping_add(c)),
            Type::U32,
        ),
        Type::S16 => (
            map!(|a: i16, b: i16| i32::from(a) * i32::from(b)),
            map!(|a: i16, b: i16, c: i32| (i32::from(a) * i32::from(b)).wrapping_add(c)),
            Type::S32,
        ),
        Type::U32 => (
            map!(|a: u32, b: u32| u64::from(a) * u64::from(b)),
            map!(|a: u32, b: u32, c: u64| (u64::from(a) * u64::from(b)).wrapping_add(c)),
            Type::U64,
        ),
        Type::S32 => (
            map!(|a: i32, b: i32| i64::from(a) * i64::from(b)),
            map!(|a: i32, b: i32, c: i64| (i64::from(a) * i64::from(b)).wrapping_add(c)),
            Type::S64,
        ),
        _ => return Err(format!("a wide product of {kind:?}")),
    };
    match statement.name {
        "mul" => builder.operands(Instruction::new(product), statement, double, &[kind, kind]),
        _ => builder.operands(Instruction::new(sum), statement, double, &[kind, kind, double]),
    }
}

/// How far apart the four bytes of `a` and `b` are, each in its byte.
fn differences(a: u32, b: u32) -> u32 {
    let (a, b) = (a.to_le_bytes(), b.to_le_bytes());
    u32::from_le_bytes(std::array::from_fn(|k| a[k].abs_diff(b[k])))
}

/// Products of bytes (`dp4a`), or of 16-bit halves with bytes (`dp2a`), summed onto `c`.
fn dot<'a>(builder: &mut Builder<'a>, statement: &Statement<'a>) -> Result<Instruction, Problem> {
    #[inline(always)]
    fn byte(word: u32, k: u32, signed: bool) -> i32 {
        let byte = (word >> (8 * k)) as u8;
        if signed { i32::from(byte as i8) } else { i32::from(byte) }
    }
    #[inline(always)]
    fn four(a: u32, b: u32, a_signed: bool, b_signed: bool) -> u32 {
        let product = |k| byte(a, k, a_signed) * byte(b, k, b_signed);
        (product(0) + product(1) + product(2) + product(3)) as u32
    }
    #[inline(always)]
    fn two(a: u32, b: u32, a_signed: bool, b_signed: bool) -> u32 {
        let half = |k: u32| {
            let half = (a >> (16 * k)) as u16;
            if a_signed { i32::from(half as i16) } else { i32::from(half) }
        };
        (half(0) * byte(b, 0, b_signed) + half(1) * byte(b, 1, b_signed)) as u32
    }
    let types: Vec<_> = statement.types().collect();
    let signs = match types[..] {
        [a, b] => (a.is_signed(), b.is_signed()),
        _ => return Err("two types are needed".to_owned()),
    };
    macro_rules! signs {
        ($dot:ident, $shift:expr) => {
            match signs {
                (true, true) => {
                    map!(|a: u32, b: u32, c: u32| $dot(a, b >> $shift, true, true).wrapping_add(c))
                }
                (true, false) => {
                    map!(|a: u32, b: u32, c: u32| $dot(a, b >> $shift, true, false).wrapping_add(c))
                }
                (false, true) => {
                    map!(|a: u32, b: u32, c: u32| $dot(a, b >> $shift, false, true).wrapping_add(c))
                }
                (false, false) => {
                    map!(|a: u32, b: u32, c: u32| $dot(a, b >> $shift, false, false).wrapping_add(c))
                }
            }
        };
    }
    let code = match statement.name {
        "dp4a" => signs!(four, 0),
        _ if statement.has("hi") => signs!(two, 16),
        _ => signs!(two, 0),
    };
    builder.operands(Instruction::new(code), statement, Type::U32, &[Type::U32; 3])
}

/// Sums and differences with a carry in (`addc`), a carry out (`.cc`), or both.
fn carried<'a>(
    builder: &mut Builder<'a>,
    statement: &Statement<'a>,
    kind: Type,
) -> Result<Instruction, Problem> {
    macro_rules! carried {
        ($T:ty, $Double:ty) => {
            handler!(|warp, i, mask| {
                let read = |warp: &crate::exec::warp::Warp<'_>, k: usize| *warp.registers.row::<$T>(i.s[k]);
                let (a, b) = (read(warp, 0), read(warp, 1));
                let c = if i.count == MAD || i.count == MAD_HIGH { read(warp, 2) } else { [0; LANES] };
                let mut values = [0; LANES];
                for lane in lanes(mask) {
                    let carry = <$Double>::from(i.bytes & CARRY_IN != 0 && warp.carry >> lane & 1 != 0);
                    let (a, b, c) = (a[lane] as $Double, b[lane] as $Double, c[lane] as $Double);
                    let low = <$T>::MAX as $Double;
                    let sum = match i.count {
                        ADD => a + b + carry,
                        // The carry of a difference is its borrow.
                        SUB => a.wrapping_sub(b).wrapping_sub(carry),
                        MAD => (a * b & low) + c + carry,
                        _ => (a * b >> <$T>::BITS) + c + carry,
                    };
                    values[lane] = sum as $T;
                    if i.bytes & CARRY_OUT != 0 {
                        let out = (sum >> <$T>::BITS & 1) as u32;
                        warp.carry = warp.carry & !(1 << lane) | out << lane;
                    }
                }
                warp.registers.write(i.d[0], mask, &values);
                Ok(())
            })
        };
    }
    let code: Handler = match kind.bytes() {
        4 => carried!(u32, u64),
        8 => carried!(u64, u128),
        _ => return Err(format!("a carry of {kind:?}")),
    };
    let mut instruction = Instruction::new(code);
    let carry_in = matches!(statement.name, "addc" | "subc" | "madc");
    instruction.bytes = u8::from(carry_in) * CARRY_IN + u8::from(statement.has("cc")) * CARRY_OUT;
    let (operation, sources) = match statement.name {
        "add" | "addc" => (ADD, 2),
        "sub" | "subc" => (SUB, 2),
        _ if statement.has("hi") && kind.is_signed() => return Err("signed high carry".to_owned()),
        _ if statement.has("hi") => (MAD_HIGH, 3),
        _ => (MAD, 3),
    };
    instruction.count = operation;
    builder.operands(instruction, statement, kind, &[kind; 3][..sources])
}

const ADD: u8 = 0;
const SUB: u8 = 1;
const MAD: u8 = 2;
const MAD_HIGH: u8 = 3;
const CARRY_IN: u8 = 1;
const CARRY_OUT: u8 = 2;
