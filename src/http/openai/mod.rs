//! OpenAI's chat completions and completions: bodies in, bodies and chunks out.

mod chat;
mod completions;
mod form;
mod logprobs;
mod params;
mod reply;
mod stream;
mod tools;

pub(super) use chat::{messages_of, parse as parse_chat};
pub(super) use completions::{parse as parse_completion, prompts_of, tokens_at};
pub(super) use form::{read_beside as form_beside, schema_at};
pub(super) use logprobs::chat as chat_logprobs;
pub(super) use params::{
    Common, Delivery, MaxTokens, Rules, TOP_LOGPROBS_MAX, metadata, strings_to_stop_at, tier, user,
};
use reply::{Echo, best, usage, usage_so_far};
pub(super) use reply::{Reply, Shape, call_id, usage_of_inputs};
pub(super) use stream::Chunks;
pub(super) use tools::{
    Choice as ToolChoice, Tools, decide as decide_tools, function_of, name_at as tool_name,
};
