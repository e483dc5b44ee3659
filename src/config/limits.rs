//! Limits as the configuration file has them: `[limits]`, `[limits.tiers.*]` and `[tasks]`.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::ConfigError;
use super::decimal::Decimal;

/// What one caller may do; `None`: no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitSet {
    /// Requests a minute.
    pub rpm: Option<u64>,
    /// Tokens a minute, of prompts and answers.
    pub tpm: Option<u64>,
    /// Requests at a time.
    pub parallel: Option<u32>,
}

/// Of keys that have no limits of their own: by their tier, and of those without one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LimitSets {
    pub default: LimitSet,
    pub tiers: BTreeMap<String, LimitSet>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LimitsFile {
    rpm: Option<u64>,
    tpm: Option<u64>,
    parallel: Option<u32>,
    #[serde(default)]
    tiers: BTreeMap<String, LimitSet>,
}

impl LimitsFile {
    pub(super) fn resolve(self) -> Result<LimitSets, ConfigError> {
        let Self { rpm, tpm, parallel, tiers } = self;
        let default = LimitSet { rpm, tpm, parallel };
        let none = |set: &LimitSet| set.rpm == Some(0) || set.tpm == Some(0) || set.parallel == Some(0);
        if std::iter::once(&default).chain(tiers.values()).any(none) {
            let problem =
                "a limit of 0 would refuse every request; use at least 1, or block the key".to_owned();
            return Err(ConfigError::Value { name: "limits", problem });
        }
        Ok(LimitSets { default, tiers })
    }
}

/// What an agent's run may do; `None`: no ceiling.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TaskCeilings {
    /// In the rate card's currency.
    pub cost: Option<String>,
    pub calls: Option<u64>,
    pub depth: Option<u64>,
    pub repeats: Option<u64>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TasksFile {
    max_cost: Option<Decimal>,
    max_calls: Option<u64>,
    max_depth: Option<u64>,
    max_repeats: Option<u64>,
}

impl From<TasksFile> for TaskCeilings {
    fn from(file: TasksFile) -> Self {
        let TasksFile { max_cost, max_calls, max_depth, max_repeats } = file;
        Self { cost: max_cost.map(Decimal::text), calls: max_calls, depth: max_depth, repeats: max_repeats }
    }
}
