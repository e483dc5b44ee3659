//! The files of a directory, read with a limit on their size.

use std::io::{ErrorKind, Read};
use std::path::Path;

use serde_json::Value;

use super::json::Node;
use crate::error::LoadError;
use crate::foreign;

/// The largest tokenizer.json seen has 35 MB.
const FILE_BYTES_MAX: u64 = 256 << 20;

/// What was there; the others are null.
#[derive(Debug, Default)]
pub(super) struct Files {
    pub(super) tokenizer: Option<Value>,
    pub(super) tokenizer_config: Value,
    pub(super) special_tokens_map: Value,
    pub(super) generation_config: Value,
    pub(super) config: Value,
    pub(super) added_tokens: Value,
}

impl Files {
    pub(super) fn read(directory: &Path) -> Result<Self, LoadError> {
        let read = |name: &str| Ok::<_, LoadError>(read_json(directory, name)?.unwrap_or_default());
        Ok(Self {
            tokenizer: read_json(directory, "tokenizer.json")?,
            tokenizer_config: read("tokenizer_config.json")?,
            special_tokens_map: read("special_tokens_map.json")?,
            generation_config: read("generation_config.json")?,
            config: read("config.json")?,
            added_tokens: read("added_tokens.json")?,
        })
    }

    pub(super) fn tokenizer_config(&self) -> Node<'_> {
        Node::root("tokenizer_config.json", &self.tokenizer_config)
    }

    /// The files about the tokenizer, the more important first.
    pub(super) fn tokenizer_files(&self) -> [Node<'_>; 2] {
        [self.tokenizer_config(), Node::root("special_tokens_map.json", &self.special_tokens_map)]
    }

    /// Whether a file about the tokenizer has the key, null included.
    pub(super) fn names(&self, key: &str) -> bool {
        self.tokenizer_files().iter().any(|file| file.value.get(key).is_some())
    }

    /// A string of `tokenizer_config.json`.
    pub(super) fn config_string(&self, name: &str) -> Option<&str> {
        self.tokenizer_config.get(name).and_then(Value::as_str)
    }

    /// Rows of the embedding, where `config.json` says how many.
    pub(super) fn embedding_rows(&self) -> Option<u64> {
        let rows = |config: &Value| config.get("vocab_size").and_then(Value::as_u64);
        rows(&self.config).or_else(|| rows(self.config.get("text_config")?))
    }

    /// `config.json` and `generation_config.json`; models with a part for text keep their ids there.
    pub(super) fn model_configs(&self) -> Vec<Node<'_>> {
        let config = Node::root("config.json", &self.config);
        let inner = config.get("text_config");
        [Some(Node::root("generation_config.json", &self.generation_config)), Some(config), inner]
            .into_iter()
            .flatten()
            .collect()
    }
}

/// The JSON file of that name, if it is there.
pub(super) fn read_json(directory: &Path, name: &str) -> Result<Option<Value>, LoadError> {
    let Some(text) = read_text(directory, name)? else { return Ok(None) };
    let value = serde_json::from_str(&text);
    value.map(Some).map_err(|error| {
        let problem = foreign::recognize(text.as_bytes())
            .map_or_else(|| format!("{error}; download it again"), String::from);
        LoadError::Tokenizer(format!("{name}: {problem}"))
    })
}

/// The text file of that name, if it is there.
pub(super) fn read_text(directory: &Path, name: &str) -> Result<Option<String>, LoadError> {
    let path = directory.join(name);
    let io = |source| LoadError::Io { path: path.clone(), source };
    let file = match std::fs::File::open(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        file => file.map_err(io)?,
    };
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(LoadError::Tokenizer(format!("{name}: it has more than {FILE_BYTES_MAX} bytes")));
    }
    let text = String::from_utf8(bytes);
    text.map(Some).map_err(|_| LoadError::Tokenizer(format!("{name}: it is not UTF-8")))
}
