//! What a model says in its turn, taken apart as it comes: thoughts, text, and calls of tools in its family's way of
//! writing them.
//!
//! Knows no API and no tokenizer. Invariants: however the text is cut into pieces, the parts put together are the
//! same; what looks like a call and turns out to be none is text, to the last character.

mod call;

#[cfg(test)]
mod tests;

use call::{Found, Outcome};

/// How a family writes calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallFormat {
    /// `<tool_call>{"name": .., "arguments": {..}}</tool_call>`, each call for itself: Hermes, Qwen.
    Hermes,
    /// `{"name": .., "parameters": {..}}` as the whole turn, or behind `<|python_tag|>`, with `;` between calls.
    Llama3,
    /// `[TOOL_CALLS]` and a list of `{"name": .., "arguments": {..}}`, or the name, `[ARGS]` and the arguments.
    Mistral,
}

impl CallFormat {
    /// What a call begins with, where it has a mark.
    #[must_use]
    pub fn mark(self) -> &'static str {
        match self {
            Self::Hermes => "<tool_call>",
            Self::Llama3 => "<|python_tag|>",
            Self::Mistral => "[TOOL_CALLS]",
        }
    }
}

/// What a turn may hold beside text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TurnForm {
    /// `None`: nothing is read as a call.
    pub calls: Option<CallFormat>,
    /// The tools that may be called. What has no mark is a call only if it names one of them.
    pub tools: Vec<String>,
    /// What follows the first call is left out.
    pub single: bool,
    /// `None`: no thoughts are looked for. `Some(true)`: the turn begins within one.
    pub thinks: Option<bool>,
}

/// A part of a turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    Thought(String),
    Text(String),
    /// A call begins; its arguments follow. Calls count from 0.
    Call {
        index: u32,
        name: String,
    },
    /// More of a call's arguments: a JSON object's text.
    Arguments {
        index: u32,
        text: String,
    },
}

const THOUGHT_BEGINS: &str = "<think>";
const THOUGHT_ENDS: &str = "</think>";
const HERMES_ENDS: &str = "</tool_call>";

/// Takes a turn apart.
#[derive(Debug)]
pub struct TurnReader {
    form: TurnForm,
    at: At,
    /// Came, and is in no part yet.
    left: String,
    calls: u32,
    /// Text, more than spaces, has been seen.
    spoke: bool,
}

#[derive(Debug)]
enum At {
    /// Spaces at most have come.
    Beginning,
    Thought,
    /// Behind a thought: spaces are left out.
    AfterThought,
    Text,
    /// Within what may be a call.
    Call(Box<Attempt>),
    /// Behind the only call that counts.
    Over,
    /// Behind a call: spaces and what stands between calls are left out.
    AfterCall,
}

/// What may be one call, or a list of them.
#[derive(Debug)]
struct Attempt {
    /// The mark, or the spaces before what has none.
    before: String,
    marked: bool,
    /// All that came since.
    raw: String,
    /// Calls that were announced, and how much of the last one's arguments was given out.
    announced: usize,
    given: usize,
}

impl TurnReader {
    #[must_use]
    pub fn new(form: TurnForm) -> Self {
        let at = match form.thinks {
            Some(true) => At::Thought,
            _ => At::Beginning,
        };
        Self { form, at, left: String::new(), calls: 0, spoke: false }
    }

    /// Whether every text is simply text.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.form.calls.is_none() && self.form.thinks.is_none()
    }

    /// Calls that have begun.
    #[must_use]
    pub fn calls(&self) -> u32 {
        self.calls
    }

    /// The parts that `text` completes.
    #[must_use]
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        if self.is_plain() {
            return if text.is_empty() { Vec::new() } else { vec![Part::Text(text.to_owned())] };
        }
        self.left.push_str(text);
        let mut parts = Vec::new();
        while self.step(false, &mut parts) {}
        join(parts)
    }

    /// The end of the turn: what was held back.
    #[must_use]
    pub fn finish(&mut self) -> Vec<Part> {
        let mut parts = Vec::new();
        while self.step(true, &mut parts) {}
        join(parts)
    }

    /// Takes some of what is left. `false`: more must come before anything else can be said.
    fn step(&mut self, last: bool, parts: &mut Vec<Part>) -> bool {
        match &mut self.at {
            At::Beginning => self.begin(last),
            At::Thought => self.think(last, parts),
            At::AfterThought => self.pass_spaces(),
            At::Text => self.speak(last, parts),
            At::Call(_) => self.call(last, parts),
            At::AfterCall if self.form.single => {
                self.at = At::Over;
                true
            }
            At::AfterCall => self.between(last),
            At::Over => {
                self.left.clear();
                false
            }
        }
    }

    fn begin(&mut self, last: bool) -> bool {
        let trimmed = self.left.trim_start();
        if trimmed.is_empty() && !last {
            return false;
        }
        if self.form.thinks.is_some() && is_beginning(trimmed, THOUGHT_BEGINS) && !last {
            return false;
        }
        match trimmed.strip_prefix(THOUGHT_BEGINS) {
            Some(rest) if self.form.thinks.is_some() => {
                self.left = rest.to_owned();
                self.at = At::Thought;
            }
            _ => self.at = At::Text,
        }
        true
    }

    fn think(&mut self, last: bool, parts: &mut Vec<Part>) -> bool {
        if let Some(end) = self.left.find(THOUGHT_ENDS) {
            let thought = self.left[..end].trim_end().to_owned();
            self.left.drain(..end + THOUGHT_ENDS.len());
            parts.push(Part::Thought(thought));
            self.at = At::AfterThought;
            return true;
        }
        let ready = if last { self.left.len() } else { held_from(&self.left, &[THOUGHT_ENDS], true) };
        parts.push(Part::Thought(self.left.drain(..ready).collect()));
        false
    }

    fn pass_spaces(&mut self) -> bool {
        self.left = self.left.trim_start().to_owned();
        if self.left.is_empty() {
            return false;
        }
        self.at = At::Text;
        true
    }

    fn speak(&mut self, last: bool, parts: &mut Vec<Part>) -> bool {
        if let Some(format) = self.form.calls {
            if let Some(at) = self.left.find(format.mark()) {
                let before: String = self.left.drain(..at).collect();
                let before = before.trim_end();
                self.say(before.to_owned(), parts);
                self.left.drain(..format.mark().len());
                self.attempt(format.mark().to_owned(), true);
                return true;
            }
            let bare = format == CallFormat::Llama3 && !self.spoke;
            if bare && self.left.trim_start().starts_with('{') {
                let spaces = self.left.len() - self.left.trim_start().len();
                let before = self.left.drain(..spaces).collect();
                self.attempt(before, false);
                return true;
            }
        }
        let marks: Vec<&str> = self.form.calls.iter().map(|format| format.mark()).collect();
        let ready = if last { self.left.len() } else { held_from(&self.left, &marks, !marks.is_empty()) };
        let text = self.left.drain(..ready).collect();
        self.say(text, parts);
        false
    }

    fn say(&mut self, text: String, parts: &mut Vec<Part>) {
        self.spoke |= !text.trim().is_empty();
        parts.push(Part::Text(text));
    }

    fn attempt(&mut self, before: String, marked: bool) {
        let attempt = Attempt { before, marked, raw: String::new(), announced: 0, given: 0 };
        self.at = At::Call(Box::new(attempt));
    }

    fn call(&mut self, last: bool, parts: &mut Vec<Part>) -> bool {
        let format = self.form.calls.expect("a call is looked for");
        let At::Call(attempt) = &mut self.at else { unreachable!("called within a call") };
        attempt.raw.push_str(&std::mem::take(&mut self.left));
        let (found, outcome) = call::read(format, &attempt.raw);
        let tools = &self.form.tools;
        let foreign = |name: &String| !attempt.marked && !tools.contains(name);
        if found.iter().any(|call| call.name.as_ref().is_some_and(foreign)) {
            return self.give_up(parts);
        }
        let found = if self.form.single { &found[..found.len().min(1)] } else { &found[..] };
        attempt.announce(found, &mut self.calls, parts);
        match outcome {
            Outcome::More if !last => false,
            Outcome::Done(used) => {
                self.left = attempt.raw.split_off(used);
                self.at = At::AfterCall;
                true
            }
            // The rest of a call that has been announced cannot be taken back, nor be made whole.
            Outcome::More | Outcome::Broken if attempt.announced > 0 => {
                self.at = At::AfterCall;
                !last
            }
            Outcome::More | Outcome::Broken => self.give_up(parts),
        }
    }

    /// It is no call: all of it is text, and what follows is no call without a mark.
    fn give_up(&mut self, parts: &mut Vec<Part>) -> bool {
        let At::Call(attempt) = std::mem::replace(&mut self.at, At::Text) else {
            unreachable!("called within a call")
        };
        self.spoke = true;
        parts.push(Part::Text(attempt.before));
        // Another mark may be in it.
        self.left = attempt.raw + &self.left;
        true
    }

    fn between(&mut self, last: bool) -> bool {
        let format = self.form.calls.expect("there was a call");
        let trimmed = self.left.trim_start();
        let end = match format {
            CallFormat::Hermes => HERMES_ENDS,
            CallFormat::Llama3 => ";",
            CallFormat::Mistral => "",
        };
        if !last && (trimmed.is_empty() || is_beginning(trimmed, end)) {
            return false;
        }
        let trimmed = if end.is_empty() { trimmed } else { trimmed.strip_prefix(end).unwrap_or(trimmed) };
        let rest = trimmed.trim_start().to_owned();
        if rest.is_empty() && !last {
            // A further call, or text.
            self.left.clear();
            return false;
        }
        let list = format == CallFormat::Llama3 && rest.starts_with('{');
        self.left = rest;
        match list {
            true => self.attempt(String::new(), false),
            false => self.at = At::Text,
        }
        true
    }
}

impl Attempt {
    /// Gives out what is new in the calls found.
    fn announce(&mut self, found: &[Found], calls: &mut u32, parts: &mut Vec<Part>) {
        for (at, call) in found.iter().enumerate().skip(self.announced.saturating_sub(1)) {
            let Some(name) = &call.name else { return };
            if at == self.announced {
                parts.push(Part::Call { index: *calls, name: name.clone() });
                self.announced += 1;
                self.given = 0;
                *calls += 1;
            }
            let text = call.arguments[self.given..].to_owned();
            self.given += text.len();
            parts.push(Part::Arguments { index: *calls - 1, text });
        }
    }
}

/// Neighbours of one kind as one part; empty ones left out.
#[must_use]
pub fn join(parts: Vec<Part>) -> Vec<Part> {
    let mut joined: Vec<Part> = Vec::new();
    for part in parts {
        match (joined.last_mut(), part) {
            (Some(Part::Thought(before)), Part::Thought(more)) => before.push_str(&more),
            (Some(Part::Text(before)), Part::Text(more)) => before.push_str(&more),
            (Some(Part::Arguments { text: before, index }), Part::Arguments { text, index: same })
                if *index == same =>
            {
                before.push_str(&text);
            }
            (_, Part::Thought(text) | Part::Text(text) | Part::Arguments { text, .. }) if text.is_empty() => {
            }
            (_, part) => joined.push(part),
        }
    }
    joined
}

/// Whether `text` is the beginning of `mark`, and not all of it.
fn is_beginning(text: &str, mark: &str) -> bool {
    text.len() < mark.len() && mark.starts_with(text)
}

/// From where on `text` may be the beginning of a mark; with `spaces`, from the spaces before that.
fn held_from(text: &str, marks: &[&str], spaces: bool) -> usize {
    let mut from = text.len();
    let longest = marks.iter().map(|mark| mark.len()).max().unwrap_or(0);
    for (at, _) in text.char_indices().rev().take(longest) {
        if marks.iter().any(|mark| is_beginning(&text[at..], mark)) {
            from = at;
        }
    }
    if spaces { text[..from].trim_end().len() } else { from }
}
