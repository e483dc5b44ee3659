//! Vocabularies whose tokens carry scores instead of a list of merges (SentencePiece's BPE; Kudo and Richardson
//! 2018, arXiv:1808.06226): of all neighbours that make up a token, those with the highest score merge first.
//!
//! Here that becomes a list of merges: every way to make a token of two others, ranked by its score. A character
//! that is part of a token but none itself takes part under a borrowed id.
//!
//! Invariant: no merge makes a control, unknown or byte token, so a text that spells `</s>` stays text. (llama.cpp
//! would make the token if its parts merge; here no message can end its turn.)

use std::collections::HashMap;

use super::bpe::Merges;
use super::model::{ByteIds, CharIds};
use super::vocabulary::TokenKind;

/// Longer tokens are refused: the ways to cut a token take the square of its length.
const TOKEN_BYTES_MAX: usize = 1024;

/// The merges and characters of a vocabulary with scores.
pub(super) fn merges_by_score(
    tokens: &[String],
    kinds: &[TokenKind],
    scores: &[f32],
    id_of: &HashMap<&str, u32>,
) -> Result<(Merges, CharIds), String> {
    if scores.len() != tokens.len() {
        return Err(format!("it has {} tokens but {} scores", tokens.len(), scores.len()));
    }
    if let Some(id) = scores.iter().position(|score| score.is_nan()) {
        return Err(format!("the score of token {id} is not a number"));
    }
    let is_text = |id: u32| is_text(kinds[id as usize]);
    let ranks = ranks(scores);
    let mut chars = CharIds {
        ids: single_chars(id_of, kinds),
        borrowed_from: tokens.len() as u32,
        borrowed: Vec::new(),
        bytes: byte_tokens(id_of),
    };
    let mut merges = Merges::with_capacity(tokens.len() * 2);
    for (id, token) in (0..).zip(tokens) {
        if !is_text(id) || id_of[token.as_str()] != id || token.chars().nth(1).is_none() {
            continue;
        }
        if token.len() > TOKEN_BYTES_MAX {
            return Err(format!("token {id} has {} bytes, more than {TOKEN_BYTES_MAX}", token.len()));
        }
        for (border, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(border);
            let part = |part: &str, chars: &mut CharIds| match id_of.get(part) {
                Some(&id) if is_text(id) => Some(id),
                _ => chars.borrow_char(part),
            };
            if let Some(left) = part(left, &mut chars)
                && let Some(right) = part(right, &mut chars)
            {
                merges.add(left, right, ranks[id as usize], id);
            }
        }
    }
    Ok((merges, chars))
}

/// What text may become.
pub(super) fn is_text(kind: TokenKind) -> bool {
    matches!(kind, TokenKind::Normal | TokenKind::UserDefined | TokenKind::Unused)
}

/// The text tokens that are single characters.
pub(super) fn single_chars(id_of: &HashMap<&str, u32>, kinds: &[TokenKind]) -> HashMap<char, u32> {
    let single = |(text, id): (&&str, &u32)| {
        let mut chars = text.chars();
        let c = chars.next().filter(|_| chars.next().is_none() && is_text(kinds[*id as usize]))?;
        Some((c, *id))
    };
    id_of.iter().filter_map(single).collect()
}

/// The tokens `<0x00>` to `<0xFF>`.
pub(super) fn byte_tokens(id_of: &HashMap<&str, u32>) -> ByteIds {
    Box::new(std::array::from_fn(|byte| id_of.get(format!("<0x{byte:02X}>").as_str()).copied()))
}

/// By token: how many different scores are higher.
fn ranks(scores: &[f32]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]));
    let mut ranks = vec![0; scores.len()];
    let mut rank = 0;
    for pair in order.windows(2) {
        // Plain comparison: 0 and -0 are one score.
        rank += u32::from(scores[pair[0] as usize] > scores[pair[1] as usize]);
        ranks[pair[1] as usize] = rank;
    }
    ranks
}

impl CharIds {
    /// The borrowed id of a text that is a single character.
    fn borrow_char(&mut self, text: &str) -> Option<u32> {
        let mut chars = text.chars();
        let c = chars.next().filter(|_| chars.next().is_none())?;
        if let Some(&id) = self.ids.get(&c) {
            return Some(id);
        }
        let id = self.borrowed_from + self.borrowed.len() as u32;
        self.borrowed.push(c);
        self.ids.insert(c, id);
        Some(id)
    }
}
