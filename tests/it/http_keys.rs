//! Keys over HTTP: who is let in, what a key may do, what its requests are booked under, and the admin API.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use obol::control::{Actor, ConfiguredKey, Control, KeyId, KeySettings, Secret};
use obol::http::{Access, MetricsAccess};
use obol::request::Tag;
use serde_json::{Value, json};

use crate::http_world::{ADMIN, Answer, Options, World, guarded, wait_until, world, world_with};

const CHAT: &str = "/v1/chat/completions";

fn guarded_world() -> World {
    world_with(Options { access: guarded(), ..Options::default() })
}

fn chat(extra: Value) -> Value {
    let mut body = json!({"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2});
    body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
    body
}

/// Makes a key by the admin API; its secret, and all that was said.
pub(crate) async fn generate(world: &World, settings: Value) -> (String, Value) {
    let answer = world.with_key(ADMIN, "/key/generate", Some(settings)).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    let made = answer.json();
    (made["key"].as_str().expect("a secret").to_owned(), made)
}

fn refused(answer: &Answer, status: StatusCode, kind: &str, code: &str, word: &str) -> Value {
    assert_eq!(answer.status, status, "{}", answer.text);
    let error = answer.json()["error"].clone();
    assert_eq!((&error["type"], &error["code"]), (&json!(kind), &json!(code)), "{error}");
    assert!(error["message"].as_str().is_some_and(|message| message.contains(word)), "{word}: {error}");
    error
}

fn unauthorized(answer: &Answer, word: &str) {
    refused(answer, StatusCode::UNAUTHORIZED, "invalid_request_error", "invalid_api_key", word);
    assert_eq!(answer.header("www-authenticate"), "Bearer");
    assert!(!answer.header("x-request-id").is_empty());
}

#[tokio::test]
async fn with_an_admin_key_every_call_but_the_probes_needs_one() {
    let world = guarded_world();
    for path in ["/health", "/ready", "/metrics"] {
        assert_eq!(world.get(path).await.status, StatusCode::OK, "{path}");
    }
    let (secret, made) = generate(&world, json!({})).await;
    assert!(secret.starts_with("sk-obol-") && secret.len() == 51, "{}", secret.len());
    assert_eq!(made["key_name"], format!("sk-...{}", &secret[47..]));
    for path in ["/v1/models", "/v1/requests", "/v1/requests/x", "/key/list", "/nowhere", "/health/"] {
        unauthorized(&world.get(path).await, "no API key");
        unauthorized(&world.with_key("sk-obol-wrong", path, None).await, "not known");
        unauthorized(&world.with_key("", path, None).await, "no API key");
    }
    for path in [CHAT, "/v1/completions", "/tokenize", "/detokenize", "/key/generate", "/key/delete"] {
        unauthorized(&world.post(path, json!({})).await, "no API key");
        unauthorized(&world.with_key("wrong", path, Some(json!({}))).await, "not known");
    }
    assert_eq!(world.with_key(&secret, CHAT, Some(chat(json!({})))).await.status, StatusCode::OK);
    assert_eq!(world.with_key(ADMIN, CHAT, Some(chat(json!({})))).await.status, StatusCode::OK);
    let anthropic =
        Request::get("/v1/models").header("x-api-key", &secret).body(Body::empty()).expect("a request");
    assert_eq!(world.send(anthropic).await.status, StatusCode::OK);
}

#[tokio::test]
async fn an_open_server_takes_any_bearer_and_holds_its_own_keys_to_theirs() {
    let world = world();
    assert_eq!(world.with_key("any", CHAT, Some(chat(json!({})))).await.status, StatusCode::OK);
    assert_eq!(world.with_key("sk-obol-unknown", CHAT, Some(chat(json!({})))).await.status, StatusCode::OK);
    let settings = KeySettings { tags: [(Tag::Team, "search".into())].into(), ..KeySettings::default() };
    let (secret, key) = world.control.create(&Actor::cli(), settings).expect("a key");
    let answer = world.with_key(secret.reveal(), CHAT, Some(chat(json!({})))).await.json();
    assert_eq!(answer["usage"]["obol"]["key_id"], key.id.0);
    assert_eq!(answer["usage"]["obol"]["tenant"], "search");
    world.control.set_blocked(&Actor::cli(), &key.id, true).expect("blocked");
    unauthorized(&world.with_key(secret.reveal(), CHAT, Some(chat(json!({})))).await, "blocked");
    // Nobody administers a server without an admin key.
    for (path, body) in [("/key/generate", Some(json!({}))), ("/key/list", None), ("/key/info", None)] {
        let answer = world.with_key("any", path, body).await;
        refused(&answer, StatusCode::FORBIDDEN, "permission_error", "no_admin_key", "--admin-key-file");
    }
}

#[tokio::test]
async fn metrics_are_for_whom_they_are_configured() {
    let metrics = |access: Access| world_with(Options { access, ..Options::default() });
    let own = ConfiguredKey::new("sk-scraper-of-the-tests").expect("long enough");
    let keyed = metrics(Access { metrics: MetricsAccess::Keyed(Some(own)), ..guarded() });
    let (secret, _) = generate(&keyed, json!({})).await;
    unauthorized(&keyed.get("/metrics").await, "no API key");
    unauthorized(&keyed.with_key(&secret, "/metrics", None).await, "not known");
    for good in ["sk-scraper-of-the-tests", ADMIN] {
        assert_eq!(keyed.with_key(good, "/metrics", None).await.status, StatusCode::OK);
    }
    // The scraper's key opens nothing else.
    unauthorized(&keyed.with_key("sk-scraper-of-the-tests", "/v1/models", None).await, "not known");
    let open = metrics(Access { metrics: MetricsAccess::Keyed(None), ..Access::default() });
    assert_eq!(open.get("/metrics").await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_key_that_is_blocked_expired_rotated_or_deleted_opens_nothing() {
    let world = guarded_world();
    let models = async |secret: &str| world.with_key(secret, "/v1/models", None).await;
    let order = async |path: &str, body: Value| {
        let answer = world.with_key(ADMIN, path, Some(body)).await;
        assert_eq!(answer.status, StatusCode::OK, "{path}: {}", answer.text);
        answer.json()
    };
    let (secret, made) = generate(&world, json!({"key_alias": "a"})).await;
    let blocked = order("/key/block", json!({"key": secret})).await;
    assert_eq!((&blocked["blocked"], &blocked["token"]), (&json!(true), &made["token_id"]));
    unauthorized(&models(&secret).await, "blocked");
    order("/key/unblock", json!({"key": made["token_id"]})).await;
    assert_eq!(models(&secret).await.status, StatusCode::OK);

    let renewed = order("/key/regenerate", json!({"key": secret, "grace_period": "1h"})).await;
    let second = renewed["key"].as_str().expect("a secret").to_owned();
    assert_eq!(renewed["key_id"], made["key_id"]);
    assert_ne!(renewed["token"], made["token"]);
    for good in [&secret, &second] {
        assert_eq!(models(good).await.status, StatusCode::OK);
    }
    let third = order(&format!("/key/{second}/regenerate"), json!({})).await;
    let third = third["key"].as_str().expect("a secret").to_owned();
    for bad in [&secret, &second] {
        unauthorized(&models(bad).await, "not known");
    }

    order("/key/update", json!({"key": third, "duration": "1s"})).await;
    wait_until("the key to expire", || {
        let expires = world.control.resolve(&third).expect("a key").0.settings.expires.expect("an end");
        world.control.now() >= expires
    });
    unauthorized(&models(&third).await, "expired at 2");
    order("/key/update", json!({"key": third, "duration": "-1"})).await;
    assert_eq!(models(&third).await.status, StatusCode::OK);

    let deleted = order("/key/delete", json!({"keys": [third], "key_aliases": ["a"]})).await;
    assert_eq!(deleted, json!({"deleted_keys": [third, "a"]}));
    unauthorized(&models(&third).await, "revoked");
    let answer = world.with_key(ADMIN, "/key/update", Some(json!({"key": third, "blocked": true}))).await;
    refused(&answer, StatusCode::NOT_FOUND, "invalid_request_error", "key_not_found", "no such key");
    // Its row stays, by its id.
    let path = format!("/key/info?key={}", made["key_id"].as_str().expect("an id"));
    let info = world.with_key(ADMIN, &path, None).await.json();
    assert!(info["info"]["deleted_at"].is_string(), "{info}");
}

#[tokio::test]
async fn a_key_is_held_to_its_models_and_its_tokens() {
    let world = guarded_world();
    let (other, _) = generate(&world, json!({"models": ["gpt-4o", "o3"]})).await;
    let answer = world.with_key(&other, CHAT, Some(chat(json!({})))).await;
    let error = refused(&answer, StatusCode::FORBIDDEN, "permission_error", "model_not_allowed", "gpt-4o");
    assert_eq!(error["param"], "model");
    assert_eq!(world.with_key(&other, "/v1/models", None).await.json()["data"], json!([]));
    let one = world.with_key(&other, "/v1/models/fake/model", None).await;
    refused(&one, StatusCode::FORBIDDEN, "permission_error", "model_not_allowed", "o3");
    let tokens = json!({"model": "fake", "prompt": "hi"});
    let answer = world.with_key(&other, "/tokenize", Some(tokens)).await;
    refused(&answer, StatusCode::FORBIDDEN, "permission_error", "model_not_allowed", "fake");
    // Any name of the served model will do.
    for models in [
        json!(["fake"]),
        json!(["default", "x"]),
        json!(["fake/model"]),
        json!([]),
        json!(["all-proxy-models"]),
    ] {
        let (secret, _) = generate(&world, json!({"models": models})).await;
        assert_eq!(
            world.with_key(&secret, CHAT, Some(chat(json!({})))).await.status,
            StatusCode::OK,
            "{models}"
        );
        assert_eq!(world.with_key(&secret, "/v1/models", None).await.json()["data"][0]["id"], "fake/model");
    }

    let (short, _) = generate(&world, json!({"max_tokens": 6})).await;
    let ask = async |extra: Value| world.with_key(&short, CHAT, Some(chat(extra))).await;
    for (extra, param) in [
        (json!({"max_tokens": 7}), "max_tokens"),
        (json!({"max_tokens": null, "max_completion_tokens": 7}), "max_completion_tokens"),
        (json!({"max_tokens": 4, "n": 2}), "max_tokens"),
        (json!({"max_tokens": null, "n": 7}), "n"),
        (json!({"max_tokens": null, "min_tokens": 7}), "min_tokens"),
    ] {
        let answer = ask(extra.clone()).await;
        let error = refused(
            &answer,
            StatusCode::BAD_REQUEST,
            "invalid_request_error",
            "max_tokens_exceeded",
            "6 tokens",
        );
        assert_eq!(error["param"], param, "{extra}");
    }
    assert_eq!(ask(json!({"max_tokens": 6})).await.json()["usage"]["completion_tokens"], 6);
    assert_eq!(ask(json!({"max_tokens": null})).await.json()["usage"]["completion_tokens"], 6);
    assert_eq!(ask(json!({"max_tokens": null, "n": 2})).await.json()["usage"]["completion_tokens"], 6);
}

#[tokio::test]
async fn receipts_say_whose_they_are_and_are_read_by_no_other_key() {
    let world = guarded_world();
    let tags = json!({"team": "search", "cost_center": "c7", "user": "robot"});
    let (one, made) = generate(&world, json!({"tags": tags})).await;
    let (two, other) = generate(&world, json!({})).await;
    let said =
        json!({"user": "somebody", "metadata": {"team": "body", "feature": "body", "task": "t1", "x": "y"}});
    let request = Request::post(CHAT)
        .header("authorization", format!("Bearer {one}"))
        .header("x-obol-team", "header")
        .header("x-obol-environment", "prod")
        .header("x-obol-feature", "header")
        .body(Body::from(chat(said).to_string()))
        .expect("a request");
    let receipt = world.send(request).await.json()["usage"]["obol"].clone();
    assert_eq!(receipt["key_id"], made["key_id"]);
    assert_eq!(receipt["tenant"], "search");
    let booked = json!({"team": "search", "feature": "header", "environment": "prod", "cost_center": "c7", "task": "t1"});
    assert_eq!(receipt["tags"], booked);

    let path = format!("/v1/requests/{}", receipt["request_id"].as_str().expect("an id"));
    assert_eq!(world.with_key(&one, &path, None).await.json(), receipt);
    assert_eq!(world.with_key(ADMIN, &path, None).await.json(), receipt);
    assert_eq!(world.with_key(&two, &path, None).await.status, StatusCode::NOT_FOUND);
    let receipt =
        world.with_key(&two, CHAT, Some(chat(json!({"user": "u"})))).await.json()["usage"]["obol"].clone();
    assert_eq!(receipt["tenant"], other["key_id"]);
    let ids = async |secret: &str, path: &str| {
        let page = world.with_key(secret, path, None).await.json();
        let of = |receipt: &Value| receipt["key_id"].clone();
        page["data"].as_array().expect("a list").iter().map(of).collect::<Vec<_>>()
    };
    assert_eq!(ids(&one, "/v1/requests").await, [made["key_id"].clone()]);
    assert_eq!(ids(&two, "/v1/requests").await, [other["key_id"].clone()]);
    assert_eq!(ids(ADMIN, "/v1/requests").await, [other["key_id"].clone(), made["key_id"].clone()]);
    for (user, whose) in [("robot", &made), ("u", &other)] {
        assert_eq!(ids(ADMIN, &format!("/v1/requests?user={user}")).await, [whose["key_id"].clone()]);
    }
    let theirs = format!("/v1/requests?key_id={}", other["key_id"].as_str().expect("an id"));
    assert_eq!(ids(&two, &theirs).await.len(), 1);
    assert_eq!(world.with_key(&one, &theirs, None).await.status, StatusCode::FORBIDDEN);
    let yesterday = world.control.now().0 / 1_000_000_000 - 86_400;
    let days = format!("start_time={yesterday}&group_by=api_key_id&bucket_width=1d");
    for path in [
        "/spend/logs".to_owned(),
        "/spend/logs?start_date=2020-01-01&end_date=2099-01-01".to_owned(),
        "/global/spend/report?group_by=api_key".to_owned(),
        format!("/v1/organization/costs?{days}"),
        format!("/v1/organization/usage/completions?{days}"),
    ] {
        let answer = world.with_key(&one, &path, None).await;
        assert_eq!(answer.status, StatusCode::OK, "{path}: {}", answer.text);
        let mentions = |key: &Value| answer.text.contains(key["key_id"].as_str().expect("an id"));
        assert!(!mentions(&other), "{path}: {}", answer.text);
        let all = world.with_key(ADMIN, &path, None).await.text;
        assert!(all.contains(other["key_id"].as_str().expect("an id")), "{path}: {all}");
    }
    // The same figure everywhere, to the last digit.
    let info = world.with_key(&two, "/key/info", None).await.json();
    assert_eq!(info["info"]["obol"]["spend"], receipt["cost"]["total"]);
    assert_ne!(info["info"]["spend"], 0.0);
}

#[tokio::test]
async fn tenants_do_not_share_the_prefix_cache_and_idempotency_keys() {
    let world = guarded_world();
    let mut secrets = Vec::new();
    for tags in [json!({"team": "a"}), json!({"team": "a"}), json!({"team": "b"}), json!({}), json!({})] {
        secrets.push(generate(&world, json!({"tags": tags})).await.0);
    }
    let prompt = "a prompt of several blocks, which all of them send one after another, and then some more";
    let mut cached = Vec::new();
    for secret in &secrets {
        let request = Request::post("/v1/completions")
            .header("authorization", format!("Bearer {secret}"))
            .header("idempotency-key", "once")
            .header("x-obol-team", "a")
            .body(Body::from(json!({"model": "fake", "prompt": prompt, "max_tokens": 2}).to_string()))
            .expect("a request");
        let answer = world.send(request).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
        cached.push(answer.header("x-obol-cached-tokens").parse::<u32>().expect("a number") > 0);
    }
    // A team shares; who only says that it is of the team does not.
    assert_eq!(cached, [false, true, false, false, false]);
}

#[tokio::test]
async fn missing_tags_are_named() {
    let access = Access { require_tags: Arc::new([Tag::Team, Tag::CostCenter]), ..guarded() };
    let world = world_with(Options { access, ..Options::default() });
    let (plain, _) = generate(&world, json!({})).await;
    let (own, _) =
        generate(&world, json!({"tags": {"team": "a", "cost_center": "c"}, "require_tags": ["user"]})).await;
    let ask = async |secret: &str, extra: Value| world.with_key(secret, CHAT, Some(chat(extra))).await;
    let missing = |answer: &Answer, tag: &str, hint: &str| {
        let error = refused(answer, StatusCode::BAD_REQUEST, "invalid_request_error", "missing_tag", hint);
        assert_eq!(error["param"], tag);
    };
    missing(&ask(&plain, json!({})).await, "team", "x-obol-team");
    missing(&ask(&plain, json!({"metadata": {"team": "a"}})).await, "cost_center", "metadata.cost_center");
    missing(&ask(&own, json!({})).await, "user", "x-obol-user");
    for (secret, extra) in [
        (&plain, json!({"metadata": {"team": "a", "cost_center": "b"}})),
        (&own, json!({"user": "u"})),
        (&own, json!({"safety_identifier": "u"})),
    ] {
        assert_eq!(ask(secret, extra.clone()).await.status, StatusCode::OK, "{extra}");
    }
    for (extra, param) in [
        (json!({"metadata": {"team": ""}}), "metadata.team"),
        (json!({"metadata": {"feature": "x".repeat(129)}}), "metadata.feature"),
        (json!({"metadata": {"task": "a\nb"}}), "metadata.task"),
    ] {
        let answer = ask(&plain, extra).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST);
        assert_eq!(answer.json()["error"]["param"], param);
    }
}

#[tokio::test]
async fn the_admin_api_speaks_litellms_names() {
    let world = guarded_world();
    let settings = json!({
        "key_alias": "prod", "duration": "30d", "models": ["fake"], "max_budget": 25.5, "soft_budget": "10.000000000001",
        "budget_duration": "1mo", "max_parallel_requests": 4, "tpm_limit": 1000, "rpm_limit": 60, "team_id": "search",
        "user_id": "ann", "metadata": {"owner": {"name": "ann"}}, "tags": {"feature": "chat"}, "max_tokens": 100,
        "blocked": false, "aliases": {}, "config": {}, "permissions": {}, "spend": 0, "key_type": "default",
    });
    let (secret, made) = generate(&world, settings).await;
    let token = made["token_id"].as_str().expect("a token").to_owned();
    for (name, value) in [
        ("key_alias", json!("prod")),
        ("models", json!(["fake"])),
        ("max_budget", json!(25.5)),
        ("budget_duration", json!("1mo")),
        ("max_parallel_requests", json!(4)),
        ("tpm_limit", json!(1000)),
        ("rpm_limit", json!(60)),
        ("team_id", json!("search")),
        ("user_id", json!("ann")),
        ("metadata", json!({"owner": {"name": "ann"}})),
        ("max_tokens", json!(100)),
        ("spend", json!(0.0)),
        ("tags", json!({"team": "search", "user": "ann", "feature": "chat"})),
    ] {
        assert_eq!(made[name], value, "{name}");
    }
    assert_eq!(made["obol"]["soft_budget"], "10.000000000001");
    // By the secret, its token, the id or the alias: the same, without the secret.
    for named in [&secret, &token, made["key_id"].as_str().expect("an id"), "prod"] {
        let answer = world.with_key(ADMIN, &format!("/key/info?key={named}"), None).await.json();
        assert_eq!(answer["key"], named);
        let mut info = made.clone();
        info.as_object_mut().expect("an object").remove("key");
        assert_eq!(answer["info"], info, "{named}");
    }
    let update =
        json!({"key": token, "max_budget": null, "rpm_limit": 5, "tags": {"feature": null}, "team_id": "b"});
    let changed = world.with_key(ADMIN, "/key/update", Some(update)).await.json();
    assert_eq!(changed["key"], token);
    assert_eq!((&changed["max_budget"], &changed["rpm_limit"]), (&Value::Null, &json!(5)));
    assert_eq!(
        (&changed["tags"], &changed["tpm_limit"]),
        (&json!({"team": "b", "user": "ann"}), &json!(1000))
    );

    let admin = &made["created_by"];
    assert!(admin.as_str().is_some_and(|id| id.starts_with("admin_")), "{admin}");
    let cli = |set: &mut KeySettings| {
        set.rpm_limit = Some(6);
        Ok(())
    };
    let id = KeyId(made["key_id"].as_str().expect("an id").to_owned());
    world.control.update(&Actor::cli(), &id, cli).expect("an update");
    let info = &world.with_key(ADMIN, "/key/info?key=prod", None).await.json()["info"];
    assert_eq!(
        (&changed["updated_by"], &info["created_by"], &info["updated_by"]),
        (admin, admin, &json!("cli"))
    );

    assert_eq!((&info["projected_spend"], &info["obol"]["projected"]), (&Value::Null, &Value::Null));

    // A key reads itself, and no other.
    let own = world.with_key(&secret, "/key/info", None).await.json();
    assert_eq!((&own["key"], &own["info"]["team_id"]), (&json!(token), &json!("b")));
    let (_, other) = generate(&world, json!({})).await;
    let path = format!("/key/info?key={}", other["token"].as_str().expect("a token"));
    assert_eq!(world.with_key(&secret, &path, None).await.status, StatusCode::NOT_FOUND);
    for (path, body) in
        [("/key/list", None), ("/key/generate", Some(json!({}))), ("/v1/organization/audit_logs", None)]
    {
        let answer = world.with_key(&secret, path, body).await;
        refused(&answer, StatusCode::FORBIDDEN, "permission_error", "admin_only", "admin key");
    }

    let list = async |query: &str| world.with_key(ADMIN, &format!("/key/list{query}"), None).await.json();
    let page = list("").await;
    assert_eq!(page["keys"], json!([other["token"], token]), "newest first");
    assert_eq!(
        (&page["total_count"], &page["current_page"], &page["total_pages"]),
        (&json!(2), &json!(1), &json!(1))
    );
    assert_eq!(list("?size=1&page=2").await["keys"], json!([token]));
    assert_eq!(list("?team_id=b&return_full_object=true").await["keys"][0]["key_alias"], "prod");
    assert_eq!(list("?status=deleted").await["total_count"], 0);
    assert_eq!(list("?color=red").await["error"]["param"], "color");
}

#[tokio::test]
async fn keys_are_changed_while_the_model_loads() {
    let world = world_with(Options { access: guarded(), loading: true, ..Options::default() });
    let (secret, made) = generate(&world, json!({})).await;
    let id = &made["key_id"];
    for (path, more) in [
        ("/key/update", json!({"rpm_limit": 5, "max_budget": 1})),
        ("/key/block", json!({})),
        ("/key/unblock", json!({})),
    ] {
        let mut body = json!({"key": id});
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let answer = world.with_key(ADMIN, path, Some(body)).await;
        assert_eq!(
            (answer.status, &answer.json()["key_id"]),
            (StatusCode::OK, id),
            "{path}: {}",
            answer.text
        );
    }
    let rotated = world.with_key(ADMIN, "/key/regenerate", Some(json!({"key": id}))).await.json();
    assert!(rotated["key"].as_str().is_some_and(|fresh| fresh != secret), "{rotated}");
    let info = world.with_key(ADMIN, &format!("/key/info?key={}", id.as_str().expect("an id")), None).await;
    assert_eq!(info.json()["info"]["rpm_limit"], 5);
    let page = world.with_key(ADMIN, "/key/list?return_full_object=true", None).await.json();
    assert_eq!(page["keys"][0]["key_id"], *id);
}

#[tokio::test]
async fn settings_that_are_not_honoured_are_refused_by_name_and_change_nothing() {
    let world = guarded_world();
    let (_, made) = generate(&world, json!({"key_alias": "taken"})).await;
    for (settings, param) in [
        (json!({"key_alias": "taken"}), "key_alias"),
        (json!({"key": "sk-my-own"}), "key"),
        (json!({"duration": "soon"}), "duration"),
        (json!({"models": "fake"}), "models"),
        (json!({"models": [1]}), "models[0]"),
        (json!({"models": ["all-team-models"]}), "models"),
        (json!({"max_budget": -1}), "max_budget"),
        (json!({"max_budget": 1e30}), "max_budget"),
        (json!({"max_budget": "1e3"}), "max_budget"),
        (json!({"max_budget": 1, "soft_budget": 2}), "soft_budget"),
        (json!({"budget_duration": "1y"}), "budget_duration"),
        (json!({"rpm_limit": 0}), "rpm_limit"),
        (json!({"tpm_limit": 1.5}), "tpm_limit"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"tags": ["a"]}), "tags"),
        (json!({"tags": {"colour": "red"}}), "tags.colour"),
        (json!({"tags": {"task": "t"}}), "tags.task"),
        (json!({"tags": {"team": "a"}, "team_id": "b"}), "team_id"),
        (json!({"tags": {"team": ""}}), "tags.team"),
        (json!({"require_tags": ["colour"]}), "require_tags[0]"),
        (json!({"metadata": []}), "metadata"),
        (json!({"aliases": {"a": "b"}}), "aliases"),
        (json!({"spend": 3}), "spend"),
        (json!({"allowed_routes": ["/x"]}), "allowed_routes"),
        (json!({"max_budgets": 3}), "max_budgets"),
    ] {
        let answer = world.with_key(ADMIN, "/key/generate", Some(settings.clone())).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{settings}: {}", answer.text);
        assert_eq!(answer.json()["error"]["param"], param, "{settings}");
        let mut update = settings.clone();
        if update.get("key").is_some() || update["key_alias"] == "taken" {
            continue;
        }
        update["key"] = made["token"].clone();
        let answer = world.with_key(ADMIN, "/key/update", Some(update)).await;
        assert_eq!(answer.json()["error"]["param"], param, "{settings}");
    }
    assert_eq!(world.control.keys().expect("keys").len(), 1);
    let trail = world.with_key(ADMIN, "/v1/organization/audit_logs", None).await.json();
    assert_eq!(trail["data"].as_array().map(Vec::len), Some(1), "{trail}");
    // One unknown key, and none of them is deleted.
    let both = json!({"keys": [made["token"], "key_unknown"]});
    assert_eq!(world.with_key(ADMIN, "/key/delete", Some(both)).await.status, StatusCode::NOT_FOUND);
    assert!(world.control.resolve("taken").expect("a key").0.deleted.is_none());
}

#[tokio::test]
async fn the_trail_tells_who_did_what_and_no_secret() {
    let world = guarded_world();
    let (first, made) = generate(&world, json!({"key_alias": "a"})).await;
    let order = async |path: &str, body: Value| world.with_key(ADMIN, path, Some(body)).await.json();
    order("/key/update", json!({"key": first, "rpm_limit": 5})).await;
    let second = order("/key/regenerate", json!({"key": first})).await;
    let second = second["key"].as_str().expect("a secret").to_owned();
    order("/key/block", json!({"key": second})).await;
    order("/key/unblock", json!({"key": second})).await;
    order("/key/delete", json!({"keys": [second]})).await;
    world.control.create(&Actor::cli(), KeySettings::default()).expect("a key");
    let trail = async |query: &str| {
        let answer = world.with_key(ADMIN, &format!("/v1/organization/audit_logs{query}"), None).await;
        for secret in [&first, &second, ADMIN, &first[8..], &second[8..]] {
            assert!(!answer.text.contains(secret), "a secret in {}", answer.text);
        }
        answer.json()
    };
    let all = trail("").await;
    let rows = all["data"].as_array().expect("a list");
    let types: Vec<&str> = rows.iter().map(|row| row["type"].as_str().expect("a type")).collect();
    let expected = ["created", "deleted", "unblocked", "blocked", "rotated", "updated", "created"];
    assert_eq!(types, expected.map(|action| format!("api_key.{action}")));
    assert_eq!(rows[0]["actor"], json!({"type": "command_line", "id": "cli"}));
    let admin = ConfiguredKey::new(ADMIN).expect("long enough").id();
    assert_eq!(rows[5]["actor"], json!({"type": "admin_key", "id": admin}));
    assert_eq!(rows[5]["changes"], json!({"rpm_limit": {"before": null, "after": 5}}));
    assert_eq!(rows[6]["target"], made["key_id"]);
    assert_eq!((&all["has_more"], &all["first_id"]), (&json!(false), &rows[0]["id"]));
    let page = trail(&format!("?limit=2&after={}", rows[1]["id"].as_str().expect("an id"))).await;
    assert_eq!((&page["data"][0], &page["has_more"]), (&rows[2], &json!(true)));
    let path = format!("?target={}", rows[0]["target"].as_str().expect("an id"));
    assert_eq!(trail(&path).await["data"].as_array().map(Vec::len), Some(1));
}

#[tokio::test]
async fn another_processes_changes_are_in_force_soon() {
    let world = guarded_world();
    let (secret, made) = generate(&world, json!({})).await;
    assert_eq!(world.with_key(&secret, "/v1/models", None).await.status, StatusCode::OK);
    let clock = Arc::new(obol::clock::SystemClock::start());
    let other = Control::open(world.data_dir.path(), clock).expect("the same keys");
    let (id, _) = other.resolve(made["key_id"].as_str().expect("an id")).expect("the key");
    other.delete(&Actor::cli(), std::slice::from_ref(&id.id)).expect("deleted");
    let (new, _) = other.create(&Actor::cli(), KeySettings::default()).expect("made");
    tokio::time::sleep(Duration::from_millis(110)).await;
    unauthorized(&world.with_key(&secret, "/v1/models", None).await, "revoked");
    assert_eq!(world.with_key(new.reveal(), "/v1/models", None).await.status, StatusCode::OK);
}

#[tokio::test]
async fn errors_repeat_no_secret() {
    let world = guarded_world();
    let secret = Secret::draw().expect("random bytes");
    let (secret, drawn) = (secret.reveal(), &secret.reveal()[8..]);
    for (key, path, body) in [
        (secret, "/v1/models", None),
        (ADMIN, "/key/info?key=KEY", None),
        (ADMIN, "/key/block", Some(json!({"key": "KEY"}))),
        (ADMIN, "/key/delete", Some(json!({"keys": ["KEY"]}))),
        (ADMIN, "/key/KEY/regenerate", Some(json!({}))),
        (ADMIN, "/key/KEY/forget", Some(json!({}))),
        (ADMIN, "/key/KEY/regenerate", None),
    ] {
        let text = |text: String| text.replace("KEY", secret);
        let body = body.map(|body| serde_json::from_str(&text(body.to_string())).expect("JSON"));
        let answer = world.with_key(key, &text(path.to_owned()), body).await;
        assert!(answer.status.is_client_error(), "{path}: {}", answer.text);
        assert!(!answer.text.contains(drawn), "{path}: {}", answer.text);
    }
}
