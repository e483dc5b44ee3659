//! What a bad request gets: OpenAI's error object, with the field named, and a server that lives on.

use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use serde_json::{Value, json};

use crate::http_world::{CONTEXT, Options, World, world, world_with};

/// The chat request that is fine but for `extra`.
fn chat_with(extra: Value) -> Value {
    let mut body = json!({"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2});
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    body
}

/// Checks a 400 of `/v1/chat/completions`, its `param`, and a word of its message.
async fn refuses(world: &World, extra: Value, param: &str, word: &str) {
    let shown = extra.to_string();
    let answer = world.chat(chat_with(extra)).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{shown}: {}", answer.text);
    let error = &answer.json()["error"];
    assert_eq!(error["type"], "invalid_request_error", "{shown}");
    assert_eq!(error["param"], param, "{shown}: {error}");
    assert!(error["message"].as_str().is_some_and(|message| message.contains(word)), "{shown}: {error}");
    assert_eq!(error.as_object().expect("an object").len(), 4, "message, type, param, code");
    assert!(!answer.header("x-request-id").is_empty());
    assert_eq!(answer.header("x-obol-device"), "cpu");
}

#[tokio::test]
async fn each_bad_field_is_named() {
    let world = world();
    for (extra, param, word) in [
        (json!({"model": null}), "model", "required"),
        (json!({"model": 7}), "model", "string"),
        (json!({"messages": null}), "messages", "required"),
        (json!({"messages": []}), "messages", "empty"),
        (json!({"messages": "hi"}), "messages", "array"),
        (json!({"messages": ["hi"]}), "messages[0]", "object"),
        (json!({"messages": [{"content": "hi"}]}), "messages[0].role", "required"),
        (json!({"messages": [{"role": "robot", "content": "hi"}]}), "messages[0].role", "robot"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content", "required"),
        (json!({"messages": [{"role": "user", "content": 5}]}), "messages[0].content", "string"),
        (json!({"messages": [{"role": "user", "content": []}]}), "messages[0].content", "parts"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"},
                {"type": "image_url", "image_url": {"url": "data:,"}}]}]}),
            "messages[0].content[1].type",
            "text only",
        ),
        (json!({"messages": [{"role": "user", "content": "a", "mood": 1}]}), "messages[0].mood", "unknown"),
        (json!({"messages": [{"role": "tool", "content": "a"}]}), "messages[0].tool_call_id", "required"),
        (json!({"max_tokens": 0}), "max_tokens", "from 1"),
        (json!({"max_tokens": -1}), "max_tokens", "from 1"),
        (json!({"max_tokens": 1.5}), "max_tokens", "integer"),
        (json!({"max_tokens": 1e30}), "max_tokens", "integer"),
        (json!({"max_tokens": "9"}), "max_tokens", "integer"),
        (json!({"max_completion_tokens": 3}), "max_completion_tokens", "differ"),
        (json!({"min_tokens": 3}), "min_tokens", "over"),
        (json!({"n": 0}), "n", "from 1 to 16"),
        (json!({"n": 17}), "n", "from 1 to 16"),
        (json!({"temperature": 2.1}), "temperature", "from 0 to 2"),
        (json!({"temperature": "hot"}), "temperature", "number"),
        (json!({"top_p": 0}), "top_p", "over 0"),
        (json!({"top_p": 1.01}), "top_p", "from 0 to 1"),
        (json!({"top_k": -2}), "top_k", "from -1"),
        (json!({"min_p": 2}), "min_p", "from 0 to 1"),
        (json!({"presence_penalty": 3}), "presence_penalty", "from -2 to 2"),
        (json!({"frequency_penalty": -3}), "frequency_penalty", "from -2 to 2"),
        (json!({"repetition_penalty": 0}), "repetition_penalty", "over 0"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias.x", "token ids"),
        (json!({"logit_bias": {"5": 101}}), "logit_bias.5", "from -100 to 100"),
        (json!({"logit_bias": {"99999999": 1}}), "logit_bias.99999999", "not a token id"),
        (json!({"logit_bias": [1]}), "logit_bias", "object"),
        (json!({"stop": ""}), "stop", "bytes"),
        (json!({"stop": 1}), "stop", "string"),
        (json!({"stop": ["a", 1]}), "stop[1]", "string"),
        (json!({"stop": vec!["a"; 17]}), "stop", "16"),
        (json!({"stop_token_ids": ["a"]}), "stop_token_ids[0]", "token id"),
        (json!({"seed": 1.5}), "seed", "integer"),
        (json!({"top_logprobs": 3}), "top_logprobs", "logprobs: true"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs", "from 0 to 20"),
        (json!({"logprobs": 3}), "logprobs", "boolean"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options", "stream: true"),
        (json!({"stream": "yes"}), "stream", "boolean"),
        (json!({"stream": true, "stream_options": {"x": 1}}), "stream_options.x", "unknown"),
        (json!({"user": "u".repeat(600)}), "user", "characters"),
        (json!({"metadata": {"a": 1}}), "metadata.a", "string"),
        (json!({"metadata": {"a": "v".repeat(513)}}), "metadata.a", "512"),
        (json!({"metadata": {("k".repeat(65)): "v"}}), "metadata", "64"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].function", "required"),
        (json!({"tool_choice": "required"}), "tool_choice", "no `tools`"),
        (json!({"response_format": {"type": "xml"}}), "response_format.type", "text"),
        (json!({"store": true}), "store", "stored"),
        (json!({"modalities": ["text", "audio"]}), "modalities", "text"),
        (json!({"reasoning_effort": "high"}), "reasoning_effort", "effort"),
        (json!({"service_tier": "batch"}), "service_tier", "flex"),
        (json!({"max_token": 5}), "max_token", "unknown field"),
        (json!({"max_token": null}), "max_token", "unknown field"),
    ] {
        refuses(&world, extra, param, word).await;
    }
    let pairs: serde_json::Map<String, Value> = (0..17).map(|i| (format!("k{i}"), json!("v"))).collect();
    refuses(&world, json!({"metadata": pairs}), "metadata", "16").await;
    assert_eq!(world.engine.stats().waiting + world.engine.stats().running, 0);
}

#[tokio::test]
async fn completions_name_their_fields_too() {
    let world = world();
    for (extra, param) in [
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": 5}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": ["a", 5]}), "prompt[1]"),
        (json!({"prompt": ["a", ""]}), "prompt"),
        (json!({"prompt": [[1], []]}), "prompt[1]"),
        (json!({"prompt": vec!["a"; 129]}), "prompt"),
        (json!({"prompt": [1, -2]}), "prompt[1]"),
        (json!({"prompt": [[1, 99999]]}), "prompt[0][1]"),
        (json!({"prompt": [{"a": 1}]}), "prompt[0]"),
        (json!({"echo": true, "logprobs": 0, "stream": true}), "echo"),
        (json!({"echo": "yes"}), "echo"),
        (json!({"suffix": "x"}), "suffix"),
        (json!({"best_of": 2, "n": 3}), "best_of"),
        (json!({"best_of": 2, "stream": true}), "best_of"),
        (json!({"best_of": 99}), "best_of"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"max_completion_tokens": 4}), "max_completion_tokens"),
    ] {
        let mut body = json!({"model": "fake", "prompt": "hi", "max_tokens": 2});
        body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        let answer = world.post("/v1/completions", body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{extra}: {}", answer.text);
        assert_eq!(answer.json()["error"]["param"], param, "{extra}: {}", answer.text);
    }
}

#[tokio::test]
async fn lengths_over_the_context_name_both() {
    let world = world();
    let long = "x".repeat(CONTEXT + 50);
    let answer = world.chat(chat_with(json!({"messages": [{"role": "user", "content": long}]}))).await;
    let error = answer.json()["error"].clone();
    assert_eq!((answer.status, &error["code"]), (StatusCode::BAD_REQUEST, &json!("context_length_exceeded")));
    assert_eq!(error["param"], "messages");
    let message = error["message"].as_str().expect("a message");
    assert!(message.contains("maximum context length is 256 tokens"), "{message}");
    let counted =
        world.post("/tokenize", json!({"messages": [{"role": "user", "content": long}]})).await.json();
    assert!(message.contains(&format!("{} tokens", counted["count"])), "{message}");
    for huge in [CONTEXT as u64, u64::from(u32::MAX)] {
        let answer = world.chat(chat_with(json!({"max_tokens": huge}))).await;
        let error = answer.json()["error"].clone();
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{error}");
        assert_eq!(
            (&error["code"], &error["param"]),
            (&json!("context_length_exceeded"), &json!("max_tokens"))
        );
    }
    // Left out: all that remains.
    let prompt = "x".repeat(CONTEXT - 9);
    let whole = world.post("/v1/completions", json!({"model": "fake", "prompt": prompt})).await;
    assert_eq!(whole.json()["usage"]["total_tokens"], CONTEXT, "{}", whole.text);
}

#[tokio::test]
async fn error_bodies() {
    let world = world();
    let mut shown = Vec::new();
    let mut show = |name: &str, status: StatusCode, body: Value| {
        shown.push(json!({"case": name, "status": status.as_u16(), "body": body}));
    };
    for (name, body) in [
        ("empty body", Body::empty()),
        ("broken JSON", Body::from("{\"model\": ")),
        ("not an object", Body::from("[1]")),
        ("invalid UTF-8", Body::from(&b"{\"model\": \"\xff\xfe\"}"[..])),
        ("nested too deep", Body::from("[".repeat(500))),
    ] {
        let answer = world.post_text("/v1/chat/completions", body).await;
        show(name, answer.status, answer.json());
    }
    let answer = world.chat(chat_with(json!({"model": "gpt-9"}))).await;
    show("unknown model", answer.status, answer.json());
    let answer = world.chat(chat_with(json!({"max_token": 1}))).await;
    show("unknown field", answer.status, answer.json());
    let answer = world.get("/v1/nothing").await;
    show("unknown path", answer.status, answer.json());
    let answer = world.get("/v1/requests/nothing").await;
    show("unknown receipt", answer.status, answer.json());
    let answer = world.get("/v1/chat/completions").await;
    assert_eq!(answer.header("allow"), "POST");
    show("wrong method", answer.status, answer.json());
    let answer = world.get("/v1/requests/%ff").await;
    show("path that is not UTF-8", answer.status, answer.json());
    let request =
        Request::post("/v1/completions").header("x-obol-team", "t".repeat(200)).body(Body::from("{}"));
    let answer = world.send(request.expect("a request")).await;
    show("long tag", answer.status, answer.json());
    insta::assert_json_snapshot!("errors", shown);
}

#[tokio::test]
async fn a_body_over_the_limit_is_413() {
    let world = world();
    let big = chat_with(json!({"messages": [{"role": "user", "content": "x".repeat(20 << 20)}]})).to_string();
    let announced = Request::post("/v1/chat/completions").header("content-length", big.len());
    for request in [announced, Request::post("/v1/chat/completions")] {
        let answer = world.send(request.body(Body::from(big.clone())).expect("a request")).await;
        assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
        assert_eq!(answer.json()["error"]["code"], "request_too_large");
    }
}

#[tokio::test]
async fn unknown_fields_can_be_let_through() {
    let mut options = Options::default();
    options.http.unknown_fields = obol::config::UnknownFields::Ignore;
    let world = world_with(options);
    let answer = world.chat(chat_with(json!({"max_token": 5, "chat_template_kwargs": {}}))).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    let answer = world.chat(chat_with(json!({"tools": [1]}))).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST, "a known field that is not honoured is still refused");
}

#[tokio::test]
async fn a_full_queue_is_429_at_once() {
    let world = world_with(Options { queue_depth: 0, ..Options::default() });
    let answer = world.chat(chat_with(json!({}))).await;
    assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(answer.header("retry-after"), "1");
    let error = &answer.json()["error"];
    assert_eq!((&error["type"], &error["code"]), (&json!("rate_limit_error"), &json!("queue_full")));
}

#[tokio::test]
async fn an_engine_failure_is_500_and_free_and_the_next_request_works() {
    for options in [
        Options { fail_at: Some(2), ..Options::default() },
        Options { panic_at: Some(2), ..Options::default() },
    ] {
        let world = world_with(options);
        let answer = world.chat(chat_with(json!({"max_tokens": 5}))).await;
        assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR, "{}", answer.text);
        assert_eq!(answer.json()["error"]["type"], "server_error");
        let receipt = world.get(&format!("/v1/requests/{}", answer.header("x-request-id"))).await.json();
        assert_eq!(receipt["status"], "error", "settled before the error went out");
        let next = world.chat(chat_with(json!({}))).await;
        assert_eq!(next.status, StatusCode::OK, "{}", next.text);
    }
}

#[tokio::test]
async fn an_engine_failure_in_a_stream_is_an_error_event_without_done() {
    let world = world_with(Options { fail_at: Some(3), ..Options::default() });
    let answer = world.chat(chat_with(json!({"max_tokens": 5, "stream": true}))).await;
    assert_eq!(answer.status, StatusCode::OK);
    let events = answer.events();
    assert_eq!(events.last().expect("events")["error"]["type"], "server_error", "{events:?}");
    assert!(!answer.text.contains("[DONE]"));
}

#[tokio::test]
async fn an_idempotency_key_runs_once() {
    let world = world();
    let send = async |key: &str| {
        let request = Request::post("/v1/chat/completions").header("idempotency-key", key);
        world.send(request.body(Body::from(chat_with(json!({})).to_string())).expect("a request")).await
    };
    let first = send("once").await;
    assert_eq!(first.status, StatusCode::OK);
    let again = send("once").await;
    assert_eq!(again.status, StatusCode::CONFLICT);
    let error = &again.json()["error"];
    assert_eq!(error["code"], "idempotency_key_reused");
    assert!(
        error["message"].as_str().is_some_and(|text| text.contains(first.header("x-request-id"))),
        "{error}"
    );
    assert_eq!(send("twice").await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_template_that_refuses_is_a_400() {
    let world = world();
    let messages = json!([{"role": "user", "content": "raise"}]);
    refuses(&world, json!({"messages": messages}), "messages", "no such tool").await;
}

#[tokio::test]
async fn without_a_ledger_nothing_is_promised() {
    let world = world_with(Options { step: Duration::from_millis(10), ..Options::default() });
    let stream = world.chat(chat_with(json!({"max_tokens": 30, "stream": true})));
    let close = async {
        tokio::time::sleep(Duration::from_millis(80)).await;
        let ledger = world.ledger.clone();
        tokio::task::spawn_blocking(move || ledger.close()).await.expect("no panic").expect("a clean end");
    };
    let (stream, ()) = tokio::join!(stream, close);
    let events = stream.events();
    assert_eq!(events.last().expect("events")["error"]["code"], "ledger_unavailable", "{}", stream.text);
    assert!(!stream.text.contains("[DONE]"));
    for answer in [world.chat(chat_with(json!({}))).await, world.get("/ready").await] {
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(answer.json()["error"]["code"], "ledger_unavailable");
        assert_eq!(answer.header("retry-after"), "5");
    }
}
