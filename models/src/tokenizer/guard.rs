//! Keeps what a user writes from becoming control tokens.
//!
//! A chat template mixes its own markers with the users' texts, and only the mix is tokenised. If every control
//! token found there were parsed, a message with `<|im_end|>` in it could end its turn and speak as the system. So
//! before rendering, each control token inside a message's strings is broken by a mark, a private-use character that
//! occurs in none of them; after rendering, control tokens are parsed, the marks removed, and the rest is text.
//!
//! Invariant: no control token of two or more characters that begins inside a guarded string is parsed, and with
//! the marks removed the text is what the template made of the strings. What a template itself puts together with a
//! string (`'<|' ~ role ~ '|>'`) is its own doing and stays possible, so roles must be checked elsewhere.

use std::collections::HashSet;

use regex::Regex;
use serde_json::Value;

/// The mark chosen for one rendering.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guard {
    mark: char,
}

/// Every character that could serve as the mark occurs in the messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the messages use all private characters of Unicode's plane 16; remove some")]
pub struct NoMarkLeft;

/// Plane 16, private use.
const MARKS: std::ops::RangeInclusive<char> = '\u{100000}'..='\u{10FFFD}';

impl Guard {
    /// Chooses a mark that occurs in none of `values` (keys count too).
    ///
    /// # Errors
    /// [`NoMarkLeft`] when all 65,534 candidates occur.
    pub fn choose<'a>(values: impl IntoIterator<Item = &'a Value>) -> Result<Self, NoMarkLeft> {
        let mut taken = HashSet::new();
        for value in values {
            collect(value, &mut taken);
        }
        MARKS.rev().find(|mark| !taken.contains(mark)).map(|mark| Self { mark }).ok_or(NoMarkLeft)
    }

    /// `text` without the marks.
    pub(super) fn unmark<'t>(&self, text: &'t str) -> std::borrow::Cow<'t, str> {
        if text.contains(self.mark) { text.replace(self.mark, "").into() } else { text.into() }
    }
}

fn collect(value: &Value, taken: &mut HashSet<char>) {
    let mut note = |text: &str| taken.extend(text.chars().filter(|c| MARKS.contains(c)));
    match value {
        Value::String(text) => note(text),
        Value::Array(items) => items.iter().for_each(|item| collect(item, taken)),
        Value::Object(fields) => {
            fields.keys().for_each(|key| note(key));
            fields.values().for_each(|field| collect(field, taken));
        }
        _ => {}
    }
}

/// What is guarded against: the control tokens of a vocabulary.
#[derive(Debug)]
pub(super) struct Shield {
    tokens: Option<Regex>,
    /// All proper prefixes of the tokens: a string that ends in one could be completed by what follows it.
    prefixes: HashSet<String>,
    prefix_len_max: usize,
}

impl Shield {
    /// `tokens` matches any of `texts`, the longest first.
    pub(super) fn new<'a>(tokens: Option<Regex>, texts: impl Iterator<Item = &'a str>) -> Self {
        let mut prefixes = HashSet::new();
        for text in texts {
            prefixes.extend(text.char_indices().skip(1).map(|(end, _)| text[..end].to_owned()));
        }
        let prefix_len_max = prefixes.iter().map(String::len).max().unwrap_or(0);
        Self { tokens, prefixes, prefix_len_max }
    }

    /// A copy of `value` whose strings and keys hold no control token.
    pub(super) fn apply(&self, guard: Guard, value: &Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.apply_to_text(guard, text)),
            Value::Array(items) => items.iter().map(|item| self.apply(guard, item)).collect(),
            Value::Object(fields) => {
                let field = |(key, field): (&String, &Value)| {
                    // Templates look fields up by name: a key is changed only if it holds a whole token.
                    (self.break_tokens(guard, key), self.apply(guard, field))
                };
                Value::Object(fields.iter().map(field).collect())
            }
            other => other.clone(),
        }
    }

    fn apply_to_text(&self, guard: Guard, text: &str) -> String {
        let mut guarded = self.break_tokens(guard, text);
        let tail_start = text.len().saturating_sub(self.prefix_len_max);
        let mut tails =
            text.char_indices().rev().map(|(start, _)| start).take_while(|&start| start >= tail_start);
        if tails.any(|start| self.prefixes.contains(&text[start..])) {
            guarded.push(guard.mark);
        }
        guarded
    }

    /// Puts the mark after the first character of every token, overlapping ones too.
    fn break_tokens(&self, guard: Guard, text: &str) -> String {
        let mut guarded = String::with_capacity(text.len());
        let (mut at, mut written) = (0, 0);
        while let Some(found) = self.tokens.as_ref().and_then(|tokens| tokens.find_at(text, at)) {
            let first = found.as_str().chars().next().map_or(1, char::len_utf8);
            at = found.start() + first;
            guarded.push_str(&text[written..at]);
            guarded.push(guard.mark);
            written = at;
        }
        guarded.push_str(&text[written..]);
        guarded
    }
}
