//! Logic, shifts and fields of bits.

use super::{integers, words};
use crate::exec::builder::{Builder, Problem};
use crate::exec::instruction::{Handler, Instruction, handler, map};
use crate::exec::registers::LANES;
use crate::exec::warp::Warp;
use crate::ptx::{Statement, Type};

pub(super) fn decode<'a>(
    builder: &mut Builder<'a>,
    statement: &Statement<'a>,
) -> Result<Instruction, Problem> {
    let kind = statement.types().last().ok_or("no type")?;
    let word = Type::U32;
    let (code, target, sources): (Option<Handler>, Type, &[Type]) = match statement.name {
        "and" => (words!(kind, T => map!(|a: T, b: T| a & b)), kind, &[kind, kind]),
        "or" => (words!(kind, T => map!(|a: T, b: T| a | b)), kind, &[kind, kind]),
        "xor" => (words!(kind, T => map!(|a: T, b: T| a ^ b)), kind, &[kind, kind]),
        "not" if kind == Type::Pred => (Some(map!(|a: u8| a ^ 1)), kind, &[kind]),
        "not" => (words!(kind, T => map!(|a: T| !a)), kind, &[kind]),
        "cnot" => (words!(kind, T => map!(|a: T| T::from(a == 0))), kind, &[kind]),
        "shl" => (
            words!(kind, T => map!(|a: T, b: u32| if b < T::BITS { a << b } else { 0 })),
            kind,
            &[kind, word],
        ),
        // A signed shift by all bits or more leaves the sign.
        "shr" if kind.is_signed() => {
            (integers!(kind, T => map!(|a: T, b: u32| a >> b.min(T::BITS - 1))), kind, &[kind, word])
        }
        "shr" => (
            words!(kind, T => map!(|a: T, b: u32| if b < T::BITS { a >> b } else { 0 })),
            kind,
            &[kind, word],
        ),
        "shf" => (Some(funnel(statement)), kind, &[word, word, word]),
        "brev" => (words!(kind, T => map!(|a: T| a.reverse_bits())), kind, &[kind]),
        "clz" => (words!(kind, T => map!(|a: T| a.leading_zeros())), word, &[kind]),
        "popc" => (words!(kind, T => map!(|a: T| a.count_ones())), word, &[kind]),
        "bfind" => (highest(statement, kind), word, &[kind]),
        "bfe" => (extract(kind), kind, &[kind, word, word]),
        "bfi" => (insert(kind), kind, &[kind, kind, word, word]),
        "prmt" if statement.modifiers == ["b32"] => {
            (Some(map!(|a: u32, b: u32, c: u32| permute(a, b, c))), kind, &[word, word, word])
        }
        "lop3" if statement.modifiers == ["b32"] => {
            (Some(handler!(|w, i, m| look_up(w, i, m))), kind, &[word; 4])
        }
        _ => (None, kind, &[]),
    };
    let code = code.ok_or_else(|| format!("{} of {kind:?}", statement.name))?;
    builder.operands(Instruction::new(code), statement, target, sources)
}

/// Shifts of the 64 bits `b:a`.
fn funnel(statement: &Statement<'_>) -> Handler {
    #[inline(always)]
    fn pair(a: u32, b: u32) -> u64 {
        u64::from(b) << 32 | u64::from(a)
    }
    match (statement.has("l"), statement.has("clamp")) {
        (true, true) => map!(|a: u32, b: u32, c: u32| (pair(a, b) << c.min(32) >> 32) as u32),
        (true, false) => map!(|a: u32, b: u32, c: u32| (pair(a, b) << (c & 31) >> 32) as u32),
        (false, true) => map!(|a: u32, b: u32, c: u32| (pair(a, b) >> c.min(32)) as u32),
        (false, false) => map!(|a: u32, b: u32, c: u32| (pair(a, b) >> (c & 31)) as u32),
    }
}

/// Place of the highest bit that is not the sign; all ones where there is none.
fn highest(statement: &Statement<'_>, kind: Type) -> Option<Handler> {
    let shift = statement.has("shiftamt");
    match (kind, shift) {
        (Type::U32, false) => Some(map!(|a: u32| 31_u32.wrapping_sub(a.leading_zeros()))),
        (Type::U64, false) => Some(map!(|a: u64| 63_u32.wrapping_sub(a.leading_zeros()))),
        (Type::S32, false) => Some(map!(|a: i32| 31_u32.wrapping_sub((a ^ (a >> 31)).leading_zeros()))),
        (Type::S64, false) => Some(map!(|a: i64| 63_u32.wrapping_sub((a ^ (a >> 63)).leading_zeros()))),
        (Type::U32, true) => Some(map!(|a: u32| if a == 0 { !0 } else { a.leading_zeros() })),
        (Type::U64, true) => Some(map!(|a: u64| if a == 0 { !0 } else { a.leading_zeros() })),
        _ => None,
    }
}

/// `length` bits of `a` from `start` on, extended by their sign where the type has one.
fn extract(kind: Type) -> Option<Handler> {
    #[inline(always)]
    fn field(a: i64, start: u32, length: u32, bits: u32, signed: bool) -> i64 {
        let (start, length) = (start & 0xff, length & 0xff);
        if length == 0 {
            return 0;
        }
        // `a` is extended to 64 bits, by sign or zero as its type is, so bits beyond it are right.
        let shifted = if start > 63 { if a < 0 { -1 } else { 0 } } else { a >> start };
        // The field's sign is that of its last bit inside the value.
        let length = if signed { length.min(bits.saturating_sub(start).max(1)) } else { length };
        if length >= 64 {
            return shifted;
        }
        let unused = 64 - length;
        if signed { shifted << unused >> unused } else { ((shifted as u64) << unused >> unused) as i64 }
    }
    Some(match kind {
        Type::U32 => map!(|a: u32, b: u32, c: u32| field(i64::from(a), b, c, 32, false) as u32),
        Type::S32 => map!(|a: i32, b: u32, c: u32| field(i64::from(a), b, c, 32, true) as i32),
        Type::U64 => map!(|a: u64, b: u32, c: u32| {
            let (start, length) = (b & 0xff, c & 0xff);
            let shifted = if start > 63 { 0 } else { a >> start };
            if length > 63 { shifted } else { shifted & ((1 << length) - 1) }
        }),
        Type::S64 => map!(|a: i64, b: u32, c: u32| field(a, b, c, 64, true)),
        _ => return None,
    })
}

/// `b` with `length` bits of `a` put in from `start` on.
fn insert(kind: Type) -> Option<Handler> {
    macro_rules! insert {
        ($T:ty) => {
            handler!(|warp, i, mask| {
                let a = warp.registers.row::<$T>(i.s[0]);
                let b = warp.registers.row::<$T>(i.s[1]);
                let (start, length) = (warp.words(i.s[2]), warp.words(i.s[3]));
                let values: [$T; LANES] = std::array::from_fn(|l| {
                    let (start, length) = (start[l] & 0xff, length[l] & 0xff);
                    let field = if length < <$T>::BITS { ((1 as $T) << length) - 1 } else { <$T>::MAX };
                    let shift = |v: $T| if start < <$T>::BITS { v << start } else { 0 };
                    b[l] & !shift(field) | shift(a[l] & field)
                });
                warp.registers.write(i.d[0], mask, &values);
                Ok(())
            })
        };
    }
    match kind.bytes() {
        4 => Some(insert!(u32)),
        8 => Some(insert!(u64)),
        _ => None,
    }
}

/// Four bytes picked from the eight of `b:a` by the nibbles of `selector`; a nibble's top bit asks for
/// the byte's sign instead.
fn permute(a: u32, b: u32, selector: u32) -> u32 {
    let pair = u64::from(b) << 32 | u64::from(a);
    let mut picked = 0;
    for k in 0..4 {
        let nibble = selector >> (4 * k);
        let byte = (pair >> (8 * (nibble & 7))) as u8;
        let byte = if nibble & 8 != 0 { ((byte as i8) >> 7) as u8 } else { byte };
        picked |= u32::from(byte) << (8 * k);
    }
    picked
}

/// `lop3`: each bit is looked up in a table of eight by the bits of three sources.
#[inline(always)]
fn look_up(warp: &mut Warp<'_>, i: &Instruction, mask: u32) -> crate::exec::instruction::Outcome {
    let table = warp.words(i.s[3])[0];
    let (a, b, c) = (*warp.words(i.s[0]), *warp.words(i.s[1]), *warp.words(i.s[2]));
    let mut values = [0; LANES];
    for entry in (0..8).filter(|entry| table >> entry & 1 != 0) {
        let flip = |bit: u32| if entry & bit != 0 { 0 } else { u32::MAX };
        let (fa, fb, fc) = (flip(4), flip(2), flip(1));
        for lane in 0..LANES {
            values[lane] |= (a[lane] ^ fa) & (b[lane] ^ fb) & (c[lane] ^ fc);
        }
    }
    warp.registers.write(i.d[0], mask, &values);
    Ok(())
}
