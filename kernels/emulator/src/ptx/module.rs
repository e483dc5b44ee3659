//! A module: its variables, placed in device memory, and its functions.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::ptr::with_exposed_provenance_mut;
use std::sync::{Arc, OnceLock, Weak};

use super::declaration::{Declaration, declaration};
use super::text::{closing_brace, float, integer, split, without_comments};
use crate::exec::{Program, link};
use crate::memory::{Memory, OutOfMemory};

/// Threads of a block where a kernel states no limit of its own.
const MAX_THREADS: u32 = 1024;

/// A parameter's place in the parameter bytes, all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Param {
    pub offset: u32,
    pub size: u32,
    pub align: u32,
}

/// A kernel or a device function of a module.
#[derive(Debug)]
pub struct Function {
    pub name: String,
    /// Launched from the host, or only called by others.
    pub entry: bool,
    pub params: Vec<Param>,
    /// Bytes of all parameters.
    pub param_bytes: u32,
    /// Static shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// The most threads that a block may have (`.maxntid`, `.reqntid`, or the device's limit).
    pub max_threads: u32,
    /// Places of parameters and of return values by name.
    pub(crate) symbols: HashMap<String, (Side, Param)>,
    pub(crate) returns: Vec<Param>,
    pub(crate) return_bytes: u32,
    /// Offsets of its own shared variables.
    pub(crate) shared: HashMap<String, u32>,
    /// Where its body is in the module's text, without the braces.
    pub(crate) body: Range<usize>,
    pub(crate) scope: Weak<Scope>,
    /// Decoded at first use.
    program: OnceLock<Result<Program, String>>,
}

impl Function {
    /// Instructions of it, and of what it calls, that the interpreter does not have: their text and
    /// what is the matter. A launch stops when it comes to one.
    ///
    /// # Errors
    /// The text that is no PTX at all, or that the module was unloaded.
    pub fn unsupported(&self) -> Result<Vec<String>, String> {
        let scope = self.scope.upgrade().ok_or("its module is gone")?;
        let program = self.program(&scope)?;
        let told = program.problems.iter().map(|(at, problem)| {
            let (start, end) = program.places[*at as usize];
            format!("{} ({problem})", &scope.text[start as usize..end as usize])
        });
        Ok(told.collect())
    }

    /// The function's code, decoded if it was not yet; `scope` is its own.
    pub(crate) fn program(&self, scope: &Scope) -> Result<&Program, String> {
        self.program.get_or_init(|| link(self, scope)).as_ref().map_err(Clone::clone)
    }
}

/// Whether a `.param` name of a function is given to it or by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Given,
    Returned,
}

/// What functions of one module share.
#[derive(Debug)]
pub(crate) struct Scope {
    /// The module's text without comments.
    pub(crate) text: String,
    pub(crate) functions: HashMap<String, Arc<Function>>,
    /// Address and bytes of global and constant variables.
    pub(crate) variables: HashMap<String, (u64, u64)>,
    /// Offsets of shared variables that belong to no entry; they come first in every block.
    pub(crate) shared: HashMap<String, u32>,
    /// Names for the start of the dynamic shared memory.
    pub(crate) dynamic_shared: Vec<String>,
}

/// A module that the interpreter has read.
#[derive(Debug)]
pub struct Module {
    scope: Arc<Scope>,
}

/// Why a text is no module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParseError {
    /// The text, from the place on that makes no sense.
    Syntax(String),
    /// Its variables do not fit into the device's memory.
    Memory(OutOfMemory),
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Syntax(text) => write!(f, "PTX is not understood at: {text}"),
            Self::Memory(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for ParseError {}

fn syntax(text: &str) -> ParseError {
    let line = text.trim_start().lines().next().unwrap_or_default();
    ParseError::Syntax(line.chars().take(120).collect())
}

impl Module {
    /// Reads a module's text and allocates its variables in `memory`.
    ///
    /// # Errors
    /// [`ParseError`] where the text is not understood or its variables do not fit.
    pub fn parse(text: &str, memory: &Memory) -> Result<Self, ParseError> {
        let text = without_comments(text.trim_end_matches('\0'));
        let mut items = Items::default();
        items.read(&text)?;
        let variables = items.place(memory)?;
        let (shared, shared_end) = items.common_shared();
        let scope = Arc::new_cyclic(|scope: &Weak<Scope>| {
            let mut functions = HashMap::new();
            for head in &items.functions {
                let function = head.function(scope, shared_end);
                functions.insert(function.name.clone(), Arc::new(function));
            }
            let dynamic_shared = items.dynamic_shared.iter().map(|&name| name.to_owned()).collect();
            let shared = shared.into_iter().map(|(name, at)| (name.to_owned(), at)).collect();
            Scope { text: text.clone(), functions, variables, shared, dynamic_shared }
        });
        Ok(Self { scope })
    }

    /// The function of that (mangled) name.
    pub fn function(&self, name: &str) -> Option<Arc<Function>> {
        self.scope.functions.get(name).cloned()
    }

    /// Address and bytes of the global or constant variable of that (mangled) name.
    pub fn variable(&self, name: &str) -> Option<(u64, u64)> {
        self.scope.variables.get(name).copied()
    }

    /// Names of the module's kernels, in no particular order.
    pub fn entries(&self) -> impl Iterator<Item = &str> {
        self.scope.functions.values().filter(|f| f.entry).map(|f| f.name.as_str())
    }

    /// Ends the module: its variables are given back to `memory`, where it was parsed. Its functions
    /// cannot be launched any more.
    pub fn unload(self, memory: &Memory) {
        for &(address, _) in self.scope.variables.values() {
            assert!(memory.free(address), "a module's variables are its own to free");
        }
    }
}

/// What stands at module scope, as read.
#[derive(Default)]
struct Items<'a> {
    functions: Vec<Head<'a>>,
    /// Global and constant variables with their initial values.
    variables: Vec<(Declaration<'a>, Option<&'a str>)>,
    shared: Vec<Declaration<'a>>,
    dynamic_shared: Vec<&'a str>,
}

/// A function's head as read.
struct Head<'a> {
    name: &'a str,
    entry: bool,
    params: Vec<Declaration<'a>>,
    returns: Vec<Declaration<'a>>,
    max_threads: u32,
    shared: Vec<Declaration<'a>>,
    body: Range<usize>,
}

impl<'a> Items<'a> {
    fn read(&mut self, text: &'a str) -> Result<(), ParseError> {
        let mut at = 0;
        while let Some(skipped) = text[at..].find(|c: char| !c.is_whitespace()) {
            at += skipped;
            at = self.item(text, at)?;
        }
        Ok(())
    }

    /// Reads the item that starts at `at`; returns where it ends.
    fn item(&mut self, text: &'a str, at: usize) -> Result<usize, ParseError> {
        let rest = &text[at..];
        let line_end = at + rest.find('\n').unwrap_or(rest.len());
        if [".version", ".target", ".address_size", ".file", ".loc"].iter().any(|d| rest.starts_with(d)) {
            return Ok(line_end);
        }
        let stop = rest.find([';', '{', '=']).ok_or_else(|| syntax(rest))?;
        let head = &rest[..stop];
        if rest.as_bytes()[stop] == b'{' {
            let end = closing_brace(text, at + stop).ok_or_else(|| syntax(rest))?;
            if !head.starts_with(".section") {
                let body = at + stop + 1..end;
                let head = self.head(head, text, body).ok_or_else(|| syntax(rest))?;
                self.functions.push(head);
            }
            return Ok(end + 1);
        }
        let end = stop + rest[stop..].find(';').ok_or_else(|| syntax(rest))?;
        let value = (rest.as_bytes()[stop] == b'=').then(|| rest[stop + 1..end].trim());
        self.variable(head, value).ok_or_else(|| syntax(rest))?;
        Ok(at + end + 1)
    }

    fn variable(&mut self, head: &'a str, value: Option<&'a str>) -> Option<()> {
        if head.contains(".func") || head.contains(".entry") {
            return Some(()); // a prototype: calls find the function by its name
        }
        let after = |space: &str| head.find(space).map(|at| &head[at + space.len()..]);
        if let Some(rest) = after(".global").or_else(|| after(".const")) {
            self.variables.push((declaration(rest)?, value));
        } else if let Some(rest) = after(".shared") {
            let variable = declaration(rest)?;
            if variable.count == 0 {
                self.dynamic_shared.push(variable.name);
            } else {
                self.shared.push(variable);
            }
        }
        // The rest are prototypes, aliases and pragmas.
        Some(())
    }

    fn head(&mut self, head: &'a str, text: &'a str, body: Range<usize>) -> Option<Head<'a>> {
        let entry = head.contains(".entry");
        let keyword = if entry { ".entry" } else { ".func" };
        let mut rest = head[head.find(keyword)? + keyword.len()..].trim_start();
        if let Some(attributes) = rest.strip_prefix(".noreturn") {
            rest = attributes.trim_start();
        }
        let returns = parameters(&mut rest)?;
        let name_end = rest.find(|c: char| c.is_whitespace() || c == '(').unwrap_or(rest.len());
        let name = &rest[..name_end];
        rest = rest[name_end..].trim_start();
        let params = parameters(&mut rest)?;
        let limit = rest.find(".maxntid").or_else(|| rest.find(".reqntid"));
        let max_threads = limit.map_or(Some(MAX_THREADS), |at| product(&rest[at + 8..]))?;
        let shared = self.shared_in(&text[body.clone()])?;
        Some(Head { name, entry, params, returns, max_threads, shared, body })
    }

    /// Shared variables that a body declares. Those of device functions are common to the module.
    fn shared_in(&mut self, body: &'a str) -> Option<Vec<Declaration<'a>>> {
        let mut found = Vec::new();
        for (at, word) in body.match_indices(".shared") {
            let rest = &body[at + word.len()..];
            if !rest.starts_with(char::is_whitespace) {
                continue;
            }
            let variable = declaration(rest[..rest.find(';')?].trim())?;
            if variable.count == 0 {
                self.dynamic_shared.push(variable.name);
            } else {
                found.push(variable);
            }
        }
        Some(found)
    }

    /// Offsets of the shared variables that every block has, and their end.
    fn common_shared(&self) -> (HashMap<&'a str, u32>, u32) {
        let called = self.functions.iter().filter(|f| !f.entry).flat_map(|f| &f.shared);
        lay_out(self.shared.iter().chain(called), 0)
    }

    fn place(&self, memory: &Memory) -> Result<HashMap<String, (u64, u64)>, ParseError> {
        let mut placed = HashMap::new();
        for (variable, _) in &self.variables {
            let address = memory.alloc(variable.bytes()).map_err(ParseError::Memory)?;
            placed.insert(variable.name.to_owned(), (address, variable.bytes()));
        }
        for (variable, value) in &self.variables {
            let (address, bytes) = placed[variable.name];
            let start = with_exposed_provenance_mut::<u8>(address as usize);
            // SAFETY: the allocation was made above and nobody else knows of it yet.
            let target = unsafe { std::slice::from_raw_parts_mut(start, bytes as usize) };
            target.fill(0);
            let Some(value) = value else { continue };
            fill(target, variable, value, &placed).ok_or_else(|| syntax(value))?;
        }
        Ok(placed)
    }
}

/// Writes an initial value, `{1, 2, name, generic(name)}` or one number, over `target`.
fn fill(
    target: &mut [u8],
    variable: &Declaration<'_>,
    value: &str,
    placed: &HashMap<String, (u64, u64)>,
) -> Option<()> {
    let flat = value.replace(['{', '}'], " ");
    let width = variable.element as usize;
    for (element, text) in target.chunks_mut(width).zip(split(&flat, b',')) {
        let bits = if let Some(number) = float(text) {
            if variable.float && width == 4 { u64::from((number as f32).to_bits()) } else { number.to_bits() }
        } else if let Some(number) = integer(text) {
            number
        } else {
            let (name, offset) = text.split_once('+').map_or((text, "0"), |(n, o)| (n.trim(), o.trim()));
            let name = name.strip_prefix("generic(").and_then(|t| t.strip_suffix(')')).unwrap_or(name);
            placed.get(name)?.0.wrapping_add(integer(offset)?)
        };
        element.copy_from_slice(bits.to_le_bytes().get(..element.len())?);
    }
    Some(())
}

/// Reads `(.param .u64 a, .param .b32 b)` off the front of `rest`; nothing where no bracket opens.
fn parameters<'a>(rest: &mut &'a str) -> Option<Vec<Declaration<'a>>> {
    let Some(inner) = rest.strip_prefix('(') else { return Some(Vec::new()) };
    let end = inner.find(')')?;
    *rest = inner[end + 1..].trim_start();
    split(&inner[..end], b',').into_iter().map(|text| declaration(text.trim())).collect()
}

/// The product of the numbers that `text` starts with: `128, 1, 1`.
fn product(text: &str) -> Option<u32> {
    let end = text.find(|c: char| !c.is_ascii_digit() && !c.is_whitespace() && c != ',');
    text[..end.unwrap_or(text.len())].split(',').map(|n| n.trim().parse::<u32>().ok()).product()
}

/// Offsets of variables laid one behind the other from `start`, and their end.
fn lay_out<'a, 'b: 'a>(
    variables: impl Iterator<Item = &'a Declaration<'b>>,
    start: u32,
) -> (HashMap<&'b str, u32>, u32) {
    let mut end = start;
    let mut places = HashMap::new();
    for variable in variables {
        end = end.next_multiple_of(variable.align);
        places.insert(variable.name, end);
        end += variable.bytes() as u32;
    }
    (places, end)
}

impl Head<'_> {
    fn function(&self, scope: &Weak<Scope>, shared_start: u32) -> Function {
        let mut symbols = HashMap::new();
        let mut place = |declared: &[Declaration<'_>], side: Side| {
            let (mut params, mut end) = (Vec::new(), 0_u32);
            for one in declared {
                let offset = end.next_multiple_of(one.align);
                let param = Param { offset, size: one.bytes() as u32, align: one.align };
                end = offset + param.size;
                symbols.insert(one.name.to_owned(), (side, param));
                params.push(param);
            }
            (params, end)
        };
        let (params, param_bytes) = place(&self.params, Side::Given);
        let (returns, return_bytes) = place(&self.returns, Side::Returned);
        let own = if self.entry { self.shared.as_slice() } else { &[] };
        let (shared, shared_bytes) = lay_out(own.iter(), shared_start);
        Function {
            name: self.name.to_owned(),
            entry: self.entry,
            params,
            param_bytes,
            shared_bytes,
            max_threads: self.max_threads,
            symbols,
            returns,
            return_bytes,
            shared: shared.into_iter().map(|(name, at)| (name.to_owned(), at)).collect(),
            body: self.body.clone(),
            scope: scope.clone(),
            program: OnceLock::new(),
        }
    }
}
