//! The first source: a file in a repository of the hub, streamed, resumed where an earlier transfer stopped.

use std::time::Duration;

use futures::StreamExt;
use hf_hub::{HFClient, HFClientBuilder, HFError, split_id};
use tokio::time::timeout;

use super::partial::Partial;
use super::{Job, SourceError};
use crate::catalog::HubSource;

/// A hub that cannot be reached must not hold up the next source.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// From the request to the first byte.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// Between two pieces of a transfer.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Transfers that break off are taken up again as long as each brought something.
const RESUMES_MAX: usize = 20;

/// Fills `partial` and checks it. On failure `partial` keeps what arrived, for the next run.
pub(super) fn download(job: &Job<'_>, source: &HubSource, partial: &mut Partial) -> Result<(), SourceError> {
    // A runtime on a thread of its own: the caller may itself run inside one.
    let result = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|error| SourceError::Failed(format!("no runtime for it: {error}")))?;
            let result = runtime.block_on(download_async(job, source, partial));
            // A name lookup that hangs must not be waited for.
            runtime.shutdown_background();
            result
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    job.progress.finish();
    result
}

async fn download_async(job: &Job<'_>, source: &HubSource, partial: &mut Partial) -> Result<(), SourceError> {
    let client = client(job).map_err(|error| SourceError::Failed(explain(&error)))?;
    let mut resumes = 0;
    loop {
        let (start, resumed) = (partial.len(), partial.len() > 0);
        let broken =
            if start < job.entry.bytes { transfer(job, &client, source, partial).await } else { Ok(()) };
        match broken {
            Err(SourceError::Failed(why)) if partial.len() > start && resumes < RESUMES_MAX => {
                tracing::debug!(why, at = partial.len(), "the transfer broke off and is resumed");
                resumes += 1;
                continue;
            }
            Err(error) => return Err(error),
            Ok(()) => {}
        }
        match partial.check(job) {
            Ok(()) => return Ok(()),
            // The bytes of an earlier run may be at fault, or the server ignored where to begin.
            Err(why) if resumed => {
                tracing::debug!(why, "the resumed file is wrong and is fetched from the start");
                partial.reset(job)?;
            }
            Err(why) => {
                partial.reset(job)?;
                return Err(SourceError::Failed(format!("what it sent is not the right file: {why}")));
            }
        }
    }
}

fn client(job: &Job<'_>) -> Result<HFClient, HFError> {
    let http = reqwest::Client::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .user_agent(concat!("obol/", env!("CARGO_PKG_VERSION")))
        .build()?;
    let builder = HFClientBuilder::new().client(http).cache_enabled(false).retry_max_attempts(0);
    match &job.options.hub_endpoint {
        Some(endpoint) => builder.endpoint(endpoint.as_str()).build(),
        None => builder.build(),
    }
}

/// One request: appends what comes until its end or a failure.
async fn transfer(
    job: &Job<'_>,
    client: &HFClient,
    source: &HubSource,
    partial: &mut Partial,
) -> Result<(), SourceError> {
    let (owner, name) = split_id(&source.repository);
    let repository = client.model(owner, name);
    let from = partial.len();
    let request = repository
        .download_file_stream()
        .filename(source.file.clone())
        .revision(source.revision.clone())
        .maybe_range((from > 0).then_some(from..job.entry.bytes))
        .send();
    let (_, mut stream) = timeout(ANSWER_TIMEOUT, request)
        .await
        .map_err(|_| SourceError::Failed(format!("no answer within {} s", ANSWER_TIMEOUT.as_secs())))?
        .map_err(|error| SourceError::Failed(explain(&error)))?;
    job.progress.start(&job.entry.file, job.entry.bytes);
    loop {
        let piece = timeout(STALL_TIMEOUT, stream.next())
            .await
            .map_err(|_| SourceError::Failed(format!("nothing came for {} s", STALL_TIMEOUT.as_secs())))?;
        match piece {
            None => return Ok(()),
            Some(Err(error)) => return Err(SourceError::Failed(explain(&error))),
            Some(Ok(bytes)) => partial.write(job, &bytes)?,
        }
        job.progress.at(partial.len());
        if partial.len() > job.entry.bytes {
            return Ok(()); // already wrong: the check says so
        }
    }
}

/// One line for people. A transport error's outer texts repeat the address; what failed is its innermost cause.
fn explain(error: &HFError) -> String {
    let mut root: Option<&dyn std::error::Error> = None;
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        root = Some(inner);
        cause = inner.source();
    }
    root.map_or_else(|| error.to_string(), |root| format!("no connection, or it broke off: {root}"))
}
