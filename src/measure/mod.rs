//! What `obol compare` and `obol bench` share: requests through the engine that the server uses, closed
//! loops, statistics, tables, pictures, progress. Knows no variant, no server and no price.

pub mod asking;
pub mod picture;
pub mod progress;
pub mod statistics;
pub mod table;

use asking::NoAnswer;

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// What was asked cannot be done.
    #[error("{0}")]
    Input(String),
    #[error("{0}")]
    Failed(String),
}

impl From<NoAnswer> for MeasureError {
    fn from(error: NoAnswer) -> Self {
        Self::Failed(error.0)
    }
}
