//! Answers in OpenAI's shapes: whole bodies, stream chunks, and the usage that both end with.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::logprobs;
use crate::ledger::Receipt;
use crate::pipeline::{App, Scored};
use crate::request::Finish;
use crate::units::RequestId;

/// Which of the two endpoints is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    Chat,
    Completion,
}

/// One choice, whole.
#[derive(Debug, Default)]
pub(crate) struct Choice {
    pub(crate) text: String,
    pub(crate) scored: Vec<Scored>,
    pub(crate) finish: Option<Finish>,
}

/// What all parts of one answer have in common.
pub(crate) struct Reply {
    app: Arc<App>,
    shape: Shape,
    id: String,
    created: u64,
    /// Whether log-probabilities were asked for.
    logprobs: bool,
}

impl Reply {
    pub(crate) fn new(app: &Arc<App>, shape: Shape, request: &RequestId, logprobs: bool) -> Self {
        let prefix = match shape {
            Shape::Chat => "chatcmpl",
            Shape::Completion => "cmpl",
        };
        Self {
            app: Arc::clone(app),
            shape,
            id: format!("{prefix}-{request}"),
            created: app.clock().wall().0 / 1_000_000_000,
            logprobs,
        }
    }

    /// The whole answer.
    pub(crate) fn body(&self, choices: Vec<Choice>, receipt: &Receipt) -> Value {
        let object = match self.shape {
            Shape::Chat => "chat.completion",
            Shape::Completion => "text_completion",
        };
        let choices = choices.into_iter().enumerate().map(|(index, choice)| self.choice(index, choice));
        let mut body = self.frame(object, choices.collect());
        body.insert("usage".into(), usage(receipt));
        Value::Object(body)
    }

    fn choice(&self, index: usize, choice: Choice) -> Value {
        let logprobs = self.logprobs_of(&choice.scored);
        let mut value = match self.shape {
            Shape::Chat => json!({
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": null},
                "logprobs": logprobs,
            }),
            Shape::Completion => json!({"index": index, "text": choice.text, "logprobs": logprobs}),
        };
        finish_of(&mut value, choice.finish);
        value
    }

    /// A chunk with more text of a choice. The first of a chat's choice tells the role.
    pub(crate) fn text_chunk(
        &self,
        index: u32,
        first: bool,
        text: &str,
        scored: &[Scored],
    ) -> Map<String, Value> {
        let logprobs = if scored.is_empty() { Value::Null } else { self.logprobs_of(scored) };
        let mut choice = match (self.shape, first) {
            (Shape::Chat, true) => json!({"index": index, "delta": {"role": "assistant", "content": text}}),
            (Shape::Chat, false) => json!({"index": index, "delta": {"content": text}}),
            (Shape::Completion, _) => json!({"index": index, "text": text}),
        };
        choice["logprobs"] = logprobs;
        finish_of(&mut choice, None);
        self.chunk(vec![choice])
    }

    /// The chunk that ends a choice.
    pub(crate) fn finish_chunk(&self, index: u32, finish: Finish) -> Map<String, Value> {
        let mut choice = match self.shape {
            Shape::Chat => json!({"index": index, "delta": {}, "logprobs": null}),
            Shape::Completion => json!({"index": index, "text": "", "logprobs": null}),
        };
        finish_of(&mut choice, Some(finish));
        self.chunk(vec![choice])
    }

    /// A chunk of the stream with these choices.
    pub(crate) fn chunk(&self, choices: Vec<Value>) -> Map<String, Value> {
        self.frame(
            match self.shape {
                Shape::Chat => "chat.completion.chunk",
                Shape::Completion => "text_completion",
            },
            choices,
        )
    }

    fn frame(&self, object: &str, choices: Vec<Value>) -> Map<String, Value> {
        let served = self.app.served();
        let mut frame = Map::new();
        frame.insert("id".into(), json!(self.id));
        frame.insert("object".into(), json!(object));
        frame.insert("created".into(), json!(self.created));
        frame.insert("model".into(), json!(served.id));
        frame.insert("system_fingerprint".into(), json!(format!("fp_{:.12}", served.fingerprint)));
        frame.insert("choices".into(), Value::Array(choices));
        frame
    }

    fn logprobs_of(&self, scored: &[Scored]) -> Value {
        match (self.logprobs, self.shape) {
            (false, _) => Value::Null,
            (true, Shape::Chat) => logprobs::chat(self.app.tokenizer(), scored),
            (true, Shape::Completion) => logprobs::completion(self.app.tokenizer(), scored),
        }
    }
}

/// Sets `finish_reason`. A budget's end is OpenAI's `length`; `stop_reason` tells it apart.
fn finish_of(choice: &mut Value, finish: Option<Finish>) {
    choice["finish_reason"] = match finish {
        Some(Finish::Length | Finish::Budget) => json!("length"),
        Some(finish) => json!(finish.as_str()),
        None => Value::Null,
    };
    if finish == Some(Finish::Budget) {
        choice["stop_reason"] = json!("budget");
    }
}

/// The receipt as `usage`: OpenAI's fields, then the cost and the receipt itself.
pub(crate) fn usage(receipt: &Receipt) -> Value {
    let tokens = &receipt.usage.tokens;
    json!({
        "prompt_tokens": tokens.prompt,
        "completion_tokens": tokens.completion,
        "total_tokens": tokens.prompt + tokens.completion,
        "prompt_tokens_details": {"cached_tokens": tokens.cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
        "cost": receipt.total().as_f64(),
        "obol": receipt.to_json(),
    })
}

/// Token counts so far, for `continuous_usage_stats`.
pub(crate) fn usage_so_far(prompt: usize, completion: u64) -> Value {
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt as u64 + completion,
    })
}
