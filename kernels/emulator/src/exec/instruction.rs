//! A decoded instruction: whom to call, and which rows to give it.

use super::ops::Rounding;
use super::registers::Row;
use super::warp::Warp;
use crate::fault::FaultKind;
use crate::ptx::Type;

/// Why a warp cannot go on, and the lane that met it.
#[derive(Debug)]
pub(crate) struct Stop {
    pub(crate) kind: FaultKind,
    pub(crate) lane: Option<usize>,
}

impl Stop {
    /// A stop that one lane caused.
    pub(crate) fn at(lane: usize, kind: FaultKind) -> Box<Self> {
        Box::new(Self { kind, lane: Some(lane) })
    }
}

/// What an instruction's code answers. Boxed, so that the answer fits in a register.
pub(crate) type Outcome = Result<(), Box<Stop>>;

/// The code of an instruction, called with the lanes that take part.
///
/// Unsafe to call on a host without the vector features it was compiled for; `handler!` picks those
/// that the host has.
pub(crate) type Handler = unsafe fn(&mut Warp<'_>, &Instruction, u32) -> Outcome;

/// How an instruction moves a warp on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// On to the next one.
    Plain,
    /// To `target`.
    Branch,
    /// To one of `wide`, by the index in `s[0]`.
    BranchIndexed,
    /// To `target`, after the handler has passed the arguments.
    Call,
    /// Back to the place in `s[0]`.
    Return,
    /// The lanes end.
    Exit,
    /// On once all lanes of the member mask in `members` are here.
    Sync,
    /// On once the block's barrier opens.
    Barrier,
}

/// State spaces that an address may lie in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Generic,
    Global,
    Shared,
    Local,
    /// The kernel's parameters.
    Param,
}

/// One decoded instruction. Which operand is in which row is a matter between its decoder and its
/// handler.
pub(crate) struct Instruction {
    pub(crate) run: Handler,
    pub(crate) kind: Kind,
    pub(crate) space: Space,
    /// Elements of a vector access, or rows of a list.
    pub(crate) count: u8,
    /// Bytes of a memory access by one lane, or another small number.
    pub(crate) bytes: u8,
    /// The address in `s[0]` has 64 bits, not 32.
    pub(crate) base_64: bool,
    /// Subnormal inputs and outputs are zero.
    pub(crate) ftz: bool,
    /// The result is clamped.
    pub(crate) saturate: bool,
    /// Negative results are zero.
    pub(crate) relu: bool,
    /// Infinite results are the greatest finite one.
    pub(crate) finite: bool,
    /// Types of a conversion, and how it rounds.
    pub(crate) from: Type,
    pub(crate) to: Type,
    pub(crate) rounding: Rounding,
    pub(crate) guard: Row,
    pub(crate) guard_negated: bool,
    /// Program counter of a branch.
    pub(crate) target: u32,
    pub(crate) d: [Row; 2],
    pub(crate) s: [Row; 4],
    pub(crate) members: Row,
    pub(crate) immediate: i64,
    /// Rows beyond `d` and `s`.
    pub(crate) wide: Box<[Row]>,
    /// An instruction that is a part of this one.
    pub(crate) inner: Option<Box<Instruction>>,
}

impl Instruction {
    pub(crate) fn new(run: Handler) -> Self {
        Self {
            run,
            kind: Kind::Plain,
            space: Space::Generic,
            count: 1,
            bytes: 0,
            base_64: false,
            ftz: false,
            saturate: false,
            relu: false,
            finite: false,
            from: Type::B32,
            to: Type::B32,
            rounding: Rounding::Nearest,
            guard: Row::NONE,
            guard_negated: false,
            target: 0,
            d: [Row::NONE; 2],
            s: [Row::NONE; 4],
            members: Row::NONE,
            immediate: 0,
            wide: Box::default(),
            inner: None,
        }
    }
}

/// The host has the vector features that fast handlers are compiled for.
pub(crate) fn host_is_fast() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

/// Makes a [`Handler`] of code that is written like a closure of `(&mut Warp, &Instruction, mask)` but
/// captures nothing: once for any host, and on x86-64 once more with AVX2 and FMA.
macro_rules! handler {
    (|$warp:tt, $instruction:tt, $mask:tt| $code:expr) => {{
        #[inline(always)]
        fn code(
            $warp: &mut $crate::exec::warp::Warp<'_>,
            $instruction: &$crate::exec::instruction::Instruction,
            $mask: u32,
        ) -> $crate::exec::instruction::Outcome {
            $code
        }
        fn plain(
            warp: &mut $crate::exec::warp::Warp<'_>,
            instruction: &$crate::exec::instruction::Instruction,
            mask: u32,
        ) -> $crate::exec::instruction::Outcome {
            code(warp, instruction, mask)
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        fn fast(
            warp: &mut $crate::exec::warp::Warp<'_>,
            instruction: &$crate::exec::instruction::Instruction,
            mask: u32,
        ) -> $crate::exec::instruction::Outcome {
            code(warp, instruction, mask)
        }
        #[cfg(not(target_arch = "x86_64"))]
        use plain as fast;
        let picked: $crate::exec::instruction::Handler =
            if $crate::exec::instruction::host_is_fast() { fast } else { plain };
        picked
    }};
}

/// A [`Handler`] that computes each lane of `d[0]` from that lane of `s[0]`, `s[1]`, ... What stands
/// before a semicolon names the instruction. The code is put into the loop itself, not into a closure:
/// only there is it sure to be compiled for the host's vectors.
macro_rules! map {
    (|$($x:ident: $T:ty),+| $body:expr) => { map!(_i; |$($x: $T),+| $body) };
    ($i:ident; |$a:ident: $A:ty| $body:expr) => {
        handler!(|warp, instruction, mask| {
            let $i = instruction;
            let a = warp.registers.row::<$A>(instruction.s[0]);
            let mut values = [$crate::exec::registers::Word::zero(); $crate::exec::registers::LANES];
            for lane in 0..$crate::exec::registers::LANES {
                let $a = a[lane];
                values[lane] = $body;
            }
            warp.registers.write(instruction.d[0], mask, &values);
            Ok(())
        })
    };
    ($i:ident; |$a:ident: $A:ty, $b:ident: $B:ty| $body:expr) => {
        handler!(|warp, instruction, mask| {
            let $i = instruction;
            let a = warp.registers.row::<$A>(instruction.s[0]);
            let b = warp.registers.row::<$B>(instruction.s[1]);
            let mut values = [$crate::exec::registers::Word::zero(); $crate::exec::registers::LANES];
            for lane in 0..$crate::exec::registers::LANES {
                let ($a, $b) = (a[lane], b[lane]);
                values[lane] = $body;
            }
            warp.registers.write(instruction.d[0], mask, &values);
            Ok(())
        })
    };
    ($i:ident; |$a:ident: $A:ty, $b:ident: $B:ty, $c:ident: $C:ty| $body:expr) => {
        handler!(|warp, instruction, mask| {
            let $i = instruction;
            let a = warp.registers.row::<$A>(instruction.s[0]);
            let b = warp.registers.row::<$B>(instruction.s[1]);
            let c = warp.registers.row::<$C>(instruction.s[2]);
            let mut values = [$crate::exec::registers::Word::zero(); $crate::exec::registers::LANES];
            for lane in 0..$crate::exec::registers::LANES {
                let ($a, $b, $c) = (a[lane], b[lane], c[lane]);
                values[lane] = $body;
            }
            warp.registers.write(instruction.d[0], mask, &values);
            Ok(())
        })
    };
}

pub(crate) use {handler, map};
