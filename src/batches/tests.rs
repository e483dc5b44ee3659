use std::fs;

use super::*;
use crate::clock::ManualClock;
use crate::units::{DeviceNanos, Picos, UnixNanos};

const LIMITS: BatchLimits = BatchLimits { file_bytes: 100, all_bytes: 150, lines: 9, open: 2, running: None };

struct Kept {
    dir: tempfile::TempDir,
    clock: Arc<ManualClock>,
    batches: Batches,
}

fn kept() -> Kept {
    let dir = tempfile::tempdir().unwrap();
    let clock = Arc::new(ManualClock::at_wall(UnixNanos(1_790_000_000_000_000_000)));
    let batches = Batches::open(dir.path(), clock.clone(), LIMITS).unwrap();
    Kept { dir, clock, batches }
}

impl Kept {
    fn open_again(self) -> Self {
        let Self { dir, clock, batches } = self;
        drop(batches);
        let batches = Batches::open(dir.path(), clock.clone(), LIMITS).unwrap();
        Self { dir, clock, batches }
    }

    fn file(&self, owner: &Owner, text: &str) -> FileFacts {
        let mut upload = self.batches.upload().unwrap();
        upload.write(text.as_bytes()).unwrap();
        self.batches.keep(upload, owner, "a name").unwrap()
    }

    fn batch(&self, owner: &Owner, input: &FileFacts) -> Result<Batch, BatchesError> {
        self.batches.create(NewBatch {
            owner: owner.clone(),
            tenant: "t".into(),
            endpoint: "/v1/completions".into(),
            window: ("24h".into(), 86_400),
            input_file: input.id.clone(),
            metadata: [("job".to_owned(), "night".to_owned())].into(),
            headers: [("x-obol-team".to_owned(), "search".to_owned())].into(),
        })
    }

    fn text(&self, file: Option<&String>) -> Option<String> {
        let facts = self.batches.file(file?).unwrap().unwrap();
        assert_eq!(facts.purpose, Purpose::BatchOutput);
        Some(fs::read_to_string(self.batches.path(&facts)).unwrap())
    }

    fn folder(&self) -> usize {
        fs::read_dir(self.dir.path().join("files")).unwrap().count()
    }
}

fn owner(name: &str) -> Owner {
    Owner { key_id: Some(name.to_owned()) }
}

fn outcome(line: u64, completed: bool, record: &str) -> Outcome {
    let tokens = Tokens { prompt: 5, cached: 2, completion: 3, cost: Picos(7) };
    Outcome { line, completed, record: record.to_owned(), tokens }
}

fn ids(files: Vec<FileFacts>) -> Vec<String> {
    files.into_iter().map(|file| file.id).collect()
}

#[test]
fn files_are_whole_within_bounds_and_listed_by_owner() {
    let kept = kept();
    let (a, b) = (owner("a"), owner("b"));
    let first = kept.file(&a, "hello");
    let second = kept.file(&b, "world!");
    let nobodys = kept.file(&Owner { key_id: None }, "");
    assert_eq!((first.bytes, second.bytes, nobodys.bytes), (5, 6, 0));
    assert_eq!(fs::read_to_string(kept.batches.path(&first)).unwrap(), "hello");
    let page =
        |limit, after: Option<&FileFacts>, sort| Page { limit, after: after.map(|f| f.id.clone()), sort };
    let list = |owner: Option<&Owner>, page: &Page| {
        let (files, more) = kept.batches.files(owner, None, page).unwrap();
        (ids(files), more)
    };
    assert_eq!(list(Some(&a), &page(9, None, Sort::NewestFirst)), (vec![first.id.clone()], false));
    let all = page(2, None, Sort::NewestFirst);
    assert_eq!(list(None, &all), (vec![nobodys.id, second.id.clone()], true));
    assert_eq!(list(None, &page(2, Some(&second), Sort::NewestFirst)), (vec![first.id.clone()], false));
    assert_eq!(list(None, &page(1, Some(&first), Sort::OldestFirst)), (vec![second.id], true));
    let mut too_large = kept.batches.upload().unwrap();
    too_large.write(&[0; 100]).unwrap();
    assert!(matches!(too_large.write(&[0]), Err(BatchesError::TooLarge { bytes_max: 100 })));
    drop(too_large);
    assert_eq!(kept.folder(), 3, "nothing is left of it");
    kept.file(&a, &"x".repeat(100));
    kept.file(&a, &"x".repeat(100));
    assert!(matches!(kept.batches.upload(), Err(BatchesError::Full { bytes_max: 150 })));
    kept.batches.delete_file(&first.id).unwrap();
    assert!(matches!(kept.batches.delete_file(&first.id), Err(BatchesError::NoSuchFile { .. })));
    assert_eq!(kept.batches.file(&first.id).unwrap(), None);
    assert!(!kept.batches.path(&first).exists());
}

#[test]
fn what_a_crash_left_is_cleared_away_and_nothing_else() {
    let kept = kept();
    let file = kept.file(&owner("a"), "hello");
    let folder = kept.dir.path().join("files");
    fs::write(folder.join("file-unknown"), "x").unwrap();
    fs::write(folder.join("file-half.part"), "x").unwrap();
    fs::write(folder.join("somebody's.txt"), "x").unwrap();
    let kept = kept.open_again();
    assert_eq!(kept.folder(), 2);
    assert_eq!(kept.batches.file(&file.id).unwrap(), Some(file));
}

#[test]
fn a_line_keeps_its_first_result_and_the_files_have_each_once() {
    let kept = kept();
    let a = owner("a");
    let input = kept.file(&a, "1\n2\n3\n4\n");
    let made = kept.batch(&a, &input).unwrap();
    assert_eq!((made.status, made.times.expires - made.times.created), (Status::Validating, 86_400));
    let id = made.id.as_str();
    kept.batches.begin(id, 4).unwrap();
    kept.clock.advance(DeviceNanos(5_000_000_000));
    kept.batches.record(id, &outcome(3, true, "three")).unwrap();
    kept.batches.record(id, &outcome(1, true, "one")).unwrap();
    kept.batches.record(id, &outcome(1, false, "one again")).unwrap();
    kept.batches.record(id, &outcome(2, false, "two")).unwrap();
    let kept = kept.open_again();
    let batch = kept.batches.batch(id).unwrap().unwrap();
    assert_eq!(batch.counts, Counts { total: 4, completed: 2, failed: 1 });
    assert_eq!(batch.tokens, Tokens { prompt: 15, cached: 6, completion: 9, cost: Picos(21) });
    assert_eq!((batch.status, batch.times.in_progress), (Status::InProgress, Some(made.times.created)));
    assert_eq!(kept.batches.ended_lines(id).unwrap(), HashSet::from([1, 2, 3]));
    assert!(matches!(kept.batches.delete_file(&input.id), Err(BatchesError::InUse { .. })));
    kept.batches.finish(id, Status::Expired, &["four".to_owned()]).unwrap();
    let batch = kept.batches.batch(id).unwrap().unwrap();
    assert_eq!(batch.status, Status::Expired);
    assert_eq!(batch.times.expired, Some(made.times.created + 5));
    assert_eq!(batch.times.finalizing, batch.times.expired);
    assert_eq!(kept.text(batch.output_file.as_ref()).as_deref(), Some("one\nthree\n"));
    assert_eq!(kept.text(batch.error_file.as_ref()).as_deref(), Some("two\nfour\n"));
    assert!(kept.batches.ended_lines(id).unwrap().is_empty(), "they are in the files");
    kept.batches.delete_file(&input.id).unwrap();
    assert!(kept.batches.unfinished().unwrap().is_empty());
    assert!(matches!(kept.batches.cancel(id), Err(BatchesError::Ended { .. })));
}

#[test]
fn a_batch_is_failed_or_cancelled_once_and_only_so_many_are_open() {
    let kept = kept();
    let a = owner("a");
    let input = kept.file(&a, "");
    let (first, second) = (kept.batch(&a, &input).unwrap().id, kept.batch(&a, &input).unwrap().id);
    assert!(matches!(kept.batch(&a, &input), Err(BatchesError::TooMany { open: 2 })));
    assert_eq!(kept.batches.unfinished().unwrap(), [first.as_str(), second.as_str()]);
    let problem =
        Problem { code: "empty_file".into(), line: None, message: "it is empty".into(), param: None };
    kept.batches.fail(&first, std::slice::from_ref(&problem)).unwrap();
    let failed = kept.batches.batch(&first).unwrap().unwrap();
    assert_eq!((failed.status, failed.problems), (Status::Failed, Some(vec![problem])));
    let changes = kept.batches.changes();
    assert_eq!(kept.batches.cancel(&second).unwrap().status, Status::Cancelling);
    assert!(changes.has_changed().unwrap());
    assert_eq!(kept.batches.cancel(&second).unwrap().status, Status::Cancelling, "asking again is fine");
    kept.batches.begin(&second, 3).unwrap();
    assert_eq!(kept.batches.batch(&second).unwrap().unwrap().status, Status::Cancelling, "it stays so");
    kept.batches.finish(&second, Status::Cancelled, &[]).unwrap();
    let cancelled = kept.batches.batch(&second).unwrap().unwrap();
    assert_eq!(
        (cancelled.status, cancelled.output_file, cancelled.error_file),
        (Status::Cancelled, None, None)
    );
    let page = Page { limit: 1, after: None, sort: Sort::NewestFirst };
    let (newest, more) = kept.batches.batches(Some(&a), &page).unwrap();
    assert_eq!((newest[0].id.as_str(), more), (second.as_str(), true));
    let gone = FileFacts { id: "file-gone".into(), ..input };
    assert!(matches!(kept.batch(&a, &gone), Err(BatchesError::NoSuchFile { .. })));
}

#[test]
fn a_database_that_is_not_ours_is_left_alone() {
    let open = |text: &[u8]| {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("batches.db"), text).unwrap();
        let clock = Arc::new(ManualClock::default());
        let error = Batches::open(dir.path(), clock, LIMITS).map(drop).unwrap_err();
        assert_eq!(fs::read(dir.path().join("batches.db")).unwrap(), text, "{error}");
        error
    };
    assert!(matches!(open(&[7; 4096]), BatchesError::NotOurs { .. }));
    let dir = tempfile::tempdir().unwrap();
    let other = rusqlite::Connection::open(dir.path().join("batches.db")).unwrap();
    other.pragma_update(None, "application_id", 7).unwrap();
    drop(other);
    let opened = Batches::open(dir.path(), Arc::new(ManualClock::default()), LIMITS);
    assert!(matches!(opened, Err(BatchesError::NotOurs { .. })));
}
