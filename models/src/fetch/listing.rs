//! What the hub says of a repository: which commit a revision is, and which files that commit has.
//!
//! Names are not to be trusted: what would lead out of a directory is left out here, so nothing later sees it.

use reqwest::Url;
use serde::Deserialize;

use super::Checksum;
use super::checksum::is_hex;
use super::hub::{Hub, HubError};
use crate::catalog::is_plain_path;

/// Files of one repository that are looked at; the hub advises to stay below it.
const FILES_MAX: usize = 100_000;
/// Pages of a list: the hub has 1000 files on a page, and mirrors may have fewer.
const PAGES_MAX: usize = 2000;

/// One file of a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) path: String,
    pub(super) bytes: u64,
    pub(super) checksum: Checksum,
}

/// `GET api/models/REPOSITORY/revision/REVISION`, as far as it matters here.
#[derive(Deserialize)]
struct RevisionAnswer {
    sha: String,
}

/// One of `GET api/models/REPOSITORY/tree/COMMIT?recursive=true`.
#[derive(Deserialize)]
struct TreeAnswer {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    /// Git's id of the file; of the pointer to it, if the file is in LFS.
    #[serde(default)]
    oid: String,
    #[serde(default)]
    size: u64,
    lfs: Option<LfsAnswer>,
}

#[derive(Deserialize)]
struct LfsAnswer {
    /// SHA-256; other parts of the API have it under the other name.
    #[serde(alias = "sha256")]
    oid: String,
    size: u64,
}

/// The commit that a branch, tag or commit is now.
pub(super) async fn commit_of(hub: &Hub<'_>, repository: &str, revision: &str) -> Result<String, HubError> {
    let url = hub.api_url(repository, &["revision", revision]);
    let (answer, _): (RevisionAnswer, _) = hub.json(&url).await?;
    match is_commit(&answer.sha) {
        true => Ok(answer.sha),
        false => Err(HubError::Wrong("it gives no commit for the revision".to_owned())),
    }
}

/// True for a full commit id, which never means anything else later.
pub(super) fn is_commit(revision: &str) -> bool {
    is_hex(revision, 40)
}

/// Every file of a commit that has a usable name and a checksum, each once.
pub(super) async fn files_of(hub: &Hub<'_>, repository: &str, commit: &str) -> Result<Vec<Listed>, HubError> {
    let mut url: Url = hub.api_url(repository, &["tree", commit]);
    url.set_query(Some("recursive=true"));
    let mut files: Vec<Listed> = Vec::new();
    for _ in 0..PAGES_MAX {
        let (page, next): (Vec<TreeAnswer>, _) = hub.json(&url).await?;
        files.extend(page.into_iter().filter_map(usable));
        if files.len() > FILES_MAX {
            return Err(HubError::Wrong(format!("it lists more than {FILES_MAX} files")));
        }
        match next {
            Some(query) => url.set_query(Some(&query)),
            None => {
                files.sort_by(|a, b| a.path.cmp(&b.path));
                files.dedup_by(|a, b| a.path == b.path);
                return Ok(files);
            }
        }
    }
    Err(HubError::Wrong("its list of files does not end".to_owned()))
}

fn usable(answer: TreeAnswer) -> Option<Listed> {
    if answer.kind != "file" {
        return None;
    }
    let (checksum, bytes) = match &answer.lfs {
        Some(lfs) => (Checksum::sha256(&lfs.oid), lfs.size),
        None => (Checksum::git_sha1(&answer.oid), answer.size),
    };
    if checksum.is_none() || !is_plain_path(&answer.path) {
        tracing::debug!(path = answer.path, "a listed file has no usable name or checksum and is left out");
    }
    let path = Some(answer.path).filter(|path| is_plain_path(path))?;
    Some(Listed { path, bytes, checksum: checksum? })
}
