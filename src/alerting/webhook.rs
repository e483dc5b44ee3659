//! Webhooks: one courier each, which sends what the outbox has for it, oldest first.
//!
//! Does not know: what alerts are about. Invariants: an address is never logged, only its host; at most one attempt
//! of a webhook is under way.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::{Certificate, Client, StatusCode, Url};
use serde_json::Value;
use tokio::sync::{Notify, watch};

use super::{Tuning, lock};
use crate::clock::Clock;
use crate::control::alerts::slack;
use crate::control::outbox::{Outbox, Outcome, Pending, Target};
use crate::units::UnixNanos;

/// What a webhook says no to so often is given up: the event itself is what it does not take.
const REJECTIONS_MAX: u32 = 10;
/// An idle courier looks again after this at the latest, for what another attempt was put off.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Why webhooks cannot be called.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    /// Says nothing of the address: it may hold a secret.
    #[error("alerts.webhooks {at}: {problem}")]
    Setting { at: usize, problem: String },
    #[error("webhooks cannot be called: {0}")]
    Client(reqwest::Error),
}

/// What a webhook is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The event, in LiteLLM's shape.
    Json,
    /// `{"text": ...}`.
    Slack,
}

impl Format {
    fn parse(name: &str) -> Option<Self> {
        match name {
            "json" => Some(Self::Json),
            "slack" => Some(Self::Slack),
            _ => None,
        }
    }

    fn body(self, event: &Value) -> String {
        match self {
            Self::Json => event.to_string(),
            Self::Slack => slack(event).to_string(),
        }
    }
}

/// Where alerts are sent.
#[derive(Clone)]
pub struct Webhook {
    url: Url,
    format: Format,
    target: Target,
    /// Trusted beside the system's.
    certificates: Vec<Certificate>,
}

impl std::fmt::Debug for Webhook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Webhook")
            .field("host", &self.target.host)
            .field("format", &self.format)
            .finish_non_exhaustive()
    }
}

impl Webhook {
    /// The `at`-th one of the configuration. `format`: `json` if there is none.
    ///
    /// # Errors
    /// Says what is wrong with it, without the address.
    pub fn parse(at: usize, url: &str, format: Option<&str>) -> Result<Self, WebhookError> {
        let wrong = |problem: String| WebhookError::Setting { at, problem };
        let format = format.map_or(Ok(Format::Json), |name| {
            Format::parse(name).ok_or_else(|| wrong(format!("format {name:?} is not json or slack")))
        })?;
        let url = Url::parse(url.trim()).map_err(|problem| {
            wrong(format!("the url is no address such as https://host/path: {problem}"))
        })?;
        let host = url.host_str().filter(|_| matches!(url.scheme(), "http" | "https"));
        let Some(host) = host else {
            return Err(wrong("the url does not begin with https:// or http:// and a host".to_owned()));
        };
        let host = url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
        let seed = format!("{format:?} {url}");
        let hash = blake3::Hash::from(blake3::derive_key("obol webhook, to know it by", seed.as_bytes()));
        let target = Target { id: hash.to_hex()[..32].to_owned(), host };
        Ok(Self { url, format, target, certificates: Vec::new() })
    }

    /// The same, where certificates that one of these has signed are trusted too, beside those that the system trusts.
    ///
    /// # Errors
    /// When it is no PEM, or has no certificate.
    pub fn trusting(mut self, at: usize, pem: &str) -> Result<Self, WebhookError> {
        let wrong = |problem: String| WebhookError::Setting { at, problem };
        self.certificates = Certificate::from_pem_bundle(pem.as_bytes())
            .map_err(|error| wrong(format!("ca_file: it is no PEM file of certificates: {error}")))?;
        if self.certificates.is_empty() {
            return Err(wrong("ca_file: it has no certificate (-----BEGIN CERTIFICATE-----)".to_owned()));
        }
        // What is in them is read only when they are put to use.
        match client(&self, Duration::ZERO) {
            Ok(_) => Ok(self),
            Err(WebhookError::Client(error)) => {
                Err(wrong(format!("ca_file: it has a certificate that cannot be read: {}", explain(error))))
            }
            Err(error) => Err(error),
        }
    }

    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }
}

/// What a webhook is called with.
pub(super) fn client(webhook: &Webhook, timeout: Duration) -> Result<Client, WebhookError> {
    Client::builder()
        .tls_certs_merge(webhook.certificates.iter().cloned())
        .timeout(timeout)
        .referer(false)
        // Whoever answers for another place does not get the event, or the secret in its address.
        .redirect(reqwest::redirect::Policy::none())
        .user_agent(concat!("obol/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(WebhookError::Client)
}

/// How an attempt ended.
enum Attempt {
    Acknowledged,
    /// The webhook is not there, or not well: everything waits.
    Down(String),
    /// It does not want this event.
    Rejected(String),
}

/// Carries alerts to one webhook.
pub(super) struct Courier {
    pub(super) webhook: Webhook,
    pub(super) client: Client,
    pub(super) outbox: Arc<Mutex<Outbox>>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) tuning: Tuning,
    pub(super) news: Arc<Notify>,
    pub(super) stopped: watch::Receiver<bool>,
}

impl Courier {
    /// Until it is told to stop; then once more through what is there, for as long as nothing fails.
    pub(super) async fn run(mut self) {
        // Attempts in a row that found the webhook down.
        let mut down: u32 = 0;
        loop {
            let news = Arc::clone(&self.news);
            let news = news.notified();
            let stopped = *self.stopped.borrow();
            let found = lock(&self.outbox).next(&self.webhook.target.id, self.clock.wall());
            let pause = match found {
                Ok(Some(pending)) => {
                    down = self.deliver(&pending, down).await;
                    if down == 0 {
                        continue;
                    }
                    self.backoff(down)
                }
                Ok(None) => LOOK_EVERY,
                Err(error) => {
                    tracing::error!(%error, host = self.webhook.target.host, "alerts to send cannot be read");
                    LOOK_EVERY
                }
            };
            if stopped {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                // While it is down news wait as the rest does.
                () = news, if down == 0 => {}
                _ = self.stopped.wait_for(|stopped| *stopped) => {}
            }
        }
    }

    /// One attempt, and what became of it on the books; returns how often in a row the webhook was down.
    async fn deliver(&self, pending: &Pending, down: u32) -> u32 {
        let attempt = self.send(pending).await;
        let (host, attempts) = (&self.webhook.target.host, pending.attempts + 1);
        let (outcome, down) = match attempt {
            Attempt::Acknowledged => (Outcome::Acknowledged, 0),
            Attempt::Down(error) => {
                tracing::warn!(
                    host,
                    alert = pending.alert,
                    error,
                    "a webhook does not take an alert; it is retried"
                );
                (Outcome::Retry { due: self.clock.wall(), error }, down + 1)
            }
            Attempt::Rejected(error) if attempts < REJECTIONS_MAX => {
                tracing::warn!(
                    host,
                    alert = pending.alert,
                    error,
                    "a webhook rejects an alert; it is retried"
                );
                let pause = u64::try_from(self.backoff(attempts).as_nanos()).unwrap_or(u64::MAX);
                (Outcome::Retry { due: UnixNanos(self.clock.wall().0.saturating_add(pause)), error }, 0)
            }
            Attempt::Rejected(error) => {
                tracing::error!(
                    host,
                    alert = pending.alert,
                    error,
                    "a webhook rejects an alert; it is given up"
                );
                (Outcome::GivenUp { error }, 0)
            }
        };
        let now = self.clock.wall();
        let written = lock(&self.outbox).finish(pending, &self.webhook.target.id, outcome, now);
        match written {
            Ok(()) => down,
            Err(error) => {
                // It is sent again, with the same id.
                tracing::error!(%error, host, "what became of an alert cannot be written down");
                down + 1
            }
        }
    }

    async fn send(&self, pending: &Pending) -> Attempt {
        let sent = self
            .client
            .post(self.webhook.url.clone())
            .header("content-type", "application/json")
            .header("idempotency-key", &pending.alert)
            .body(self.webhook.format.body(&pending.event))
            .send()
            .await;
        match sent {
            Ok(response) => verdict(response.status()),
            Err(error) => Attempt::Down(explain(error)),
        }
    }

    /// Twice as long each time, up to the longest; a half of it by chance, so that webhooks are not asked by all
    /// servers at once.
    fn backoff(&self, failures: u32) -> Duration {
        let longest = self.tuning.backoff_max;
        let doubled = self.tuning.backoff.saturating_mul(1_u32 << failures.saturating_sub(1).min(16));
        let whole = doubled.min(longest);
        let mut bytes = [0; 2];
        // Without chance it is the whole time.
        let chance =
            getrandom::fill(&mut bytes).map_or(1.0, |()| f64::from(u16::from_le_bytes(bytes)) / 65_535.0);
        whole.mul_f64(0.5 + chance / 2.0)
    }
}

fn verdict(status: StatusCode) -> Attempt {
    let said = format!("it answered {}", status.as_u16());
    let later =
        [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_EARLY, StatusCode::TOO_MANY_REQUESTS].contains(&status);
    match status {
        status if status.is_success() => Attempt::Acknowledged,
        status if status.is_server_error() || later => Attempt::Down(said),
        _ => Attempt::Rejected(said),
    }
}

/// What went wrong, down to the cause, without the address.
fn explain(error: reqwest::Error) -> String {
    if error.is_timeout() {
        return "it did not answer in time".to_owned();
    }
    let error = error.without_url();
    let mut said = error.to_string();
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(&error);
    while let Some(error) = cause {
        said = format!("{said}: {error}");
        cause = error.source();
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn webhooks_are_read_and_known_by_their_whole_address_but_shown_by_host() {
        let webhook = |url, format| Webhook::parse(1, url, format).map_err(|error| error.to_string());
        let slack = webhook("https://hooks.example.org/services/T0/secret", Some("slack")).unwrap();
        assert_eq!((slack.format, slack.target.host.as_str()), (Format::Slack, "hooks.example.org"));
        assert!(!format!("{slack:?}").contains("secret"));
        let other = webhook("https://hooks.example.org/services/T0/other", Some("slack")).unwrap();
        assert_ne!(slack.target.id, other.target.id);
        assert_eq!(webhook("http://127.0.0.1:99/x\n", None).unwrap().target.host, "127.0.0.1:99");
        for pem in ["", "secret", "-----BEGIN CERTIFICATE-----\nsecret\n-----END CERTIFICATE-----\n"] {
            let said = slack.clone().trusting(1, pem).err().map(|error| error.to_string());
            let said = said.expect("no certificate");
            assert!(
                said.starts_with("alerts.webhooks 1: ca_file: it ") && !said.contains("secret"),
                "{said}"
            );
        }
        for (url, format, problem) in [
            ("https://example.org/secret", Some("xml"), "format \"xml\" is not json or slack"),
            ("secret", None, "no address"),
            ("ftp://example.org/secret", None, "does not begin with https://"),
            ("mailto:secret@example.org", None, "does not begin with https://"),
        ] {
            let said = webhook(url, format).unwrap_err();
            assert!(said.contains(problem) && !said.contains("secret"), "{said}");
        }
    }

    #[test]
    fn statuses_decide_what_is_tried_again() {
        let is = |status: u16| match verdict(StatusCode::from_u16(status).unwrap()) {
            Attempt::Acknowledged => "taken",
            Attempt::Down(_) => "down",
            Attempt::Rejected(_) => "rejected",
        };
        for (status, want) in [
            (200, "taken"),
            (204, "taken"),
            (302, "rejected"),
            (400, "rejected"),
            (404, "rejected"),
            (408, "down"),
            (429, "down"),
            (500, "down"),
            (503, "down"),
        ] {
            assert_eq!(is(status), want, "{status}");
        }
    }
}
