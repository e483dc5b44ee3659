//! What a file must hash to: SHA-256, or the id that git gives to its content.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// What a file must hash to, in lower-case hex.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", content = "value", rename_all = "kebab-case")]
pub enum Checksum {
    /// Of the bytes: what the hub says of files in LFS.
    Sha256(String),
    /// SHA-1 of `blob LENGTH`, a zero byte and the bytes: what the hub says of files in git itself. Keeps out
    /// accidents; against forgery it is as weak as git.
    GitSha1(String),
}

impl Checksum {
    /// `sha256` or `git-sha1`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Sha256(_) => "sha256",
            Self::GitSha1(_) => "git-sha1",
        }
    }

    /// Hex digits.
    #[must_use]
    pub fn value(&self) -> &str {
        match self {
            Self::Sha256(value) | Self::GitSha1(value) => value,
        }
    }

    /// From text that is not ours: `None` unless it is the right number of hex digits.
    pub(super) fn sha256(text: &str) -> Option<Self> {
        is_hex(text, 64).then(|| Self::Sha256(text.to_ascii_lowercase()))
    }

    /// As [`Self::sha256`].
    pub(super) fn git_sha1(text: &str) -> Option<Self> {
        is_hex(text, 40).then(|| Self::GitSha1(text.to_ascii_lowercase()))
    }

    /// True if the file hashes to this.
    pub(super) fn matches(&self, path: &Path) -> io::Result<bool> {
        let mut file = File::open(path)?;
        let mut hash = self.hash(file.metadata()?.len());
        io::copy(&mut io::BufReader::with_capacity(1 << 20, &mut file), &mut hash)?;
        Ok(hash.value() == self.value())
    }

    /// A running hash of the same kind, for a file of `bytes`.
    pub(super) fn hash(&self, bytes: u64) -> Hash {
        match self {
            Self::Sha256(_) => Hash::Sha256(Sha256::new()),
            Self::GitSha1(_) => Hash::GitSha1(Sha1::new_with_prefix(format!("blob {bytes}\0"))),
        }
    }
}

pub(super) fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// A running hash.
#[derive(Debug, Clone)]
pub(super) enum Hash {
    Sha256(Sha256),
    GitSha1(Sha1),
}

impl Hash {
    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::GitSha1(hash) => hash.update(bytes),
        }
    }

    /// Of what came so far, in lower-case hex.
    pub(super) fn value(&self) -> String {
        match self {
            Self::Sha256(hash) => hex(&hash.clone().finalize()),
            Self::GitSha1(hash) => hex(&hash.clone().finalize()),
        }
    }
}

impl Write for Hash {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.update(bytes);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_kinds_are_sha256sum_and_git_hash_object() {
        let of = |checksum: Checksum, text: &str| {
            let mut hash = checksum.hash(text.len() as u64);
            hash.update(text.as_bytes());
            hash.value()
        };
        let sha256 = || Checksum::Sha256(String::new());
        let git = || Checksum::GitSha1(String::new());
        assert_eq!(of(sha256(), "abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(of(git(), ""), "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391");
        assert_eq!(of(git(), "hello\n"), "ce013625030ba8dba906f756967f9e9ca394464a");
    }
}
