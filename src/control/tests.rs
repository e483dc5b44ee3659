//! What keys must outlive: crashes, other processes, damaged files and full disks.

use std::fs;
use std::sync::Barrier;

use serde_json::json;

use super::*;
use crate::clock::ManualClock;
use crate::request::Tag;
use crate::units::{DeviceNanos, Picos};

const WALL: UnixNanos = UnixNanos(1_790_000_000_000_000_000);

fn open(dir: &Path) -> (Control, Arc<ManualClock>) {
    let clock = Arc::new(ManualClock::at_wall(WALL));
    (Control::open(dir, clock.clone()).unwrap(), clock)
}

fn error(dir: &Path) -> ControlError {
    Control::open(dir, Arc::new(ManualClock::at_wall(WALL))).err().expect("it must not open")
}

fn seconds(seconds: u64) -> DeviceNanos {
    DeviceNanos(seconds * 1_000_000_000)
}

fn with_alias(alias: &str) -> KeySettings {
    KeySettings { alias: Some(alias.to_owned()), ..KeySettings::default() }
}

fn whole() -> KeySettings {
    KeySettings {
        alias: Some("prod".into()),
        expires: Some(UnixNanos(WALL.0 + 5)),
        blocked: true,
        models: vec!["a".into(), "b/c".into()],
        max_tokens: Some(7),
        max_budget: Some(Picos(25_500_000_000_001)),
        soft_budget: Some(Picos(1)),
        budget_duration: Some("1mo".parse().unwrap()),
        tpm_limit: Some(i64::MAX as u64),
        rpm_limit: Some(1),
        max_parallel_requests: Some(u32::MAX),
        tags: KEY_TAGS.into_iter().map(|tag| (tag, format!("of {}", tag.as_str()))).collect(),
        require_tags: vec![Tag::Task, Tag::Team],
        metadata: json!({"a": [1, null, {"b": "ü"}]}).as_object().unwrap().clone(),
    }
}

#[test]
fn every_setting_is_read_as_it_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let (control, _) = open(dir.path());
    let (secret, key) = control.create(&Actor::cli(), whole()).unwrap();
    let (_, bare) = control.create(&Actor::cli(), KeySettings::default()).unwrap();
    assert_eq!(key.settings, whole());
    drop(control);
    let (control, _) = open(dir.path());
    let keys: Vec<Key> = control.keys().unwrap().iter().map(|(key, _)| Key::clone(key)).collect();
    assert_eq!(keys, [Key::clone(&key), Key::clone(&bare)]);
    assert_eq!(control.resolve(secret.reveal()).unwrap().1, secret.hash());
    let on_disk = [fs::read(dir.path().join("control.db")).unwrap()].concat();
    let drawn = &secret.reveal().as_bytes()[SECRET_PREFIX.len()..];
    assert!(!on_disk.windows(drawn.len()).any(|window| window == drawn), "the secret is not kept");
}

#[test]
fn secrets_open_while_they_are_in_force() {
    let dir = tempfile::tempdir().unwrap();
    let (control, clock) = open(dir.path());
    let actor = Actor::cli();
    let (first, key) = control.create(&actor, with_alias("a")).unwrap();
    assert_eq!(control.find(first.reveal()).unwrap(), key);
    let (second, _) = control.rotate(&actor, &key.id, Some("10s".parse().unwrap())).unwrap();
    assert_eq!(control.find(first.reveal()).unwrap().name, second.name());
    clock.advance(seconds(10));
    assert!(matches!(control.find(first.reveal()), Err(Denied::Unknown)), "the grace is over");
    let (third, _) = control.rotate(&actor, &key.id, None).unwrap();
    assert!(matches!(control.find(second.reveal()), Err(Denied::Unknown)));
    let set = |expires| {
        control.update(&actor, &key.id, |settings| {
            settings.expires = expires;
            Ok(())
        })
    };
    set(Some(UnixNanos(control.now().0 + 1))).unwrap();
    control.find(third.reveal()).unwrap();
    clock.advance(DeviceNanos(1));
    assert!(matches!(control.find(third.reveal()), Err(Denied::Expired { .. })));
    set(None).unwrap();
    control.set_blocked(&actor, &key.id, true).unwrap();
    assert!(matches!(control.find(third.reveal()), Err(Denied::Blocked { .. })));
    control.delete(&actor, std::slice::from_ref(&key.id)).unwrap();
    assert!(matches!(control.find(third.reveal()), Err(Denied::Unknown)));
    assert!(matches!(set(None), Err(ControlError::NoSuchKey { .. })), "a deleted key stays as it was");
    control.create(&actor, with_alias("a")).unwrap();
    assert_eq!(control.keys().unwrap().len(), 2, "its alias is free, its row stays");
}

#[test]
fn another_handles_change_is_seen_within_the_time_and_its_own_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let ((server, clock), (shell, _)) = (open(dir.path()), open(dir.path()));
    let (secret, key) = server.create(&Actor::cli(), KeySettings::default()).unwrap();
    server.find(secret.reveal()).unwrap();
    let (new, _) = shell.create(&Actor::cli(), KeySettings::default()).unwrap();
    server.find(new.reveal()).expect("a new key at once");
    shell.set_blocked(&Actor::cli(), &key.id, true).unwrap();
    clock.advance(DeviceNanos(LOOK_EVERY.as_nanos() as u64));
    assert!(matches!(server.find(secret.reveal()), Err(Denied::Blocked { .. })));
    server.set_blocked(&Actor::cli(), &key.id, false).unwrap();
    server.find(secret.reveal()).unwrap();
    // What it knows already does not come back older.
    server.look().unwrap();
    server.find(secret.reveal()).unwrap();
}

#[test]
fn several_processes_make_the_file_and_change_it_together() {
    let dir = tempfile::tempdir().unwrap();
    let (threads, each) = (4, 8);
    let start = Barrier::new(threads);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (start, dir) = (&start, dir.path());
            scope.spawn(move || {
                start.wait();
                let (control, _) = open(dir);
                for number in 0..each {
                    let made =
                        control.create(&Actor::cli(), with_alias(&format!("{thread}-{number}"))).unwrap();
                    control.set_blocked(&Actor::cli(), &made.1.id, true).unwrap();
                }
            });
        }
    });
    let (control, _) = open(dir.path());
    assert_eq!(control.keys().unwrap().len(), threads * each);
    let trail = control.trail(&AuditPage { limit: 1000, ..AuditPage::default() }).unwrap();
    assert_eq!(trail.len(), 2 * threads * each);
    assert!(control.keys().unwrap().iter().all(|(key, _)| key.settings.blocked));
}

#[test]
fn changes_of_two_handles_to_one_key_both_stay() {
    let dir = tempfile::tempdir().unwrap();
    let ((one, _), (two, _)) = (open(dir.path()), open(dir.path()));
    let (_, key) = one.create(&Actor::cli(), KeySettings::default()).unwrap();
    let set = |control: &Control, change: fn(&mut KeySettings)| {
        control.update(&Actor::cli(), &key.id, |settings| {
            change(settings);
            Ok(())
        })
    };
    set(&two, |settings| settings.rpm_limit = Some(1)).unwrap();
    let both = set(&one, |settings| settings.tpm_limit = Some(2)).unwrap();
    assert_eq!((both.settings.rpm_limit, both.settings.tpm_limit), (Some(1), Some(2)));
    one.create(&Actor::cli(), with_alias("a")).unwrap();
    let taken = two.create(&Actor::cli(), with_alias("a"));
    assert!(matches!(taken, Err(ControlError::AliasTaken { .. })));
}

/// What a crash leaves: the file and its log as they are at some moment, the log cut anywhere.
#[test]
fn a_torn_log_loses_whole_changes_from_its_end_and_halves_none() {
    let dir = tempfile::tempdir().unwrap();
    let (control, _) = open(dir.path());
    let keys = 12;
    for number in 0..keys {
        let (_, key) = control.create(&Actor::cli(), with_alias(&number.to_string())).unwrap();
        control.rotate(&Actor::cli(), &key.id, None).unwrap();
    }
    let (file, log) = (dir.path().join("control.db"), dir.path().join("control.db-wal"));
    let (file, log) = (fs::read(file).unwrap(), fs::read(log).unwrap());
    let mut fewest = usize::MAX;
    for cut in (0..=20).map(|part| log.len() * part / 20) {
        let torn = tempfile::tempdir().unwrap();
        fs::write(torn.path().join("control.db"), &file).unwrap();
        fs::write(torn.path().join("control.db-wal"), &log[..cut]).unwrap();
        let (control, _) = open(torn.path());
        let found = control.keys().unwrap();
        let trail = control.trail(&AuditPage { limit: 1000, ..AuditPage::default() }).unwrap();
        let of = |action: Action| trail.iter().filter(|row| row.action == action.as_str()).count();
        assert_eq!(found.len(), of(Action::Created), "cut at {cut}");
        for (key, _) in &found {
            let last = trail.iter().find(|row| row.target == key.id.0).unwrap();
            assert_eq!(last.after.as_ref().unwrap(), &key.to_json(), "cut at {cut}");
        }
        fewest = fewest.min(found.len());
        if cut == log.len() {
            assert_eq!((found.len(), of(Action::Rotated)), (keys, keys), "what was acknowledged is there");
        }
    }
    assert!(fewest < keys, "the cuts cut something");
}

#[test]
fn a_full_disk_is_an_error_that_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (control, _) = open(dir.path());
    let (secret, key) = control.create(&Actor::cli(), KeySettings::default()).unwrap();
    let pragma =
        |text: &str| lock(&control.0.writer).connection().query_row(text, [], |row| row.get::<_, i64>(0));
    let pages = pragma("PRAGMA page_count").unwrap();
    pragma(&format!("PRAGMA max_page_count = {pages}")).unwrap();
    let large = |at: u32| {
        let metadata = json!({"notes": "x".repeat(12_000)}).as_object().unwrap().clone();
        control.create(&Actor::cli(), KeySettings { metadata, ..with_alias(&at.to_string()) })
    };
    let full = (0..10).find_map(|at| large(at).err()).expect("the disk is full");
    assert!(matches!(full, ControlError::DiskFull { .. }), "{full}");
    let before = control.keys().unwrap().len();
    let rotated = control.rotate(&Actor::cli(), &key.id, None).map(drop);
    let trail = control.trail(&AuditPage { limit: 1000, ..AuditPage::default() }).unwrap();
    assert_eq!(control.keys().unwrap().len(), before);
    match rotated {
        Ok(()) => assert!(matches!(control.find(secret.reveal()), Err(Denied::Unknown))),
        Err(_) => assert_eq!(control.find(secret.reveal()).unwrap().name, secret.name()),
    }
    assert_eq!(trail.iter().filter(|row| row.action == Action::Created.as_str()).count(), before);
    pragma("PRAGMA max_page_count = 1000000").unwrap();
    large(99).unwrap();
}

#[test]
fn a_damaged_or_foreign_file_is_left_as_it_is() {
    let damage = |spoil: fn(&mut Vec<u8>)| {
        let dir = tempfile::tempdir().unwrap();
        let (control, _) = open(dir.path());
        for number in 0..20 {
            control.create(&Actor::cli(), with_alias(&number.to_string())).unwrap();
        }
        drop(control);
        let path = dir.path().join("control.db");
        let mut bytes = fs::read(&path).unwrap();
        spoil(&mut bytes);
        fs::write(&path, &bytes).unwrap();
        let refused = error(dir.path());
        assert_eq!(fs::read(&path).unwrap(), bytes, "{refused}");
        refused
    };
    let text = damage(|bytes| {
        *bytes = b"somebody's notes, and longer than the head of a database is, by far, or so".repeat(3)
    });
    assert!(matches!(text, ControlError::NotOurs { .. }), "{text}");
    let application = damage(|bytes| bytes[68..72].copy_from_slice(b"OBOL"));
    assert!(matches!(application, ControlError::NotOurs { .. }), "{application}");
    let version = damage(|bytes| bytes[60..64].copy_from_slice(&7_u32.to_be_bytes()));
    assert!(matches!(version, ControlError::SchemaVersion { found: 7, .. }), "{version}");
    let pages = damage(|bytes| bytes[4096 * 3..].fill(0xA5));
    assert!(matches!(pages, ControlError::Corrupt { .. }), "{pages}");
}

#[test]
fn the_file_itself_refuses_what_must_not_be() {
    let dir = tempfile::tempdir().unwrap();
    let (control, _) = open(dir.path());
    let (_, key) = control.create(&Actor::cli(), KeySettings::default()).unwrap();
    control.delete(&Actor::cli(), std::slice::from_ref(&key.id)).unwrap();
    let refuses = |sql: &str, word: &str| {
        let said = lock(&control.0.writer).connection().execute_batch(sql).unwrap_err().to_string();
        assert!(said.contains(word), "{sql}: {said}");
    };
    refuses("UPDATE audit SET actor = 'nobody'", "only appends");
    refuses("DELETE FROM audit", "only appends");
    refuses(
        "INSERT OR REPLACE INTO audit (id, at, actor, action, target) VALUES (1, 1, 'a', 'b', 'c')",
        "only appends",
    );
    refuses("DELETE FROM keys", "stays");
    refuses("UPDATE keys SET deleted_at = NULL", "stays as it was");
}
