//! Decoding a function's body: names become rows, offsets and program counters.

use std::collections::HashMap;

use super::instruction::{Instruction, Kind, Space};
use super::ops;
use super::program::{Frame, Layout, Special};
use super::registers::Row;
use crate::ptx::{Function, Item, Scope, Side, Statement, Type, float, integer, split};

/// Why an instruction cannot be decoded.
pub(crate) type Problem = String;

/// Names declared between two braces.
#[derive(Default)]
struct Names<'a> {
    /// `%r<9>`: prefix, count, bytes.
    ranges: HashMap<&'a str, (u32, u32)>,
    registers: HashMap<&'a str, (Row, u32)>,
    /// Offsets of `.local` and `.param` variables in local memory.
    locals: HashMap<&'a str, u32>,
}

/// An address as an instruction states it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Address {
    pub(crate) base: Row,
    pub(crate) base_64: bool,
    pub(crate) offset: i64,
    pub(crate) space: Space,
}

pub(crate) struct Builder<'a> {
    function: &'a Function,
    frame: Option<&'a Frame>,
    scope: &'a Scope,
    pub(crate) layout: &'a mut Layout,
    names: Vec<Names<'a>>,
    labels: HashMap<&'a str, u32>,
    targets: HashMap<&'a str, Vec<&'a str>>,
    /// Instructions that jump to labels: their index, and the labels.
    jumps: Vec<(usize, Vec<&'a str>)>,
}

impl<'a> Builder<'a> {
    pub(crate) fn new(
        function: &'a Function,
        frame: Option<&'a Frame>,
        scope: &'a Scope,
        layout: &'a mut Layout,
    ) -> Self {
        Self {
            function,
            frame,
            scope,
            layout,
            names: vec![Names::default()],
            labels: HashMap::new(),
            targets: HashMap::new(),
            jumps: Vec::new(),
        }
    }

    /// Decodes `items` onto the end of `code`.
    pub(crate) fn body(
        mut self,
        items: &[Item<'a>],
        code: &mut Vec<Instruction>,
        places: &mut Vec<(u32, u32)>,
    ) -> Result<(), Problem> {
        for item in items {
            if let Item::Targets(label, list) = item {
                self.targets.insert(label, list.clone());
            }
        }
        for item in items {
            match item {
                Item::Open => self.names.push(Names::default()),
                Item::Close => drop(self.names.pop()),
                Item::Label(name) => {
                    self.labels.insert(name, code.len() as u32);
                }
                Item::Registers(kind, names) => self.declare(*kind, names),
                Item::Local(variable) => {
                    let offset = self.layout.local(variable.bytes() as u32, variable.align);
                    self.innermost().locals.insert(variable.name, offset);
                }
                Item::Targets(..) => {}
                Item::Instruction(statement) => {
                    let place = (statement.place.start as u32, statement.place.end as u32);
                    for instruction in self.statement(statement, code.len()) {
                        code.push(instruction);
                        places.push(place);
                    }
                }
            }
        }
        // Running off the end is a return.
        let end =
            code.last().is_none_or(|i| !matches!(i.kind, Kind::Exit | Kind::Return) || i.guard.exists());
        if end || self.labels.values().any(|&at| at as usize == code.len()) {
            code.push(ops::control::leave(&self));
            places.push((self.function.body.end as u32, self.function.body.end as u32));
        }
        self.resolve(code)
    }

    fn resolve(&self, code: &mut [Instruction]) -> Result<(), Problem> {
        for (index, labels) in &self.jumps {
            let target = |label: &&str| self.labels.get(label).copied().ok_or(format!("no label {label}"));
            let targets = labels.iter().map(target).collect::<Result<Vec<_>, _>>()?;
            let instruction = &mut code[*index];
            match instruction.kind {
                Kind::BranchIndexed => instruction.wide = targets.into_iter().map(Row).collect(),
                _ => instruction.target = targets[0],
            }
        }
        Ok(())
    }

    fn innermost(&mut self) -> &mut Names<'a> {
        self.names.last_mut().expect("the body has a scope of its own")
    }

    fn declare(&mut self, kind: Type, names: &[(&'a str, Option<u32>)]) {
        for &(name, count) in names {
            match count {
                Some(count) => {
                    self.innermost().ranges.insert(name, (count, kind.bytes()));
                }
                None => {
                    let row = self.layout.row(kind.bytes());
                    self.innermost().registers.insert(name, (row, kind.bytes()));
                }
            }
        }
    }

    /// The instructions of one statement, guard included: one, or two for a call with results. Where
    /// it cannot be decoded, one that stops the warp that comes to it.
    fn statement(&mut self, statement: &Statement<'a>, at: usize) -> Vec<Instruction> {
        let guard = match statement.guard.map(|(name, negated)| (self.register(name), negated)) {
            None => Ok((Row::NONE, false)),
            Some((Some((row, 1)), negated)) => Ok((row, negated)),
            Some(_) => Err("its guard is no predicate".to_owned()),
        };
        let decoded = guard.and_then(|guard| Ok((guard, ops::decode(self, statement, at)?)));
        match decoded {
            Ok(((row, negated), mut instructions)) => {
                for instruction in &mut instructions {
                    instruction.guard = row;
                    instruction.guard_negated = negated;
                }
                instructions
            }
            Err(problem) => {
                self.layout.problems.push((at as u32, problem));
                vec![ops::unsupported()]
            }
        }
    }

    /// Notes that the instruction at `at` jumps to `label`.
    pub(crate) fn jump(&mut self, at: usize, label: &'a str) {
        self.jumps.push((at, vec![label]));
    }

    /// Notes that the instruction at `at` jumps to one of the labels behind `table`.
    pub(crate) fn jump_table(&mut self, at: usize, table: &'a str) -> Result<(), Problem> {
        let labels = self.targets.get(table).ok_or_else(|| format!("no targets {table}"))?;
        self.jumps.push((at, labels.clone()));
        Ok(())
    }

    /// The frame of the function being decoded; none for the kernel itself.
    pub(crate) fn frame(&self) -> Option<&'a Frame> {
        self.frame
    }

    /// A declared register and its bytes a lane.
    pub(crate) fn register(&mut self, name: &'a str) -> Option<(Row, u32)> {
        let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let number = name[stem.len()..].parse::<u32>();
        for names in self.names.iter_mut().rev() {
            if let Some(&found) = names.registers.get(name) {
                return Some(found);
            }
            let Some(&(count, bytes)) = names.ranges.get(stem) else { continue };
            if number.as_ref().is_ok_and(|&n| n < count) {
                let row = self.layout.row(bytes);
                names.registers.insert(name, (row, bytes));
                return Some((row, bytes));
            }
        }
        None
    }

    /// The register that an instruction writes, which must hold exactly `kind`. `_` is none.
    pub(crate) fn target(&mut self, name: &'a str, kind: Type) -> Result<Row, Problem> {
        if name == "_" {
            return Ok(Row::NONE);
        }
        match self.register(name) {
            Some((row, bytes)) if bytes == kind.bytes() => Ok(row),
            Some((_, bytes)) => Err(format!("{name} has {bytes} bytes, not {}", kind.bytes())),
            None => Err(format!("{name} is not declared")),
        }
    }

    /// A register that an instruction reads as `kind`, or a number, special register or address.
    pub(crate) fn source(&mut self, text: &'a str, kind: Type) -> Result<Row, Problem> {
        if let Some((row, bytes)) = self.register(text) {
            return if bytes == kind.bytes() {
                Ok(row)
            } else {
                Err(format!("{text} has {bytes} bytes, not {}", kind.bytes()))
            };
        }
        if let Some(special) = special(text) {
            return if kind.bytes() == 4 {
                Ok(self.layout.special(special))
            } else {
                Err(format!("{text} has 4 bytes"))
            };
        }
        let value = self.number(text, kind).or_else(|| self.symbol(text).map(|(value, _)| value as u64));
        let value = value.ok_or_else(|| format!("{text} is not known"))?;
        Ok(self.layout.constant(value, kind.bytes()))
    }

    /// The bits of a written number as `kind`.
    fn number(&self, text: &str, kind: Type) -> Option<u64> {
        if text == "WARP_SZ" {
            return Some(32);
        }
        if let Some(value) = float(text) {
            return match kind.bytes() {
                4 => Some(u64::from((value as f32).to_bits())),
                8 => Some(value.to_bits()),
                _ => None,
            };
        }
        integer(text)
    }

    /// Address or offset of a variable, with its space; `name` or `name+4`.
    fn symbol(&self, text: &str) -> Option<(i64, Space)> {
        let (name, offset) = match text.split_once('+') {
            Some((name, offset)) => (name.trim(), integer(offset.trim())? as i64),
            None => (text, 0),
        };
        if let Some(offset_in_locals) = self.names.iter().rev().find_map(|n| n.locals.get(name)) {
            return Some((i64::from(*offset_in_locals) + offset, Space::Local));
        }
        if let Some(&(side, param)) = self.function.symbols.get(name) {
            let (base, space) = match (self.frame, side) {
                (None, _) => (0, Space::Param),
                (Some(frame), Side::Given) => (frame.params, Space::Local),
                (Some(frame), Side::Returned) => (frame.returns, Space::Local),
            };
            return Some((i64::from(base + param.offset) + offset, space));
        }
        if let Some(&at) = self.function.shared.get(name).or_else(|| self.scope.shared.get(name)) {
            return Some((i64::from(at) + offset, Space::Shared));
        }
        if self.scope.dynamic_shared.iter().any(|n| n == name) {
            return Some((i64::from(self.layout.dynamic_start) + offset, Space::Shared));
        }
        let &(address, _) = self.scope.variables.get(name)?;
        Some((address as i64 + offset, Space::Global))
    }

    /// Offset in local memory of a `.param` that a call passes.
    pub(crate) fn local_offset(&self, name: &str) -> Result<u32, Problem> {
        match self.symbol(name) {
            Some((offset, Space::Local)) => Ok(offset as u32),
            _ => Err(format!("{name} is no parameter of a call")),
        }
    }

    /// `[%rd1+8]`, `[name]`, `[name+8]` or `[64]`, in the space that the opcode names.
    pub(crate) fn address(&mut self, text: &'a str, statement: &Statement<'_>) -> Result<Address, Problem> {
        let inner = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).map(str::trim);
        let inner = inner.ok_or_else(|| format!("{text} is no address"))?;
        let named = statement.modifiers.iter().find_map(|m| match m.split(':').next() {
            Some("global" | "const") => Some(Space::Global),
            Some("shared") => Some(Space::Shared),
            Some("local") => Some(Space::Local),
            Some("param") => Some(if self.frame.is_some() { Space::Local } else { Space::Param }),
            _ => None,
        });
        let space = named.unwrap_or(Space::Generic);
        if let Some((offset, found)) = self.symbol(inner) {
            // What a call passes is a `.param` that lies in local memory.
            return Ok(Address { base: Row::NONE, base_64: true, offset, space: found });
        }
        if let Some(offset) = integer(inner) {
            return Ok(Address { base: Row::NONE, base_64: true, offset: offset as i64, space });
        }
        let (name, offset) = match inner.split_once('+') {
            Some((name, offset)) => (name.trim(), integer(offset.trim())),
            None => (inner, Some(0)),
        };
        let offset = offset.ok_or_else(|| format!("{text} is no address"))? as i64;
        match self.register(name) {
            Some((base, 4)) => Ok(Address { base, base_64: false, offset, space }),
            Some((base, 8)) => Ok(Address { base, base_64: true, offset, space }),
            _ => Err(format!("{name} holds no address")),
        }
    }

    /// The elements of `{a, b}`, or the one operand.
    pub(crate) fn list(text: &'a str) -> Vec<&'a str> {
        match text.strip_prefix('{').and_then(|t| t.strip_suffix('}')) {
            Some(inner) => split(inner, b','),
            None => vec![text],
        }
    }

    /// Gives `instruction` the target in operand 0 and the sources behind it.
    pub(crate) fn operands(
        &mut self,
        mut instruction: Instruction,
        statement: &Statement<'a>,
        target: Type,
        sources: &[Type],
    ) -> Result<Instruction, Problem> {
        let operand = |k: usize| statement.operand(k).ok_or_else(|| format!("no operand {k}"));
        if statement.operands.len() != sources.len() + 1 {
            return Err(format!("{} operands", statement.operands.len()));
        }
        instruction.d[0] = self.target(operand(0)?, target)?;
        for (k, &kind) in sources.iter().enumerate() {
            instruction.s[k] = self.source(operand(k + 1)?, kind)?;
        }
        Ok(instruction)
    }
}

fn special(name: &str) -> Option<Special> {
    let axis = || match name.as_bytes().last() {
        Some(b'x') => 0,
        Some(b'y') => 1,
        _ => 2,
    };
    Some(match name {
        "%tid.x" => Special::ThreadX,
        "%tid.y" => Special::ThreadY,
        "%tid.z" => Special::ThreadZ,
        "%ntid.x" | "%ntid.y" | "%ntid.z" => Special::BlockSize(axis()),
        "%ctaid.x" | "%ctaid.y" | "%ctaid.z" => Special::BlockIndex(axis()),
        "%nctaid.x" | "%nctaid.y" | "%nctaid.z" => Special::GridSize(axis()),
        "%laneid" => Special::Lane,
        "%warpid" => Special::Warp,
        "%nwarpid" => Special::Warps,
        "%lanemask_eq" => Special::LanesEqual,
        "%lanemask_lt" => Special::LanesBelow,
        "%lanemask_le" => Special::LanesUpTo,
        "%lanemask_gt" => Special::LanesAbove,
        "%lanemask_ge" => Special::LanesFrom,
        "%dynamic_smem_size" => Special::DynamicShared,
        "%total_smem_size" => Special::TotalShared,
        "%smid" | "%gridid" => Special::Zero,
        "%nsmid" => Special::One,
        _ => return None,
    })
}
