//! Alerts as the configuration file has them: `[alerts]`.

use std::path::PathBuf;

use serde::Deserialize;

use super::decimal::Decimal;

/// What alerts are raised about and who hears of them, as written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AlertsText {
    /// One request that costs more than this.
    pub request_cost: Option<String>,
    /// Unusual costs and rates, by key and by feature.
    pub anomalies: bool,
    /// Budgets that will probably not last until their windows end.
    pub forecasts: bool,
    pub daily: Vec<DailyText>,
    pub webhooks: Vec<WebhookText>,
}

/// A day's total that is worth an alert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DailyText {
    pub over: String,
    pub scope: Option<String>,
    pub value: Option<String>,
    pub time_zone: Option<String>,
}

/// Where alerts go. An address may hold a secret: one of `url` and `url_file` names it.
#[derive(Clone, PartialEq, Eq)]
pub struct WebhookText {
    pub url: Option<String>,
    pub url_file: Option<PathBuf>,
    pub format: Option<String>,
    /// Certificates in PEM that are trusted beside the system's.
    pub ca_file: Option<PathBuf>,
}

impl std::fmt::Debug for WebhookText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WebhookText").field("format", &self.format).finish_non_exhaustive()
    }
}

impl Default for AlertsText {
    fn default() -> Self {
        Self { request_cost: None, anomalies: true, forecasts: true, daily: Vec::new(), webhooks: Vec::new() }
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AlertsFile {
    request_cost: Option<Decimal>,
    anomalies: Option<bool>,
    forecasts: Option<bool>,
    #[serde(default)]
    daily: Vec<DailyFile>,
    #[serde(default)]
    webhooks: Vec<WebhookFile>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct DailyFile {
    over: Decimal,
    scope: Option<String>,
    value: Option<String>,
    time_zone: Option<String>,
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct WebhookFile {
    url: Option<String>,
    url_file: Option<PathBuf>,
    format: Option<String>,
    ca_file: Option<PathBuf>,
}

impl std::fmt::Debug for WebhookFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WebhookFile").field("format", &self.format).finish_non_exhaustive()
    }
}

impl From<AlertsFile> for AlertsText {
    fn from(file: AlertsFile) -> Self {
        let daily = |daily: DailyFile| {
            let DailyFile { over, scope, value, time_zone } = daily;
            DailyText { over: over.text(), scope, value, time_zone }
        };
        let webhook = |webhook: WebhookFile| {
            let WebhookFile { url, url_file, format, ca_file } = webhook;
            WebhookText { url, url_file, format, ca_file }
        };
        Self {
            request_cost: file.request_cost.map(Decimal::text),
            anomalies: file.anomalies.unwrap_or(true),
            forecasts: file.forecasts.unwrap_or(true),
            daily: file.daily.into_iter().map(daily).collect(),
            webhooks: file.webhooks.into_iter().map(webhook).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alerts_are_read_as_written_and_addresses_are_not_shown() {
        let text = "request_cost = 0.5\nanomalies = false\n[[daily]]\nover = 100\nscope = 'team'\n\
                    [[webhooks]]\nurl = 'https://example.org/secret'\nformat = 'slack'\n[[webhooks]]\nurl_file = 'f'";
        let alerts = AlertsText::from(toml::from_str::<AlertsFile>(text).unwrap());
        assert_eq!((alerts.request_cost.as_deref(), alerts.anomalies), (Some("0.5"), false));
        assert_eq!((alerts.daily[0].over.as_str(), alerts.daily[0].scope.as_deref()), ("100", Some("team")));
        assert_eq!(alerts.webhooks[0].url.as_deref(), Some("https://example.org/secret"));
        assert_eq!(alerts.webhooks[1].url_file.as_deref(), Some(std::path::Path::new("f")));
        assert!(!format!("{alerts:?}").contains("secret"));
        assert!(toml::from_str::<AlertsFile>("weekly = 1").is_err());
        let none = AlertsText::from(AlertsFile::default());
        assert_eq!(none, AlertsText::default());
    }
}
