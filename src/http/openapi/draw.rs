//! Schemas of request bodies, drawn by the parsers themselves: whoever reads a body through [`Fields`] says by that
//! which fields there are, of which kind and within which bounds. While a drawing is made, each field that is asked for
//! is noted, whether the body has it or not; so the document cannot know other fields than the parser does.
//!
//! [`Fields`]: crate::http::fields::Fields

use std::cell::RefCell;
use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::http::fields::Invalid;

/// What a parser takes a field for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Kind {
    /// Looked at as a value: its schema is one of `notes`.
    Any,
    Text,
    Flag,
    Integer(i64, i64),
    Number(f64, f64),
    Object,
    Array,
    /// Known, and only with these values.
    Only(Vec<Value>),
}

/// Fields by their paths, each of an array's items as `[]`.
type Drawing = BTreeMap<String, Kind>;

thread_local! {
    static DRAWING: RefCell<Option<Drawing>> = const { RefCell::new(None) };
}

/// Notes a field, if a drawing is being made. What is noted first counts: a kind is asked for before the value.
pub(crate) fn note(path: impl FnOnce() -> String, kind: impl FnOnce() -> Kind) {
    DRAWING.with_borrow_mut(|drawing| {
        if let Some(drawing) = drawing {
            drawing.entry(without_numbers(&path())).or_insert_with(kind);
        }
    });
}

/// `messages[3].role` is `messages[].role`.
fn without_numbers(path: &str) -> String {
    let mut inside = false;
    let kept = path.chars().filter(|c| match c {
        '[' => {
            inside = true;
            true
        }
        ']' => {
            inside = false;
            true
        }
        _ => !inside,
    });
    kept.collect()
}

/// The schema of the bodies that `parse` takes: of the fields that it asks these samples for, all of which it must
/// take. What `notes` say of a path stands in place of what was drawn, or beside it where they have no `type`.
///
/// # Panics
/// When a sample is refused: then it is not one.
pub(super) fn schema(
    samples: &[Value],
    notes: &[(&str, Value)],
    parse: impl Fn(&[u8]) -> Result<(), Invalid>,
) -> Value {
    let bytes = |sample: &Value| sample.to_string().into_bytes();
    DRAWING.set(Some(Drawing::new()));
    let taken: Vec<_> = samples.iter().map(|sample| (sample, parse(&bytes(sample)))).collect();
    let drawing = DRAWING.take().expect("nobody else draws on this thread");
    for (sample, taken) in taken {
        assert!(taken.is_ok(), "{sample} is no sample: {taken:?}");
    }
    let without = |name: &String| {
        let mut sample = samples[0].clone();
        sample.as_object_mut().expect("a body is an object").remove(name);
        parse(&bytes(&sample))
    };
    let names = samples[0].as_object().into_iter().flat_map(Map::keys);
    let needed = names.filter(|name| without(name).is_err_and(|error| error.param.as_ref() == Some(name)));
    let mut node = Node { needed: needed.cloned().collect(), ..Node::default() };
    for (path, kind) in drawing {
        node.at(&path).kind = Some(kind);
    }
    for (path, note) in notes {
        if let Some(node) = node.find(path) {
            node.note = Some(note.clone());
        }
    }
    node.kind = Some(Kind::Object);
    node.schema(true)
}

/// A field, and those within it.
#[derive(Debug, Default)]
struct Node {
    kind: Option<Kind>,
    note: Option<Value>,
    fields: BTreeMap<String, Node>,
    items: Option<Box<Node>>,
    needed: Vec<String>,
}

impl Node {
    /// The node of a path, made where there is none.
    fn at(&mut self, path: &str) -> &mut Self {
        steps(path).fold(self, |node, step| match step {
            "[]" => node.items.get_or_insert_default(),
            name => node.fields.entry(name.to_owned()).or_default(),
        })
    }

    fn find(&mut self, path: &str) -> Option<&mut Self> {
        steps(path).try_fold(self, |node, step| match step {
            "[]" => node.items.as_deref_mut(),
            name => node.fields.get_mut(name),
        })
    }

    fn schema(&self, whole: bool) -> Value {
        let mut schema =
            if self.fields.is_empty() && self.items.is_none() { self.leaf() } else { self.branch(whole) };
        let Some(note) = self.note.as_ref().and_then(Value::as_object) else { return schema };
        if ["type", "anyOf", "$ref"].iter().any(|whole| note.contains_key(*whole)) {
            schema = json!({});
        }
        for (name, value) in note {
            schema[name] = value.clone();
        }
        schema
    }

    fn leaf(&self) -> Value {
        match self.kind.as_ref().unwrap_or(&Kind::Any) {
            Kind::Any => json!({}),
            Kind::Text => json!({"type": ["string", "null"]}),
            Kind::Flag => json!({"type": ["boolean", "null"]}),
            Kind::Integer(least, most) => {
                json!({"type": ["integer", "null"], "minimum": least, "maximum": most})
            }
            Kind::Number(least, most) => {
                json!({"type": ["number", "null"], "minimum": least, "maximum": most})
            }
            Kind::Object => json!({"type": ["object", "null"]}),
            Kind::Array => json!({"type": ["array", "null"]}),
            Kind::Only(values) => {
                let all: Vec<&Value> = values.iter().chain([&Value::Null]).collect();
                json!({"enum": all})
            }
        }
    }

    fn branch(&self, whole: bool) -> Value {
        if let Some(items) = &self.items {
            return json!({"type": if whole { json!("array") } else { json!(["array", "null"]) }, "items": items.schema(true)});
        }
        let fields: Map<String, Value> = self
            .fields
            .iter()
            .map(|(name, field)| {
                let needed = self.needed.contains(name);
                let schema = field.schema(needed);
                (name.clone(), if needed { there(schema) } else { schema })
            })
            .collect();
        let kind = if whole { json!("object") } else { json!(["object", "null"]) };
        let mut schema = json!({"type": kind, "properties": fields, "additionalProperties": false});
        if !self.needed.is_empty() {
            schema["required"] = json!(self.needed);
        }
        schema
    }
}

/// Of a field that must be there: null counts as absent.
fn there(mut schema: Value) -> Value {
    if let Some(kinds) = schema.get_mut("type").and_then(Value::as_array_mut) {
        kinds.retain(|kind| kind != "null");
    }
    schema
}

/// `a.b[].c` is `a`, `b`, `[]`, `c`.
fn steps(path: &str) -> impl Iterator<Item = &str> {
    path.split('.').flat_map(|part| {
        let (name, items) = part.split_once("[]").map_or((part, None), |(name, _)| (name, Some("[]")));
        [Some(name).filter(|name| !name.is_empty()), items].into_iter().flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::UnknownFields;
    use crate::http::fields::{Fields, required};

    fn parse(body: &[u8]) -> Result<(), Invalid> {
        let mut fields = Fields::parse(body)?;
        fields.string("name")?.ok_or_else(|| required("name"))?;
        fields.integer("n", 1..=16)?;
        fields.only("store", &[json!(false)], "nothing is kept")?;
        fields.take("stop").ok_or_else(|| required("stop"))?;
        for (at, part) in fields.array("parts")?.unwrap_or_default().into_iter().enumerate() {
            let mut part = Fields::of(&format!("parts[{at}]"), part)?;
            part.boolean("bold")?;
            part.finish(UnknownFields::Reject)?;
        }
        if let Some(mut options) = fields.object("options")? {
            options.number("weight", 0.0..=1.0)?;
        }
        fields.finish(UnknownFields::Reject)
    }

    #[test]
    fn what_a_parser_asks_for_is_drawn() {
        let samples = [json!({"name": "a", "stop": "b", "parts": [{}, {}], "options": {}})];
        let notes =
            [("stop", json!({"anyOf": [{"type": "string"}]})), ("n", json!({"description": "how many"}))];
        let want = json!({
            "type": "object", "additionalProperties": false, "required": ["name", "stop"],
            "properties": {
                "name": {"type": ["string"]},
                "n": {"type": ["integer", "null"], "minimum": 1, "maximum": 16, "description": "how many"},
                "store": {"enum": [false, null]},
                "stop": {"anyOf": [{"type": "string"}]},
                "parts": {"type": ["array", "null"], "items": {
                    "type": "object", "additionalProperties": false,
                    "properties": {"bold": {"type": ["boolean", "null"]}},
                }},
                "options": {"type": ["object", "null"], "additionalProperties": false,
                    "properties": {"weight": {"type": ["number", "null"], "minimum": 0.0, "maximum": 1.0}}},
            },
        });
        assert_eq!(schema(&samples, &notes, parse), want);
    }

    #[test]
    #[should_panic(expected = "is no sample")]
    fn a_sample_that_is_refused_is_found() {
        schema(&[json!({"name": "a", "stop": "b", "n": 17})], &[], parse);
    }
}
