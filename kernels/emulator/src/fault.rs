//! What a kernel did wrong, told as a debugger would: what, in which kernel, block and thread, and at
//! which PTX instruction.

use std::fmt;

/// Why a launch stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// Global, local, constant or parameter bytes outside every live allocation.
    OutOfBounds { address: u64, bytes: u32 },
    /// An address that is no multiple of the access's size.
    Misaligned { address: u64, bytes: u32 },
    /// Shared bytes outside the block's shared memory of `size` bytes.
    SharedOutOfBounds { address: u64, bytes: u32, size: u32 },
    /// A barrier that some threads of the block never reach.
    Barrier { waiting: u32, missing: u32 },
    /// A warp operation that some lanes of its member mask never reach.
    MissingLanes { members: u32, arrived: u32 },
    /// Two warps touched one shared byte between two barriers, and one of them wrote.
    Race { address: u32, other_warp: u32 },
    /// `trap`.
    Trap,
    /// A failed `assert` of device code.
    Assert(String),
    /// An instruction, or a form of one, that this interpreter does not have.
    Unsupported(String),
    /// A launch that no device would take (sizes, parameters).
    Launch(String),
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfBounds { address, bytes } => {
                write!(f, "out-of-bounds access of {bytes} bytes at {address:#x}")
            }
            Self::Misaligned { address, bytes } => {
                write!(f, "misaligned access of {bytes} bytes at {address:#x}")
            }
            Self::SharedOutOfBounds { address, bytes, size } => {
                write!(f, "shared memory out of bounds: {bytes} bytes at {address} of {size}")
            }
            Self::Barrier { waiting, missing } => {
                write!(f, "barrier where {waiting} threads wait for {missing} that never come")
            }
            Self::MissingLanes { members, arrived } => {
                let missing = members & !arrived;
                write!(f, "warp operation of lanes {members:#010x} waits for {missing:#010x} that never come")
            }
            Self::Race { address, other_warp } => {
                write!(f, "shared memory race with warp {other_warp} on byte {address}")
            }
            Self::Trap => f.write_str("trap"),
            Self::Assert(text) => write!(f, "device assert: {text}"),
            Self::Unsupported(what) => write!(f, "unsupported instruction: {what}"),
            Self::Launch(why) => write!(f, "launch refused: {why}"),
        }
    }
}

/// Where in a launch a fault happened. Fields that do not apply are absent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Index of the block in the grid (x, y, z).
    pub block: Option<[u32; 3]>,
    /// Index of the thread in its block (x, y, z).
    pub thread: Option<[u32; 3]>,
    /// The PTX instruction's text.
    pub instruction: Option<String>,
}

/// Why and where a launch stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub kind: FaultKind,
    /// The entry that was launched.
    pub kernel: String,
    pub place: Place,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in kernel {}", self.kind, self.kernel)?;
        if let Some([x, y, z]) = self.place.block {
            write!(f, ", block ({x}, {y}, {z})")?;
        }
        if let Some([x, y, z]) = self.place.thread {
            write!(f, ", thread ({x}, {y}, {z})")?;
        }
        if let Some(text) = &self.place.instruction {
            write!(f, ", at: {text}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Fault {}
