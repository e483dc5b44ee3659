//! Tokenizers from Hugging Face directories: `tokenizer.json` and the small files beside it.
//!
//! What is read: the model (BPE over bytes or characters), the added tokens, normaliser, pre-tokenizer and
//! post-processor of `tokenizer.json`; from `tokenizer_config.json`, `special_tokens_map.json`, `config.json` and
//! `generation_config.json` which tokens begin and end texts. Not read: decoders (how tokens are written follows
//! from how texts are split), truncation, padding, and models other than BPE, which are refused by name.
//!
//! Invariant: whatever the files hold, the result is a tokenizer or an error that names the file and the key;
//! memory is a small multiple of the files' sizes.

mod files;
mod json;
mod steps;
mod tokens;

use std::collections::HashMap;
use std::path::Path;

use super::bpe::Merges;
use super::bytes::Alphabet;
use super::model::{CharIds, Model, Symbols, Unknown};
use super::special::Found;
use super::vocabulary::{self, TokenKind, Vocabulary};
use super::{Parts, Tokenizer, scored};
use crate::error::LoadError;
use files::Files;
use json::Node;
use steps::{Bytes, Cutting};
use tokens::Tokens;

impl Tokenizer {
    /// Reads the tokenizer of a Hugging Face directory: `tokenizer.json`, or GPT-2's `vocab.json` and `merges.txt`.
    ///
    /// # Errors
    /// [`LoadError::Io`] when a file cannot be read; [`LoadError::Tokenizer`], naming the file and the key, when
    /// one is missing, broken or holds what is not supported.
    pub fn from_hf(directory: &Path) -> Result<Self, LoadError> {
        let files = Files::read(directory)?;
        match &files.tokenizer {
            Some(_) => from_tokenizer_json(&files),
            None => from_vocab_and_merges(directory, &files),
        }
    }
}

fn from_tokenizer_json(files: &Files) -> Result<Tokenizer, LoadError> {
    let root =
        Node::root("tokenizer.json", files.tokenizer.as_ref().expect("the caller checked; this is a bug"));
    let model = root.need("model")?;
    expect_bpe(&model)?;
    let mut tokens = Tokens::read(&root, &model, files)?;
    let cutting = Cutting::read(root.get("normalizer"), root.get("pre_tokenizer"))?;
    let ends = tokens.ends(files)?;
    tokens.protect(&ends);
    let (before, after) = tokens.around(root.get("post_processor"), files)?;

    let byte_fallback = model.flag("byte_fallback")?;
    if byte_fallback {
        tokens.mark_bytes();
    }
    let unknown = model.find_string("unk_token")?.map(|text| {
        let id = tokens.id_of(text);
        id.ok_or_else(|| model.fail("unk_token", "names a token that the vocabulary does not have"))
    });
    let unknown = Unknown { id: unknown.transpose()?, fuse: model.flag("fuse_unk")? };
    if let Some(id) = unknown.id {
        tokens.mark_unknown(id);
    }

    let id_of = vocabulary::ids_by_text(&tokens.texts);
    let merges = read_merges(&model, &id_of, &tokens.kinds)?;
    let symbols = match cutting.bytes {
        Bytes::Last => Symbols::Bytes(vocabulary::alphabet_ids(&id_of, &tokens.kinds)),
        Bytes::Spelled => {
            Symbols::SpelledBytes(vocabulary::alphabet_ids(&id_of, &tokens.kinds), Box::new(Alphabet::new()))
        }
        Bytes::No => Symbols::Chars(CharIds {
            ids: scored::single_chars(&id_of, &tokens.kinds),
            borrowed_from: tokens.texts.len() as u32,
            borrowed: Vec::new(),
            bytes: if byte_fallback { scored::byte_tokens(&id_of) } else { Box::new([None; 256]) },
        }),
    };
    Tokenizer::assemble(Parts {
        found: tokens.found,
        tokens: tokens.texts,
        kinds: tokens.kinds,
        model: Model { merges, symbols, whole: HashMap::new(), unknown },
        spelling: cutting.spelling(),
        normalize: cutting.normalize,
        split: cutting.split,
        whole: model.flag("ignore_merges")?,
        bos: tokens.bos,
        eos: tokens.eos,
        ends,
        before,
        after,
    })
}

fn expect_bpe(model: &Node<'_>) -> Result<(), LoadError> {
    // Old files leave the type out; only BPE has merges.
    let kind = match model.find_string("type")? {
        None if model.get("merges").is_some() => "BPE",
        None => return Err(model.fail("type", "is missing")),
        Some(kind) => kind,
    };
    if kind != "BPE" {
        return Err(model.fail(
            "type",
            &format!("is `{kind}`, which is not supported; supported: BPE, over bytes or characters"),
        ));
    }
    for affix in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if model.find_string(affix)?.is_some_and(|affix| !affix.is_empty()) {
            return Err(model.fail(affix, "is not supported"));
        }
    }
    Ok(())
}

/// `["a b"]` or `[["a", "b"]]`, the most important first.
fn read_merges(
    model: &Node<'_>,
    id_of: &HashMap<&str, u32>,
    kinds: &[TokenKind],
) -> Result<Merges, LoadError> {
    let lines = model.need("merges")?;
    let mut merges = Merges::with_capacity(lines.items()?.len());
    for (rank, line) in lines.each()?.enumerate() {
        let pair = match (line.value.as_str(), line.value.as_array().map(Vec::as_slice)) {
            (Some(line), _) => line.split_once(' ').filter(|(_, right)| !right.contains(' ')),
            (_, Some([left, right])) => left.as_str().zip(right.as_str()),
            _ => None,
        };
        let pair = pair.ok_or_else(|| line.wrong("two tokens"))?;
        vocabulary::add_merge(&mut merges, pair, rank, id_of, kinds).map_err(|why| line.error(why))?;
    }
    Ok(merges)
}

/// GPT-2's two files, as its first tokenizer wrote them.
fn from_vocab_and_merges(directory: &Path, files: &Files) -> Result<Tokenizer, LoadError> {
    let fail = |why: String| Err(LoadError::Tokenizer(why));
    let vocab = files::read_json(directory, "vocab.json")?;
    let merges = files::read_text(directory, "merges.txt")?;
    let (Some(vocab), Some(merges)) = (vocab, merges) else {
        if directory.join("tokenizer.model").exists() {
            return fail(
                "there is only a tokenizer.model, and tokenizer.json is needed: \
                 transformers.AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY) writes it"
                    .into(),
            );
        }
        return fail("there is no tokenizer.json; download it".into());
    };
    let mut tokens = Tokens::default();
    tokens.read_vocab(&Node::root("vocab.json", &vocab))?;
    tokens.add_from_config(files)?;
    tokens.find_ends_of_texts(files)?;
    let ends = tokens.ends(files)?;
    tokens.protect(&ends);
    let qwen = files.config_string("tokenizer_class").is_some_and(|class| class.starts_with("Qwen2"));
    let is_merge = |line: &&str| !line.starts_with("#version") && !line.is_empty();
    let (before, _) = tokens.around(None, files)?;
    Tokenizer::new(&Vocabulary {
        kinds: tokens.kinds,
        tokens: tokens.texts,
        merges: merges.lines().filter(is_merge).map(str::to_owned).collect(),
        pre: if qwen { "qwen2" } else { "gpt-2" }.to_owned(),
        bos: tokens.bos,
        eos: tokens.eos,
        ends,
        add_bos: Some(!before.is_empty()),
        ..Vocabulary::default()
    })
}

impl Found {
    /// An entry of `added_tokens` or `added_tokens_decoder`.
    fn read(entry: &Node<'_>, id: u32, is_special: bool) -> Result<Self, LoadError> {
        Ok(Self {
            strip_left: entry.flag("lstrip")?,
            strip_right: entry.flag("rstrip")?,
            single_word: entry.flag("single_word")?,
            // A control token must be found before anything is rewritten: see `guard`.
            normalized: entry.flag("normalized")? && !is_special,
            ..Self::new(id, entry.need("content")?.string()?.to_owned())
        })
    }
}
