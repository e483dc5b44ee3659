//! What a client asked for, whatever API it spoke: plain data from `http` to `pipeline`.
//!
//! Every field has been checked on its own; what needs the prompt's length, the clock or the engine
//! is still open.

use std::collections::BTreeMap;

use serde_json::Value;

use super::Failure;
use crate::request::Sampling;
use crate::units::RequestId;

/// One generation to run and to answer.
#[derive(Debug, Clone)]
pub struct Ask {
    /// The `model` as the client wrote it.
    pub model: String,
    pub prompt: Prompt,
    pub choices: u32,
    /// `sampling.seed` counts only after `seed` has been resolved.
    pub sampling: Sampling,
    /// `None`: one is drawn and recorded in the receipt.
    pub seed: Option<u64>,
    pub length: Length,
    pub ignore_eos: bool,
    pub stop_token_ids: Vec<u32>,
    /// Non-empty strings; the first match in a choice's text ends that choice before it.
    pub stop: Vec<String>,
    pub origin: Origin,
}

/// How long an answer may be and must be, as the client said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Length {
    pub max_tokens: Option<u32>,
    /// The name under which the client gave `max_tokens`, for error messages.
    pub max_tokens_param: &'static str,
    pub min_tokens: u32,
}

impl Length {
    /// The limit for a prompt of so many tokens: the client's, or all that is left of the context.
    ///
    /// # Errors
    /// When prompt and answer do not fit the context, or there is no prompt.
    pub fn resolve(self, prompt_param: &'static str, prompt: usize, context: usize) -> Result<u32, Failure> {
        if prompt == 0 {
            return Err(Failure::invalid(prompt_param, "the prompt is empty: it comes to no tokens"));
        }
        if prompt >= context {
            return Err(Failure::PromptTooLong { param: prompt_param, prompt, context });
        }
        let room = u32::try_from(context - prompt).unwrap_or(u32::MAX);
        match self.max_tokens {
            Some(answer) if answer > room => {
                Err(Failure::AnswerTooLong { param: self.max_tokens_param, prompt, answer, context })
            }
            None if self.min_tokens > room => {
                let message = format!("`min_tokens` is {}, but only {room} tokens are left", self.min_tokens);
                Err(Failure::invalid("min_tokens", message))
            }
            given => Ok(given.unwrap_or(room)),
        }
    }
}

/// What the model is to continue.
#[derive(Debug, Clone)]
pub enum Prompt {
    /// Messages in the shape that chat templates take: `[{"role", "content", ..}]`, content as text.
    Chat(Value),
    /// `add_special`: begin with the tokens that the model wants before a text.
    Text {
        text: String,
        add_special: bool,
    },
    Tokens(Vec<u32>),
}

impl Prompt {
    /// The request field that the prompt came from, for error messages.
    #[must_use]
    pub fn param(&self) -> &'static str {
        match self {
            Self::Chat(_) => "messages",
            Self::Text { .. } | Self::Tokens(_) => "prompt",
        }
    }
}

/// Who asked, in their own words: attribution for the receipt. Decides nothing.
#[derive(Debug, Clone)]
pub struct Origin {
    pub request: RequestId,
    pub endpoint: &'static str,
    pub client_request_id: Option<String>,
    pub idempotency_key: Option<String>,
    pub user: Option<String>,
    pub metadata: BTreeMap<String, String>,
    pub tags: BTreeMap<String, String>,
}
