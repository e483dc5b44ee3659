//! Structured output: OpenAI's `response_format`, and the names that other servers' clients use.

use serde_json::Value;

use crate::config::UnknownFields;
use crate::grammar::Form;
use crate::http::fields::{Fields, Invalid, string_at, wrong_type};

/// Most texts to choose from.
const CHOICES_MAX: usize = 4096;

type Named = (Form, &'static str);

/// Fields that are forms by themselves: the short names, and vLLM's older ones.
const FIELDS: &[(&str, Kind)] = &[
    ("regex", Kind::Regex),
    ("choice", Kind::Choice),
    ("grammar", Kind::Grammar),
    ("guided_json", Kind::Json),
    ("guided_regex", Kind::Regex),
    ("guided_choice", Kind::Choice),
    ("guided_grammar", Kind::Grammar),
];

/// Of vLLM's `structured_outputs`.
const STRUCTURED: &[(&str, Kind)] = &[
    ("json", Kind::Json),
    ("json_object", Kind::JsonObject),
    ("regex", Kind::Regex),
    ("choice", Kind::Choice),
    ("grammar", Kind::Grammar),
];

#[derive(Clone, Copy)]
enum Kind {
    Json,
    JsonObject,
    Regex,
    Choice,
    Grammar,
}

/// The form that the request asks for, and the field that says so.
pub(super) fn read(fields: &mut Fields, unknown: UnknownFields) -> Result<Option<Named>, Invalid> {
    let format = fields.object("response_format")?;
    let format = format.map_or(Ok(None), |format| response_format(format, unknown))?;
    read_beside(format.map(|form| (form, "response_format")), fields, unknown)
}

/// The form that an API's own field asks for, or that one of the names does which other servers' clients use.
pub(crate) fn read_beside(
    own: Option<Named>,
    fields: &mut Fields,
    unknown: UnknownFields,
) -> Result<Option<Named>, Invalid> {
    let mut found: Vec<Named> = own.into_iter().collect();
    if let Some(mut structured) = fields.object("structured_outputs")? {
        let before = found.len();
        for (name, kind) in STRUCTURED {
            found.extend(kind.read(&mut structured, name)?.map(|form| (form, "structured_outputs")));
        }
        structured.finish(unknown)?;
        if found.len() == before {
            let message = "`structured_outputs` needs one of json, json_object, regex, choice or grammar";
            return Err(Invalid::new("structured_outputs", message));
        }
    }
    for (name, kind) in FIELDS {
        found.extend(kind.read(fields, name)?.map(|form| (form, *name)));
    }
    match found.len() {
        0 | 1 => Ok(found.pop()),
        _ => {
            let (first, second) = (found[0].1, found[1].1);
            let message = if first == second {
                format!("`{first}` says more than one form; give one")
            } else {
                format!("`{first}` and `{second}` both say what the answer must look like; give one")
            };
            Err(Invalid::new(second, message))
        }
    }
}

fn response_format(mut format: Fields, unknown: UnknownFields) -> Result<Option<Form>, Invalid> {
    let path = format.path("type");
    let required = |path: String| {
        let message = format!("`{path}` is required");
        Invalid::new(path, message)
    };
    let form = match format.string("type")?.as_deref() {
        Some("text") => None,
        // llama.cpp's clients send a schema along.
        Some("json_object") => Some(schema_at(&mut format, "schema")?.unwrap_or(Form::JsonObject)),
        Some("json_schema") => {
            let described = format.object("json_schema")?;
            let mut described = described.ok_or_else(|| required(format.path("json_schema")))?;
            described.string("name")?;
            described.string("description")?;
            // The schema is always kept to.
            described.boolean("strict")?;
            let form = schema_at(&mut described, "schema")?;
            let form = form.ok_or_else(|| required(described.path("schema")))?;
            described.finish(unknown)?;
            Some(form)
        }
        Some(other) => {
            let message = format!("`{path}` = {other:?}: use text, json_object or json_schema");
            return Err(Invalid::new(path, message));
        }
        None => return Err(required(path)),
    };
    format.finish(unknown)?;
    Ok(form)
}

/// A schema, as an object or `true`.
pub(crate) fn schema_at(fields: &mut Fields, name: &str) -> Result<Option<Form>, Invalid> {
    match fields.take(name) {
        None => Ok(None),
        Some(schema @ (Value::Object(_) | Value::Bool(_))) => Ok(Some(Form::JsonSchema(schema))),
        Some(other) => Err(wrong_type(&fields.path(name), "a JSON schema (an object)", &other)),
    }
}

impl Kind {
    fn read(self, fields: &mut Fields, name: &str) -> Result<Option<Form>, Invalid> {
        let path = fields.path(name);
        Ok(match self {
            // Some clients send the schema as text.
            Self::Json => match fields.take(name) {
                Some(Value::String(text)) => {
                    let schema = serde_json::from_str(&text);
                    let schema = schema.map_err(|error| {
                        Invalid::new(&path, format!("`{path}` is not valid JSON: {error}"))
                    })?;
                    Some(Form::JsonSchema(schema))
                }
                Some(schema @ (Value::Object(_) | Value::Bool(_))) => Some(Form::JsonSchema(schema)),
                Some(other) => return Err(wrong_type(&path, "a JSON schema (an object)", &other)),
                None => None,
            },
            Self::JsonObject => fields.boolean(name)?.filter(|wanted| *wanted).map(|_| Form::JsonObject),
            Self::Regex => fields.string(name)?.map(Form::Regex),
            Self::Grammar => fields.string(name)?.map(Form::Grammar),
            Self::Choice => {
                let Some(texts) = fields.array(name)? else { return Ok(None) };
                if texts.len() > CHOICES_MAX {
                    return Err(Invalid::new(&path, format!("`{path}` has over {CHOICES_MAX} texts")));
                }
                let numbered = texts.into_iter().enumerate();
                let texts = numbered.map(|(i, text)| string_at(&format!("{path}[{i}]"), text));
                Some(Form::Choice(texts.collect::<Result<_, _>>()?))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parsed(body: &Value) -> Result<Option<Named>, Invalid> {
        let mut fields = Fields::parse(body.to_string().as_bytes())?;
        let form = read(&mut fields, UnknownFields::Reject)?;
        fields.finish(UnknownFields::Reject)?;
        Ok(form)
    }

    #[test]
    fn every_name_of_a_form_is_read() {
        let schema = json!({"type": "object"});
        let of_schema = Form::JsonSchema(schema.clone());
        let choice = Form::Choice(vec!["a".into(), "b".into()]);
        let cases = [
            (json!({}), None),
            (json!({"response_format": {"type": "text"}}), None),
            (
                json!({"response_format": {"type": "json_object"}}),
                Some((Form::JsonObject, "response_format")),
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": schema}}}),
                Some((of_schema.clone(), "response_format")),
            ),
            (
                json!({"structured_outputs": {"json": schema}}),
                Some((of_schema.clone(), "structured_outputs")),
            ),
            (
                json!({"structured_outputs": {"choice": ["a", "b"]}}),
                Some((choice.clone(), "structured_outputs")),
            ),
            (json!({"guided_json": schema.to_string()}), Some((of_schema, "guided_json"))),
            (json!({"guided_choice": ["a", "b"]}), Some((choice, "guided_choice"))),
            (json!({"regex": "a+"}), Some((Form::Regex("a+".into()), "regex"))),
            (json!({"grammar": "start: \"a\""}), Some((Form::Grammar("start: \"a\"".into()), "grammar"))),
        ];
        for (body, expected) in cases {
            assert_eq!(parsed(&body), Ok(expected), "{body}");
        }
    }

    #[test]
    fn what_is_not_a_form_names_its_field() {
        let cases = [
            (json!({"response_format": {}}), "response_format.type", "required"),
            (json!({"response_format": {"type": "xml"}}), "response_format.type", "json_schema"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema", "required"),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}),
                "response_format.json_schema.schema",
                "required",
            ),
            (json!({"structured_outputs": {}}), "structured_outputs", "needs one of"),
            (
                json!({"structured_outputs": {"regex": "a", "choice": ["a"]}}),
                "structured_outputs",
                "more than one",
            ),
            (json!({"regex": "a", "guided_regex": "a"}), "guided_regex", "both say"),
            (json!({"guided_json": "{"}), "guided_json", "not valid JSON"),
            (json!({"choice": [1]}), "choice[0]", "a string"),
            (
                json!({"response_format": {"type": "json_object", "shape": 1}}),
                "response_format.shape",
                "unknown",
            ),
        ];
        for (body, param, expected) in cases {
            let invalid = parsed(&body).expect_err(&body.to_string());
            assert_eq!(invalid.param.as_deref(), Some(param), "{body}");
            assert!(invalid.message.contains(expected), "{body}: {}", invalid.message);
        }
    }
}
