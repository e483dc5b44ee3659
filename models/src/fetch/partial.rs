//! A file on its way: bytes are appended under a name that nobody reads, and the finished file is renamed.
//!
//! Invariant: `publish` is the only thing that makes a final name, after length and checksum were right.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{FetchError, Job};

/// The file being written, with the running hash of what it holds.
pub(super) struct Partial {
    path: PathBuf,
    file: File,
    len: u64,
    hash: Sha256,
}

impl Partial {
    /// Opens what an interrupted run left (its bytes are hashed), or a new file. What is longer than the wanted
    /// file is thrown away.
    pub(super) fn open(job: &Job<'_>) -> Result<Self, FetchError> {
        let path = job.beside(&format!("{}.partial", &job.entry.sha256[..16]));
        let error = |error| job.file_error(&path, error);
        let mut file =
            File::options().create(true).truncate(false).read(true).write(true).open(&path).map_err(error)?;
        let mut hash = Sha256::new();
        let len = io::copy(&mut file, &mut HashWriter(&mut hash)).map_err(error)?;
        let mut partial = Self { path: path.clone(), file, len, hash };
        if len > job.entry.bytes {
            partial.reset(job)?;
        }
        Ok(partial)
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
        self.hash = Sha256::new();
        self.len = 0;
        Ok(())
    }

    /// `Ok` if length and checksum are the entry's, else what is wrong.
    pub(super) fn check(&self, job: &Job<'_>) -> Result<(), String> {
        let sha256 = hex(&self.hash.clone().finalize());
        if self.len != job.entry.bytes {
            Err(format!("it has {} bytes instead of {}", self.len, job.entry.bytes))
        } else if sha256 != job.entry.sha256 {
            Err(format!("its sha256 is {sha256} instead of {}", job.entry.sha256))
        } else {
            Ok(())
        }
    }

    /// Gives the checked file its final name, durably, and stamps it as checked.
    pub(super) fn publish(self, job: &Job<'_>, target: &Path) -> Result<PathBuf, FetchError> {
        assert_eq!(
            self.check(job),
            Ok(()),
            "a source returned Ok for a file it did not check; this is a bug"
        );
        let error = |error| job.file_error(target, error);
        self.file.sync_all().map_err(error)?;
        std::fs::rename(&self.path, target).map_err(error)?;
        File::open(job.cache_dir).and_then(|dir| dir.sync_all()).map_err(error)?;
        job.stamp(&std::fs::metadata(target).map_err(error)?);
        Ok(target.to_path_buf())
    }
}

/// SHA-256 of a file, as lower-case hex.
pub(super) fn hash_file(path: &Path) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}

struct HashWriter<'a>(&'a mut Sha256);

impl Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a String cannot fail");
        text
    })
}
