//! JSON with the way to each value, for errors that name the key.

use serde_json::{Map, Value};

use crate::error::LoadError;

/// A value of a file.
#[derive(Debug, Clone)]
pub(super) struct Node<'j> {
    pub(super) value: &'j Value,
    /// The number of fields or items of what the value is in.
    pub(super) among: usize,
    /// The file, and the keys down to the value.
    path: Path<'j>,
}

#[derive(Debug, Clone)]
struct Path<'j> {
    file: &'j str,
    keys: Vec<Key<'j>>,
}

#[derive(Debug, Clone, Copy)]
enum Key<'j> {
    Name(&'j str),
    Index(usize),
}

impl<'j> Node<'j> {
    pub(super) fn root(file: &'j str, value: &'j Value) -> Self {
        Self { value, among: 1, path: Path { file, keys: Vec::new() } }
    }

    fn child(&self, key: Key<'j>, value: &'j Value) -> Self {
        let mut path = self.path.clone();
        path.keys.push(key);
        let among = self.value.as_array().map(Vec::len).or(self.value.as_object().map(Map::len));
        Self { value, among: among.unwrap_or(1), path }
    }

    /// The field `name`, unless it is missing or null.
    pub(super) fn get(&self, name: &'j str) -> Option<Self> {
        let value = self.value.get(name).filter(|value| !value.is_null())?;
        Some(self.child(Key::Name(name), value))
    }

    pub(super) fn need(&self, name: &'j str) -> Result<Self, LoadError> {
        self.get(name).ok_or_else(|| self.fail(name, "is missing"))
    }

    pub(super) fn string(&self) -> Result<&'j str, LoadError> {
        self.value.as_str().ok_or_else(|| self.wrong("a string"))
    }

    pub(super) fn find_string(&self, name: &'j str) -> Result<Option<&'j str>, LoadError> {
        self.get(name).map(|node| node.string()).transpose()
    }

    /// A bool, false if missing.
    pub(super) fn flag(&self, name: &'j str) -> Result<bool, LoadError> {
        Ok(self.find_bool(name)?.unwrap_or(false))
    }

    pub(super) fn find_bool(&self, name: &'j str) -> Result<Option<bool>, LoadError> {
        let yes = |node: Self| node.value.as_bool().ok_or_else(|| node.wrong("true or false"));
        self.get(name).map(yes).transpose()
    }

    pub(super) fn items(&self) -> Result<&'j [Value], LoadError> {
        self.value.as_array().map(Vec::as_slice).ok_or_else(|| self.wrong("a list"))
    }

    /// The list's items.
    pub(super) fn each(&self) -> Result<impl Iterator<Item = Self>, LoadError> {
        let node = self.clone();
        let items = self.items()?.iter().enumerate();
        Ok(items.map(move |(at, item)| node.child(Key::Index(at), item)))
    }

    pub(super) fn object(&self) -> Result<&'j Map<String, Value>, LoadError> {
        self.value.as_object().ok_or_else(|| self.wrong("an object"))
    }

    /// The object's fields.
    pub(super) fn fields(&self) -> Result<impl Iterator<Item = (&'j str, Self)>, LoadError> {
        let node = self.clone();
        let fields = self.object()?.iter();
        Ok(fields.map(move |(name, value)| (name.as_str(), node.child(Key::Name(name), value))))
    }

    /// A token id.
    pub(super) fn id(&self) -> Result<u32, LoadError> {
        let id = self.value.as_u64().filter(|&id| id < u64::from(super::tokens::IDS_END));
        id.map(|id| id as u32)
            .ok_or_else(|| self.wrong(&format!("a token id below {}", super::tokens::IDS_END)))
    }

    // ---- errors ----

    /// About a field.
    pub(super) fn fail(&self, name: &'j str, why: &str) -> LoadError {
        self.child(Key::Name(name), self.value).error(why)
    }

    /// About this value.
    pub(super) fn error(&self, why: &str) -> LoadError {
        let Path { file, keys } = &self.path;
        let mut path = String::new();
        for key in keys {
            match key {
                Key::Name(name) if path.is_empty() => path.extend(name.chars().take(60)),
                Key::Name(name) => path.extend(std::iter::once('.').chain(name.chars().take(60))),
                Key::Index(at) => path.push_str(&format!("[{at}]")),
            }
        }
        LoadError::Tokenizer(format!("{file}: `{path}` {why}"))
    }

    pub(super) fn wrong(&self, expected: &str) -> LoadError {
        let shown: String = match self.value {
            Value::Array(_) => "a list".into(),
            Value::Object(_) => "an object".into(),
            other => other.to_string().chars().take(60).collect(),
        };
        self.error(&format!("should be {expected} but is {shown}"))
    }
}
