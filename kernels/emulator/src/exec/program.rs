//! The code of a kernel: its own and that of every function it calls, in one numbering, with one
//! register file and one local memory. Called functions come first, so that lanes inside them count as
//! further back than lanes that did not call.

use std::collections::HashMap;
use std::sync::Arc;

use super::builder::{Builder, Problem};
use super::instruction::Instruction;
use super::registers::Row;
use crate::ptx::{Function, Item, Scope, items};

/// A register that holds the same value in every lane for ever.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Constant {
    pub(crate) row: Row,
    pub(crate) bytes: u32,
    pub(crate) value: u64,
}

/// Special registers that do not change while a warp runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Special {
    ThreadX,
    ThreadY,
    ThreadZ,
    BlockSize(usize),
    BlockIndex(usize),
    GridSize(usize),
    Lane,
    Warp,
    Warps,
    LanesEqual,
    LanesBelow,
    LanesUpTo,
    LanesAbove,
    LanesFrom,
    DynamicShared,
    TotalShared,
    Zero,
    One,
}

/// What a warp runs.
pub(crate) struct Program {
    pub(crate) code: Vec<Instruction>,
    /// Start and end of each instruction in the module's text.
    pub(crate) places: Vec<(u32, u32)>,
    /// Program counter of the kernel's first instruction.
    pub(crate) entry: u32,
    /// Size of the register file, in units of 32 bytes.
    pub(crate) register_units: u32,
    pub(crate) constants: Vec<Constant>,
    pub(crate) specials: Vec<(Row, Special)>,
    /// Bytes of local memory a lane, a multiple of 16.
    pub(crate) local_stride: u32,
    /// Instructions that this interpreter does not have, and what is the matter with them.
    pub(crate) problems: Vec<(u32, Problem)>,
    /// Static shared memory, and where the dynamic part starts behind it.
    static_shared: u32,
    dynamic_start: u32,
}

impl Program {
    /// What is the matter with instruction `at`.
    pub(crate) fn problem(&self, at: u32) -> &str {
        self.problems.iter().find(|(pc, _)| *pc == at).map_or("unknown", |(_, problem)| problem)
    }

    /// Shared memory of a block with `dynamic` bytes behind the static part.
    pub(crate) fn shared_bytes(&self, dynamic: u32) -> u32 {
        if dynamic == 0 { self.static_shared } else { self.dynamic_start + dynamic }
    }
}

impl std::fmt::Debug for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Program({} instructions)", self.code.len())
    }
}

/// Where a placed function takes its arguments and leaves its results.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub(crate) function: Arc<Function>,
    pub(crate) start: u32,
    /// Offsets in local memory.
    pub(crate) params: u32,
    pub(crate) returns: u32,
    /// Row of the program counter to return to.
    pub(crate) return_to: Row,
}

/// What is given out while a program is put together.
#[derive(Default)]
pub(crate) struct Layout {
    pub(crate) register_units: u32,
    pub(crate) local_bytes: u32,
    pub(crate) constants: HashMap<(u64, u32), Row>,
    pub(crate) specials: HashMap<Special, Row>,
    pub(crate) frames: HashMap<String, Frame>,
    pub(crate) dynamic_start: u32,
    pub(crate) problems: Vec<(u32, Problem)>,
}

impl Layout {
    /// A fresh row of `bytes` a lane.
    pub(crate) fn row(&mut self, bytes: u32) -> Row {
        let row = Row(self.register_units);
        self.register_units += bytes;
        row
    }

    pub(crate) fn constant(&mut self, value: u64, bytes: u32) -> Row {
        let value = if bytes < 8 { value & ((1 << (8 * bytes)) - 1) } else { value };
        if let Some(&row) = self.constants.get(&(value, bytes)) {
            return row;
        }
        let row = self.row(bytes);
        self.constants.insert((value, bytes), row);
        row
    }

    pub(crate) fn special(&mut self, special: Special) -> Row {
        if let Some(&row) = self.specials.get(&special) {
            return row;
        }
        let row = self.row(4);
        self.specials.insert(special, row);
        row
    }

    /// Offset of `bytes` fresh bytes of local memory.
    pub(crate) fn local(&mut self, bytes: u32, align: u32) -> u32 {
        let start = self.local_bytes.next_multiple_of(align.max(1));
        self.local_bytes = start + bytes;
        start
    }
}

/// Decodes `function` and all that it calls.
///
/// # Errors
/// The text that is not understood. Instructions that are understood but not had are no error: they
/// stop the warp that comes to them.
pub(crate) fn link(function: &Function, scope: &Scope) -> Result<Program, String> {
    let dynamic_start = function.shared_bytes.next_multiple_of(128);
    let mut layout = Layout { dynamic_start, ..Layout::default() };
    let (mut code, mut places) = (Vec::new(), Vec::new());
    let mut under_way = vec![function.name.clone()];
    let entry = place(function, None, scope, &mut layout, &mut code, &mut places, &mut under_way)?;
    let constants = layout.constants.iter();
    Ok(Program {
        code,
        places,
        entry,
        register_units: layout.register_units,
        constants: constants.map(|(&(value, bytes), &row)| Constant { row, bytes, value }).collect(),
        specials: layout.specials.iter().map(|(&special, &row)| (row, special)).collect(),
        local_stride: layout.local_bytes.next_multiple_of(16),
        problems: layout.problems,
        static_shared: function.shared_bytes,
        dynamic_start,
    })
}

/// Appends a function's code behind that of the functions it calls; returns where it starts.
fn place(
    function: &Function,
    frame: Option<&Frame>,
    scope: &Scope,
    layout: &mut Layout,
    code: &mut Vec<Instruction>,
    places: &mut Vec<(u32, u32)>,
    under_way: &mut Vec<String>,
) -> Result<u32, String> {
    let items = items(&scope.text, function.body.clone())?;
    for item in &items {
        let Item::Instruction(statement) = item else { continue };
        let Some(name) = statement.operand(1).filter(|_| statement.name == "call") else { continue };
        // A function that calls itself has no frame yet when its call is decoded: that call stops.
        if layout.frames.contains_key(name) || under_way.iter().any(|other| other == name) {
            continue;
        }
        let Some(callee) = scope.functions.get(name) else { continue };
        under_way.push(name.to_owned());
        let params = layout.local(callee.param_bytes, 16);
        let returns = layout.local(callee.return_bytes, 16);
        let return_to = layout.row(4);
        let mut frame = Frame { function: callee.clone(), start: 0, params, returns, return_to };
        frame.start = place(callee, Some(&frame), scope, layout, code, places, under_way)?;
        layout.frames.insert(name.to_owned(), frame);
    }
    let start = code.len() as u32;
    Builder::new(function, frame, scope, layout).body(&items, code, places)?;
    Ok(start)
}
