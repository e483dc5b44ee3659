use std::path::{Path, PathBuf};
use std::time::Duration;

use super::stand_in::{COMMIT, Notes, Reply, Repository, Request, StandIn, checksum_of, tree_line};
use super::*;
use crate::catalog::HubId;

mod kept;

const CONFIG: &[u8] = br#"{"model_type": "llama"}"#;

fn weights(seed: u32) -> Vec<u8> {
    (0..200_000u32).map(|i| (i.wrapping_add(seed << 20).wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// As most repositories are: more than is wanted.
fn safetensors() -> Repository {
    Repository::new(&[
        (".gitattributes", b"*.bin filter=lfs"),
        ("README.md", b"# A model"),
        ("config.json", CONFIG),
        ("generation_config.json", b"{}"),
        ("merges.txt", b""),
        ("model.safetensors", &weights(1)),
        ("onnx/model.onnx", b"onnx"),
        ("pytorch_model.bin", b"pickle"),
        ("tokenizer.json", b"{\"version\": \"1.0\"}"),
    ])
}

const WANTED: [&str; 5] =
    ["config.json", "generation_config.json", "merges.txt", "model.safetensors", "tokenizer.json"];

fn one_gguf() -> Repository {
    Repository::new(&[("README.md", b"# A model"), ("x.gguf", &weights(2))])
}

/// A user with a cache.
struct World {
    dir: tempfile::TempDir,
    notes: Notes,
    options: FetchOptions,
}

impl World {
    fn new(address: &str) -> Self {
        let second = Duration::from_secs(1);
        let pace =
            Pace { answer: 20 * second, stall: 20 * second, backoff: second / 100, wait_max: 5 * second };
        let hub_endpoint = Some(address.to_owned());
        Self {
            dir: tempfile::tempdir().expect("temporary directory"),
            notes: Notes::default(),
            options: FetchOptions { hub_endpoint, pace, ..FetchOptions::default() },
        }
    }

    fn models(&self) -> PathBuf {
        self.dir.path().join("models")
    }

    fn commit_dir(&self) -> PathBuf {
        self.models().join("hub/someone--some-model").join(COMMIT)
    }

    fn ask(&self, id: &str, revision: Option<&str>, asking: Asking) -> Result<Fetched, FetchError> {
        let id = HubId::parse(id).expect("an id").expect("a good id");
        fetch_repository(&id, revision, &self.models(), asking, &self.options, &self.notes)
    }

    fn pull(&self, id: &str) -> Result<Fetched, FetchError> {
        self.ask(id, None, Asking::Always)
    }

    fn serve(&self, id: &str) -> Result<Fetched, FetchError> {
        self.ask(id, None, Asking::IfNeeded)
    }

    fn gone(&mut self) {
        self.options.hub_endpoint = Some("http://127.0.0.1:9".to_owned()); // nothing listens on the discard port
    }

    /// Every file under the cache, without the lock.
    fn files(&self) -> Vec<String> {
        fn walk(dir: &Path, files: &mut Vec<PathBuf>) {
            for path in std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()) {
                if path.is_dir() { walk(&path, files) } else { files.push(path) }
            }
        }
        let mut files = Vec::new();
        walk(self.dir.path(), &mut files);
        let name = |path: PathBuf| path.file_name().expect("a name").to_string_lossy().into_owned();
        let mut names: Vec<String> = files.into_iter().map(name).filter(|name| name != "lock").collect();
        names.sort();
        names
    }
}

fn paths(fetched: &Fetched) -> Vec<&str> {
    fetched.files.iter().map(|file| file.path.as_str()).collect()
}

/// `pull` fails and says all of `parts`; no file got its name and no manifest calls anything complete.
fn refuses(
    repository: Repository,
    mishap: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static,
    parts: &[&str],
) {
    let hub = StandIn::start(repository, mishap);
    let world = World::new(&hub.address);
    let error = world.pull("someone/some-model").expect_err("must fail").to_string();
    for part in parts {
        assert!(error.contains(part), "'{part}' is not in: {error}");
    }
    let files = world.files();
    let whole =
        |name: &String| name.ends_with(".gguf") || name.ends_with(".safetensors") || name == "manifest.json";
    assert!(!files.iter().any(whole), "{files:?}");
}

#[test]
fn safetensors_are_fetched_with_what_belongs_to_them_and_then_need_no_network() {
    let hub = StandIn::start(safetensors(), |_| None);
    let mut world = World::new(&hub.address);
    let fetched = world.serve("someone/some-model").expect("fetched");
    assert_eq!((&fetched.path, fetched.commit.as_str()), (&world.commit_dir(), COMMIT));
    assert_eq!(paths(&fetched), WANTED);
    assert!(std::fs::read(fetched.path.join("model.safetensors")).expect("read") == weights(1));
    assert_eq!(std::fs::read(fetched.path.join("config.json")).expect("read"), CONFIG);
    assert_eq!(fetched.files[3].checksum, checksum_of("model.safetensors", &weights(1)));
    assert_eq!(world.files().len(), WANTED.len() + 1, "and the manifest: {:?}", world.files());
    assert_eq!(hub.downloads(), 4, "an empty file needs none");

    // A branch is asked about, and nothing else is; a commit is not even asked about.
    let asked = hub.seen().len();
    assert_eq!(world.serve("someone/some-model").expect("there"), fetched);
    assert_eq!(hub.seen().len(), asked + 1);
    let by_commit = world.ask("someone/some-model", Some(COMMIT), Asking::IfNeeded).expect("there");
    assert_eq!((&by_commit.path, hub.seen().len()), (&fetched.path, asked + 1));
    assert_eq!(world.pull("someone/some-model").expect("there"), fetched);
    assert_eq!((hub.seen().len(), hub.downloads()), (asked + 3, 4), "pull asks, and finds all there");

    world.gone();
    assert_eq!(world.serve("someone/some-model").expect("the last known"), fetched);
    let said = world.notes.lines().join("\n");
    assert!(said.contains("could not fetch") && said.contains(COMMIT), "{said}");
    assert!(world.pull("someone/some-model").is_err(), "pull asks the hub");
    assert!(world.ask("someone/some-model", Some("v2"), Asking::IfNeeded).is_err(), "never seen");
    assert!(world.serve("someone/other").is_err(), "never seen");
}

#[test]
fn the_list_may_have_pages_and_the_weights_shards() {
    let index = br#"{"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors",
                     "b": "model-00002-of-00002.safetensors"}}"#;
    let mut repository = Repository::new(&[
        ("config.json", CONFIG),
        ("consolidated.safetensors", b"twice the same"),
        ("model-00001-of-00002.safetensors", &weights(1)),
        ("model-00002-of-00002.safetensors", &weights(2)),
        ("model.safetensors.index.json", index),
        ("tokenizer.json", b"{}"),
    ]);
    repository.page = 2;
    let hub = StandIn::start(repository, |_| None);
    let world = World::new(&hub.address);
    let fetched = world.pull("someone/some-model").expect("fetched");
    assert_eq!(
        paths(&fetched),
        [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json"
        ]
    );
    assert_eq!(hub.seen().iter().filter(|request| request.target.contains("/tree/")).count(), 3);
    assert_eq!(
        std::fs::read(fetched.path.join("model-00002-of-00002.safetensors")).expect("read"),
        weights(2)
    );
}

#[test]
fn a_gguf_file_is_the_only_one_or_the_named_one() {
    let hub = StandIn::start(one_gguf(), |_| None);
    let world = World::new(&hub.address);
    assert_eq!(world.pull("someone/some-model").expect("fetched").path, world.commit_dir().join("x.gguf"));

    let files: [(&str, &[u8]); 2] = [("big/x y.gguf", &weights(3)), ("small.gguf", &weights(4))];
    let hub = StandIn::start(Repository::new(&files), |_| None);
    let mut world = World::new(&hub.address);
    let error = world.pull("someone/some-model").expect_err("which one?").to_string();
    assert!(error.contains("someone/some-model:small.gguf  (200 kB)"), "{error}");
    let fetched = world.pull("someone/some-model:big/x y.gguf").expect("fetched");
    assert_eq!(fetched.path, world.commit_dir().join("big/x y.gguf"));
    assert!(std::fs::read(&fetched.path).expect("read") == weights(3));
    world.pull("someone/some-model:small.gguf").expect("fetched beside it");
    assert_eq!(hub.downloads(), 2);

    world.gone();
    for id in ["someone/some-model:big/x y.gguf", "someone/some-model:small.gguf"] {
        assert!(world.serve(id).expect("there").path.exists());
    }
    assert!(world.serve("someone/some-model").is_err(), "a named file is not the whole repository");
}

#[test]
fn a_revision_is_one_segment_of_an_address() {
    let hub = StandIn::start(one_gguf(), |_| None);
    let world = World::new(&hub.address);
    let fetched = world.ask("someone/some-model", Some("feature/x"), Asking::Always).expect("fetched");
    assert_eq!((fetched.revision.as_str(), fetched.commit.as_str()), ("feature/x", COMMIT));
    for revision in ["", "..", "a..b", "a b", "a\\b", "a?b", "a\nb"] {
        let error = world.ask("someone/some-model", Some(revision), Asking::Always).expect_err("no revision");
        assert!(matches!(error, FetchError::Repository(RepositoryError::Revision(_))), "{error}");
    }
}

#[test]
fn refusals_say_what_is_missing_and_what_to_do() {
    let at = |part: &'static str, reply: Reply| {
        move |request: &Request| request.target.contains(part).then(|| reply.clone())
    };
    let gated = Reply::error(401, "GatedRepo", "Access to model someone/some-model is restricted.");
    refuses(
        one_gguf(),
        at("/resolve/", gated),
        &["gated", "accept its licence", "HF_TOKEN", "someone/some-model"],
    );
    let gated = Reply::error(403, "GatedRepo", "not in the authorized list");
    refuses(safetensors(), at("/resolve/", gated), &["gated", "accept its licence", "HF_TOKEN"]);
    let hidden = Reply::error(401, "RepoNotFound", "Repository not found");
    refuses(one_gguf(), at("/revision/", hidden), &["no model repository 'someone/some-model'", "private"]);
    refuses(one_gguf(), at("/revision/", Reply::new(401, "")), &["no model repository", "private"]);
    refuses(one_gguf(), at("/revision/", Reply::new(404, "<html>")), &["no model repository"]);
    let missing = Reply::error(404, "RevisionNotFound", "Invalid rev id");
    refuses(one_gguf(), at("/revision/", missing), &["no revision 'main'"]);
    let file = Reply::error(404, "EntryNotFound", "Entry not found");
    refuses(one_gguf(), at("/resolve/", file), &["lists 'x.gguf'", COMMIT]);
    let forbidden = Reply::new(403, r#"{"error": "Your token has no read access\u001b[31m"}"#);
    refuses(
        one_gguf(),
        at("/tree/", forbidden),
        &["refuses someone/some-model", "403", "no read access[31m"],
    );
    refuses(
        one_gguf(),
        at("/revision/", Reply::new(200, "<html>log in</html>")),
        &["no hub's", "someone/some-model"],
    );
    refuses(one_gguf(), at("/revision/", Reply::new(200, "{\"sha\": \"../..\"}")), &["no commit"]);
    refuses(
        Repository::new(&[("x.bin", b"")]),
        |_| None,
        &["someone/some-model: its weights are only in .bin"],
    );
}

#[test]
fn a_revision_that_no_mirror_explains_is_told_from_a_repository() {
    let hub = StandIn::start(one_gguf(), |request: &Request| {
        request.target.ends_with("/revision/v9").then(|| Reply::new(404, ""))
    });
    let error = World::new(&hub.address).ask("someone/some-model", Some("v9"), Asking::Always);
    let error = error.expect_err("no such revision").to_string();
    assert!(error.contains("no revision 'v9'"), "{error}");
}

#[test]
fn a_token_goes_to_the_hub_and_nowhere_else() {
    let elsewhere = StandIn::start(Repository::new(&[]), |request| {
        assert_eq!(request.token, None, "the token must not leave the hub");
        let bytes = weights(2);
        let status = if request.from > 0 { 206 } else { 200 };
        Some(Reply::new(status, &bytes[request.from..]).cut(90_000))
    });
    // Another host by name, as the hub's storage is.
    let location = format!("{}/blob", elsewhere.address.replace("127.0.0.1", "localhost"));
    let hub = StandIn::start(one_gguf(), move |request| {
        assert_eq!(request.token.as_deref(), Some("hf_secret"));
        request.target.contains("/resolve/").then(|| Reply::new(302, "").header("location", &location))
    });
    let mut world = World::new(&hub.address);
    world.options.hub_token = Token::new(" hf_secret\n");
    assert_eq!(format!("{:?}", world.options.hub_token), "Some(Token(..))");
    let fetched = world.pull("someone/some-model").expect("fetched over the redirect, resumed twice");
    assert!(std::fs::read(fetched.path).expect("read") == weights(2));
    assert_eq!((hub.downloads(), elsewhere.seen().len()), (3, 3));

    let refused = StandIn::start(one_gguf(), |_| {
        Some(Reply::error(401, "", "Invalid credentials in Authorization header"))
    });
    world.options.hub_endpoint = Some(refused.address);
    let error = world.pull("someone/some-model").expect_err("refused").to_string();
    assert!(error.contains("does not accept the token"), "{error}");
}

#[test]
fn a_busy_hub_is_asked_again_as_it_wishes() {
    let hub = StandIn::start(one_gguf(), |request| match request.before {
        0 => Some(Reply::new(429, "").header("retry-after", "0")),
        1 => Some(Reply::new(503, "")),
        2 => Some(Reply::new(500, "").header("retry-after", "Wed, 21 Oct 2015 07:28:00 GMT")),
        _ => None,
    });
    let world = World::new(&hub.address);
    world.pull("someone/some-model").expect("fetched in the end");
    assert_eq!(hub.seen().len(), 3 * 4);
    assert!(world.notes.lines()[0].contains("it answered 429; trying again"), "{:?}", world.notes.lines());

    refuses(one_gguf(), |_| Some(Reply::new(502, "")), &["could not fetch someone/some-model", "502"]);
    let later = |_: &Request| Some(Reply::new(429, "").header("retry-after", "3600"));
    refuses(one_gguf(), later, &["429", "asks to wait for 3600 s"]);
}

#[test]
fn a_broken_transfer_is_resumed_at_once_or_by_the_next_run() {
    let hub = StandIn::start(safetensors(), |request| {
        let bytes = weights(1);
        let wanted = request.target.ends_with("model.safetensors");
        let status = if request.from > 0 { 206 } else { 200 };
        wanted.then(|| Reply::new(status, &bytes[request.from..]).cut(70_000))
    });
    let world = World::new(&hub.address);
    let fetched = world.pull("someone/some-model").expect("fetched in pieces");
    assert!(std::fs::read(fetched.path.join("model.safetensors")).expect("read") == weights(1));
    assert_eq!(hub.downloads(), 3 + 3);

    let broken = StandIn::start(one_gguf(), |request| {
        let download = request.target.contains("/resolve/");
        download.then(|| {
            if request.before == 0 { Reply::new(200, weights(2)).cut(70_000) } else { Reply::new(503, "") }
        })
    });
    let mut world = World::new(&broken.address);
    let error = world.pull("someone/some-model").expect_err("broken off").to_string();
    assert!(error.contains("x.gguf") && error.contains("are kept"), "{error}");
    let hub = StandIn::start(one_gguf(), |_| None);
    world.options.hub_endpoint = Some(hub.address.clone());
    world.pull("someone/some-model").expect("resumed");
    let last = hub.seen().pop().expect("a download");
    assert!(last.from > 0 && last.target.ends_with("/x.gguf"), "{last:?}");
}

#[test]
fn a_silent_transfer_is_taken_up_again() {
    let hub = StandIn::start(one_gguf(), |request| {
        let first = request.target.contains("/resolve/") && request.before == 0;
        first.then(|| Reply::new(200, weights(2)).silent(1000))
    });
    let mut world = World::new(&hub.address);
    world.options.pace.stall = Duration::from_secs(1);
    world.pull("someone/some-model").expect("fetched");
    let from: Vec<usize> = hub.seen().iter().skip(2).map(|request| request.from).collect();
    assert_eq!(from, [0, 1000]);
}

#[test]
fn wrong_bytes_are_fetched_once_more_and_then_refused() {
    let wrong = |always: bool, file: &'static str| {
        move |request: &Request| {
            let wanted = request.target.ends_with(&format!("/{file}")) && (always || request.before == 0);
            let bytes = if file == "config.json" { CONFIG.to_vec() } else { weights(1) };
            wanted.then(|| Reply::new(200, bytes.iter().map(|byte| byte ^ 1).collect::<Vec<u8>>()))
        }
    };
    for (file, kind) in [("model.safetensors", "sha256"), ("config.json", "git-sha1")] {
        let hub = StandIn::start(safetensors(), wrong(false, file));
        let world = World::new(&hub.address);
        world.pull("someone/some-model").expect("right the second time");
        assert_eq!(hub.downloads(), 5);
        refuses(safetensors(), wrong(true, file), &["sent something wrong", file, kind, "instead of"]);
    }
    let long = |request: &Request| {
        request.target.ends_with("x.gguf").then(|| Reply::new(200, [weights(2), weights(3)].concat()))
    };
    refuses(one_gguf(), long, &["bytes instead of 200000"]);
    let short =
        |request: &Request| request.target.ends_with("x.gguf").then(|| Reply::new(200, &weights(2)[..1000]));
    refuses(one_gguf(), short, &["bytes instead of 200000"]);
}

#[test]
fn names_that_lead_elsewhere_are_never_used() {
    let long = format!("{}.gguf", "x".repeat(600));
    for name in [
        "../evil.gguf",
        "/evil.gguf",
        "a/../../evil.gguf",
        "..\\\\evil.gguf",
        "c:evil.gguf",
        "a//b.gguf",
        &long,
    ] {
        let mut repository = Repository::new(&[("x.gguf", b"evil")]);
        repository.lies.push(("x.gguf", tree_line(name, b"evil").replace("x.gguf", name)));
        refuses(repository, |_| None, &["no weights"]);
    }
    let index = br#"{"weight_map": {"a": "../../evil.safetensors"}}"#;
    let repository = Repository::new(&[("config.json", CONFIG), ("model.safetensors.index.json", index)]);
    refuses(repository, |_| None, &["index.json cannot be used", "evil"]);
}

#[test]
fn sizes_are_held_against_the_disk_before_anything_is_fetched() {
    let vast = |bytes: u64| {
        let mut repository = safetensors();
        for path in ["model.safetensors", "tokenizer.json"] {
            let line = tree_line(path, b"").replace("\"size\": 0", &format!("\"size\": {bytes}"));
            repository.lies.push((path, line));
        }
        repository
    };
    refuses(vast(1 << 60), |_| None, &["needs 2305843009 GB more", "free", "someone--some-model"]);
    refuses(vast(u64::MAX), |_| None, &["free some space"]);
}

#[test]
fn a_list_without_checksums_gives_nothing() {
    for lie in [
        r#"{"type": "file", "oid": "nothing", "size": 4, "path": "x.gguf"}"#,
        r#"{"type": "file", "oid": "", "size": 4, "path": "x.gguf", "lfs": {"oid": "12", "size": 4, "pointerSize": 1}}"#,
    ] {
        let mut repository = Repository::new(&[("x.gguf", b"evil")]);
        repository.lies.push(("x.gguf", lie.to_owned()));
        refuses(repository, |_| None, &["no weights"]);
    }
}
