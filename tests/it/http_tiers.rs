//! Service tiers at the door: who may ask for which, what the answer says of it, and what it costs.

use axum::http::StatusCode;
use obol::http::Access;
use obol::ledger::{By, ReportQuery, audit, report};
use obol::units::Picos;
use serde_json::{Value, json};

use crate::http_world::{Options, World, world, world_with};

fn question(tier: Value) -> Value {
    let messages = json!([{"role": "user", "content": "Hello there"}]);
    json!({"model": "fake", "messages": messages, "max_tokens": 9, "ignore_eos": true, "service_tier": tier})
}

fn picos(decimal: &Value) -> i128 {
    decimal.as_str().expect("a decimal string").replace('.', "").parse().expect("twelve places")
}

/// What the answer was charged, and what its tier took off, after all that must be so of one.
async fn asked(world: &World, tier: Value, given: &str) -> (Picos, Picos) {
    let answer = world.chat(question(tier)).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    let body = answer.json();
    let receipt = &body["usage"]["obol"];
    assert_eq!((&body["service_tier"], &receipt["service_tier"]), (&json!(given), &json!(given)));
    let cost = &receipt["cost"];
    assert_eq!(answer.header("x-obol-cost"), cost["total"]);
    let [total, time, memory, discount] =
        ["total", "time", "memory", "discount"].map(|name| picos(&cost[name]));
    assert_eq!(total, time + memory - discount, "{cost}");
    let price = if given == "flex" { 3 } else { 0 };
    assert_eq!(discount, (time + memory) * price / 10, "{cost}");
    (Picos(total), Picos(discount))
}

#[tokio::test]
async fn a_tier_costs_its_part_and_the_house_pays_the_rest() {
    let world = world();
    let mut paid = [Picos::ZERO; 2];
    for (tier, given) in [
        (json!("flex"), "flex"),
        (json!("auto"), "default"),
        (Value::Null, "default"),
        (json!("priority"), "priority"),
    ] {
        let (total, discount) = asked(&world, tier, given).await;
        paid[0] += total;
        paid[1] += discount;
    }
    assert!(paid[1] > Picos::ZERO);
    let audited = audit(world.data_dir.path()).expect("a ledger");
    assert!(audited.is_reconciled(), "{audited}");
    let spent = report(world.data_dir.path(), &ReportQuery::by(&[By::Tier])).expect("a report");
    let rows: Vec<_> = spent.rows.iter().map(|row| (row.group[0].as_str(), row.spend.requests)).collect();
    assert_eq!(rows, [("default", 2), ("flex", 1), ("priority", 1)]);
    assert_eq!(spent.rows.iter().map(|row| row.spend.usage_cost).sum::<Picos>(), paid[0]);
    assert_eq!(spent.rows.iter().map(|row| row.spend.discount).sum::<Picos>(), paid[1]);
    let house = spent.house.iter().find(|house| house.account == "house:tier_discount").expect("an account");
    assert_eq!(house.money, paid[1]);
}

#[tokio::test]
async fn streams_name_their_tier_in_every_chunk() {
    let world = world();
    let mut body = question(json!("flex"));
    body["stream"] = json!(true);
    let answer = world.chat(body).await;
    let chunks = answer.events();
    assert!(chunks.len() > 3, "{}", answer.text);
    assert!(
        chunks.iter().filter(|chunk| chunk.is_object()).all(|chunk| chunk["service_tier"] == "flex"),
        "{}",
        answer.text
    );
}

#[tokio::test]
async fn priority_is_for_those_that_are_named() {
    let of = |tenants: &[&str]| {
        let tenants: Vec<String> = tenants.iter().map(|name| (*name).to_owned()).collect();
        world_with(Options {
            access: Access { priority: Some(tenants.into()), ..Access::default() },
            ..Options::default()
        })
    };
    let answer = of(&["search"]).chat(question(json!("priority"))).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    let error = &answer.json()["error"];
    assert_eq!(error["param"], "service_tier");
    assert!(error["message"].as_str().expect("a message").contains("scheduling.priority"), "{error}");
    asked(&of(&["search", "anonymous"]), json!("priority"), "priority").await;
    asked(&of(&[]), json!("flex"), "flex").await;
}
