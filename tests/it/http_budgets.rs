//! Budgets at the door: what is charged stays within them, and whoever is refused hears why.

use std::sync::Arc;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use jiff::tz::TimeZone;
use obol::control::budgets::{Budget, Mode, Scope};
use obol::control::window::Window;
use obol::ledger::audit;
use obol::units::Picos;
use serde_json::{Value, json};

use crate::http_world::{Answer, Options, World, world_with};

fn budget(scope: Scope, cap: i128) -> Budget {
    Budget {
        id: "the cap".into(),
        scope,
        value: None,
        cap: Picos(cap),
        window: Window::Lifetime,
        zone: TimeZone::UTC,
        until: None,
        mode: Mode::Block,
        soft: vec![80, 100],
    }
}

fn world(budgets: Vec<Budget>, queue_depth: usize) -> World {
    world_with(Options { budgets, queue_depth, ..Options::default() })
}

async fn chat(world: &World, team: &str, body: &Value) -> Answer {
    let request = Request::post("/v1/chat/completions").header("x-obol-team", team);
    world.send(request.body(Body::from(body.to_string())).expect("a request")).await
}

fn question(tokens: u32, stream: bool) -> Value {
    json!({
        "model": "fake/model", "messages": [{"role": "user", "content": "Hello there"}], "max_tokens": tokens,
        "ignore_eos": true, "stream": stream,
    })
}

fn picos(decimal: &Value) -> i128 {
    let text = decimal.as_str().expect("a decimal string");
    text.replace('.', "").parse().expect("twelve places")
}

fn is_refusal(answer: &Answer) {
    let error = &answer.json()["error"];
    assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS, "{}", answer.text);
    assert_eq!((&error["type"], &error["code"]), (&json!("insufficient_quota"), &json!("budget_exceeded")));
    assert!(error["message"].as_str().expect("a message").contains("the budget \"the cap\" of team \"a\""));
    assert_eq!(answer.header("x-should-retry"), "false");
}

#[tokio::test]
async fn a_spent_budget_cuts_the_answer_and_refuses_the_next_request() {
    let cap = 3_000_000;
    let world = world(vec![budget(Scope::Team, cap)], 64);
    let mut charged = 0;
    let mut cut = 0;
    loop {
        let answer = chat(&world, "a", &question(40, false)).await;
        if answer.status != StatusCode::OK {
            is_refusal(&answer);
            break;
        }
        let body = answer.json();
        charged += picos(&body["usage"]["obol"]["cost"]["total"]);
        assert_eq!(answer.header("x-obol-cost"), body["usage"]["obol"]["cost"]["total"]);
        if body["choices"][0]["stop_reason"] == "budget" {
            cut += 1;
            assert_eq!(body["choices"][0]["finish_reason"], "length");
            assert_eq!(body["usage"]["obol"]["status"], "budget");
        }
        assert!(cut <= 40, "it ends soon after the first cut");
    }
    assert!(charged <= cap, "{charged} of {cap}");
    is_refusal(&chat(&world, "a", &question(5, true)).await);
    assert_eq!(chat(&world, "b", &question(5, false)).await.status, StatusCode::OK, "it has its own");
    let standing = &world.app.budgets().standings(world.app.clock().wall())[0];
    assert_eq!((standing.spent.0, standing.leased.0), (charged, 0));
    assert!(audit(world.data_dir.path()).expect("an audit").is_reconciled());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_thousand_clients_on_one_budget_are_charged_no_more_than_it() {
    let cap = 20_000_000;
    let world = Arc::new(world(vec![budget(Scope::Team, cap)], 1_024));
    let clients = (0..1_000).map(|client| {
        let world = Arc::clone(&world);
        tokio::spawn(async move { chat(&world, "a", &question(30, client % 3 == 0)).await })
    });
    let (mut charged, mut whole, mut cut, mut refused) = (0, 0, 0, 0);
    for client in clients.collect::<Vec<_>>() {
        let answer = client.await.expect("no panic");
        if answer.status != StatusCode::OK {
            is_refusal(&answer);
            refused += 1;
            continue;
        }
        let receipt = if answer.text.starts_with("data:") {
            let events = answer.events();
            assert_eq!(events.last(), Some(&json!("[DONE]")), "{}", answer.text);
            events[events.len() - 2]["usage"]["obol"].clone()
        } else {
            answer.json()["usage"]["obol"].clone()
        };
        charged += picos(&receipt["cost"]["total"]);
        let gross = picos(&receipt["cost"]["time"]) + picos(&receipt["cost"]["memory"]);
        assert_eq!(gross - picos(&receipt["cost"]["cap_overrun"]), picos(&receipt["cost"]["total"]));
        if receipt["status"] == "budget" { cut += 1 } else { whole += 1 }
    }
    assert!(charged <= cap, "{charged} of {cap}");
    assert!(whole > 0 && refused > 0, "{whole} whole, {cut} cut, {refused} refused");
    world.wait_until_idle();
    let standing = &world.app.budgets().standings(world.app.clock().wall())[0];
    assert_eq!((standing.spent.0, standing.leased.0), (charged, 0), "what the receipts say");
    let audit = audit(world.data_dir.path()).expect("an audit");
    assert!(audit.is_reconciled(), "{audit}");
    println!("{charged} of {cap} picos charged: {whole} whole, {cut} cut, {refused} refused");
}
