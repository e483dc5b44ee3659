//! Answers in the shape of OpenAI's responses: the object, whole or in events.
//!
//! Invariant: what the events tell, put together, is the object that the last of them has.

use std::mem;
use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::kept::Keeper;
use crate::http::error::ApiError;
use crate::http::openai::{call_id, chat_logprobs};
use crate::http::telling::{End, SoFar, Teller, Thinking, Whole};
use crate::ledger::Receipt;
use crate::pipeline::{App, Scored};
use crate::request::Finish;
use crate::text::turn::Part;
use crate::units::{RequestId, UnixNanos};

/// Tells one response.
pub(super) struct Response {
    app: Arc<App>,
    request: RequestId,
    created: UnixNanos,
    /// What it repeats of the request.
    settings: Map<String, Value>,
    /// It can be read again, once it is complete.
    stored: bool,
    /// Until it is kept, if it is.
    keeper: Option<Keeper>,
    /// The last one is open until the answer ends or another begins.
    items: Vec<Item>,
    thinking: Thinking,
    end: Option<End>,
    completed: Option<UnixNanos>,
    /// Events told so far.
    told: u64,
}

/// A part of the output as it grows.
#[derive(Debug)]
struct Item {
    id: String,
    kind: Kind,
    text: String,
    /// Of its tokens, where they were asked for.
    logprobs: Vec<Value>,
    status: Status,
}

#[derive(Debug, PartialEq, Eq)]
enum Kind {
    Thought,
    Message,
    Call { call_id: String, name: String },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    InProgress,
    Completed,
    Incomplete,
}

impl Status {
    fn as_str(self) -> &'static str {
        match self {
            Self::InProgress => "in_progress",
            Self::Completed => "completed",
            Self::Incomplete => "incomplete",
        }
    }

    /// Of what ended so. A budget's end is told as one of `max_output_tokens`; the receipt's status tells it apart.
    fn of(end: &End) -> Self {
        match end.finish {
            Finish::Stop => Self::Completed,
            _ => Self::Incomplete,
        }
    }
}

impl Kind {
    fn prefix(&self) -> &'static str {
        match self {
            Self::Thought => "rs",
            Self::Message => "msg",
            Self::Call { .. } => "fc",
        }
    }
}

impl Item {
    /// As it is now; one that has just begun has no content.
    fn to_json(&self) -> Value {
        let (id, status) = (&self.id, self.status.as_str());
        let begun = self.status == Status::InProgress && self.text.is_empty();
        let content = if begun { json!([]) } else { json!([self.part()]) };
        match &self.kind {
            Kind::Thought => {
                json!({"id": id, "type": "reasoning", "status": status, "summary": [], "content": content})
            }
            Kind::Message => json!({
                "id": id, "type": "message", "status": status, "role": "assistant", "content": content,
            }),
            Kind::Call { call_id, name } => json!({
                "id": id,
                "type": "function_call",
                "status": status,
                "call_id": call_id,
                "name": name,
                "arguments": self.text,
            }),
        }
    }

    /// What its content is made of.
    fn part(&self) -> Value {
        match self.kind {
            Kind::Thought => json!({"type": "reasoning_text", "text": self.text}),
            _ => {
                json!({"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs})
            }
        }
    }
}

impl Response {
    pub(super) fn new(
        app: &Arc<App>,
        request: &RequestId,
        created: UnixNanos,
        settings: Map<String, Value>,
        keeper: Option<Keeper>,
    ) -> Self {
        Self {
            app: Arc::clone(app),
            request: request.clone(),
            created,
            settings,
            stored: keeper.is_some(),
            keeper,
            items: Vec::new(),
            thinking: Thinking::default(),
            end: None,
            completed: None,
            told: 0,
        }
    }

    /// The object as it is now.
    fn object(&self, status: &str, error: Value, usage: Value) -> Value {
        let mut object = self.settings.clone();
        let incomplete =
            if status == "incomplete" { json!({"reason": "max_output_tokens"}) } else { Value::Null };
        let output: Vec<Value> = self.items.iter().map(Item::to_json).collect();
        for (name, value) in [
            ("id", json!(id_of(&self.request))),
            ("object", json!("response")),
            ("created_at", json!(seconds(self.created))),
            ("completed_at", json!(self.completed.map(seconds))),
            ("status", json!(status)),
            ("error", error),
            ("incomplete_details", incomplete),
            ("model", json!(self.app.served().id)),
            ("output", Value::Array(output)),
            ("store", json!(self.stored)),
            ("usage", usage),
        ] {
            object.insert(name.into(), value);
        }
        Value::Object(object)
    }

    /// The object as it is in the end.
    fn whole_object(&self, receipt: &Receipt) -> Value {
        let end = self.end.as_ref().expect("a choice ends before its receipt");
        self.object(Status::of(end).as_str(), Value::Null, usage(receipt, self.thinking))
    }

    /// An event, named as its type says.
    fn event(&mut self, kind: &str, mut event: Value, told: &mut Vec<Bytes>) {
        event["type"] = json!(kind);
        event["sequence_number"] = json!(self.told);
        self.told += 1;
        told.push(named(kind, &event));
    }

    /// An event about the item that is open.
    fn about(&mut self, kind: &str, mut event: Value, told: &mut Vec<Bytes>) {
        let at = self.items.len() - 1;
        event["output_index"] = json!(at);
        event["item_id"] = json!(self.items[at].id);
        if !matches!(self.items[at].kind, Kind::Call { .. }) {
            event["content_index"] = json!(0);
        }
        self.event(kind, event, told);
    }

    /// Goes on with an item of this kind: the open one, or a new one.
    fn within(&mut self, kind: Kind, told: &mut Vec<Bytes>) {
        if self.items.last().is_some_and(|open| open.kind == kind) {
            return;
        }
        self.close(Status::Completed, told);
        let at = self.items.len();
        let id = format!("{}_{}_{at}", kind.prefix(), self.request);
        let has_parts = !matches!(kind, Kind::Call { .. });
        self.items.push(Item {
            id,
            kind,
            text: String::new(),
            logprobs: Vec::new(),
            status: Status::InProgress,
        });
        let begun = json!({"output_index": at, "item": self.items[at].to_json()});
        self.event("response.output_item.added", begun, told);
        if has_parts {
            let part = self.items[at].part();
            self.about("response.content_part.added", json!({"part": part}), told);
        }
    }

    /// Ends the open item, if there is one.
    fn close(&mut self, status: Status, told: &mut Vec<Bytes>) {
        let Some(open) = self.items.last_mut() else { return };
        open.status = status;
        let (text, part, item) = (json!(open.text), open.part(), open.to_json());
        match &open.kind {
            Kind::Call { name, .. } => {
                let done = json!({"name": name, "arguments": text});
                self.about("response.function_call_arguments.done", done, told);
            }
            Kind::Thought => {
                self.about("response.reasoning_text.done", json!({"text": text}), told);
                self.about("response.content_part.done", json!({"part": part}), told);
            }
            Kind::Message => {
                let done = json!({"text": text, "logprobs": part["logprobs"]});
                self.about("response.output_text.done", done, told);
                self.about("response.content_part.done", json!({"part": part}), told);
            }
        }
        let done = json!({"output_index": self.items.len() - 1, "item": item});
        self.event("response.output_item.done", done, told);
    }

    /// `scored`: the tokens of a text.
    fn part(&mut self, part: Part, scored: &[Scored], told: &mut Vec<Bytes>) {
        match part {
            Part::Thought(text) => {
                self.within(Kind::Thought, told);
                self.grow(&text, None, "response.reasoning_text.delta", told);
            }
            Part::Text(text) => {
                self.within(Kind::Message, told);
                let logprobs = match chat_logprobs(self.app.tokenizer(), scored)["content"].take() {
                    Value::Array(logprobs) => logprobs,
                    _ => Vec::new(),
                };
                self.grow(&text, Some(logprobs), "response.output_text.delta", told);
            }
            Part::Call { index, name } => {
                let call_id = call_id(&self.app, &self.request, "call_", 0, index as usize);
                self.within(Kind::Call { call_id, name }, told);
            }
            Part::Arguments { text, .. } => {
                self.grow(&text, None, "response.function_call_arguments.delta", told);
            }
        }
    }

    /// More of the open item.
    fn grow(&mut self, text: &str, logprobs: Option<Vec<Value>>, kind: &str, told: &mut Vec<Bytes>) {
        let open = self.items.last_mut().expect("an item is open");
        open.text.push_str(text);
        let mut event = json!({"delta": text});
        if let Some(logprobs) = logprobs {
            event["logprobs"] = json!(logprobs);
            open.logprobs.extend(logprobs);
        }
        self.about(kind, event, told);
    }

    /// All is said.
    fn finish(&mut self, end: End, told: &mut Vec<Bytes>) {
        // A failure is told where it is, within its item.
        if !matches!(end.finish, Finish::Error | Finish::Cancelled) {
            if self.items.is_empty() {
                self.within(Kind::Message, told);
            }
            self.close(Status::of(&end), told);
            self.completed = Some(self.app.clock().wall());
        }
        self.end = Some(end);
    }
}

impl Teller for Response {
    const KEEP_ALIVE: &'static str = ": keep-alive\n\n";

    fn whole(&mut self, whole: Whole, receipt: &Receipt) -> Value {
        let choice = whole.choices.into_iter().next().expect("a response is one choice");
        self.thinking = choice.thinking;
        let (mut unheard, mut scored) = (Vec::new(), choice.scored.as_slice());
        for part in choice.parts {
            self.part(part, mem::take(&mut scored), &mut unheard);
        }
        self.finish(choice.end.expect("a whole answer has ended"), &mut unheard);
        self.whole_object(receipt)
    }

    fn keep(&mut self, receipt: &Receipt) -> impl Future<Output = Result<(), ApiError>> + Send {
        let kept = self.keeper.take().map(|keeper| {
            let object = self.whole_object(receipt);
            keeper.keep(id_of(&self.request), self.created, &object)
        });
        async move {
            match kept {
                Some(kept) => kept.await,
                None => Ok(()),
            }
        }
    }

    fn begins(&mut self, _: SoFar) -> Vec<Bytes> {
        let mut told = Vec::new();
        let object = self.object("in_progress", Value::Null, Value::Null);
        self.event("response.created", json!({"response": object}), &mut told);
        self.event("response.in_progress", json!({"response": object}), &mut told);
        told
    }

    /// The tokens of a text go with its first part, or with an empty one while its characters are held back.
    fn parts(&mut self, _: u32, mut parts: Vec<Part>, mut scored: &[Scored], so_far: SoFar) -> Vec<Bytes> {
        self.thinking.hears(&parts, so_far.completion);
        if parts.is_empty() && !scored.is_empty() {
            parts.push(Part::Text(String::new()));
        }
        let mut told = Vec::new();
        for part in parts {
            self.part(part, mem::take(&mut scored), &mut told);
        }
        told
    }

    fn finishes(&mut self, _: u32, end: End, _: SoFar) -> Vec<Bytes> {
        let mut told = Vec::new();
        self.finish(end, &mut told);
        told
    }

    fn ends(&mut self, receipt: &Receipt) -> Vec<Bytes> {
        let mut told = Vec::new();
        let object = self.whole_object(receipt);
        let kind = format!("response.{}", object["status"].as_str().expect("it has a status"));
        self.event(&kind, json!({"response": object}), &mut told);
        told
    }

    fn fails(&mut self, error: ApiError) -> Vec<Bytes> {
        let error = error.into_object()["error"].take();
        // Of the codes that the API has for it, one fits.
        let error = json!({"code": "server_error", "message": error["message"]});
        if let Some(open) = self.items.last_mut().filter(|open| open.status == Status::InProgress) {
            open.status = Status::Incomplete;
        }
        let mut told = Vec::new();
        let object = self.object("failed", error, Value::Null);
        self.event("response.failed", json!({"response": object}), &mut told);
        told
    }

    fn broke() -> Bytes {
        let error = ApiError::Bug.into_object()["error"].take();
        let event = json!({
            "type": "error",
            "sequence_number": 0,
            "code": "server_error",
            "message": error["message"],
            "param": null,
        });
        named("error", &event)
    }
}

/// What finds a response again.
fn id_of(request: &RequestId) -> String {
    format!("resp_{request}")
}

fn seconds(at: UnixNanos) -> u64 {
    at.0 / 1_000_000_000
}

fn usage(receipt: &Receipt, thinking: Thinking) -> Value {
    let tokens = &receipt.usage.tokens;
    json!({
        "input_tokens": tokens.prompt,
        "input_tokens_details": {"cached_tokens": tokens.cached, "cache_write_tokens": 0},
        "output_tokens": tokens.completion,
        "output_tokens_details": {"reasoning_tokens": thinking.tokens(tokens.completion)},
        "total_tokens": tokens.prompt + tokens.completion,
        "cost": receipt.total().as_f64(),
        "obol": receipt.to_json(),
    })
}

fn named(kind: &str, event: &Value) -> Bytes {
    Bytes::from(format!("event: {kind}\ndata: {event}\n\n"))
}
