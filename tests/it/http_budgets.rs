//! Budgets at the door: what is charged stays within them, and whoever is refused hears why.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use jiff::tz::TimeZone;
use obol::clock::SystemClock;
use obol::control::budgets::{Budget, Mode, Scope};
use obol::control::tasks::Ceilings;
use obol::control::window::Window;
use obol::control::{Actor, Control, KeyId, KeySettings};
use obol::ledger::audit;
use obol::pipeline::{Policy, follow};
use obol::units::Picos;
use serde_json::{Value, json};

use crate::http_world::{ADMIN, Answer, Options, World, guarded, world_with};

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
    world_with(Options { policy: Policy { budgets, ..Policy::default() }, queue_depth, ..Options::default() })
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
    let standing = &world.app.admission().budgets().standings(world.app.clock().wall())[0];
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
    let standing = &world.app.admission().budgets().standings(world.app.clock().wall())[0];
    assert_eq!((standing.spent.0, standing.leased.0), (charged, 0), "what the receipts say");
    let audit = audit(world.data_dir.path()).expect("an audit");
    assert!(audit.is_reconciled(), "{audit}");
    println!("{charged} of {cap} picos charged: {whole} whole, {cut} cut, {refused} refused");
}

async fn with_key(world: &World, secret: &str, headers: &[(&str, &str)], body: &Value) -> Answer {
    let mut request =
        Request::post("/v1/chat/completions").header("authorization", format!("Bearer {secret}"));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    world.send(request.body(Body::from(body.to_string())).expect("a request")).await
}

fn created(world: &World, settings: KeySettings) -> (String, KeyId) {
    let (secret, key) = world.control.create(&Actor::cli(), settings).expect("a key");
    (secret.reveal().to_owned(), key.id.clone())
}

#[tokio::test]
async fn a_keys_budget_follows_the_key() {
    let world = world(Vec::new(), 64);
    let (secret, id) =
        created(&world, KeySettings { max_budget: Some(Picos(2_000_000)), ..Default::default() });
    let mut spent = 0;
    let refused = loop {
        let answer = with_key(&world, &secret, &[], &question(60, false)).await;
        if answer.status != StatusCode::OK {
            break answer;
        }
        spent += picos(&answer.json()["usage"]["obol"]["cost"]["total"]);
    };
    assert_eq!(refused.json()["error"]["code"], "budget_exceeded", "{}", refused.text);
    assert_eq!(spent, 2_000_000, "to the last unit");
    let raise = |set: &mut KeySettings, cap| set.max_budget = cap;
    let set = |cap| {
        world
            .control
            .update(&Actor::cli(), &id, |set| {
                raise(set, cap);
                Ok(())
            })
            .map(drop)
            .expect("an update");
    };
    set(Some(Picos(2_500_000)));
    let answer = with_key(&world, &secret, &[], &question(5, false)).await;
    assert_eq!(answer.status, StatusCode::OK, "half a millionth more: {}", answer.text);
    set(Some(Picos(1)));
    assert_eq!(
        with_key(&world, &secret, &[], &question(5, false)).await.status,
        StatusCode::TOO_MANY_REQUESTS
    );
    set(None);
    assert_eq!(with_key(&world, &secret, &[], &question(5, false)).await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_key_given_a_budget_late_has_spent_what_it_has_spent() {
    let world = world(Vec::new(), 64);
    let (secret, id) = created(&world, KeySettings::default());
    let first = with_key(&world, &secret, &[], &question(20, false)).await.json();
    let spent = picos(&first["usage"]["obol"]["cost"]["total"]);
    world
        .control
        .update(&Actor::cli(), &id, |set| {
            set.max_budget = Some(Picos(spent));
            Ok(())
        })
        .expect("an update");
    let refused = with_key(&world, &secret, &[], &question(20, false)).await;
    assert_eq!(refused.json()["error"]["code"], "budget_exceeded", "{}", refused.text);
}

/// Gives a key a budget of one picounit while its only request runs, by the admin API or beside the server; the
/// request ends at its budget, and all that it cost is in it.
async fn a_budget_catches_a_request_that_runs(by_api: bool) {
    let world = Arc::new(world_with(Options {
        access: guarded(),
        step: Duration::from_millis(5),
        ..Options::default()
    }));
    let (secret, id) = created(&world, KeySettings::default());
    let runs = tokio::spawn({
        let (world, secret) = (Arc::clone(&world), secret.clone());
        async move { with_key(&world, &secret, &[], &question(200, false)).await }
    });
    let follower = tokio::spawn(follow(Arc::clone(&world.app), world.control.clone()));
    while world.engine.stats().running == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    if by_api {
        follower.abort();
        let change = json!({"key": id.0, "max_budget": "0.000000000001"});
        let answer = world.with_key(ADMIN, "/key/update", Some(change)).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    } else {
        let control = Control::open(world.data_dir.path(), Arc::new(SystemClock::start())).expect("keys");
        let set = |set: &mut KeySettings| {
            set.max_budget = Some(Picos(1));
            Ok(())
        };
        control.update(&Actor::cli(), &id, set).expect("an update");
    }
    let body = runs.await.expect("no panic").json();
    assert_eq!(body["choices"][0]["stop_reason"], "budget", "{body}");
    let receipt = &body["usage"]["obol"];
    let standings = world.app.admission().budgets().standings(world.app.clock().wall());
    assert_eq!(standings.len(), 1);
    assert_eq!((standings[0].spent.0, standings[0].leased.0), (picos(&receipt["cost"]["total"]), 0));
    let refused = with_key(&world, &secret, &[], &question(5, false)).await;
    assert_eq!(refused.json()["error"]["code"], "budget_exceeded", "{}", refused.text);
    follower.abort();
    world.wait_until_idle();
    let audit = audit(world.data_dir.path()).expect("an audit");
    assert!(audit.is_reconciled(), "{audit}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_budget_that_the_admin_api_sets_counts_what_runs() {
    a_budget_catches_a_request_that_runs(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_budget_that_another_process_sets_counts_what_runs() {
    a_budget_catches_a_request_that_runs(false).await;
}

#[tokio::test]
async fn limits_are_told_and_kept() {
    let world = world(Vec::new(), 64);
    let set = KeySettings { rpm_limit: Some(2), tpm_limit: Some(1_000), ..Default::default() };
    let (secret, _) = created(&world, set);
    let first = with_key(&world, &secret, &[], &question(5, false)).await;
    assert_eq!(
        (first.header("x-ratelimit-limit-requests"), first.header("x-ratelimit-remaining-requests")),
        ("2", "1")
    );
    assert_eq!(first.header("x-ratelimit-limit-tokens"), "1000");
    assert!(first.header("x-ratelimit-reset-requests").ends_with('s'));
    assert_eq!(with_key(&world, &secret, &[], &question(5, true)).await.status, StatusCode::OK);
    let refused = with_key(&world, &secret, &[], &question(5, false)).await;
    let error = &refused.json()["error"];
    assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!((&error["type"], &error["code"]), (&json!("rate_limit_error"), &json!("rate_limit_exceeded")));
    assert!((1..=30).contains(&refused.header("retry-after").parse::<u32>().expect("seconds")));
    assert!(refused.headers.get("x-should-retry").is_none(), "it may be tried again");
    let told = |answer: &Answer| {
        ["limit-requests", "remaining-requests", "limit-tokens"]
            .map(|name| answer.header(&format!("x-ratelimit-{name}")).to_owned())
    };
    assert_eq!(told(&refused), ["2", "0", "1000"]);
    let wrong = with_key(&world, &secret, &[], &json!({"model": "fake/model"})).await;
    assert_eq!((wrong.status, told(&wrong)), (StatusCode::BAD_REQUEST, told(&refused)));
    let (free, _) = created(&world, KeySettings::default());
    let wrong = with_key(&world, &free, &[], &json!({})).await;
    assert!(wrong.headers.keys().all(|name| !name.as_str().starts_with("x-ratelimit")), "it has no limits");
}

#[tokio::test]
async fn a_task_that_runs_away_is_halted_and_the_others_go_on() {
    let tasks = Ceilings { calls: Some(5), depth: Some(3), repeats: Some(2) };
    let world = world_with(Options { policy: Policy { tasks, ..Policy::default() }, ..Options::default() });
    let (secret, _) = created(&world, KeySettings::default());
    let ask = async |task: &str, text: String, more: &[(&str, &str)]| {
        let body =
            json!({"model": "default", "messages": [{"role": "user", "content": text}], "max_tokens": 3});
        with_key(&world, &secret, &[&[("x-obol-task", task)], more].concat(), &body).await
    };
    let halted = |answer: &Answer, word: &str| {
        let error = &answer.json()["error"];
        assert_eq!(
            (answer.status, &error["code"]),
            (StatusCode::TOO_MANY_REQUESTS, &json!("task_limit_exceeded"))
        );
        assert!(error["message"].as_str().expect("a message").contains(word), "{}", answer.text);
        assert_eq!(answer.header("x-should-retry"), "false");
    };
    let mut parent = String::new();
    for call in 0..4 {
        let more: Vec<(&str, &str)> =
            if call == 0 { vec![] } else { vec![("x-obol-parent-request", parent.as_str())] };
        let answer = ask("loop", format!("call {call}"), &more).await;
        if call == 3 {
            halted(&answer, "nested 4 deep");
        } else {
            parent = answer.header("x-request-id").to_owned();
            assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
        }
    }
    for _ in 0..2 {
        assert_eq!(ask("loop", "again".into(), &[]).await.status, StatusCode::OK);
    }
    halted(&ask("loop", "something new".into(), &[]).await, "5 calls");
    for _ in 0..2 {
        assert_eq!(ask("other", "again".into(), &[]).await.status, StatusCode::OK, "the rest goes on");
    }
    halted(&ask("other", "again".into(), &[]).await, "seems to loop");
    let request = Request::get("/v1/tasks/loop").header("authorization", format!("Bearer {secret}"));
    let task = world.send(request.body(Body::empty()).expect("a request")).await.json();
    assert_eq!((&task["calls"], &task["depth"], &task["refused"]), (&json!(5), &json!(3), &json!(2)));
    assert!(picos(&task["cost"]) > 0 && task["settled"] == 5, "{task}");
    let other = Request::get("/v1/tasks/nobody").body(Body::empty()).expect("a request");
    assert_eq!(world.send(other).await.status, StatusCode::NOT_FOUND);
}
