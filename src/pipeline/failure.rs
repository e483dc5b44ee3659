//! Why a request was not answered: every variant is expected, none is a bug.

use crate::control::budgets::Refusal;
use crate::control::limits::Exceeded;
use crate::control::tasks::Halted;
use crate::units::RequestId;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    #[error("the model `{asked}` does not exist here; this server has `{served}`")]
    ModelNotFound { asked: String, served: String },
    #[error("the API key {key} may not use the model `{asked}`; it may use `{allowed}`")]
    ModelNotAllowed { asked: String, key: String, allowed: String },
    #[error(
        "`{param}` ({tokens}) for {choices} answers is over the {limit} tokens that this API key may have generated \
         by one request"
    )]
    OverKeyTokens { param: &'static str, tokens: u32, choices: u32, limit: u32 },
    /// A field that only the template, the tokenizer or the prompt's length could judge.
    #[error("{message}")]
    Invalid { param: &'static str, message: String },
    #[error(
        "This model's maximum context length is {context} tokens, but the {param} come to {prompt} tokens \
         and at least one must be left for the answer. Shorten the {param}."
    )]
    PromptTooLong { param: &'static str, prompt: usize, context: usize },
    #[error(
        "This model's maximum context length is {context} tokens, but you asked for {} tokens: {prompt} in \
         the prompt and {answer} in the answer. Lower `{param}` to at most {}, or leave it out.",
        *prompt as u64 + u64::from(*answer), context - prompt
    )]
    AnswerTooLong { param: &'static str, prompt: usize, answer: u32, context: usize },
    #[error(
        "This model takes inputs of at most {context} tokens, but number {at} of `{param}` (from 0) has {tokens}. \
         Shorten it, or cut it into several."
    )]
    InputTooLong { param: &'static str, at: usize, tokens: usize, context: usize },
    #[error("this idempotency key was used by request {request}; its receipt is at /v1/requests/{request}")]
    IdempotencyKeyReused { request: RequestId },
    #[error("the queue is full, {waiting} requests are waiting; retry later")]
    QueueFull { waiting: usize },
    #[error("{0}")]
    RateLimited(Exceeded),
    #[error("{0}")]
    TaskHalted(Halted),
    /// Before the answer had begun. The budget begins anew in so many seconds.
    #[error("{0}")]
    Budget(Box<Refusal>, Option<u64>),
    #[error("the server is shutting down and takes no new requests; retry later")]
    Draining,
    /// The server's drain deadline passed, or it ended the request for another reason of its own.
    #[error("the server shut down before the answer was complete")]
    Cancelled,
    #[error("the ledger cannot be written, so nothing can be charged or answered; retry later")]
    LedgerUnavailable,
    #[error("the engine failed on this request; it is not charged")]
    Engine,
}

impl Failure {
    pub(super) fn invalid(param: &'static str, message: impl Into<String>) -> Self {
        Self::Invalid { param, message: message.into() }
    }
}
