//! `GET /openapi.json`, what this server takes and answers as an OpenAPI 3.1 document, and `GET /docs`, a page that
//! shows it. Both are open to all: they say nothing of what a server knows.
//!
//! The bodies of the generating endpoints and of the admin API are drawn by their parsers (`draw`); answers and
//! queries are in tables, which tests hold against real answers and against the routes that there are.

mod answers;
pub(super) mod draw;
mod operations;
mod requests;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::Html;
use serde_json::{Map, Value, json};

use super::Server;
use super::openai::Rules;
use crate::config::UnknownFields;
use answers::reference;
use operations::{Body, OPERATIONS, Operation};

/// Token ids are below this in schemas: which the model has is known only with the model.
const TOKENS: usize = 1 << 20;

pub(super) async fn document(State(server): State<Arc<Server>>) -> Json<Value> {
    let rules = Rules {
        unknown: UnknownFields::Reject,
        vocab_size: TOKENS,
        choices_max: server.config.choices_max,
        dialect: None,
    };
    Json(of(&rules))
}

pub(super) async fn page() -> Html<&'static str> {
    Html(include_str!("docs.html"))
}

fn of(rules: &Rules) -> Value {
    let mut paths: Map<String, Value> = Map::new();
    for operation in OPERATIONS {
        let path = paths.entry(operation.path.to_owned()).or_insert_with(|| json!({}));
        path[operation.method] = shown(operation, rules);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Obol",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "LLM inference with the exact cost of every request. `cost` and `obol` in an answer's \
                `usage`, and the headers `x-obol-cost`, `x-obol-gpu-seconds` and `x-obol-kv-byte-seconds`, are the receipt's.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": answers::schemas(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "Once there is an admin key."}},
        },
        "security": [{}, {"key": []}],
    })
}

fn shown(operation: &Operation, rules: &Rules) -> Value {
    let mut parameters: Vec<Value> = path_names(operation.path)
        .map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string", "minLength": 1}}))
        .collect();
    parameters.extend(operation.query.split(',').filter_map(query_parameter));
    let id = format!("{} {}", operation.method, operation.path);
    let mut shown = json!({
        "operationId": id.replace(|c: char| !c.is_ascii_alphanumeric(), "_"),
        "tags": [operation.group],
        "summary": operation.said,
        "parameters": parameters,
        "responses": responses(operation),
    });
    let mut kind = "application/json";
    let body = match operation.body {
        Body::None => return shown,
        Body::Drawn(draw) => draw(rules),
        Body::Said(schema) => said(schema),
        Body::Form(schema) => {
            kind = "multipart/form-data";
            said(schema)
        }
    };
    shown["requestBody"] = json!({"required": true, "content": {kind: {"schema": body}}});
    shown
}

fn said(schema: &str) -> Value {
    serde_json::from_str(schema).expect("a schema is JSON; this is a bug")
}

/// Names in braces.
fn path_names(path: &str) -> impl Iterator<Item = &str> {
    path.split('{').skip(1).filter_map(|rest| rest.split('}').next())
}

/// `name: type`, with `!` before what must be there.
fn query_parameter(field: &str) -> Option<Value> {
    let (name, kind) = field.trim().split_once(':')?;
    let bare = name.trim_start_matches('!');
    Some(json!({"name": bare, "in": "query", "required": bare != name, "schema": {"type": kind.trim()}}))
}

fn responses(operation: &Operation) -> Value {
    let content = match operation.answer {
        "text" => json!({"text/plain": {"schema": {"type": "string"}}}),
        "bytes" => json!({"application/octet-stream": {}}),
        name => json!({"application/json": {"schema": reference(name)}}),
    };
    let mut ok = json!({"description": "It is so.", "content": content});
    if operation.streams {
        // No schema: tools differ in whether it is one of the text or of an event.
        ok["content"]["text/event-stream"] = json!({});
    }
    if operation.costs {
        let header = |said: &str| json!({"description": said, "schema": {"type": "string"}});
        ok["headers"] = json!({
            "x-request-id": header("The receipt's id."),
            "x-obol-cost": header("What was charged, in `x-obol-currency`. Not on streams: their last event has it."),
            "x-obol-gpu-seconds": header("The request's share of the device's time."),
            "x-obol-kv-byte-seconds": header("The request's share of the KV cache, times how long."),
        });
    }
    let error = if operation.path.starts_with("/v1/messages") { "AnthropicError" } else { "Error" };
    let failed = json!({
        "description": "It is not: the message says why, and what to do.",
        "content": {"application/json": {"schema": reference(error)}},
    });
    json!({"200": ok, "default": failed})
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Names of fields whose schema says nothing, by their paths: there must be none.
    fn unsaid(schema: &Value, path: &str, found: &mut Vec<String>) {
        if schema.as_object().is_some_and(Map::is_empty) {
            found.push(path.to_owned());
        }
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            unsaid(field, &format!("{path}.{name}"), found);
        }
        if schema["items"].is_object() {
            unsaid(&schema["items"], &format!("{path}[]"), found);
        }
    }

    fn document() -> Value {
        of(&Rules { unknown: UnknownFields::Reject, vocab_size: TOKENS, choices_max: 16, dialect: None })
    }

    #[test]
    fn every_field_that_a_parser_takes_is_said_to_be_something() {
        let document = document();
        let mut found = Vec::new();
        for operation in OPERATIONS {
            let body = &document["paths"][operation.path][operation.method]["requestBody"];
            unsaid(&body["content"]["application/json"]["schema"], operation.path, &mut found);
        }
        assert!(found.is_empty(), "write notes on these: {found:#?}");
    }

    #[test]
    fn a_chats_fields_are_drawn_with_their_bounds() {
        let document = document();
        let schema = &document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
            ["schema"];
        assert_eq!(schema["required"], json!(["model", "messages"]));
        let fields = &schema["properties"];
        assert_eq!(
            fields["temperature"],
            json!({"type": ["number", "null"], "minimum": 0.0, "maximum": 2.0})
        );
        assert_eq!(fields["n"]["maximum"], 16);
        assert_eq!(
            fields["stream_options"]["properties"]["include_usage"],
            json!({"type": ["boolean", "null"]})
        );
        assert_eq!(fields["messages"]["items"]["properties"]["refusal"], json!({"enum": [null]}));
        assert_eq!(fields["modalities"], json!({"enum": [["text"], null]}));
    }

    #[test]
    fn every_route_is_in_the_document_and_nothing_else() {
        // Routes cannot be listed; their source can.
        let sources = [include_str!("../mod.rs"), include_str!("../admin.rs")].join("\n");
        let routes = sources.split(".route(\"").skip(1).map(|rest| {
            let (path, handlers) = rest.split_once("\", ").expect("a route has handlers");
            (path.replace("{*", "{"), handlers.lines().next().unwrap_or(""))
        });
        let mut there = BTreeSet::new();
        for (path, handlers) in
            routes.filter(|(path, _)| !["/openapi.json", "/docs"].contains(&path.as_str()))
        {
            for method in ["get", "post", "delete"] {
                let named =
                    handlers.starts_with(&format!("{method}(")) || handlers.contains(&format!(".{method}("));
                if named {
                    there.insert(format!("{method} {path}"));
                }
            }
        }
        let said = OPERATIONS.iter().map(|operation| format!("{} {}", operation.method, operation.path));
        assert_eq!(said.collect::<BTreeSet<_>>(), there);
    }
}
