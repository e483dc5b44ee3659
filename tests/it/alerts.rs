//! Alerts on their way to webhooks: real sockets that are down, slow, broken or well.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use jiff::tz::TimeZone;
use obol::alerting::{Alerting, Parts, Tuning, Webhook};
use obol::clock::{Clock, ManualClock, SystemClock};
use obol::control::alerts::rules::{Daily, Rules};
use obol::control::budgets::{Budget, Budgets, Mode, Scope, Spender};
use obol::control::forecast::Projection;
use obol::control::foreseen::Foreseen;
use obol::control::outbox::{Outbox, Raised};
use obol::control::window::Window;
use obol::control::{Actor, Control, KeySettings};
use obol::ledger::{DeviceInfo, Ledger, OpenOptions, Page, RateCard, ReceiptFilter};
use obol::pipeline::{Policy, foreseen};
use obol::units::{DeviceNanos, Picos, RequestId, UnixNanos};
use serde_json::{Value, json};

use crate::http_keys::generate;
use crate::http_world::{ADMIN, Options, guarded, wait_until, world_with};

/// Quick, so that tests see many attempts.
pub(crate) const TUNING: Tuning = Tuning {
    tick: Duration::from_millis(10),
    timeout: Duration::from_millis(300),
    backoff: Duration::from_millis(5),
    backoff_max: Duration::from_millis(40),
    farewell: Duration::from_millis(100),
};

/// What a receiver does with a call.
#[derive(Debug, Clone, Copy)]
enum Reply {
    Status(u16),
    /// Nothing, until the caller has gone.
    Silence,
}

#[derive(Debug, Clone)]
struct Call {
    path: String,
    key: String,
    body: Value,
}

/// A webhook's other end.
struct Receiver {
    address: SocketAddr,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl Receiver {
    /// Answers the n-th call as `reply` says.
    fn on(listener: TcpListener, reply: impl Fn(usize) -> Reply + Send + 'static) -> Self {
        let address = listener.local_addr().expect("an address");
        let calls = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&calls);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.expect("a connection"), &heard, &reply);
            }
        });
        Self { address, calls }
    }

    fn new(reply: impl Fn(usize) -> Reply + Send + 'static) -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").expect("a free port"), reply)
    }

    fn calls(&self) -> Vec<Call> {
        self.calls.lock().expect("no test panics with it").clone()
    }

    /// The members of all calls so far.
    fn heard(&self, member: &str) -> Vec<String> {
        self.calls().iter().map(|call| call.body[member].as_str().unwrap_or_default().to_owned()).collect()
    }
}

fn answer(mut stream: TcpStream, calls: &Mutex<Vec<Call>>, reply: &impl Fn(usize) -> Reply) {
    let mut text = Vec::new();
    let mut part = [0; 4096];
    let (head, body) = loop {
        match stream.read(&mut part) {
            Ok(0) | Err(_) => return,
            Ok(read) => text.extend_from_slice(&part[..read]),
        }
        let known = String::from_utf8_lossy(&text).into_owned();
        let Some((head, body)) = known.split_once("\r\n\r\n") else { continue };
        let length = header(head, "content-length").parse::<usize>().expect("a length");
        if body.len() >= length {
            break (head.to_owned(), body.to_owned());
        }
    };
    let path = head.split(' ').nth(1).expect("a path").to_owned();
    let call = Call {
        path,
        key: header(&head, "idempotency-key"),
        body: serde_json::from_str(&body).expect("JSON"),
    };
    let number = {
        let mut calls = calls.lock().expect("no test panics with it");
        calls.push(call);
        calls.len() - 1
    };
    match reply(number) {
        Reply::Status(status) => {
            let answer = format!("HTTP/1.1 {status} x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            // The caller may be gone; then the test sees what it does next.
            let _ = stream.write_all(answer.as_bytes());
        }
        Reply::Silence => while matches!(stream.read(&mut part), Ok(read) if read > 0) {},
    }
}

fn header(head: &str, name: &str) -> String {
    let line = head.lines().find_map(|line| {
        let (known, value) = line.split_once(": ")?;
        known.eq_ignore_ascii_case(name).then(|| value.to_owned())
    });
    line.unwrap_or_else(|| panic!("no header {name} in {head}"))
}

fn webhook(at: SocketAddr, format: &str) -> Webhook {
    Webhook::parse(1, &format!("http://{at}/hooks/very-secret"), Some(format)).expect("an address")
}

/// What alerts stand on, without an engine.
struct Ground {
    dir: tempfile::TempDir,
    ledger: Ledger,
    clock: Arc<dyn Clock>,
    _reports: std::sync::mpsc::Sender<obol::usage::MeterReport>,
}

impl Ground {
    fn new() -> Self {
        Self::with(Arc::new(SystemClock::start()))
    }

    fn with(clock: Arc<dyn Clock>) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let device = DeviceInfo { id: "cpu".into(), kind: "cpu".into(), name: "a test".into() };
        let rate = RateCard::parse("1", "0.2", "USD", None).expect("a rate");
        let options = OpenOptions::one(device, rate, clock.wall(), "boot".into());
        let (ledger, reports) = Ledger::open(dir.path(), &options).expect("a ledger");
        Self { dir, ledger, clock, _reports: reports }
    }

    fn start(&self, budgets: &Budgets, webhooks: Vec<Webhook>) -> Alerting {
        Alerting::start(Parts {
            data_dir: self.dir.path().to_owned(),
            rules: Rules { forecasts: true, ..Rules::default() },
            webhooks,
            budgets: budgets.clone(),
            ledger: self.ledger.clone(),
            control: None,
            clock: Arc::clone(&self.clock),
            currency: "USD".into(),
            tuning: TUNING,
        })
        .expect("alerts")
    }

    /// Spends so much of each budget.
    fn spend(&self, budgets: &Budgets, team: &str, cost: i128) {
        let who = Spender { team: Some(team.to_owned()), ..Spender::default() };
        let hold = budgets.admit(&RequestId::new(), &who, self.clock.wall());
        hold.expect("there is room").settle(Picos(cost));
    }

    fn listed(&self) -> Vec<Raised> {
        listed(self.dir.path())
    }
}

fn listed(dir: &Path) -> Vec<Raised> {
    Outbox::list(dir, None, None).expect("alerts can be read")
}

/// Of each team, 100 a lifetime.
fn budgets(soft: Vec<u8>) -> Budgets {
    Budgets::new([budget(Picos(100), soft)])
}

fn budget(cap: Picos, soft: Vec<u8>) -> Budget {
    Budget {
        id: "teams".into(),
        scope: Scope::Team,
        value: None,
        cap,
        window: Window::Lifetime,
        zone: TimeZone::UTC,
        until: None,
        mode: Mode::Block,
        soft,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_requests_cost_is_told_to_webhooks_in_both_shapes() {
    let json = Receiver::new(|_| Reply::Status(200));
    let slack = Receiver::new(|_| Reply::Status(204));
    let world = world_with(Options {
        policy: Policy { budgets: vec![budget(Picos(3_000_000), vec![50, 100])], ..Policy::default() },
        alerts: Rules {
            request_cost: Some(Picos(1)),
            daily: vec![Daily {
                over: Picos(10),
                scope: Scope::Feature,
                value: None,
                zone: TimeZone::UTC,
                zone_name: "UTC".into(),
            }],
            ..Rules::default()
        },
        webhooks: vec![webhook(json.address, "json"), webhook(slack.address, "slack")],
        ..Options::default()
    });
    let question = json!({
        "model": "fake/model", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 40,
        "ignore_eos": true,
    });
    let mut requests = 0;
    loop {
        let request = Request::post("/v1/chat/completions")
            .header("x-obol-team", "search")
            .header("x-obol-feature", "chat")
            .body(Body::from(question.to_string()));
        let answer = world.send(request.expect("a request")).await;
        if answer.status != 200 {
            break;
        }
        requests += 1;
    }
    let (world, (json, slack)) = tokio::task::spawn_blocking(move || {
        wait_until("both to have heard all", || {
            json.calls().len() == requests + 3 && slack.calls().len() == requests + 3
        });
        (world, (json, slack))
    })
    .await
    .expect("it is heard");
    let mut events = json.heard("event");
    events.sort();
    let mut want = vec!["budget_crossed", "daily_total_exceeded", "threshold_crossed"];
    want.extend(vec!["request_cost_exceeded"; requests]);
    want.sort_unstable();
    assert_eq!(events, want);
    for call in json.calls() {
        assert_eq!((call.path.as_str(), &call.body["id"]), ("/hooks/very-secret", &json!(call.key)));
    }
    let crossed = json.calls().into_iter().find(|call| call.body["event"] == "budget_crossed");
    let crossed = crossed.expect("it was there").body;
    assert_eq!(
        (&crossed["event_group"], &crossed["team_id"], &crossed["max_budget"], &crossed["obol"]["spent"]),
        (&json!("team"), &json!("search"), &json!(3e-6), &json!("0.000003000000"))
    );
    let texts = slack.heard("text");
    assert!(texts.iter().any(|text| text.contains("100 % of the budget \"teams\" of team \"search\"")));

    let metrics = world.get("/metrics").await.text;
    for line in [
        "obol_alerts_total{kind=\"budget\"} 2\n".to_owned(),
        format!("obol_alerts_total{{kind=\"request_cost\"}} {requests}\n"),
        "obol_alerts_total{kind=\"daily_total\"} 1\n".to_owned(),
        "obol_alerts_total{kind=\"ledger\"} 0\n".to_owned(),
        "obol_budget_spent{budget=\"teams\",scope=\"team\",value=\"search\"} 0.000003000000\n".to_owned(),
        "obol_budget_cap{budget=\"teams\",scope=\"team\",value=\"search\"} 0.000003000000\n".to_owned(),
    ] {
        assert!(metrics.contains(&line), "{line} in {metrics}");
    }
    let raised = listed(world.data_dir.path());
    assert_eq!(raised.len(), requests + 3);
    wait_until("all to be on the books", || {
        let raised = listed(world.data_dir.path());
        raised.iter().all(|alert| alert.sends.iter().all(|send| send.sent_at.is_some()))
    });
    for file in ["control.db", "control.db-wal"] {
        let bytes = std::fs::read(world.data_dir.path().join(file)).expect("a file");
        assert!(!bytes.windows(11).any(|part| part == b"very-secret"), "{file} has the address");
    }
}

#[test]
fn a_webhook_that_was_down_hears_everything_afterwards_once_and_in_order() {
    let ground = Ground::new();
    let budgets = budgets(vec![10, 20, 30, 40, 50, 60, 70, 80, 90, 100]);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address");
    drop(listener);
    let well = Receiver::new(|_| Reply::Status(200));
    let alerting = ground.start(&budgets, vec![webhook(address, "json"), webhook(well.address, "json")]);
    for _ in 0..10 {
        ground.spend(&budgets, "a", 10);
    }
    wait_until("the well one to hear all", || well.calls().len() == 10);
    wait_until("some attempts", || ground.listed()[0].sends.iter().any(|send| send.attempts > 3));
    let waits = ground.listed()[9].sends.iter().find(|send| send.sent_at.is_none()).cloned();
    assert_eq!(waits.expect("one waits").attempts, 0, "what is behind the first one waits with it");
    let back =
        Receiver::on(TcpListener::bind(address).expect("the port is still free"), |_| Reply::Status(200));
    wait_until("it to hear all", || back.calls().len() == 10);
    assert_eq!(back.heard("id"), well.heard("id"));
    wait_until("nothing to be left", || alerting.unsent() == 0);
    alerting.close();
    assert_eq!((back.calls().len(), well.calls().len()), (10, 10), "each once");
}

#[test]
fn what_is_not_acknowledged_is_sent_again_with_the_same_id() {
    let ground = Ground::new();
    let budgets = budgets(vec![50, 100]);
    let replies = [Reply::Status(500), Reply::Silence, Reply::Status(429), Reply::Status(503)];
    let receiver = Receiver::new(move |call| replies.get(call).copied().unwrap_or(Reply::Status(202)));
    let alerting = ground.start(&budgets, vec![webhook(receiver.address, "json")]);
    ground.spend(&budgets, "a", 100);
    wait_until("it to hear all", || receiver.calls().len() == 6);
    wait_until("nothing to be left", || alerting.unsent() == 0);
    alerting.close();
    let ids = receiver.heard("id");
    assert!(ids[..5].iter().all(|id| *id == ids[0]) && ids[5] != ids[0], "{ids:?}");
    let sends: Vec<u32> = ground.listed().iter().map(|alert| alert.sends[0].attempts).collect();
    assert_eq!(sends, [5, 1]);
}

#[test]
fn what_a_webhook_rejects_holds_nothing_up_and_is_given_up() {
    let ground = Ground::new();
    let budgets = budgets(vec![50, 100]);
    let receiver = Receiver::new(|_| Reply::Status(400));
    let alerting = ground.start(&budgets, vec![webhook(receiver.address, "json")]);
    ground.spend(&budgets, "a", 100);
    wait_until("it to have said no to all", || receiver.calls().len() == 20);
    wait_until("nothing to be left", || alerting.unsent() == 0);
    alerting.close();
    assert_eq!(receiver.calls().len(), 20);
    for alert in ground.listed() {
        let send = &alert.sends[0];
        assert!(send.given_up_at.is_some() && send.sent_at.is_none());
        assert_eq!((send.attempts, send.error.as_deref()), (10, Some("it answered 400")));
    }
}

#[test]
fn an_alert_is_told_once_across_restarts() {
    let ground = Ground::new();
    let budgets = budgets(vec![50, 100]);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address");
    drop(listener);
    let alerting = ground.start(&budgets, vec![webhook(address, "json")]);
    ground.spend(&budgets, "a", 60);
    wait_until("it to be written down", || ground.listed().len() == 1);
    alerting.close();
    drop(alerting);

    // What a start makes of the receipts: a limit that was reached is not a crossing any more.
    let again = self::budgets(vec![50, 100]);
    let who = |team: &str| Spender { team: Some(team.to_owned()), ..Spender::default() };
    let now = ground.clock.wall();
    again.replay(&who("a"), now, Picos(60), now);
    // Another was reached just before a crash, and nothing was written down.
    again.replay(&who("b"), now, Picos(50), now);
    let receiver =
        Receiver::on(TcpListener::bind(address).expect("the port is still free"), |_| Reply::Status(200));
    let alerting = ground.start(&again, vec![webhook(address, "json")]);
    wait_until("it to hear of both", || receiver.calls().len() == 2);
    wait_until("nothing to be left", || alerting.unsent() == 0);
    alerting.close();
    assert_eq!(receiver.heard("team_id"), ["a", "b"]);

    let alerting = ground.start(&again, vec![webhook(address, "json")]);
    ground.spend(&again, "a", 40);
    wait_until("it to hear of the cap", || receiver.calls().len() == 3);
    alerting.close();
    assert_eq!(receiver.heard("event"), ["threshold_crossed", "threshold_crossed", "budget_crossed"]);
    assert_eq!(ground.listed().len(), 3);
}

#[test]
fn what_is_meant_for_a_webhook_that_is_gone_is_given_up() {
    let ground = Ground::new();
    let budgets = budgets(vec![50]);
    let receiver = Receiver::new(|_| Reply::Status(500));
    let alerting = ground.start(&budgets, vec![webhook(receiver.address, "json")]);
    ground.spend(&budgets, "a", 60);
    wait_until("it to be tried", || !receiver.calls().is_empty());
    alerting.close();
    ground.start(&budgets, Vec::new()).close();
    let listed = ground.listed();
    let send = &listed[0].sends[0];
    assert!(send.given_up_at.is_some());
    assert_eq!(send.error.as_deref(), Some("the webhook is not configured any more"));
    let line = listed[0].to_json();
    assert_eq!(line["sends"][0]["host"], receiver.address.to_string());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_a_keys_budget_will_end_is_written_down_for_who_asks() {
    let world = world_with(Options::default());
    let hello = json!({"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4});
    let hello = Request::post("/v1/chat/completions").body(Body::from(hello.to_string()));
    assert_eq!(world.send(hello.expect("a request")).await.status, 200);
    let page = world.ledger.receipts(&ReceiptFilter::default(), &Page { limit: 1, after: None });
    let receipt = page.expect("readable").receipts.remove(0);
    let cost = receipt.total();
    assert!(cost.0 > 0);

    // 2026-11-22T00:00:00Z: a request an hour, and a day that has sixteen of them to come.
    const HOUR: u64 = 3_600_000_000_000;
    let midnight = UnixNanos(1_795_305_600_000_000_000);
    let clock = Arc::new(ManualClock::at_wall(midnight));
    let ground = Ground::with(Arc::clone(&clock) as Arc<dyn Clock>);
    let control = Control::open(ground.dir.path(), Arc::clone(&ground.clock)).expect("keys");
    let day = "1d".parse().expect("a span");
    let settings =
        KeySettings { budget_duration: Some(day), max_budget: Some(cost), ..KeySettings::default() };
    let (_, key) = control.create(&Actor::cli(), settings).expect("a key");
    let budgets = Budgets::new([Budget {
        id: format!("key {}", key.id.0),
        scope: Scope::Key,
        value: Some(key.id.0.clone()),
        window: Window::Day,
        mode: Mode::Warn,
        ..budget(cost, vec![100])
    }]);
    let alerting = ground.start(&budgets, Vec::new());
    let who = Spender { key: Some(key.id.0.clone()), ..Spender::default() };
    for _ in 0..8 {
        let (now, mut hourly) = (ground.clock.wall(), receipt.clone());
        hourly.attribution.key_id = Some(key.id.0.clone());
        (hourly.usage.submitted_at, hourly.usage.finished_at) = (now, now);
        budgets.admit(&RequestId::new(), &who, now).expect("it only warns").settle(cost);
        alerting.settled(&hourly);
        clock.advance(DeviceNanos(HOUR));
    }
    let mut said = None;
    wait_until("the budget's end to be foreseen", || {
        // Budgets are looked at once a minute.
        clock.advance(DeviceNanos(60_000_000_000));
        let all = control.foreseen().expect("readable");
        said = foreseen(&all, &key, ground.clock.wall()).cloned();
        said.is_some()
    });
    alerting.close();
    let said = said.expect("it was there");
    assert_eq!((said.end, &said.value), (UnixNanos(midnight.0 + 24 * HOUR), &key.id.0));
    let projection = said.projection;
    assert!(projection.low < projection.expected && projection.expected < projection.high);
    // What is spent already, and of what is to come what the clock has left.
    assert!(
        projection.expected > Picos(8 * cost.0) && projection.expected <= Picos(26 * cost.0),
        "{projection:?}"
    );
    ground.start(&budgets, Vec::new()).close();
    clock.advance(DeviceNanos(24 * HOUR));
    assert_eq!(control.foreseen().expect("readable"), [], "that day is over");
}

#[tokio::test]
async fn where_a_keys_budget_will_end_stands_beside_its_spend() {
    let world = world_with(Options { access: guarded(), ..Options::default() });
    let budget = json!({"max_budget": 2, "budget_duration": "30d", "key_alias": "prod"});
    let (secret, made) = generate(&world, budget).await;
    assert_eq!(made["projected_spend"], Value::Null);
    let id = made["key_id"].as_str().expect("an id").to_owned();
    let (key, _) = world.control.resolve(&id).expect("a key");
    let at = world.control.now();
    let money = |text| Picos::parse(text).expect("money");
    let foreseen = Foreseen {
        budget: format!("key {id}"),
        value: id,
        end: obol::pipeline::budget_resets_at(&key, at).expect("a window that ends"),
        at,
        projection: Projection { expected: money("1.5"), low: money("1.25"), high: money("1.75") },
    };
    let mut outbox = Outbox::open(world.data_dir.path()).expect("an outbox");
    outbox.foresee(std::slice::from_ref(&foreseen)).expect("written");
    let exact = json!({
        "expected": "1.500000000000", "low": "1.250000000000", "high": "1.750000000000",
        "window_end": obol::control::rfc3339(foreseen.end), "at": obol::control::rfc3339(at),
    });
    let said = |info: &Value| {
        assert_eq!((&info["projected_spend"], &info["obol"]["projected"]), (&json!(1.5), &exact))
    };
    said(&world.with_key(ADMIN, "/key/info?key=prod", None).await.json()["info"]);
    said(&world.with_key(&secret, "/key/info", None).await.json()["info"]);
    said(&world.with_key(ADMIN, "/key/list?return_full_object=true", None).await.json()["keys"][0]);
    said(&world.with_key(ADMIN, "/key/block", Some(json!({"key": "prod"}))).await.json());

    let changed = json!({"key": "prod", "budget_duration": "7d"});
    let changed = world.with_key(ADMIN, "/key/update", Some(changed)).await;
    assert_eq!(changed.status, 200, "{}", changed.text);
    let info = &world.with_key(ADMIN, "/key/info?key=prod", None).await.json()["info"];
    assert_eq!(info["projected_spend"], Value::Null, "of another window nothing is foreseen yet");
}
