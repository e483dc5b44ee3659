//! Text to token ids and back: byte-pair encoding over bytes or characters, from GGUF files and from the
//! `tokenizer.json` of Hugging Face directories. Knows no chat format and keeps no state between calls, so one
//! tokenizer serves all threads.
//!
//! A text goes through: special tokens found in it -> normalisation -> tokens found in the normalised text ->
//! pieces -> merges. Each file format's reader fills these five in; nothing after the readers knows of formats.
//!
//! Invariants: the ids equal llama.cpp's for a GGUF file and the `tokenizers` library's for a directory; what
//! users write never becomes a control token (see `guard`); `token_bytes` of the ids of a text, put together, are
//! the text's bytes (special tokens included), as long as the vocabulary has all bytes, which real ones do, and
//! the normalisation changes nothing but spaces.

mod bpe;
mod bytes;
mod families;
mod gguf;
mod guard;
mod hf;
mod model;
mod pattern;
mod scored;
mod special;
mod steps;
mod vocabulary;

use std::borrow::Cow;
use std::collections::HashMap;

use crate::error::LoadError;
use bpe::Scratch;
pub use guard::{Guard, NoMarkLeft};
use model::{Model, Symbols};
use special::{Found, Fragment, SpecialTokens};
use steps::{Place, PrependTo, Step};
use vocabulary::Spelling;
pub use vocabulary::{TokenKind, Vocabulary, VocabularyModel};

/// What to do about special tokens when encoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Special {
    /// Control tokens written in the text become ids. If false they are text (tokens that the vocabulary marks as
    /// user-defined are found either way, as llama.cpp does).
    pub parse: bool,
    /// Add the beginning-of-text and end-of-text tokens that the model wants; a beginning that the text has
    /// already is not doubled.
    pub add: bool,
}

/// Tokens that end an answer wherever a vocabulary has them as control or user-defined tokens: files often name only
/// one of them.
const END_TEXTS: &[&str] = &[
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "<|return|>",
    "<|call|>",
    "</s>",
    "<turn|>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
];

/// Encodes and decodes.
#[derive(Debug)]
pub struct Tokenizer {
    /// Found in the text as it is.
    special: SpecialTokens,
    /// Done to the text between them.
    normalize: Vec<Step>,
    /// Found in the normalised text.
    normalized: SpecialTokens,
    /// Cuts what is between those.
    split: Vec<Step>,
    model: Model,
    /// Where a space is put before texts, which decoding leaves out again.
    space_before: Option<PrependTo>,
    /// The bytes of all tokens, one after the other, and where each ends.
    bytes: Vec<u8>,
    ends_at: Vec<u32>,
    kinds: Vec<TokenKind>,
    bos: Option<u32>,
    eos: Option<u32>,
    end_tokens: Vec<u32>,
    /// Tokens that encoding adds.
    before: Vec<u32>,
    after: Vec<u32>,
}

/// What a tokenizer is made of, as the readers of file formats deliver it.
struct Parts {
    tokens: Vec<String>,
    kinds: Vec<TokenKind>,
    /// Control, unknown and user-defined tokens.
    found: Vec<Found>,
    normalize: Vec<Step>,
    split: Vec<Step>,
    model: Model,
    /// A piece that is a token is taken whole, without merging.
    whole: bool,
    spelling: Spelling,
    bos: Option<u32>,
    eos: Option<u32>,
    ends: Vec<u32>,
    before: Vec<u32>,
    after: Vec<u32>,
}

impl Tokenizer {
    fn assemble(mut parts: Parts) -> Result<Self, LoadError> {
        let fail = |why: String| Err(LoadError::Tokenizer(why));
        let size = parts.tokens.len();
        if size == 0 || size >= u32::MAX as usize {
            return fail(format!("it has {size} tokens"));
        }
        let mut ids: Vec<u32> = [parts.bos, parts.eos].into_iter().flatten().collect();
        ids.extend([&parts.ends, &parts.before, &parts.after].into_iter().flatten());
        if let Some(id) = ids.into_iter().find(|&id| id as usize >= size) {
            return fail(format!("the special token id {id} is not below the vocabulary's size {size}"));
        }
        for found in &mut parts.found {
            // As llama.cpp does: files that call such a token user-defined would let a message end its turn.
            let kind = &mut parts.kinds[found.id as usize];
            // A user-defined `</s>` may be the tag of HTML, as in Gemma's vocabularies.
            let ends = END_TEXTS.contains(&found.text.as_str()) && found.text != "</s>";
            if *kind == TokenKind::UserDefined && ends {
                *kind = TokenKind::Control;
                found.normalized = false;
            }
            if found.normalized {
                // It is looked for in the form that normalisation gives it, a space before it and all.
                let place = Place { first_text: true, start: true };
                found.text = steps::rewrite(&parts.normalize, found.text.as_str().into(), place).into_owned();
            }
        }
        let (bytes, ends_at) = vocabulary::decode_all(&parts.tokens, &parts.kinds, parts.spelling)?;
        let (normalized, raw): (Vec<_>, Vec<_>) = parts.found.into_iter().partition(|found| found.normalized);
        let special = |found| SpecialTokens::new(found, &parts.kinds).map_err(LoadError::Tokenizer);
        let end_tokens = end_tokens(&parts.tokens, &parts.kinds, parts.eos.into_iter().chain(parts.ends));
        let mut tokenizer = Self {
            special: special(raw)?,
            normalized: special(normalized)?,
            space_before: space_before(parts.normalize.iter().chain(&parts.split), parts.spelling),
            normalize: parts.normalize,
            split: parts.split,
            model: parts.model,
            bytes,
            ends_at,
            bos: parts.bos,
            eos: parts.eos,
            end_tokens,
            before: parts.before,
            after: parts.after,
            kinds: parts.kinds,
        };
        if parts.whole {
            tokenizer.model.whole = tokenizer.whole_pieces(&parts.tokens, parts.spelling);
        }
        Ok(tokenizer)
    }

    fn whole_pieces(&self, tokens: &[String], spelling: Spelling) -> HashMap<Box<[u8]>, u32> {
        let normal = |id: &u32| self.kinds[*id as usize] == TokenKind::Normal;
        // Pieces are bytes where the tokens are spelled in bytes, else they are written as the tokens are.
        let piece = |id: u32| match (spelling, &self.model.symbols) {
            (Spelling::Bytes, Symbols::Bytes(_)) => self.token_bytes(id),
            _ => Some(tokens[id as usize].as_bytes()),
        };
        // Backwards, so that of equal tokens the first stays.
        let ids = (0..self.kinds.len() as u32).rev().filter(normal);
        ids.filter_map(|id| Some((piece(id)?.into(), id))).collect()
    }

    // ---- encoding ----

    /// Token ids of `text`.
    #[must_use]
    pub fn encode(&self, text: &str, special: Special) -> Vec<u32> {
        self.encode_marked(text, None, special)
    }

    /// Token ids of a text that was made of strings from [`Tokenizer::guard`] with the same `guard`.
    #[must_use]
    pub fn encode_guarded(&self, text: &str, guard: Guard, special: Special) -> Vec<u32> {
        self.encode_marked(text, Some(guard), special)
    }

    /// A copy of `value` in whose strings no control token is left whole: see [`Guard`].
    #[must_use]
    pub fn guard(&self, guard: Guard, value: &serde_json::Value) -> serde_json::Value {
        self.special.shield.apply(guard, value)
    }

    fn encode_marked(&self, text: &str, guard: Option<Guard>, special: Special) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        let mut scratch = Scratch::default();
        let mut place = Place { first_text: true, start: true };
        self.special.partition(text, special.parse, &mut |fragment| match fragment {
            Fragment::Token(id) => {
                ids.push(id);
                place.start = false;
            }
            Fragment::Text(text) => {
                let text = guard.map_or(text.into(), |guard| guard.unmark(text));
                if !text.is_empty() {
                    self.encode_text(text, place, &mut scratch, &mut ids);
                    place = Place { first_text: false, start: false };
                }
            }
        });
        if special.add {
            if !self.before.is_empty() && !ids.starts_with(&self.before) {
                ids.splice(0..0, self.before.iter().copied());
            }
            ids.extend(&self.after);
        }
        ids
    }

    fn encode_text(&self, text: Cow<'_, str>, mut place: Place, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        let text = steps::rewrite(&self.normalize, text, place);
        let mut model = |piece: &str, ids: &mut Vec<u32>| self.model.encode(piece, scratch, ids);
        if self.normalized.is_empty() {
            return steps::pieces(&self.split, &text, place, &mut |piece| model(piece, ids));
        }
        self.normalized.partition(&text, false, &mut |fragment| {
            match fragment {
                Fragment::Token(id) => ids.push(id),
                Fragment::Text(text) => {
                    steps::pieces(&self.split, text, place, &mut |piece| model(piece, ids));
                }
            }
            place = Place { first_text: false, start: false };
        });
    }

    // ---- decoding ----

    /// The bytes of a token, which need not be whole characters; `None` if `id` is not of the vocabulary.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        let end = *self.ends_at.get(id as usize)?;
        let start = if id == 0 { 0 } else { self.ends_at[id as usize - 1] };
        Some(&self.bytes[start as usize..end as usize])
    }

    /// The token's text for people; bytes that are no whole character become U+FFFD. Empty if out of range.
    #[must_use]
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(self.token_bytes(id).unwrap_or_default()).into_owned()
    }

    /// The text of `ids`, without the space that encoding put before it; what is no UTF-8 becomes U+FFFD, ids out
    /// of range are left out.
    #[must_use]
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::new();
        let mut strips = self.space_before.is_some();
        for &id in ids {
            let is_special = self.is_special(id);
            let token = self.token_bytes(id).unwrap_or_default();
            let token = token.strip_prefix(b" ").filter(|_| strips && !is_special).unwrap_or(token);
            if !(skip_special && is_special) {
                bytes.extend_from_slice(token);
            }
            let whole = is_special || self.kinds.get(id as usize) == Some(&TokenKind::UserDefined);
            strips = self.space_before == Some(PrependTo::Every) && whole;
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    // ---- about the vocabulary ----

    /// A control or unknown token: not text of its own. False if out of range.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        matches!(self.kinds.get(id as usize), Some(TokenKind::Control | TokenKind::Unknown))
    }

    /// Tokens that end an answer, ascending.
    #[must_use]
    pub fn end_tokens(&self) -> &[u32] {
        &self.end_tokens
    }

    /// Beginning of text, if the vocabulary has one.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// End of text, if the vocabulary has one.
    #[must_use]
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Ids are below this.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.kinds.len()
    }

    /// The control token with this text.
    #[must_use]
    pub fn control_token(&self, text: &str) -> Option<u32> {
        let is_it = |&id: &u32| self.is_special(id) && self.token_bytes(id) == Some(text.as_bytes());
        (0..self.kinds.len() as u32).find(is_it)
    }
}

/// `ends`, and the control tokens that are known to end answers; ascending.
fn end_tokens(tokens: &[String], kinds: &[TokenKind], ends: impl Iterator<Item = u32>) -> Vec<u32> {
    let known = |id: &u32| {
        kinds[*id as usize] == TokenKind::Control && END_TEXTS.contains(&tokens[*id as usize].as_str())
    };
    let mut found: Vec<u32> = ends.chain((0..tokens.len() as u32).filter(known)).collect();
    // In gpt-oss's format an answer has several messages; `<|end|>` only ends one.
    let text = |id: &u32| tokens.get(*id as usize).map_or("", String::as_str);
    if ["<|return|>", "<|call|>"].iter().all(|end| found.iter().any(|id| text(id) == *end)) {
        found.retain(|id| text(id) != "<|end|>");
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// Where encoding puts a space that is no part of the text. Byte-level vocabularies keep it when they decode.
fn space_before<'s>(mut steps: impl Iterator<Item = &'s Step>, spelling: Spelling) -> Option<PrependTo> {
    let Spelling::Spaces(mark) = spelling else { return None };
    steps.find_map(|step| match step {
        Step::Prepend(prepend) if prepend.text == " " || prepend.text == mark.to_string() => Some(prepend.to),
        _ => None,
    })
}

#[cfg(test)]
mod tests;
