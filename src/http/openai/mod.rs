//! OpenAI's chat completions and completions: bodies in, bodies and chunks out.

mod chat;
mod completions;
mod form;
mod logprobs;
mod params;
mod reply;
mod tools;

pub(super) use chat::{messages_of, parse as parse_chat};
pub(super) use completions::{parse as parse_completion, tokens_at};
pub(super) use params::{Delivery, Rules};
pub(super) use reply::{Choice, Echo, Reply, Shape, best, usage, usage_so_far};
