//! A server of several engines: which one answers, what it says, and that all of them add up.

use axum::http::StatusCode;
use obol::engine::Refused;
use obol::ledger::audit;
use serde_json::{Value, json};

use crate::http_world::{Answer, Options, World, world_with};

fn several(engines: usize) -> World {
    world_with(Options { engines, ..Options::default() })
}

/// A prompt of many blocks that begins like no other one.
async fn complete(world: &World, prompt: &str, more: Value) -> Answer {
    let mut body = json!({"model": "fake", "prompt": prompt, "max_tokens": 3});
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    let answer = world.post("/v1/completions", body).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    answer
}

fn prompt(subject: &str) -> String {
    format!("{subject} {}", "tells of coins and of those who made them. ".repeat(2))
}

#[tokio::test]
async fn requests_are_shared_out_and_a_prefix_stays_where_it_was_computed() {
    let world = several(3);
    let mut homes = Vec::new();
    for subject in ["Lydia", "Croesus", "Athens"] {
        homes.push(complete(&world, &prompt(subject), json!({})).await.header("x-obol-device").to_owned());
    }
    assert_eq!(homes, ["cpu:0", "cpu:1", "cpu:2"], "each takes one of those that nobody has seen");
    for (subject, home) in ["Athens", "Lydia", "Croesus", "Athens"].into_iter().zip([2, 0, 1, 2]) {
        let longer = prompt(subject) + "What then?";
        let stream = json!({"stream": true, "stream_options": {"include_usage": true}});
        for more in [json!({}), stream] {
            let answer = complete(&world, &longer, more).await;
            assert_eq!(answer.header("x-obol-device"), homes[home], "{subject}");
            let id = answer.header("x-request-id").to_owned();
            let receipt = world.get(&format!("/v1/requests/{id}")).await;
            let receipt = receipt.json();
            assert_eq!(receipt["device"], homes[home], "{receipt}");
            assert_eq!(receipt["lines"][0]["device"], homes[home], "{receipt}");
            assert!(receipt["tokens"]["cached"].as_u64().expect("a count") >= 16, "{receipt}");
        }
    }
    world.wait_until_idle();
    let metrics = world.get("/metrics").await.text;
    for device in &homes {
        for name in ["obol_engine_steps_total", "obol_ledger_conservation_error_ns"] {
            assert!(
                metrics.contains(&format!("{name}{{device=\"{device}\"}}")),
                "{name} of {device}: {metrics}"
            );
        }
        let label = format!(
            "obol_gpu_seconds_total{{model=\"fake/model\",class=\"decode\",device=\"{device}\"}} 0.0"
        );
        assert!(metrics.contains(&label), "{device} was used: {metrics}");
    }
    let audit = audit(world.data_dir.path()).expect("a ledger");
    assert!(audit.is_reconciled(), "{audit}");
    let audited: Vec<&str> = audit.devices.keys().map(|(_, device)| device.as_str()).collect();
    assert_eq!(audited, homes);
}

#[tokio::test]
async fn answers_do_not_depend_on_the_replica() {
    let (one, three) = (several(1), several(3));
    for at in 0..6 {
        let prompt = prompt(&format!("Mint {at}"));
        let text = async |world: &World| {
            complete(world, &prompt, json!({"seed": at})).await.json()["choices"][0]["text"].clone()
        };
        assert_eq!(text(&one).await, text(&three).await);
    }
    assert_eq!(one.get("/health").await.header("x-obol-device"), "cpu");
    assert_eq!(three.get("/health").await.header("x-obol-device"), "cpu:0,cpu:1,cpu:2");
}

#[tokio::test]
async fn the_queue_is_one_for_all_engines() {
    let world = world_with(Options { engines: 2, queue_depth: 3, ..Options::default() });
    let engines = world.app.engines();
    let mut seats: Vec<_> = (0..3).map(|_| engines.reserve().expect("a seat")).collect();
    assert_eq!(engines.reserve().map(drop), Err(Refused::QueueFull { waiting: 3 }));
    assert_eq!(world.post("/v1/completions", json!({"model": "fake", "prompt": "a"})).await.status, 429);
    drop(seats.pop());
    complete(&world, "One coin", json!({})).await;
    world.wait_until_idle();
    assert_eq!(engines.stats().map(|(_, stats)| stats.steps).filter(|steps| *steps > 0).count(), 1);
    drop(seats);
    engines.drain();
    assert_eq!(engines.reserve().map(drop), Err(Refused::Draining));
}

#[tokio::test]
async fn a_step_that_fails_on_one_engine_is_its_own() {
    let world = world_with(Options { engines: 2, panic_at: Some(1), ..Options::default() });
    complete(&world, &prompt("Lydia"), json!({})).await;
    // The second request goes to the other engine.
    let body = json!({"model": "fake", "prompt": prompt("Croesus"), "max_tokens": 3});
    let broken = world.post("/v1/completions", body).await;
    assert_eq!(broken.status, StatusCode::INTERNAL_SERVER_ERROR, "{}", broken.text);
    let id = broken.header("x-request-id");
    let receipt = world.get(&format!("/v1/requests/{id}")).await.json();
    assert_eq!((&receipt["status"], &receipt["device"]), (&json!("error"), &json!("cpu:1")));
    assert_eq!(world.get("/ready").await.status, StatusCode::OK);
    for subject in ["Lydia", "Athens"] {
        complete(&world, &prompt(subject), json!({})).await;
    }
}

#[tokio::test]
async fn one_engines_death_is_the_servers() {
    let world = several(2);
    complete(&world, &prompt("Lydia"), json!({})).await;
    assert_eq!(world.get("/health").await.status, StatusCode::OK);
    let second = world.app.engines().each()[1].engine.clone();
    tokio::task::spawn_blocking(move || second.shutdown()).await.expect("no panic");
    assert!(world.app.engines().is_dead() && !world.engine.is_dead(), "the first one lives");
    assert_ne!(world.get("/health").await.status, StatusCode::OK);
    assert_ne!(world.get("/ready").await.status, StatusCode::OK);
    let refused = world.post("/v1/completions", json!({"model": "fake", "prompt": "a"})).await;
    assert_eq!(refused.status, StatusCode::INTERNAL_SERVER_ERROR, "{}", refused.text);
    assert_eq!(refused.header("x-obol-device"), "cpu:0,cpu:1", "nobody answers it");
}
