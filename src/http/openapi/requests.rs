//! The bodies that the generating endpoints take, drawn by their parsers; what only people can say of a field stands
//! in the notes.

use serde_json::{Value, json};

use super::draw::schema;
use crate::http::openai::{Rules, parse_chat, parse_completion};
use crate::http::origin::Asker;
use crate::http::{admin, anthropic, embeddings, responses};
use crate::units::RequestId;

/// A note: a path, and what is said of it. With a `type`, an `anyOf` or a `$ref` it stands in place of what was drawn.
type Note = (&'static str, Value);

pub(super) fn chat(rules: &Rules) -> Value {
    let samples = [
        json!({
            "model": "m",
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "t"}]},
                {"role": "user", "content": "u"},
                {"role": "assistant", "tool_calls": [
                    {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                ]},
                {"role": "tool", "tool_call_id": "c", "content": "r"},
            ],
            "stream": true, "stream_options": {},
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        }),
        json!({
            "model": "m", "messages": [{"role": "user", "content": "u"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
        }),
        json!({
            "model": "m", "messages": [{"role": "user", "content": "u"}], "structured_outputs": {"regex": "a"},
        }),
    ];
    let mut notes = shared();
    notes.extend([
        ("messages", json!({"description": "What was said, in order.", "minItems": 1})),
        ("messages[]", json!({"required": ["role"]})),
        (
            "messages[].role",
            json!({"type": "string", "enum": ["system", "developer", "user", "assistant", "tool"]}),
        ),
        ("messages[].content", parts("text")),
        ("messages[].parsed", noted()),
        ("messages[].provider_specific_fields", noted()),
        ("messages[].tool_calls[].index", noted()),
        ("messages[].tool_calls[].provider_specific_fields", noted()),
        ("messages[].tool_calls[].function.parsed_arguments", noted()),
        ("messages[].tool_calls[].function.provider_specific_fields", noted()),
        (
            "messages[].tool_calls[].function.arguments",
            json!({"type": ["string", "null"], "description": "JSON."}),
        ),
        ("tools", json!({"description": "Functions that may be called.", "maxItems": 128})),
        ("tools[].type", json!({"type": "string", "enum": ["function"]})),
        ("tools[].function.parameters", json!({"type": ["object", "null"], "description": "A JSON Schema."})),
        (
            "tool_choice",
            json!({
                "anyOf": [{"enum": ["none", "auto", "required", null]}, {"type": "object"}],
                "description": "Which function is called: by itself, at all, or this one.",
            }),
        ),
        (
            "max_completion_tokens",
            json!({"description": "Most tokens of the answer; the newer name of `max_tokens`."}),
        ),
        ("top_logprobs", json!({"description": "Alternatives a token; needs `logprobs`."})),
        ("continue_final_message", json!({"description": "Go on with the assistant's last message."})),
        ("chat_template_kwargs", json!({"description": "Names for the model's chat template."})),
        (
            "prompt_cache_key",
            json!({"description": "Accepted: all of a tenant's prefixes are cached together."}),
        ),
    ]);
    schema(&samples, &notes, |body| parse_chat(body, rules, Asker::nobody("/v1/chat/completions")).map(drop))
}

pub(super) fn completion(rules: &Rules) -> Value {
    let samples = [
        json!({"model": "m", "prompt": "p", "stream": true, "stream_options": {}}),
        json!({"model": "m", "prompt": "p", "response_format": {"type": "json_object"}}),
        json!({"model": "m", "prompt": "p", "structured_outputs": {"regex": "a"}}),
    ];
    let mut notes = shared();
    notes.extend([
        ("prompt", texts_or_tokens("What is continued: a text, token ids, or a list of either.", 128)),
        ("echo", json!({"description": "Begin each choice with its prompt."})),
        ("best_of", json!({"description": "Choices that are made, of which the `n` most likely are shown."})),
        ("logprobs", json!({"description": "Alternatives a token."})),
    ]);
    schema(&samples, &notes, |body| parse_completion(body, rules, Asker::nobody("/v1/completions")).map(drop))
}

pub(super) fn response(rules: &Rules) -> Value {
    let samples = [
        json!({
            "model": "m", "input": "i", "stream": true, "stream_options": {}, "reasoning": {},
            "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
        }),
        json!({
            "model": "m", "input": "i",
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
        }),
        json!({"model": "m", "input": "i", "structured_outputs": {"regex": "a"}}),
    ];
    let mut notes = shared();
    notes.extend([
        (
            "input",
            json!({
                "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}, "minItems": 1}],
                "description": "A text, or items: messages, calls of functions and their outputs.",
            }),
        ),
        ("tool_choice", json!({"anyOf": [{"enum": ["none", "auto", "required", null]}, {"type": "object"}]})),
        ("tools[].type", json!({"type": "string", "enum": ["function"]})),
        ("tools[].parameters", json!({"type": ["object", "null"], "description": "A JSON Schema."})),
        ("text.format.schema", json!({"type": ["object", "boolean"], "description": "A JSON Schema."})),
        ("include", json!({"items": {"type": "string"}})),
        (
            "previous_response_id",
            json!({"description": "A response that is kept: this one goes on from it."}),
        ),
        ("store", json!({"description": "Whether the response is kept; it is if this is left out."})),
    ]);
    let request = RequestId::new();
    schema(&samples, &notes, |body| responses::Requested::read(body, rules, &request).map(drop))
}

pub(super) fn message(rules: &Rules) -> Value {
    let mut notes = shared();
    notes.extend(message_notes());
    schema(&message_samples(), &notes, |body| {
        anthropic::parse(body, rules, Asker::nobody("/v1/messages")).map(drop)
    })
}

pub(super) fn count(rules: &Rules) -> Value {
    let samples = message_samples().map(|mut sample| {
        let fields = sample.as_object_mut().expect("a body is an object");
        fields.retain(|name, _| !["max_tokens", "stream"].contains(&name.as_str()));
        sample
    });
    schema(&samples, &message_notes(), |body| anthropic::parse_count(body, rules).map(drop))
}

fn message_samples() -> [Value; 2] {
    [
        json!({
            "model": "m", "max_tokens": 1, "system": "s", "thinking": {"type": "disabled"}, "stream": false,
            "cache_control": {"type": "ephemeral"},
            "messages": [{"role": "user", "content": "u"}],
            "tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "auto"},
        }),
        json!({
            "model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "u"}],
            "output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
        }),
    ]
}

fn message_notes() -> Vec<Note> {
    vec![
        (
            "messages",
            json!({
                "type": "array", "minItems": 1,
                "items": {
                    "type": "object", "required": ["role", "content"],
                    "properties": {
                        "role": {"type": "string", "enum": ["user", "assistant", "system"]},
                        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
                    },
                },
            }),
        ),
        (
            "system",
            json!({"anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": {"type": "object"}}]}),
        ),
        ("tools[].input_schema", json!({"type": ["object", "null"], "description": "A JSON Schema."})),
        (
            "output_config.format.schema",
            json!({"type": ["object", "boolean"], "description": "A JSON Schema."}),
        ),
        ("stop_sequences", json!({"type": ["array", "null"], "items": {"type": "string"}, "maxItems": 16})),
    ]
}

pub(super) fn embedding(rules: &Rules) -> Value {
    let notes = [
        ("input", texts_or_tokens("What vectors are made of: a text, token ids, or a list of either.", 2048)),
        ("encoding_format", json!({"type": ["string", "null"], "enum": ["float", "base64", null]})),
        ("dimensions", json!({"description": "Numbers of each vector; the model's own number if left out."})),
        ("user", json!({"description": "Who asks; receipts have it."})),
        ("metadata", metadata()),
    ];
    let samples = [json!({"model": "m", "input": "i"})];
    schema(&samples, &notes, |body| embeddings::parse(body, rules, Asker::nobody("/v1/embeddings")).map(drop))
}

pub(super) fn new_key(_: &Rules) -> Value {
    schema(&[json!({})], &key_notes(), |body| admin::takes(body, false))
}

pub(super) fn changed_key(_: &Rules) -> Value {
    schema(&[json!({"key": "k"})], &key_notes(), |body| admin::takes(body, true))
}

fn key_notes() -> Vec<Note> {
    let money = |said: &str| json!({"type": ["number", "string", "null"], "minimum": 0, "description": said});
    vec![
        ("key", json!({"description": "A key, its token, or its id."})),
        ("max_budget", money("It is stopped there, in the middle of an answer too.")),
        ("soft_budget", money("An alert is raised there.")),
        ("budget_duration", json!({"description": "As 30d: after that it begins anew."})),
        ("duration", json!({"description": "As 90d: so long it is good; -1 is for ever."})),
        ("models", json!({"items": {"type": "string"}})),
        ("require_tags", json!({"items": {"type": "string"}})),
        ("tags", json!({"type": ["object", "null"], "additionalProperties": {"type": ["string", "null"]}})),
        ("metadata", json!({"type": ["object", "null"]})),
    ]
}

/// Notes on fields that have one name and one meaning wherever they are.
fn shared() -> Vec<Note> {
    let schema = || json!({"type": ["object", "boolean", "string", "null"], "description": "A JSON Schema."});
    let choice = || json!({"type": ["array", "null"], "items": {"type": "string"}, "description": "The answer is one of these."});
    vec![
        ("model", json!({"description": "One that /v1/models lists, an alias of it, or `default`."})),
        ("n", json!({"description": "Choices; one receipt has them all."})),
        (
            "seed",
            json!({
                "type": ["integer", "null"], "minimum": i64::MIN, "maximum": u64::MAX,
                "description": "The same seed, prompt and settings give the same answer.",
            }),
        ),
        (
            "stop",
            json!({
                "anyOf": [
                    {"type": ["string", "null"], "minLength": 1},
                    {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 16},
                ],
                "description": "Texts before which an answer ends.",
            }),
        ),
        ("stop_token_ids", json!({"items": {"type": "integer", "minimum": 0}, "maxItems": 256})),
        (
            "logit_bias",
            json!({
                "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                "description": "Added to the logits of tokens, by their ids.",
            }),
        ),
        ("metadata", metadata()),
        (
            "user",
            json!({"description": "Who asks; receipts have it. `safety_identifier` is its newer name."}),
        ),
        (
            "service_tier",
            json!({
                "type": ["string", "null"], "enum": ["auto", "default", "flex", "priority", null],
                "description": "How soon it runs, and at what part of the cost.",
            }),
        ),
        ("stream", json!({"description": "Answer in server-sent events; the last but one has the cost."})),
        (
            "max_tokens",
            json!({"description": "Most tokens of the answer; what the context leaves if left out."}),
        ),
        ("top_p", json!({"exclusiveMinimum": 0})),
        ("repetition_penalty", json!({"exclusiveMinimum": 0, "description": "1 is none."})),
        ("top_k", json!({"description": "Draw from the k most likely tokens; 0 or -1: from all."})),
        ("ignore_eos", json!({"description": "Do not end where the model would."})),
        (
            "response_format",
            json!({
                "type": ["object", "null"], "required": ["type"],
                "properties": {
                    "type": {"type": "string", "enum": ["text", "json_object", "json_schema"]},
                    "json_schema": {"type": ["object", "null"]},
                },
                "description": "What the answer must look like.",
            }),
        ),
        ("structured_outputs.json", schema()),
        ("structured_outputs.choice", choice()),
        ("guided_json", schema()),
        ("guided_choice", choice()),
        ("choice", choice()),
        ("grammar", json!({"description": "Lark, or GBNF, which is known by its `::=`."})),
    ]
}

/// What packages note on answers, and send back with them.
fn noted() -> Value {
    json!({"description": "Not looked at: clients send answers back with it."})
}

fn metadata() -> Value {
    json!({
        "additionalProperties": {"type": ["string", "null"], "maxLength": 512}, "maxProperties": 16,
        "description": "Kept on the receipt; `team`, `feature`, `environment`, `cost_center` and `task` are its tags.",
    })
}

fn parts(kind: &str) -> Value {
    let part = json!({
        "type": "object", "required": ["type", "text"], "additionalProperties": false,
        "properties": {"type": {"type": "string", "enum": [kind]}, "text": {"type": "string"}},
    });
    json!({"anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": part, "minItems": 1}]})
}

fn texts_or_tokens(description: &str, most: usize) -> Value {
    let tokens = || json!({"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1});
    json!({
        "anyOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": most},
            tokens(),
            {"type": "array", "items": tokens(), "minItems": 1, "maxItems": most},
        ],
        "description": description,
    })
}
