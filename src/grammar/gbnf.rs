//! llama.cpp's grammars (GBNF) in llguidance's kind of Lark. Every character becomes a lexeme of its own: longer
//! ones would be matched greedily, which GBNF does not do.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::iter::Peekable;
use std::str::Chars;

/// Deepest nesting of groups.
const DEPTH_MAX: usize = 64;

/// What is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line} of the grammar: {what}")]
pub(super) struct GbnfError {
    line: usize,
    what: String,
}

/// The same grammar; its rule `root` is Lark's `start`.
///
/// # Errors
/// When the text is not GBNF, there is no `root`, or a rule is used and not defined.
pub(super) fn to_lark(text: &str) -> Result<String, GbnfError> {
    let mut reader = Reader {
        left: text.chars().peekable(),
        line: 1,
        lark: String::new(),
        defined: BTreeSet::new(),
        used: Vec::new(),
    };
    reader.rules()?;
    let Reader { line, defined, used, lark, .. } = reader;
    if !defined.contains("root") {
        return Err(GbnfError { line, what: "there is no rule `root`".to_owned() });
    }
    match used.into_iter().find(|(_, name)| !defined.contains(name)) {
        Some((line, name)) => Err(GbnfError { line, what: format!("there is no rule `{name}`") }),
        None => Ok(lark),
    }
}

struct Reader<'a> {
    left: Peekable<Chars<'a>>,
    line: usize,
    lark: String,
    defined: BTreeSet<String>,
    used: Vec<(usize, String)>,
}

impl Reader<'_> {
    fn fail<T>(&self, what: impl Into<String>) -> Result<T, GbnfError> {
        Err(GbnfError { line: self.line, what: what.into() })
    }

    fn next(&mut self) -> Option<char> {
        let next = self.left.next();
        self.line += usize::from(next == Some('\n'));
        next
    }

    fn eat(&mut self, wanted: char) -> bool {
        let found = self.left.peek() == Some(&wanted);
        if found {
            self.next();
        }
        found
    }

    /// Passes spaces and comments; line breaks, too, where `lines`.
    fn skip(&mut self, lines: bool) {
        while let Some(&next) = self.left.peek() {
            match next {
                '#' => while self.left.next_if(|c| *c != '\n').is_some() {},
                '\n' | '\r' if !lines => return,
                _ if next.is_whitespace() => {
                    self.next();
                }
                _ => return,
            }
        }
    }

    fn rules(&mut self) -> Result<(), GbnfError> {
        loop {
            self.skip(true);
            if self.left.peek().is_none() {
                return Ok(());
            }
            let name = self.name()?;
            self.skip(false);
            if !(self.eat(':') && self.eat(':') && self.eat('=')) {
                return self.fail(format!("`::=` is missing after `{name}`"));
            }
            if !self.defined.insert(name.clone()) {
                return self.fail(format!("the rule `{name}` is defined twice"));
            }
            let _infallible = write!(self.lark, "{}:", lark_name(&name));
            self.skip(true);
            self.alternatives(0)?;
            self.lark.push('\n');
        }
    }

    fn name(&mut self) -> Result<String, GbnfError> {
        let mut name = String::new();
        while let Some(c) = self.left.next_if(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_')) {
            name.push(c);
        }
        match (name.is_empty(), self.left.peek().copied()) {
            (false, _) => Ok(name),
            (true, Some(c)) => self.fail(format!("a rule's name cannot begin with {c:?}")),
            (true, None) => self.fail("a rule's name is missing"),
        }
    }

    fn alternatives(&mut self, depth: usize) -> Result<(), GbnfError> {
        if depth > DEPTH_MAX {
            return self.fail(format!("groups are nested deeper than {DEPTH_MAX}"));
        }
        loop {
            self.sequence(depth)?;
            self.skip(depth > 0);
            // The next alternative may be on the next line.
            let mut ahead = self.left.clone();
            let next = ahead.find(|c| !c.is_whitespace());
            if next != Some('|') {
                return Ok(());
            }
            self.skip(true);
            self.next();
            self.lark.push_str(" |");
            self.skip(true);
        }
    }

    fn sequence(&mut self, depth: usize) -> Result<(), GbnfError> {
        let mut empty = true;
        loop {
            self.skip(depth > 0);
            match self.left.peek().copied() {
                Some('"') => self.literal()?,
                Some('[') => self.class()?,
                Some('.') => {
                    self.next();
                    self.lark.push_str(r" /(?s:.)/");
                }
                Some('(') => {
                    self.next();
                    self.lark.push_str(" (");
                    self.skip(true);
                    self.alternatives(depth + 1)?;
                    self.skip(true);
                    if !self.eat(')') {
                        return self.fail("a `)` is missing");
                    }
                    self.lark.push(')');
                }
                Some(c) if c.is_ascii_alphanumeric() || matches!(c, '-' | '_') => {
                    let name = self.name()?;
                    let _infallible = write!(self.lark, " {}", lark_name(&name));
                    self.used.push((self.line, name));
                }
                None | Some('\n' | '\r' | '|' | ')') => break,
                Some(c) => return self.fail(format!("{c:?} is not expected here")),
            }
            empty = false;
            self.repetition()?;
        }
        if empty {
            self.lark.push_str(" \"\"");
        }
        Ok(())
    }

    /// `*`, `+`, `?`, `{m}`, `{m,}` or `{m,n}` behind an item.
    fn repetition(&mut self) -> Result<(), GbnfError> {
        match self.left.peek().copied() {
            Some(c @ ('*' | '+' | '?')) => {
                self.next();
                self.lark.push(c);
            }
            Some('{') => {
                self.next();
                let mut bounds = String::new();
                while let Some(c) = self.left.next_if(|c| c.is_ascii_digit() || *c == ',' || *c == ' ') {
                    bounds.push(c);
                }
                if !self.eat('}') {
                    return self.fail("a `}` is missing");
                }
                bounds.retain(|c| c != ' ');
                let (least, most) = bounds.split_once(',').unwrap_or((&bounds, &bounds));
                let number = |text: &str| text.is_empty() || text.parse::<u16>().is_ok();
                if !number(least) || !number(most) || bounds.is_empty() {
                    return self.fail(format!("`{{{bounds}}}` is no repetition"));
                }
                let least = if least.is_empty() { "0" } else { least };
                let _infallible = write!(self.lark, "{{{least},{most}}}");
            }
            _ => {}
        }
        Ok(())
    }

    fn literal(&mut self) -> Result<(), GbnfError> {
        self.next();
        self.lark.push_str(" (\"\"");
        loop {
            match self.next() {
                None | Some('\n') => return self.fail("a `\"` is missing"),
                Some('"') => break,
                Some(c) => {
                    let c = if c == '\\' { self.escaped()? } else { c };
                    let _infallible = write!(self.lark, " {}", serde_json::Value::from(c.to_string()));
                }
            }
        }
        self.lark.push(')');
        Ok(())
    }

    /// `[..]`, as a pattern of one character.
    fn class(&mut self) -> Result<(), GbnfError> {
        self.next();
        let opening = if self.eat('^') { " /[^" } else { " /[" };
        self.lark.push_str(opening);
        let mut empty = true;
        loop {
            match self.next() {
                None | Some('\n') => return self.fail("a `]` is missing"),
                Some(']') => break,
                // Between two characters: a range.
                Some('-') if !empty && self.left.peek() != Some(&']') => self.lark.push('-'),
                Some(c) => {
                    let c = if c == '\\' { self.escaped()? } else { c };
                    let _infallible = write!(self.lark, "\\u{{{:x}}}", u32::from(c));
                }
            }
            empty = false;
        }
        if empty {
            return self.fail("`[]` matches nothing");
        }
        self.lark.push_str("]/");
        Ok(())
    }

    /// The character behind a backslash.
    fn escaped(&mut self) -> Result<char, GbnfError> {
        let digits = match self.next() {
            Some('n') => return Ok('\n'),
            Some('r') => return Ok('\r'),
            Some('t') => return Ok('\t'),
            Some(c @ ('\\' | '"' | '[' | ']' | '-' | '^' | '/')) => return Ok(c),
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            Some(c) => return self.fail(format!("`\\{c}` is no escape")),
            None => return self.fail("the grammar ends in a `\\`"),
        };
        let code: String = (0..digits).filter_map(|_| self.next()).collect();
        match u32::from_str_radix(&code, 16).ok().and_then(char::from_u32) {
            Some(c) if code.len() == digits => Ok(c),
            _ => self.fail(format!("`{code}` is no character's number")),
        }
    }
}

/// Rules' names are lower-case in Lark. What tells GBNF's names apart is kept: `-` and capitals are spelled out.
fn lark_name(name: &str) -> String {
    if name == "root" {
        return "start".to_owned();
    }
    let mut lark = "r_".to_owned();
    for c in name.chars() {
        match c {
            '-' => lark.push_str("_m"),
            '_' => lark.push_str("__"),
            'A'..='Z' => {
                lark.push_str("_u");
                lark.push(c.to_ascii_lowercase());
            }
            c => lark.push(c),
        }
    }
    lark
}
