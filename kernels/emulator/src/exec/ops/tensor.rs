//! Products of small matrices by a whole warp, and moves of their fragments. Layouts as in the PTX
//! ISA, "Matrix Fragments for mma"; sums start at the accumulator and run along k.

use std::ptr::{with_exposed_provenance, with_exposed_provenance_mut};

use super::number::{Bf16, F16, Half};
use crate::exec::builder::{Address, Builder, Problem};
use crate::exec::instruction::{Handler, Instruction, Kind, Outcome, handler};
use crate::exec::registers::{ALL, LANES};
use crate::exec::shared::Access;
use crate::exec::warp::Warp;
use crate::ptx::{Statement, Type};

/// Rows of the product, and its columns.
const M: usize = 16;
const N: usize = 8;
/// The most that the inner dimension is.
const K_MAX: usize = 32;

pub(super) fn decode<'a>(
    builder: &mut Builder<'a>,
    statement: &Statement<'a>,
) -> Result<Instruction, Problem> {
    let mut instruction = match statement.name {
        "mma" => product(builder, statement)?,
        "movmatrix" if statement.modifiers == ["sync", "aligned", "m8n8", "trans", "b16"] => {
            let code = handler!(|w, i, _| {
                let a = *w.words(i.s[0]);
                let element =
                    |row: usize, column: usize| a[row * 4 + column / 2] >> (16 * (column % 2)) & 0xffff;
                let values = std::array::from_fn(|l| {
                    let (row, column) = (2 * (l % 4), l / 4);
                    element(row, column) | element(row + 1, column) << 16
                });
                w.registers.write::<u32>(i.d[0], ALL, &values);
                Ok(())
            });
            builder.operands(Instruction::new(code), statement, Type::B32, &[Type::B32])?
        }
        "ldmatrix" | "stmatrix" => matrix_move(builder, statement)?,
        _ => return Err("this matrix operation".to_owned()),
    };
    instruction.kind = Kind::Sync;
    Ok(instruction)
}

fn product<'a>(builder: &mut Builder<'a>, statement: &Statement<'a>) -> Result<Instruction, Problem> {
    let kinds: Vec<_> = statement.types().collect();
    let shape = statement.modifiers.iter().find_map(|m| m.strip_prefix("m16n8k")).ok_or("its shape")?;
    let k: u32 = shape.parse().map_err(|_| "its shape")?;
    let &[d, a, b, c] = &kinds[..] else { return Err("four types are needed".to_owned()) };
    let layout = statement.has("row") && statement.has("col");
    let code: Option<Handler> = match (d, a, b) {
        (Type::F32, Type::F16, Type::F16) => Some(multiply!(f32, F16)),
        (Type::F16, Type::F16, Type::F16) => Some(multiply!(f16, F16)),
        (Type::F32, Type::Bf16, Type::Bf16) => Some(multiply!(f32, Bf16)),
        (Type::F32, Type::Tf32, Type::Tf32) => Some(handler!(|w, i, _| {
            // What an f32 has beyond tf32 is not looked at.
            multiply_floats::<1>(w, i, |word| [f32::from_bits(word >> 13 << 13)], false)
        })),
        (Type::S32, Type::S8 | Type::U8, Type::S8 | Type::U8) => {
            Some(handler!(|w, i, _| multiply_bytes(w, i)))
        }
        _ => None,
    };
    let code = code.filter(|_| c == d && layout).ok_or("this mma")?;
    // Registers: four elements of 8 bits, two of 16 or one of 32 each.
    let of_a = k * a.bytes() / 8;
    if !matches!(of_a, 2 | 4) || (k as usize) > K_MAX {
        return Err(format!("k = {k}"));
    }
    let accumulators = if d == Type::F16 { 2 } else { 4 };
    let counts = [accumulators, of_a as usize, of_a as usize / 2, accumulators];
    let mut rows = Vec::new();
    for (index, (&text, count)) in statement.operands.iter().zip(counts).enumerate() {
        let names = Builder::list(text);
        if names.len() != count {
            return Err(format!("{} registers of operand {index}", names.len()));
        }
        for name in names {
            rows.push(if index == 0 {
                builder.target(name, Type::B32)?
            } else {
                builder.source(name, Type::B32)?
            });
        }
    }
    let mut instruction = Instruction::new(code);
    instruction.wide = rows.into();
    instruction.count = of_a as u8;
    instruction.from = a;
    instruction.to = b;
    instruction.saturate = statement.has("satfinite");
    Ok(instruction)
}

/// The handler for halves, with accumulators of f32 or f16.
macro_rules! multiply {
    (f32, $H:ty) => {
        handler!(|w, i, _| multiply_floats::<2>(w, i, halves::<$H>, false))
    };
    (f16, $H:ty) => {
        handler!(|w, i, _| multiply_floats::<2>(w, i, halves::<$H>, true))
    };
}
use multiply;

#[inline(always)]
fn halves<H: Half>(word: u32) -> [f32; 2] {
    [H::from_bits(word as u16).to_f32(), H::from_bits((word >> 16) as u16).to_f32()]
}

/// The matrices of a product, read out of the fragments: `E` elements a register.
struct Operands<T> {
    a: [[T; K_MAX]; M],
    b: [[T; N]; K_MAX],
    k: usize,
}

#[inline(always)]
fn operands<T: Copy + Default, const E: usize>(
    warp: &Warp<'_>,
    rows_a: &[crate::exec::registers::Row],
    rows_b: &[crate::exec::registers::Row],
    split_a: impl Fn(u32) -> [T; E],
    split_b: impl Fn(u32) -> [T; E],
) -> Operands<T> {
    let mut all = Operands { a: [[T::default(); K_MAX]; M], b: [[T::default(); N]; K_MAX], k: 0 };
    for (r, &row) in rows_a.iter().enumerate() {
        for (lane, &word) in warp.words(row).iter().enumerate() {
            let (group, turn) = (lane / 4, lane % 4);
            let column = turn * E + r / 2 * 4 * E;
            all.a[group + 8 * (r % 2)][column..column + E].copy_from_slice(&split_a(word));
        }
    }
    for (r, &row) in rows_b.iter().enumerate() {
        for (lane, &word) in warp.words(row).iter().enumerate() {
            let (group, turn) = (lane / 4, lane % 4);
            for (e, value) in split_b(word).into_iter().enumerate() {
                all.b[turn * E + r * 4 * E + e][group] = value;
            }
        }
    }
    all.k = rows_b.len() * 4 * E;
    all
}

/// Row and column of accumulator `c` of a lane.
#[inline(always)]
fn accumulator(lane: usize, c: usize) -> (usize, usize) {
    (lane / 4 + 8 * (c / 2), 2 * (lane % 4) + c % 2)
}

#[inline(always)]
fn multiply_floats<const E: usize>(
    warp: &mut Warp<'_>,
    i: &Instruction,
    split: impl Fn(u32) -> [f32; E],
    half_sums: bool,
) -> Outcome {
    let of_a = i.count as usize;
    let of_c = if half_sums { 2 } else { 4 };
    let (targets, rest) = i.wide.split_at(of_c);
    let (rows_a, rest) = rest.split_at(of_a);
    let (rows_b, rows_c) = rest.split_at(of_a / 2);
    let all = operands(warp, rows_a, rows_b, &split, &split);
    let mut sums = [[0.0_f32; N]; M];
    for (r, &row) in rows_c.iter().enumerate() {
        for (lane, &word) in warp.words(row).iter().enumerate() {
            if half_sums {
                for (e, value) in halves::<F16>(word).into_iter().enumerate() {
                    let (row, column) = accumulator(lane, 2 * r + e);
                    sums[row][column] = value;
                }
            } else {
                let (row, column) = accumulator(lane, r);
                sums[row][column] = f32::from_bits(word);
            }
        }
    }
    for (row, sums) in sums.iter_mut().enumerate() {
        for k in 0..all.k {
            let a = all.a[row][k];
            for (sum, &b) in sums.iter_mut().zip(&all.b[k]) {
                *sum = a.mul_add(b, *sum);
            }
        }
    }
    for (r, &row) in targets.iter().enumerate() {
        let at = |lane, c| {
            let (row, column) = accumulator(lane, c);
            sums[row][column]
        };
        let half = |lane, c| u32::from(F16::from_f32(at(lane, c)).bits());
        let values = std::array::from_fn(|lane| {
            if half_sums { half(lane, 2 * r) | half(lane, 2 * r + 1) << 16 } else { at(lane, r).to_bits() }
        });
        warp.registers.write::<u32>(row, ALL, &values);
    }
    Ok(())
}

#[inline(always)]
fn multiply_bytes(warp: &mut Warp<'_>, i: &Instruction) -> Outcome {
    let of_a = i.count as usize;
    let (targets, rest) = i.wide.split_at(4);
    let (rows_a, rest) = rest.split_at(of_a);
    let (rows_b, rows_c) = rest.split_at(of_a / 2);
    let split = |kind: Type| {
        move |word: u32| {
            let bytes = word.to_le_bytes();
            bytes.map(|b| if kind == Type::S8 { i32::from(b as i8) } else { i32::from(b) })
        }
    };
    let all = operands(warp, rows_a, rows_b, split(i.from), split(i.to));
    let mut sums = [[0_i32; N]; M];
    for (row, sums) in sums.iter_mut().enumerate() {
        for k in 0..all.k {
            let a = all.a[row][k];
            for (sum, &b) in sums.iter_mut().zip(&all.b[k]) {
                *sum += a * b;
            }
        }
    }
    for (r, (&target, &row_c)) in targets.iter().zip(rows_c).enumerate() {
        let c = *warp.registers.row::<i32>(row_c);
        let values = std::array::from_fn(|lane| {
            let (row, column) = accumulator(lane, r);
            let sum = sums[row][column];
            if i.saturate { c[lane].saturating_add(sum) } else { c[lane].wrapping_add(sum) }
        });
        warp.registers.write::<i32>(target, ALL, &values);
    }
    Ok(())
}

/// `ldmatrix` and `stmatrix`: matrices of 8 x 8 elements of 16 bits, whose rows the lanes point at.
fn matrix_move<'a>(builder: &mut Builder<'a>, statement: &Statement<'a>) -> Result<Instruction, Problem> {
    let load = statement.name == "ldmatrix";
    let count = match () {
        () if statement.has("x1") => 1,
        () if statement.has("x2") => 2,
        () if statement.has("x4") => 4,
        () => return Err("how many matrices".to_owned()),
    };
    if !statement.has("m8n8") || !statement.has("b16") {
        return Err("this shape".to_owned());
    }
    let code =
        if load { handler!(|w, i, _| load_matrices(w, i)) } else { handler!(|w, i, _| store_matrices(w, i)) };
    let operand = |k: usize| statement.operand(k).ok_or("an operand is missing");
    let (registers, place) = if load { (operand(0)?, operand(1)?) } else { (operand(1)?, operand(0)?) };
    let names = Builder::list(registers);
    if names.len() != count {
        return Err(format!("{} registers", names.len()));
    }
    let mut instruction = Instruction::new(code);
    let address = builder.address(place, statement)?;
    instruction.space = address.space;
    instruction.s[0] = address.base;
    instruction.base_64 = address.base_64;
    instruction.immediate = address.offset;
    instruction.saturate = statement.has("trans");
    let row = |name| if load { builder.target(name, Type::B32) } else { builder.source(name, Type::B32) };
    instruction.wide = names.into_iter().map(row).collect::<Result<_, _>>()?;
    Ok(instruction)
}

/// Lanes whose addresses count.
fn pointing(i: &Instruction) -> u32 {
    ALL >> (LANES - 8 * i.wide.len())
}

/// Row and column of element `e` of a lane, transposed or not.
fn element(i: &Instruction, lane: usize, e: usize) -> (usize, usize) {
    let (group, pair) = (lane / 4, 2 * (lane % 4) + e);
    if i.saturate { (pair, group) } else { (group, pair) }
}

fn load_matrices(warp: &mut Warp<'_>, i: &Instruction) -> Outcome {
    let addresses = warp.resolve(Address::of(i), pointing(i), 16, Access::Read)?;
    for (matrix, &target) in i.wide.iter().enumerate() {
        let rows: [[u16; 8]; 8] = std::array::from_fn(|row| {
            let place = with_exposed_provenance::<[u16; 8]>(addresses[8 * matrix + row] as usize);
            // SAFETY: `resolve` found 16 bytes there in live memory, aligned.
            unsafe { place.read() }
        });
        let values = std::array::from_fn(|lane| {
            let at = |e| {
                let (row, column) = element(i, lane, e);
                u32::from(rows[row][column])
            };
            at(0) | at(1) << 16
        });
        warp.registers.write::<u32>(target, ALL, &values);
    }
    Ok(())
}

fn store_matrices(warp: &mut Warp<'_>, i: &Instruction) -> Outcome {
    let addresses = warp.resolve(Address::of(i), pointing(i), 16, Access::Write)?;
    for (matrix, &source) in i.wide.iter().enumerate() {
        for (lane, &word) in warp.words(source).iter().enumerate() {
            for e in 0..2 {
                let (row, column) = element(i, lane, e);
                let start = with_exposed_provenance_mut::<u16>(addresses[8 * matrix + row] as usize);
                // SAFETY: `resolve` found 16 bytes there in live memory, aligned.
                unsafe { start.add(column).write((word >> (16 * e)) as u16) };
            }
        }
    }
    Ok(())
}
