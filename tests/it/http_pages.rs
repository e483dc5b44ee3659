//! Web pages: which may call the server, and the reference that it shows of itself.

use axum::body::Body;
use axum::http::{Request, StatusCode};
use obol::config::Origin;
use serde_json::json;

use crate::http_world::{Options, guarded, world, world_with};

fn preflight(origin: &str) -> Request<Body> {
    Request::options("/v1/chat/completions")
        .header("origin", origin)
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "authorization, x-obol-team")
        .body(Body::empty())
        .expect("a request")
}

#[tokio::test]
async fn pages_of_named_origins_may_call_and_read_the_cost() {
    let mut options = Options { access: guarded(), ..Options::default() };
    options.http.cors_origins = vec!["https://tools.example.com".parse::<Origin>().expect("an origin")];
    let world = world_with(options);
    let answer = world.send(preflight("https://tools.example.com")).await;
    assert_eq!(answer.status, StatusCode::OK, "asked without a key: {}", answer.text);
    assert_eq!(answer.header("access-control-allow-origin"), "https://tools.example.com");
    assert_eq!(answer.header("access-control-allow-headers"), "authorization, x-obol-team");
    let other = world.send(preflight("https://elsewhere.example.com")).await;
    assert!(!other.headers.contains_key("access-control-allow-origin"));
    // A refusal can be read as well.
    let refused = Request::get("/v1/models").header("origin", "https://tools.example.com");
    let refused = world.send(refused.body(Body::empty()).expect("a request")).await;
    assert_eq!(refused.status, StatusCode::UNAUTHORIZED);
    assert_eq!(refused.header("access-control-expose-headers"), "*");
}

#[tokio::test]
async fn nobody_elses_pages_may_call_unless_that_is_said() {
    let answer = world().send(preflight("https://tools.example.com")).await;
    assert_eq!(answer.status, StatusCode::METHOD_NOT_ALLOWED);
    assert!(!answer.headers.contains_key("access-control-allow-origin"));
}

#[tokio::test]
async fn the_reference_is_open_to_all_also_while_the_model_loads() {
    let world = world_with(Options { access: guarded(), loading: true, ..Options::default() });
    let document = world.get("/openapi.json").await;
    assert_eq!(document.status, StatusCode::OK);
    assert_eq!(document.json()["openapi"], json!("3.1.0"));
    let page = world.get("/docs").await;
    assert_eq!(page.status, StatusCode::OK);
    assert_eq!(page.header("content-type"), "text/html; charset=utf-8");
    assert!(page.text.contains("/openapi.json"));
}
