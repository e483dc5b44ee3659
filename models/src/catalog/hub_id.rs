//! Ids of the hub, `owner/name[:file]`: what they look like. Asks nobody whether there is such a repository.

use std::fmt;

/// The hub's own limit on a name.
const NAME_MAX: usize = 96;
/// Longest path inside a repository that is taken.
const PATH_MAX: usize = 512;

/// A repository of the hub, or one file in it. Both parts follow the hub's rules for names, so they are plain
/// directory names too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    owner: String,
    name: String,
    file: Option<String>,
}

impl HubId {
    /// Reads an id. `None`: the text has not the shape of one; `Some(Err)`: it has, and breaks a rule.
    #[must_use]
    pub fn parse(text: &str) -> Option<Result<Self, &'static str>> {
        let (repository, file) = match text.split_once(':') {
            Some((repository, file)) => (repository, Some(file)),
            None => (text, None),
        };
        let (owner, name) = repository.split_once('/')?;
        if !is_name(owner) || !is_name(name) {
            return Some(Err(
                "owner and name are up to 96 letters, digits, '-', '_' and '.', none of '-' and '.' \
                             at an end or twice in a row",
            ));
        }
        if file.is_some_and(|file| !is_plain_path(file)) {
            return Some(Err("after ':' comes the path of a file inside the repository"));
        }
        let file = file.map(str::to_owned);
        Some(Ok(Self { owner: owner.to_owned(), name: name.to_owned(), file }))
    }

    /// Who it belongs to.
    #[must_use]
    pub fn owner(&self) -> &str {
        &self.owner
    }

    /// Its name under the owner.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `owner/name`
    #[must_use]
    pub fn repository(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }

    /// The one file that is meant, if one was named.
    #[must_use]
    pub fn file(&self) -> Option<&str> {
        self.file.as_deref()
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)?;
        self.file.as_ref().map_or(Ok(()), |file| write!(f, ":{file}"))
    }
}

/// The hub's rule for owners and names.
fn is_name(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let ends = ['-', '.'];
    (1..=NAME_MAX).contains(&text.len())
        && text.chars().all(plain)
        && !text.starts_with(ends)
        && !text.ends_with(ends)
        && !text.contains("--")
        && !text.contains("..")
}

/// A path that stays inside the directory it is joined to, on every system: no `..`, nothing absolute, no
/// backslash, no drive, no control character.
pub(crate) fn is_plain_path(path: &str) -> bool {
    let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
    (1..=PATH_MAX).contains(&path.len())
        && path.split('/').all(plain)
        && !path.contains(|c: char| c.is_control() || matches!(c, '\\' | ':'))
}

/// Nobody writes an id of the hub like this.
pub(super) fn can_only_be_a_path(text: &str) -> bool {
    let repository = text.split_once(':').map_or(text, |(repository, _)| repository);
    text.starts_with(['/', '.', '~'])
        || text.contains('\\')
        || text.ends_with('/')
        || repository.ends_with(".gguf")
        || repository.ends_with(".safetensors")
        || repository.matches('/').count() > 1
}
