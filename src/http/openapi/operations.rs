//! What can be called: a row for each method of each path.

use serde_json::Value;

use super::requests;
use crate::http::openai::Rules;

pub(super) enum Body {
    None,
    /// By its parser.
    Drawn(fn(&Rules) -> Value),
    /// A JSON Schema.
    Said(&'static str),
    /// A form, by a JSON Schema.
    Form(&'static str),
}

pub(super) struct Operation {
    pub(super) method: &'static str,
    pub(super) path: &'static str,
    pub(super) group: &'static str,
    pub(super) said: &'static str,
    /// `name: type` each, with `!` before what must be there.
    pub(super) query: &'static str,
    pub(super) body: Body,
    /// The name of a shape, or `text`.
    pub(super) answer: &'static str,
    /// It may be answered in server-sent events.
    pub(super) streams: bool,
    /// Its answer has a receipt.
    pub(super) costs: bool,
}

const fn get(path: &'static str, group: &'static str, answer: &'static str, said: &'static str) -> Operation {
    Operation {
        method: "get",
        path,
        group,
        said,
        query: "",
        body: Body::None,
        answer,
        streams: false,
        costs: false,
    }
}

const fn post(
    path: &'static str,
    group: &'static str,
    answer: &'static str,
    said: &'static str,
) -> Operation {
    Operation { method: "post", ..get(path, group, answer, said) }
}

/// Runs the model: its body is drawn, and its answer has a receipt.
const fn run(
    path: &'static str,
    answer: &'static str,
    body: fn(&Rules) -> Value,
    said: &'static str,
) -> Operation {
    Operation { body: Body::Drawn(body), costs: true, ..post(path, "Generate", answer, said) }
}

const fn streamed(operation: Operation) -> Operation {
    Operation { streams: true, ..operation }
}

const fn asked(query: &'static str, operation: Operation) -> Operation {
    Operation { query, ..operation }
}

const fn with(schema: &'static str, operation: Operation) -> Operation {
    Operation { body: Body::Said(schema), ..operation }
}

const TOKENIZE: &str = r#"{"type":"object","additionalProperties":false,"description":"Either a prompt or messages.","properties":{
    "model":{"type":["string","null"]},"prompt":{"type":["string","null"]},
    "messages":{"type":["array","null"],"items":{"type":"object"}},
    "add_special_tokens":{"type":["boolean","null"]}}}"#;
const DETOKENIZE: &str = r#"{"type":"object","additionalProperties":false,"required":["tokens"],"properties":{
    "model":{"type":["string","null"]},"tokens":{"type":"array","items":{"type":"integer","minimum":0}}}}"#;
const RERANK: &str = r#"{"type":"object","additionalProperties":false,"required":["model","query","documents"],"properties":{
    "model":{"type":"string"},"query":{"type":"string","minLength":1},
    "documents":{"type":"array","minItems":1,"maxItems":2047,"items":{"anyOf":[{"type":"string","minLength":1},
        {"type":"object","required":["text"],"additionalProperties":false,"properties":{"text":{"type":"string","minLength":1}}}]}},
    "top_n":{"type":["integer","null"],"minimum":1},"return_documents":{"type":["boolean","null"]},
    "user":{"type":["string","null"]},"safety_identifier":{"type":["string","null"]},"metadata":{"type":["object","null"]}}}"#;
const SCORE: &str = r#"{"type":"object","additionalProperties":false,"required":["model","text_1","text_2"],"properties":{
    "model":{"type":"string"},
    "text_1":{"anyOf":[{"type":"string","minLength":1},{"type":"array","minItems":1,"items":{"type":"string","minLength":1}}]},
    "text_2":{"anyOf":[{"type":"string","minLength":1},{"type":"array","minItems":1,"items":{"type":"string","minLength":1}}]},
    "user":{"type":["string","null"]},"safety_identifier":{"type":["string","null"]},"metadata":{"type":["object","null"]}}}"#;
const KEY: &str = r#"{"type":"object","additionalProperties":false,"required":["key"],"properties":{
    "key":{"type":"string","description":"A key, its token, or its id."}}}"#;
const ROTATE: &str = r#"{"type":"object","additionalProperties":false,"properties":{
    "key":{"type":["string","null"],"description":"A key, its token, or its id."},
    "grace_period":{"type":["string","null"],"description":"So long the secret before it works, as 24h."}}}"#;
const DELETE: &str = r#"{"type":"object","additionalProperties":false,"properties":{
    "keys":{"type":["array","null"],"items":{"type":"string"},"description":"Keys, their tokens, or their ids."},
    "key_aliases":{"type":["array","null"],"items":{"type":"string"}}}}"#;

const UPLOAD: &str = r#"{"type":"object","required":["purpose","file"],"properties":{
    "purpose":{"type":"string","enum":["batch"]},"file":{"type":"string","format":"binary","description":"A request a line, as JSON."}}}"#;
const BATCH: &str = r#"{"type":"object","additionalProperties":false,"required":["input_file_id","endpoint","completion_window"],"properties":{
    "input_file_id":{"type":"string"},"endpoint":{"type":"string"},
    "completion_window":{"type":"string","description":"As 24h: what is not done by then is given up."},
    "metadata":{"type":["object","null"],"additionalProperties":{"type":["string","null"],"maxLength":512},"maxProperties":16},
    "output_expires_after":{"enum":[null]}}}"#;

pub(super) const OPERATIONS: &[Operation] = &[
    streamed(run("/v1/chat/completions", "ChatCompletion", requests::chat, "Answer a conversation.")),
    streamed(run("/v1/completions", "Completion", requests::completion, "Go on with a text.")),
    streamed(run("/v1/responses", "Response", requests::response, "Answer as OpenAI's responses.")),
    with(
        r#"{"type":"object","required":["model","input"],"properties":{"model":{"type":"string"},"input":{"anyOf":[{"type":"string"},{"type":"array","items":{"type":"object"}}]}}}"#,
        post("/v1/responses/input_tokens", "Generate", "InputTokens", "Count what a response would read."),
    ),
    get("/v1/responses/{id}", "Generate", "Response", "A response that is kept."),
    Operation {
        method: "delete",
        ..get("/v1/responses/{id}", "Generate", "ResponseDeleted", "Forget a response.")
    },
    asked(
        "after: string, limit: integer, order: string",
        get("/v1/responses/{id}/input_items", "Generate", "ResponseItems", "What a response was made of."),
    ),
    post(
        "/v1/responses/{id}/cancel",
        "Generate",
        "Response",
        "Refused: responses do not run in the background.",
    ),
    streamed(run("/v1/messages", "Message", requests::message, "Answer as Anthropic's messages.")),
    Operation {
        body: Body::Drawn(requests::count),
        ..post("/v1/messages/count_tokens", "Generate", "MessageTokens", "Count what a message would read.")
    },
    run("/v1/embeddings", "Embeddings", requests::embedding, "Make vectors."),
    Operation {
        costs: true,
        ..with(RERANK, post("/v1/rerank", "Generate", "Ranking", "Order documents by a query."))
    },
    Operation { costs: true, ..with(SCORE, post("/v1/score", "Generate", "Scores", "Compare texts.")) },
    Operation {
        body: Body::Form(UPLOAD),
        ..post("/v1/files", "Batches", "File", "Keep a file of requests.")
    },
    asked(
        "after: string, limit: integer, order: string, purpose: string",
        get("/v1/files", "Batches", "Files", "Files that are kept."),
    ),
    get("/v1/files/{id}", "Batches", "File", "One of them."),
    Operation { method: "delete", ..get("/v1/files/{id}", "Batches", "FileDeleted", "Delete a file.") },
    get("/v1/files/{id}/content", "Batches", "bytes", "What a file has."),
    with(BATCH, post("/v1/batches", "Batches", "Batch", "Run a file of requests when nobody else waits.")),
    asked(
        "after: string, limit: integer",
        get("/v1/batches", "Batches", "Batches", "Batches, newest first."),
    ),
    get("/v1/batches/{id}", "Batches", "Batch", "How far a batch is."),
    post("/v1/batches/{id}/cancel", "Batches", "Batch", "Stop a batch; what is done is kept."),
    get("/v1/models", "Models", "Models", "What is served."),
    get("/v1/models/{id}", "Models", "Model", "One of them."),
    asked(
        "limit: integer, after: string, model: string, user: string, tenant: string, key_id: string, endpoint: string, status: string, since: integer, until: integer",
        get("/v1/requests", "Costs", "Receipts", "Receipts, newest first."),
    ),
    get("/v1/requests/{id}", "Costs", "Receipt", "The receipt of a request."),
    asked("tenant: string", get("/v1/tasks/{id}", "Costs", "Task", "What an agent's run did and cost.")),
    asked(
        "!start_time: integer, end_time: integer, bucket_width: string, limit: integer, page: string, group_by: string",
        get("/v1/organization/costs", "Costs", "Buckets", "Costs by day, in OpenAI's shape."),
    ),
    asked(
        "!start_time: integer, end_time: integer, bucket_width: string, limit: integer, page: string, group_by: string",
        get(
            "/v1/organization/usage/completions",
            "Costs",
            "Buckets",
            "Usage by day or hour, in OpenAI's shape.",
        ),
    ),
    asked(
        "request_id: string, api_key: string, user_id: string, start_date: string, end_date: string, summarize: string, limit: integer, after: string",
        get("/spend/logs", "Costs", "SpendLogs", "Requests, in LiteLLM's shape."),
    ),
    asked(
        "start_date: string, end_date: string, group_by: string",
        get("/global/spend/report", "Costs", "SpendReport", "Spend by day, in LiteLLM's shape."),
    ),
    with(TOKENIZE, post("/tokenize", "Models", "Tokens", "Tokens of a text, or of messages.")),
    with(DETOKENIZE, post("/detokenize", "Models", "Detokenized", "The text of tokens.")),
    get("/tokenizer_info", "Models", "TokenizerInfo", "Special tokens, and the chat template."),
    get("/health", "Probes", "Status", "Whether the server lives."),
    get("/ready", "Probes", "Status", "Whether it takes requests."),
    get("/metrics", "Probes", "text", "Prometheus' text."),
    Operation {
        body: Body::Drawn(requests::new_key),
        ..post("/key/generate", "Keys", "Key", "Make a key; its secret is shown this once.")
    },
    Operation {
        body: Body::Drawn(requests::changed_key),
        ..post("/key/update", "Keys", "Key", "Change a key.")
    },
    with(DELETE, post("/key/delete", "Keys", "KeysDeleted", "Delete keys: all of them or none.")),
    with(ROTATE, post("/key/regenerate", "Keys", "Key", "Give a key a new secret.")),
    with(ROTATE, post("/key/{key}/regenerate", "Keys", "Key", "Give a key a new secret.")),
    with(KEY, post("/key/block", "Keys", "Key", "Refuse a key from now on.")),
    with(KEY, post("/key/unblock", "Keys", "Key", "Take a key again.")),
    asked("key: string", get("/key/info", "Keys", "KeyInfo", "A key, and what it has spent.")),
    asked(
        "page: integer, size: integer, return_full_object: string, status: string, user_id: string, team_id: string, key_alias: string, key_hash: string",
        get("/key/list", "Keys", "Keys", "Keys, newest first."),
    ),
    asked(
        "limit: integer, after: string, target: string",
        get("/v1/organization/audit_logs", "Keys", "AuditLogs", "Who changed what."),
    ),
];
