//! Answers in Anthropic's shape: the message, whole or in events.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::http::error::ApiError;
use crate::http::openai::call_id;
use crate::http::telling::{End, SoFar, Teller, Whole};
use crate::ledger::Receipt;
use crate::pipeline::{App, Scored};
use crate::request::Finish;
use crate::text::turn::Part;
use crate::units::RequestId;

/// Tells one message.
pub(super) struct Message {
    app: Arc<App>,
    request: RequestId,
    /// Blocks that have begun; the last one is open.
    blocks: usize,
    open: Option<Kind>,
    calls: u32,
    /// Waits for the usage that is told with it.
    end: Option<End>,
}

/// What a block holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Thinking,
    Text,
    ToolUse,
}

impl Message {
    pub(super) fn new(app: &Arc<App>, request: &RequestId) -> Self {
        let (app, request) = (Arc::clone(app), request.clone());
        Self { app, request, blocks: 0, open: None, calls: 0, end: None }
    }

    fn message(&self, content: Vec<Value>, end: Option<&End>, usage: Value) -> Value {
        json!({
            "id": format!("msg_{}", self.request),
            "type": "message",
            "role": "assistant",
            "model": self.app.served().id,
            "content": content,
            "stop_reason": end.map(|end| stop_reason(end, self.calls > 0)),
            "stop_sequence": end.and_then(|end| end.stop.as_deref()),
            "usage": usage,
        })
    }

    fn tool_use(&self, index: u32, name: &str, input: Value) -> Value {
        let id = call_id(&self.app, &self.request, "toolu_", 0, index as usize);
        json!({"type": "tool_use", "id": id, "name": name, "input": input})
    }

    /// The blocks of a whole answer, in the order they were said.
    fn content(&mut self, parts: Vec<Part>) -> Vec<Value> {
        let mut blocks = Vec::new();
        for part in parts {
            match part {
                Part::Thought(thought) => {
                    blocks.push(json!({"type": "thinking", "thinking": thought, "signature": ""}));
                }
                Part::Text(text) => blocks.push(json!({"type": "text", "text": text})),
                Part::Call { index, name } => {
                    self.calls += 1;
                    blocks.push(self.tool_use(index, &name, json!({})));
                }
                Part::Arguments { text, .. } => {
                    let call = blocks.last_mut().expect("arguments follow their call");
                    call["input"] = input(text);
                }
            }
        }
        blocks
    }

    /// Goes on with a block of this kind: the open one, or a new one.
    fn within(&mut self, kind: Kind, block: impl FnOnce(&Self) -> Value, told: &mut Vec<Bytes>) -> usize {
        if self.open != Some(kind) || kind == Kind::ToolUse {
            self.close(told);
            let begun = json!({
                "type": "content_block_start", "index": self.blocks, "content_block": block(self),
            });
            told.push(event(&begun));
            self.blocks += 1;
            self.open = Some(kind);
        }
        self.blocks - 1
    }

    fn close(&mut self, told: &mut Vec<Bytes>) {
        if self.open.take().is_some() {
            told.push(event(&json!({"type": "content_block_stop", "index": self.blocks - 1})));
        }
    }

    fn part(&mut self, part: Part, told: &mut Vec<Bytes>) {
        let (index, delta) = match part {
            Part::Thought(thinking) => {
                let empty = |_: &Self| json!({"type": "thinking", "thinking": "", "signature": ""});
                let index = self.within(Kind::Thinking, empty, told);
                (index, json!({"type": "thinking_delta", "thinking": thinking}))
            }
            Part::Text(text) => {
                let index = self.within(Kind::Text, |_| json!({"type": "text", "text": ""}), told);
                (index, json!({"type": "text_delta", "text": text}))
            }
            Part::Call { index, name } => {
                self.calls += 1;
                let block = |message: &Self| message.tool_use(index, &name, json!({}));
                (
                    self.within(Kind::ToolUse, block, told),
                    json!({"type": "input_json_delta", "partial_json": ""}),
                )
            }
            Part::Arguments { text, .. } => {
                (self.blocks - 1, json!({"type": "input_json_delta", "partial_json": text}))
            }
        };
        told.push(event(&json!({"type": "content_block_delta", "index": index, "delta": delta})));
    }
}

impl Teller for Message {
    const KEEP_ALIVE: &'static str = "event: ping\ndata: {\"type\":\"ping\"}\n\n";

    fn whole(&mut self, whole: Whole, receipt: &Receipt) -> Value {
        let choice = whole.choices.into_iter().next().expect("a message is one choice");
        let content = self.content(choice.parts);
        self.message(content, choice.end.as_ref(), usage(receipt))
    }

    fn begins(&mut self, so_far: SoFar) -> Vec<Bytes> {
        let usage = json!({
            "input_tokens": so_far.prompt,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
        });
        let message = self.message(Vec::new(), None, usage);
        let begins = event(&json!({"type": "message_start", "message": message}));
        vec![begins, Bytes::from_static(Self::KEEP_ALIVE.as_bytes())]
    }

    fn parts(&mut self, _: u32, parts: Vec<Part>, _: &[Scored], _: SoFar) -> Vec<Bytes> {
        let mut told = Vec::new();
        for part in parts {
            self.part(part, &mut told);
        }
        told
    }

    fn finishes(&mut self, _: u32, end: End, _: SoFar) -> Vec<Bytes> {
        let mut told = Vec::new();
        // A failure is told where it is, within its block.
        if !matches!(end.finish, Finish::Error | Finish::Cancelled) {
            self.close(&mut told);
        }
        self.end = Some(end);
        told
    }

    fn ends(&mut self, receipt: &Receipt) -> Vec<Bytes> {
        let end = self.end.as_ref().expect("a choice ends before its receipt");
        let delta =
            json!({"stop_reason": stop_reason(end, self.calls > 0), "stop_sequence": end.stop.as_deref()});
        let last = json!({"type": "message_delta", "delta": delta, "usage": usage(receipt)});
        vec![event(&last), event(&json!({"type": "message_stop"}))]
    }

    fn fails(&mut self, error: ApiError) -> Vec<Bytes> {
        vec![event(&error.into_anthropic())]
    }

    fn broke() -> Bytes {
        event(&ApiError::Bug.into_anthropic())
    }
}

/// A call's arguments as the object that Anthropic's clients want. What the model did not write to its end is no JSON;
/// it is kept as text, under a name of its own.
fn input(text: String) -> Value {
    match serde_json::from_str(&text) {
        Ok(Value::Object(input)) => Value::Object(input),
        _ => json!({"incomplete_json": text}),
    }
}

/// A budget's end is told as `max_tokens`; the receipt's status tells it apart.
fn stop_reason(end: &End, called: bool) -> &'static str {
    match end.finish {
        Finish::Length | Finish::Budget => "max_tokens",
        _ if end.stop.is_some() => "stop_sequence",
        _ if called => "tool_use",
        _ => "end_turn",
    }
}

fn usage(receipt: &Receipt) -> Value {
    let tokens = &receipt.usage.tokens;
    json!({
        "input_tokens": tokens.prompt - tokens.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": tokens.cached,
        "output_tokens": tokens.completion,
        "service_tier": "standard",
        "cost": receipt.total().as_f64(),
        "obol": receipt.to_json(),
    })
}

/// An event; its name is its type.
fn event(value: &Value) -> Bytes {
    let kind = value["type"].as_str().expect("an event has a type");
    Bytes::from(format!("event: {kind}\ndata: {value}\n\n"))
}
