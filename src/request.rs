//! Plain data that every stage of a request shares. No behaviour, no JSON of any API.

use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::config::Pooling;
use crate::units::{BlockNanos, DeviceNanos, RequestId, Ticket};

/// How the next token is drawn from a row of logits.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 = greedy (argmax, ties to the lower id).
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 = all.
    pub top_k: u32,
    /// Keep the smallest set of tokens whose probabilities reach this; 1 = all.
    pub top_p: f32,
    /// Keep tokens at least this fraction as likely as the most likely one; 0 = all.
    pub min_p: f32,
    /// Subtracted once from the logit of a token already generated.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit for each time it was generated.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output; 1 = off.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Draws depend on (seed, choice, position) only.
    pub seed: u64,
    /// `Some(n)`: report the chosen token's log-probability and the n most likely tokens.
    pub logprobs: Option<u32>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
        }
    }
}

/// When a sequence ends by itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Stops {
    /// At most this many generated tokens; resolved against the remaining context before submission.
    pub max_tokens: u32,
    /// Until then end tokens and stop token ids are not sampled.
    pub min_tokens: u32,
    /// Do not stop at the model's end tokens.
    pub ignore_eos: bool,
    pub stop_token_ids: Vec<u32>,
}

/// Namespace of the prefix cache, derived from the tenant: blocks are shared only within it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CacheSalt(pub [u8; 32]);

/// What a request uses of one of its engine's devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Use {
    pub device: DeviceNanos,
    pub kv: BlockNanos,
}

impl std::ops::Add for Use {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { device: self.device + other.device, kv: self.kv + other.kv }
    }
}

/// What a request's budgets let it use: the engine asks before its first step and after each one.
pub trait Allowance: std::fmt::Debug + Send + Sync {
    /// Whether it may use this in all without asking anybody.
    fn has(&self, used: Use) -> bool;

    /// Whether it may use `need` in all; `want`, which is more, is what it would like to be sure of.
    fn covers(&self, need: Use, want: Use) -> bool;
}

/// What an answer's text must look like: see [`Guide`].
pub trait Grammar: std::fmt::Debug + Send + Sync {
    /// A guide for a text that has not begun.
    fn guide(&self) -> Box<dyn Guide>;
}

/// A grammar at one place of one choice's text: says which tokens may come next.
pub trait Guide: std::fmt::Debug + Send {
    /// The tokens that may come next: token t is bit t % 32 of word t / 32; those past the last word may not. Never
    /// none. What is not known yet is waited for.
    ///
    /// # Errors
    /// When the grammar asks for more work than is allowed.
    fn allowed(&mut self) -> Result<&[u32], GuideError>;

    /// `token`, one of those allowed, was drawn: from now on what may follow it is looked for, on other threads.
    fn drew(&mut self, token: u32);
}

/// Why a guide cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GuideError(pub String);

/// How soon a request wants to run, and at which price: what APIs call its service tier. In the order in which those
/// that wait are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// Before all others.
    Priority,
    #[default]
    Default,
    /// When nobody of the tiers before it waits.
    Flex,
    /// When the device would be idle. Its sequences make room for all others, and take no part in steps that compute
    /// others' prompts.
    Batch,
}

impl Tier {
    pub const ALL: [Self; 4] = [Self::Priority, Self::Default, Self::Flex, Self::Batch];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Priority => "priority",
            Self::Default => "default",
            Self::Flex => "flex",
            Self::Batch => "batch",
        }
    }

    /// By its name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|tier| tier.as_str() == name)
    }
}

/// What is to be continued: one prompt or several, none of them empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompts(Arc<[Arc<[u32]>]>);

impl Prompts {
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn new(prompts: impl IntoIterator<Item = Vec<u32>>) -> Self {
        let prompts: Arc<[Arc<[u32]>]> = prompts.into_iter().map(Arc::from).collect();
        assert!(!prompts.is_empty(), "a request has a prompt; this is a bug");
        Self(prompts)
    }

    pub fn each(&self) -> impl ExactSizeIterator<Item = &[u32]> {
        self.0.iter().map(|prompt| &**prompt)
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Tokens of the longest.
    #[must_use]
    pub fn longest(&self) -> usize {
        self.each().map(<[u32]>::len).max().unwrap_or(0)
    }

    /// Tokens of all together.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.each().map(<[u32]>::len).sum()
    }
}

impl<T: Into<Arc<[u32]>>> From<T> for Prompts {
    fn from(prompt: T) -> Self {
        Self(Arc::from([prompt.into()]))
    }
}

impl FromIterator<u32> for Prompts {
    fn from_iter<I: IntoIterator<Item = u32>>(tokens: I) -> Self {
        tokens.into_iter().collect::<Arc<[u32]>>().into()
    }
}

/// How a prompt becomes one vector of length 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vectors {
    /// Of the hidden states behind the model's last norm. Only for engines that
    /// [can](crate::engine::EngineHandle::hidden_size).
    Pooled(Pooling),
    /// By the encoder beside the model: of engines that have one. Takes no blocks.
    Encoded,
}

/// What the engine is asked to run. One request has `choices` sequences, as many over each of its prompts.
#[derive(Debug, Clone)]
pub struct NewRequest {
    pub id: RequestId,
    pub ticket: Ticket,
    /// At least one token each; prompt + max_tokens fit the model's context (checked by the pipeline).
    pub prompt: Prompts,
    /// Of all prompts together: a multiple of their number, the first prompt's first.
    pub choices: u32,
    pub sampling: Sampling,
    pub stops: Stops,
    /// What each choice's text must look like. Comes with no `min_tokens` and not with `ignore_eos`, as a text that
    /// is complete must be able to end.
    pub grammar: Option<Arc<dyn Grammar>>,
    pub salt: CacheSalt,
    /// Report how likely each prompt's tokens were, as `sampling.logprobs` says: by [`Event::Prompt`]. Only for engines
    /// that [can](crate::engine::EngineHandle::scores_prompts).
    pub score_prompts: bool,
    /// Nothing is generated: each prompt is computed, and reported by [`Event::Vector`]. Comes with `max_tokens` 0, a
    /// choice over each prompt, and without a grammar or scores.
    pub vectors: Option<Vectors>,
    /// Whose share of the device it uses.
    pub tenant: Arc<str>,
    /// A budget that is spent makes it `Batch`, whatever it asked for.
    pub tier: Tier,
    /// `None`: no budget bounds what it uses.
    pub allowance: Option<Arc<dyn Allowance>>,
}

impl NewRequest {
    /// Choices over each prompt.
    #[must_use]
    pub fn choices_each(&self) -> u32 {
        self.choices / self.prompt.count() as u32
    }

    /// Which prompt a choice continues.
    #[must_use]
    pub fn prompt_index(&self, choice: u32) -> usize {
        (choice / self.choices_each()) as usize
    }

    /// The prompt that a choice continues.
    #[must_use]
    pub fn prompt_of(&self, choice: u32) -> &[u32] {
        &self.prompt.0[self.prompt_index(choice)]
    }
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Finish {
    /// An end token, a stop token id or a stop string.
    Stop,
    /// `max_tokens` or the context's end.
    Length,
    /// The client went away or the server drained past its deadline.
    Cancelled,
    /// A budget's lease could not be renewed.
    Budget,
    /// Our failure.
    Error,
}

impl Finish {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
            Self::Budget => "budget",
            Self::Error => "error",
        }
    }
}

/// Log-probabilities (natural log, of the distribution before temperature and filters) at one position.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    pub chosen: f32,
    /// Most likely first; ties to the lower id.
    pub top: Vec<(u32, f32)>,
}

/// What the engine tells the pipeline about a request, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A generated token. End tokens that stop the sequence are not reported as tokens.
    Token { choice: u32, token: u32, logprobs: Option<TokenLogprobs> },
    /// How likely more of a prompt's tokens were, from its second one on. Comes with the first of its choices, before
    /// that one's tokens.
    Prompt { choice: u32, scores: Vec<TokenLogprobs> },
    /// What the choice's prompt comes to; before its end.
    Vector { choice: u32, vector: Vec<f32> },
    /// The choice has ended; each choice ends exactly once.
    Finished { choice: u32, finish: Finish },
}

/// What a request's cost is attributed to, beside its key. `User` is a field of its own on receipts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "&'static str")]
pub enum Tag {
    Team,
    Feature,
    Environment,
    User,
    CostCenter,
    /// An agent's whole run.
    Task,
}

impl Tag {
    pub const ALL: [Self; 6] =
        [Self::Team, Self::Feature, Self::Environment, Self::User, Self::CostCenter, Self::Task];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Team => "team",
            Self::Feature => "feature",
            Self::Environment => "environment",
            Self::User => "user",
            Self::CostCenter => "cost_center",
            Self::Task => "task",
        }
    }
}

impl From<Tag> for &'static str {
    fn from(tag: Tag) -> Self {
        tag.as_str()
    }
}

impl FromStr for Tag {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|tag| tag.as_str() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::as_str).join(", ");
            format!("`{name}` is no tag; choose from {names}")
        })
    }
}

impl TryFrom<String> for Tag {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        name.parse()
    }
}
