//! Any OpenAI-compatible server as something that answers: streamed completions over HTTP/1.1, plain text.
//! Connections are kept alive, one for each request under way. Reads our own servers' cost where it is told.
//! Knows no load and no figure.

use std::cell::{Cell, RefCell};
use std::io;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use super::drive::Reply;
use super::plan::{Endpoint, Plan, ServerSetup};
use super::stream::Stream;
use super::workload::Dialogue;
use crate::measure::MeasureError;

/// How long a server may take to list its models.
const PATIENCE: Duration = Duration::from_secs(30);
/// What is read of an answer that is no stream.
const BODY_BYTES_MAX: usize = 1 << 20;
/// What is shown of an error.
const SHOWN_MAX: usize = 600;

/// A server by its address, and the connections to it that are free.
pub(super) struct Server {
    url: String,
    host: String,
    port: u16,
    /// As in the `Host` header.
    authority: String,
    /// What endpoints' paths begin with.
    base: String,
    key: Option<HeaderValue>,
    model: String,
    free: RefCell<Vec<SendRequest<Full<Bytes>>>>,
    /// An answer came without a count of its tokens: parts were counted.
    pub(super) counted_parts: Cell<bool>,
    /// The currency of the costs that the server tells.
    pub(super) currency: RefCell<Option<String>>,
}

/// The server that a URL names, before it is asked anything.
fn parse(setup: &ServerSetup) -> Result<Server, String> {
    let url = setup.url.trim_end_matches('/');
    let wrong = |why: &str| format!("{}: {why}; write one like http://127.0.0.1:8080", setup.url);
    let uri: Uri = url.parse().map_err(|error| wrong(&format!("no URL, {error}")))?;
    if uri.scheme_str() != Some("http") {
        return Err(wrong("only http:// is spoken here"));
    }
    let authority = uri.authority().ok_or_else(|| wrong("it names no host"))?;
    if authority.as_str().contains('@') {
        return Err(wrong("a URL's user and password are not used"));
    }
    if uri.query().is_some() {
        return Err(wrong("a query belongs to no server"));
    }
    let path = uri.path().trim_end_matches('/');
    let key = setup.api_key.as_ref().map(|key| {
        let mut value = HeaderValue::from_str(&key.header())
            .map_err(|_| "the API key has characters that no header may have".to_owned())?;
        value.set_sensitive(true);
        Ok::<_, String>(value)
    });
    Ok(Server {
        url: url.to_owned(),
        // The resolver takes no brackets around an IPv6 address.
        host: authority.host().trim_start_matches('[').trim_end_matches(']').to_owned(),
        port: authority.port_u16().unwrap_or(80),
        authority: authority.as_str().to_owned(),
        base: if path.ends_with("/v1") { path.to_owned() } else { format!("{path}/v1") },
        key: key.transpose()?,
        model: String::new(),
        free: RefCell::default(),
        counted_parts: Cell::new(false),
        currency: RefCell::default(),
    })
}

impl Server {
    /// Reaches a server, and asks it for its model if none is named.
    pub(super) async fn find(setup: &ServerSetup) -> Result<Self, MeasureError> {
        let mut server = parse(setup).map_err(MeasureError::Input)?;
        let listed = tokio::time::timeout(PATIENCE, server.models()).await;
        let silent = || Unlisted::Unreachable(format!("no answer within {} s", PATIENCE.as_secs()));
        let listed = listed.unwrap_or_else(|_| Err(silent()));
        server.model = server.choose(setup.model.as_ref(), listed).map_err(MeasureError::Failed)?;
        Ok(server)
    }

    fn choose(
        &self,
        named: Option<&String>,
        listed: Result<Vec<String>, Unlisted>,
    ) -> Result<String, String> {
        let url = &self.url;
        match (named, listed) {
            (_, Err(Unlisted::Unreachable(why))) => {
                Err(format!("no server answers at {url}: GET {}/models failed: {why}", self.base))
            }
            // It answers, and may have no such list.
            (Some(model), _) => Ok(model.clone()),
            (None, Ok(models)) => {
                let first = models.into_iter().next();
                first.ok_or_else(|| format!("{url} lists no model; name one with --model-name"))
            }
            (None, Err(Unlisted::Answered(said))) => {
                Err(format!("{url} does not list its models ({said}); name one with --model-name"))
            }
        }
    }

    pub(super) fn model(&self) -> &str {
        &self.model
    }

    async fn models(&self) -> Result<Vec<String>, Unlisted> {
        let path = format!("{}/models", self.base);
        let (response, sender) =
            self.send(Method::GET, &path, Bytes::new()).await.map_err(Unlisted::Unreachable)?;
        let status = response.status();
        let body = whole(response).await.map_err(Unlisted::Unreachable)?;
        self.free.borrow_mut().push(sender);
        let list = serde_json::from_slice::<Value>(&body).ok().filter(|_| status.is_success());
        let list = list.and_then(|list| list["data"].as_array().cloned());
        let list = list.ok_or_else(|| Unlisted::Answered(refusal(status, &body)))?;
        Ok(list.iter().filter_map(|model| model["id"].as_str()).map(str::to_owned).collect())
    }

    /// One streamed answer.
    pub(super) async fn ask(&self, dialogue: &Dialogue, plan: &Plan) -> Result<Reply, String> {
        let (path, body) = self.request(dialogue, plan);
        let body = Bytes::from(body.to_string());
        let answer = tokio::time::timeout(plan.timeout, self.answer(&path, body));
        answer.await.unwrap_or_else(|_| Err(format!("no answer within {} s", plan.timeout.as_secs())))
    }

    fn request(&self, dialogue: &Dialogue, plan: &Plan) -> (String, Value) {
        let mut body = json!({
            "model": self.model,
            "max_tokens": plan.workload.output_tokens,
            "temperature": 0,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        if plan.ignore_eos {
            body["ignore_eos"] = json!(true);
        }
        match plan.endpoint {
            Endpoint::Completions => {
                body["prompt"] = json!(dialogue.text());
                (format!("{}/completions", self.base), body)
            }
            Endpoint::Chat => {
                body["messages"] = dialogue.messages();
                (format!("{}/chat/completions", self.base), body)
            }
        }
    }

    async fn answer(&self, path: &str, body: Bytes) -> Result<Reply, String> {
        let sent = Instant::now();
        let (response, sender) = self.send(Method::POST, path, body).await?;
        let status = response.status();
        if status != StatusCode::OK {
            let body = whole(response).await?;
            self.free.borrow_mut().push(sender);
            return Err(refusal(status, &body));
        }
        let streams = response.headers().get(header::CONTENT_TYPE).is_some_and(|kind| {
            kind.to_str().is_ok_and(|kind| kind.trim_start().starts_with("text/event-stream"))
        });
        if !streams {
            return Err(format!("the answer is no event stream: {}", shown(&whole(response).await?)));
        }
        let mut body = response.into_body();
        let mut stream = Stream::default();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| format!("the connection broke in an answer: {error}"))?;
            if let Some(data) = frame.data_ref() {
                stream.push(data, Instant::now())?;
            }
        }
        self.free.borrow_mut().push(sender);
        let answer = stream.finish()?;
        if answer.counted_parts {
            self.counted_parts.set(true);
        }
        if let Some(currency) = answer.currency {
            self.currency.replace(Some(currency));
        }
        Ok(Reply {
            sent,
            came: answer.came,
            text: answer.text,
            output_tokens: answer.output_tokens,
            told: answer.told,
        })
    }

    /// Sends over a free connection, or a new one. A server may close a connection just when it is used again:
    /// then, before anything of an answer has come, the request goes once more over a new one.
    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(Response<Incoming>, SendRequest<Full<Bytes>>), String> {
        let request = self.with_headers(method, path, body)?;
        loop {
            // Not in the condition: the list must be free again before anything waits.
            let free = self.free.borrow_mut().pop();
            let Some(mut sender) = free else { break };
            if sender.is_closed() || sender.ready().await.is_err() {
                continue;
            }
            match sender.send_request(request.clone()).await {
                Ok(response) => return Ok((response, sender)),
                Err(error) if was_closed(&error) => {}
                Err(error) => return Err(format!("the connection broke: {error}")),
            }
        }
        let mut sender = self.connect().await?;
        let response = sender.send_request(request).await;
        Ok((response.map_err(|error| format!("the connection broke: {error}"))?, sender))
    }

    fn with_headers(&self, method: Method, path: &str, body: Bytes) -> Result<Request<Full<Bytes>>, String> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.authority)
            .header(header::USER_AGENT, concat!("obol-bench/", env!("CARGO_PKG_VERSION")));
        if !body.is_empty() {
            request = request
                .header(header::CONTENT_TYPE, "application/json")
                .header(header::ACCEPT, "text/event-stream");
        }
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, key);
        }
        request.body(Full::new(body)).map_err(|error| format!("{}: {error}", self.url))
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, String> {
        let connected = TcpStream::connect((self.host.as_str(), self.port)).await;
        let stream = connected.map_err(|error| format!("cannot connect to {}: {error}", self.authority))?;
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        let (sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
        // How it ends shows in the request that it carries.
        tokio::spawn(async { drop(connection.await) });
        Ok(sender)
    }
}

/// Why a list of models was not had.
enum Unlisted {
    Unreachable(String),
    Answered(String),
}

async fn whole(response: Response<Incoming>) -> Result<Bytes, String> {
    let collected = Limited::new(response.into_body(), BODY_BYTES_MAX).collect().await;
    collected
        .map(|body| body.to_bytes())
        .map_err(|error| format!("the connection broke in an answer: {error}"))
}

/// Whether the server had closed the connection that a request was sent over: as hyper saw it, or as the system
/// says when the request crossed the closing on its way.
fn was_closed(error: &hyper::Error) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<io::Error>());
    let reset = source.is_some_and(|source| {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
        matches!(source.kind(), BrokenPipe | ConnectionAborted | ConnectionReset)
    });
    reset || error.is_closed() || error.is_canceled() || error.is_incomplete_message()
}

fn refusal(status: StatusCode, body: &[u8]) -> String {
    format!("{status}: {}", shown(body))
}

/// An error's own message where it is OpenAI's object, else the beginning of the body.
fn shown(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let mut shown: String = text.trim().chars().take(SHOWN_MAX).collect();
    if shown.len() < text.trim().len() {
        shown.push_str("...");
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::plan::ApiKey;

    fn server(url: &str) -> Result<Server, String> {
        parse(&ServerSetup { url: url.to_owned(), model: None, api_key: ApiKey::new(" secret\n") })
    }

    #[test]
    fn urls_are_taken_with_and_without_the_apis_path() {
        for (url, host, port, base) in [
            ("http://localhost:8080", "localhost", 8080, "/v1"),
            ("http://localhost/", "localhost", 80, "/v1"),
            ("http://10.0.0.1:80/v1/", "10.0.0.1", 80, "/v1"),
            ("http://[::1]:9/api", "::1", 9, "/api/v1"),
        ] {
            let server = server(url).unwrap_or_else(|said| panic!("{said}"));
            assert_eq!(
                (server.host.as_str(), server.port, server.base.as_str()),
                (host, port, base),
                "{url}"
            );
        }
        for (url, says) in [
            ("https://x", "only http://"),
            ("localhost:8080", "http://127.0.0.1:8080"),
            ("http://", "http://127.0.0.1:8080"),
            ("http://me:pass@x", "password"),
            ("http://x/?a=b", "query"),
        ] {
            let said = server(url).err().unwrap_or_else(|| panic!("{url} is taken"));
            assert!(said.contains(says), "{url}: {said}");
        }
    }

    #[test]
    fn a_long_error_is_cut_and_a_key_is_never_shown() {
        assert_eq!(refusal(StatusCode::NOT_FOUND, b" gone \n"), "404 Not Found: gone");
        let long = shown("\u{e9}".repeat(1000).as_bytes());
        assert!(long.ends_with("...") && long.chars().count() == SHOWN_MAX + 3);
        let server = server("http://x").unwrap();
        let request = server.with_headers(Method::GET, "/", Bytes::new()).unwrap();
        assert!(!format!("{request:?}").contains("secret"));
        assert_eq!(request.headers()[header::AUTHORIZATION], "Bearer secret");
    }
}
