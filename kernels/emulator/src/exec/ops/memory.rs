//! Loads and stores. Cache hints, `.nc`, `.volatile` and memory orders change nothing here: every
//! access is seen by all at once.

use std::ptr::{with_exposed_provenance, with_exposed_provenance_mut};

use crate::exec::builder::{Address, Builder, Problem};
use crate::exec::instruction::{Handler, Instruction, Outcome, handler};
use crate::exec::registers::{ALL, LANES, Word, lanes};
use crate::exec::shared::Access;
use crate::exec::warp::Warp;
use crate::ptx::{Statement, Type};

pub(super) fn decode<'a>(
    builder: &mut Builder<'a>,
    statement: &Statement<'a>,
) -> Result<Instruction, Problem> {
    let kind = statement.types().last().ok_or("no type")?;
    let store = statement.name == "st";
    let operand = |k: usize| statement.operand(k).ok_or("an operand is missing");
    let (place, values) = if store { (operand(0)?, operand(1)?) } else { (operand(1)?, operand(0)?) };
    // What follows is a cache policy.
    let (mut rows, mut width) = (Vec::new(), kind.bytes());
    for name in Builder::list(values) {
        match builder.register(name) {
            Some((row, bytes)) => {
                rows.push(row);
                width = bytes;
            }
            None if store => rows.push(builder.source(name, kind)?),
            None => rows.push(builder.target(name, kind)?),
        }
    }
    let vector = statement.modifiers.iter().find_map(|m| match *m {
        "v2" => Some(2),
        "v4" => Some(4),
        "v8" => Some(8),
        _ => None,
    });
    if vector.unwrap_or(1) != rows.len() || width < kind.bytes() {
        return Err("registers do not fit".to_owned());
    }
    let code = if store { stores(kind, width) } else { loads(kind, width) };
    let mut instruction = Instruction::new(code.ok_or_else(|| format!("{kind:?} in {width} bytes"))?);
    let address = builder.address(place, statement)?;
    instruction.space = address.space;
    instruction.s[0] = address.base;
    instruction.base_64 = address.base_64;
    instruction.immediate = address.offset;
    instruction.bytes = kind.bytes() as u8 * rows.len() as u8;
    instruction.wide = rows.into();
    Ok(instruction)
}

/// The handler that loads `kind` into registers of `width` bytes.
fn loads(kind: Type, width: u32) -> Option<Handler> {
    macro_rules! load {
        ($T:ty, $D:ty) => {
            handler!(|w, i, m| load(w, i, m, |v: $T| v as $D))
        };
    }
    Some(match (kind.bytes(), kind.is_signed(), width) {
        (1, false, 2) => load!(u8, u16),
        (1, false, 4) => load!(u8, u32),
        (1, false, 8) => load!(u8, u64),
        (1, true, 2) => load!(i8, i16),
        (1, true, 4) => load!(i8, i32),
        (1, true, 8) => load!(i8, i64),
        (2, _, 2) => load!(u16, u16),
        (2, false, 4) => load!(u16, u32),
        (2, false, 8) => load!(u16, u64),
        (2, true, 4) => load!(i16, i32),
        (2, true, 8) => load!(i16, i64),
        (4, _, 4) => load!(u32, u32),
        (4, false, 8) => load!(u32, u64),
        (4, true, 8) => load!(i32, i64),
        (8, _, 8) => load!(u64, u64),
        _ => return None,
    })
}

/// The handler that stores the low bytes of registers of `width` bytes.
fn stores(kind: Type, width: u32) -> Option<Handler> {
    macro_rules! store {
        ($S:ty, $T:ty) => {
            handler!(|w, i, m| store(w, i, m, |v: $S| v as $T))
        };
    }
    Some(match (kind.bytes(), width) {
        (1, 1) => store!(u8, u8),
        (1, 2) => store!(u16, u8),
        (1, 4) => store!(u32, u8),
        (1, 8) => store!(u64, u8),
        (2, 2) => store!(u16, u16),
        (2, 4) => store!(u32, u16),
        (2, 8) => store!(u64, u16),
        (4, 4) => store!(u32, u32),
        (4, 8) => store!(u64, u32),
        (8, 8) => store!(u64, u64),
        _ => return None,
    })
}

#[inline(always)]
fn load<T: Word, D: Word>(
    warp: &mut Warp<'_>,
    i: &Instruction,
    mask: u32,
    widen: impl Fn(T) -> D,
) -> Outcome {
    let addresses = warp.resolve(Address::of(i), mask, u32::from(i.bytes), Access::Read)?;
    for (k, &row) in i.wide.iter().enumerate().filter(|(_, row)| row.exists()) {
        let read = |address: u64| {
            let place = with_exposed_provenance::<T>(address as usize + k * size_of::<T>());
            // SAFETY: `resolve` found the bytes of this lane in live memory, aligned.
            widen(unsafe { place.read() })
        };
        let values = warp.registers.row_mut::<D>(row);
        if mask == ALL {
            for lane in 0..LANES {
                values[lane] = read(addresses[lane]);
            }
        } else {
            lanes(mask).for_each(|lane| values[lane] = read(addresses[lane]));
        }
    }
    Ok(())
}

#[inline(always)]
fn store<S: Word, T: Word>(
    warp: &mut Warp<'_>,
    i: &Instruction,
    mask: u32,
    narrow: impl Fn(S) -> T,
) -> Outcome {
    let addresses = warp.resolve(Address::of(i), mask, u32::from(i.bytes), Access::Write)?;
    for (k, &row) in i.wide.iter().enumerate() {
        let values = warp.registers.row::<S>(row);
        for lane in lanes(mask) {
            let place = with_exposed_provenance_mut::<T>(addresses[lane] as usize + k * size_of::<T>());
            // SAFETY: `resolve` found the bytes of this lane in live memory, aligned.
            unsafe { place.write(narrow(values[lane])) };
        }
    }
    Ok(())
}
