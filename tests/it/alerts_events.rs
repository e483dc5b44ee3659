//! The events of alerts, as webhooks get them: one of each kind, against a golden file.

use std::sync::Arc;

use jiff::tz::TimeZone;
use obol::control::alerts::rules::{Daily, Rules};
use obol::control::alerts::{Alert, Settled, Watch, slack};
use obol::control::budgets::{Budget, Crossing, Mode, Scope, Spender, Standing};
use obol::control::window::{Span, Window};
use obol::units::{Picos, RequestId, UnixNanos};
use serde_json::{Value, json};

/// 2026-11-22T17:00:00Z.
const NOW: UnixNanos = UnixNanos(1_795_366_800_000_000_000);
const DAY: u64 = 86_400_000_000_000;

/// The event without what is drawn.
fn settled_event(alert: &Alert) -> Value {
    let mut event = alert.event().clone();
    assert_eq!(event["id"], alert.id);
    assert!(alert.id.starts_with("alert_") && alert.id.len() == 38, "{}", alert.id);
    event["id"] = json!("alert_");
    for measured in ["seen", "usual"] {
        // Of logarithms: the last digits may be another machine's.
        if let Some(number) = event["obol"][measured].as_f64() {
            event["obol"][measured] = json!((number * 1e9).round() / 1e9);
        }
    }
    event
}

fn watch() -> Watch {
    let daily = Daily {
        over: Picos(2_500_000_000_000),
        scope: Scope::Team,
        value: Some("search".into()),
        zone: TimeZone::get("Europe/Berlin").expect("a zone"),
        zone_name: "Europe/Berlin".into(),
    };
    let request_cost = Some(Picos(1_000_000_000_000));
    Watch::new(Rules { request_cost, daily: vec![daily], ..Rules::default() }, "USD")
}

fn crossing(scope: Scope, value: &str, percent: u8) -> Crossing {
    Crossing {
        budget: "the month".into(),
        scope,
        value: value.into(),
        percent,
        spent: Picos(80_500_000_000_000),
        cap: Picos(100_000_000_000_000),
        span: Span { start: UnixNanos(NOW.0 - 20 * DAY), end: Some(UnixNanos(NOW.0 + 10 * DAY)) },
    }
}

fn settled(team: &str, cost: i128, at: UnixNanos) -> Settled {
    let who = Spender {
        key: Some("key_1".into()),
        team: Some(team.into()),
        feature: Some("chat".into()),
        user: Some("ann".into()),
        ..Spender::default()
    };
    Settled { request: RequestId("r1".into()), who, at, ended: at, cost: Picos(cost) }
}

#[test]
fn events_are_as_documented() {
    let mut watch = watch();
    let mut alerts = vec![
        watch.crossed(&crossing(Scope::Team, "search", 80), NOW),
        watch.crossed(&crossing(Scope::All, "", 100), NOW),
    ];
    let mut of_key = watch.crossed(&crossing(Scope::Key, "key_1", 100), NOW);
    assert_eq!(of_key.key(), Some("key_1"));
    of_key.name_key("88dc28", Some("prod"));
    alerts.push(of_key);
    alerts.extend(watch.settled(&[], &settled("search", 2_600_000_000_000, NOW)));
    alerts.extend(watch.conservation("cuda:0", (-3, 0), (NOW, NOW)));
    assert_eq!(alerts.len(), 6);
    let events: Vec<Value> = alerts.iter().map(settled_event).collect();
    insta::assert_json_snapshot!("alert_events", events);
    let texts: Vec<Value> = alerts.iter().map(|alert| slack(alert.event())).collect();
    insta::assert_json_snapshot!("alert_texts", texts);
}

/// Budgets that will not last and spend that is unusual, with what is seen of a steady stream of requests.
#[test]
fn events_of_forecasts_and_anomalies_are_as_documented() {
    let (second, hour) = (1_000_000_000, 3_600_000_000_000);
    let rules = Rules { anomalies: true, forecasts: true, ..Rules::default() };
    let mut watch = Watch::new(rules, "USD");
    let budget = Arc::new(Budget {
        id: "the hour".into(),
        scope: Scope::Team,
        value: None,
        cap: Picos(1_000_000_000_000),
        window: Window::Hour,
        zone: TimeZone::UTC,
        until: None,
        mode: Mode::Warn,
        soft: vec![100],
    });
    let span = Window::Hour.around(NOW, &TimeZone::UTC);
    assert_eq!(span.start, NOW);
    let standing = |spent| {
        vec![Standing {
            budget: budget.id.clone(),
            scope: budget.scope,
            value: "search".into(),
            mode: budget.mode,
            cap: budget.cap,
            spent: Picos(spent),
            leased: Picos::ZERO,
            span,
            is_each: true,
            until: None,
            reached: Vec::new(),
        }]
    };
    let mut spent = 0;
    let mut run = |watch: &mut Watch, from: u64, seconds: u64, cost: i128| {
        let mut alerts = Vec::new();
        for at in (from..from + seconds).step_by(2) {
            let at = UnixNanos(NOW.0 + at * second);
            spent += cost;
            alerts.extend(watch.settled(&[Arc::clone(&budget)], &settled("search", cost, at)));
            alerts.extend(watch.close(at, || standing(spent)));
        }
        alerts
    };
    // Two US cents a minute: 1.2 USD an hour.
    let usual = run(&mut watch, 0, 1_200, 666_666_667);
    let kinds: Vec<&str> = usual.iter().map(|alert| alert.kind.name()).collect();
    assert_eq!(kinds, ["forecast"], "once a window");
    let unusual = run(&mut watch, 1_200, 60, 20_000_000_000);
    let mut kinds: Vec<(&str, &str)> = unusual
        .iter()
        .map(|alert| (alert.kind.name(), alert.event()["obol"]["measure"].as_str().unwrap_or_default()))
        .collect();
    kinds.sort_unstable();
    let both = [("anomaly", "cost_per_request"), ("anomaly", "spend_rate")];
    // Of the key, and of the feature.
    assert_eq!(kinds, [both[0], both[0], both[1], both[1]]);
    let mut alerts = [usual, unusual].concat();
    alerts.sort_by(|a, b| a.once.cmp(&b.once));
    let events: Vec<Value> = alerts.iter().map(settled_event).collect();
    insta::assert_json_snapshot!("forecast_and_anomaly_events", events);
    let texts: Vec<Value> = alerts.iter().map(|alert| slack(alert.event())).collect();
    insta::assert_json_snapshot!("forecast_and_anomaly_texts", texts);
    let foreseen = watch.take_foreseen().expect("a minute has gone by");
    assert_eq!((foreseen[0].value.as_str(), Some(foreseen[0].end), foreseen.len()), ("search", span.end, 1));
    assert_eq!(watch.take_foreseen(), None, "it is taken");
    let projection = watch.projection(&standing(0)[0], UnixNanos(NOW.0 + hour / 2)).expect("enough is known");
    assert!(projection.low < projection.expected && projection.expected < projection.high);
}

#[test]
fn markup_in_names_is_text_to_slack() {
    let alert = watch().crossed(&crossing(Scope::User, "<!channel> & <a|b>", 80), NOW);
    let text = slack(alert.event())["text"].as_str().expect("a text").to_owned();
    assert!(text.contains("user \"&lt;!channel&gt; &amp; &lt;a|b&gt;\""), "{text}");
}

#[test]
fn a_days_total_is_of_the_day_in_its_zone_and_is_told_once() {
    let mut watch = watch();
    let kinds = |alerts: Vec<Alert>| alerts.iter().map(|alert| alert.kind.name()).collect::<Vec<_>>();
    let at = |hours: u64| UnixNanos(NOW.0 + hours * 3_600_000_000_000);
    let cost = 900_000_000_000;
    assert!(watch.settled(&[], &settled("search", cost, at(0))).is_empty());
    assert!(
        watch
            .settled(&[], &settled("other", 5 * cost, at(0)))
            .iter()
            .all(|a| a.kind.name() == "request_cost")
    );
    // Begun before Berlin's midnight, 23:00 in UTC.
    assert!(watch.settled(&[], &settled("search", cost, at(5))).is_empty());
    assert_eq!(kinds(watch.settled(&[], &settled("search", cost, at(5)))), ["daily_total"]);
    assert!(watch.settled(&[], &settled("search", cost, at(5))).is_empty(), "once a day");
    assert_eq!(watch.due(&[], at(5)).len(), 1, "it is still so");
    assert!(watch.due(&[], at(7)).is_empty(), "that day is over");
    assert!(watch.settled(&[], &settled("search", cost, at(7))).is_empty());
    assert!(watch.settled(&[], &settled("search", cost, at(8))).is_empty());
    assert!(
        watch
            .settled(&[], &settled("search", 9 * cost, at(4)))
            .iter()
            .all(|a| a.kind.name() == "request_cost")
    );
    let again = watch.settled(&[], &settled("search", cost, at(8)));
    assert_eq!(kinds(again), ["daily_total"]);
}

#[test]
fn what_was_charged_before_the_start_counts_for_the_day() {
    let mut watch = watch();
    assert_eq!(
        watch.counts_since(&[], NOW),
        Some(UnixNanos(1_795_302_000_000_000_000)),
        "midnight in Berlin"
    );
    let who = Spender { team: Some("search".into()), ..Spender::default() };
    watch.replay(&[], &who, NOW, Picos(2_500_000_000_000));
    assert!(watch.due(&[], NOW).is_empty(), "not over it");
    watch.replay(&[], &who, NOW, Picos(1));
    let due = watch.due(&[], NOW);
    assert_eq!(due[0].once, watch.due(&[], NOW)[0].once, "one name however often it is noticed");
}

#[test]
fn single_requests_do_not_drown_the_rest() {
    let mut watch = watch();
    let told: usize =
        (0..1_000).map(|_| watch.settled(&[], &settled("x", 2_000_000_000_000, NOW)).len()).sum();
    assert_eq!((told, watch.suppressed()), (60, 940));
    let later = UnixNanos(NOW.0 + 60_000_000_000);
    assert_eq!(watch.settled(&[], &settled("x", 2_000_000_000_000, later)).len(), 1);
}
