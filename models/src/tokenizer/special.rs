//! Finding tokens that stand whole in a text. Of tokens that begin at the same place the longest wins.

use std::collections::HashMap;
use std::sync::LazyLock;

use regex::{Regex, RegexBuilder};

use super::TokenKind;
use super::guard::Shield;

/// Compiled patterns of thousands of tokens need more than the default; a broken file must not take all memory.
const PATTERN_BYTES_MAX: usize = 256 << 20;

/// A token that is found whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) id: u32,
    pub(super) text: String,
    /// It swallows the white space before it.
    pub(super) strip_left: bool,
    /// It swallows the white space after it.
    pub(super) strip_right: bool,
    /// Only between characters that belong to no word.
    pub(super) single_word: bool,
    /// It is looked for after normalisation, in what the others left. Control tokens never are.
    pub(super) normalized: bool,
}

impl Found {
    pub(super) fn new(id: u32, text: String) -> Self {
        Self { id, text, strip_left: false, strip_right: false, single_word: false, normalized: false }
    }
}

/// A set of tokens that are found whole in a text.
#[derive(Debug)]
pub(super) struct SpecialTokens {
    by_text: HashMap<String, Found>,
    /// Control, unknown and user-defined tokens.
    all: Option<Regex>,
    /// User-defined tokens.
    user_defined: Option<Regex>,
    /// What users must not write.
    pub(super) shield: Shield,
}

/// A part of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fragment<'t> {
    Text(&'t str),
    Token(u32),
}

impl SpecialTokens {
    /// `kinds` are those of all tokens, by id. Of equal texts the first counts.
    pub(super) fn new(found: impl IntoIterator<Item = Found>, kinds: &[TokenKind]) -> Result<Self, String> {
        let mut by_text = HashMap::new();
        for found in found {
            if !found.text.is_empty() {
                by_text.entry(found.text.clone()).or_insert(found);
            }
        }
        let is_control = |found: &&Found| kinds[found.id as usize] != TokenKind::UserDefined;
        let texts = |found: &Found| found.text.clone();
        let control: Vec<String> = by_text.values().filter(is_control).map(texts).collect();
        let user_defined = by_text.values().filter(|found| !is_control(found)).map(texts).collect();
        Ok(Self {
            all: any_of(by_text.keys().cloned().collect())?,
            user_defined: any_of(user_defined)?,
            shield: Shield::new(any_of(control.clone())?, control.iter().map(String::as_str)),
            by_text,
        })
    }

    /// Nothing is ever found.
    pub(super) fn is_empty(&self) -> bool {
        self.all.is_none()
    }

    /// Calls `fragment` with the parts of `text` in order: tokens, and the texts between them (never empty).
    pub(super) fn partition<'t>(&self, text: &'t str, control: bool, fragment: &mut dyn FnMut(Fragment<'t>)) {
        let pattern = if control { &self.all } else { &self.user_defined };
        let mut at = 0;
        for place in pattern.iter().flat_map(|pattern| pattern.find_iter(text)) {
            let (start, end) = (place.start(), place.end());
            let found = &self.by_text[place.as_str()];
            // An earlier token may have swallowed its start.
            if start < at || (found.single_word && is_inside_a_word(text, start, end)) {
                continue;
            }
            let before = &text[at..start];
            let before = if found.strip_left { before.trim_end() } else { before };
            if !before.is_empty() {
                fragment(Fragment::Text(before));
            }
            fragment(Fragment::Token(found.id));
            let after = &text[end..];
            at = if found.strip_right { text.len() - after.trim_start().len() } else { end };
        }
        if at < text.len() {
            fragment(Fragment::Text(&text[at..]));
        }
    }
}

fn is_inside_a_word(text: &str, start: usize, end: usize) -> bool {
    static WORD: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"^\w$").expect("the pattern is constant; this is a bug"));
    let is_word = |c: char| WORD.is_match(c.encode_utf8(&mut [0; 4]));
    text[..start].chars().next_back().is_some_and(is_word) || text[end..].chars().next().is_some_and(is_word)
}

/// A pattern for any of `texts`, `None` for none: the first branch that matches wins, so the longest is first.
fn any_of(mut texts: Vec<String>) -> Result<Option<Regex>, String> {
    if texts.is_empty() {
        return Ok(None);
    }
    texts.sort_unstable_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
    let pattern = texts.iter().map(|text| regex::escape(text)).collect::<Vec<_>>().join("|");
    let built = RegexBuilder::new(&pattern).size_limit(PATTERN_BYTES_MAX).build();
    built
        .map(Some)
        .map_err(|error| format!("its {} special tokens cannot be searched for: {error}", texts.len()))
}
