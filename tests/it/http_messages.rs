//! Anthropic's messages over the fake model: shapes, events, errors, and the one receipt behind each. Its context is too
//! small to describe a tool: calls are in `tests/clients/test_anthropic.py`.

use axum::body::Body;
use axum::http::{Request, StatusCode};
use serde_json::{Value, json};

use crate::http_world::{ADMIN, Answer, Options, guarded, world, world_with};

fn hello(extra: Value) -> Value {
    let mut body = json!({
        "model": "fake/model",
        "max_tokens": 8,
        "seed": 11,
        "messages": [{"role": "user", "content": "hello"}],
    });
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    body
}

/// Events by name; each is named as its type says.
fn events(answer: &Answer) -> Vec<Value> {
    let frames = answer.text.split("\n\n").filter(|frame| !frame.is_empty());
    let event = |frame: &str| {
        let (name, data) = frame.split_once('\n').expect("a name and data");
        let data: Value =
            serde_json::from_str(data.strip_prefix("data: ").expect("data")).expect("an event in JSON");
        assert_eq!(name.strip_prefix("event: "), data["type"].as_str(), "{frame}");
        data
    };
    frames.map(event).collect()
}

fn weather() -> Value {
    json!([{"name": "weather", "description": "Of a city.", "input_schema": {
        "type": "object",
        "properties": {"unit": {"enum": ["c", "f"]}},
        "required": ["unit"],
        "additionalProperties": false,
    }}])
}

#[tokio::test]
async fn a_message_has_anthropics_shape_and_the_receipt() {
    let world = world();
    let answer = world.post("/v1/messages", hello(json!({"metadata": {"user_id": "ada", "run": "7"}}))).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    let body = answer.json();
    assert_eq!((&body["type"], &body["role"]), (&json!("message"), &json!("assistant")));
    assert_eq!(body["model"], "fake/model");
    assert_eq!(body["stop_reason"], "max_tokens");
    assert_eq!(body["stop_sequence"], Value::Null);
    assert_eq!(body["content"][0]["type"], "text");
    let (usage, receipt) = (&body["usage"], &body["usage"]["obol"]);
    assert_eq!(usage["output_tokens"], 8);
    let tokens = &receipt["tokens"];
    let computed = usage["input_tokens"].as_u64().expect("a count");
    let cached = usage["cache_read_input_tokens"].as_u64().expect("a count");
    assert_eq!(json!(computed + cached), tokens["prompt"]);
    assert_eq!(json!(cached), tokens["cached"]);
    assert_eq!(receipt["user"], "ada");
    assert_eq!(answer.header("request-id"), answer.header("x-request-id"));
    let total = receipt["cost"]["total"].as_str().expect("a decimal");
    assert_eq!(answer.header("x-obol-cost"), total);
    assert!(usage["cost"].as_f64().expect("a number") > 0.0);
    // Asked once more, most of the prompt is found in the cache.
    let long = hello(json!({"system": "s".repeat(100)}));
    world.post("/v1/messages", long.clone()).await;
    let again = world.post("/v1/messages", long).await.json()["usage"].clone();
    assert!(again["cache_read_input_tokens"].as_u64().expect("a count") >= 64, "{again}");
    assert!(again["input_tokens"].as_u64().expect("a count") < 64, "{again}");
}

#[tokio::test]
async fn a_stream_tells_the_same_in_events() {
    let world = world();
    let whole = world.post("/v1/messages", hello(json!({}))).await.json();
    let streamed = world.post("/v1/messages", hello(json!({"stream": true}))).await;
    assert_eq!(streamed.status, StatusCode::OK, "{}", streamed.text);
    let events = events(&streamed);
    let mut kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().expect("a type")).collect();
    kinds.dedup();
    assert_eq!(
        kinds,
        [
            "message_start",
            "ping",
            "content_block_start",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
    );
    assert_eq!(events[0]["message"]["content"], json!([]));
    let text: String = events.iter().filter_map(|event| event["delta"]["text"].as_str()).collect();
    assert_eq!(json!(text), whole["content"][0]["text"]);
    let last = &events[events.len() - 2];
    assert_eq!(last["delta"], json!({"stop_reason": "max_tokens", "stop_sequence": null}));
    let prompt = &last["usage"]["obol"]["tokens"]["prompt"];
    assert_eq!(prompt, &events[0]["message"]["usage"]["input_tokens"]);
    assert_eq!(last["usage"]["output_tokens"], 8);
    let id = streamed.header("x-request-id");
    let receipt = world.get(&format!("/v1/requests/{id}")).await.json();
    assert_eq!(receipt, last["usage"]["obol"]);
}

#[tokio::test]
async fn the_stop_sequence_that_ended_an_answer_is_named() {
    let world = world();
    let text = world.post("/v1/messages", hello(json!({}))).await.json()["content"][0]["text"].clone();
    let text = text.as_str().expect("text");
    let (at, found) = text.char_indices().nth(3).map(|(at, c)| (at, c.to_string())).expect("four characters");
    let first = text.find(&found).expect("it is there");
    assert!(first <= at);
    let sequences = json!({"stop_sequences": ["never said", found]});
    let body = world.post("/v1/messages", hello(sequences.clone())).await.json();
    assert_eq!(body["stop_reason"], "stop_sequence", "{body}");
    assert_eq!(body["stop_sequence"], json!(found));
    let said: String =
        body["content"].as_array().expect("blocks").iter().filter_map(|b| b["text"].as_str()).collect();
    assert_eq!(said, text[..first]);
    let mut streamed = hello(sequences);
    streamed["stream"] = json!(true);
    let events = events(&world.post("/v1/messages", streamed).await);
    let delta = &events[events.len() - 2]["delta"];
    assert_eq!(delta, &json!({"stop_reason": "stop_sequence", "stop_sequence": found}));
}

#[tokio::test]
async fn a_conversation_becomes_what_the_template_takes() {
    let world = world();
    // As the same conversation in OpenAI's form is.
    let chat = json!({"model": "fake", "messages": [
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "1\n2"},
        {"role": "assistant", "content": "so", "tool_calls": [
            {"id": "x", "type": "function", "function": {"name": "weather", "arguments": "{\"unit\": \"c\"}"}},
        ]},
        {"role": "tool", "tool_call_id": "x", "content": "Error: none"},
        {"role": "user", "content": "go on"},
    ]});
    let tokens = world.post("/tokenize", chat).await.json()["count"].clone();
    let cache = json!({"type": "ephemeral"});
    let body = json!({
        "model": "fake",
        "system": [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": cache}],
        "messages": [
            {"role": "user", "content": "1"},
            {"role": "user", "content": [{"type": "text", "text": "2"}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "so"},
                {"type": "tool_use", "id": "x", "name": "weather", "input": {"unit": "c"}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "x", "content": [{"type": "text", "text": "none"}], "is_error": true},
                {"type": "text", "text": "go on"},
            ]},
        ],
    });
    let counted = world.post("/v1/messages/count_tokens", body.clone()).await;
    assert_eq!(counted.status, StatusCode::OK, "{}", counted.text);
    assert_eq!(counted.json(), json!({"input_tokens": tokens}));
    let mut body = body;
    body["max_tokens"] = json!(1);
    let usage = world.post("/v1/messages", body).await.json()["usage"].clone();
    assert_eq!(usage["obol"]["tokens"]["prompt"], tokens);
}

#[tokio::test]
async fn an_answer_goes_on_with_the_assistants_last_words() {
    let world = world();
    let count = async |messages: Value| {
        let body = json!({"model": "fake", "messages": messages});
        world.post("/v1/messages/count_tokens", body).await.json()["input_tokens"].as_u64().expect("a count")
    };
    let user = json!({"role": "user", "content": "hello"});
    let anew = count(json!([user])).await;
    // The template's `<|im_start|>assistant\n`, then the words, each byte a token.
    let prefilled = count(json!([user, {"role": "assistant", "content": "He"}])).await;
    assert_eq!(prefilled, anew + 2);
    assert_eq!(count(json!([user, {"role": "assistant", "content": ""}])).await, anew);
}

#[tokio::test]
async fn errors_have_anthropics_shape() {
    let world = world();
    let cases = [
        (json!({"max_tokens": null}), "max_tokens"),
        (json!({"shape": 1}), "shape"),
        (json!({"top_k": "many"}), "top_k"),
        (json!({"thinking": {"type": "enabled", "budget_tokens": 1024}}), "thinking.type"),
        (json!({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}), "tools[0].type"),
        (json!({"tools": [{"name": "weather"}]}), "tools[0].input_schema"),
        (json!({"tool_choice": {"type": "tool", "name": "other"}, "tools": weather()}), "tool_choice"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
            "messages[0].content[0].type",
        ),
        (json!({"messages": [{"role": "assistant", "content": "so "}]}), "messages"),
        (json!({"output_config": {"effort": "low"}}), "output_config.effort"),
        (json!({"max_tokens": 10_000}), "max_tokens"),
    ];
    for (extra, param) in cases {
        let answer = world.post("/v1/messages", hello(extra.clone())).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{extra}: {}", answer.text);
        let body = answer.json();
        assert_eq!(
            (&body["type"], &body["error"]["type"]),
            (&json!("error"), &json!("invalid_request_error"))
        );
        let message = body["error"]["message"].as_str().expect("a message");
        assert!(message.contains(&format!("`{param}`")), "{extra}: {message}");
        assert_eq!(body["request_id"], json!(answer.header("request-id")));
    }
    let threaded = world.post("/v1/messages", hello(json!({"thread": {"type": "create"}}))).await;
    assert_eq!(threaded.json()["error"]["details"]["error_code"], "thread_unsupported_request");
    let unknown = world.post("/v1/messages", hello(json!({"model": "other"}))).await;
    assert_eq!(unknown.status, StatusCode::NOT_FOUND);
    assert_eq!(unknown.json()["error"]["type"], "not_found_error");
    let wrong = world.get("/v1/messages").await;
    assert_eq!(wrong.status, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(wrong.json()["type"], "error");
    let loading = world_with(Options { loading: true, ..Options::default() });
    let refused = loading.post("/v1/messages", hello(json!({}))).await;
    assert_eq!(
        (refused.status.as_u16(), refused.json()["error"]["type"].clone()),
        (529, json!("overloaded_error"))
    );
}

#[tokio::test]
async fn a_key_is_taken_as_anthropics_clients_send_it() {
    let world = world_with(Options { access: guarded(), ..Options::default() });
    let send = |key: Option<&'static str>| {
        let mut request = Request::post("/v1/messages").header("anthropic-version", "2023-06-01");
        if let Some(key) = key {
            request = request.header("x-api-key", key);
        }
        world.send(request.body(Body::from(hello(json!({})).to_string())).expect("a request"))
    };
    for key in [None, Some("sk-obol-wrong")] {
        let refused = send(key).await;
        assert_eq!(refused.status, StatusCode::UNAUTHORIZED, "{}", refused.text);
        assert_eq!(refused.json()["error"]["type"], "authentication_error");
    }
    assert_eq!(send(Some(ADMIN)).await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_stream_that_fails_says_so_in_an_event() {
    let world = world_with(Options { fail_at: Some(3), ..Options::default() });
    let answer = world.post("/v1/messages", hello(json!({"stream": true}))).await;
    let events = events(&answer);
    let last = events.last().expect("events");
    assert_eq!((&last["type"], &last["error"]["type"]), (&json!("error"), &json!("api_error")), "{last}");
    assert!(events.iter().all(|event| event["type"] != "message_stop"));
}
