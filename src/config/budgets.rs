//! Budgets as the configuration file has them: `[[budgets]]`.

use serde::Deserialize;

use super::decimal::Decimal;

/// One budget, as written; what its words mean the budgets themselves know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BudgetText {
    pub name: Option<String>,
    pub scope: String,
    pub value: Option<String>,
    pub cap: String,
    pub window: String,
    pub time_zone: Option<String>,
    pub until: Option<String>,
    pub mode: Option<String>,
    pub alerts: Option<Vec<u8>>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BudgetFile {
    name: Option<String>,
    scope: String,
    value: Option<String>,
    cap: Decimal,
    window: String,
    time_zone: Option<String>,
    until: Option<String>,
    mode: Option<String>,
    /// Per cent of the cap.
    alerts: Option<Vec<u8>>,
}

impl From<BudgetFile> for BudgetText {
    fn from(file: BudgetFile) -> Self {
        let BudgetFile { name, scope, value, cap, window, time_zone, until, mode, alerts } = file;
        Self { name, scope, value, cap: cap.text(), window, time_zone, until, mode, alerts }
    }
}
