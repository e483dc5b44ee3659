//! Probes, metrics, draining, loading: what operators and machines read.

use std::time::Duration;

use axum::http::StatusCode;
use serde_json::{Value, json};

use crate::http_world::{Options, World, world, world_with};

fn hi(extra: Value) -> Value {
    let mut body = json!({"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3});
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    body
}

/// The value of a sample in Prometheus' text: name with labels as written.
fn sample(text: &str, name: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no `{name}` in\n{text}")).parse().expect("a number")
}

#[tokio::test]
async fn while_loading_only_probes_are_answered() {
    let world = world_with(Options { loading: true, ..Options::default() });
    let answer = world.get("/health").await;
    assert_eq!((answer.status, &answer.json()["status"]), (StatusCode::OK, &json!("loading")));
    for path in ["/ready", "/v1/models", "/metrics", "/v1/tasks/x"] {
        let answer = world.get(path).await;
        let body = answer.json();
        assert_eq!(
            (answer.status, &body["error"]["code"]),
            (StatusCode::SERVICE_UNAVAILABLE, &json!("loading"))
        );
        assert_eq!(answer.header("retry-after"), "1");
        assert!(answer.headers.contains_key("x-request-id"));
    }
    assert_eq!(world.get("/v1/requests/x").await.status, StatusCode::NOT_FOUND, "the books are open");
}

#[tokio::test]
async fn a_ready_server_says_so_and_a_draining_one_refuses() {
    let world = world_with(Options { step: Duration::from_millis(20), ..Options::default() });
    assert_eq!(world.get("/health").await.json()["status"], "ok");
    assert_eq!(world.get("/ready").await.json()["status"], "ready");
    let running = world.chat(hi(json!({"max_tokens": 10})));
    let drain = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        world.app.drain();
        let refused = world.chat(hi(json!({}))).await;
        assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(refused.json()["error"]["code"], "draining");
        assert_eq!(refused.header("retry-after"), "5");
        assert_eq!(world.get("/ready").await.json()["error"]["code"], "draining");
        assert_eq!(world.get("/health").await.status, StatusCode::OK);
    };
    let (answer, ()) = tokio::join!(running, drain);
    assert_eq!(answer.status, StatusCode::OK, "what runs goes on: {}", answer.text);
    assert_eq!(answer.json()["usage"]["completion_tokens"], 10);
}

#[tokio::test]
async fn what_still_runs_at_the_deadline_is_told_so() {
    let world = world_with(Options { step: Duration::from_millis(20), ..Options::default() });
    let stream = world.chat(hi(json!({"max_tokens": 100, "stream": true})));
    let whole = world.chat(hi(json!({"max_tokens": 100})));
    let engine = world.engine.clone();
    let stop = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        tokio::task::spawn_blocking(move || engine.shutdown()).await.expect("a stopped engine");
    };
    let (stream, whole, ()) = tokio::join!(stream, whole, stop);
    assert_eq!(stream.events().last().expect("events")["error"]["code"], "draining", "{}", stream.text);
    assert!(!stream.text.contains("[DONE]"));
    assert_eq!(
        (whole.status, &whole.json()["error"]["code"]),
        (StatusCode::SERVICE_UNAVAILABLE, &json!("draining"))
    );
    let receipt = world.get(&format!("/v1/requests/{}", whole.header("x-request-id"))).await.json();
    assert_eq!(receipt["status"], "cancelled");
    assert_eq!(world.get("/health").await.status, StatusCode::SERVICE_UNAVAILABLE);
}

async fn metrics(world: &World) -> String {
    let answer = world.get("/metrics").await;
    assert_eq!(answer.header("content-type"), "text/plain; version=0.0.4; charset=utf-8");
    answer.text
}

#[tokio::test]
async fn metrics_follow_the_receipts() {
    let world = world();
    let (mut completion, mut seconds) = (0, 0.0);
    for n in [1, 3] {
        let answer = world.chat(hi(json!({"n": n}))).await.json();
        let spent = answer["usage"]["obol"]["gpu_seconds"].as_str().expect("a decimal");
        seconds += spent.parse::<f64>().expect("a decimal");
        completion += answer["usage"]["completion_tokens"].as_u64().expect("a count");
    }
    // The books' figures come with the commit, the engine's when it next says them; a scrape right behind an answer
    // may be before either.
    let succeeded = "vllm:request_success_total{model_name=\"fake/model\",finished_reason=\"length\"}";
    let labels = "{model_name=\"fake/model\"}";
    let running = format!("vllm:num_requests_running{labels}");
    let mut text = metrics(&world).await;
    while sample(&text, succeeded) < 2.0 || sample(&text, &running) > 0.0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
        text = metrics(&world).await;
    }
    assert_eq!(sample(&text, &format!("vllm:num_requests_waiting{labels}")), 0.0);
    assert_eq!(sample(&text, &format!("vllm:kv_cache_usage_perc{labels}")), 0.0);
    assert_eq!(sample(&text, &format!("vllm:time_to_first_token_seconds_count{labels}")), 2.0);
    assert_eq!(sample(&text, &format!("vllm:e2e_request_latency_seconds_count{labels}")), 2.0);
    assert_eq!(sample(&text, &format!("vllm:request_generation_tokens_sum{labels}")), completion as f64);
    let gaps = completion as f64 - 4.0;
    assert_eq!(sample(&text, &format!("vllm:inter_token_latency_seconds_count{labels}")), gaps);
    assert_eq!(sample(&text, succeeded), 2.0);
    assert_eq!(sample(&text, &format!("vllm:generation_tokens_total{labels}")), completion as f64);
    let charged = |class: &str| {
        sample(
            &text,
            &format!("obol_gpu_seconds_total{{model=\"fake/model\",class=\"{class}\",device=\"cpu\"}}"),
        )
    };
    assert!((charged("prefill") + charged("decode") - seconds).abs() < 1e-9);
    assert!(sample(&text, "obol_cost_total{model=\"fake/model\",currency=\"USD\"}") > 0.0);
    assert!(text.contains("vllm:time_to_first_token_seconds_bucket{model_name=\"fake/model\",le=\"0.001\"}"));
    assert!(text.contains("vllm:time_to_first_token_seconds_bucket{model_name=\"fake/model\",le=\"2560\"}"));
    assert_eq!(sample(&text, "obol_ledger_conservation_error_ns{device=\"cpu\"}"), 0.0);
    assert!(sample(&text, "obol_house_seconds_total{account=\"house:idle\",device=\"cpu\"}") > 0.0);
    // Every family is described once, and every name is one that Prometheus takes.
    let mut names: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
    names.sort_unstable();
    let families = names.len();
    names.dedup();
    assert_eq!(names.len(), families, "{names:?}");
}

#[tokio::test]
async fn idle_waits_for_answers_under_way() {
    let world = world_with(Options { step: Duration::from_millis(10), ..Options::default() });
    world.app.idle().await;
    let answer = world.chat(hi(json!({"max_tokens": 20, "stream": true})));
    let start = std::time::Instant::now();
    let idle = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        world.app.idle().await;
        start.elapsed()
    };
    let (answer, waited) = tokio::join!(answer, idle);
    assert!(answer.text.contains("[DONE]"));
    assert!(waited >= Duration::from_millis(200), "20 steps take longer than {waited:?}");
}
