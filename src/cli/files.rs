//! Files that commands read and write: what cannot be written is told before anything is measured, and a
//! result is written whole or not at all.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde_json::Value;

use super::Failure;

/// What a measurement prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    Table,
    Json,
}

pub(super) fn read(flag: &str, file: &Path) -> Result<String, Failure> {
    fs::read_to_string(file)
        .map_err(|error| Failure::usage(format!("{flag}: cannot read {}: {error}", file.display())))
}

/// Told now, not after minutes of measuring.
pub(super) fn writable(file: &Path) -> Result<(), Failure> {
    let cannot = |why: String| Failure::usage(format!("cannot write {}: {why}", file.display()));
    if file.is_dir() {
        return Err(cannot("it is a directory".into()));
    }
    match beside(file) {
        Some((directory, _)) => tempfile::tempfile_in(directory).map(drop),
        None => fs::OpenOptions::new().write(true).open(file).map(drop),
    }
    .map_err(|error| cannot(error.to_string()))
}

pub(super) fn write(file: &Path, text: &str) -> Result<(), Failure> {
    let written = match beside(file) {
        Some((directory, whole)) => replace(&directory, &whole, text),
        None => fs::write(file, text),
    };
    written.map_err(|error| Failure::failed(format!("cannot write {}: {error}", file.display())))
}

/// Where a file's replacement can wait, and the file itself; `None` for pipes and devices, which are not
/// replaced.
fn beside(file: &Path) -> Option<(PathBuf, PathBuf)> {
    let whole = match fs::metadata(file) {
        Ok(metadata) if !metadata.is_file() => return None,
        // Through links: the file is replaced, not what leads to it.
        Ok(_) => fs::canonicalize(file).ok()?,
        Err(_) => file.to_owned(),
    };
    let parent = whole.parent().filter(|parent| !parent.as_os_str().is_empty());
    Some((parent.map_or_else(|| PathBuf::from("."), Path::to_owned), whole))
}

fn replace(directory: &Path, file: &Path, text: &str) -> std::io::Result<()> {
    // As any new file: the umask decides who may read it.
    let permissions = fs::Permissions::from_mode(0o666);
    let mut whole = tempfile::Builder::new().permissions(permissions).tempfile_in(directory)?;
    whole.write_all(text.as_bytes())?;
    whole.persist(file).map(drop).map_err(|error| error.error)
}

pub(super) fn pretty(value: &Value) -> Result<String, Failure> {
    serde_json::to_string_pretty(value).map_err(Failure::failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_replaces_the_file_behind_a_link_and_leaves_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let (file, link) = (directory.path().join("a.json"), directory.path().join("link"));
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for text in ["one", "two"] {
            writable(&file).unwrap();
            write(&file, text).unwrap();
            write(&link, &format!("{text} through a link")).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), format!("{text} through a link"));
            assert!(link.is_symlink());
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
    }

    #[test]
    fn what_cannot_be_written_is_told_and_a_device_is_no_file_to_replace() {
        let directory = tempfile::tempdir().unwrap();
        let says = |path: &Path| writable(path).unwrap_err().to_string();
        assert!(says(directory.path()).contains("it is a directory"));
        assert!(says(&directory.path().join("no/such.json")).contains("no/such.json"));
        writable(Path::new("/dev/null")).unwrap();
        write(Path::new("/dev/null"), "gone").unwrap();
        assert!(!Path::new("/dev/null").is_file());
    }
}
