//! Text to token ids and back, by the vocabulary that a GGUF file carries (`tokenizer.ggml.*`): byte-level BPE.
//! Knows no chat format and keeps no state between calls, so one tokenizer serves all threads.
//!
//! Invariants: the ids equal llama.cpp's for the same file; `token_bytes` of the ids of a text, put together, are
//! the text's bytes (special tokens included), as long as the vocabulary has all bytes, which real ones do.

mod bpe;
mod bytes;
mod guard;
mod special;
mod split;

use std::collections::HashMap;

use crate::error::LoadError;
use crate::gguf::GgufFile;
use bpe::{Merges, Scratch};
use bytes::Alphabet;
pub use guard::{Guard, NoMarkLeft};
use special::SpecialTokens;
use split::Splitter;

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

/// What a token is (`tokenizer.ggml.token_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// A piece of text.
    Normal,
    /// Stands for what has no token.
    Unknown,
    /// Steers: never text of its own.
    Control,
    /// Text that is always found whole.
    UserDefined,
    /// A place without a use.
    Unused,
    /// One byte.
    Byte,
}

/// A vocabulary as a file holds it; [`Tokenizer::new`] checks it.
#[derive(Debug, Clone, Default)]
pub struct Vocabulary {
    /// The tokens' texts in the byte alphabet, by id.
    pub tokens: Vec<String>,
    /// The tokens' kinds, by id; empty if all are normal.
    pub kinds: Vec<TokenKind>,
    /// Pairs to merge, `left right`, the most important first.
    pub merges: Vec<String>,
    /// Name of the pre-tokenizer.
    pub pre: String,
    /// Beginning of text.
    pub bos: Option<u32>,
    /// End of text.
    pub eos: Option<u32>,
    /// Further tokens that end an answer (end of turn, end of message).
    pub ends: Vec<u32>,
    /// Whether encoding adds `bos`; `None`: as the pre-tokenizer's family does.
    pub add_bos: Option<bool>,
    /// Whether encoding adds `eos`.
    pub add_eos: bool,
    /// Whether a space goes before a text.
    pub add_space_prefix: bool,
}

/// Tokens that end an answer wherever a vocabulary has them as control tokens: files often name only one of them.
const END_TEXTS: &[&str] = &[
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
];

/// Encodes and decodes.
#[derive(Debug)]
pub struct Tokenizer {
    splitter: Splitter,
    merges: Merges,
    /// The token of each single byte.
    byte_ids: [Option<u32>; 256],
    /// Whole pieces that are tokens; only for families that take them without merging.
    whole: HashMap<Box<[u8]>, u32>,
    special: SpecialTokens,
    /// The bytes of all tokens, one after the other, and where each ends.
    bytes: Vec<u8>,
    ends_at: Vec<u32>,
    kinds: Vec<TokenKind>,
    bos: Option<u32>,
    eos: Option<u32>,
    end_tokens: Vec<u32>,
    add_bos: bool,
    add_eos: bool,
    add_space_prefix: bool,
}

impl Tokenizer {
    /// Reads `tokenizer.ggml.*`.
    ///
    /// # Errors
    /// When a key is missing or of another type, the model is not byte-level BPE, the pre-tokenizer is unknown, or
    /// the parts do not fit together (see [`Tokenizer::new`]).
    pub fn from_gguf(file: &GgufFile) -> Result<Self, LoadError> {
        let model = file.string("tokenizer.ggml.model")?;
        if model != "gpt2" {
            return Err(LoadError::Tokenizer(format!(
                "its kind `{model}` is not supported; supported: gpt2 (byte-level BPE)"
            )));
        }
        let owned = |texts: Vec<&str>| texts.into_iter().map(str::to_owned).collect::<Vec<_>>();
        let kinds = file.find_i32s("tokenizer.ggml.token_type")?.unwrap_or_default();
        let end = |name: &str| file.find_u32(&format!("tokenizer.ggml.{name}_token_id"));
        let vocabulary = Vocabulary {
            tokens: owned(file.strings("tokenizer.ggml.tokens")?),
            kinds: kinds.into_iter().map(kind_of).collect::<Result<_, _>>()?,
            merges: owned(file.strings("tokenizer.ggml.merges")?),
            pre: file.find_string("tokenizer.ggml.pre")?.unwrap_or("default").to_owned(),
            bos: end("bos")?,
            eos: end("eos")?,
            ends: [end("eot")?, end("eom")?].into_iter().flatten().collect(),
            add_bos: file.find_bool("tokenizer.ggml.add_bos_token")?,
            add_eos: file.find_bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
            add_space_prefix: file.find_bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(false),
        };
        Self::new(&vocabulary)
    }

    /// Builds the tables.
    ///
    /// # Errors
    /// [`LoadError::Tokenizer`] when the vocabulary is empty or too large, a list has another length, an id is out
    /// of range, or a merge names a token that is not there.
    pub fn new(vocabulary: &Vocabulary) -> Result<Self, LoadError> {
        let fail = |why: String| Err(LoadError::Tokenizer(why));
        let size = vocabulary.tokens.len();
        if size == 0 || size >= u32::MAX as usize {
            return fail(format!("it has {size} tokens"));
        }
        let mut kinds = vocabulary.kinds.clone();
        if kinds.is_empty() {
            kinds = vec![TokenKind::Normal; size];
        } else if kinds.len() != size {
            return fail(format!("it has {size} tokens but {} token types", kinds.len()));
        }
        let named =
            [vocabulary.bos, vocabulary.eos].into_iter().flatten().chain(vocabulary.ends.iter().copied());
        for id in named.clone() {
            if id as usize >= size {
                return fail(format!("the special token id {id} is not below the vocabulary's size {size}"));
            }
        }
        let splitter = Splitter::by_name(&vocabulary.pre).map_err(LoadError::Tokenizer)?;

        let id_of = ids_by_text(&vocabulary.tokens);
        let merges = read_merges(&vocabulary.merges, &id_of)?;
        let byte_ids = std::array::from_fn(|byte| {
            id_of.get(bytes::char_of_byte(byte as u8).encode_utf8(&mut [0; 4]) as &str).copied()
        });
        let (bytes, ends_at) = decode_all(&vocabulary.tokens, &kinds);
        let mut tokenizer = Self {
            add_bos: vocabulary.add_bos.unwrap_or(splitter.add_bos),
            splitter,
            merges,
            byte_ids,
            whole: HashMap::new(),
            special: SpecialTokens::new(&vocabulary.tokens, &kinds).map_err(LoadError::Tokenizer)?,
            bytes,
            ends_at,
            bos: vocabulary.bos,
            eos: vocabulary.eos,
            end_tokens: Vec::new(),
            add_eos: vocabulary.add_eos,
            add_space_prefix: vocabulary.add_space_prefix,
            kinds,
        };
        if tokenizer.splitter.ignore_merges {
            tokenizer.whole = tokenizer.whole_pieces();
        }
        let ends = vocabulary.eos.into_iter().chain(vocabulary.ends.iter().copied());
        let known = END_TEXTS.iter().filter_map(|text| id_of.get(text).copied());
        let known = known.filter(|&id| tokenizer.kinds[id as usize] == TokenKind::Control);
        tokenizer.end_tokens = ends.chain(known).collect();
        tokenizer.end_tokens.sort_unstable();
        tokenizer.end_tokens.dedup();
        Ok(tokenizer)
    }

    fn whole_pieces(&self) -> HashMap<Box<[u8]>, u32> {
        let normal = |id: &u32| self.kinds[*id as usize] == TokenKind::Normal;
        // Backwards, so that of equal tokens the first stays.
        let ids = (0..self.kinds.len() as u32).rev().filter(normal);
        ids.filter_map(|id| Some((self.token_bytes(id)?.into(), id))).collect()
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
        let mut first = self.add_space_prefix;
        self.special.partition(text, special.parse, &mut |fragment| match fragment {
            special::Fragment::Token(id) => ids.push(id),
            special::Fragment::Text(text) => {
                let text = guard.map_or(text.into(), |guard| guard.unmark(text));
                if std::mem::take(&mut first) && !text.starts_with(char::is_whitespace) {
                    self.encode_text(&format!(" {text}"), &mut scratch, &mut ids);
                } else {
                    self.encode_text(&text, &mut scratch, &mut ids);
                }
            }
        });
        if special.add && self.add_bos && self.bos.is_some() && ids.first() != self.bos.as_ref() {
            ids.splice(0..0, self.bos);
        }
        if special.add && self.add_eos {
            ids.extend(self.eos);
        }
        ids
    }

    fn encode_text(&self, text: &str, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        self.splitter.split(text, &mut |piece: &str| match self.whole.get(piece.as_bytes()) {
            Some(&id) => ids.push(id),
            // A byte without a token is left out, as llama.cpp does.
            None => {
                let bytes = piece.bytes().filter_map(|byte| self.byte_ids[usize::from(byte)]);
                scratch.merge(&self.merges, bytes, ids);
            }
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

    /// The text of `ids`; what is no UTF-8 becomes U+FFFD, ids out of range are left out.
    #[must_use]
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::new();
        for &id in ids.iter().filter(|&&id| !(skip_special && self.is_special(id))) {
            bytes.extend_from_slice(self.token_bytes(id).unwrap_or_default());
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

fn kind_of(number: i32) -> Result<TokenKind, LoadError> {
    Ok(match number {
        1 => TokenKind::Normal,
        2 => TokenKind::Unknown,
        3 => TokenKind::Control,
        4 => TokenKind::UserDefined,
        5 => TokenKind::Unused,
        6 => TokenKind::Byte,
        other => return Err(LoadError::Tokenizer(format!("it has the unknown token type {other}"))),
    })
}

/// Of equal texts the first counts.
fn ids_by_text(tokens: &[String]) -> HashMap<&str, u32> {
    let mut id_of = HashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        id_of.entry(token.as_str()).or_insert(id as u32);
    }
    id_of
}

fn read_merges(lines: &[String], id_of: &HashMap<&str, u32>) -> Result<Merges, LoadError> {
    let mut merges = Merges::with_capacity(lines.len());
    let mut text = String::new();
    for (rank, line) in lines.iter().enumerate() {
        let fail = |why: &str| Err(LoadError::Tokenizer(format!("merge {rank} ({line:?}) {why}")));
        // A space at the start would be part of the left side.
        let Some(border) = line.char_indices().skip(1).find(|&(_, c)| c == ' ').map(|(at, _)| at) else {
            return fail("is not two tokens with a space between");
        };
        let (left, right) = (&line[..border], &line[border + 1..]);
        text.clear();
        text.extend([left, right]);
        match (id_of.get(left), id_of.get(right), id_of.get(text.as_str())) {
            (Some(&left), Some(&right), Some(&result)) => merges.add(left, right, rank as u32, result),
            _ => return fail("names a token that the vocabulary does not have"),
        }
    }
    Ok(merges)
}

/// All tokens' bytes and where each ends.
fn decode_all(tokens: &[String], kinds: &[TokenKind]) -> (Vec<u8>, Vec<u32>) {
    let alphabet = Alphabet::new();
    let (mut bytes, mut ends_at) = (Vec::new(), Vec::with_capacity(tokens.len()));
    for (token, kind) in tokens.iter().zip(kinds) {
        // Special tokens are written as they are; so is a normal one with a character outside the alphabet.
        let encoded = matches!(kind, TokenKind::Normal | TokenKind::Byte | TokenKind::Unused);
        match encoded.then(|| alphabet.bytes(token)).flatten() {
            Some(decoded) => bytes.extend(decoded),
            None => bytes.extend_from_slice(token.as_bytes()),
        }
        ends_at.push(bytes.len() as u32);
    }
    (bytes, ends_at)
}

#[cfg(test)]
mod tests;
