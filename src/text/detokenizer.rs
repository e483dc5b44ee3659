//! Tokens into characters as they come: a token may hold a part of a character, which waits for the rest.
//!
//! Invariant: the pieces, put together, are `String::from_utf8_lossy` of all bytes, however they were cut.

use obol_models::tokenizer::Tokenizer;

/// The bytes of one answer that are no whole character yet.
#[derive(Debug, Default)]
pub struct Detokenizer {
    /// Special tokens whose text is shown.
    shown: Vec<u32>,
    /// At most three bytes: the beginning of a character.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// At the beginning of an answer.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// At the beginning of an answer in which the text of these special tokens counts.
    #[must_use]
    pub fn showing(shown: &[u32]) -> Self {
        Self { shown: shown.to_vec(), ..Self::default() }
    }

    /// The text that `token` completes; none for other special tokens and ids out of range.
    #[must_use]
    pub fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> String {
        if tokenizer.is_special(token) && !self.shown.contains(&token) {
            return String::new();
        }
        self.push_bytes(tokenizer.token_bytes(token).unwrap_or_default())
    }

    /// The text that `bytes` complete. What can never become a character is U+FFFD at once.
    #[must_use]
    pub fn push_bytes(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut waiting = 0;
        let mut chunks = self.pending.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            if chunks.peek().is_none() && is_incomplete(chunk.invalid()) {
                waiting = chunk.invalid().len();
            } else if !chunk.invalid().is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending.drain(..self.pending.len() - waiting);
        text
    }

    /// The end: what still waits is no character.
    #[must_use]
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

/// Further bytes could make a character of it.
fn is_incomplete(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Random;

    fn pushed(chunks: &[&[u8]]) -> Vec<String> {
        let mut detokenizer = Detokenizer::new();
        let mut texts: Vec<String> = chunks.iter().map(|chunk| detokenizer.push_bytes(chunk)).collect();
        texts.push(detokenizer.finish());
        texts
    }

    #[test]
    fn a_character_comes_out_when_its_last_byte_is_there() {
        assert_eq!(pushed(&[b"a\xE2", b"\x82", b"\xACb"]), ["a", "", "€b", ""]);
        assert_eq!(pushed(&[b"\xF0\x9F\x98"]), ["", "\u{FFFD}"]);
        assert_eq!(pushed(&[b"\xE2\x82", b"a"]), ["", "\u{FFFD}a", ""]);
        assert_eq!(pushed(&[b"\xFF", b"\xC0x"]), ["\u{FFFD}", "\u{FFFD}x", ""]);
    }

    #[test]
    fn any_cutting_gives_the_text_of_the_whole() {
        const PARTS: &[&[u8]] =
            &[b"a", "é".as_bytes(), "€".as_bytes(), "😀".as_bytes(), b"\xFF", b"\xE2\x82", b"\x80"];
        for seed in 1..2000 {
            let mut random = Random(seed);
            let bytes: Vec<u8> =
                (0..random.below(8)).flat_map(|_| PARTS[random.below(PARTS.len())]).copied().collect();
            let mut detokenizer = Detokenizer::new();
            let (mut text, mut at) = (String::new(), 0);
            while at < bytes.len() {
                let end = (at + 1 + random.below(4)).min(bytes.len());
                text.push_str(&detokenizer.push_bytes(&bytes[at..end]));
                assert!(detokenizer.pending.len() < 4, "seed {seed}: at most three bytes wait");
                at = end;
            }
            text.push_str(&detokenizer.finish());
            assert_eq!(text, String::from_utf8_lossy(&bytes), "seed {seed}: {bytes:?}");
        }
    }
}
