//! A hub for tests, on a port of this machine: revisions, file lists and files as the real one answers, and any
//! mishap on top.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::checksum::Checksum;
use super::progress::Progress;

pub(super) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What a client asked.
#[derive(Debug, Clone)]
pub(super) struct Request {
    /// Path and query.
    pub(super) target: String,
    /// From `Range: bytes=FROM-`.
    pub(super) from: usize,
    pub(super) token: Option<String>,
    /// How often this target was asked for before.
    pub(super) before: usize,
}

/// What it is told.
#[derive(Debug, Clone)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: Vec<u8>,
    /// The connection ends after so many bytes of the body.
    pub(super) cut: usize,
    /// After what is sent of the body, silence instead of the end.
    pub(super) silent: bool,
}

impl Reply {
    pub(super) fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), cut: usize::MAX, silent: false }
    }

    pub(super) fn header(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.to_owned()));
        self
    }

    /// A refusal as the hub words it.
    pub(super) fn error(status: u16, code: &str, message: &str) -> Self {
        let body = format!(r#"{{"error": "{message}"}}"#);
        Self::new(status, body).header("x-error-code", code).header("x-error-message", message)
    }

    pub(super) fn cut(mut self, after: usize) -> Self {
        self.cut = after;
        self
    }

    pub(super) fn silent(mut self, after: usize) -> Self {
        (self.cut, self.silent) = (after, true);
        self
    }
}

/// Gets its say before the hub answers; `None` leaves it to the hub.
type Mishap = dyn Fn(&Request) -> Option<Reply> + Send + Sync;

/// One repository, `someone/some-model`, with one commit.
pub(super) struct Repository {
    pub(super) files: Vec<(&'static str, Vec<u8>)>,
    /// What the list says instead of the truth: path, and a line of JSON.
    pub(super) lies: Vec<(&'static str, String)>,
    pub(super) commit: String,
    /// Files on a page of the list.
    pub(super) page: usize,
}

impl Repository {
    pub(super) fn new(files: &[(&'static str, &[u8])]) -> Self {
        let files = files.iter().map(|(path, bytes)| (*path, bytes.to_vec())).collect();
        Self { files, lies: Vec::new(), commit: COMMIT.to_owned(), page: 1000 }
    }

    fn answer(&self, request: &Request, address: &str) -> Reply {
        let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
        let not_found = |code: &str| Reply::error(404, code, "not found");
        if let Some(rest) = path.strip_prefix("/api/models/someone/some-model/") {
            let known = |revision: &str| ["main", "feature%2Fx", &self.commit].contains(&revision);
            return match rest.split_once('/') {
                Some((_, revision)) if !known(revision) => not_found("RevisionNotFound"),
                Some(("revision", _)) => Reply::new(200, self.revision()),
                Some(("tree", commit)) if commit == self.commit => self.tree(path, query, address),
                _ => not_found(""),
            };
        }
        let Some(rest) = path.strip_prefix("/someone/some-model/resolve/") else {
            return not_found("RepoNotFound");
        };
        let file = rest.strip_prefix(&self.commit).and_then(|rest| rest.strip_prefix('/'));
        let file =
            file.and_then(|file| self.files.iter().find(|(path, _)| *path == file.replace("%20", " ")));
        let Some((_, bytes)) = file else { return not_found("EntryNotFound") };
        let etag = format!("\"{}\"", checksum_of("x.safetensors", bytes).value());
        match request.from {
            0 => Reply::new(200, bytes.clone()).header("etag", &etag),
            from if from >= bytes.len() => Reply::new(416, ""),
            from => Reply::new(206, &bytes[from..])
                .header("etag", &etag)
                .header("content-range", &format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len())),
        }
    }

    fn revision(&self) -> String {
        let siblings: Vec<String> =
            self.files.iter().map(|(path, _)| format!(r#"{{"rfilename": "{path}"}}"#)).collect();
        format!(
            r#"{{"_id": "65f0", "id": "someone/some-model", "modelId": "someone/some-model", "private": false,
                "gated": false, "sha": "{}", "downloads": 3, "tags": ["region:us"], "siblings": [{}]}}"#,
            self.commit,
            siblings.join(", ")
        )
    }

    /// A page of the list, with a link to the next one.
    fn tree(&self, path: &str, query: &str, address: &str) -> Reply {
        assert!(query.contains("recursive=true"), "the whole list is asked for: {query}");
        let from = query.split("cursor=").nth(1).map_or(0, |from| from.parse().expect("our own cursor"));
        let lines = self.files.iter().skip(from).take(self.page).map(|(path, bytes)| {
            let lie = self.lies.iter().find(|(lied, _)| lied == path);
            lie.map_or_else(|| tree_line(path, bytes), |(_, line)| line.clone())
        });
        let folder = r#"{"type": "directory", "oid": "aa", "size": 0, "path": "onnx"}"#.to_owned();
        let reply = Reply::new(200, format!("[{}]", lines.chain([folder]).collect::<Vec<_>>().join(",\n")));
        match from + self.page < self.files.len() {
            true => {
                let next =
                    format!("<{address}{path}?recursive=true&cursor={}>; rel=\"next\"", from + self.page);
                reply.header("link", &next)
            }
            false => reply,
        }
    }
}

/// LFS has what the hub keeps large: weights, and vocabularies of some size.
fn is_lfs(path: &str) -> bool {
    [".safetensors", ".gguf", ".bin", "tokenizer.json"].iter().any(|ending| path.ends_with(ending))
}

pub(super) fn checksum_of(path: &str, bytes: &[u8]) -> Checksum {
    let kind = match is_lfs(path) {
        true => Checksum::Sha256(String::new()),
        false => Checksum::GitSha1(String::new()),
    };
    let mut hash = kind.hash(bytes.len() as u64);
    hash.update(bytes);
    match kind {
        Checksum::Sha256(_) => Checksum::Sha256(hash.value()),
        Checksum::GitSha1(_) => Checksum::GitSha1(hash.value()),
    }
}

/// A file in the list, as the hub writes it.
pub(super) fn tree_line(path: &str, bytes: &[u8]) -> String {
    let (size, sum) = (bytes.len(), checksum_of(path, bytes));
    match is_lfs(path) {
        true => format!(
            r#"{{"type": "file", "oid": "5f3c2e0f9c1f4b1a8d6e7c9b0a1d2e3f4a5b6c7d", "size": {size}, "path": "{path}",
                "lfs": {{"oid": "{}", "size": {size}, "pointerSize": 134}}, "xetHash": "a1b2"}}"#,
            sum.value()
        ),
        false => format!(r#"{{"type": "file", "oid": "{}", "size": {size}, "path": "{path}"}}"#, sum.value()),
    }
}

/// Keeps what a fetch says.
#[derive(Default)]
pub(super) struct Notes(Mutex<Vec<String>>);

impl Notes {
    pub(super) fn lines(&self) -> Vec<String> {
        self.0.lock().expect("no panic while noting").clone()
    }
}

impl Progress for Notes {
    fn note(&self, line: &str) {
        self.0.lock().expect("no panic while noting").push(line.to_owned());
    }
    fn start(&self, _: &str, _: u64) {}
    fn at(&self, _: u64) {}
    fn finish(&self) {}
}

/// The running server.
pub(super) struct StandIn {
    pub(super) address: String,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl StandIn {
    pub(super) fn start(
        repository: Repository,
        mishap: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = format!("http://{}", listener.local_addr().expect("address"));
        let seen: Arc<Mutex<Vec<Request>>> = Arc::default();
        let shared = Arc::new((repository, address.clone(), seen.clone(), mishap));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = shared.clone();
                std::thread::spawn(move || {
                    let (repository, address, seen, mishap) = &*shared;
                    // A client that goes away is no failure of the stand-in.
                    drop(answer(stream, repository, address, seen, mishap));
                });
            }
        });
        Self { address, seen }
    }

    /// What was asked so far.
    pub(super) fn seen(&self) -> Vec<Request> {
        self.seen.lock().expect("no panic while noting").clone()
    }

    /// How many requests were for files' bytes.
    pub(super) fn downloads(&self) -> usize {
        self.seen().iter().filter(|request| request.target.contains("/resolve/")).count()
    }
}

fn answer(
    mut stream: TcpStream,
    repository: &Repository,
    address: &str,
    seen: &Mutex<Vec<Request>>,
    mishap: &Mishap,
) -> io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    let target = first.split(' ').nth(1).unwrap_or("").to_owned();
    let mut request = Request { target, from: 0, token: None, before: 0 };
    for line in lines {
        let line = line?;
        let (name, value) = line.split_once(": ").unwrap_or((&line, ""));
        match name.to_ascii_lowercase().as_str() {
            "" => break,
            "range" => {
                let from = value.strip_prefix("bytes=").and_then(|range| range.split('-').next());
                request.from = from.and_then(|from| from.parse().ok()).expect("a range as the hub takes it");
            }
            "authorization" => request.token = value.strip_prefix("Bearer ").map(str::to_owned),
            _ => {}
        }
    }
    {
        let mut seen = seen.lock().expect("no panic while noting");
        request.before = seen.iter().filter(|other| other.target == request.target).count();
        seen.push(request.clone());
    }
    let reply = mishap(&request).unwrap_or_else(|| repository.answer(&request, address));
    write!(stream, "HTTP/1.1 {} Some Reason\r\n", reply.status)?;
    for (name, value) in &reply.headers {
        write!(stream, "{name}: {value}\r\n")?;
    }
    write!(stream, "content-length: {}\r\nconnection: close\r\n\r\n", reply.body.len())?;
    stream.write_all(&reply.body[..reply.body.len().min(reply.cut)])?;
    stream.flush()?;
    if reply.silent {
        std::thread::sleep(Duration::from_secs(3));
    }
    Ok(())
}
