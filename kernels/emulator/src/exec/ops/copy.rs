//! `cp.async`: copies from global to shared memory that arrive at a later wait.

use std::ptr::with_exposed_provenance;

use crate::exec::async_copy::BYTES_MAX;
use crate::exec::builder::{Address, Builder, Problem};
use crate::exec::instruction::{Instruction, Outcome, Space, handler};
use crate::exec::registers::{LANES, lanes};
use crate::exec::shared::Access;
use crate::exec::warp::Warp;
use crate::ptx::{Statement, Type, integer};

pub(super) fn decode<'a>(
    builder: &mut Builder<'a>,
    statement: &Statement<'a>,
) -> Result<Instruction, Problem> {
    match statement.modifiers[..] {
        ["async", "commit_group"] => Ok(Instruction::new(handler!(|w, _, m| {
            w.copies.commit(m);
            Ok(())
        }))),
        ["async", "wait_all"] => Ok(Instruction::new(handler!(|w, _, m| {
            w.copies.wait(m, None, w.shared);
            Ok(())
        }))),
        ["async", "wait_group"] => {
            let mut instruction = Instruction::new(handler!(|w, i, m| {
                w.copies.wait(m, Some(i.immediate as u32), w.shared);
                Ok(())
            }));
            let groups = statement.operand(0).and_then(integer).ok_or("how many groups may be open")?;
            instruction.immediate = groups as i64;
            Ok(instruction)
        }
        ["async", "ca" | "cg", "shared" | "shared::cta", "global", ..] => issue(builder, statement),
        _ => Err("this cp".to_owned()),
    }
}

fn issue<'a>(builder: &mut Builder<'a>, statement: &Statement<'a>) -> Result<Instruction, Problem> {
    let operand = |k: usize| statement.operand(k).ok_or("an operand is missing");
    let mut instruction = Instruction::new(handler!(|w, i, m| copy(w, i, m)));
    let to = builder.address(operand(0)?, statement)?;
    let from = builder.address(operand(1)?, statement)?;
    instruction.s[0] = to.base;
    instruction.base_64 = to.base_64;
    instruction.immediate = to.offset;
    instruction.space = Space::Shared;
    let mut source = Instruction::new(instruction.run);
    source.s[0] = from.base;
    source.base_64 = from.base_64;
    source.immediate = from.offset;
    source.space = Space::Global;
    instruction.inner = Some(Box::new(source));
    let bytes = integer(operand(2)?).filter(|n| matches!(n, 4 | 8 | 16)).ok_or("4, 8 or 16 bytes")?;
    instruction.bytes = bytes as u8;
    if let Some(size) = statement.operand(3) {
        // The rest up to `bytes` is zero. With `.L2::cache_hint` alone this is a policy of 64 bits.
        match builder.register(size) {
            Some((_, 8)) => {}
            Some((row, 1)) => instruction.s[2] = row,
            _ => instruction.s[1] = builder.source(size, Type::U32)?,
        }
    }
    Ok(instruction)
}

fn copy(warp: &mut Warp<'_>, i: &Instruction, mask: u32) -> Outcome {
    let source = i.inner.as_deref().expect("decoded with its source");
    let bytes = u32::from(i.bytes);
    let start = warp.shared.start();
    let to = warp.resolve(Address::of(i), mask, bytes, Access::Write)?;
    let sizes = if i.s[1].exists() { *warp.words(i.s[1]) } else { [bytes; LANES] };
    let ignored = if i.s[2].exists() { warp.registers.mask(i.s[2]) } else { 0 };
    // Lanes that take nothing may state any address.
    let reading = lanes(mask & !ignored).filter(|&l| sizes[l] != 0).fold(0, |all, l| all | 1 << l);
    let from = warp.resolve(Address::of(source), reading, bytes, Access::Read)?;
    for lane in lanes(mask) {
        let mut data = [0; BYTES_MAX];
        if reading >> lane & 1 != 0 {
            let size = sizes[lane].min(bytes) as usize;
            let place = with_exposed_provenance::<u8>(from[lane] as usize);
            // SAFETY: `resolve` found `bytes` bytes there in live memory.
            unsafe { place.copy_to_nonoverlapping(data.as_mut_ptr(), size) };
        }
        warp.copies.issue(lane, to[lane] as usize - start, &data[..bytes as usize]);
    }
    Ok(())
}
