//! Decimals as the configuration file has them.

use serde::Deserialize;

/// A decimal as people write it in TOML: "2.50", 2.50 or 2.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum Decimal {
    Text(String),
    Integer(i64),
    /// The shortest decimal that reads back as this float: what was written, up to 15 digits.
    Float(f64),
}

impl Decimal {
    pub(super) fn text(self) -> String {
        match self {
            Self::Text(text) => text,
            Self::Integer(number) => number.to_string(),
            Self::Float(number) => number.to_string(),
        }
    }
}
