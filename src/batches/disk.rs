//! The bytes of files: written under a name that nobody looks for, made durable, then renamed.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use super::BatchesError;

/// Ends the name of a file that is not whole.
const PARTIAL: &str = ".part";

/// A file that is being written. Dropped without `finish`, nothing of it stays.
#[derive(Debug)]
pub struct Upload {
    id: String,
    folder: PathBuf,
    /// `None` once it has its name.
    partial: Option<PathBuf>,
    file: BufWriter<File>,
    bytes: u64,
    bytes_max: u64,
}

impl Upload {
    pub(super) fn begin(folder: &Path, id: String, bytes_max: u64) -> Result<Self, BatchesError> {
        let partial = folder.join(format!("{id}{PARTIAL}"));
        let file = File::create_new(&partial).map_err(|source| broken(&partial, source))?;
        let (folder, file) = (folder.to_owned(), BufWriter::with_capacity(1 << 16, file));
        Ok(Self { id, folder, partial: Some(partial), file, bytes: 0, bytes_max })
    }

    /// However long it gets.
    pub(super) fn unbounded(mut self) -> Self {
        self.bytes_max = u64::MAX;
        self
    }

    /// Adds to its end.
    ///
    /// # Errors
    /// `TooLarge` once it is over what a file may have, or when the disk does not take it.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), BatchesError> {
        self.bytes += bytes.len() as u64;
        if self.bytes > self.bytes_max {
            return Err(BatchesError::TooLarge { bytes_max: self.bytes_max });
        }
        self.file.write_all(bytes).map_err(|source| broken(&self.folder.join(&self.id), source))
    }

    /// Makes it durable under its name; its id and how many bytes it has.
    pub(super) fn finish(mut self) -> Result<(String, u64), BatchesError> {
        let path = self.folder.join(&self.id);
        let partial = self.partial.clone().expect("it has its name only from here on");
        let mut durable = || -> std::io::Result<()> {
            self.file.flush()?;
            self.file.get_ref().sync_all()?;
            fs::rename(&partial, &path)?;
            File::open(&self.folder)?.sync_all()
        };
        durable().map_err(|source| broken(&path, source))?;
        self.partial = None;
        Ok((std::mem::take(&mut self.id), self.bytes))
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if let Some(partial) = &self.partial
            && let Err(error) = fs::remove_file(partial)
        {
            // The next start clears it away.
            tracing::debug!(path = %partial.display(), %error, "half a file could not be removed");
        }
    }
}

/// Removes what no known file is: a crash left it.
pub(super) fn sweep(folder: &Path, known: &HashSet<String>) -> Result<(), BatchesError> {
    let entries = fs::read_dir(folder).map_err(|source| broken(folder, source))?;
    for entry in entries {
        let entry = entry.map_err(|source| broken(folder, source))?;
        let name = entry.file_name();
        let ours = name.to_str().filter(|name| name.starts_with("file-"));
        if ours.is_some_and(|name| !known.contains(name)) {
            fs::remove_file(entry.path()).map_err(|source| broken(&entry.path(), source))?;
        }
    }
    Ok(())
}

fn broken(path: &Path, source: std::io::Error) -> BatchesError {
    BatchesError::Disk { path: path.to_owned(), source }
}
