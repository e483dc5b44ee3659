use std::fs;

use super::*;
use crate::control::alerts::Watch;
use crate::control::budgets::{Crossing, Scope};
use crate::control::window::Span;
use crate::units::Picos;

const NOW: UnixNanos = UnixNanos(1_790_000_000_000_000_000);
const DAY: u64 = 24 * 3_600 * 1_000_000_000;

fn alert(value: &str, at: UnixNanos) -> Alert {
    let crossing = Crossing {
        budget: "b".into(),
        scope: Scope::Team,
        value: value.into(),
        percent: 50,
        spent: Picos(50),
        cap: Picos(100),
        span: Span { start: UnixNanos(0), end: None },
    };
    Watch::new(crate::control::alerts::rules::Rules::default(), "USD").crossed(&crossing, at)
}

fn target(id: &str) -> Target {
    Target { id: id.to_owned(), host: format!("{id}.example.org") }
}

fn later(by: u64) -> UnixNanos {
    UnixNanos(NOW.0 + by)
}

#[test]
fn an_alert_of_one_name_is_raised_once_and_sent_until_it_is_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let targets = [target("one"), target("two")];
    let mut outbox = Outbox::open(dir.path()).unwrap();
    let first = alert("a", NOW);
    assert!(outbox.record(&first, &targets).unwrap());
    assert!(!outbox.record(&alert("a", later(1)), &targets).unwrap(), "the same cause");
    assert!(outbox.record(&alert("b", later(2)), &targets).unwrap());
    assert_eq!(outbox.unsent().unwrap(), 4);
    drop(outbox);

    let mut outbox = Outbox::open(dir.path()).unwrap();
    let pending = outbox.next("one", later(9)).unwrap().unwrap();
    assert_eq!((&pending.alert, &pending.event, pending.attempts), (&first.id, first.event(), 0));
    let error = "it answered 500".to_owned();
    outbox.finish(&pending, "one", Outcome::Retry { due: later(100), error }, later(9)).unwrap();
    let next = outbox.next("one", later(99)).unwrap().unwrap();
    assert_ne!(next.alert, first.id, "the first one is put off");
    outbox.finish(&next, "one", Outcome::Acknowledged, later(99)).unwrap();
    assert_eq!(outbox.next("one", later(99)).unwrap(), None);
    let again = outbox.next("one", later(100)).unwrap().unwrap();
    assert_eq!((again.alert.as_str(), again.attempts), (first.id.as_str(), 1));
    outbox.finish(&again, "one", Outcome::Acknowledged, later(100)).unwrap();
    assert_eq!(outbox.next("one", later(DAY)).unwrap(), None);
    assert_eq!(outbox.unsent().unwrap(), 2, "of the other one");
    let listed = Outbox::list(dir.path(), None, None).unwrap();
    let attempts: Vec<Vec<u32>> =
        listed.iter().map(|alert| alert.sends.iter().map(|send| send.attempts).collect()).collect();
    assert_eq!(attempts, [[2, 0], [1, 0]]);
    assert_eq!(Outbox::list(dir.path(), Some(later(1)), Some(later(3))).unwrap().len(), 1);
}

#[test]
fn what_is_old_is_given_up_and_later_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = Outbox::open(dir.path()).unwrap();
    let targets = [target("one")];
    outbox.record(&alert("a", NOW), &targets).unwrap();
    outbox.record(&alert("b", later(DAY)), &targets).unwrap();
    let next = outbox.next("one", later(7 * DAY + 1)).unwrap().unwrap();
    assert_eq!(next.event["team_id"], "b");
    let listed = Outbox::list(dir.path(), None, None).unwrap();
    assert!(listed[0].sends[0].given_up_at.is_some() && listed[1].sends[0].given_up_at.is_none());
    outbox.begin(&targets, later(400 * DAY + 1)).unwrap();
    assert_eq!(Outbox::list(dir.path(), None, None).unwrap().len(), 1);
    assert!(outbox.record(&alert("a", later(400 * DAY)), &targets).unwrap(), "it is a year later");
    assert!(!outbox.record(&alert("b", later(400 * DAY)), &targets).unwrap());
}

#[test]
fn a_full_queue_gives_up_its_oldest() {
    let dir = tempfile::tempdir().unwrap();
    let mut outbox = Outbox::open(dir.path()).unwrap();
    let many = |transaction: &rusqlite::Transaction<'_>| {
        for number in 0..UNSENT_MAX {
            transaction.execute(
                "INSERT INTO alerts VALUES (?1, ?1, ?2, 'budget', '{}')",
                params![format!("alert_{number:06}"), instant(NOW)],
            )?;
        }
        transaction.execute(
            "INSERT INTO alert_sends (alert, target, host, due_at) SELECT id, 'one', 'h', at FROM alerts",
            [],
        )
    };
    outbox.0.write(many).unwrap();
    outbox.record(&alert("new", NOW), &[target("one"), target("two")]).unwrap();
    assert_eq!(outbox.unsent().unwrap(), UNSENT_MAX + 1);
    assert_eq!(outbox.next("one", NOW).unwrap().unwrap().alert, "alert_000001");
    let listed = Outbox::list(dir.path(), None, None).unwrap();
    let given_up: Vec<&Raised> =
        listed.iter().filter(|alert| alert.sends.iter().any(|send| send.given_up_at.is_some())).collect();
    assert_eq!(given_up.len(), 1);
    assert!(given_up[0].sends[0].error.as_deref().unwrap().contains("too many"));
}

#[test]
fn a_file_without_alerts_gets_their_tables_and_keeps_its_keys() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(Outbox::list(dir.path(), None, None).unwrap(), [], "there is no file");
    let old = rusqlite::Connection::open(dir.path().join("control.db")).unwrap();
    old.execute_batch(include_str!("../schema.sql")).unwrap();
    old.execute_batch("PRAGMA application_id = 0x4F424F43; PRAGMA user_version = 1;").unwrap();
    old.execute("INSERT INTO audit (at, actor, action, target) VALUES (1, 'cli', 'x', 'y')", []).unwrap();
    drop(old);
    assert_eq!(Outbox::list(dir.path(), None, None).unwrap(), [], "it is only read");
    let mut outbox = Outbox::open(dir.path()).unwrap();
    assert!(outbox.record(&alert("a", NOW), &[]).unwrap());
    assert_eq!(Outbox::list(dir.path(), None, None).unwrap().len(), 1);
    let rows = |connection: &Connection| {
        connection.query_row("SELECT count(*) FROM audit", [], |row| row.get::<_, u64>(0))
    };
    assert_eq!(outbox.0.read(rows).unwrap(), 1);
    drop(outbox);
    fs::write(dir.path().join("control.db"), b"something else").unwrap();
    assert!(Outbox::open(dir.path()).is_err());
}
