//! The items that a response goes on from: read as clients send them, kept as the API lists them, and told to the
//! model as messages.

use serde_json::{Value, json};

use crate::config::UnknownFields;
use crate::http::fields::{Fields, Invalid, required, string_at, wrong_type};
use crate::units::RequestId;

const ID_BYTES_MAX: usize = 512;

/// `input`: a text, or items, each with an id.
pub(super) fn read(input: Value, request: &RequestId, unknown: UnknownFields) -> Result<Vec<Value>, Invalid> {
    let given = match input {
        Value::String(text) => {
            let content = json!([{"type": "input_text", "text": text}]);
            return Ok(vec![message(&format!("msg_{request}_in0"), "user", content)]);
        }
        Value::Array(items) if items.is_empty() => {
            return Err(Invalid::new("input", "`input` is empty: send a text or at least one item"));
        }
        Value::Array(items) => items,
        other => return Err(wrong_type("input", "a string or an array of items", &other)),
    };
    let numbered = given.into_iter().enumerate();
    let read = numbered.map(|(i, item)| {
        let own = format!("{request}_in{i}");
        self::item(&format!("input[{i}]"), item, &own, unknown)
    });
    read.collect()
}

fn message(id: &str, role: &str, content: Value) -> Value {
    json!({"id": id, "type": "message", "status": "completed", "role": role, "content": content})
}

/// `own`: what its id is made from, where it has none.
fn item(path: &str, value: Value, own: &str, unknown: UnknownFields) -> Result<Value, Invalid> {
    let mut item = Fields::of(path, value)?;
    let kind = match item.string("type")? {
        Some(kind) => kind,
        None if item.peek("role").is_some() => "message".to_owned(),
        None => return Err(required(&item.path("type"))),
    };
    let id_path = item.path("id");
    let id = item.string("id")?.map(|id| bounded(&id_path, id)).transpose()?;
    let id = |prefix: &str| id.unwrap_or_else(|| format!("{prefix}_{own}"));
    // Where the item was in its making: all that come here are complete, or as complete as they will be.
    item.string("status")?;
    item.only("caller", &[json!({"type": "direct"})], "only the model calls")?;
    let read = match kind.as_str() {
        "message" => message_of(&mut item, id("msg"), unknown)?,
        "function_call" => {
            item.only("namespace", &[], "functions have no namespaces")?;
            item.only("async", &[json!(false)], "calls are answered before the model goes on")?;
            json!({
                "id": id("fc"),
                "type": "function_call",
                "status": "completed",
                "call_id": call_id(&mut item)?,
                "name": item.needed("name")?,
                "arguments": item.needed("arguments")?,
            })
        }
        "function_call_output" => json!({
            "id": id("fco"),
            "type": "function_call_output",
            "status": "completed",
            "call_id": call_id(&mut item)?,
            "output": output_of(&mut item, unknown)?,
        }),
        "reasoning" => reasoning(&mut item, id("rs"), unknown)?,
        "item_reference" => {
            let path = item.path("type");
            let message = format!(
                "`{path}` = \"item_reference\": send the item itself, or go on from its response with \
                 `previous_response_id`"
            );
            return Err(Invalid::new(path, message));
        }
        other => {
            let read = "message, function_call, function_call_output and reasoning";
            return Err(not_read(&item, other, read));
        }
    };
    item.finish(unknown)?;
    Ok(read)
}

fn not_read(fields: &Fields, kind: &str, read: &str) -> Invalid {
    let path = fields.path("type");
    let message = format!("`{path}` = {kind:?}: this server reads {read} here");
    Invalid::new(path, message)
}

fn bounded(path: &str, id: String) -> Result<String, Invalid> {
    if (1..=ID_BYTES_MAX).contains(&id.len()) {
        return Ok(id);
    }
    Err(Invalid::new(path, format!("`{path}` has 1 to {ID_BYTES_MAX} bytes")))
}

fn call_id(item: &mut Fields) -> Result<String, Invalid> {
    let path = item.path("call_id");
    bounded(&path, item.needed("call_id")?)
}

fn message_of(item: &mut Fields, id: String, unknown: UnknownFields) -> Result<Value, Invalid> {
    let path = item.path("role");
    let role = item.needed("role")?;
    if !matches!(role.as_str(), "user" | "assistant" | "system" | "developer") {
        let message = format!("`{path}` = {role:?}: use user, assistant, system or developer");
        return Err(Invalid::new(path, message));
    }
    let path = item.path("content");
    let content = item.take("content").ok_or_else(|| required(&path))?;
    // Of an answer in several messages: which one it is. Templates have no word for it.
    item.string("phase")?;
    let kind = if role == "assistant" { "output_text" } else { "input_text" };
    let texts = match content {
        Value::String(text) => vec![text],
        Value::Array(parts) if parts.is_empty() => {
            return Err(Invalid::new(&path, format!("`{path}` has no parts")));
        }
        Value::Array(parts) => parts_of(&path, parts, unknown)?,
        other => return Err(wrong_type(&path, "a string or an array of parts", &other)),
    };
    let part = |text: String| match kind {
        "output_text" => json!({"type": kind, "text": text, "annotations": []}),
        _ => json!({"type": kind, "text": text}),
    };
    Ok(message(&id, &role, texts.into_iter().map(part).collect()))
}

/// The texts of parts that are texts.
fn parts_of(path: &str, parts: Vec<Value>, unknown: UnknownFields) -> Result<Vec<String>, Invalid> {
    let numbered = parts.into_iter().enumerate();
    let read = numbered.map(|(i, part)| {
        let mut part = Fields::of(&format!("{path}[{i}]"), part)?;
        match part.needed("type")?.as_str() {
            "input_text" => part.only("prompt_cache_breakpoint", &[], "all prefixes are cached")?,
            "output_text" => {
                part.only("annotations", &[json!([])], "annotations are not read")?;
                // Of our own answers, which clients send back as they got them.
                part.array("logprobs")?;
            }
            other => return Err(not_read(&part, other, "input_text and output_text")),
        }
        let text = part.needed("text")?;
        part.finish(unknown)?;
        Ok(text)
    });
    read.collect()
}

/// What a function gave: a text, or parts that are texts.
fn output_of(item: &mut Fields, unknown: UnknownFields) -> Result<Value, Invalid> {
    let path = item.path("output");
    match item.take("output").ok_or_else(|| required(&path))? {
        Value::Array(parts) => {
            let texts = parts_of(&path, parts, unknown)?.into_iter();
            Ok(texts.map(|text| json!({"type": "input_text", "text": text})).collect())
        }
        text => string_at(&path, text).map(Value::String),
    }
}

fn reasoning(item: &mut Fields, id: String, unknown: UnknownFields) -> Result<Value, Invalid> {
    item.only("encrypted_content", &[], "thoughts are read as text, in `content`")?;
    let mut texts = |name: &str, kind: &str| -> Result<Value, Invalid> {
        let path = item.path(name);
        let numbered = item.array(name)?.unwrap_or_default().into_iter().enumerate();
        let read = numbered.map(|(i, part)| {
            let mut part = Fields::of(&format!("{path}[{i}]"), part)?;
            let found = part.needed("type")?;
            if found != kind {
                return Err(not_read(&part, &found, kind));
            }
            let text = part.needed("text")?;
            part.finish(unknown)?;
            Ok(json!({"type": kind, "text": text}))
        });
        read.collect()
    };
    let summary = texts("summary", "summary_text")?;
    let content = texts("content", "reasoning_text")?;
    Ok(json!({"id": id, "type": "reasoning", "status": "completed", "summary": summary, "content": content}))
}

/// What templates take: instructions first; what the assistant thought, said and called between two others' words as
/// one turn.
pub(super) fn messages<'a>(instructions: Option<&str>, items: impl Iterator<Item = &'a Value>) -> Vec<Value> {
    let mut messages = Vec::new();
    messages.extend(instructions.map(|text| json!({"role": "system", "content": text})));
    for item in items {
        match item["type"].as_str() {
            Some("message") => {
                let text = text_of(&item["content"]);
                match item["role"].as_str() {
                    Some("assistant") => more(turn(&mut messages), "content", &text),
                    Some("developer") => messages.push(json!({"role": "system", "content": text})),
                    role => messages.push(json!({"role": role, "content": text})),
                }
            }
            Some("reasoning") => {
                let parts = [&item["content"], &item["summary"]].into_iter().map(text_of);
                if let Some(thought) = parts.into_iter().find(|text| !text.is_empty()) {
                    more(turn(&mut messages), "reasoning_content", &thought);
                }
            }
            Some("function_call") => call(turn(&mut messages), item),
            _ => {
                let text = text_of(&item["output"]);
                messages.push(json!({"role": "tool", "tool_call_id": item["call_id"], "content": text}));
            }
        }
    }
    messages
}

/// The assistant's turn that goes on, or a new one.
fn turn(messages: &mut Vec<Value>) -> &mut Value {
    if messages.last().is_none_or(|last| last["role"] != "assistant") {
        messages.push(json!({"role": "assistant", "content": ""}));
    }
    messages.last_mut().expect("there is one")
}

fn more(message: &mut Value, name: &str, text: &str) {
    let said = message[name].as_str().unwrap_or_default();
    let between = if said.is_empty() || text.is_empty() { "" } else { "\n" };
    message[name] = json!(format!("{said}{between}{text}"));
}

/// Arguments become an object where they are one: templates print them with `tojson`.
fn call(message: &mut Value, item: &Value) {
    let written = item["arguments"].as_str().unwrap_or_default();
    let arguments = serde_json::from_str(written).unwrap_or_else(|_| json!(written));
    let function = json!({"name": item["name"], "arguments": arguments});
    let call = json!({"id": item["call_id"], "type": "function", "function": function});
    match message["tool_calls"].as_array_mut() {
        Some(calls) => calls.push(call),
        None => message["tool_calls"] = json!([call]),
    }
}

/// A text, or parts with a line break between.
fn text_of(content: &Value) -> String {
    match content {
        Value::Array(parts) => {
            let texts = parts.iter().filter_map(|part| part["text"].as_str());
            texts.collect::<Vec<_>>().join("\n")
        }
        text => text.as_str().unwrap_or_default().to_owned(),
    }
}
