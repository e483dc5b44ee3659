//! What is answered, by name: each line of a shape is a field and its type.

use serde_json::{Map, Value, json};

/// `name: type` a field. Types: `text`, `integer`, `number`, `boolean`, `object`, `any`; a name of another shape; `[..]`
/// a list of it; `?` after it: or null. A field with `~` before it may be missing. Answers may grow fields.
const SHAPES: &[(&str, &str, &str)] = &[
    ("Error", "What every error is, but under /v1/messages.", "error: ErrorBody"),
    ("ErrorBody", "", "message: text, type: text, param: text?, code: text?"),
    ("AnthropicError", "What errors are under /v1/messages.", "type: text, error: object, ~request_id: text"),
    (
        "Receipt",
        "What one request used and cost: the same figures as in headers, ledger, reports and exports. Nanoseconds and money are decimal texts.",
        "request_id: text, client_request_id: text?, created: integer, model: text, precision: text, device: text, \
         key_id: text?, tenant: text, user: text?, tags: object, status: text, service_tier: text, seed: integer, \
         tokens: ReceiptTokens, gpu_seconds: text, device_ns: ReceiptTime, steps: integer, kv_byte_seconds: text, \
         kv_peak_bytes: integer, queue_seconds: text, ttft_seconds: text?, wall_seconds: text, cost: ReceiptCost, \
         lines: [ReceiptLine], method_id: text?, saved: object, energy_mj: integer?",
    ),
    (
        "ReceiptTokens",
        "",
        "prompt: integer, cached: integer, completion: integer, draft_accepted: integer, draft_rejected: integer",
    ),
    ("ReceiptTime", "Nanoseconds of the device.", "prefill: text, decode: text, total: text"),
    (
        "ReceiptCost",
        "`total` = `time` + `memory` - `discount` - `cap_overrun`.",
        "total: text, time: text, memory: text, discount: text, cap_overrun: text, currency: text",
    ),
    (
        "ReceiptLine",
        "Of one device at one rate.",
        "device: text, rate_version: text, device_ns: text, block_ns: text, time: text, memory: text, discount: text",
    ),
    (
        "Usage",
        "",
        "prompt_tokens: integer, completion_tokens: integer, total_tokens: integer, ~prompt_tokens_details: object?, \
         ~completion_tokens_details: object?, cost: number, obol: Receipt",
    ),
    ("InputUsage", "", "prompt_tokens: integer, total_tokens: integer, cost: number, obol: Receipt"),
    (
        "ChatCompletion",
        "",
        "id: text, object: text, created: integer, model: text, system_fingerprint: text, service_tier: text, \
         choices: [ChatChoice], usage: Usage",
    ),
    (
        "ChatChoice",
        "",
        "index: integer, message: ChatMessage, logprobs: object?, finish_reason: text, ~stop_reason: any",
    ),
    (
        "ChatMessage",
        "",
        "role: text, content: text?, ~refusal: text?, ~reasoning_content: text?, ~tool_calls: [object]?",
    ),
    (
        "Completion",
        "",
        "id: text, object: text, created: integer, model: text, system_fingerprint: text, choices: [TextChoice], usage: Usage",
    ),
    (
        "TextChoice",
        "",
        "index: integer, text: text, logprobs: object?, finish_reason: text, ~stop_reason: any",
    ),
    (
        "Response",
        "",
        "id: text, object: text, created_at: integer, status: text, error: object?, incomplete_details: object?, \
         model: text, output: [object], instructions: any, metadata: object?, previous_response_id: text?, \
         temperature: number?, top_p: number?, tool_choice: any, tools: [object], usage: object?",
    ),
    ("ResponseItems", "", "object: text, data: [object], first_id: text?, last_id: text?, has_more: boolean"),
    ("ResponseDeleted", "", "id: text, object: text, deleted: boolean"),
    ("InputTokens", "", "object: text, input_tokens: integer"),
    (
        "Message",
        "",
        "id: text, type: text, role: text, model: text, content: [object], stop_reason: text, stop_sequence: text?, \
         usage: MessageUsage",
    ),
    (
        "MessageUsage",
        "",
        "input_tokens: integer, output_tokens: integer, cache_creation_input_tokens: integer, \
         cache_read_input_tokens: integer, cost: number, obol: Receipt",
    ),
    ("MessageTokens", "", "input_tokens: integer"),
    ("Embeddings", "", "object: text, data: [Embedding], model: text, usage: InputUsage"),
    (
        "Embedding",
        "A list of numbers, or base64 of little-endian f32.",
        "object: text, index: integer, embedding: any",
    ),
    ("Ranking", "", "id: text, model: text, results: [Ranked], usage: InputUsage"),
    ("Ranked", "", "index: integer, relevance_score: number, ~document: object"),
    ("Scores", "", "id: text, object: text, created: integer, model: text, data: [Score], usage: InputUsage"),
    ("Score", "", "index: integer, object: text, score: number"),
    ("Models", "", "object: text, data: [Model]"),
    (
        "Model",
        "",
        "id: text, object: text, created: integer, owned_by: text, ~max_model_len: integer, ~obol: object",
    ),
    ("Receipts", "", "object: text, data: [Receipt], first_id: text?, last_id: text?, has_more: boolean"),
    ("Task", "An agent's whole run.", "~obol: any"),
    ("Tokens", "", "count: integer, max_model_len: integer, tokens: [integer]"),
    ("Detokenized", "", "prompt: text"),
    (
        "TokenizerInfo",
        "",
        "vocab_size: integer, model_max_length: integer, bos_token: text?, eos_token: text?, pad_token: text?, chat_template: text?",
    ),
    ("Status", "", "status: text, ~model: text"),
    (
        "File",
        "",
        "id: text, object: text, bytes: integer, created_at: integer, filename: text, purpose: text",
    ),
    ("Files", "", "object: text, data: [File], first_id: text?, last_id: text?, has_more: boolean"),
    ("FileDeleted", "", "id: text, object: text, deleted: boolean"),
    (
        "Batch",
        "",
        "id: text, object: text, endpoint: text, errors: object?, input_file_id: text, completion_window: text, \
         status: text, output_file_id: text?, error_file_id: text?, created_at: integer, in_progress_at: integer?, \
         expires_at: integer?, finalizing_at: integer?, completed_at: integer?, failed_at: integer?, \
         expired_at: integer?, cancelling_at: integer?, cancelled_at: integer?, request_counts: object?, \
         metadata: object?",
    ),
    ("Batches", "", "object: text, data: [Batch], first_id: text?, last_id: text?, has_more: boolean"),
    ("SpendLogs", "LiteLLM's shape; `obol` has the receipt.", "[object]"),
    ("SpendReport", "LiteLLM's shape; `obol` has the exact figures.", "[object]"),
    (
        "Buckets",
        "OpenAI's pages of buckets; `obol` has the exact figures.",
        "object: text, data: [Bucket], has_more: boolean, next_page: text?",
    ),
    ("Bucket", "", "object: text, start_time: integer, end_time: integer, results: [object]"),
    ("AuditLogs", "", "object: text, data: [object], first_id: text?, last_id: text?, has_more: boolean"),
    (
        "Key",
        "Only what makes a key shows its secret, as `key`, and once.",
        "key_id: text, key_name: text, key_alias: text?, expires: text?, blocked: boolean, models: [text], \
         max_budget: number?, tags: object, metadata: object, spend: number, ~key: text, obol: object",
    ),
    ("KeyInfo", "", "key: text, info: Key"),
    ("Keys", "", "keys: [any], total_count: integer, current_page: integer, total_pages: integer"),
    ("KeysDeleted", "", "deleted_keys: [text]"),
];

/// All of them, by their names.
pub(super) fn schemas() -> Map<String, Value> {
    SHAPES.iter().map(|(name, said, shape)| ((*name).to_owned(), described(shape_of(shape), said))).collect()
}

pub(super) fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

fn described(mut schema: Value, said: &str) -> Value {
    if !said.is_empty() {
        schema["description"] = json!(said);
    }
    schema
}

fn shape_of(shape: &str) -> Value {
    if shape.starts_with('[') {
        return kind_of(shape);
    }
    let (mut properties, mut required) = (Map::new(), Vec::new());
    for field in shape.split(',') {
        let (name, kind) = field.split_once(':').expect("a field has a type; this is a bug");
        let (name, kind) = (name.trim(), kind.trim());
        let bare = name.trim_start_matches('~');
        if bare == name {
            required.push(bare);
        }
        properties.insert(bare.to_owned(), kind_of(kind));
    }
    json!({"type": "object", "properties": properties, "required": required})
}

fn kind_of(kind: &str) -> Value {
    if let Some(kind) = kind.strip_suffix('?') {
        let mut schema = kind_of(kind);
        match schema["type"].as_str().map(str::to_owned) {
            Some(plain) => schema["type"] = json!([plain, "null"]),
            None => schema = json!({"anyOf": [schema, {"type": "null"}]}),
        }
        return schema;
    }
    if let Some(items) = kind.strip_prefix('[').and_then(|kind| kind.strip_suffix(']')) {
        return json!({"type": "array", "items": kind_of(items)});
    }
    match kind {
        "text" => json!({"type": "string"}),
        "integer" | "number" | "boolean" | "object" => json!({"type": kind}),
        "any" => json!({}),
        name => reference(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_name_only_shapes_that_there_are() {
        let schemas = schemas();
        let text = Value::Object(schemas.clone()).to_string();
        let named =
            text.split("\"#/components/schemas/").skip(1).map(|rest| rest.split('"').next().unwrap_or(""));
        for name in named {
            assert!(schemas.contains_key(name), "{name}");
        }
        assert_eq!(schemas.len(), SHAPES.len(), "two shapes have one name");
        assert_eq!(kind_of("[text]?"), json!({"type": ["array", "null"], "items": {"type": "string"}}));
        assert_eq!(shape_of("a: text, ~b: Model?")["required"], json!(["a"]));
    }
}
