//! The body of a function, cut into declarations, labels and instructions.

use std::ops::Range;

use super::declaration::{Declaration, declaration};
use super::text::split;
use super::types::Type;

/// One piece of a body.
#[derive(Debug)]
pub(crate) enum Item<'a> {
    /// `{`: names declared from here on end with its `Close`.
    Open,
    Close,
    Label(&'a str),
    /// `.reg .b32 %r<9>;` or `.reg .pred p, q;`
    Registers(Type, Vec<(&'a str, Option<u32>)>),
    /// A `.local` variable, or a `.param` one for a call's arguments and results.
    Local(Declaration<'a>),
    /// `label: .branchtargets a, b;`
    Targets(&'a str, Vec<&'a str>),
    Instruction(Statement<'a>),
}

/// An instruction as written.
#[derive(Clone, Debug)]
pub(crate) struct Statement<'a> {
    /// The predicate it depends on, and whether it must be false.
    pub(crate) guard: Option<(&'a str, bool)>,
    /// The first word of the opcode: `ld` of `ld.global.v2.f32`.
    pub(crate) name: &'a str,
    /// The other words of the opcode.
    pub(crate) modifiers: Vec<&'a str>,
    pub(crate) operands: Vec<&'a str>,
    /// Where it stands in the module's text.
    pub(crate) place: Range<usize>,
}

impl<'a> Statement<'a> {
    pub(crate) fn has(&self, modifier: &str) -> bool {
        self.modifiers.contains(&modifier)
    }

    /// The types among the modifiers, in order.
    pub(crate) fn types(&self) -> impl Iterator<Item = Type> {
        self.modifiers.iter().filter_map(|m| Type::named(m))
    }

    /// Operand `index` as written; none where there are fewer.
    pub(crate) fn operand(&self, index: usize) -> Option<&'a str> {
        self.operands.get(index).copied()
    }
}

/// Reads a body that starts at `at` in the module's text. `None` for the place where it cannot.
pub(crate) fn items(text: &str, body: Range<usize>) -> Result<Vec<Item<'_>>, String> {
    let mut items = Vec::new();
    let mut at = body.start;
    while let Some(skipped) = text[at..body.end].find(|c: char| !c.is_whitespace()) {
        at += skipped;
        let rest = &text[at..body.end];
        let unclear = || rest.lines().next().unwrap_or_default().to_owned();
        match rest.as_bytes()[0] {
            b'{' => {
                items.push(Item::Open);
                at += 1;
                continue;
            }
            b'}' => {
                items.push(Item::Close);
                at += 1;
                continue;
            }
            b';' => {
                at += 1;
                continue;
            }
            b'.' if rest.starts_with(".loc") && !rest.starts_with(".local") => {
                at += rest.find('\n').unwrap_or(rest.len());
                continue;
            }
            _ => {}
        }
        if let Some((label, length)) = label(rest) {
            at += length;
            if let Some(list) = rest[length..].trim_start().strip_prefix(".branchtargets") {
                let end = list.find(';').ok_or_else(unclear)?;
                items.push(Item::Targets(label, split(&list[..end], b',')));
                at = end + 1 + (list.as_ptr() as usize - text.as_ptr() as usize);
            } else {
                items.push(Item::Label(label));
            }
            continue;
        }
        let end = rest.find(';').ok_or_else(unclear)?;
        let place = at..at + end;
        at += end + 1;
        if let Some(item) = piece(&text[place.clone()], place).ok_or_else(unclear)? {
            items.push(item);
        }
    }
    Ok(items)
}

/// A label at the start of `rest`, and its length with the colon.
fn label(rest: &str) -> Option<(&str, usize)> {
    let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || "_$%".contains(c)))?;
    let after = rest[end..].trim_start();
    let is_label = end > 0 && after.starts_with(':') && !after.starts_with("::");
    is_label.then(|| (&rest[..end], rest.len() - after.len() + 1))
}

/// A declaration or an instruction, without its semicolon; `Some(None)` for what says nothing.
fn piece(text: &str, place: Range<usize>) -> Option<Option<Item<'_>>> {
    if let Some(rest) = text.strip_prefix(".reg") {
        return registers(rest.trim()).map(Some);
    }
    if let Some(rest) = text.strip_prefix(".local").or_else(|| text.strip_prefix(".param")) {
        return declaration(rest).map(|d| Some(Item::Local(d)));
    }
    if text.starts_with('.') {
        // Shared variables were placed with the module; pragmas are hints.
        return Some(None);
    }
    let (guard, rest) = match text.strip_prefix('@') {
        Some(rest) => {
            let (name, rest) = rest.trim_start().split_once(char::is_whitespace)?;
            let negated = name.strip_prefix('!');
            (Some((negated.unwrap_or(name), negated.is_some())), rest.trim_start())
        }
        None => (None, text),
    };
    let opcode_end = rest.find(char::is_whitespace).unwrap_or(rest.len());
    let (opcode, operands) = rest.split_at(opcode_end);
    let mut words = opcode.split('.');
    let name = words.next()?;
    let statement = Statement {
        guard,
        name,
        modifiers: words.collect(),
        operands: call_operands(name, operands.trim()),
        place,
    };
    Some(Some(Item::Instruction(statement)))
}

/// Operands between top-level commas. A call without results gets an empty first one.
fn call_operands<'a>(name: &str, text: &'a str) -> Vec<&'a str> {
    let mut operands = split(text, b',');
    if name == "call" && !text.starts_with('(') {
        operands.insert(0, "()");
    }
    operands
}

/// `.b32 %r<9>` or `.pred p, q`.
fn registers(text: &str) -> Option<Item<'_>> {
    let (kind, names) = text.strip_prefix('.')?.split_once(char::is_whitespace)?;
    let mut found = Vec::new();
    for name in names.split(',').map(str::trim) {
        match name.split_once('<') {
            Some((prefix, count)) => {
                found.push((prefix.trim(), Some(count.trim_end_matches('>').trim().parse().ok()?)));
            }
            None => found.push((name, None)),
        }
    }
    Some(Item::Registers(Type::named(kind)?, found))
}
