//! What a running server is made of, as its requests see it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use obol_models::chat_template::ChatTemplate;
use obol_models::encoder::WordPiece;
use obol_models::tokenizer::Tokenizer;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::{Admission, Failure, Prompt, Replicas};
use crate::alerting::Alerting;
use crate::clock::Clock;
use crate::config::Pooling;
use crate::control::Key;
use crate::engine;
use crate::grammar::{Form, Grammars};
use crate::ledger::{AdoptError, Ledger};
use crate::metrics::Metrics;
use crate::nvml::Probe;
use crate::request::Grammar;
use crate::text::dialect::{Chat, Dialect};
use crate::text::prompt::{encode, of_chat};
use crate::text::turn::{CallFormat, TurnForm};

/// The model as clients see it.
#[derive(Debug, Clone)]
pub struct Served {
    /// What `/v1/models` lists and receipts say.
    pub id: String,
    /// Other names that requests may use. `default` always works.
    pub aliases: Vec<String>,
    /// Unix seconds, for `created` in `/v1/models`.
    pub created: u64,
    /// How the weights are held, as `Q4_1`.
    pub precision: String,
    /// The ids of the devices, with commas between.
    pub device: String,
    /// Tokens that prompt and answer may have together.
    pub context_length: usize,
    /// How an input becomes a vector.
    pub pooling: Pooling,
    /// Whether an answer is the same, bit for bit, whatever shares its batch.
    pub row_invariant: bool,
    /// Changes when the model's file does; becomes `system_fingerprint`.
    pub fingerprint: String,
}

/// An encoder beside the model: another model to clients, which makes embeddings only.
pub struct Embedder {
    pub served: Served,
    pub tokenizer: WordPiece,
    /// Size of its vectors.
    pub width: usize,
}

/// What `App` is put together from.
pub struct Parts {
    pub engines: Replicas,
    pub ledger: Ledger,
    pub admission: Admission,
    pub alerting: Alerting,
    pub tokenizer: Arc<Tokenizer>,
    /// `None`: the model has no chat template, and chat requests are refused.
    pub template: Option<ChatTemplate>,
    pub served: Served,
    /// Where all engines have an encoder.
    pub embedder: Option<Embedder>,
    pub clock: Arc<dyn Clock>,
    pub metrics: Metrics,
    /// The devices' own figures, for `/metrics`, by their ids.
    pub probes: Vec<(String, Probe)>,
    /// Prompts that are templated and tokenised at the same time.
    pub tokenizing_max: usize,
}

/// A loaded model behind an engine and a ledger. Shared by all requests.
pub struct App {
    parts: Parts,
    dialect: Option<Dialect>,
    tokenizing: Arc<Semaphore>,
    /// Made for the first request that needs them: most servers are never asked for any.
    grammars: OnceLock<Grammars>,
    draining: AtomicBool,
    /// Requests between their first check and the end of their answer.
    open: watch::Sender<usize>,
}

/// Find out which tokens a grammar allows next; a step's rows wait for what is not known in time.
const GRAMMAR_THREADS: usize = 2;

/// Counts as an open request for as long as it lives.
pub(super) struct Open(Arc<App>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.send_modify(|open| *open -= 1);
    }
}

impl Served {
    fn goes_by(&self, name: &str) -> bool {
        name == self.id || self.aliases.iter().any(|alias| alias == name)
    }
}

impl App {
    #[must_use]
    pub fn new(parts: Parts) -> Arc<Self> {
        let tokenizing = Arc::new(Semaphore::new(parts.tokenizing_max.max(1)));
        let draining = AtomicBool::new(false);
        let dialect = parts.template.as_ref().map(Dialect::of);
        Arc::new(Self {
            parts,
            dialect,
            tokenizing,
            grammars: OnceLock::new(),
            draining,
            open: watch::Sender::new(0),
        })
    }

    #[must_use]
    pub fn engines(&self) -> &Replicas {
        &self.parts.engines
    }

    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        &self.parts.ledger
    }

    #[must_use]
    pub fn admission(&self) -> &Admission {
        &self.parts.admission
    }

    #[must_use]
    pub fn alerting(&self) -> &Alerting {
        &self.parts.alerting
    }

    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.parts.tokenizer
    }

    /// The model's chat template, as its file has it.
    #[must_use]
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.parts.template.as_ref()
    }

    /// How chats are told to the model; `None` where it has no chat template.
    #[must_use]
    pub fn dialect(&self) -> Option<Dialect> {
        self.dialect
    }

    /// What the answer to a chat may hold beside text, as far as that is known before its prompt.
    pub(super) fn turn_form(&self, chat: &Chat) -> TurnForm {
        let Some(dialect) = self.dialect else { return TurnForm::default() };
        let names = chat.tools.iter().filter_map(|tool| tool["function"]["name"].as_str());
        TurnForm {
            calls: (!chat.tools.is_empty()).then_some(dialect.calls),
            tools: names.map(str::to_owned).collect(),
            single: chat.single,
            thinks: dialect.thinks.then_some(false),
        }
    }

    /// Whether these are the tokens of a prompt that ends within a thought: some templates begin it.
    pub(super) fn ends_in_thought(&self, prompt: &[u32]) -> bool {
        let last = &prompt[prompt.len().saturating_sub(8)..];
        self.tokenizer().decode(last, false).trim_end().ends_with("<think>")
    }

    /// Special tokens whose text a turn's reader must see.
    pub(super) fn shown_tokens(&self, form: &TurnForm) -> Vec<u32> {
        let marks = form.calls.map(CallFormat::mark).into_iter();
        let marks = marks.chain(form.thinks.map(|_| "<think>")).chain(form.thinks.map(|_| "</think>"));
        marks.filter_map(|mark| self.tokenizer().control_token(mark)).collect()
    }

    #[must_use]
    pub fn served(&self) -> &Served {
        &self.parts.served
    }

    /// Size of the vectors that a model makes of inputs.
    ///
    /// # Errors
    /// When its device makes none.
    pub fn vector_size(&self, model: &str) -> Result<usize, Failure> {
        if let Some(embedder) = self.embedder_named(model) {
            return Ok(embedder.width);
        }
        let sizes = self.engines().each().iter().map(|replica| replica.engine.hidden_size());
        sizes.min().flatten().ok_or_else(|| {
            let message = "this device draws its tokens itself and keeps the model's hidden states: there are no \
                           embeddings of it; serve the model with --device cpu, or another with --embedding-model";
            Failure::invalid("model", message)
        })
    }

    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.parts.metrics
    }

    #[must_use]
    pub fn probes(&self) -> &[(String, Probe)] {
        &self.parts.probes
    }

    #[must_use]
    pub fn clock(&self) -> &dyn Clock {
        self.parts.clock.as_ref()
    }

    /// From now on new requests are refused; running ones go on, until `idle`.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
        self.parts.engines.drain();
    }

    /// Resolves when no answer is under way: each has been given out whole, or its client has left.
    pub async fn idle(&self) {
        let mut open = self.open.subscribe();
        // The sender lives as long as `self`.
        let _sender_lives = open.wait_for(|open| *open == 0).await;
    }

    pub(super) fn opened(self: &Arc<Self>) -> Open {
        self.open.send_modify(|open| *open += 1);
        Open(Arc::clone(self))
    }

    /// Whether a request would be taken, seats apart.
    ///
    /// # Errors
    /// `Draining` or `LedgerUnavailable`.
    pub fn check_accepting(&self) -> Result<(), Failure> {
        if self.draining.load(Ordering::SeqCst) {
            return Err(Failure::Draining);
        }
        if !self.parts.ledger.is_available() {
            return Err(Failure::LedgerUnavailable);
        }
        Ok(())
    }

    /// The model that clients know by a name.
    ///
    /// # Errors
    /// When `asked` is no name of one.
    pub fn check_model(&self, asked: &str) -> Result<&Served, Failure> {
        self.named(asked).ok_or_else(|| {
            let names: Vec<&str> = self.models().map(|served| served.id.as_str()).collect();
            Failure::ModelNotFound { asked: asked.to_owned(), served: names.join("` and `") }
        })
    }

    /// As [`App::check_model`], of a model that generates.
    ///
    /// # Errors
    /// When it only makes embeddings, too.
    pub fn check_generates(&self, asked: &str) -> Result<&Served, Failure> {
        let served = self.check_model(asked)?;
        if self.embedder_named(asked).is_some() {
            let message = format!(
                "the model `{asked}` makes embeddings only: use /v1/embeddings, /v1/rerank or /v1/score, or the model `{}`",
                self.served().id
            );
            return Err(Failure::invalid("model", message));
        }
        Ok(served)
    }

    /// The encoder, where it goes by this name.
    #[must_use]
    pub fn embedder_named(&self, name: &str) -> Option<&Embedder> {
        let is_model = self.parts.served.goes_by(name) || name == "default";
        self.parts.embedder.as_ref().filter(|embedder| !is_model && embedder.served.goes_by(name))
    }

    /// Token ids of a model are below this.
    #[must_use]
    pub fn vocab_size(&self, model: &str) -> usize {
        let embedder = self.embedder_named(model);
        embedder.map_or_else(|| self.tokenizer().vocab_size(), |embedder| embedder.tokenizer.vocab_size())
    }

    /// All models, the one that generates first.
    pub fn models(&self) -> impl Iterator<Item = &Served> {
        std::iter::once(&self.parts.served)
            .chain(self.parts.embedder.as_ref().map(|embedder| &embedder.served))
    }

    fn named(&self, name: &str) -> Option<&Served> {
        self.models()
            .find(|served| served.goes_by(name))
            .or((name == "default").then_some(&self.parts.served))
    }

    /// Whether a key may ask for a model, which has several names: one on the key's list will do.
    ///
    /// # Errors
    /// `ModelNotAllowed`.
    pub fn check_allowed(&self, key: Option<&Key>, asked: &str) -> Result<(), Failure> {
        let wanted = self.named(asked).map(|served| &served.id);
        match key {
            Some(key)
                if !key.settings.models.is_empty()
                    && !key
                        .settings
                        .models
                        .iter()
                        .any(|model| self.named(model).is_some_and(|served| Some(&served.id) == wanted)) =>
            {
                let allowed = key.settings.models.join("`, `");
                Err(Failure::ModelNotAllowed { asked: asked.to_owned(), key: key.name.clone(), allowed })
            }
            _ => Ok(()),
        }
    }

    /// A raw prompt's text; special tokens leave none.
    #[must_use]
    pub fn text_of(&self, prompt: &Prompt) -> String {
        match prompt {
            Prompt::Text { text, .. } => text.clone(),
            Prompt::Tokens(tokens) => self.tokenizer().decode(tokens, true),
            Prompt::Chat(_) => String::new(),
        }
    }

    /// A place among those that may tokenise now.
    pub(super) async fn tokenizing(&self) -> OwnedSemaphorePermit {
        let places = Arc::clone(&self.tokenizing);
        places.acquire_owned().await.expect("the semaphore is never closed")
    }

    /// What a form allows. Takes long for the first form and for large ones: not for async threads.
    ///
    /// # Errors
    /// `Invalid` for `param` when the form cannot be followed.
    pub(super) fn grammar_of(&self, form: &Form, param: &'static str) -> Result<Arc<dyn Grammar>, Failure> {
        let grammars = self.grammars.get_or_init(|| Grammars::new(self.tokenizer(), GRAMMAR_THREADS));
        grammars.compile(form).map_err(|error| Failure::invalid(param, format!("`{param}`: {error}")))
    }

    /// Template and tokenizer of a model. Takes long for long prompts: not for async threads.
    ///
    /// # Errors
    /// `Invalid` when the template refuses the messages, or there is none.
    pub(super) fn tokens_of(&self, model: &str, prompt: Prompt) -> Result<Vec<u32>, Failure> {
        match (prompt, self.embedder_named(model)) {
            (Prompt::Text { text, .. }, Some(embedder)) => Ok(embedder.tokenizer.encode(&text)),
            (Prompt::Chat(_), Some(_)) => {
                Err(Failure::invalid("messages", "this model has no chat template; use `prompt`"))
            }
            (prompt, _) => self.own_tokens_of(prompt),
        }
    }

    fn own_tokens_of(&self, prompt: Prompt) -> Result<Vec<u32>, Failure> {
        match prompt {
            Prompt::Tokens(tokens) => Ok(tokens),
            Prompt::Text { text, add_special } => Ok(encode(self.tokenizer(), &text, add_special)),
            Prompt::Chat(chat) => {
                let param = chat.param;
                let template = self.parts.template.as_ref().ok_or_else(|| {
                    Failure::invalid(param, "this model has no chat template; use /v1/completions")
                })?;
                let dialect = self.dialect().expect("a model with a template has a dialect");
                of_chat(template, dialect, self.tokenizer(), chat)
                    .map_err(|error| Failure::invalid(param, error.to_string()))
            }
        }
    }
}

impl From<engine::Refused> for Failure {
    fn from(refused: engine::Refused) -> Self {
        match refused {
            engine::Refused::QueueFull { waiting } => Self::QueueFull { waiting },
            engine::Refused::Draining => Self::Draining,
            engine::Refused::Dead => Self::Engine,
        }
    }
}

impl From<AdoptError> for Failure {
    fn from(error: AdoptError) -> Self {
        match error {
            AdoptError::IdempotencyKeyReused { request } => Self::IdempotencyKeyReused { request },
            AdoptError::Unavailable => Self::LedgerUnavailable,
        }
    }
}
