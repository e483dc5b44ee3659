//! Finding special tokens in a text. Of tokens that begin at the same place the longest wins.

use std::collections::HashMap;

use regex::{Regex, RegexBuilder};

use super::TokenKind;
use super::guard::Shield;

/// Compiled patterns of thousands of tokens need more than the default; a broken file must not take all memory.
const PATTERN_BYTES_MAX: usize = 256 << 20;

/// The tokens that are found whole in a text.
#[derive(Debug)]
pub(super) struct SpecialTokens {
    ids: HashMap<String, u32>,
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
    pub(super) fn new(tokens: &[String], kinds: &[TokenKind]) -> Result<Self, String> {
        let of_kind = |wanted: &[TokenKind]| -> Vec<&str> {
            let pairs =
                tokens.iter().zip(kinds).filter(|(text, kind)| wanted.contains(kind) && !text.is_empty());
            pairs.map(|(text, _)| text.as_str()).collect()
        };
        let control = of_kind(&[TokenKind::Control, TokenKind::Unknown]);
        let user_defined = of_kind(&[TokenKind::UserDefined]);
        let all: Vec<&str> = control.iter().chain(&user_defined).copied().collect();
        let mut ids = HashMap::new();
        for (id, (text, kind)) in tokens.iter().zip(kinds).enumerate() {
            if matches!(kind, TokenKind::Control | TokenKind::Unknown | TokenKind::UserDefined) {
                ids.entry(text.clone()).or_insert(id as u32);
            }
        }
        Ok(Self {
            ids,
            all: any_of(all)?,
            user_defined: any_of(user_defined)?,
            shield: Shield::new(any_of(control.clone())?, control.into_iter()),
        })
    }

    /// Calls `fragment` with the parts of `text` in order: tokens, and the texts between them (never empty).
    pub(super) fn partition<'t>(
        &self,
        text: &'t str,
        control: bool,
        fragment: &mut impl FnMut(Fragment<'t>),
    ) {
        let pattern = if control { &self.all } else { &self.user_defined };
        let mut at = 0;
        for found in pattern.iter().flat_map(|pattern| pattern.find_iter(text)) {
            if at < found.start() {
                fragment(Fragment::Text(&text[at..found.start()]));
            }
            fragment(Fragment::Token(self.ids[found.as_str()]));
            at = found.end();
        }
        if at < text.len() {
            fragment(Fragment::Text(&text[at..]));
        }
    }
}

/// A pattern for any of `texts`, `None` for none: the first branch that matches wins, so the longest is first.
fn any_of(mut texts: Vec<&str>) -> Result<Option<Regex>, String> {
    if texts.is_empty() {
        return Ok(None);
    }
    texts.sort_by_key(|text| std::cmp::Reverse(text.len()));
    let pattern = texts.iter().map(|text| regex::escape(text)).collect::<Vec<_>>().join("|");
    let built = RegexBuilder::new(&pattern).size_limit(PATTERN_BYTES_MAX).build();
    built
        .map(Some)
        .map_err(|error| format!("its {} special tokens cannot be searched for: {error}", texts.len()))
}
