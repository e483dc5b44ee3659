//! Files that clients upload and batches of requests, as the data directory keeps them: what they hold under `files/`,
//! what is known of them in `batches.db`.
//!
//! Does not know: HTTP, who may see what, how a line is run. All of it may wait for the disk.
//! Invariants: what was acknowledged is durable; a file is seen whole or not at all; a line has at most one result,
//! and once it has one it keeps it; a batch that has ended changes no more.

mod disk;
mod facts;
mod input;
mod store;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::clock::Clock;
use crate::config::BatchLimits;
use crate::units::RequestId;

pub use disk::Upload;
pub use facts::{
    Batch, Counts, FileFacts, NewBatch, Owner, Page, Problem, Purpose, Sort, Status, Times, Tokens,
};
pub use input::{Line, Rules, Scanned, scan};
use store::Store;

/// Why files or batches could not be read or changed; nothing was changed then.
#[derive(Debug, thiserror::Error)]
pub enum BatchesError {
    #[error("{path}: {source}; is the data directory writable, and is there room?")]
    Disk { path: PathBuf, source: std::io::Error },
    #[error("{path} is not a file of batches of ours; move it away or choose another --data-dir")]
    NotOurs { path: PathBuf },
    #[error("{path} has schema version {found}, this build reads {known}; use the build that wrote it")]
    SchemaVersion { path: PathBuf, found: i64, known: i64 },
    #[error("{path}: {source}")]
    Database { path: PathBuf, source: rusqlite::Error },
    #[error("the file is over {bytes_max} bytes, the most that one may have here: split it")]
    TooLarge { bytes_max: u64 },
    #[error("the files here come to {bytes_max} bytes, the most that is kept: delete some")]
    Full { bytes_max: u64 },
    #[error("{open} batches have not ended, the most that is kept: wait for one or cancel it")]
    TooMany { open: usize },
    #[error("batch {batch} still reads the file `{file}`: cancel the batch, or wait for its end")]
    InUse { file: String, batch: String },
    #[error("no file with the id `{id}`")]
    NoSuchFile { id: String },
    #[error("batch {batch} is {status} and cannot be cancelled")]
    Ended { batch: String, status: &'static str },
}

/// How one line ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// From 1 on.
    pub line: u64,
    /// Whether it was answered.
    pub completed: bool,
    /// As the batch's files have it.
    pub record: String,
    pub tokens: Tokens,
}

/// Handle to the files and batches of a data directory; cheap to clone.
#[derive(Clone)]
pub struct Batches(Arc<Inner>);

struct Inner {
    store: Mutex<Store>,
    folder: PathBuf,
    clock: Arc<dyn Clock>,
    limits: BatchLimits,
    /// Counts what may concern those who run batches.
    changes: watch::Sender<u64>,
}

impl std::fmt::Debug for Batches {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Batches").field("folder", &self.0.folder).finish_non_exhaustive()
    }
}

impl Batches {
    /// Opens what a data directory has, which is ours alone, and clears away what a crash left half done.
    ///
    /// # Errors
    /// Says what is wrong with the directory or the database; nothing is overwritten.
    pub fn open(data_dir: &Path, clock: Arc<dyn Clock>, limits: BatchLimits) -> Result<Self, BatchesError> {
        let folder = data_dir.join("files");
        fs::create_dir_all(&folder).map_err(|source| BatchesError::Disk { path: folder.clone(), source })?;
        let store = Store::open(data_dir)?;
        disk::sweep(&folder, &store.file_ids()?)?;
        let (store, changes) = (Mutex::new(store), watch::Sender::new(0));
        Ok(Self(Arc::new(Inner { store, folder, clock, limits, changes })))
    }

    #[must_use]
    pub fn limits(&self) -> &BatchLimits {
        &self.0.limits
    }

    /// Changes when a batch was made or is to be cancelled.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.changes.subscribe()
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        // The database rolls back what a panic left half done.
        self.0.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Seconds since 1970.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.0.clock.wall().0 / 1_000_000_000
    }

    /// A file that is still being written.
    ///
    /// # Errors
    /// When there is no room, or none can be made.
    pub fn upload(&self) -> Result<Upload, BatchesError> {
        let bytes_max = self.0.limits.all_bytes;
        if self.store().bytes()? >= bytes_max {
            return Err(BatchesError::Full { bytes_max });
        }
        self.write()
    }

    fn write(&self) -> Result<Upload, BatchesError> {
        let id = format!("file-{}", RequestId::new());
        Upload::begin(&self.0.folder, id, self.0.limits.file_bytes)
    }

    /// Makes an uploaded file known.
    ///
    /// # Errors
    /// When it cannot be made durable.
    pub fn keep(&self, upload: Upload, owner: &Owner, filename: &str) -> Result<FileFacts, BatchesError> {
        let facts = self.facts_of(upload, owner, filename.to_owned(), Purpose::Batch)?;
        self.store().add_file(&facts)?;
        Ok(facts)
    }

    /// Of a file that is durable, and not known yet.
    fn facts_of(
        &self,
        upload: Upload,
        owner: &Owner,
        filename: String,
        purpose: Purpose,
    ) -> Result<FileFacts, BatchesError> {
        let (id, bytes) = upload.finish()?;
        Ok(FileFacts { id, owner: owner.clone(), bytes, created: self.now(), filename, purpose })
    }

    /// # Errors
    /// When the database cannot be read.
    pub fn file(&self, id: &str) -> Result<Option<FileFacts>, BatchesError> {
        self.store().file(id)
    }

    /// Files of an owner, or of all, and whether there are more.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn files(
        &self,
        owner: Option<&Owner>,
        purpose: Option<Purpose>,
        page: &Page,
    ) -> Result<(Vec<FileFacts>, bool), BatchesError> {
        self.store().files(owner, purpose, page)
    }

    /// Where a file's bytes are. It may be deleted at any time.
    #[must_use]
    pub fn path(&self, file: &FileFacts) -> PathBuf {
        self.0.folder.join(&file.id)
    }

    /// # Errors
    /// `InUse` while a batch reads it, `NoSuchFile`, or when the database cannot be written.
    pub fn delete_file(&self, id: &str) -> Result<(), BatchesError> {
        self.store().delete_file(id)?;
        let path = self.0.folder.join(id);
        if let Err(error) = fs::remove_file(&path) {
            // It is not known any more; the next start clears it away.
            tracing::warn!(path = %path.display(), %error, "a deleted file's bytes could not be removed");
        }
        Ok(())
    }

    /// # Errors
    /// `TooMany` where as many are open as may be, `NoSuchFile` when the input was deleted meanwhile.
    pub fn create(&self, new: NewBatch) -> Result<Batch, BatchesError> {
        let id = format!("batch_{}", RequestId::new());
        let batch = self.store().add_batch(&id, &new, self.now(), self.0.limits.open)?;
        self.changed();
        Ok(batch)
    }

    fn changed(&self) {
        self.0.changes.send_modify(|changes| *changes += 1);
    }

    /// # Errors
    /// When the database cannot be read.
    pub fn batch(&self, id: &str) -> Result<Option<Batch>, BatchesError> {
        self.store().batch(id)
    }

    /// Batches of an owner, or of all, newest first, and whether there are more.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn batches(&self, owner: Option<&Owner>, page: &Page) -> Result<(Vec<Batch>, bool), BatchesError> {
        self.store().batches(owner, page)
    }

    /// The ids of batches that have not ended, oldest first.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn unfinished(&self) -> Result<Vec<String>, BatchesError> {
        self.store().unfinished()
    }

    /// From now on no further line begins.
    ///
    /// # Errors
    /// `Ended` when it has ended, or is about to.
    pub fn cancel(&self, id: &str) -> Result<Batch, BatchesError> {
        let batch = self.store().cancel(id, self.now())?;
        self.changed();
        Ok(batch)
    }

    /// The input was read and is good.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn begin(&self, id: &str, lines: usize) -> Result<(), BatchesError> {
        self.store().begin(id, lines as u64, self.now())
    }

    /// The input was read and cannot be run.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn fail(&self, id: &str, problems: &[Problem]) -> Result<(), BatchesError> {
        self.store().fail(id, problems, self.now())
    }

    /// Numbers of the lines that have a result.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn ended_lines(&self, id: &str) -> Result<HashSet<u64>, BatchesError> {
        self.store().ended_lines(id)
    }

    /// Writes a line's result down, unless it has one.
    ///
    /// # Errors
    /// When the database cannot be written.
    pub fn record(&self, id: &str, outcome: &Outcome) -> Result<(), BatchesError> {
        self.store().record(id, outcome)
    }

    /// No line runs any more: writes the files, with `left` as further lines of the error file, and ends the batch.
    ///
    /// # Errors
    /// When the files or the database cannot be written; then it can be tried again.
    pub fn finish(&self, id: &str, end: Status, left: &[String]) -> Result<(), BatchesError> {
        let Some(batch) = self.store().batch(id)? else { return Ok(()) };
        if end != Status::Cancelled {
            self.store().finalize(id, self.now())?;
        }
        let output = self.write_results(&batch, true, &[])?;
        let errors = self.write_results(&batch, false, left)?;
        self.store().finish(id, end, (output, errors), self.now())
    }

    /// One of a batch's files, unless it would be empty.
    fn write_results(
        &self,
        batch: &Batch,
        completed: bool,
        left: &[String],
    ) -> Result<Option<FileFacts>, BatchesError> {
        let mut upload: Option<Upload> = None;
        let mut after = 0;
        loop {
            // A part at a time, so that others can use the database meanwhile.
            let records = self.store().results(&batch.id, completed, after)?;
            let Some((last, _)) = records.last() else { break };
            after = *last;
            for (_, record) in &records {
                self.write_line(&mut upload, record)?;
            }
        }
        for record in left {
            self.write_line(&mut upload, record)?;
        }
        let Some(upload) = upload else { return Ok(None) };
        let what = if completed { "output" } else { "error" };
        let filename = format!("{}_{what}.jsonl", batch.id);
        self.facts_of(upload, &batch.owner, filename, Purpose::BatchOutput).map(Some)
    }

    fn write_line(&self, upload: &mut Option<Upload>, record: &str) -> Result<(), BatchesError> {
        let upload = match upload {
            Some(upload) => upload,
            none => none.insert(self.write()?.unbounded()),
        };
        upload.write(record.as_bytes())?;
        upload.write(b"\n")
    }
}
