//! How inputs become vectors.

use clap::ValueEnum;
use serde::Deserialize;

/// Which hidden states of an input its embedding is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    /// That of the last token, which has seen all others. What the prefix cache has is not computed again.
    #[default]
    Last,
    /// The mean of all, so that all are computed.
    Mean,
}
