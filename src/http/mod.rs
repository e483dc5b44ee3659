//! HTTP: requests in, JSON and event streams out. Knows no SQL, no device and no price; what a request
//! costs it reads from the receipt.
//!
//! Invariants: every response carries `x-request-id`, `x-obol-device` and `x-obol-currency`; every error
//! is OpenAI's error object, or Anthropic's on its endpoints, made in `error`; a body is never read past its limit; who asks is known (`auth`)
//! before anything else is looked at.

mod admin;
mod anthropic;
mod auth;
mod batches;
mod body;
mod costs;
mod embeddings;
mod envelope;
mod error;
mod fields;
mod files;
mod generate;
mod health;
mod models;
mod openai;
mod openapi;
mod origin;
mod receipts;
mod responses;
mod scrape;
mod similarity;
mod spend;
mod spend_query;
mod sse;
mod tasks;
mod telling;
mod tokens;

use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{HeaderValue, Method};
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use tokio::net::TcpListener;
use tower::util::option_layer;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer, ExposeHeaders};

use crate::archive::Archive;
use crate::batches::Batches;
use crate::config::{Origin, UnknownFields};
use crate::ledger::Ledger;
use crate::pipeline::App;
pub use auth::{Access, MetricsAccess};
pub use batches::Runner;
use error::ApiError;
use openai::Rules;

/// What the HTTP side is configured with; fixed before the model is loaded.
#[derive(Debug, Clone)]
pub struct HttpConfig {
    /// The devices' ids, for `x-obol-device` where no one of them answers.
    pub device: String,
    /// ISO code of the rate card's currency, for `x-obol-currency`.
    pub currency: String,
    pub unknown_fields: UnknownFields,
    /// Whose web pages may call this server.
    pub cors_origins: Vec<Origin>,
    pub body_bytes_max: usize,
    /// How long a body may take to arrive.
    pub body_time_max: Duration,
    /// Most choices (`n`) of one request.
    pub choices_max: u32,
    /// Silence on a stream after which a comment is sent, so that proxies keep it open.
    pub keep_alive: Duration,
    /// `None`: no files are kept, and no batches.
    pub batches: Option<Batches>,
}

impl HttpConfig {
    #[must_use]
    pub fn new(device: impl Into<String>, currency: impl Into<String>) -> Self {
        Self {
            device: device.into(),
            currency: currency.into(),
            unknown_fields: UnknownFields::Reject,
            cors_origins: Vec::new(),
            body_bytes_max: 8 << 20,
            body_time_max: Duration::from_secs(30),
            choices_max: 16,
            keep_alive: Duration::from_secs(10),
            batches: None,
        }
    }
}

/// The server before and after its model is loaded.
pub struct Server {
    config: HttpConfig,
    access: Access,
    ledger: Ledger,
    archive: Archive,
    app: OnceLock<Arc<App>>,
}

impl Server {
    /// Answers probes, and what keys and the books are enough for; everything else is 503 `loading` until `ready`.
    #[must_use]
    pub fn loading(config: HttpConfig, access: Access, ledger: Ledger, archive: Archive) -> Arc<Self> {
        Arc::new(Self { config, access, ledger, archive, app: OnceLock::new() })
    }

    /// From now on requests are served.
    ///
    /// # Panics
    /// When called twice: a server has one model for life.
    pub fn ready(&self, app: Arc<App>) {
        assert!(self.app.set(app).is_ok(), "the server is ready already; this is a bug");
    }

    fn app(&self) -> Result<&Arc<App>, ApiError> {
        self.app.get().ok_or(ApiError::Loading)
    }

    fn batches(&self) -> Result<&Batches, ApiError> {
        self.config.batches.as_ref().ok_or(ApiError::NoBatches)
    }

    fn rules(&self, app: &App) -> Rules {
        Rules {
            unknown: self.config.unknown_fields,
            vocab_size: app.tokenizer().vocab_size(),
            choices_max: self.config.choices_max,
            dialect: app.dialect(),
        }
    }
}

/// Lets these web pages call, and read the headers that have the cost.
fn cors(origins: &[Origin]) -> CorsLayer {
    let named = origins.iter().filter_map(|origin| match origin {
        Origin::Any => None,
        Origin::Is(text) => Some(HeaderValue::try_from(text).expect("checked to be printable")),
    });
    let any = origins.contains(&Origin::Any);
    let allowed = if any { AllowOrigin::any() } else { AllowOrigin::list(named) };
    CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(ExposeHeaders::any())
        .max_age(Duration::from_secs(3600))
}

/// All routes, with the envelope around them.
pub fn router(server: Arc<Server>) -> Router {
    let origins = &server.config.cors_origins;
    Router::new()
        .route("/v1/chat/completions", post(generate::chat))
        .route("/v1/completions", post(generate::completions))
        .route("/v1/responses", post(responses::create))
        .route("/v1/responses/input_tokens", post(responses::input_tokens))
        .route("/v1/responses/{id}", get(responses::one).delete(responses::delete))
        .route("/v1/responses/{id}/input_items", get(responses::input_items))
        .route("/v1/responses/{id}/cancel", post(responses::cancel))
        .route("/v1/messages", post(anthropic::messages))
        .route("/v1/messages/count_tokens", post(anthropic::count_tokens))
        .route("/v1/embeddings", post(embeddings::embeddings))
        .route("/v1/rerank", post(similarity::rerank))
        .route("/v1/score", post(similarity::score))
        .route("/v1/files", post(files::upload).layer(DefaultBodyLimit::disable()).get(files::list))
        .route("/v1/files/{id}", get(files::one).delete(files::delete))
        .route("/v1/files/{id}/content", get(files::content))
        .route("/v1/batches", post(batches::create).get(batches::list))
        .route("/v1/batches/{id}", get(batches::one))
        .route("/v1/batches/{id}/cancel", post(batches::cancel))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/v1/requests", get(receipts::list))
        .route("/v1/requests/{id}", get(receipts::one))
        .route("/v1/tasks/{id}", get(tasks::one))
        .route("/v1/organization/costs", get(costs::costs))
        .route("/v1/organization/usage/completions", get(costs::completions))
        .route("/spend/logs", get(spend::logs))
        .route("/global/spend/report", get(spend::report))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/tokenizer_info", get(tokens::info))
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .route("/metrics", get(scrape::metrics))
        .route("/openapi.json", get(openapi::document))
        .route("/docs", get(openapi::page))
        .merge(admin::routes())
        .fallback(envelope::unknown_path)
        .layer(from_fn_with_state(Arc::clone(&server), auth::authenticate))
        .layer(from_fn_with_state(Arc::clone(&server), envelope::envelope))
        // A browser asks first, with no key.
        .layer(option_layer((!origins.is_empty()).then(|| cors(origins))))
        .with_state(Arc::clone(&server))
}

/// Serves until `shutdown` resolves, then until the last connection is done.
///
/// # Errors
/// When the listener fails.
pub async fn serve(
    listener: TcpListener,
    server: Arc<Server>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let listener = listener.tap_io(|connection| {
        // Tokens are small and should leave at once; a connection without it is slower, not broken.
        if let Err(error) = connection.set_nodelay(true) {
            tracing::debug!(%error, "no TCP_NODELAY on a connection");
        }
    });
    axum::serve(listener, router(server)).with_graceful_shutdown(shutdown).await
}
