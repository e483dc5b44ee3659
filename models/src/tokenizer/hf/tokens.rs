//! The tokens of a directory's files: the vocabulary, the tokens added to it, and which of them begin and end texts.

use std::collections::HashMap;

use super::files::Files;
use super::json::Node;
use crate::error::LoadError;
use crate::tokenizer::special::Found;
use crate::tokenizer::vocabulary::{TokenKind, byte_of};

/// Ids are below this; real vocabularies have up to a few hundred thousand tokens.
pub(super) const IDS_END: u32 = 1 << 24;

/// Ids may have holes, but so many that a small file takes much memory.
fn ids_end_for(count: usize) -> usize {
    count * 4 + (1 << 16)
}

#[derive(Debug, Default)]
pub(super) struct Tokens {
    pub(super) texts: Vec<String>,
    pub(super) kinds: Vec<TokenKind>,
    /// The added tokens.
    pub(super) found: Vec<Found>,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    ids: HashMap<String, u32>,
    found_at: HashMap<u32, usize>,
    /// Rows of the model's embedding, where config.json says how many.
    rows: Option<u64>,
}

impl Tokens {
    pub(super) fn read(root: &Node<'_>, model: &Node<'_>, files: &Files) -> Result<Self, LoadError> {
        let mut tokens = Self { rows: files.embedding_rows(), ..Self::default() };
        tokens.read_vocab(&model.need("vocab")?)?;
        if let Some(added) = root.get("added_tokens") {
            for entry in added.each()? {
                tokens.add(&entry, entry.need("id")?.id()?)?;
            }
        }
        tokens.add_from_config(files)?;
        tokens.find_ends_of_texts(files)?;
        Ok(tokens)
    }

    /// `{"text": id}`
    pub(super) fn read_vocab(&mut self, vocab: &Node<'_>) -> Result<(), LoadError> {
        for (text, id) in vocab.fields()? {
            self.place(text, id.id()?, TokenKind::Normal, &id)?;
        }
        Ok(())
    }

    /// Puts a token at a free id.
    fn place(&mut self, text: &str, id: u32, kind: TokenKind, node: &Node<'_>) -> Result<(), LoadError> {
        let at = id as usize;
        if at >= self.texts.len() {
            if at >= ids_end_for(self.ids.len().max(node.among)) {
                let why = format!("is the id {id}, far above the number of tokens");
                return Err(node.error(&why));
            }
            self.texts.resize(at + 1, String::new());
            self.kinds.resize(at + 1, TokenKind::Unused);
        } else if !self.texts[at].is_empty() {
            return Err(node.error(&format!("has the id {id}, which `{}` has already", self.texts[at])));
        }
        text.clone_into(&mut self.texts[at]);
        self.kinds[at] = kind;
        self.ids.insert(text.to_owned(), id);
        Ok(())
    }

    /// Adds an entry of `added_tokens`. A text that the vocabulary has keeps its id there.
    fn add(&mut self, entry: &Node<'_>, id: u32) -> Result<(), LoadError> {
        let content = entry.need("content")?.string()?;
        // DeepSeek's distilled models call the markers of turns ordinary; a message must not be able to write them.
        let is_marker = content.starts_with("<｜") && content.ends_with("｜>");
        let is_special = entry.flag("special")? || is_marker;
        let kind = if is_special { TokenKind::Control } else { TokenKind::UserDefined };
        let id = match self.id_of(content) {
            Some(known) => known,
            // Gemma's text models have the marker of images, and some fine-tunes a padding token, without a row.
            None if self.has_no_row(id) => {
                tracing::info!("the token {content:?} ({id}) has no row in the embedding and is left out");
                return Ok(());
            }
            None => {
                self.place(content, id, kind, entry)?;
                id
            }
        };
        match self.found_at.get(&id) {
            // What one file calls special is special.
            Some(_) if is_special => self.make_control(id),
            Some(_) => {}
            None => {
                self.kinds[id as usize] = kind;
                self.found_at.insert(id, self.found.len());
                self.found.push(Found::read(entry, id, is_special)?);
            }
        }
        Ok(())
    }

    /// Tokens that only `tokenizer_config.json` or `added_tokens.json` has.
    pub(super) fn add_from_config(&mut self, files: &Files) -> Result<(), LoadError> {
        if let Some(decoder) = files.tokenizer_config().get("added_tokens_decoder") {
            for (name, entry) in decoder.fields()? {
                let id = name.parse().ok().filter(|&id| id < IDS_END);
                let id = id.ok_or_else(|| entry.error("is not under a token id"))?;
                self.add(&entry, id)?;
            }
        }
        let added = Node::root("added_tokens.json", &files.added_tokens);
        if !files.added_tokens.is_null() {
            for (text, node) in added.fields()? {
                let id = node.id()?;
                if self.id_of(text).is_none() && !self.has_no_row(id) {
                    self.place(text, id, TokenKind::Control, &node)?;
                    self.found_at.insert(id, self.found.len());
                    self.found.push(Found::new(id, text.to_owned()));
                }
            }
        }
        Ok(())
    }

    fn has_no_row(&self, id: u32) -> bool {
        self.rows.is_some_and(|rows| u64::from(id) >= rows)
    }

    pub(super) fn id_of(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }

    fn make_control(&mut self, id: u32) {
        self.kinds[id as usize] = TokenKind::Control;
        match self.found_at.get(&id) {
            Some(&at) => self.found[at].normalized = false,
            None => {
                self.found_at.insert(id, self.found.len());
                self.found.push(Found::new(id, self.texts[id as usize].clone()));
            }
        }
    }

    /// `<0xXX>` are bytes.
    pub(super) fn mark_bytes(&mut self) {
        for (text, kind) in self.texts.iter().zip(&mut self.kinds) {
            if *kind == TokenKind::Normal && byte_of(text).is_some() {
                *kind = TokenKind::Byte;
            }
        }
    }

    pub(super) fn mark_unknown(&mut self, id: u32) {
        let kind = &mut self.kinds[id as usize];
        if *kind == TokenKind::Normal {
            *kind = TokenKind::Unknown;
        }
    }

    // ---- beginnings and ends ----

    /// Sets `bos` and `eos`.
    pub(super) fn find_ends_of_texts(&mut self, files: &Files) -> Result<(), LoadError> {
        self.bos = self.named(files, "bos_token")?;
        self.eos = self.named(files, "eos_token")?;
        for id in [self.bos, self.eos].into_iter().flatten() {
            self.make_control(id);
        }
        let size = self.texts.len();
        let from_configs = |key: &'static str| {
            files.model_configs().into_iter().find_map(|config| ids_at(&config, key).transpose())
        };
        let first = |ids: Option<Result<Vec<u32>, LoadError>>| {
            Ok::<_, LoadError>(
                ids.transpose()?.and_then(|ids| ids.into_iter().find(|&id| (id as usize) < size)),
            )
        };
        if self.bos.is_none() && !files.names("bos_token") {
            self.bos = first(from_configs("bos_token_id"))?;
        }
        if self.eos.is_none() && !files.names("eos_token") {
            self.eos = first(from_configs("eos_token_id"))?;
        }
        Ok(())
    }

    /// The token that the tokenizer's own files name: as a string, or as an added token.
    fn named(&self, files: &Files, name: &'static str) -> Result<Option<u32>, LoadError> {
        for node in files.tokenizer_files() {
            let Some(named) = node.get(name) else { continue };
            let text = if named.value.is_object() { named.need("content")? } else { named.clone() };
            let id = self.id_of(text.string()?);
            if id.is_none() {
                tracing::warn!("{}", named.error("names a token that the vocabulary does not have"));
            }
            return Ok(id);
        }
        Ok(None)
    }

    /// All tokens that end an answer.
    pub(super) fn ends(&self, files: &Files) -> Result<Vec<u32>, LoadError> {
        let mut ends: Vec<u32> = self.eos.into_iter().collect();
        let generation = Node::root("generation_config.json", &files.generation_config);
        ends.extend(ids_at(&generation, "eos_token_id")?.into_iter().flatten());
        ends.retain(|&id| (id as usize) < self.texts.len());
        Ok(ends)
    }

    /// Added tokens that end answers are control tokens, whatever the files call them: no message may hold them.
    pub(super) fn protect(&mut self, ends: &[u32]) {
        for &id in ends {
            if self.kinds[id as usize] == TokenKind::UserDefined {
                self.make_control(id);
            }
        }
    }

    /// The tokens that go before and after a text.
    pub(super) fn around(
        &self,
        post_processor: Option<Node<'_>>,
        files: &Files,
    ) -> Result<(Vec<u32>, Vec<u32>), LoadError> {
        let (mut before, mut after) = (Vec::new(), Vec::new());
        if let Some(processor) = post_processor {
            self.read_processor(&processor, &mut before, &mut after)?;
        }
        let set = |list: &mut Vec<u32>, id: Option<u32>, wanted: Option<bool>| match (id, wanted) {
            (Some(id), Some(true)) if !list.contains(&id) => list.push(id),
            (Some(id), Some(false)) => list.retain(|&other| other != id),
            _ => {}
        };
        let config = files.tokenizer_config();
        set(&mut before, self.bos, config.find_bool("add_bos_token")?);
        set(&mut after, self.eos, config.find_bool("add_eos_token")?);
        Ok((before, after))
    }

    fn read_processor(
        &self,
        processor: &Node<'_>,
        before: &mut Vec<u32>,
        after: &mut Vec<u32>,
    ) -> Result<(), LoadError> {
        match processor.need("type")?.string()? {
            "ByteLevel" => {}
            "Sequence" => {
                for inner in processor.need("processors")?.each()? {
                    self.read_processor(&inner, before, after)?;
                }
            }
            "TemplateProcessing" => {
                let special = processor.get("special_tokens");
                let mut list = &mut *before;
                for piece in processor.need("single")?.each()? {
                    if piece.get("Sequence").is_some() {
                        list = &mut *after;
                        continue;
                    }
                    let name = piece.need("SpecialToken")?.need("id")?;
                    let ids = special.as_ref().and_then(|special| special.get(name.string().ok()?));
                    let ids = ids.ok_or_else(|| name.wrong("one of `special_tokens`"))?.need("ids")?;
                    for id in ids.each()? {
                        list.push(self.known(&id)?);
                    }
                }
            }
            "RobertaProcessing" | "BertProcessing" => {
                for (name, list) in [("cls", before), ("sep", after)] {
                    // [text, id]
                    let pair = processor.need(name)?;
                    let id = pair.each()?.nth(1).ok_or_else(|| pair.wrong("a text and an id"))?;
                    list.push(self.known(&id)?);
                }
            }
            other => {
                return Err(processor.fail("type", &format!("is `{other}`, which is not supported")));
            }
        }
        Ok(())
    }

    fn known(&self, node: &Node<'_>) -> Result<u32, LoadError> {
        let id = node.id()?;
        let known = self.texts.get(id as usize).is_some_and(|text| !text.is_empty());
        known.then_some(id).ok_or_else(|| node.error("is an id without a token"))
    }
}

/// A field with an id or a list of them.
fn ids_at(node: &Node<'_>, key: &'static str) -> Result<Option<Vec<u32>>, LoadError> {
    let Some(field) = node.get(key) else { return Ok(None) };
    // Some configs say -1 for none.
    if field.value.as_i64().is_some_and(|id| id < 0) {
        return Ok(None);
    }
    if field.value.is_array() {
        return field.each()?.map(|id| id.id()).collect::<Result<_, _>>().map(Some);
    }
    Ok(Some(vec![field.id()?]))
}
