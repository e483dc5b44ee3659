//! Talking to the hub: its answers as JSON, its files streamed, resumed and checked. Knows no repository's layout.
//!
//! The requests are our own: hf-hub 1.0 drops the checksums of a file list and hides whether a server went on
//! where it was asked to. It is asked only where the hub is.
//!
//! Invariants: the token goes to the hub's own address only (a redirect elsewhere leaves it out), and no answer
//! makes us read without bound.

use std::cell::Cell;
use std::ops::Deref;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use reqwest::header::{self, HeaderMap};
use reqwest::{Response, StatusCode, Url};
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::partial::Partial;
use super::progress::Progress;
use super::{FetchError, FetchOptions, Job};

/// A hub that cannot be reached must not hold up the next source.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Failures in a row, without a byte between them, after which a request is given up.
const RETRIES_MAX: u32 = 4;
/// Transfers that break off are taken up again as long as each brought something, and so often for each
/// `MUCH` bytes.
const RESUMES_MAX: u32 = 20;
const MUCH: u64 = 64 << 20;
/// Longest answer in JSON.
const JSON_MAX: usize = 32 << 20;
/// Longest text of a refusal.
const REFUSAL_MAX: usize = 64 << 10;

/// The hub, for one fetch.
pub(super) struct Hub<'a> {
    http: reqwest::Client,
    endpoint: Url,
    options: &'a FetchOptions,
    progress: &'a dyn Progress,
    /// It has answered, so it is worth trying again.
    answered: Cell<bool>,
}

/// Why the hub gave nothing, after all retries.
#[derive(Debug)]
pub(super) enum HubError {
    /// No connection, no answer, or none but "later".
    Unreachable(String),
    /// It answered no.
    Refused(Refusal),
    /// It answered something that is not right.
    Wrong(String),
    /// Not the hub's fault.
    Fatal(FetchError),
}

impl From<FetchError> for HubError {
    fn from(error: FetchError) -> Self {
        Self::Fatal(error)
    }
}

/// A status of 400 and more, with what the hub says in its headers or in its JSON.
#[derive(Debug, Clone)]
pub(super) struct Refusal {
    pub(super) status: u16,
    /// `X-Error-Code`: `GatedRepo`, `RepoNotFound`, `RevisionNotFound`, `EntryNotFound` and others.
    pub(super) code: String,
    pub(super) message: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "it answered {}", self.status)?;
        for text in [&self.code, &self.message].into_iter().filter(|text| !text.is_empty()) {
            write!(f, ", {text}")?;
        }
        Ok(())
    }
}

/// Why one request failed: `Broken` may go better next time.
enum Trouble {
    Broken { why: String, wait: Option<Duration> },
    Refused(Refusal),
    Fatal(FetchError),
}

impl From<FetchError> for Trouble {
    fn from(error: FetchError) -> Self {
        Self::Fatal(error)
    }
}

fn broken(why: String) -> Trouble {
    Trouble::Broken { why, wait: None }
}

/// Runs `work` on a thread of its own, in a runtime of its own: the caller may itself run inside one.
pub(super) fn in_runtime<T, E>(work: impl AsyncFnOnce() -> Result<T, E> + Send) -> Result<T, E>
where
    T: Send,
    E: From<FetchError> + Send,
{
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|source| FetchError::File { path: "a runtime".into(), source })?;
            let result = runtime.block_on(work());
            // A name lookup that hangs must not be waited for.
            runtime.shutdown_background();
            result
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

impl<'a> Hub<'a> {
    /// Finds out where the hub is; sends nothing yet.
    pub(super) fn connect(options: &'a FetchOptions, progress: &'a dyn Progress) -> Result<Self, HubError> {
        let builder = hf_hub::HFClientBuilder::new().cache_enabled(false);
        let builder = match &options.hub_endpoint {
            Some(endpoint) => builder.endpoint(endpoint.as_str()),
            None => builder,
        };
        let wrong = |why: &dyn std::fmt::Display| HubError::Unreachable(format!("the hub's address: {why}"));
        let endpoint = builder.build().map_err(|error| wrong(&error))?.endpoint().to_owned();
        let endpoint = Url::parse(&endpoint).map_err(|error| wrong(&error))?;
        if !matches!(endpoint.scheme(), "http" | "https") || endpoint.cannot_be_a_base() {
            return Err(wrong(&format!("'{endpoint}' is no http address")));
        }
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .referer(false)
            .user_agent(concat!("obol/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| HubError::Unreachable(explain(&error)))?;
        Ok(Self { http, endpoint, options, progress, answered: Cell::new(false) })
    }

    /// For people: the repository's page.
    pub(super) fn page(&self, repository: &str) -> String {
        self.url(repository.split('/')).to_string()
    }

    /// `api/models/REPOSITORY/..rest`, each of `rest` one segment whatever is in it.
    pub(super) fn api_url(&self, repository: &str, rest: &[&str]) -> Url {
        let segments = ["api", "models"].into_iter().chain(repository.split('/'));
        self.url(segments.chain(rest.iter().copied()))
    }

    /// Where a file's bytes are.
    pub(super) fn file_url(&self, repository: &str, revision: &str, file: &str) -> Url {
        let segments = repository.split('/').chain(["resolve", revision]);
        self.url(segments.chain(file.split('/')))
    }

    fn url<'s>(&self, segments: impl Iterator<Item = &'s str>) -> Url {
        let mut url = self.endpoint.clone();
        let mut path = url.path_segments_mut().expect("checked by connect; this is a bug");
        path.pop_if_empty().extend(segments);
        drop(path);
        url
    }

    /// An answer in JSON, and the query of the next page if there is one.
    pub(super) async fn json<T: DeserializeOwned>(&self, url: &Url) -> Result<(T, Option<String>), HubError> {
        let mut failures = 0;
        let (body, next) = loop {
            match self.body(url).await {
                Ok(answer) => break answer,
                Err(trouble) => self.pause(trouble, &mut failures).await?,
            }
        };
        let value = serde_json::from_slice(&body)
            .map_err(|error| HubError::Wrong(format!("its answer at {} is no hub's: {error}", url.path())))?;
        Ok((value, next))
    }

    async fn body(&self, url: &Url) -> Result<(Vec<u8>, Option<String>), Trouble> {
        let mut response = self.ask(url, 0).await?;
        let next = next_query(response.headers(), url);
        let mut body = Vec::new();
        while let Some(piece) = self.piece(&mut response).await? {
            if body.len() + piece.len() > JSON_MAX {
                return Err(broken(format!("its answer at {} does not end", url.path())));
            }
            body.extend_from_slice(&piece);
        }
        Ok((body, next))
    }

    /// Fills `partial` and checks it. On failure `partial` keeps what arrived, for the next run.
    pub(super) async fn download(
        &self,
        job: &Job<'_>,
        url: &Url,
        partial: &mut Partial,
    ) -> Result<(), HubError> {
        let (mut failures, mut resumes, mut much, mut wrong_before) = (0, 0, partial.len() + MUCH, false);
        loop {
            let start = partial.len();
            let ended = if start < job.bytes { self.transfer(job, url, partial).await } else { Ok(()) };
            if partial.len() >= much {
                (resumes, much) = (0, partial.len() + MUCH);
            }
            match ended {
                Err(Trouble::Broken { why, wait: None })
                    if partial.len() > start && resumes < RESUMES_MAX =>
                {
                    tracing::debug!(why, at = partial.len(), "the transfer broke off and is resumed");
                    (failures, resumes) = (0, resumes + 1);
                    continue;
                }
                Err(trouble) => {
                    self.pause(trouble, &mut failures).await?;
                    continue;
                }
                Ok(()) => {}
            }
            match partial.check(job) {
                Ok(()) => return Ok(()),
                // The bytes of an earlier run may be at fault, or an accident: once more, from the start.
                Err(why) => {
                    partial.reset(job)?;
                    if wrong_before {
                        return Err(HubError::Wrong(why));
                    }
                    tracing::debug!(why, file = job.file, "the file is wrong and is fetched from the start");
                    wrong_before = true;
                }
            }
        }
    }

    /// One request: appends what comes until its end or a failure.
    async fn transfer(&self, job: &Job<'_>, url: &Url, partial: &mut Partial) -> Result<(), Trouble> {
        let from = partial.len();
        let mut response = match self.ask(url, from).await {
            // What is held is longer than what the server has.
            Err(Trouble::Refused(refusal)) if refusal.status == 416 && from > 0 => {
                return Ok(partial.reset(job)?);
            }
            answer => answer?,
        };
        if from > 0 && !goes_on_at(&response, from) {
            partial.reset(job)?;
            if response.status() == StatusCode::PARTIAL_CONTENT {
                return Err(broken("it sent another part of the file than it was asked for".to_owned()));
            }
        }
        job.progress.start(job.file, job.bytes);
        while let Some(piece) = self.piece(&mut response).await? {
            partial.write(job, &piece)?;
            job.progress.at(partial.len());
            if partial.len() > job.bytes {
                return Ok(()); // already wrong: the check says so
            }
        }
        Ok(())
    }

    /// One request and the head of its answer.
    async fn ask(&self, url: &Url, from: u64) -> Result<Response, Trouble> {
        let mut request = self.http.get(url.clone()).header(header::ACCEPT_ENCODING, "identity");
        if let Some(token) = &self.options.hub_token {
            request = request.bearer_auth(&token.0);
        }
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        let answer = self.options.pace.answer;
        let response = timeout(answer, request.send())
            .await
            .map_err(|_| broken(format!("no answer within {} s", answer.as_secs_f32())))?
            .map_err(|error| broken(explain(&error)))?;
        self.answered.set(true);
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let wait = wait_asked_for(response.headers());
        let refusal = self.refusal(response).await;
        let later = [StatusCode::TOO_MANY_REQUESTS, StatusCode::REQUEST_TIMEOUT].contains(&status);
        match later || status.is_server_error() {
            true => Err(Trouble::Broken { why: refusal.to_string(), wait }),
            false => Err(Trouble::Refused(refusal)),
        }
    }

    async fn piece(
        &self,
        response: &mut Response,
    ) -> Result<Option<impl Deref<Target = [u8]> + use<>>, Trouble> {
        let stall = self.options.pace.stall;
        timeout(stall, response.chunk())
            .await
            .map_err(|_| broken(format!("nothing came for {} s", stall.as_secs_f32())))?
            .map_err(|error| broken(explain(&error)))
    }

    async fn refusal(&self, mut response: Response) -> Refusal {
        let text = |name: &str| {
            let value = response.headers().get(name).and_then(|value| value.to_str().ok());
            printable(value.unwrap_or(""))
        };
        let (code, mut message) = (text("x-error-code"), text("x-error-message"));
        let status = response.status().as_u16();
        if message.is_empty() {
            let mut body = Vec::new();
            while let Ok(Some(piece)) = self.piece(&mut response).await {
                body.extend_from_slice(&piece);
                if body.len() > REFUSAL_MAX {
                    break;
                }
            }
            let said = serde_json::from_slice::<serde_json::Value>(&body).unwrap_or_default();
            message = printable(said.get("error").and_then(|said| said.as_str()).unwrap_or(""));
        }
        Refusal { status, code, message }
    }

    /// Waits until a failed request is worth sending again, or says that it is not.
    async fn pause(&self, trouble: Trouble, failures: &mut u32) -> Result<(), HubError> {
        let (why, wait) = match trouble {
            Trouble::Fatal(error) => return Err(HubError::Fatal(error)),
            Trouble::Refused(refusal) => return Err(HubError::Refused(refusal)),
            Trouble::Broken { why, wait } => (why, wait),
        };
        *failures += 1;
        if !self.answered.get() || *failures > RETRIES_MAX {
            return Err(HubError::Unreachable(why));
        }
        let pace = &self.options.pace;
        let wait = wait.unwrap_or(pace.backoff * (1 << (*failures - 1)));
        if wait > pace.wait_max {
            return Err(HubError::Unreachable(format!("{why}; it asks to wait for {} s", wait.as_secs())));
        }
        self.progress.note(&format!("the hub: {why}; trying again in {} s", wait.as_secs_f32()));
        tokio::time::sleep(wait).await;
        Ok(())
    }
}

/// True if the answer is the rest of the file from `from` on.
fn goes_on_at(response: &Response, from: u64) -> bool {
    let range = response.headers().get(header::CONTENT_RANGE).and_then(|range| range.to_str().ok());
    let start = range.and_then(|range| range.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok());
    response.status() == StatusCode::PARTIAL_CONTENT && start.is_none_or(|start: u64| start == from)
}

/// The query of the link to the next page. Only the query is taken: a mirror passes on links to the hub it mirrors,
/// and no link should send the token elsewhere.
fn next_query(headers: &HeaderMap, url: &Url) -> Option<String> {
    let links = headers.get_all(header::LINK).iter().filter_map(|value| value.to_str().ok());
    let link = links.flat_map(|value| value.split(',')).find(|link| link.contains("rel=\"next\""))?;
    let target = link.split_once('<')?.1.split_once('>')?.0;
    Some(url.join(target).ok()?.query()?.to_owned())
}

/// `Retry-After`: seconds, or a date.
fn wait_asked_for(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let then = chrono::DateTime::parse_from_rfc2822(text).ok()?.timestamp();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    Some(Duration::from_secs(u64::try_from(then).ok()?).saturating_sub(now))
}

/// What a server says goes to a terminal: one line, without control characters.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(300).collect::<String>().trim().to_owned()
}

/// One line for people. A transport error's outer texts repeat the address; what failed is its innermost cause.
fn explain(error: &reqwest::Error) -> String {
    let mut root: Option<&dyn std::error::Error> = None;
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        root = Some(inner);
        cause = inner.source();
    }
    root.map_or_else(|| error.to_string(), |root| format!("no connection, or it broke off: {root}"))
}
