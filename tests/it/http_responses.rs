//! OpenAI's responses over the fake model: shapes, events, what is kept and for whom. Its context is too small to describe
//! a tool: calls are in `tests/clients/test_responses.py`.

use axum::body::Body;
use axum::http::{Method, Request, StatusCode};
use obol::config::Retention;
use serde_json::{Value, json};

use crate::http_world::{ADMIN, Answer, Options, World, guarded, world, world_with};

fn hello(extra: Value) -> Value {
    let mut body = json!({"model": "fake/model", "max_output_tokens": 8, "seed": 11, "input": "hello"});
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    body
}

/// Events by name; each is named as its type says, and they are numbered from 0.
fn events(answer: &Answer) -> Vec<Value> {
    let frames = answer.text.split("\n\n").filter(|frame| !frame.is_empty()).enumerate();
    let event = |(number, frame): (usize, &str)| {
        let (name, data) = frame.split_once('\n').expect("a name and data");
        let data: Value =
            serde_json::from_str(data.strip_prefix("data: ").expect("data")).expect("an event in JSON");
        assert_eq!(name.strip_prefix("event: "), data["type"].as_str(), "{frame}");
        assert_eq!(data["sequence_number"], number, "{frame}");
        data
    };
    frames.map(event).collect()
}

fn text_of(response: &Value) -> &str {
    response["output"][0]["content"][0]["text"].as_str().expect("text")
}

async fn send(world: &World, method: Method, path: &str, key: Option<&str>) -> Answer {
    let mut request = Request::builder().method(method).uri(path);
    if let Some(key) = key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    world.send(request.body(Body::empty()).expect("a request")).await
}

#[tokio::test]
async fn a_response_has_its_shape_its_settings_and_the_receipt() {
    let world = world();
    let asked = json!({
        "instructions": "so", "user": "ada", "metadata": {"run": "7"}, "temperature": 0.5, "tool_choice": "none",
        "tools": [{"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": true}],
        "text": {"verbosity": "medium"}, "prompt_cache_key": "k", "max_tool_calls": 3, "store": false, "service_tier": "flex",
    });
    let answer = world.post("/v1/responses", hello(asked.clone())).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    let body = answer.json();
    let request = answer.header("x-request-id");
    assert_eq!(body["id"], format!("resp_{request}"));
    assert_eq!((&body["object"], &body["model"]), (&json!("response"), &json!("fake/model")));
    assert_eq!((&body["status"], &body["error"]), (&json!("incomplete"), &Value::Null));
    assert_eq!(body["incomplete_details"], json!({"reason": "max_output_tokens"}));
    for name in ["instructions", "user", "metadata", "temperature", "tool_choice", "tools", "max_tool_calls"]
    {
        assert_eq!(body[name], asked[name], "{name}");
    }
    assert_eq!(body["text"], json!({"format": {"type": "text"}, "verbosity": "medium"}));
    assert_eq!(body["reasoning"], json!({"effort": null, "summary": null}));
    for (name, default) in [("top_p", json!(1.0)), ("truncation", json!("disabled")), ("store", json!(false))]
    {
        assert_eq!(body[name], default, "{name}");
    }
    assert!(body["created_at"].as_u64() <= body["completed_at"].as_u64());
    let [message] = body["output"].as_array().expect("items").as_slice() else { panic!("{body}") };
    assert_eq!(message["id"], format!("msg_{request}_0"));
    assert_eq!((&message["type"], &message["role"]), (&json!("message"), &json!("assistant")));
    assert_eq!(message["status"], "incomplete");
    assert_eq!(message["content"][0]["annotations"], json!([]));
    assert!(!text_of(&body).is_empty());
    let (usage, receipt) = (&body["usage"], &body["usage"]["obol"]);
    assert_eq!(usage["output_tokens"], 8);
    assert_eq!(usage["input_tokens"], receipt["tokens"]["prompt"]);
    assert_eq!(usage["input_tokens_details"]["cached_tokens"], receipt["tokens"]["cached"]);
    assert_eq!((&receipt["user"], &receipt["service_tier"]), (&json!("ada"), &json!("flex")));
    let booked = world.get("/v1/requests?endpoint=/v1/responses").await.json();
    assert_eq!(booked["data"], json!([receipt]));
    assert_eq!(answer.header("x-obol-cost"), receipt["cost"]["total"].as_str().expect("a decimal"));
    let id = body["id"].as_str().expect("an id");
    assert_eq!(world.get(&format!("/v1/requests/{id}")).await.json(), *receipt);
    assert_eq!(world.get(&format!("/v1/responses/{id}")).await.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_stream_tells_the_same_in_events() {
    let world = world();
    let whole = world.post("/v1/responses", hello(json!({}))).await.json();
    let streamed = world.post("/v1/responses", hello(json!({"stream": true}))).await;
    assert_eq!(streamed.status, StatusCode::OK, "{}", streamed.text);
    let events = events(&streamed);
    let mut kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().expect("a type")).collect();
    kinds.dedup();
    assert_eq!(
        kinds,
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]
    );
    let begun = &events[0]["response"];
    assert_eq!((&begun["status"], &begun["output"]), (&json!("in_progress"), &json!([])));
    let response = &events[events.len() - 1]["response"];
    assert_eq!(begun["id"], response["id"]);
    let deltas: String = events.iter().filter_map(|event| event["delta"].as_str()).collect();
    assert_eq!((deltas.as_str(), text_of(response)), (text_of(&whole), text_of(&whole)));
    let item = &response["output"][0];
    for event in &events[2..events.len() - 1] {
        assert_eq!(event["output_index"], 0);
        assert_eq!(event.get("item_id").unwrap_or(&item["id"]), &item["id"]);
    }
    assert_eq!(events[events.len() - 2]["item"], *item);
    assert_eq!(events[events.len() - 3]["part"], item["content"][0]);
    let id = streamed.header("x-request-id");
    let receipt = world.get(&format!("/v1/requests/{id}")).await.json();
    assert_eq!(receipt, response["usage"]["obol"]);
    // It was kept before it was told to be complete, as it was told.
    let id = response["id"].as_str().expect("an id");
    assert_eq!(world.get(&format!("/v1/responses/{id}")).await.json(), *response);
}

#[tokio::test]
async fn a_thought_is_an_item_of_its_own() {
    let template = crate::http_tokens::thinking_template();
    let world = world_with(Options { template, ..Options::default() });
    let whole = world.post("/v1/responses", hello(json!({}))).await.json();
    let item = &whole["output"][0];
    assert_eq!((&item["type"], &item["status"]), (&json!("reasoning"), &json!("incomplete")), "{whole}");
    assert_eq!((&item["summary"], &item["content"][0]["type"]), (&json!([]), &json!("reasoning_text")));
    let streamed = world.post("/v1/responses", hello(json!({"stream": true}))).await;
    let events = events(&streamed);
    let mut kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().expect("a type")).collect();
    kinds.dedup();
    assert_eq!(
        kinds[2..],
        [
            "response.output_item.added",
            "response.content_part.added",
            "response.reasoning_text.delta",
            "response.reasoning_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]
    );
    let deltas: String = events.iter().filter_map(|event| event["delta"].as_str()).collect();
    assert_eq!(deltas, text_of(&whole));
    for response in [&whole, &events[events.len() - 1]["response"]] {
        assert_eq!(response["usage"]["output_tokens_details"], json!({"reasoning_tokens": 8}));
    }
    // What was thought is sent back as it came, or not thought at all.
    let again =
        json!({"input": [{"role": "user", "content": "hello"}, item, {"role": "user", "content": "so?"}]});
    assert_eq!(world.post("/v1/responses", hello(again)).await.status, StatusCode::OK);
    let plain = hello(json!({"reasoning": {"effort": "none"}, "include": ["message.output_text.logprobs"]}));
    let plain = world.post("/v1/responses", plain).await.json();
    assert_eq!(plain["output"][0]["type"], "message", "{plain}");
    assert_eq!(plain["usage"]["output_tokens_details"], json!({"reasoning_tokens": 0}));
    assert_eq!(plain["reasoning"], json!({"effort": "none", "summary": null}));
    let scored = hello(json!({"include": ["message.output_text.logprobs"]}));
    assert_eq!(world.post("/v1/responses", scored).await.json()["error"]["param"], "include");
}

#[tokio::test]
async fn log_probabilities_are_included_where_asked_for() {
    let world = world();
    let asked = json!({"include": ["message.output_text.logprobs"], "top_logprobs": 2});
    let whole = world.post("/v1/responses", hello(asked.clone())).await.json();
    let logprobs = whole["output"][0]["content"][0]["logprobs"].as_array().expect("log-probabilities");
    assert_eq!(logprobs.len(), 8);
    assert_eq!(logprobs[0]["top_logprobs"].as_array().expect("alternatives").len(), 2);
    let mut streamed = hello(asked);
    streamed["stream"] = json!(true);
    let events = events(&world.post("/v1/responses", streamed).await);
    let deltas = events.iter().filter(|event| event["type"] == "response.output_text.delta");
    let told: Vec<&Value> = deltas.flat_map(|event| event["logprobs"].as_array().expect("a list")).collect();
    assert_eq!(told, logprobs.iter().collect::<Vec<_>>());
    let done = events.iter().find(|event| event["type"] == "response.output_text.done").expect("an event");
    assert_eq!(done["logprobs"], json!(logprobs));
}

#[tokio::test]
async fn a_conversation_becomes_what_the_template_takes() {
    let world = world();
    // As the same conversation in the form of chat completions is.
    let chat = json!({"model": "fake", "messages": [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "1\n2"},
        {"role": "assistant", "content": "so\nyes", "tool_calls": [
            {"id": "x", "type": "function", "function": {"name": "weather", "arguments": "{\"unit\": \"c\"}"}},
        ]},
        {"role": "tool", "tool_call_id": "x", "content": "none"},
        {"role": "system", "content": "short"},
    ]});
    let tokens = world.post("/tokenize", chat).await.json()["count"].clone();
    let body = json!({"model": "fake", "instructions": "be", "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "1"}, {"type": "input_text", "text": "2"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "status": "completed", "id": "msg_1",
            "content": [{"type": "output_text", "text": "so", "annotations": [], "logprobs": []}]},
        {"type": "message", "role": "assistant", "content": "yes"},
        {"type": "function_call", "call_id": "x", "name": "weather", "arguments": "{\"unit\": \"c\"}"},
        {"type": "function_call_output", "call_id": "x", "output": [{"type": "input_text", "text": "none"}]},
        {"role": "developer", "content": "short"},
    ]});
    let counted = world.post("/v1/responses/input_tokens", body.clone()).await;
    assert_eq!(counted.json(), json!({"object": "response.input_tokens", "input_tokens": tokens}));
    let mut body = body;
    body["max_output_tokens"] = json!(1);
    let response = world.post("/v1/responses", body).await.json();
    assert_eq!(response["usage"]["input_tokens"], tokens, "{response}");
    // They are listed as they were sent, newest first, each with an id.
    let path = format!("/v1/responses/{}/input_items", response["id"].as_str().expect("an id"));
    let page = world.get(&format!("{path}?limit=3")).await.json();
    let kinds = |page: &Value| -> Vec<Value> {
        page["data"].as_array().expect("items").iter().map(|item| item["type"].clone()).collect()
    };
    assert_eq!(kinds(&page), ["message", "function_call_output", "function_call"]);
    assert_eq!((&page["has_more"], &page["last_id"]), (&json!(true), &page["data"][2]["id"]));
    let last = page["last_id"].as_str().expect("an id");
    let rest = world.get(&format!("{path}?after={last}")).await.json();
    assert_eq!(kinds(&rest), ["message", "message", "reasoning", "message"]);
    assert_eq!((&rest["has_more"], &rest["data"][1]["id"]), (&json!(false), &json!("msg_1")));
    let all = world.get(&format!("{path}?order=asc&limit=100")).await.json();
    assert_eq!(all["data"][0]["content"][1], json!({"type": "input_text", "text": "2"}));
    for (query, param) in
        [("limit=0", "limit"), ("order=up", "order"), ("after=x", "after"), ("page=1", "page")]
    {
        let refused = world.get(&format!("{path}?{query}")).await;
        assert_eq!(refused.status, StatusCode::BAD_REQUEST);
        assert_eq!(refused.json()["error"]["param"], param);
    }
}

#[tokio::test]
async fn a_conversation_goes_on_until_a_part_of_it_is_deleted() {
    let world = world();
    let first = world.post("/v1/responses", hello(json!({"instructions": "so"}))).await.json();
    let id = |response: &Value| response["id"].as_str().expect("an id").to_owned();
    let go_on = json!({"previous_response_id": id(&first), "input": "and?"});
    let second = world.post("/v1/responses", hello(go_on)).await.json();
    assert_eq!(second["previous_response_id"], first["id"]);
    // The instructions of the first do not carry over.
    let said = json!({"model": "fake", "messages": [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": text_of(&first)},
        {"role": "user", "content": "and?"},
    ]});
    let tokens = world.post("/tokenize", said).await.json()["count"].clone();
    assert_eq!(second["usage"]["input_tokens"], tokens);
    let third = json!({"previous_response_id": id(&second), "input": "?", "max_output_tokens": 1});
    assert_eq!(world.post("/v1/responses", hello(third.clone())).await.status, StatusCode::OK);
    let path = format!("/v1/responses/{}", id(&first));
    let cancelled = send(&world, Method::POST, &format!("{path}/cancel"), None).await;
    assert_eq!(cancelled.status, StatusCode::BAD_REQUEST, "{}", cancelled.text);
    let deleted = send(&world, Method::DELETE, &path, None).await;
    assert_eq!(deleted.json(), json!({"id": id(&first), "object": "response", "deleted": true}));
    for (method, path) in [
        (Method::GET, path.clone()),
        (Method::DELETE, path.clone()),
        (Method::GET, format!("{path}/input_items")),
        (Method::POST, format!("{path}/cancel")),
    ] {
        assert_eq!(send(&world, method, &path, None).await.status, StatusCode::NOT_FOUND);
    }
    let refused = world.post("/v1/responses", hello(third)).await;
    assert_eq!(refused.status, StatusCode::BAD_REQUEST);
    let error = &refused.json()["error"];
    assert_eq!(error["code"], "previous_response_not_found");
    assert_eq!(error["param"], "previous_response_id");
    assert!(error["message"].as_str().expect("a message").contains(&id(&first)), "{error}");
}

#[tokio::test]
async fn what_is_kept_is_its_keys() {
    let world = world_with(Options { access: guarded(), ..Options::default() });
    let make = async || {
        let made = world.with_key(ADMIN, "/key/generate", Some(json!({"team_id": "one"}))).await.json();
        made["key"].as_str().expect("a key").to_owned()
    };
    let (ours, other) = (make().await, make().await);
    let response = world.with_key(&ours, "/v1/responses", Some(hello(json!({})))).await.json();
    let id = response["id"].as_str().expect("an id");
    let path = format!("/v1/responses/{id}");
    for stranger in [other.as_str(), ADMIN] {
        assert_eq!(world.with_key(stranger, &path, None).await.status, StatusCode::NOT_FOUND);
        let deleted = send(&world, Method::DELETE, &path, Some(stranger)).await;
        assert_eq!(deleted.status, StatusCode::NOT_FOUND);
        let go_on = hello(json!({"previous_response_id": id}));
        let refused = world.with_key(stranger, "/v1/responses", Some(go_on)).await;
        assert_eq!(refused.json()["error"]["code"], "previous_response_not_found");
    }
    assert_eq!(world.with_key(&ours, &path, None).await.json(), response);
}

#[tokio::test]
async fn a_server_that_keeps_nothing_says_so() {
    let retention = Retention { days: 0, bytes: 1 << 20 };
    let world = world_with(Options { retention, ..Options::default() });
    let response = world.post("/v1/responses", hello(json!({}))).await.json();
    assert_eq!(response["store"], json!(false));
    let id = response["id"].as_str().expect("an id");
    assert_eq!(world.get(&format!("/v1/responses/{id}")).await.status, StatusCode::NOT_FOUND);
    let refused = world.post("/v1/responses", hello(json!({"store": true}))).await;
    assert_eq!(refused.json()["error"]["param"], "store");
}

#[tokio::test]
async fn what_is_not_honoured_is_refused_by_name() {
    let world = world();
    let tool = json!([{"type": "function", "name": "add", "parameters": {"type": "object"}}]);
    let input = |item: Value| json!({"input": [item]});
    let cases = [
        (json!({"input": null}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": 7}), "input"),
        (json!({"input": "x".repeat(400), "max_output_tokens": null}), "input"),
        (json!({"max_output_tokens": 10_000}), "max_output_tokens"),
        (json!({"max_output_tokens": 0}), "max_output_tokens"),
        (json!({"max_tokens": 4}), "max_tokens"),
        (json!({"background": true}), "background"),
        (json!({"truncation": "auto"}), "truncation"),
        (json!({"service_tier": "scale"}), "service_tier"),
        (json!({"conversation": "conv_1"}), "conversation"),
        (json!({"prompt": {"id": "p"}}), "prompt"),
        (json!({"include": ["everything"]}), "include[0]"),
        (json!({"top_logprobs": 3}), "top_logprobs"),
        (json!({"include": ["message.output_text.logprobs"], "tools": tool}), "include"),
        (json!({"reasoning": {"effort": "high"}}), "reasoning.effort"),
        (json!({"text": {"format": {"type": "xml"}}}), "text.format.type"),
        (json!({"text": {"format": {"type": "json_schema", "name": "x"}}}), "text.format.schema"),
        (
            json!({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "no"}}}}),
            "text.format",
        ),
        (json!({"text": {"format": {"type": "json_object"}}, "regex": "a"}), "regex"),
        (json!({"text": {"format": {"type": "json_object"}}, "tools": tool}), "text.format"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (json!({"tools": tool, "tool_choice": {"type": "function", "name": "sub"}}), "tool_choice"),
        (
            json!({"tools": tool, "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "sub"}]}}),
            "tool_choice.tools[0].name",
        ),
        (json!({"tools": tool, "tool_choice": {"type": "mcp"}}), "tool_choice.type"),
        (json!({"stream_options": {"include_obfuscation": true}}), "stream_options"),
        (json!({"previous_response_id": "resp_1"}), "previous_response_id"),
        (input(json!({"type": "item_reference", "id": "x"})), "input[0].type"),
        (input(json!({"type": "computer_call"})), "input[0].type"),
        (input(json!({"role": "tool", "content": "x"})), "input[0].role"),
        (input(json!({"role": "user", "content": [{"type": "input_image"}]})), "input[0].content[0].type"),
        (input(json!({"type": "function_call", "name": "a", "arguments": "{}"})), "input[0].call_id"),
        (input(json!({"type": "reasoning", "encrypted_content": "x"})), "input[0].encrypted_content"),
        (json!({"shape": 1}), "shape"),
    ];
    for (extra, param) in cases {
        let answer = world.post("/v1/responses", hello(extra.clone())).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{extra}: {}", answer.text);
        let error = answer.json()["error"].clone();
        assert_eq!(error["type"], "invalid_request_error");
        assert_eq!(error["param"], param, "{extra}: {error}");
    }
}

#[tokio::test]
async fn a_stream_that_fails_says_so_in_its_last_event() {
    let world = world_with(Options { fail_at: Some(3), ..Options::default() });
    let answer = world.post("/v1/responses", hello(json!({"stream": true}))).await;
    let events = events(&answer);
    let last = events.last().expect("events");
    assert_eq!(last["type"], "response.failed", "{last}");
    let response = &last["response"];
    assert_eq!((&response["status"], &response["error"]["code"]), (&json!("failed"), &json!("server_error")));
    let id = response["id"].as_str().expect("an id");
    assert_eq!(world.get(&format!("/v1/responses/{id}")).await.status, StatusCode::NOT_FOUND);
    assert_eq!(world.get(&format!("/v1/requests/{id}")).await.json()["status"], "error");
}

#[tokio::test]
async fn what_cannot_be_kept_is_an_error_and_its_receipt_stands() {
    let world = world();
    let file = rusqlite::Connection::open(world.data_dir.path().join("responses.db")).expect("the file");
    file.execute_batch("DROP TABLE responses").expect("it can be spoiled");
    let whole = world.post("/v1/responses", hello(json!({}))).await;
    assert_eq!(whole.status, StatusCode::INTERNAL_SERVER_ERROR, "{}", whole.text);
    assert_eq!(whole.json()["error"]["code"], "response_not_stored");
    assert_eq!(whole.header("x-should-retry"), "false");
    assert!(!whole.header("x-obol-cost").is_empty(), "it has been charged");
    let streamed = world.post("/v1/responses", hello(json!({"stream": true}))).await;
    let events = events(&streamed);
    let last = events.last().expect("events");
    assert_eq!((&last["type"], &last["response"]["status"]), (&json!("response.failed"), &json!("failed")));
    let message = last["response"]["error"]["message"].as_str().expect("a message");
    for answer in [&whole, &streamed] {
        let id = answer.header("x-request-id");
        assert!(answer.text.contains(&format!("/v1/requests/{id}")), "{message}");
        let receipt = world.get(&format!("/v1/requests/{id}")).await.json();
        assert_eq!((&receipt["status"], &receipt["tokens"]["completion"]), (&json!("length"), &json!(8)));
    }
    let unread = world.get("/v1/responses/resp_1").await;
    assert_eq!(
        (unread.status.as_u16(), &unread.json()["error"]["code"]),
        (503, &json!("responses_unavailable"))
    );
    let unkept = world.post("/v1/responses", hello(json!({"store": false}))).await;
    assert_eq!(unkept.status, StatusCode::OK, "{}", unkept.text);
}
