//! Why a repository of the hub gave no model, and what to do next.

use std::path::PathBuf;

use super::Unsuitable;
use super::hub::Refusal;
use super::selection::size;

/// Why a repository of the hub gave no model. The texts say what to do next.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    /// A revision that no repository can have.
    #[error("'{0}' is no revision; give a branch, a tag or a commit")]
    Revision(String),
    /// No answer, or none but "later".
    #[error("could not fetch {model} from the hub: {why}{}", left(*kept))]
    Unreachable {
        /// `owner/name[:file]`
        model: String,
        /// What happened.
        why: String,
        /// Bytes that the next run need not fetch again.
        kept: u64,
    },
    /// The hub wants the licence to be accepted first.
    #[error(
        "{repository} is gated: accept its licence at {page} and set HF_TOKEN to a token of the account that did{}",
        refused_token(*with_token)
    )]
    Gated {
        /// `owner/name`
        repository: String,
        /// Where to accept.
        page: String,
        /// A token was sent.
        with_token: bool,
    },
    /// The hub does not know the token.
    #[error("the hub does not accept the token ({said}); set HF_TOKEN to a valid one, or unset it")]
    Token {
        /// What the hub said.
        said: String,
    },
    /// The hub has no such repository, or does not show it.
    #[error(
        "the hub has no model repository '{repository}', or it is private{}; nor is there a file or directory of this \
         name here",
        if *with_token { " and the token does not open it" } else { ": set HF_TOKEN to open it" }
    )]
    NoRepository {
        /// `owner/name`
        repository: String,
        /// A token was sent.
        with_token: bool,
    },
    /// The repository has no such branch, tag or commit.
    #[error("{repository} has no revision '{revision}'; give a branch, a tag or a commit of it")]
    NoRevision {
        /// `owner/name`
        repository: String,
        /// What was asked for.
        revision: String,
    },
    /// A file that the hub listed is gone.
    #[error("{repository} lists '{file}' at {commit}, but the hub does not have it")]
    NoFile {
        /// `owner/name`
        repository: String,
        /// Its path.
        file: String,
        /// The commit.
        commit: String,
    },
    /// Another refusal.
    #[error("the hub refuses {repository}: {said}")]
    Refused {
        /// `owner/name`
        repository: String,
        /// Status, code and message.
        said: String,
    },
    /// An answer that is not right, twice.
    #[error("the hub sent something wrong for {what}: {why}; nothing of it is kept")]
    Wrong {
        /// A repository, or a file of it.
        what: String,
        /// What is wrong.
        why: String,
    },
    /// No model in it that can be served.
    #[error("{repository}: {why}")]
    Unsuitable {
        /// `owner/name`
        repository: String,
        /// Why not.
        why: Unsuitable,
    },
    /// The disk is too small, seen before anything was fetched.
    #[error(
        "{model} needs {} more, and {} has {} free; free some space or choose another cache directory",
        size(*needed), dir.display(), size(*free)
    )]
    TooLittleSpace {
        /// `owner/name[:file]`
        model: String,
        /// Bytes still to be fetched.
        needed: u64,
        /// Bytes that are free.
        free: u64,
        /// Where they would go.
        dir: PathBuf,
    },
}

fn left(kept: u64) -> String {
    match kept {
        0 => String::new(),
        kept => format!("; the {} that arrived are kept, and the next run goes on from there", size(kept)),
    }
}

fn refused_token(with_token: bool) -> &'static str {
    if with_token { " (the token that is set does not open it)" } else { "" }
}

/// What is asked for when the hub refuses.
pub(super) struct Asked<'a> {
    pub(super) repository: &'a str,
    pub(super) page: String,
    pub(super) with_token: bool,
    pub(super) revision: &'a str,
    pub(super) file: Option<&'a str>,
}

/// Sorts a refusal. The hub hides what may be private: without a token a repository that does not exist is a 401.
pub(super) fn refused(refusal: &Refusal, asked: &Asked<'_>) -> RepositoryError {
    let repository = asked.repository.to_owned();
    let with_token = asked.with_token;
    match (refusal.status, refusal.code.as_str()) {
        (_, "GatedRepo") => RepositoryError::Gated { repository, page: asked.page.clone(), with_token },
        (_, "RevisionNotFound") => {
            RepositoryError::NoRevision { repository, revision: asked.revision.to_owned() }
        }
        (_, "RepoNotFound") => RepositoryError::NoRepository { repository, with_token },
        (401, _) if with_token && !is_about_names(&refusal.message) => {
            RepositoryError::Token { said: refusal.to_string() }
        }
        (401, _) => RepositoryError::NoRepository { repository, with_token },
        (404, _) => match asked.file {
            Some(file) => RepositoryError::NoFile {
                repository,
                file: file.to_owned(),
                commit: asked.revision.to_owned(),
            },
            None => RepositoryError::NoRepository { repository, with_token },
        },
        _ => RepositoryError::Refused { repository, said: refusal.to_string() },
    }
}

/// The hub's 401 for what does not exist or is private, as opposed to a token that it does not know.
fn is_about_names(message: &str) -> bool {
    message.contains("Repository not found") || message.contains("Access to model")
}
