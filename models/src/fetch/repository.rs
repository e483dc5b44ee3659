//! From an id of the hub to checked files: `MODELS/hub/OWNER--NAME/COMMIT/..`, with a manifest when all are there.
//!
//! Invariants: a revision is resolved once, and from then on only its commit is spoken of; a file under its final
//! name was complete and had the right checksum when it got it; what a manifest calls complete needs no network;
//! what another commit has already is not fetched again; one process at a time works on a repository.

use std::path::{Path, PathBuf};

use super::failure::{Asked, refused};
use super::hub::{Hub, HubError, in_runtime};
use super::listing::{Listed, commit_of, files_of, is_commit};
use super::manifest::{Complete, Manifest};
use super::partial::{self, Partial};
use super::progress::Progress;
use super::selection::{Selection, select, shards};
use super::{Checksum, FetchError, FetchOptions, Job, RepositoryError, changed, file_error, lock};
use crate::catalog::HubId;

/// What a revision is when none is named.
const DEFAULT_REVISION: &str = "main";
/// Longest name of a revision.
const REVISION_MAX: usize = 250;

/// When the hub is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asking {
    /// In any case, and every file is looked at.
    Always,
    /// Not about a commit that is complete here; and if it gives nothing, for whatever reason but that there is no
    /// such revision or no model in it, the last known commit of a branch or tag will do.
    IfNeeded,
}

/// A model of the hub on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// A GGUF file, or a directory with a `config.json`.
    pub path: PathBuf,
    /// The revision that was asked for.
    pub revision: String,
    /// The commit that it is.
    pub commit: String,
    /// What belongs to the model, by path inside the repository.
    pub files: Vec<FetchedFile>,
}

/// One complete file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchedFile {
    /// Path inside the repository.
    pub path: String,
    /// Length in bytes.
    pub size: u64,
    /// What it hashes to.
    pub checksum: Checksum,
}

/// Gives the model that `id` means at `revision` (a branch, tag or commit; `main` if `None`), fetching what is not
/// below `models_dir` yet.
///
/// Blocks; call it from a thread that may wait (inside an async runtime too).
///
/// # Errors
/// See [`FetchError`] and [`RepositoryError`]. What was received of an interrupted transfer is kept and resumed
/// next time.
pub fn fetch_repository(
    id: &HubId,
    revision: Option<&str>,
    models_dir: &Path,
    asking: Asking,
    options: &FetchOptions,
    progress: &dyn Progress,
) -> Result<Fetched, FetchError> {
    let revision = revision.unwrap_or(DEFAULT_REVISION);
    let plain = |c: char| !c.is_control() && !c.is_whitespace() && !matches!(c, '\\' | '?' | '#' | ':');
    if revision.is_empty()
        || revision.len() > REVISION_MAX
        || !revision.chars().all(plain)
        || revision.contains("..")
    {
        return Err(RepositoryError::Revision(revision.to_owned()).into());
    }
    let models_dir = std::path::absolute(models_dir)
        .map_err(|source| FetchError::File { path: models_dir.to_path_buf(), source })?;
    let dir = models_dir.join("hub").join(format!("{}--{}", id.owner(), id.name()));
    let order = Order { id, repository: id.repository(), revision, dir, options, progress };
    if asking == Asking::IfNeeded
        && is_commit(revision)
        && let Some(there) = order.last_known()?
    {
        return Ok(there);
    }
    let error = match in_runtime(async || order.ask(asking).await) {
        Err(error) if asking == Asking::IfNeeded && !is_final(&error) => error,
        result => return result,
    };
    match order.last_known()? {
        Some(there) => {
            progress.note(&format!(
                "{error}\nusing what {revision} was when it was last fetched: {}",
                there.commit
            ));
            Ok(there)
        }
        None => Err(error),
    }
}

/// True for what is wrong with the question, not with the answer: an older copy would be something else.
fn is_final(error: &FetchError) -> bool {
    use RepositoryError::{NoRevision, Revision, Unsuitable};
    matches!(error, FetchError::Repository(Revision(_) | NoRevision { .. } | Unsuitable { .. }))
}

/// What is wanted, and where it goes.
struct Order<'a> {
    id: &'a HubId,
    repository: String,
    revision: &'a str,
    /// The repository's.
    dir: PathBuf,
    options: &'a FetchOptions,
    progress: &'a dyn Progress,
}

impl Order<'_> {
    /// Without the network: the latest commit that the revision is or was and of which the wanted model is complete.
    fn last_known(&self) -> Result<Option<Fetched>, FetchError> {
        for (dir, manifest) in Manifest::known(&self.dir, self.revision) {
            if let Some(there) = self.complete(&dir, manifest)? {
                return Ok(Some(there));
            }
        }
        Ok(None)
    }

    /// The wanted model, if this manifest has it and its files are still right.
    fn complete(&self, dir: &Path, mut manifest: Manifest) -> Result<Option<Fetched>, FetchError> {
        let Some(model) = manifest.model(self.id.file()).map(str::to_owned) else { return Ok(None) };
        let files: Vec<Complete> = manifest.files_of(&model).cloned().collect();
        let mut touched = false;
        for file in &files {
            match self.is_right(dir, file)? {
                Some(modified) if modified == file.modified => {}
                Some(modified) => {
                    manifest.add(Complete { modified, ..file.clone() });
                    touched = true;
                }
                None => return Ok(None),
            }
        }
        if touched {
            self.record(dir, &manifest);
        }
        Ok(Some(self.fetched(dir, &model, &manifest)))
    }

    /// When the file that is there was changed, if it is the right one: by its time, else by its hash.
    fn is_right(&self, dir: &Path, file: &Complete) -> Result<Option<u64>, FetchError> {
        let path = dir.join(&file.path);
        let Ok(metadata) = std::fs::metadata(&path) else { return Ok(None) };
        if !metadata.is_file() || metadata.len() != file.size {
            return Ok(None);
        }
        let right = changed(&metadata) == file.modified
            || file.checksum.matches(&path).map_err(|error| self.error(&path, file.size, error))?;
        Ok(right.then(|| changed(&metadata)))
    }

    fn fetched(&self, dir: &Path, model: &str, manifest: &Manifest) -> Fetched {
        let file = |file: &Complete| FetchedFile {
            path: file.path.clone(),
            size: file.size,
            checksum: file.checksum.clone(),
        };
        Fetched {
            path: if model == "." { dir.to_path_buf() } else { dir.join(model) },
            revision: self.revision.to_owned(),
            commit: manifest.commit.clone(),
            files: manifest.files_of(model).map(file).collect(),
        }
    }

    /// With the network.
    async fn ask(&self, asking: Asking) -> Result<Fetched, FetchError> {
        let hub =
            Hub::connect(self.options, self.progress).map_err(|error| self.hub_error(None, error, None))?;
        let commit = self.resolve(&hub).await?;
        let dir = self.dir.join(&commit);
        if asking == Asking::IfNeeded
            && let Some(there) = self.seen(&dir)?
        {
            return Ok(there);
        }
        let error = |path: &Path, error| self.error(path, 0, error);
        std::fs::create_dir_all(&dir)
            .map_err(|source| FetchError::CacheNotWritable { dir: dir.clone(), source })?;
        let path = self.dir.join("lock");
        let lock = lock(&path, &self.repository, self.progress).map_err(|(path, e)| error(&path, e))?;
        let result = match if asking == Asking::IfNeeded { self.seen(&dir)? } else { None } {
            Some(there) => Ok(there),
            None => self.fetch(&hub, &dir, &commit).await,
        };
        self.progress.finish();
        drop(lock);
        result
    }

    /// What the hub's word for the commit needs no files for: they are complete. Records that word.
    fn seen(&self, dir: &Path) -> Result<Option<Fetched>, FetchError> {
        let Some(manifest) = Manifest::read(dir) else { return Ok(None) };
        let there = self.complete(dir, manifest)?;
        if there.is_some()
            && let Some(mut manifest) = Manifest::read(dir)
        {
            manifest.see(self.revision);
            self.record(dir, &manifest);
        }
        Ok(there)
    }

    /// A directory that cannot be written serves as well.
    fn record(&self, dir: &Path, manifest: &Manifest) {
        if let Err(error) = manifest.write(dir) {
            tracing::debug!(dir = %dir.display(), %error, "the manifest could not be brought up to date");
        }
    }

    async fn resolve(&self, hub: &Hub<'_>) -> Result<String, FetchError> {
        let error = match commit_of(hub, &self.repository, self.revision).await {
            Ok(commit) => return Ok(commit.to_ascii_lowercase()),
            Err(error) => error,
        };
        // Not every mirror says what is missing.
        if let HubError::Refused(refusal) = &error
            && refusal.status == 404
            && refusal.code.is_empty()
            && self.revision != DEFAULT_REVISION
            && commit_of(hub, &self.repository, DEFAULT_REVISION).await.is_ok()
        {
            let (repository, revision) = (self.repository.clone(), self.revision.to_owned());
            return Err(RepositoryError::NoRevision { repository, revision }.into());
        }
        Err(self.hub_error(Some(hub), error, None))
    }

    /// Lists, chooses, checks the space, and fetches what is not there.
    async fn fetch(&self, hub: &Hub<'_>, dir: &Path, commit: &str) -> Result<Fetched, FetchError> {
        let listing = files_of(hub, &self.repository, commit).await;
        let listing = listing.map_err(|error| self.hub_error(Some(hub), error, None))?;
        let old = Manifest::read(dir);
        let unsuitable = |why| RepositoryError::Unsuitable { repository: self.repository.clone(), why };
        let others = Manifest::all(&self.dir).filter(|(other, _)| other != dir).collect();
        let work = Work { order: self, hub, dir, commit, old: old.as_ref(), others };
        let (model, files) = match select(self.id, &listing).map_err(unsuitable)? {
            Selection::Gguf(file) => (file.path.clone(), vec![file]),
            Selection::Single(files) => (".".to_owned(), files),
            Selection::Sharded { index, companions } => {
                work.one(&index, &Part { whole: self.progress, base: 0 }).await?;
                let path = dir.join(&index.path);
                let text = std::fs::read(&path).map_err(|e| self.error(&path, index.bytes, e))?;
                let weights = shards(&text, &listing).map_err(unsuitable)?;
                (".".to_owned(), companions.into_iter().chain([index]).chain(weights).collect())
            }
        };
        let complete = work.all(&files).await?;
        let mut manifest = old.clone().unwrap_or_else(|| Manifest {
            repository: self.repository.clone(),
            commit: commit.to_owned(),
            revisions: Default::default(),
            model: None,
            files: Vec::new(),
        });
        complete.into_iter().for_each(|file| manifest.add(file));
        manifest.see(self.revision);
        if self.id.file().is_none() {
            manifest.model = Some(model.clone());
        }
        manifest.write(dir).map_err(|error| self.error(dir, 0, error))?;
        Ok(self.fetched(dir, &model, &manifest))
    }

    fn error(&self, path: &Path, bytes: u64, source: std::io::Error) -> FetchError {
        file_error(&self.dir, bytes, path, source)
    }

    /// Says what the hub did, about a file or about the repository.
    fn hub_error(&self, hub: Option<&Hub<'_>>, error: HubError, file: Option<(&str, &str)>) -> FetchError {
        let error = match error {
            HubError::Fatal(error) => return error,
            HubError::Unreachable(why) => {
                RepositoryError::Unreachable { model: self.id.to_string(), why, kept: 0 }
            }
            HubError::Wrong(why) => {
                let file = file.map_or(String::new(), |(_, file)| format!(" {file}"));
                RepositoryError::Wrong { what: format!("{}{file}", self.repository), why }
            }
            HubError::Refused(refusal) => refused(
                &refusal,
                &Asked {
                    repository: &self.repository,
                    page: hub.map_or(String::new(), |hub| hub.page(&self.repository)),
                    with_token: self.options.hub_token.is_some(),
                    revision: file.map_or(self.revision, |(commit, _)| commit),
                    file: file.map(|(_, file)| file),
                },
            ),
        };
        error.into()
    }
}

/// Fetching the files of one commit.
struct Work<'a> {
    order: &'a Order<'a>,
    hub: &'a Hub<'a>,
    /// The commit's.
    dir: &'a Path,
    commit: &'a str,
    old: Option<&'a Manifest>,
    /// Directories and manifests of the repository's other commits.
    others: Vec<(PathBuf, Manifest)>,
}

impl Work<'_> {
    fn job<'j>(&'j self, file: &'j Listed, progress: &'j dyn Progress) -> Job<'j> {
        Job {
            file: &file.path,
            bytes: file.bytes,
            checksum: file.checksum.clone(),
            cache_dir: self.dir,
            options: self.order.options,
            progress,
        }
    }

    /// The file as a manifest has it, if it is in place and right.
    fn there(&self, file: &Listed) -> Result<Option<Complete>, FetchError> {
        let known = self.old.and_then(|old| old.file(&file.path)).filter(|old| old.checksum == file.checksum);
        let mut complete = Complete {
            path: file.path.clone(),
            size: file.bytes,
            checksum: file.checksum.clone(),
            modified: known.map_or(0, |known| known.modified),
        };
        Ok(self.order.is_right(self.dir, &complete)?.map(|modified| {
            complete.modified = modified;
            complete
        }))
    }

    /// Where another commit has the same bytes, if they are still right.
    fn elsewhere(&self, file: &Listed) -> Option<PathBuf> {
        let same = |other: &&Complete| other.checksum == file.checksum && other.size == file.bytes;
        self.others.iter().find_map(|(dir, manifest)| {
            let right = |other: &&Complete| matches!(self.order.is_right(dir, other), Ok(Some(_)));
            Some(dir.join(&manifest.files.iter().filter(same).find(right)?.path))
        })
    }

    /// The file that another commit has, under its name in this one as well. Takes no space; `None` if no commit
    /// has it or the file system has no links.
    fn link(&self, file: &Listed) -> Result<Option<Complete>, FetchError> {
        let Some(source) = self.elsewhere(file) else { return Ok(None) };
        let job = self.job(file, self.order.progress);
        let target = self.target(&job)?;
        match partial::link(&job, &source, &target) {
            Ok(()) => self.placed(file, &target).map(Some),
            Err(error) => {
                tracing::debug!(source = %source.display(), %error, "cannot be linked");
                Ok(None)
            }
        }
    }

    /// The final name of a file, in a directory that exists.
    fn target(&self, job: &Job<'_>) -> Result<PathBuf, FetchError> {
        let target = self.dir.join(job.file);
        if let Some(parent) = target.parent() {
            std::fs::create_dir_all(parent).map_err(|error| job.file_error(parent, error))?;
        }
        Ok(target)
    }

    /// For the manifest: a file that has just got its name.
    fn placed(&self, file: &Listed, target: &Path) -> Result<Complete, FetchError> {
        let metadata = std::fs::metadata(target).map_err(|e| self.order.error(target, file.bytes, e))?;
        let (path, checksum) = (file.path.clone(), file.checksum.clone());
        Ok(Complete { path, size: file.bytes, checksum, modified: changed(&metadata) })
    }

    /// All files under one bar, if the disk is large enough.
    async fn all(&self, files: &[Listed]) -> Result<Vec<Complete>, FetchError> {
        let total = files.iter().fold(0u64, |sum, file| sum.saturating_add(file.bytes));
        let there = |file| {
            Ok(match self.there(file)? {
                Some(there) => Some(there),
                None => self.link(file)?,
            })
        };
        let there = files.iter().map(there).collect::<Result<Vec<_>, FetchError>>()?;
        self.check_space(
            files.iter().zip(&there).filter(|(_, there)| there.is_none()).map(|(file, _)| file),
        )?;
        let missing = there.iter().filter(|there| there.is_none()).count();
        if missing > 0 {
            let of = if missing == 1 { "1 file".to_owned() } else { format!("{missing} files") };
            self.order.progress.start(&format!("{} ({of})", self.order.id), total);
        }
        let (mut base, mut complete) = (0, Vec::new());
        for (file, there) in files.iter().zip(there) {
            complete.push(match there {
                Some(there) => there,
                None => {
                    let part = Part { whole: self.order.progress, base };
                    self.one(file, &part).await.map_err(|error| match error {
                        FetchError::Repository(RepositoryError::Unreachable { model, why, kept }) => {
                            let why = format!("{}: {why}", file.path);
                            RepositoryError::Unreachable { model, why, kept: base.saturating_add(kept) }
                                .into()
                        }
                        error => error,
                    })?
                }
            });
            base = base.saturating_add(file.bytes);
            self.order.progress.at(base);
        }
        Ok(complete)
    }

    fn check_space<'f>(&self, missing: impl Iterator<Item = &'f Listed>) -> Result<(), FetchError> {
        let begun = |file: &Listed| {
            let partial = Partial::path(&self.job(file, self.order.progress));
            std::fs::metadata(partial).map_or(0, |metadata| metadata.len())
        };
        let needed =
            missing.fold(0u64, |sum, file| sum.saturating_add(file.bytes.saturating_sub(begun(file))));
        let free = match rustix::fs::statvfs(self.dir) {
            Ok(disk) => disk.f_bavail.saturating_mul(disk.f_frsize),
            Err(error) => {
                tracing::debug!(%error, "how much space is free is not known");
                return Ok(());
            }
        };
        if needed <= free {
            return Ok(());
        }
        let (model, dir) = (self.order.id.to_string(), self.dir.to_path_buf());
        Err(RepositoryError::TooLittleSpace { model, needed, free, dir }.into())
    }

    /// One file, to its place.
    async fn one(&self, file: &Listed, progress: &dyn Progress) -> Result<Complete, FetchError> {
        if let Some(there) = self.there(file)? {
            return Ok(there);
        }
        if let Some(linked) = self.link(file)? {
            return Ok(linked);
        }
        let job = self.job(file, progress);
        let target = self.target(&job)?;
        let mut partial = Partial::open(&job)?;
        if let Some(source) = self.elsewhere(file)
            && partial.copy(&job, &source)?
        {
            partial.publish(&job, &target)?;
            return self.placed(file, &target);
        }
        let repository = &self.order.repository;
        let url = self.hub.file_url(repository, self.commit, &file.path);
        self.hub.download(&job, &url, &mut partial).await.map_err(|error| {
            let at = Some((self.commit, file.path.as_str()));
            match self.order.hub_error(Some(self.hub), error, at) {
                FetchError::Repository(RepositoryError::Unreachable { model, why, .. }) => {
                    RepositoryError::Unreachable { model, why, kept: partial.len() }.into()
                }
                error => error,
            }
        })?;
        partial.publish(&job, &target)?;
        self.placed(file, &target)
    }
}

/// One file's progress as a part of the whole's.
struct Part<'a> {
    whole: &'a dyn Progress,
    /// Bytes of the files before it.
    base: u64,
}

impl Progress for Part<'_> {
    fn note(&self, line: &str) {
        self.whole.note(line);
    }

    fn start(&self, what: &str, _: u64) {
        self.whole.file(what);
    }

    fn at(&self, bytes: u64) {
        self.whole.at(self.base.saturating_add(bytes));
    }

    fn finish(&self) {}
}
