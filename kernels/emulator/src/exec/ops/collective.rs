//! What the lanes of a warp do together.

use crate::exec::builder::{Builder, Problem};
use crate::exec::instruction::{Handler, Instruction, Kind, Outcome, handler};
use crate::exec::registers::{LANES, Row, lanes};
use crate::exec::warp::Warp;
use crate::ptx::{Statement, Type};

/// What a lane gets that asks a lane which does not take part: an f32's NaN.
const NOTHING: u32 = u32::MAX;

pub(super) fn decode<'a>(
    builder: &mut Builder<'a>,
    statement: &Statement<'a>,
) -> Result<Instruction, Problem> {
    let word = Type::B32;
    if statement.name == "activemask" {
        let code = handler!(|w, i, m| {
            w.registers.write(i.d[0], m, &[m; LANES]);
            Ok(())
        });
        return builder.operands(Instruction::new(code), statement, word, &[]);
    }
    if !statement.has("sync") {
        return Err("operations of whole warps need .sync".to_owned());
    }
    let kind = statement.types().last().unwrap_or(word);
    let (code, target, sources): (Option<Handler>, Type, &[Type]) = match statement.name {
        "shfl" => (shuffle(statement), word, &[word, word, word]),
        "vote" if statement.has("ballot") => (Some(ballot()), word, &[Type::Pred]),
        "vote" => (vote(statement), Type::Pred, &[Type::Pred]),
        "match" if kind.bytes() == 4 => (Some(matching(statement)), word, &[word]),
        "redux" => (redux(statement, kind), word, &[word]),
        "elect" => (Some(elect()), word, &[]),
        _ => (None, word, &[]),
    };
    let code = code.ok_or_else(|| format!("this {}", statement.name))?;
    let mut instruction = Instruction::new(code);
    instruction.kind = Kind::Sync;
    let operand = |k: usize| statement.operand(k).ok_or("an operand is missing");
    if statement.operands.len() != sources.len() + 2 {
        return Err(format!("{} operands", statement.operands.len()));
    }
    let (first, second) = match operand(0)?.split_once('|') {
        Some((first, second)) => (first.trim(), Some(second.trim())),
        None => (operand(0)?, None),
    };
    instruction.d[0] = builder.target(first, target)?;
    if let Some(second) = second {
        instruction.d[1] = builder.target(second, Type::Pred)?;
    }
    for (k, &kind) in sources.iter().enumerate() {
        let text = operand(k + 1)?;
        let negated = text.strip_prefix('!');
        instruction.saturate |= negated.is_some();
        instruction.s[k] = builder.source(negated.unwrap_or(text).trim(), kind)?;
    }
    instruction.members = builder.source(operand(sources.len() + 1)?, word)?;
    Ok(instruction)
}

/// Calls `f` with each set of lanes that name each other as members.
#[inline(always)]
fn groups(warp: &mut Warp<'_>, i: &Instruction, mask: u32, mut f: impl FnMut(&mut Warp<'_>, u32)) -> Outcome {
    let mut rest = mask;
    while rest != 0 {
        let members = warp.words(i.members)[rest.trailing_zeros() as usize];
        let group = rest & members;
        if group == 0 {
            // A lane that does not name itself: its own group.
            let lane = rest & rest.wrapping_neg();
            f(warp, lane);
            rest &= !lane;
        } else {
            f(warp, group);
            rest &= !group;
        }
    }
    Ok(())
}

fn shuffle(statement: &Statement<'_>) -> Option<Handler> {
    /// The lane to ask, and whether it is in range.
    #[inline(always)]
    fn source(mode: u8, lane: u32, b: u32, c: u32) -> (u32, bool) {
        let (step, clamp, segment) = (b & 31, c & 31, c >> 8 & 31);
        let last = lane & segment | clamp & !segment;
        let (from, within) = match mode {
            0 => (lane.wrapping_sub(step), lane as i32 - step as i32 >= last as i32),
            1 => (lane + step, lane + step <= last),
            2 => (lane ^ step, lane ^ step <= last),
            _ => {
                let from = lane & segment | step & !segment;
                (from, from <= last)
            }
        };
        if within { (from, true) } else { (lane, false) }
    }
    macro_rules! shuffle {
        ($mode:expr) => {
            handler!(|w, i, m| groups(w, i, m, |w, group| {
                let (a, b, c) = (w.words(i.s[0]), w.words(i.s[1]), w.words(i.s[2]));
                let mut values = [NOTHING; LANES];
                let mut found = [0_u8; LANES];
                for lane in 0..LANES {
                    let (from, within) = source($mode, lane as u32, b[lane], c[lane]);
                    values[lane] = if group >> from & 1 != 0 { a[from as usize & 31] } else { NOTHING };
                    found[lane] = u8::from(within);
                }
                w.registers.write(i.d[0], group, &values);
                if i.d[1] != Row::NONE {
                    w.registers.write(i.d[1], group, &found);
                }
            }))
        };
    }
    Some(match *statement.modifiers.get(1)? {
        "up" => shuffle!(0),
        "down" => shuffle!(1),
        "bfly" => shuffle!(2),
        "idx" => shuffle!(3),
        _ => return None,
    })
}

/// Lanes of `group` whose (negated, if so asked) predicate holds.
fn yes(warp: &Warp<'_>, i: &Instruction, group: u32) -> u32 {
    let holds = warp.registers.mask(i.s[0]);
    group & if i.saturate { !holds } else { holds }
}

fn ballot() -> Handler {
    handler!(|w, i, m| groups(w, i, m, |w, group| {
        let votes = yes(w, i, group);
        w.registers.write(i.d[0], group, &[votes; LANES]);
    }))
}

fn vote(statement: &Statement<'_>) -> Option<Handler> {
    macro_rules! vote {
        (|$votes:ident, $group:ident| $body:expr) => {
            handler!(|w, i, m| groups(w, i, m, |w, $group| {
                let $votes = yes(w, i, $group);
                w.registers.write(i.d[0], $group, &[u8::from($body); LANES]);
            }))
        };
    }
    Some(match *statement.modifiers.get(1)? {
        "all" => vote!(|votes, group| votes == group),
        "any" => vote!(|votes, _group| votes != 0),
        "uni" => vote!(|votes, group| votes == group || votes == 0),
        _ => return None,
    })
}

/// `match.any`: the lanes with the same value; `match.all`: all lanes, if they have one value.
fn matching(statement: &Statement<'_>) -> Handler {
    if statement.has("any") {
        handler!(|w, i, m| groups(w, i, m, |w, group| {
            let a = *w.words(i.s[0]);
            let same = |l: usize| lanes(group).filter(|&o| a[o] == a[l]).fold(0, |mask, o| mask | 1 << o);
            w.registers.write(i.d[0], group, &std::array::from_fn::<u32, LANES, _>(same));
        }))
    } else {
        handler!(|w, i, m| groups(w, i, m, |w, group| {
            let a = *w.words(i.s[0]);
            let same = lanes(group).all(|l| a[l] == a[group.trailing_zeros() as usize]);
            w.registers.write(i.d[0], group, &[if same { group } else { 0 }; LANES]);
            if i.d[1] != Row::NONE {
                w.registers.write(i.d[1], group, &[u8::from(same); LANES]);
            }
        }))
    }
}

fn redux(statement: &Statement<'_>, kind: Type) -> Option<Handler> {
    macro_rules! redux {
        ($T:ty, $join:expr) => {
            handler!(|w, i, m| groups(w, i, m, |w, group| {
                let a = *w.registers.row::<$T>(i.s[0]);
                let join: fn($T, $T) -> $T = $join;
                let value = lanes(group).map(|l| a[l]).reduce(join).unwrap_or_default();
                w.registers.write(i.d[0], group, &[value; LANES]);
            }))
        };
    }
    Some(match (*statement.modifiers.get(1)?, kind) {
        ("add", Type::U32 | Type::S32) => redux!(u32, u32::wrapping_add),
        ("min", Type::U32) => redux!(u32, std::cmp::min),
        ("min", Type::S32) => redux!(i32, std::cmp::min),
        ("max", Type::U32) => redux!(u32, std::cmp::max),
        ("max", Type::S32) => redux!(i32, std::cmp::max),
        ("and", Type::B32) => redux!(u32, |a, b| a & b),
        ("or", Type::B32) => redux!(u32, |a, b| a | b),
        ("xor", Type::B32) => redux!(u32, |a, b| a ^ b),
        _ => return None,
    })
}

/// `elect.sync d|p, members`: one lane, the lowest, has the predicate.
fn elect() -> Handler {
    handler!(|w, i, m| groups(w, i, m, |w, group| {
        let leader = group.trailing_zeros();
        if i.d[0] != Row::NONE {
            w.registers.write(i.d[0], group, &[leader; LANES]);
        }
        let elected: [u8; LANES] = std::array::from_fn(|l| u8::from(l as u32 == leader));
        w.registers.write(i.d[1], group, &elected);
    }))
}
