//! Tokenizers from GGUF files (`tokenizer.ggml.*`): reads the keys into a [`Vocabulary`], and a vocabulary into a
//! [`Tokenizer`]. Invariant: the ids equal llama.cpp's for the same file, but for texts that spell control tokens.

use std::collections::HashMap;

use super::model::{CharIds, Model, Symbols, Unknown};
use super::special::Found;
use super::steps::{Prepend, PrependTo, Step, Unless};
use super::vocabulary::{self, Spelling, TokenKind, Vocabulary, VocabularyModel};
use super::{Parts, Tokenizer, families, scored};
use crate::error::LoadError;
use crate::gguf::GgufFile;

impl Tokenizer {
    /// Reads `tokenizer.ggml.*`.
    ///
    /// # Errors
    /// When a key is missing or of another type, the kind or the pre-tokenizer is not supported, or the parts do
    /// not fit together (see [`Tokenizer::new`]).
    pub fn from_gguf(file: &GgufFile) -> Result<Self, LoadError> {
        let model = match file.string("tokenizer.ggml.model")? {
            "gpt2" => VocabularyModel::Bytes,
            "llama" => VocabularyModel::Scores,
            "gemma4" => VocabularyModel::Chars,
            other => {
                return Err(LoadError::Tokenizer(format!(
                    "its kind `{other}` is not supported; supported: gpt2 (byte-level BPE), llama (SentencePiece \
                     BPE), gemma4"
                )));
            }
        };
        let by_score = model == VocabularyModel::Scores;
        let owned = |texts: Vec<&str>| texts.into_iter().map(str::to_owned).collect::<Vec<_>>();
        let kinds = file.find_i32s("tokenizer.ggml.token_type")?.unwrap_or_default();
        let id = |name: &str| file.find_u32(&format!("tokenizer.ggml.{name}_token_id"));
        // SentencePiece's own ids, where a file does not name them.
        let usual = |id: u32| by_score.then_some(id);
        let name = file.find_string("general.name")?.unwrap_or_default().to_lowercase();
        Self::new(&Vocabulary {
            model,
            tokens: owned(file.strings("tokenizer.ggml.tokens")?),
            kinds: kinds.into_iter().map(kind_of).collect::<Result<_, _>>()?,
            merges: if by_score { Vec::new() } else { owned(file.strings("tokenizer.ggml.merges")?) },
            scores: file.find_f32s("tokenizer.ggml.scores")?.filter(|_| by_score).unwrap_or_default(),
            pre: file.find_string("tokenizer.ggml.pre")?.unwrap_or("default").to_owned(),
            bos: id("bos")?.or(usual(1)),
            eos: id("eos")?.or(usual(2)),
            unknown: id("unknown")?.or(usual(0)),
            ends: [id("eot")?, id("eom")?].into_iter().flatten().collect(),
            add_bos: file.find_bool("tokenizer.ggml.add_bos_token")?,
            add_eos: file.find_bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
            add_space_prefix: file.find_bool("tokenizer.ggml.add_space_prefix")?,
            // The files do not say it; Phi-3's own tokenizer does.
            strip_right_of_control: name.contains("phi-3") || name.contains("phi3"),
        })
    }

    /// Builds the tables.
    ///
    /// # Errors
    /// [`LoadError::Tokenizer`] when the vocabulary is empty or too large, a list has another length, an id is out
    /// of range, or a merge names a token that is not there.
    pub fn new(vocabulary: &Vocabulary) -> Result<Self, LoadError> {
        let size = vocabulary.tokens.len();
        if vocabulary.kinds.len() != size && !vocabulary.kinds.is_empty() {
            return Err(LoadError::Tokenizer(format!(
                "it has {size} tokens but {} token types",
                vocabulary.kinds.len()
            )));
        }
        let kinds = match &vocabulary.kinds[..] {
            [] => vec![TokenKind::Normal; size],
            kinds => kinds.to_vec(),
        };
        let id_of = vocabulary::ids_by_text(&vocabulary.tokens);
        let unknown = Unknown { id: vocabulary.unknown.filter(|&id| (id as usize) < size), fuse: false };
        let split;
        let model;
        let mut normalize = Vec::new();
        let add_bos;
        match vocabulary.model {
            VocabularyModel::Bytes => {
                let family = families::by_name(&vocabulary.pre).map_err(LoadError::Tokenizer)?;
                split = family.steps;
                if vocabulary.add_space_prefix == Some(true) {
                    let (text, unless) = (" ".to_owned(), Unless::Space);
                    normalize.push(Step::Prepend(Prepend { text, unless, to: PrependTo::FirstText }));
                }
                add_bos = family.add_bos;
                model = Model {
                    merges: vocabulary::read_merges(&vocabulary.merges, &id_of, &kinds)?,
                    symbols: Symbols::Bytes(vocabulary::alphabet_ids(&id_of, &kinds)),
                    whole: HashMap::new(),
                    // A byte without a token is left out, as llama.cpp does.
                    unknown: Unknown::default(),
                };
                if family.ignore_merges {
                    return Self::assemble(Parts {
                        whole: true,
                        ..parts(vocabulary, kinds, (normalize, split, model), add_bos)
                    });
                }
            }
            VocabularyModel::Scores => {
                split = Vec::new();
                if vocabulary.add_space_prefix != Some(false) {
                    let (text, unless) = (" ".to_owned(), Unless::Never);
                    normalize.push(Step::Prepend(Prepend { text, unless, to: PrependTo::Every }));
                }
                normalize.push(Step::replace(" ", SPACE).map_err(LoadError::Tokenizer)?);
                add_bos = true;
                let found = scored::merges_by_score(&vocabulary.tokens, &kinds, &vocabulary.scores, &id_of);
                let (merges, chars) = found.map_err(LoadError::Tokenizer)?;
                model = Model { merges, symbols: Symbols::Chars(chars), whole: HashMap::new(), unknown };
            }
            VocabularyModel::Chars => {
                normalize.push(Step::replace(" ", SPACE).map_err(LoadError::Tokenizer)?);
                // Runs of newlines are found whole and merge with nothing else.
                split = vec![Step::isolate(r"[^\n]+|\n+").map_err(LoadError::Tokenizer)?];
                let newlines = |id: &u32| {
                    let token = vocabulary.tokens[*id as usize].as_bytes();
                    !token.is_empty() && token.iter().all(|&byte| byte == b'\n')
                };
                let whole = id_of.values().copied().filter(newlines);
                add_bos = true;
                model = Model {
                    merges: vocabulary::read_merges(&vocabulary.merges, &id_of, &kinds)?,
                    symbols: Symbols::Chars(CharIds {
                        ids: scored::single_chars(&id_of, &kinds),
                        borrowed_from: size as u32,
                        borrowed: Vec::new(),
                        bytes: scored::byte_tokens(&id_of),
                    }),
                    whole: whole.map(|id| (vocabulary.tokens[id as usize].as_bytes().into(), id)).collect(),
                    unknown,
                };
            }
        }
        Self::assemble(parts(vocabulary, kinds, (normalize, split, model), add_bos))
    }
}

/// SentencePiece's mark for a space.
const SPACE: &str = "▁";

fn parts(
    vocabulary: &Vocabulary,
    kinds: Vec<TokenKind>,
    (normalize, split, model): (Vec<Step>, Vec<Step>, Model),
    add_bos: bool,
) -> Parts {
    let by_bytes = vocabulary.model == VocabularyModel::Bytes;
    let add_bos = vocabulary.add_bos.unwrap_or(add_bos);
    let strips =
        |text: &str| vocabulary.strip_right_of_control && !["<unk>", "<s>", "<|endoftext|>"].contains(&text);
    let found = special_ids(&kinds).map(|id| {
        let mut found = Found::new(id, vocabulary.tokens[id as usize].clone());
        found.strip_right = strips(&found.text);
        found
    });
    Parts {
        found: found.collect(),
        tokens: vocabulary.tokens.clone(),
        kinds,
        normalize,
        split,
        model,
        whole: false,
        spelling: if by_bytes { Spelling::Bytes } else { Spelling::Spaces('▁') },
        bos: vocabulary.bos,
        eos: vocabulary.eos,
        ends: vocabulary.ends.clone(),
        before: vocabulary.bos.filter(|_| add_bos).into_iter().collect(),
        after: vocabulary.eos.filter(|_| vocabulary.add_eos).into_iter().collect(),
    }
}

/// Tokens that are found whole in texts.
fn special_ids(kinds: &[TokenKind]) -> impl Iterator<Item = u32> {
    let whole =
        |kind: &TokenKind| matches!(kind, TokenKind::Control | TokenKind::Unknown | TokenKind::UserDefined);
    (0u32..).zip(kinds).filter(move |(_, kind)| whole(kind)).map(|(id, _)| id)
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
