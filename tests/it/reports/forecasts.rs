//! What is foreseen of budgets and months, against the receipts; and what the formats say.

use std::process::{Command, Output};

use jiff::tz::TimeZone;
use obol::control::budgets::{Budget, Mode, Scope, Spender};
use obol::control::window::Window;
use obol::ledger::Receipt;
use obol::pipeline::outlook::{Asked, End, Foresight, Outlook};
use obol::request::Finish;
use obol::units::{Picos, UnixNanos};
use serde_json::Value;

use super::{HOUR, world};

fn budget(id: &str, scope: Scope, value: Option<&str>, cap: &str, window: Window) -> Budget {
    Budget {
        id: id.to_owned(),
        scope,
        value: value.map(str::to_owned),
        cap: Picos::parse(cap).expect("money"),
        window,
        zone: TimeZone::UTC,
        until: None,
        mode: Mode::Block,
        soft: vec![100],
    }
}

/// Half an hour after the last request.
fn outlook(dir: &std::path::Path, receipts: &[Receipt]) -> Outlook {
    let last = receipts.iter().map(|receipt| receipt.usage.finished_at.0).max().expect("a receipt");
    let budgets = vec![
        budget("everything", Scope::All, None, "5", Window::Lifetime),
        budget("spent", Scope::All, None, "0.000000000001", Window::Month),
        budget("months", Scope::All, None, "0.001", Window::Month),
        budget("teams", Scope::Team, None, "0.0002", Window::Week),
        budget("nobody's", Scope::Key, Some("key_of_nobody"), "1", Window::Day),
    ];
    let asked = Asked { budgets, totals: vec![Scope::Team, Scope::Key], zone: TimeZone::UTC };
    Outlook::read(dir, asked, &[], UnixNanos(last + HOUR / 2)).expect("a ledger")
}

/// What receipts charged in the row's window.
fn charged(row: &Foresight, receipts: &[Receipt]) -> Picos {
    let counts = |receipt: &&Receipt| {
        let who = receipt.attribution.clone();
        let who = Spender::of(who.key_id, &who.tenant, who.user, &who.tags);
        let at = receipt.usage.submitted_at;
        let within = row.span.start <= at && row.span.end.is_none_or(|end| at < end);
        within && receipt.usage.status != Finish::Error && who.value(row.scope) == Some(&row.value)
    };
    receipts.iter().filter(counts).map(Receipt::total).sum()
}

#[test]
fn what_is_spent_is_what_receipts_charged_and_the_rest_is_foreseen() {
    let mut foreseen = 0;
    for seed in [3, 4, 5] {
        let (dir, receipts) = world(seed, 140, true);
        let outlook = outlook(dir.path(), &receipts);
        assert_eq!(outlook.currency.as_deref(), Some("USD"));
        for row in &outlook.rows {
            assert_eq!(row.spent, charged(row, &receipts), "{row:?}");
            assert_eq!(matches!(row.end, End::Never), row.window == "lifetime");
            let End::Projected { projection, met } = row.end else { continue };
            foreseen += 1;
            assert!(row.spent <= projection.low && projection.low <= projection.expected, "{row:?}");
            assert!(projection.expected <= projection.high, "{row:?}");
            let will_be = row.cap.is_some_and(|cap| row.spent < cap && cap < projection.expected);
            assert_eq!(met.is_some(), will_be, "{row:?}");
            let until = row.span.end.expect("what is projected has an end");
            assert!(met.is_none_or(|met| outlook.now <= met && met <= until), "{row:?}");
        }
        let row = |budget: Option<&str>, scope| {
            let mut rows = outlook.rows.iter();
            rows.find(|row| row.budget.as_deref() == budget && row.scope == scope).expect("a row")
        };
        assert!(row(Some("spent"), Scope::All).is_met());
        let untouched = row(Some("nobody's"), Scope::Key);
        assert_eq!((untouched.spent, untouched.end), (Picos::ZERO, End::Unknown));
        assert_eq!(row(None, Scope::All).spent, row(Some("months"), Scope::All).spent);
        let teams = outlook.rows.iter().filter(|row| row.budget.is_none() && row.scope == Scope::Team);
        assert!(teams.map(|row| row.spent).sum::<Picos>() <= row(None, Scope::All).spent);
    }
    assert!(foreseen > 10, "{foreseen} windows");
}

#[test]
fn the_formats_are_as_they_were() {
    let (dir, receipts) = world(3, 140, true);
    let outlook = outlook(dir.path(), &receipts);
    insta::assert_snapshot!("forecast_table", outlook.to_table());
    insta::assert_snapshot!("forecast_csv", outlook.to_csv().replace("\r\n", "\n"));
    let json = serde_json::to_string_pretty(&outlook.to_json()).expect("JSON");
    insta::assert_snapshot!("forecast_json", json);
}

fn obol(dir: &std::path::Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_obol"))
        .args(["report", "--forecast", "--data-dir"])
        .arg(dir)
        .args(arguments)
        .current_dir(dir)
        .output()
        .expect("the program runs")
}

#[test]
fn the_command_takes_the_configurations_budgets_and_refuses_what_it_cannot_foresee() {
    let (dir, _) = world(6, 30, true);
    let config = dir.path().join("budgets.toml");
    let budget = "[[budgets]]\nname = 'house'\nscope = 'all'\ncap = 7\nwindow = 'month'\n";
    std::fs::write(&config, budget).expect("written");
    let output = obol(dir.path(), &["--json", "--by", "user", "--config", "budgets.toml"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let json: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(json["budgets"][0]["budget"], "house");
    assert_eq!(json["budgets"][0]["cap"], "7.000000000000");
    let named = |by: &str, message: &str| {
        let output = obol(dir.path(), &["--by", by]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(message), "{said}");
    };
    named("model", "--forecast has no model; use --by team, key, feature, user or environment");
    named("task", "--forecast has no task");
    let focus = obol(dir.path(), &["--format", "focus"]);
    assert_eq!(focus.status.code(), Some(2), "{}", String::from_utf8_lossy(&focus.stderr));
    let empty = tempfile::tempdir().expect("a directory");
    assert_eq!(obol(empty.path(), &[]).status.code(), Some(1), "there is no ledger");
}
