//! `atom` and `red`, on memory that other threads of the host may be changing too.

use std::ptr::with_exposed_provenance_mut;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::convert::{read_lanes, write_lanes};
use super::number::{Bf16, F16, Half, greatest, least};
use crate::exec::builder::{Address, Builder, Problem};
use crate::exec::instruction::{Instruction, Outcome, handler};
use crate::exec::registers::{LANES, lanes};
use crate::exec::shared::Access;
use crate::exec::warp::Warp;
use crate::ptx::{Statement, Type};

/// What is done to the old value; the numbers stand in an instruction's `count`.
const OPERATIONS: [&str; 10] = ["add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec"];

pub(super) fn decode<'a>(
    builder: &mut Builder<'a>,
    statement: &Statement<'a>,
) -> Result<Instruction, Problem> {
    let kind = statement.types().last().ok_or("no type")?;
    let operation = OPERATIONS.iter().position(|o| statement.has(o)).ok_or("no operation")?;
    let name = OPERATIONS[operation];
    let possible = match name {
        "add" => kind.bytes() >= 4 || kind.is_float(),
        "min" | "max" => kind.bytes() >= 4 || matches!(kind, Type::F16 | Type::Bf16),
        "inc" | "dec" => kind == Type::U32,
        _ => !kind.is_float(),
    };
    if !possible || kind.bytes() > 8 || statement.operands.iter().any(|o| o.starts_with('{')) {
        return Err(format!("atomic {name} of {kind:?}"));
    }
    let returns = statement.name == "atom";
    let first = usize::from(returns);
    let operand = |k: usize| statement.operand(k).ok_or("an operand is missing");
    let mut instruction = Instruction::new(handler!(|w, i, m| update(w, i, m)));
    let address = builder.address(operand(first)?, statement)?;
    instruction.space = address.space;
    instruction.s[0] = address.base;
    instruction.base_64 = address.base_64;
    instruction.immediate = address.offset;
    instruction.s[1] = builder.source(operand(first + 1)?, kind)?;
    if name == "cas" {
        instruction.s[2] = builder.source(operand(first + 2)?, kind)?;
    }
    if returns {
        instruction.d[0] = builder.target(operand(0)?, kind)?;
    }
    instruction.count = operation as u8;
    instruction.to = kind;
    instruction.bytes = kind.bytes() as u8;
    Ok(instruction)
}

fn update(warp: &mut Warp<'_>, i: &Instruction, mask: u32) -> Outcome {
    let addresses = warp.resolve(Address::of(i), mask, u32::from(i.bytes), Access::Atomic)?;
    let b = read_lanes(warp, i.s[1], i.bytes);
    let c = if i.s[2].exists() { read_lanes(warp, i.s[2], i.bytes) } else { [0; LANES] };
    let mut olds = [0; LANES];
    for lane in lanes(mask) {
        macro_rules! update {
            ($Atomic:ty, $T:ty) => {{
                let place = with_exposed_provenance_mut::<$T>(addresses[lane] as usize);
                // SAFETY: `resolve` found the bytes in live memory, aligned.
                let place = unsafe { <$Atomic>::from_ptr(place) };
                let change = |old: $T| Some(changed(i, u64::from(old), b[lane], c[lane]) as $T);
                let old = place.fetch_update(Ordering::AcqRel, Ordering::Acquire, change);
                u64::from(old.unwrap_or_else(|old| old))
            }};
        }
        olds[lane] = match i.bytes {
            2 => update!(AtomicU16, u16),
            4 => update!(AtomicU32, u32),
            _ => update!(AtomicU64, u64),
        };
    }
    if i.d[0].exists() {
        write_lanes(warp, i.d[0], i.bytes, mask, &olds);
    }
    Ok(())
}

/// The value that follows `old`, all as bits.
fn changed(i: &Instruction, old: u64, b: u64, c: u64) -> u64 {
    match OPERATIONS[i.count as usize] {
        "exch" => b,
        "cas" if old == b => c,
        "cas" => old,
        "and" => old & b,
        "or" => old | b,
        "xor" => old ^ b,
        "inc" => {
            if old >= b {
                0
            } else {
                old + 1
            }
        }
        "dec" => {
            if old == 0 || old > b {
                b
            } else {
                old - 1
            }
        }
        name => arithmetic(name, i.to, old, b),
    }
}

fn arithmetic(name: &str, kind: Type, old: u64, b: u64) -> u64 {
    macro_rules! choose {
        ($T:ty, $from:expr, $to:expr) => {{
            let (x, y): ($T, $T) = ($from(old), $from(b));
            match name {
                "add" => $to(x + y),
                "min" => $to(least(x, y, false)),
                _ => $to(greatest(x, y, false)),
            }
        }};
    }
    fn half<H: Half>(name: &str, old: u64, b: u64) -> u64 {
        let (x, y) = (H::from_bits(old as u16).to_f32(), H::from_bits(b as u16).to_f32());
        let value = match name {
            "add" => x + y,
            "min" => least(x, y, false),
            _ => greatest(x, y, false),
        };
        u64::from(H::from_f32(value).bits())
    }
    fn pair<H: Half>(name: &str, old: u64, b: u64) -> u64 {
        half::<H>(name, old >> 16, b >> 16) << 16 | half::<H>(name, old, b)
    }
    match kind {
        Type::F32 => {
            choose!(f32, |bits: u64| f32::from_bits(bits as u32), |v: f32| u64::from(v.to_bits()))
        }
        Type::F64 => choose!(f64, f64::from_bits, f64::to_bits),
        Type::F16 => half::<F16>(name, old, b),
        Type::Bf16 => half::<Bf16>(name, old, b),
        Type::F16x2 => pair::<F16>(name, old, b),
        Type::Bf16x2 => pair::<Bf16>(name, old, b),
        _ => match (name, kind) {
            ("add", _) => old.wrapping_add(b),
            ("min", Type::S32) => (old as i32).min(b as i32) as u64,
            ("min", Type::S64) => (old as i64).min(b as i64) as u64,
            ("min", _) => old.min(b),
            (_, Type::S32) => (old as i32).max(b as i32) as u64,
            (_, Type::S64) => (old as i64).max(b as i64) as u64,
            _ => old.max(b),
        },
    }
}
