use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::clock::ManualClock;
use crate::units::DeviceNanos;

const START: UnixNanos = UnixNanos(1_800_000_000_000_000_000);
const WEEK: Retention = Retention { days: 7, bytes: 1 << 20 };

fn entry(id: &str, owner: &str, previous: Option<&str>, clock: &dyn Clock) -> Entry {
    Entry {
        id: id.into(),
        owner: owner.into(),
        previous: previous.map(str::to_owned),
        created: clock.wall(),
        input: format!("[\"said for {id}\"]"),
        response: format!("{{\"id\": \"{id}\"}}"),
    }
}

fn clock() -> Arc<ManualClock> {
    Arc::new(ManualClock::at_wall(START))
}

fn open(dir: &Path, retention: Retention, clock: &Arc<ManualClock>) -> Archive {
    Archive::open(dir, retention, Arc::clone(clock) as Arc<dyn Clock>).unwrap()
}

fn ids(conversation: Conversation) -> Result<Vec<String>, String> {
    match conversation {
        Conversation::Whole(entries) => Ok(entries.into_iter().map(|entry| entry.id).collect()),
        Conversation::Lacks(id) => Err(id),
    }
}

#[tokio::test]
async fn an_entry_is_its_owners_and_survives_a_restart() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), clock());
    let archive = open(dir.path(), WEEK, &clock);
    let first = entry("a", "ada", None, clock.as_ref());
    archive.keep(first.clone()).await.unwrap();
    let path = dir.path().join("responses.db");
    assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(archive.find("a", "bob").unwrap(), None);
    assert!(!archive.remove("a", "bob").await.unwrap());
    drop(archive);
    let archive = open(dir.path(), WEEK, &clock);
    assert_eq!(archive.find("a", "ada").unwrap(), Some(first));
    assert!(archive.remove("a", "ada").await.unwrap());
    assert_eq!(archive.find("a", "ada").unwrap(), None);
    assert!(!archive.remove("a", "ada").await.unwrap());
}

#[tokio::test]
async fn a_conversation_is_whole_or_says_what_it_lacks() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), clock());
    let archive = open(dir.path(), WEEK, &clock);
    for (id, previous) in [("a", None), ("b", Some("a")), ("c", Some("b")), ("d", Some("a"))] {
        archive.keep(entry(id, "ada", previous, clock.as_ref())).await.unwrap();
    }
    let of = |id: &str, owner: &str| ids(archive.conversation(id, owner).unwrap());
    assert_eq!(of("c", "ada"), Ok(vec!["a".into(), "b".into(), "c".into()]));
    assert_eq!(of("d", "ada"), Ok(vec!["a".into(), "d".into()]));
    assert_eq!(of("c", "bob"), Err("c".into()));
    archive.remove("b", "ada").await.unwrap();
    assert_eq!(of("c", "ada"), Err("b".into()));
    assert_eq!(of("d", "ada"), Ok(vec!["a".into(), "d".into()]));
}

#[tokio::test]
async fn what_has_had_its_time_is_gone() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), clock());
    let archive = open(dir.path(), WEEK, &clock);
    archive.keep(entry("old", "ada", None, clock.as_ref())).await.unwrap();
    clock.advance(DeviceNanos(4 * DAY_NANOS));
    archive.keep(entry("new", "ada", Some("old"), clock.as_ref())).await.unwrap();
    assert!(archive.find("old", "ada").unwrap().is_some());
    clock.advance(DeviceNanos(3 * DAY_NANOS + 1));
    // It is not found even before anybody has looked for what is too old.
    assert_eq!(archive.find("old", "ada").unwrap(), None);
    assert_eq!(ids(archive.conversation("new", "ada").unwrap()), Err("old".into()));
    archive.keep(entry("newest", "ada", None, clock.as_ref())).await.unwrap();
    drop(archive);
    drop(open(dir.path(), WEEK, &clock));
    let forever = Retention { days: 36_500, ..WEEK };
    let archive = open(dir.path(), forever, &clock);
    assert_eq!(archive.find("old", "ada").unwrap(), None, "it was removed, not only hidden");
    assert!(archive.find("new", "ada").unwrap().is_some());
    drop(archive);
    let nothing = Retention { days: 0, ..WEEK };
    assert!(!open(dir.path(), nothing, &clock).keeps());
    assert_eq!(open(dir.path(), forever, &clock).find("newest", "ada").unwrap(), None);
}

#[tokio::test]
async fn the_oldest_make_room_and_removed_texts_leave_the_disk() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), clock());
    let archive = open(dir.path(), Retention { days: 7, bytes: 40_000 }, &clock);
    let large = |id: &str| Entry { input: "x".repeat(15_000), ..entry(id, "ada", None, clock.as_ref()) };
    for id in ["a", "b", "c"] {
        archive.keep(large(id)).await.unwrap();
    }
    let there = |id: &str| archive.find(id, "ada").unwrap().is_some();
    assert!(!there("a") && there("b") && there("c"));
    let huge = Entry { input: "y".repeat(50_000), ..large("huge") };
    archive.keep(huge).await.unwrap();
    assert!(!there("c") && there("huge"), "the newest stays, whatever its size");
    archive.keep(Entry { input: "a secret of ada's".into(), ..large("d") }).await.unwrap();
    archive.remove("d", "ada").await.unwrap();
    for file in fs::read_dir(dir.path()).unwrap() {
        let bytes = fs::read(file.unwrap().path()).unwrap();
        assert!(!bytes.windows(17).any(|window| window == b"a secret of ada's"));
    }
}

#[tokio::test]
async fn many_at_once_are_all_kept() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), clock());
    let archive = open(dir.path(), WEEK, &clock);
    let keeping: Vec<_> = (0..300)
        .map(|at| {
            let (archive, entry) = (archive.clone(), entry(&format!("r{at}"), "ada", None, clock.as_ref()));
            tokio::spawn(async move { archive.keep(entry).await })
        })
        .collect();
    for kept in keeping {
        kept.await.unwrap().unwrap();
    }
    assert!((0..300).all(|at| archive.find(&format!("r{at}"), "ada").unwrap().is_some()));
}

#[test]
fn a_full_disk_is_an_error_that_changes_nothing() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), clock());
    let mut store = Store::open(dir.path()).unwrap();
    let keep = |store: &mut Store, id: &str| {
        let large = Entry { input: "x".repeat(50_000), ..entry(id, "ada", None, clock.as_ref()) };
        store.write(&[Order::Keep(large)], None, 1 << 20)
    };
    keep(&mut store, "a").unwrap();
    store.fill(true);
    assert!(matches!(keep(&mut store, "b"), Err(ArchiveError::DiskFull { .. })));
    assert!(store.find("a", "ada", UnixNanos(0)).unwrap().is_some());
    assert!(store.find("b", "ada", UnixNanos(0)).unwrap().is_none());
    store.fill(false);
    keep(&mut store, "b").unwrap();
    assert_eq!(store.conversation("b", "ada", UnixNanos(0)).unwrap().len(), 1);
}

#[test]
fn a_foreign_file_is_left_as_it_is() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), clock());
    let path = dir.path().join("responses.db");
    fs::write(&path, "somebody's notes").unwrap();
    let refused = Archive::open(dir.path(), WEEK, clock).err().expect("it is not ours");
    assert_eq!(refused, ArchiveError::NotOurs { path: path.clone() });
    assert_eq!(fs::read(&path).unwrap(), b"somebody's notes");
}
