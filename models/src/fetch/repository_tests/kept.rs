//! Copies that are kept from one run to the next.

use super::*;

#[test]
fn a_file_that_changed_is_fetched_again_and_one_that_was_only_touched_is_not() {
    let hub = StandIn::start(safetensors(), |_| None);
    let mut world = World::new(&hub.address);
    let fetched = world.pull("someone/some-model").expect("fetched");
    let file = fetched.path.join("model.safetensors");

    std::fs::write(&file, weights(1)).expect("the same again");
    world.serve("someone/some-model").expect("hashed");
    assert_eq!(hub.downloads(), 4);
    std::fs::write(&file, weights(9)).expect("something else");
    world.serve("someone/some-model").expect("fetched again");
    assert_eq!(hub.downloads(), 5);
    assert!(std::fs::read(&file).expect("read") == weights(1));

    std::fs::remove_file(&file).expect("remove");
    let known = world.ask("someone/some-model", Some(COMMIT), Asking::IfNeeded).expect("fetched again");
    assert_eq!((hub.downloads(), known.commit.as_str()), (6, COMMIT));
    std::fs::remove_file(&file).expect("remove");
    world.gone();
    assert!(world.serve("someone/some-model").is_err(), "what is not complete is not used");
}

#[test]
fn a_branch_that_moved_is_fetched_anew_and_the_newest_is_the_last_known() {
    let hub = StandIn::start(one_gguf(), |_| None);
    let mut world = World::new(&hub.address);
    world.serve("someone/some-model").expect("fetched");
    std::thread::sleep(Duration::from_millis(1100)); // a manifest counts seconds
    let mut moved = Repository::new(&[("x.gguf", &weights(5))]);
    moved.commit = COMMIT.replace('0', "f");
    let hub = StandIn::start(moved, |_| None);
    world.options.hub_endpoint = Some(hub.address);
    let newer = world.serve("someone/some-model").expect("fetched");
    assert!(std::fs::read(&newer.path).expect("read") == weights(5));
    world.gone();
    assert_eq!(world.serve("someone/some-model").expect("the last known").commit, newer.commit);
    let older = world.ask("someone/some-model", Some(COMMIT), Asking::IfNeeded).expect("still there");
    assert!(std::fs::read(&older.path).expect("read") == weights(2));
}

#[test]
fn a_second_process_waits_and_uses_the_result() {
    let hub = StandIn::start(one_gguf(), |_| None);
    let world = World::new(&hub.address);
    world.pull("someone/some-model").expect("fetched");
    let manifest = world.commit_dir().join("manifest.json");
    let kept = std::fs::read(&manifest).expect("read");
    std::fs::remove_file(&manifest).expect("remove");
    let lock = File::create(world.models().join("hub/someone--some-model/lock")).expect("create");
    lock.lock().expect("lock");
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| world.serve("someone/some-model"));
        while world.notes.lines().is_empty() {
            std::thread::yield_now();
        }
        std::fs::write(&manifest, kept).expect("write");
        lock.unlock().expect("unlock");
        waiting.join().expect("no panic").expect("there");
    });
    assert_eq!(hub.downloads(), 1);
    assert!(world.notes.lines()[0].contains("another process is fetching someone/some-model"));
}

#[test]
fn a_directory_in_the_way_and_a_full_disk_are_named() {
    let hub = StandIn::start(one_gguf(), |_| None);
    let world = World::new(&hub.address);
    std::fs::write(world.models(), "in the way").expect("write");
    let error = world.pull("someone/some-model").expect_err("no directory").to_string();
    assert!(error.contains("cannot write to the cache directory"), "{error}");

    let sorted =
        |kind: io::ErrorKind| file_error(Path::new("dir"), 5_000_000, Path::new("file"), kind.into());
    assert!(matches!(sorted(io::ErrorKind::StorageFull), FetchError::DiskFull { bytes: 5_000_000, .. }));
    assert!(matches!(sorted(io::ErrorKind::PermissionDenied), FetchError::CacheNotWritable { .. }));
    assert!(matches!(sorted(io::ErrorKind::ReadOnlyFilesystem), FetchError::CacheNotWritable { .. }));
    assert!(matches!(sorted(io::ErrorKind::IsADirectory), FetchError::File { .. }));
}

#[test]
fn a_hub_that_goes_away_between_two_files_leaves_what_is_known() {
    let hub = StandIn::start(one_gguf(), |_| None);
    let mut world = World::new(&hub.address);
    let known = world.serve("someone/some-model").expect("fetched");
    let mut moved = Repository::new(&[("x.gguf", &weights(5))]);
    moved.commit = COMMIT.replace('0', "f");
    let failing =
        StandIn::start(moved, |request| request.target.contains("/resolve/").then(|| Reply::new(503, "")));
    world.options.hub_endpoint = Some(failing.address);
    assert_eq!(world.serve("someone/some-model").expect("the last known").commit, known.commit);
    assert!(world.notes.lines().last().expect("a note").contains(&known.commit));
}

/// The repository one commit later.
fn moved(mut repository: Repository) -> Repository {
    repository.commit = COMMIT.replace('0', "f");
    repository
}

#[test]
fn a_complete_copy_is_served_whatever_the_hub_says() {
    let hub = StandIn::start(one_gguf(), |_| None);
    let mut world = World::new(&hub.address);
    let known = world.serve("someone/some-model").expect("fetched");
    let mut check = |repository: Repository, part: &'static str, reply: Option<Reply>, said: &str| {
        let hub = StandIn::start(moved(repository), move |request| {
            reply.clone().filter(|_| request.target.contains(part))
        });
        world.options.hub_endpoint = Some(hub.address);
        let before = world.notes.lines().len();
        assert_eq!(world.serve("someone/some-model").expect("the last known"), known, "{said}");
        let notes = world.notes.lines()[before..].join("\n");
        assert!(notes.contains(said) && notes.contains(COMMIT), "'{said}' is not in: {notes}");
        assert!(world.pull("someone/some-model").is_err(), "pull is about the hub: {said}");
    };
    let newer = || Repository::new(&[("x.gguf", &weights(5))]);
    let expired = Reply::error(401, "", "Invalid credentials in Authorization header");
    check(newer(), "/revision/", Some(expired), "no model repository");
    let gated = Reply::error(403, "GatedRepo", "not in the authorized list");
    check(newer(), "/resolve/", Some(gated), "gated");
    check(newer(), "/tree/", Some(Reply::new(403, "")), "refuses someone/some-model");
    let renamed = Reply::error(404, "RepoNotFound", "Repository not found");
    check(newer(), "/revision/", Some(renamed), "no model repository");
    let gone = Reply::error(404, "EntryNotFound", "Entry not found");
    check(newer(), "/resolve/", Some(gone), "lists 'x.gguf'");
    check(newer(), "/revision/", Some(Reply::new(200, "<html>log in</html>")), "no hub's");
    check(newer(), "/tree/", Some(Reply::new(200, "<html>log in</html>")), "no hub's");
    check(newer(), "/resolve/", Some(Reply::new(200, weights(6))), "sent something wrong");
    check(newer(), "/revision/", Some(Reply::new(500, "")), "500");
    check(newer(), "/resolve/", Some(Reply::new(503, "")), "503");
    let mut vast = newer();
    let line = tree_line("x.gguf", b"").replace("\"size\": 0", "\"size\": 1152921504606846976");
    vast.lies.push(("x.gguf", line));
    check(vast, "nowhere", None, "free some space");

    let with_token = StandIn::start(newer(), |_| Some(Reply::error(401, "", "Invalid credentials")));
    world.options.hub_endpoint = Some(with_token.address);
    world.options.hub_token = Token::new("hf_expired");
    assert_eq!(world.serve("someone/some-model").expect("the last known"), known);
    assert!(world.notes.lines().join("\n").contains("does not accept the token"));
}

#[test]
fn a_copy_is_not_served_for_what_is_no_longer_there() {
    let hub = StandIn::start(one_gguf(), |_| None);
    let mut world = World::new(&hub.address);
    world.serve("someone/some-model").expect("fetched");
    let hub = StandIn::start(one_gguf(), |_| Some(Reply::error(404, "RevisionNotFound", "Invalid rev id")));
    world.options.hub_endpoint = Some(hub.address);
    let error = world.serve("someone/some-model").expect_err("no such revision").to_string();
    assert!(error.contains("no revision 'main'"), "{error}");
    let two: [(&str, &[u8]); 2] = [("x.gguf", &weights(5)), ("y.gguf", &weights(6))];
    let hub = StandIn::start(moved(Repository::new(&two)), |_| None);
    world.options.hub_endpoint = Some(hub.address);
    let error = world.serve("someone/some-model").expect_err("which one?").to_string();
    assert!(error.contains("2 GGUF files"), "{error}");
}

#[test]
fn the_last_known_commit_is_the_latest_that_has_the_wanted_file() {
    let two: [(&str, &[u8]); 2] = [("x.gguf", &weights(3)), ("y.gguf", &weights(4))];
    let hub = StandIn::start(Repository::new(&two), |_| None);
    let mut world = World::new(&hub.address);
    let x = world.serve("someone/some-model:x.gguf").expect("fetched");
    let hub = StandIn::start(moved(Repository::new(&two)), |_| None);
    world.options.hub_endpoint = Some(hub.address);
    let y = world.serve("someone/some-model:y.gguf").expect("fetched from a later commit");
    world.gone();
    assert_eq!(world.serve("someone/some-model:x.gguf").expect("there"), x);
    assert_eq!(world.serve("someone/some-model:y.gguf").expect("there"), y);
}

#[test]
fn what_an_earlier_commit_has_is_not_fetched_again() {
    use std::os::unix::fs::MetadataExt;
    let hub = StandIn::start(safetensors(), |_| None);
    let mut world = World::new(&hub.address);
    let older = world.pull("someone/some-model").expect("fetched");
    let mut changed = safetensors();
    changed.files.retain(|(path, _)| *path != "tokenizer.json");
    changed.files.push(("tokenizer.json", b"{\"version\": \"2.0\"}".to_vec()));
    let hub = StandIn::start(moved(changed), |_| None);
    world.options.hub_endpoint = Some(hub.address.clone());
    let newer = world.pull("someone/some-model").expect("fetched");
    assert_eq!(hub.downloads(), 1, "the tokenizer");
    assert_eq!(paths(&newer), WANTED);
    let inode = |at: &Fetched, file: &str| std::fs::metadata(at.path.join(file)).expect("there").ino();
    assert_eq!(inode(&newer, "model.safetensors"), inode(&older, "model.safetensors"), "one file, two names");
    assert_ne!(inode(&newer, "tokenizer.json"), inode(&older, "tokenizer.json"));
    assert_eq!(world.files().len(), 2 * (WANTED.len() + 1), "nothing else is left: {:?}", world.files());
    assert_eq!(world.serve("someone/some-model").expect("there"), newer);
    assert_eq!(hub.downloads(), 1);
    let known = world.ask("someone/some-model", Some(COMMIT), Asking::IfNeeded).expect("still there");
    assert_eq!(known.files, older.files);
}

#[test]
fn what_cannot_be_linked_is_copied_and_what_is_not_right_is_fetched() {
    let renamed = || moved(Repository::new(&[("sub/y.gguf", &weights(2))]));
    for (bytes, downloads) in [(weights(2), 0), (weights(7), 1)] {
        let hub = StandIn::start(one_gguf(), |_| None);
        let mut world = World::new(&hub.address);
        let older = world.pull("someone/some-model").expect("fetched");
        let own = world.dir.path().join("own");
        std::fs::write(&own, bytes).expect("write");
        std::fs::remove_file(&older.path).expect("remove");
        std::os::unix::fs::symlink(&own, &older.path).expect("a symbolic link");
        let hub = StandIn::start(renamed(), |_| None);
        world.options.hub_endpoint = Some(hub.address.clone());
        let newer = world.pull("someone/some-model").expect("copied or fetched");
        assert!(std::fs::symlink_metadata(&newer.path).expect("there").is_file());
        assert!(std::fs::read(&newer.path).expect("read") == weights(2));
        assert_eq!(hub.downloads(), downloads);
        assert!(!world.files().iter().any(|name| name.ends_with(".partial")), "{:?}", world.files());
    }
}

#[test]
fn what_is_linked_needs_no_space() {
    use super::manifest::{Complete, Manifest};
    const VAST: u64 = 1 << 43; // more than the disk has: a file with a hole
    let mut vast = moved(safetensors());
    let line = tree_line("model.safetensors", b"").replace("\"size\": 0", &format!("\"size\": {VAST}"));
    vast.lies.push(("model.safetensors", line));
    let hub = StandIn::start(vast, |_| None);
    let world = World::new(&hub.address);
    std::fs::create_dir_all(world.commit_dir()).expect("create");
    let file = File::create(world.commit_dir().join("model.safetensors")).expect("create");
    if file.set_len(VAST).is_err() {
        return; // the file system has no such files
    }
    let complete = Complete {
        path: "model.safetensors".to_owned(),
        size: VAST,
        checksum: checksum_of("model.safetensors", b""),
        modified: changed(&file.metadata().expect("there")),
    };
    let (repository, commit) = ("someone/some-model".to_owned(), COMMIT.to_owned());
    let manifest =
        Manifest { repository, commit, revisions: Default::default(), model: None, files: vec![complete] };
    manifest.write(&world.commit_dir()).expect("write");
    let fetched = world.pull("someone/some-model").expect("linked, and the rest fetched");
    assert_eq!((fetched.files[3].size, hub.downloads()), (VAST, 3));
}
