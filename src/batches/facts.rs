//! What is known of files and batches: plain data.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::units::Picos;

/// Whose a file or a batch is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// `None`: of whoever asked without a key.
    pub key_id: Option<String>,
}

/// What a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The input of batches.
    Batch,
    /// What a batch has written.
    BatchOutput,
}

impl Purpose {
    const ALL: [Self; 2] = [Self::Batch, Self::BatchOutput];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Batch => "batch",
            Self::BatchOutput => "batch_output",
        }
    }

    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|purpose| purpose.as_str() == text)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileFacts {
    pub id: String,
    pub owner: Owner,
    pub bytes: u64,
    /// Seconds since 1970.
    pub created: u64,
    pub filename: String,
    pub purpose: Purpose,
}

/// How far a batch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Validating,
    Failed,
    InProgress,
    Finalizing,
    Completed,
    Expired,
    Cancelling,
    Cancelled,
}

impl Status {
    const ALL: [Self; 8] = [
        Self::Validating,
        Self::Failed,
        Self::InProgress,
        Self::Finalizing,
        Self::Completed,
        Self::Expired,
        Self::Cancelling,
        Self::Cancelled,
    ];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Validating => "validating",
            Self::Failed => "failed",
            Self::InProgress => "in_progress",
            Self::Finalizing => "finalizing",
            Self::Completed => "completed",
            Self::Expired => "expired",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
        }
    }

    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == text)
    }
}

/// When a batch came to be what, in seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Times {
    pub created: u64,
    pub expires: u64,
    pub in_progress: Option<u64>,
    pub finalizing: Option<u64>,
    pub completed: Option<u64>,
    pub failed: Option<u64>,
    pub expired: Option<u64>,
    pub cancelling: Option<u64>,
    pub cancelled: Option<u64>,
}

/// Lines of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    pub total: u64,
    pub completed: u64,
    pub failed: u64,
}

/// What answers came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tokens {
    pub prompt: u64,
    /// Of them, found in the prefix cache.
    pub cached: u64,
    pub completion: u64,
    pub cost: Picos,
}

/// What is wrong with a batch's input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    pub code: String,
    /// From 1 on; `None`: the file as a whole.
    pub line: Option<u64>,
    pub message: String,
    /// The field of the line.
    pub param: Option<String>,
}

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewBatch {
    pub owner: Owner,
    /// Whose prefix cache and books it is.
    pub tenant: String,
    pub endpoint: String,
    /// As the client said it, and in seconds.
    pub window: (String, u64),
    pub input_file: String,
    pub metadata: BTreeMap<String, String>,
    /// Headers that its lines have.
    pub headers: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    pub id: String,
    pub owner: Owner,
    pub tenant: String,
    pub endpoint: String,
    pub window: String,
    pub input_file: String,
    pub output_file: Option<String>,
    pub error_file: Option<String>,
    pub metadata: BTreeMap<String, String>,
    pub headers: BTreeMap<String, String>,
    pub status: Status,
    pub problems: Option<Vec<Problem>>,
    pub times: Times,
    pub counts: Counts,
    pub tokens: Tokens,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sort {
    OldestFirst,
    NewestFirst,
}

/// Which part of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    pub limit: usize,
    /// Only those behind this one; an id that is not there gives an empty page.
    pub after: Option<String>,
    pub sort: Sort,
}
