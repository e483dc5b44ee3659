//! A typed walk over a JSON request body in which every error names the field it is about.
//!
//! Taking a field removes it, so what is left at the end was not understood: `finish` refuses it by
//! name. `null` counts as absent everywhere, as OpenAI's clients send it for "not set". Knows no
//! endpoint and no status code.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::openapi::draw::{Kind, note};
use crate::config::UnknownFields;

/// A request field that cannot be honoured: becomes a 400.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Invalid {
    /// Path of the field, as in `messages[0].content[1].type`; `None` for the body as a whole.
    pub(crate) param: Option<String>,
    pub(crate) message: String,
    /// For programs, where what is wrong has a name of its own.
    pub(crate) code: Option<&'static str>,
}

impl Invalid {
    pub(crate) fn new(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), message: message.into(), code: None }
    }

    pub(crate) fn body(message: impl Into<String>) -> Self {
        Self { param: None, message: message.into(), code: None }
    }

    pub(crate) fn coded(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }
}

/// One JSON object of the request, and where it stands in the body.
pub(crate) struct Fields {
    path: String,
    left: Map<String, Value>,
}

impl Fields {
    /// The body itself.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, Invalid> {
        if body.is_empty() {
            return Err(Invalid::body("the request has no body; send a JSON object"));
        }
        let value: Value = serde_json::from_slice(body)
            .map_err(|error| Invalid::body(format!("the body is not valid JSON: {error}")))?;
        match value {
            Value::Object(left) => Ok(Self { path: String::new(), left }),
            other => Err(Invalid::body(format!("the body must be a JSON object, got {}", kind(&other)))),
        }
    }

    /// An object found at `path`.
    pub(crate) fn of(path: &str, value: Value) -> Result<Self, Invalid> {
        match value {
            Value::Object(left) => Ok(Self { path: path.to_owned(), left }),
            other => Err(wrong_type(path, "an object", &other)),
        }
    }

    /// Full path of a field of this object.
    pub(crate) fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// Takes a field out, whatever its type; `None` when absent or null.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        note(|| self.path(name), || Kind::Any);
        self.left.remove(name).filter(|value| !value.is_null())
    }

    /// Whether a field is there as `null`: in a change of settings that takes the setting away.
    pub(crate) fn is_null(&self, name: &str) -> bool {
        self.left.get(name).is_some_and(Value::is_null)
    }

    /// A field that is there and not null, left where it is.
    pub(crate) fn peek(&self, name: &str) -> Option<&Value> {
        self.left.get(name).filter(|value| !value.is_null())
    }

    /// A string that must be there.
    pub(crate) fn needed(&mut self, name: &str) -> Result<String, Invalid> {
        let path = self.path(name);
        self.string(name)?.ok_or_else(|| required(&path))
    }

    pub(crate) fn string(&mut self, name: &str) -> Result<Option<String>, Invalid> {
        note(|| self.path(name), || Kind::Text);
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(&self.path(name), "a string", &other)),
        }
    }

    pub(crate) fn boolean(&mut self, name: &str) -> Result<Option<bool>, Invalid> {
        note(|| self.path(name), || Kind::Flag);
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(wrong_type(&self.path(name), "a boolean", &other)),
        }
    }

    /// A whole number within `range`; `4.0` counts as whole, since some clients send it.
    pub(crate) fn integer(&mut self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, Invalid> {
        note(|| self.path(name), || Kind::Integer(*range.start(), *range.end()));
        let Some(value) = self.take(name) else { return Ok(None) };
        let path = self.path(name);
        let number = whole_number(&value).ok_or_else(|| wrong_type(&path, "an integer", &value))?;
        if number < i128::from(*range.start()) || number > i128::from(*range.end()) {
            return Err(Invalid::new(
                &path,
                format!("`{path}` must be {}, got {number}", range_words(range.start(), range.end())),
            ));
        }
        Ok(Some(i64::try_from(number).expect("checked against an i64 range")))
    }

    /// A non-negative whole number that fits `u32` and is at least `least`.
    pub(crate) fn count(&mut self, name: &str, least: u32) -> Result<Option<u32>, Invalid> {
        let found = self.integer(name, i64::from(least)..=i64::from(u32::MAX))?;
        Ok(found.map(|number| u32::try_from(number).expect("checked against u32's range")))
    }

    /// A finite number within `range`.
    pub(crate) fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, Invalid> {
        note(|| self.path(name), || Kind::Number(*range.start(), *range.end()));
        let Some(value) = self.take(name) else { return Ok(None) };
        number_in(&self.path(name), &value, range).map(Some)
    }

    pub(crate) fn object(&mut self, name: &str) -> Result<Option<Self>, Invalid> {
        note(|| self.path(name), || Kind::Object);
        let Some(value) = self.take(name) else { return Ok(None) };
        Self::of(&self.path(name), value).map(Some)
    }

    pub(crate) fn array(&mut self, name: &str) -> Result<Option<Vec<Value>>, Invalid> {
        note(|| self.path(name), || Kind::Array);
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => Err(wrong_type(&self.path(name), "an array", &other)),
        }
    }

    /// What is left of the object, as a value.
    pub(crate) fn into_value(self) -> Value {
        Value::Object(self.left)
    }

    /// What is left of the object.
    pub(crate) fn into_map(self) -> Map<String, Value> {
        self.left
    }

    /// Takes the whole of the object: names and values, nulls left out.
    pub(crate) fn into_entries(self) -> impl Iterator<Item = (String, Value)> {
        let path = self.path;
        self.left
            .into_iter()
            .filter(|(_, value)| !value.is_null())
            .map(move |(name, value)| (if path.is_empty() { name } else { format!("{path}.{name}") }, value))
    }

    /// Leaves out fields that ask for nothing, whatever they say.
    pub(crate) fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.take(name);
        }
    }

    /// A field that we know but do not honour: only the values that change nothing are accepted.
    pub(crate) fn only(&mut self, name: &str, accepted: &[Value], instead: &str) -> Result<(), Invalid> {
        note(|| self.path(name), || Kind::Only(accepted.to_vec()));
        let Some(value) = self.take(name) else { return Ok(()) };
        if accepted.contains(&value) {
            return Ok(());
        }
        let path = self.path(name);
        Err(Invalid::new(&path, format!("`{path}` = {} is not supported: {instead}", shorten(&value))))
    }

    /// Refuses what nobody took, by name: a misspelt field is an error even when its value is null.
    pub(crate) fn finish(self, unknown: UnknownFields) -> Result<(), Invalid> {
        match (unknown, self.left.keys().next()) {
            (UnknownFields::Reject, Some(name)) => {
                let path = self.path(name);
                Err(Invalid::new(
                    &path,
                    format!("unknown field `{path}`: no field of that name is supported"),
                ))
            }
            _ => Ok(()),
        }
    }
}

pub(crate) fn required(path: &str) -> Invalid {
    Invalid::new(path, format!("`{path}` is required"))
}

/// A string at `path`.
pub(crate) fn string_at(path: &str, value: Value) -> Result<String, Invalid> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(wrong_type(path, "a string", &other)),
    }
}

/// A token id at `path`, below the vocabulary's size where one is given.
pub(crate) fn token_at(path: &str, value: &Value, vocab_size: usize) -> Result<u32, Invalid> {
    let number = whole_number(value).ok_or_else(|| wrong_type(path, "a token id (an integer)", value))?;
    u32::try_from(number).ok().filter(|id| (*id as usize) < vocab_size).ok_or_else(|| {
        Invalid::new(
            path,
            format!("`{path}`: {number} is not a token id of this model (0 to {})", vocab_size - 1),
        )
    })
}

/// A finite number at `path` within `range`.
pub(crate) fn number_in(path: &str, value: &Value, range: RangeInclusive<f64>) -> Result<f32, Invalid> {
    let number = value.as_f64().ok_or_else(|| wrong_type(path, "a number", value))?;
    if !range.contains(&number) {
        return Err(Invalid::new(
            path,
            format!("`{path}` must be {}, got {number}", range_words(range.start(), range.end())),
        ));
    }
    Ok(number as f32)
}

pub(crate) fn wrong_type(path: &str, wanted: &str, got: &Value) -> Invalid {
    Invalid::new(path, format!("`{path}` must be {wanted}, got {}", kind(got)))
}

fn whole_number(value: &Value) -> Option<i128> {
    let Value::Number(number) = value else { return None };
    if let Some(signed) = number.as_i64() {
        return Some(i128::from(signed));
    }
    if let Some(unsigned) = number.as_u64() {
        return Some(i128::from(unsigned));
    }
    let float = number.as_f64()?;
    // Every whole f64 below 2^63 converts exactly.
    (float.fract() == 0.0 && float.abs() < 9.2e18).then_some(float as i128)
}

fn range_words<T: std::fmt::Display>(least: &T, most: &T) -> String {
    format!("from {least} to {most}")
}

/// What a value is, in JSON's words.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(number) if number.is_f64() => "a number with a fraction",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// A value for an error message: long ones are cut, since an error must not echo a whole prompt.
fn shorten(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}..", &text[..end]),
        None => text,
    }
}
