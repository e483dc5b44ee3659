//! `manifest.json` of a commit's directory: which files of it are complete, and what they must hash to.
//!
//! Invariant: it is written (under another name, then renamed) only when every file that it names is in place and
//! was right, so a model is complete if and only if a manifest says so.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::Checksum;
use super::listing::is_commit;
use crate::catalog::is_plain_path;

const NAME: &str = "manifest.json";

/// What a commit's directory has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Manifest {
    pub(super) repository: String,
    pub(super) commit: String,
    /// Branches and tags that were this commit, with when the hub last said so, in seconds since 1970.
    pub(super) revisions: BTreeMap<String, u64>,
    /// What the repository's id alone means: a GGUF file, or `.` for the directory. Absent while only single
    /// files were asked for.
    pub(super) model: Option<String>,
    pub(super) files: Vec<Complete>,
}

/// A file that is complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Complete {
    pub(super) path: String,
    pub(super) size: u64,
    pub(super) checksum: Checksum,
    /// When it was last changed, in nanoseconds since 1970: another time means that it is hashed again.
    pub(super) modified: u64,
}

impl Manifest {
    /// The manifest of a commit's directory, if it has one that can be read.
    pub(super) fn read(dir: &Path) -> Option<Self> {
        let text = std::fs::read(dir.join(NAME)).ok()?;
        match serde_json::from_slice::<Self>(&text) {
            Ok(manifest) if manifest.files.iter().all(|file| is_plain_path(&file.path)) => Some(manifest),
            Ok(_) => None,
            Err(error) => {
                tracing::debug!(dir = %dir.display(), %error, "a manifest cannot be read");
                None
            }
        }
    }

    /// Replaces the manifest of a commit's directory.
    pub(super) fn write(&self, dir: &Path) -> io::Result<()> {
        let mut text = serde_json::to_vec_pretty(self).map_err(io::Error::other)?;
        text.push(b'\n');
        let new = dir.join(format!("{NAME}.{}.new", std::process::id()));
        let mut file = File::create(&new)?;
        file.write_all(&text)?;
        file.sync_all()?;
        std::fs::rename(&new, dir.join(NAME))?;
        File::open(dir)?.sync_all()
    }

    /// All manifests under a repository's directory, each with its commit's directory.
    pub(super) fn all(repository_dir: &Path) -> impl Iterator<Item = (PathBuf, Self)> + use<> {
        let dirs = std::fs::read_dir(repository_dir).into_iter().flatten().flatten();
        dirs.filter_map(|entry| Self::read(&entry.path()).map(|manifest| (entry.path(), manifest)))
    }

    /// The manifests of the commits that `revision` was, the latest first, by when the hub last said so.
    pub(super) fn known(repository_dir: &Path, revision: &str) -> Vec<(PathBuf, Self)> {
        if is_commit(revision) {
            let dir = repository_dir.join(revision.to_ascii_lowercase());
            return Self::read(&dir).map(|manifest| (dir, manifest)).into_iter().collect();
        }
        let seen = |(_, manifest): &(PathBuf, Self)| manifest.revisions.get(revision).copied();
        let mut found: Vec<_> = Self::all(repository_dir).filter(|one| seen(one).is_some()).collect();
        found.sort_by_key(|one| std::cmp::Reverse(seen(one)));
        found
    }

    /// What an id means here: the file that it names, or what the repository alone means.
    pub(super) fn model<'a>(&'a self, file: Option<&'a str>) -> Option<&'a str> {
        match file {
            Some(file) => self.file(file).map(|file| file.path.as_str()),
            None => self.model.as_deref(),
        }
    }

    /// The files that belong to a model which [`Self::model`] gave.
    pub(super) fn files_of<'a>(&'a self, model: &'a str) -> impl Iterator<Item = &'a Complete> {
        self.files.iter().filter(move |file| match model {
            "." => !file.path.ends_with(".gguf"),
            model => file.path == model,
        })
    }

    pub(super) fn file(&self, path: &str) -> Option<&Complete> {
        self.files.iter().find(|file| file.path == path)
    }

    /// Adds a complete file, or replaces what was said of it.
    pub(super) fn add(&mut self, file: Complete) {
        self.files.retain(|other| other.path != file.path);
        self.files.push(file);
        self.files.sort_by(|a, b| a.path.cmp(&b.path));
    }

    /// The hub has just said that `revision` is this commit. A commit says it of itself.
    pub(super) fn see(&mut self, revision: &str) {
        if !is_commit(revision) {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
            self.revisions.insert(revision.to_owned(), now);
        }
    }
}
