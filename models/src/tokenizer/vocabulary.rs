//! A vocabulary as files hold it, and what all kinds of tokenizer need of it.

use std::collections::HashMap;

use super::bpe::Merges;
use super::bytes::{self, Alphabet};
use super::model::ByteIds;
use crate::error::LoadError;

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

/// A vocabulary as a GGUF file holds it; [`super::Tokenizer::new`] checks it.
#[derive(Debug, Clone, Default)]
pub struct Vocabulary {
    /// What the tokens are made of.
    pub model: VocabularyModel,
    /// The tokens' texts, by id: in the byte alphabet for [`VocabularyModel::Bytes`], else with `▁` for a space.
    pub tokens: Vec<String>,
    /// The tokens' kinds, by id; empty if all are normal.
    pub kinds: Vec<TokenKind>,
    /// Pairs to merge, `left right`, the most important first. None for [`VocabularyModel::Scores`].
    pub merges: Vec<String>,
    /// By id: the higher, the earlier merged. Only for [`VocabularyModel::Scores`].
    pub scores: Vec<f32>,
    /// Name of the pre-tokenizer; only for [`VocabularyModel::Bytes`].
    pub pre: String,
    /// Beginning of text.
    pub bos: Option<u32>,
    /// End of text.
    pub eos: Option<u32>,
    /// Stands for what has no token.
    pub unknown: Option<u32>,
    /// Further tokens that end an answer (end of turn, end of message).
    pub ends: Vec<u32>,
    /// Whether encoding adds `bos`; `None`: as the family does.
    pub add_bos: Option<bool>,
    /// Whether encoding adds `eos`.
    pub add_eos: bool,
    /// Whether a space goes before a text; `None`: as the family does.
    pub add_space_prefix: Option<bool>,
    /// Control tokens swallow the white space to their right.
    pub strip_right_of_control: bool,
}

/// The kinds of GGUF vocabulary (`tokenizer.ggml.model`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum VocabularyModel {
    /// `gpt2`: byte-level BPE.
    #[default]
    Bytes,
    /// `llama`: SentencePiece's BPE, tokens with scores.
    Scores,
    /// `gemma4`: BPE over characters, bytes for those without a token.
    Chars,
}

/// How tokens are written in a vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// In the byte alphabet.
    Bytes,
    /// With this character for a space.
    Spaces(char),
    /// As they are.
    Plain,
}

/// Of equal texts the first counts.
pub(super) fn ids_by_text(tokens: &[String]) -> HashMap<&str, u32> {
    let mut id_of = HashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        id_of.entry(token.as_str()).or_insert(id as u32);
    }
    id_of
}

pub(super) fn read_merges(
    lines: &[String],
    id_of: &HashMap<&str, u32>,
    kinds: &[TokenKind],
) -> Result<Merges, LoadError> {
    let mut merges = Merges::with_capacity(lines.len());
    for (rank, line) in lines.iter().enumerate() {
        let fail = |why: &str| LoadError::Tokenizer(format!("merge {rank} ({line:?}) {why}"));
        // A space at the start would be part of the left side.
        let border = line.char_indices().skip(1).find(|&(_, c)| c == ' ').map(|(at, _)| at);
        let border = border.ok_or_else(|| fail("is not two tokens with a space between"))?;
        let pair = (&line[..border], &line[border + 1..]);
        add_merge(&mut merges, pair, rank, id_of, kinds).map_err(fail)?;
    }
    Ok(merges)
}

/// Adds a merge. One that makes a control or unknown token is left out: what users write is text.
pub(super) fn add_merge(
    merges: &mut Merges,
    (left, right): (&str, &str),
    rank: usize,
    id_of: &HashMap<&str, u32>,
    kinds: &[TokenKind],
) -> Result<(), &'static str> {
    let result = [left, right].concat();
    match (id_of.get(left), id_of.get(right), id_of.get(result.as_str())) {
        (Some(&left), Some(&right), Some(&result)) => {
            if !matches!(kinds[result as usize], TokenKind::Control | TokenKind::Unknown) {
                merges.add(left, right, rank as u32, result);
            }
            Ok(())
        }
        _ => Err("names a token that the vocabulary does not have"),
    }
}

/// The tokens of single bytes in the byte alphabet.
pub(super) fn alphabet_ids(id_of: &HashMap<&str, u32>, kinds: &[TokenKind]) -> ByteIds {
    Box::new(std::array::from_fn(|byte| {
        let id = id_of.get(bytes::char_of_byte(byte as u8).encode_utf8(&mut [0; 4]) as &str).copied()?;
        (!matches!(kinds[id as usize], TokenKind::Control | TokenKind::Unknown)).then_some(id)
    }))
}

/// All tokens' bytes and where each ends.
pub(super) fn decode_all(
    tokens: &[String],
    kinds: &[TokenKind],
    spelling: Spelling,
) -> Result<(Vec<u8>, Vec<u32>), LoadError> {
    let alphabet = Alphabet::new();
    let (mut bytes, mut ends_at) = (Vec::new(), Vec::with_capacity(tokens.len()));
    for (token, kind) in tokens.iter().zip(kinds) {
        let special = matches!(kind, TokenKind::Control | TokenKind::Unknown);
        let written = matches!(kind, TokenKind::UserDefined);
        match (spelling, *kind) {
            // Special tokens are written as they are; so is a normal one with a character outside the alphabet.
            (Spelling::Bytes, _) if !special && !written => match alphabet.bytes(token) {
                Some(decoded) => bytes.extend(decoded),
                None => bytes.extend_from_slice(token.as_bytes()),
            },
            (Spelling::Spaces(_) | Spelling::Plain, TokenKind::Byte) if byte_of(token).is_some() => {
                bytes.extend(byte_of(token));
            }
            (Spelling::Spaces(mark), _) if !special => {
                bytes.extend_from_slice(token.replace(mark, " ").as_bytes());
            }
            _ => bytes.extend_from_slice(token.as_bytes()),
        }
        let end = u32::try_from(bytes.len());
        ends_at.push(end.map_err(|_| LoadError::Tokenizer("its tokens take more than 4 GiB".into()))?);
    }
    Ok((bytes, ends_at))
}

/// The byte that `<0xXX>` stands for.
pub(super) fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}
