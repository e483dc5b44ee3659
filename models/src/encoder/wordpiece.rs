//! BERT's tokenizer: normalised text, cut at blanks and punctuation, and each word into the longest pieces that the
//! vocabulary has. Reads `tokenizer.json`.
//!
//! Names of special tokens inside a text are plain text. Ids equal those of the `tokenizers` library, but for code
//! points that its older Unicode tables do not know.

use std::collections::HashMap;
use std::path::Path;

use regex::Regex;
use serde::Deserialize;
use unicode_normalization::UnicodeNormalization;

use crate::error::LoadError;

/// The largest tokenizer.json of this kind has a few MB.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Texts to ids.
pub struct WordPiece {
    ids: HashMap<String, u32>,
    /// By their ids.
    texts: Vec<String>,
    unknown: u32,
    first: u32,
    last: u32,
    /// Stands before pieces that go on with a word.
    prefix: String,
    word_chars_max: usize,
    clean: bool,
    chinese: bool,
    accents: bool,
    lowercase: bool,
    marks: Regex,
    punctuation: Regex,
    control: Regex,
}

#[derive(Deserialize)]
struct File {
    normalizer: Normalizer,
    pre_tokenizer: Kind,
    model: Model,
}

#[derive(Deserialize)]
struct Kind {
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct Normalizer {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default = "yes")]
    clean_text: bool,
    #[serde(default = "yes")]
    handle_chinese_chars: bool,
    strip_accents: Option<bool>,
    #[serde(default = "yes")]
    lowercase: bool,
}

fn yes() -> bool {
    true
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    unk_token: String,
    continuing_subword_prefix: String,
    max_input_chars_per_word: usize,
    vocab: HashMap<String, u32>,
}

impl WordPiece {
    /// Reads the directory's `tokenizer.json`.
    ///
    /// # Errors
    /// When it is missing or broken, or of another kind.
    pub fn load(directory: &Path) -> Result<Self, LoadError> {
        let path = directory.join("tokenizer.json");
        let io = |source| LoadError::Io { path: path.clone(), source };
        let bytes = std::fs::metadata(&path).map_err(io)?.len();
        if bytes > FILE_BYTES_MAX {
            return Err(wrong(format!("it has {bytes} bytes, over {FILE_BYTES_MAX}")));
        }
        Self::parse(&std::fs::read(&path).map_err(io)?)
    }

    /// Reads the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// When it is broken or of another kind.
    pub fn parse(text: &[u8]) -> Result<Self, LoadError> {
        let file: File = serde_json::from_slice(text).map_err(|error| wrong(format!("{error}")))?;
        let File { normalizer, pre_tokenizer, model } = file;
        let kinds = [
            (normalizer.kind.as_str(), "BertNormalizer"),
            (pre_tokenizer.kind.as_str(), "BertPreTokenizer"),
            (model.kind.as_deref().unwrap_or("WordPiece"), "WordPiece"),
        ];
        if let Some((found, expected)) = kinds.into_iter().find(|(found, expected)| found != expected) {
            return Err(wrong(format!("it has a {found}; embedding models with {expected} are supported")));
        }
        let size = model.vocab.len();
        let mut texts = vec![None; size];
        for (text, id) in &model.vocab {
            match texts.get_mut(*id as usize) {
                Some(place @ None) => *place = Some(text.clone()),
                Some(Some(other)) => {
                    return Err(wrong(format!("{text:?} and {other:?} both have the id {id}")));
                }
                None => {
                    return Err(wrong(format!(
                        "{text:?} has the id {id}, past the {size} tokens that there are"
                    )));
                }
            }
        }
        let find = |text: &str| {
            let id = model.vocab.get(text).copied();
            id.ok_or_else(|| wrong(format!("its vocabulary has no {text}")))
        };
        Ok(Self {
            unknown: find(&model.unk_token)?,
            first: find("[CLS]")?,
            last: find("[SEP]")?,
            texts: texts.into_iter().flatten().collect(),
            prefix: model.continuing_subword_prefix,
            word_chars_max: model.max_input_chars_per_word,
            clean: normalizer.clean_text,
            chinese: normalizer.handle_chinese_chars,
            accents: !normalizer.strip_accents.unwrap_or(normalizer.lowercase),
            lowercase: normalizer.lowercase,
            marks: class(r"^\p{Mn}$"),
            punctuation: class(r"^\p{P}$"),
            control: class(r"^[\p{Cc}\p{Cf}\p{Co}]$"),
            ids: model.vocab,
        })
    }

    /// Ids are below this.
    pub fn vocab_size(&self) -> usize {
        self.texts.len()
    }

    /// The ids of a text, between those that begin and end it.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = vec![self.first];
        let mut word = String::new();
        for c in self.normalised(text).chars() {
            if c.is_whitespace() {
                self.take(&mut word, &mut ids);
            } else if c.is_ascii_punctuation() || is(&self.punctuation, c) {
                self.take(&mut word, &mut ids);
                word.push(c);
                self.take(&mut word, &mut ids);
            } else {
                word.push(c);
            }
        }
        self.take(&mut word, &mut ids);
        ids.push(self.last);
        ids
    }

    /// The text of ids: their pieces joined, special ones left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut text = String::new();
        for id in ids.iter().filter(|id| **id != self.first && **id != self.last) {
            let Some(piece) = self.texts.get(*id as usize) else { continue };
            match piece.strip_prefix(&self.prefix) {
                Some(rest) => text.push_str(rest),
                None => {
                    text.push_str(if text.is_empty() { "" } else { " " });
                    text.push_str(piece);
                }
            }
        }
        text
    }

    fn normalised(&self, text: &str) -> String {
        let mut clean = String::with_capacity(text.len());
        for c in text.chars() {
            let blank = matches!(c, '\t' | '\n' | '\r') || c.is_whitespace();
            if self.clean
                && !matches!(c, '\t' | '\n' | '\r')
                && (matches!(c, '\0' | '\u{fffd}') || is(&self.control, c))
            {
                continue;
            }
            match (self.clean && blank, self.chinese && is_chinese(c)) {
                (true, _) => clean.push(' '),
                (false, true) => clean.extend([' ', c, ' ']),
                (false, false) => clean.push(c),
            }
        }
        if !self.accents {
            clean = clean.nfd().filter(|c| c.is_ascii() || !is(&self.marks, *c)).collect();
        }
        if self.lowercase {
            // A letter at a time: the end of a word does not matter.
            clean = clean.chars().flat_map(char::to_lowercase).collect();
        }
        clean
    }

    /// Adds the pieces of a word, which is empty then.
    fn take(&self, word: &mut String, ids: &mut Vec<u32>) {
        if word.is_empty() {
            return;
        }
        let before = ids.len();
        if word.chars().count() > self.word_chars_max || !self.cut(word, ids) {
            ids.truncate(before);
            ids.push(self.unknown);
        }
        word.clear();
    }

    /// The longest pieces, one after another. `false`: the vocabulary does not have them.
    fn cut(&self, word: &str, ids: &mut Vec<u32>) -> bool {
        let mut start = 0;
        let mut piece = String::new();
        while start < word.len() {
            let ends = word[start..].char_indices().map(|(at, c)| start + at + c.len_utf8());
            let found = ends.rev().find_map(|end| {
                piece.clear();
                if start > 0 {
                    piece.push_str(&self.prefix);
                }
                piece.push_str(&word[start..end]);
                self.ids.get(piece.as_str()).map(|id| (*id, end))
            });
            let Some((id, end)) = found else { return false };
            ids.push(id);
            start = end;
        }
        true
    }
}

fn wrong(problem: String) -> LoadError {
    LoadError::Tokenizer(format!("tokenizer.json: {problem}"))
}

fn class(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a good pattern")
}

fn is(class: &Regex, c: char) -> bool {
    class.is_match(c.encode_utf8(&mut [0; 4]))
}

/// As the original BERT says which characters stand alone.
fn is_chinese(c: char) -> bool {
    matches!(
        u32::from(c),
        0x3400..=0x4DBF
            | 0x4E00..=0x9FFF
            | 0xF900..=0xFAFF
            | 0x20000..=0x2A6DF
            | 0x2A700..=0x2B73F
            | 0x2B740..=0x2B81F
            | 0x2B920..=0x2CEAF
            | 0x2F800..=0x2FA1F
    )
}
