//! `obol keys` as a shell sees it.

use std::process::{Command, Output};
use std::sync::Arc;

use obol::clock::SystemClock;
use obol::control::Control;
use obol::control::forecast::Projection;
use obol::control::foreseen::Foreseen;
use obol::control::outbox::Outbox;
use obol::pipeline::{budget_resets_at, foreseen};
use obol::units::{Picos, UnixNanos};
use serde_json::{Value, json};

fn keys(dir: &tempfile::TempDir, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_obol"))
        .arg("keys")
        .args(arguments)
        .arg("--data-dir")
        .arg(dir.path().join("data"))
        .current_dir(dir.path())
        .env_remove("OBOL_ADMIN_KEY")
        .output()
        .expect("the program runs")
}

/// Standard output of a command that must succeed.
fn done(dir: &tempfile::TempDir, arguments: &[&str]) -> String {
    let output = keys(dir, arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn json(dir: &tempfile::TempDir, arguments: &[&str]) -> Value {
    serde_json::from_str(&done(dir, &[arguments, &["--json"]].concat())).expect("JSON")
}

/// What differs from run to run, replaced by what it is.
fn steady(text: &str, parts: &[(&str, &str)]) -> String {
    let mut text = text.to_owned();
    for (part, name) in parts {
        text = text.replace(part, name);
    }
    let mut steady = String::new();
    for piece in text.split_inclusive(char::is_whitespace) {
        let word = piece.trim_end();
        let time = word.len() == 24 && word.ends_with('Z') && word.starts_with("20");
        steady += if time { "TIME                    " } else { word };
        steady += &piece[word.len()..];
    }
    steady.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

#[test]
fn a_keys_life_on_the_command_line() {
    let dir = tempfile::tempdir().expect("a directory");
    let create = [
        "create",
        "--alias",
        "search-prod",
        "--team",
        "search",
        "--cost-center",
        "c7",
        "--models",
        "default,m2",
        "--max-budget",
        "25.50",
        "--budget-duration",
        "30d",
        "--rpm-limit",
        "60",
        "--metadata",
        r#"{"owner":"ann"}"#,
    ];
    let said = done(&dir, &create);
    let secret = said.lines().next().expect("a line").to_owned();
    assert!(secret.starts_with("sk-obol-"));
    let shown = json(&dir, &["show", "search-prod"]);
    let text = |name: &str| shown[name].as_str().expect("a text").to_owned();
    let (id, name, token) = (text("key_id"), text("key_name"), text("token"));
    let parts = [
        (secret.as_str(), "SECRET"),
        (&id, "KEY                                 "),
        (&name, "sk-...NAME"),
        (&token, "TOKEN"),
    ];
    insta::assert_snapshot!("create", steady(&said, &parts));
    insta::assert_snapshot!("show", steady(&done(&dir, &["show", &id]), &parts));
    insta::assert_snapshot!("list", steady(&done(&dir, &["list"]), &parts));
    foresee(&dir.path().join("data"), &id);
    insta::assert_snapshot!("projected", steady(&done(&dir, &["show", &id]), &parts));
    let projected = &json(&dir, &["list"])[0]["projected"];
    assert_eq!(
        (&projected["expected"], &projected["low"], &projected["high"]),
        (&json!("30.000000000000"), &json!("28.500000000000"), &json!("31.250000000000"))
    );
    Outbox::open(&dir.path().join("data")).and_then(|mut outbox| outbox.foresee(&[])).expect("written");
    done(
        &dir,
        &[
            "update",
            "search-prod",
            "--max-budget",
            "50",
            "--clear",
            "rpm_limit",
            "--clear",
            "cost_center",
            "--block",
        ],
    );
    insta::assert_snapshot!("updated", steady(&done(&dir, &["show", &token]), &parts));
    done(&dir, &["update", "search-prod", "--unblock"]);

    let rotated = json(&dir, &["rotate", "search-prod", "--grace", "1h"]);
    let second = rotated["key"].as_str().expect("a secret").to_owned();
    let second_name = rotated["key_name"].as_str().expect("a name").to_owned();
    assert_eq!(rotated["key_id"], id.as_str());
    for secret in [&secret, &second] {
        assert_eq!(json(&dir, &["show", secret])["key_id"], id.as_str(), "both work for the grace");
    }
    assert_eq!(done(&dir, &["revoke", "search-prod"]), format!("revoked {id}\n"));
    assert_eq!(done(&dir, &["list"]), "no keys\n");
    assert_eq!(json(&dir, &["list", "--all"])[0]["key_id"], id.as_str());

    let log = done(&dir, &["log"]);
    for secret in [&secret, &second] {
        assert!(!log.contains(&secret[8..]), "{log}");
    }
    let parts = [parts.as_slice(), &[(&second_name, "sk-...NEXT")]].concat();
    insta::assert_snapshot!("log", steady(&log, &parts));
    assert_eq!(json(&dir, &["log", "--key", &id]).as_array().map(Vec::len), Some(5));
}

/// What a server says of where the key's budget will end; and what it said of a window that is another one by now.
fn foresee(data: &std::path::Path, id: &str) {
    let control = Control::open(data, Arc::new(SystemClock::start())).expect("keys");
    let (key, _) = control.resolve(id).expect("a key");
    let at = control.now();
    let end = budget_resets_at(&key, at).expect("a window that ends");
    let money = |text| Picos::parse(text).expect("money");
    let projection = Projection { expected: money("30"), low: money("28.5"), high: money("31.25") };
    let of = |budget: String, end| Foreseen { budget, value: id.to_owned(), end, at, projection };
    let mut outbox = Outbox::open(data).expect("an outbox");
    outbox.foresee(&[of(format!("key {id}"), UnixNanos(end.0 - 1))]).expect("written");
    assert_eq!(foreseen(&control.foreseen().expect("read"), &key, at), None, "the window was changed");
    outbox.foresee(&[of("teams".to_owned(), end), of(format!("key {id}"), end)]).expect("written");
}

#[test]
fn exit_codes_tell_wrong_usage_from_what_failed() {
    let dir = tempfile::tempdir().expect("a directory");
    let refused = |arguments: &[&str], code: i32, word: &str| {
        let output = keys(&dir, arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(word), "{arguments:?}: {said}");
        assert!(output.stdout.is_empty());
    };
    refused(&["list"], 1, "obol keys create");
    assert!(!dir.path().join("data").exists(), "looking makes nothing");
    done(&dir, &["create", "--alias", "a"]);
    refused(&["create", "--alias", "a"], 1, "another key has the alias");
    refused(&["show", "b"], 1, "no key `b`");
    refused(&["revoke", "a", "b"], 1, "no key `b`");
    refused(&["revoke"], 2, "KEY");
    refused(&["create", "--max-budget", "lots"], 2, "not an amount");
    refused(&["create", "--duration", "soon"], 2, "span of time");
    refused(&["create", "--require-tags", "colour"], 2, "`colour` is no tag");
    refused(&["create", "--metadata", "[]"], 2, "JSON object");
    refused(&["create", "--rpm-limit", "0"], 2, "rpm_limit");
    refused(&["create", "--max-budget", "1", "--soft-budget", "2"], 2, "soft_budget");
    refused(&["update", "a", "--clear", "colour"], 2, "`colour` is no setting");
    refused(&["update", "a", "--block", "--unblock"], 2, "cannot be used with");
    assert_eq!(json(&dir, &["list"]).as_array().map(Vec::len), Some(1));
    let help = done(&dir, &["create", "--help"]);
    assert!(help.contains("Example:"), "{help}");
}

#[test]
fn a_file_that_is_not_ours_is_left_alone() {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::create_dir(dir.path().join("data")).expect("a directory");
    let file = dir.path().join("data/control.db");
    std::fs::write(&file, b"not a database, but somebody's notes, long enough to look like one")
        .expect("written");
    let before = std::fs::read(&file).expect("there");
    for arguments in [&["create"][..], &["list"], &["revoke", "a"]] {
        let output = keys(&dir, arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("not a file of keys"), "{arguments:?}");
    }
    assert_eq!(std::fs::read(&file).expect("there"), before);
}
