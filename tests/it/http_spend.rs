//! What was spent, over HTTP: the same integer wherever a request's cost is shown.

use std::collections::BTreeMap;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use futures::stream::{self, StreamExt};
use obol::ledger::{By, ReportQuery, focus, report};
use obol::units::{Picos, RequestId};
use serde_json::{Value, json};

use crate::http_world::{World, world};
use crate::reports::focus_rules;

const REQUESTS: usize = 1000;

/// An exact amount in JSON.
fn picos(value: &Value) -> Picos {
    focus_rules::picos(value.as_str().expect("a decimal string"))
}

/// A number that stands for an exact amount is the nearest one.
fn is_nearest(number: &Value, money: Picos) {
    assert_eq!(number.as_f64(), Some(money.as_f64()), "{number}");
}

async fn json_of(world: &World, path: &str) -> Value {
    let answer = world.get(path).await;
    assert_eq!(answer.status, StatusCode::OK, "{path}: {}", answer.text);
    answer.json()
}

/// Asks once, as a team of its own; gives the request's id and what header and body say it cost.
async fn ask(world: &World, number: usize) -> (String, RequestId, Picos) {
    let team = format!("team-{number:04}");
    let body = json!({"model": "default", "prompt": format!("{number}"), "max_tokens": 1 + number % 4,
                      "user": format!("user-{}", number % 7)});
    let request = Request::post("/v1/completions")
        .header("x-obol-team", &team)
        .body(Body::from(body.to_string()))
        .expect("a request");
    let answer = world.send(request).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    let cost = focus_rules::picos(answer.header("x-obol-cost"));
    let usage = &answer.json()["usage"];
    assert_eq!(picos(&usage["obol"]["cost"]["total"]), cost);
    is_nearest(&usage["cost"], cost);
    (team, RequestId(answer.header("x-request-id").to_owned()), cost)
}

/// Costs by team, as a list of rows says them.
fn by_team<'a>(
    rows: impl IntoIterator<Item = &'a Value>,
    team: impl Fn(&'a Value) -> &'a Value,
    cost: impl Fn(&'a Value) -> Picos,
) -> BTreeMap<String, Picos> {
    let mut costs: BTreeMap<String, Picos> = BTreeMap::new();
    for row in rows {
        *costs.entry(team(row).as_str().expect("a team").to_owned()).or_default() += cost(row);
    }
    costs
}

fn list(value: &Value) -> &Vec<Value> {
    value.as_array().unwrap_or_else(|| panic!("not a list: {value}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_requests_cost_the_same_wherever_one_looks() {
    let world = world();
    let answers: Vec<_> =
        stream::iter(0..REQUESTS).map(|number| ask(&world, number)).buffer_unordered(16).collect().await;
    let right: BTreeMap<String, Picos> =
        answers.iter().map(|(team, _, cost)| (team.clone(), *cost)).collect();
    assert_eq!(right.len(), REQUESTS);
    assert!(right.values().all(|cost| *cost > Picos::ZERO));
    for (team, id, cost) in answers.iter().step_by(97) {
        let receipt = json_of(&world, &format!("/v1/requests/{id}")).await;
        assert_eq!((picos(&receipt["cost"]["total"]), &receipt["tags"]["team"]), (*cost, &json!(team)));
        let logs = json_of(&world, &format!("/spend/logs?request_id={id}")).await;
        assert_eq!(list(&logs).len(), 1);
        is_nearest(&logs[0]["spend"], *cost);
    }

    let logs = json_of(&world, "/spend/logs").await;
    let said = by_team(list(&logs), |row| &row["team_id"], |row| picos(&row["obol"]["cost"]["total"]));
    assert_eq!(said, right, "/spend/logs");

    let dir = world.data_dir.path();
    let by_teams = report(dir, &ReportQuery::by(&[By::Team])).expect("a report");
    let printed = by_teams.to_json();
    let said = by_team(list(&printed["rows"]), |row| &row["team"], |row| picos(&row["usage_cost"]));
    assert_eq!(said, right, "report, JSON");

    let csv = focus_rules::csv(&by_teams.to_csv());
    let column = |name: &str| csv[0].iter().position(|column| column == name).expect("a column");
    let (kind, team, cost) = (column("kind"), column("team"), column("usage_cost"));
    let rows = csv.iter().filter(|row| row[kind] == "usage");
    let said: BTreeMap<String, Picos> =
        rows.map(|row| (row[team].clone(), focus_rules::picos(&row[cost]))).collect();
    assert_eq!(said, right, "report, CSV");

    let mut said: BTreeMap<String, Picos> = BTreeMap::new();
    let mut text = String::new();
    let append = |rows: &str| {
        text += rows;
        Ok(())
    };
    focus(dir, &ReportQuery::by(&[]), append).expect("rows");
    for row in focus_rules::check(&text).iter().filter(|row| !row["Tags"].is_empty()) {
        let tags: Value = serde_json::from_str(&row["Tags"]).expect("JSON");
        let team = tags["team"].as_str().expect("a team").to_owned();
        *said.entry(team).or_default() += focus_rules::picos(&row["BilledCost"]);
    }
    assert_eq!(said, right, "FOCUS");

    for (more, both) in [("", 1), ("&group_by=line_item", 2)] {
        let mut results = Vec::new();
        let costs = format!("/v1/organization/costs?start_time=0&limit=180&group_by[]=team{more}");
        let start = 86_400 * (world.app.clock().wall().0 / 86_400_000_000_000);
        let costs = costs.replace("start_time=0", &format!("start_time={}", start - 86_400));
        let page = json_of(&world, &costs).await;
        assert_eq!(page["has_more"], false);
        for bucket in list(&page["data"]) {
            results.extend(list(&bucket["results"]).clone());
        }
        assert_eq!(results.len(), REQUESTS * both);
        let said = by_team(&results, |row| &row["team"], |row| picos(&row["obol"]["value"]));
        assert_eq!(said, right, "costs{more}");
        for row in &results {
            is_nearest(&row["amount"]["value"], picos(&row["obol"]["value"]));
            assert_eq!(row["amount"]["currency"], "usd");
        }
    }

    let days = json_of(&world, "/global/spend/report?group_by=team").await;
    let teams: Vec<&Value> = list(&days).iter().flat_map(|day| list(&day["teams"])).collect();
    let said = by_team(teams, |row| &row["team_name"], |row| picos(&row["obol"]["total_spend"]));
    assert_eq!(said, right, "/global/spend/report");
}

#[tokio::test]
async fn users_models_and_tokens_add_up_in_every_shape() {
    let world = world();
    let mut total = Picos::ZERO;
    for number in 0..12 {
        total += ask(&world, number).await.2;
    }
    let customers = json_of(&world, "/global/spend/report?group_by=customer").await;
    let customers: Vec<&Value> = list(&customers).iter().flat_map(|day| list(&day["customers"])).collect();
    assert!(customers.len() >= 7);
    assert_eq!(customers.iter().map(|row| picos(&row["obol"]["total_spend"])).sum::<Picos>(), total);
    let one = json_of(&world, "/global/spend/report?group_by=customer&customer_id=user-3").await;
    assert_eq!(one[0]["customers"][0]["customer"], "user-3");
    assert_eq!(list(&one[0]["customers"][0]["metadata"])[0]["model"], "fake/model");

    let keys = json_of(&world, "/global/spend/report?group_by=api_key").await;
    assert_eq!(list(&keys).len(), 1, "nobody has a key");
    assert_eq!(picos(&keys[0]["obol"]["total_cost"]), total);

    let today = obol::ledger::Calendar::utc().text(world.app.clock().wall());
    let days = json_of(&world, &format!("/spend/logs?start_date=2020-01-01&end_date={}", &today[..10])).await;
    assert_eq!(list(&days).iter().map(|day| picos(&day["obol"]["spend"])).sum::<Picos>(), total);
    let users: Picos = list(&days)
        .iter()
        .flat_map(|day| day["obol"]["users"].as_object().expect("users").values())
        .map(picos)
        .sum();
    assert_eq!(users, total);
    let logs = json_of(&world, "/spend/logs?start_date=2020-01-01&summarize=false&user_id=user-3").await;
    assert_eq!(list(&logs).len(), 2);
    let first = world.get("/spend/logs?limit=5").await;
    assert_eq!(first.header("x-obol-has-more"), "true");
    let last = first.json()[4]["request_id"].as_str().expect("an id").to_owned();
    let rest = world.get(&format!("/spend/logs?after={last}")).await;
    assert_eq!((rest.header("x-obol-has-more"), list(&rest.json()).len()), ("false", 7));

    let start = world.app.clock().wall().0 / 1_000_000_000 - 86_400;
    let usage = json_of(
        &world,
        &format!(
            "/v1/organization/usage/completions?start_time={start}&bucket_width=1h&limit=48&group_by=model"
        ),
    )
    .await;
    let results: Vec<&Value> =
        list(&usage["data"]).iter().flat_map(|bucket| list(&bucket["results"])).collect();
    let sum = |name: &str| results.iter().map(|row| row[name].as_u64().expect("a count")).sum::<u64>();
    assert_eq!(sum("num_model_requests"), 12);
    let all = list(&json_of(&world, "/v1/requests").await["data"]).clone();
    let tokens =
        |name: &str| all.iter().map(|row| row["tokens"][name].as_u64().expect("a count")).sum::<u64>();
    assert_eq!(sum("input_tokens"), tokens("prompt"));
    assert_eq!(sum("input_cached_tokens"), tokens("cached"));
    assert_eq!(sum("output_tokens"), tokens("completion"));
    assert!(results.iter().all(|row| row["model"] == "fake/model" && row["project_id"].is_null()));

    let refused = world.get("/v1/organization/costs").await;
    assert_eq!(refused.status, StatusCode::BAD_REQUEST);
    assert_eq!(refused.json()["error"]["param"], "start_time");
}
