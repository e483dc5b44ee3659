//! A piece of text to token ids: first symbols (bytes or characters), then merges. Knows nothing of how texts are
//! cut into pieces.

use std::collections::HashMap;

use super::bpe::{Merges, Scratch};
use super::bytes::Alphabet;

/// What turns pieces into tokens.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) merges: Merges,
    pub(super) symbols: Symbols,
    /// Whole pieces that are tokens; only for families that take them without merging.
    pub(super) whole: HashMap<Box<[u8]>, u32>,
    /// Stands for what has no token; without it, that is left out.
    pub(super) unknown: Unknown,
}

/// What merging begins with.
#[derive(Debug)]
pub(super) enum Symbols {
    Bytes(ByteIds),
    /// The piece's characters stand for bytes already.
    SpelledBytes(ByteIds, Box<Alphabet>),
    Chars(CharIds),
}

/// The tokens of the single bytes.
pub(super) type ByteIds = Box<[Option<u32>; 256]>;

/// The tokens of single characters.
#[derive(Debug)]
pub(super) struct CharIds {
    pub(super) ids: HashMap<char, u32>,
    /// A character that is no token but part of one has an id from here on, while it is merged.
    pub(super) borrowed_from: u32,
    pub(super) borrowed: Vec<char>,
    /// The tokens of the bytes of characters without a token.
    pub(super) bytes: ByteIds,
}

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Unknown {
    pub(super) id: Option<u32>,
    /// Neighbours without a token share one.
    pub(super) fuse: bool,
}

impl Model {
    /// Appends the tokens of `piece` to `ids`.
    pub(super) fn encode(&self, piece: &str, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        if let Some(&id) = self.whole.get(piece.as_bytes()) {
            return ids.push(id);
        }
        let mut pushed = Pushed { unknown: self.unknown, waiting: false, scratch };
        match &self.symbols {
            Symbols::Bytes(bytes) => {
                piece.bytes().for_each(|byte| pushed.push(bytes[usize::from(byte)]));
            }
            Symbols::SpelledBytes(bytes, alphabet) => {
                for c in piece.chars() {
                    pushed.push(alphabet.byte(c).and_then(|byte| bytes[usize::from(byte)]));
                }
            }
            Symbols::Chars(chars) => {
                piece.chars().for_each(|c| pushed.push_char(chars, c));
            }
        }
        pushed.flush();
        let start = ids.len();
        scratch.merge(&self.merges, ids);
        if let Symbols::Chars(chars) = &self.symbols {
            self.give_back_borrowed(chars, ids, start);
        }
    }

    /// Characters that merged with nothing and are no tokens become their bytes.
    fn give_back_borrowed(&self, chars: &CharIds, ids: &mut Vec<u32>, start: usize) {
        if !ids[start..].iter().any(|&id| id >= chars.borrowed_from) {
            return;
        }
        let merged = ids.split_off(start);
        for id in merged {
            if id < chars.borrowed_from {
                ids.push(id);
                continue;
            }
            let mut text = [0; 4];
            let text = chars.borrowed[(id - chars.borrowed_from) as usize].encode_utf8(&mut text);
            match chars.bytes_of(text) {
                Some(bytes) => ids.extend(bytes),
                None => ids.extend(self.unknown.id),
            }
        }
    }
}

impl CharIds {
    /// The tokens of the text's bytes, if all have one.
    fn bytes_of<'a>(&'a self, text: &'a str) -> Option<impl Iterator<Item = u32> + 'a> {
        let id = |byte: u8| self.bytes[usize::from(byte)];
        text.bytes().all(|byte| id(byte).is_some()).then(|| text.bytes().filter_map(id))
    }
}

/// Symbols on their way into the scratch. One unknown symbol waits, for the next to be fused with.
struct Pushed<'s> {
    unknown: Unknown,
    waiting: bool,
    scratch: &'s mut Scratch,
}

impl Pushed<'_> {
    fn push(&mut self, id: Option<u32>) {
        if let Some(id) = id {
            self.flush();
            self.scratch.push(id);
        } else if !(self.waiting && self.unknown.fuse) {
            self.flush();
            self.waiting = true;
        }
    }

    fn push_char(&mut self, chars: &CharIds, c: char) {
        match (chars.ids.get(&c), chars.bytes_of(c.encode_utf8(&mut [0; 4]))) {
            (Some(&id), _) => self.push(Some(id)),
            (None, Some(bytes)) => bytes.for_each(|id| self.push(Some(id))),
            (None, None) => self.push(None),
        }
    }

    fn flush(&mut self) {
        if std::mem::take(&mut self.waiting)
            && let Some(id) = self.unknown.id
        {
            self.scratch.push(id);
        }
    }
}
