//! A request's whole way through the server, one function: `run`; and its end: `settle`.
//!
//! Knows no HTTP and no API's JSON. Invariants: a request is adopted by the ledger before the engine
//! sees it; settling lives in a task of its own, so a client that leaves takes nothing with it; the
//! answer's last piece is the durable receipt, or a failure.

mod admission;
mod app;
mod ask;
mod choice;
mod failure;
mod line;
pub mod outlook;
mod placement;
mod purse;
mod replicas;

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

pub use admission::{Admission, Policy, budget_resets_at, follow, foreseen, heed};
use admission::{Admitted, refused};
use app::Open;
pub use app::{App, Embedder, Parts, Served};
pub use ask::{Ask, Length, Origin, Prompt};
pub use choice::Scored;
pub use failure::Failure;
pub use line::BatchLine;
pub use replicas::{Replica, Replicas};

use crate::alerting::Alerting;
use crate::control::limits::{Left, Pass};
use crate::control::tasks::Called;
use crate::grammar::Form;
use crate::ledger::{LedgerUnavailable, Receipt, ReceiptWaiter, RequestContext};
use crate::metrics::Metrics;
use crate::request::{
    Allowance, CacheSalt, Event, Finish, Grammar, NewRequest, Prompts, Sampling, Stops, Tier, TokenLogprobs,
    Vectors,
};
use crate::text::turn::TurnForm;
use crate::units::RequestId;
use crate::usage::Purse;
use choice::ChoiceText;
use line::LinePurse;
use purse::Budgeted;
use replicas::Events;

/// Takes a request all the way to the engine; what comes back streams the answer.
///
/// # Errors
/// Whatever stands in the way before the engine has it; nothing has been charged then.
pub async fn run(app: &Arc<App>, ask: Ask) -> Result<Answer, Failure> {
    let open = app.opened();
    app.check_accepting()?;
    let served = match ask.vectors_of {
        Some(_) => app.check_model(&ask.model)?,
        None => app.check_generates(&ask.model)?,
    };
    let key = ask.origin.key.as_deref();
    app.check_allowed(key, &ask.model)?;
    let choices = ask.choices * u32::try_from(ask.prompts.len()).expect("requests have few prompts");
    let ceiling = match ask.vectors_of {
        Some(_) => app.vector_size(&ask.model).map(|_| None)?,
        None => ask.length.ceiling(key, choices)?,
    };
    let batch = ask.origin.batch.clone();
    let seat = if batch.is_some() { app.engines().reserve_aside()? } else { app.engines().reserve()? };
    if ask.score_prompts && !app.engines().each().iter().all(|replica| replica.engine.scores_prompts()) {
        let message = "`echo` with `logprobs`: this device draws its tokens itself and cannot score prompts";
        return Err(Failure::invalid("echo", message));
    }
    let param = ask.vectors_of.unwrap_or_else(|| ask.prompts[0].param());
    let mut form = match &ask.prompts[0] {
        Prompt::Chat(chat) => app.turn_form(chat),
        Prompt::Text { .. } | Prompt::Tokens(_) => TurnForm::default(),
    };
    let prompts = tokenize_all(app, &ask.model, ask.prompts).await?;
    // What must look like something begins with it.
    form.thinks = form.thinks.filter(|_| ask.form.is_none()).map(|_| app.ends_in_thought(&prompts[0]));
    let shown = app.shown_tokens(&form);
    let grammar = compile(app, ask.form).await?;
    let context = served.context_length;
    let max_tokens = match ask.vectors_of {
        Some(_) => ask::check_inputs(param, &prompts, context).map(|()| 0)?,
        None => ask.length.resolve(param, &prompts, context, ceiling)?,
    };
    let tenant = ask.origin.tenant.as_bytes();
    let salt = CacheSalt(blake3::derive_key("obol prefix cache salt, from the tenant", tenant));
    let placed = seat.place(salt, &prompts, choices, max_tokens)?;
    let device = placed.device();
    let id = ask.origin.request.clone();
    if let Some(key) = &ask.origin.key {
        heed(app, key).await?;
    }
    let Admitted { called, budgeted, pass, left } =
        app.admission().admit(app, &ask.origin, &prompts, placed.prices())?;
    let tenant = ask.origin.tenant.as_str().into();
    let throttled = budgeted.as_ref().is_some_and(|budgeted| budgeted.is_throttled());
    let purse = match &batch {
        Some(line) => {
            Some(Arc::new(LinePurse { line: line.clone(), budgeted: budgeted.clone() }) as Arc<dyn Purse>)
        }
        None => budgeted.clone().map(|budgeted| budgeted as Arc<dyn Purse>),
    };
    let tier = if batch.is_some() { Tier::Batch } else { ask.tier };
    let (ticket, receipt) =
        app.ledger().adopt(RequestContext { purse, ..context_of(served, ask.origin, tier) })?;
    called.into_iter().for_each(Called::stands);
    // From here to the settler there is no await: an adopted request is always submitted and settled.
    let prompt_tokens = prompts.iter().map(Vec::len).sum();
    let seed = ask.seed.or(batch.as_ref().map(|line| line.seed)).unwrap_or_else(|| drawn_seed(&id));
    let prompts = Prompts::new(prompts);
    let events = placed.submit(NewRequest {
        ticket,
        prompt: prompts.clone(),
        choices,
        sampling: Sampling { seed, ..ask.sampling },
        stops: Stops {
            max_tokens,
            min_tokens: ask.length.min_tokens,
            ignore_eos: ask.ignore_eos,
            stop_token_ids: ask.stop_token_ids,
        },
        grammar,
        score_prompts: ask.score_prompts,
        vectors: ask.vectors_of.map(|_| match app.embedder_named(&ask.model) {
            Some(_) => Vectors::Encoded,
            None => Vectors::Pooled(served.pooling),
        }),
        salt,
        id,
        tenant,
        tier: if throttled { Tier::Batch } else { tier },
        allowance: budgeted.clone().map(|budgeted| budgeted as Arc<dyn Allowance>),
    });
    let (settled, receipt_durable) = oneshot::channel();
    let tellers = (app.metrics().clone(), app.alerting().clone());
    tokio::spawn(settle(receipt, (pass, budgeted.clone()), tellers, choices, settled));
    let (pieces, given_out) = mpsc::unbounded_channel();
    let driver = Driver {
        app: Arc::clone(app),
        completion_tokens: 0,
        choices: (0..choices).map(|_| ChoiceText::new(&ask.stop, &shown)).collect(),
        running: choices,
        failure: None,
        budgeted: budgeted.clone(),
        events,
        receipt: Some(receipt_durable),
    };
    tokio::spawn(drive(driver, pieces));
    let mut answer = Answer {
        _open: open,
        device,
        left,
        form,
        prompts,
        prompt_tokens,
        completion_tokens: 0,
        pieces: given_out,
        first: None,
        ended: false,
    };
    if budgeted.is_some_and(|budgeted| budgeted.may_refuse()) {
        // Whoever has no budget hears of it before anything else.
        match answer.next().await {
            Some(Err(failure @ Failure::Budget(..))) => return Err(failure),
            first => answer.first = first.map(|piece| (answer.completion_tokens, piece)),
        }
        answer.ended = false;
    }
    Ok(answer)
}

/// Turns events into pieces as they come, however slowly the client reads: a stop string must end its
/// choice at once. When nobody reads any more, dropping the driver cancels what still runs.
async fn drive(mut driver: Driver, pieces: mpsc::UnboundedSender<(u64, Result<Piece, Failure>)>) {
    loop {
        let piece = tokio::select! {
            piece = driver.next() => piece,
            () = pieces.closed() => return,
        };
        let Some(piece) = piece else { return };
        if pieces.send((driver.completion_tokens, piece)).is_err() {
            return;
        }
    }
}

/// The one place where a request ends: its receipt is durable, and every metric and alert comes from it. Until then
/// its budgets hold what it has cost: one that is set meanwhile finds it there, or on the receipt.
async fn settle(
    receipt: ReceiptWaiter,
    (pass, _budgeted): (Option<Pass>, Option<Arc<Budgeted>>),
    (metrics, alerting): (Metrics, Alerting),
    choices: u32,
    settled: oneshot::Sender<Result<Arc<Receipt>, LedgerUnavailable>>,
) {
    let outcome = receipt.await;
    if let Ok(receipt) = &outcome {
        if let Some(mut pass) = pass {
            pass.answered(receipt.usage.tokens.completion);
        }
        metrics.settled(&receipt.attribution.model, &receipt.usage, choices);
        alerting.settled(receipt);
    }
    if settled.send(outcome).is_err() {
        tracing::trace!("the client is gone; the receipt stands without it");
    }
}

/// What an answer is made of, in order.
#[derive(Debug)]
pub enum Piece {
    /// More of a choice's text. With log-probabilities asked for, `scored` has the tokens it is
    /// made of; text is empty where a token's bytes are still part of a character.
    Text { choice: u32, text: String, scored: Vec<Scored> },
    /// How likely more of a prompt's tokens were, from its second one on; before any text of the prompt's first choice,
    /// which this names.
    Prompt { choice: u32, scores: Vec<TokenLogprobs> },
    /// What an input has become, in place of text.
    Vector { input: u32, vector: Vec<f32> },
    /// A choice is complete, with the last of its text; each is exactly once. `stop`: the stop string that ended it.
    Finished { choice: u32, text: String, scored: Vec<Scored>, finish: Finish, stop: Option<String> },
    /// The receipt is durable: the last piece of every complete answer.
    Settled(Arc<Receipt>),
}

/// A running request as its client reads it. Dropping it cancels what still runs; settling goes on
/// without it.
pub struct Answer {
    _open: Open,
    device: Arc<str>,
    left: Left,
    form: TurnForm,
    prompts: Prompts,
    prompt_tokens: usize,
    completion_tokens: u64,
    /// With the tokens of all choices up to each piece. At most `max_tokens` of them wait here.
    pieces: mpsc::UnboundedReceiver<(u64, Result<Piece, Failure>)>,
    /// Was asked for already.
    first: Option<(u64, Result<Piece, Failure>)>,
    /// The last piece, or a failure, has been given out.
    ended: bool,
}

impl Answer {
    /// What is left of the limits of whoever asked.
    #[must_use]
    pub fn left(&self) -> Left {
        self.left
    }

    /// What it continues.
    #[must_use]
    pub fn prompts(&self) -> &Prompts {
        &self.prompts
    }

    /// What its text may hold beside text.
    #[must_use]
    pub fn form(&self) -> &TurnForm {
        &self.form
    }

    /// What computes it, as the receipt will say.
    #[must_use]
    pub fn device(&self) -> &str {
        &self.device
    }

    #[must_use]
    pub fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// Tokens of all choices so far. The receipt's count may be higher: it includes end tokens.
    #[must_use]
    pub fn completion_tokens(&self) -> u64 {
        self.completion_tokens
    }

    /// The next piece; `None` after the last one. Cancel-safe.
    ///
    /// # Errors
    /// When the answer cannot be completed; that is its last piece.
    pub async fn next(&mut self) -> Option<Result<Piece, Failure>> {
        if self.ended {
            return None;
        }
        // A driver that is gone before the last piece has panicked.
        let (completion_tokens, piece) = match self.first.take() {
            Some(first) => first,
            None => self.pieces.recv().await.unwrap_or((self.completion_tokens, Err(Failure::Engine))),
        };
        self.completion_tokens = completion_tokens;
        self.ended = matches!(piece, Ok(Piece::Settled(_)) | Err(_));
        Some(piece)
    }
}

/// The side of an answer that listens to the engine.
struct Driver {
    app: Arc<App>,
    completion_tokens: u64,
    choices: Vec<ChoiceText>,
    running: u32,
    /// Why the answer is not whole; told after the receipt is durable.
    failure: Option<Failure>,
    budgeted: Option<Arc<Budgeted>>,
    events: Events,
    /// `None` once the answer has ended.
    receipt: Option<oneshot::Receiver<Result<Arc<Receipt>, LedgerUnavailable>>>,
}

impl Driver {
    /// The next piece; `None` after the last one, a failure included.
    async fn next(&mut self) -> Option<Result<Piece, Failure>> {
        self.receipt.as_ref()?;
        while self.running > 0 {
            let Some(event) = self.events.stream.next().await else {
                self.receipt = None;
                return Some(Err(Failure::Engine));
            };
            if let Some(piece) = self.piece_of(event) {
                return Some(Ok(piece));
            }
        }
        let outcome = self.receipt.as_mut()?.await;
        self.receipt = None;
        let settled = match (outcome, self.failure.take()) {
            (Ok(Ok(_)), Some(failure)) => Err(failure),
            (Ok(Ok(receipt)), None) => Ok(Piece::Settled(receipt)),
            (Ok(Err(LedgerUnavailable)) | Err(_), _) => Err(Failure::LedgerUnavailable),
        };
        Some(settled)
    }

    fn piece_of(&mut self, event: Event) -> Option<Piece> {
        let (Event::Token { choice, .. }
        | Event::Prompt { choice, .. }
        | Event::Vector { choice, .. }
        | Event::Finished { choice, .. }) = event;
        let state = self.choices.get_mut(choice as usize).expect("the engine reports our choices only");
        match event {
            Event::Token { token, logprobs, .. } => {
                self.completion_tokens += 1;
                let grown = state.push(&self.app, token, logprobs);
                if grown.stopped {
                    self.events.stream.stop_choice(choice);
                }
                (!grown.is_empty()).then_some(Piece::Text { choice, text: grown.text, scored: grown.scored })
            }
            Event::Vector { vector, .. } => Some(Piece::Vector { input: choice, vector }),
            Event::Prompt { scores, .. } => Some(Piece::Prompt { choice, scores }),
            Event::Finished { finish, .. } => {
                self.running -= 1;
                match finish {
                    Finish::Error => self.failure = Some(Failure::Engine),
                    Finish::Cancelled => self.failure = Some(Failure::Cancelled),
                    Finish::Budget => {
                        let refusal = self.budgeted.as_ref().and_then(|budgeted| budgeted.refusal());
                        if let Some(refusal) = refusal {
                            self.failure = Some(refused(&self.app, refusal));
                            // Nothing was said, and nothing else is.
                            return None;
                        }
                    }
                    Finish::Stop | Finish::Length => {}
                }
                let tail = state.finish();
                let stop = state.stopped_by().map(str::to_owned);
                // The engine may have reached the length before it heard of the stop string.
                let finish = if stop.is_some() && finish == Finish::Length { Finish::Stop } else { finish };
                Some(Piece::Finished { choice, text: tail.text, scored: tail.scored, finish, stop })
            }
        }
    }
}

/// The tokens of a prompt: a model's template and tokenizer.
///
/// # Errors
/// `Invalid` when the template refuses the messages, or there is none.
pub async fn tokenize(app: &Arc<App>, model: &str, prompt: Prompt) -> Result<Vec<u32>, Failure> {
    let mut tokens = tokenize_all(app, model, vec![prompt]).await?;
    Ok(tokens.pop().expect("one prompt has one list of tokens"))
}

/// As [`tokenize`], of several prompts in one go.
async fn tokenize_all(app: &Arc<App>, model: &str, prompts: Vec<Prompt>) -> Result<Vec<Vec<u32>>, Failure> {
    if prompts.iter().all(|prompt| matches!(prompt, Prompt::Tokens(_))) {
        return prompts.into_iter().map(|prompt| app.tokens_of(model, prompt)).collect();
    }
    let model = model.to_owned();
    let each = move |app: &App| prompts.into_iter().map(|prompt| app.tokens_of(&model, prompt)).collect();
    on_a_worker(app, each).await
}

/// The grammar of a form, read on such a thread too.
async fn compile(
    app: &Arc<App>,
    form: Option<(Form, &'static str)>,
) -> Result<Option<Arc<dyn Grammar>>, Failure> {
    let Some((form, param)) = form else { return Ok(None) };
    on_a_worker(app, move |app| app.grammar_of(&form, param)).await.map(Some)
}

/// Work that takes long, on a thread that may be busy for a while; few of them at once.
async fn on_a_worker<T: Send + 'static>(
    app: &Arc<App>,
    work: impl FnOnce(&App) -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let permit = app.tokenizing().await;
    let app = Arc::clone(app);
    let work = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        work(&app)
    });
    match work.await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // Only a runtime that is being shut down cancels blocking work.
        Err(_) => Err(Failure::Draining),
    }
}

fn context_of(served: &Served, origin: Origin, tier: Tier) -> RequestContext {
    RequestContext {
        request: origin.request,
        client_request_id: origin.client_request_id,
        idempotency_key: origin.idempotency_key,
        tier,
        key_id: origin.key.map(|key| key.id.0.clone()),
        tenant: origin.tenant,
        user: origin.user,
        metadata: origin.metadata,
        tags: origin.tags,
        model: served.id.clone(),
        precision: served.precision.clone(),
        endpoint: origin.endpoint,
        purse: None,
    }
}

/// A seed for a request that brought none: from its id, which is random, in 53 bits so that every
/// JSON reader carries it whole.
fn drawn_seed(id: &RequestId) -> u64 {
    let hash = blake3::hash(id.0.as_bytes());
    let head: [u8; 8] = hash.as_bytes()[..8].try_into().expect("a hash has 32 bytes");
    u64::from_le_bytes(head) >> 11
}
