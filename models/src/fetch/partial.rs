//! A file on its way: bytes are appended under a name that nobody reads, and the finished file is renamed.
//!
//! Invariant: only `publish` and `link` make a final name, after length and checksum were right.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::checksum::Hash;
use super::{FetchError, Job};

/// The file being written, with the running hash of what it holds.
pub(super) struct Partial {
    path: PathBuf,
    file: File,
    len: u64,
    hash: Hash,
}

impl Partial {
    /// Opens what an interrupted run left (its bytes are hashed), or a new file. What is longer than the wanted
    /// file is thrown away.
    pub(super) fn open(job: &Job<'_>) -> Result<Self, FetchError> {
        let path = Self::path(job);
        let error = |error| job.file_error(&path, error);
        let mut file =
            File::options().create(true).truncate(false).read(true).write(true).open(&path).map_err(error)?;
        let mut hash = job.checksum.hash(job.bytes);
        let len = io::copy(&mut file, &mut hash).map_err(error)?;
        let mut partial = Self { path: path.clone(), file, len, hash };
        if len > job.bytes {
            partial.reset(job)?;
        }
        Ok(partial)
    }

    /// Where the bytes of a wanted file are kept until it is whole.
    pub(super) fn path(job: &Job<'_>) -> PathBuf {
        job.beside(&format!("{}.partial", &job.checksum.value()[..16]))
    }

    /// Bytes held.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Appends.
    pub(super) fn write(&mut self, job: &Job<'_>, bytes: &[u8]) -> Result<(), FetchError> {
        self.file.write_all(bytes).map_err(|error| job.file_error(&self.path, error))?;
        self.hash.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Throws away what is held.
    pub(super) fn reset(&mut self, job: &Job<'_>) -> Result<(), FetchError> {
        let emptied = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        emptied.map_err(|error| job.file_error(&self.path, error))?;
        self.hash = job.checksum.hash(job.bytes);
        self.len = 0;
        Ok(())
    }

    /// Takes the bytes of a file that is there already instead of what is held. False, and nothing held, if they
    /// cannot be read or are not the right ones.
    pub(super) fn copy(&mut self, job: &Job<'_>, source: &Path) -> Result<bool, FetchError> {
        self.reset(job)?;
        let Ok(mut source) = File::open(source) else { return Ok(false) };
        let mut piece = vec![0; 1 << 20];
        loop {
            match source.read(&mut piece) {
                Ok(0) => break,
                Ok(read) => self.write(job, &piece[..read])?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
            if self.len > job.bytes {
                break;
            }
        }
        let right = self.check(job).is_ok();
        if !right {
            self.reset(job)?;
        }
        Ok(right)
    }

    /// `Ok` if length and checksum are the entry's, else what is wrong.
    pub(super) fn check(&self, job: &Job<'_>) -> Result<(), String> {
        let found = self.hash.value();
        let (kind, wanted) = (job.checksum.kind(), job.checksum.value());
        if self.len != job.bytes {
            Err(format!("it has {} bytes instead of {}", self.len, job.bytes))
        } else if found != wanted {
            Err(format!("its {kind} is {found} instead of {wanted}"))
        } else {
            Ok(())
        }
    }

    /// Gives the checked file its final name, durably.
    pub(super) fn publish(self, job: &Job<'_>, target: &Path) -> Result<(), FetchError> {
        assert_eq!(
            self.check(job),
            Ok(()),
            "a source returned Ok for a file it did not check; this is a bug"
        );
        let error = |error| job.file_error(target, error);
        self.file.sync_all().map_err(error)?;
        std::fs::rename(&self.path, target).map_err(error)?;
        sync_parent(job, target).map_err(error)
    }
}

/// Gives `source`, which the caller has found right, the final name as well, durably. What an interrupted run left
/// of the file is no longer needed.
pub(super) fn link(job: &Job<'_>, source: &Path, target: &Path) -> io::Result<()> {
    // A symbolic link could point elsewhere from there, and to what is not ours.
    if !std::fs::symlink_metadata(source)?.is_file() {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let new = job.beside("link");
    drop(std::fs::remove_file(&new));
    std::fs::hard_link(source, &new)?;
    std::fs::rename(&new, target)?;
    drop(std::fs::remove_file(Partial::path(job)));
    sync_parent(job, target)
}

fn sync_parent(job: &Job<'_>, target: &Path) -> io::Result<()> {
    File::open(target.parent().unwrap_or(job.cache_dir))?.sync_all()
}
