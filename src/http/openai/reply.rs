//! Answers in OpenAI's shapes: whole bodies, stream chunks, and the usage that both end with.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::logprobs;
use crate::http::telling::{Choice, SoFar};
use crate::ledger::Receipt;
use crate::pipeline::{App, Ask, Scored};
use crate::request::{Finish, Prompts, Tier, TokenLogprobs};
use crate::text::turn::{CallFormat, Part};
use crate::units::RequestId;

/// Which of the two endpoints is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    Chat,
    Completion,
}

/// What was said in a turn.
#[derive(Debug, Default)]
struct Said {
    thought: Option<String>,
    text: String,
    calls: Vec<Called>,
}

#[derive(Debug)]
struct Called {
    name: String,
    /// A JSON object's text, as the model wrote it.
    arguments: String,
}

/// Of each `each` choices the `shown` most likely ones, by the mean log-probability of their tokens, best first.
pub(crate) fn best(choices: Vec<Choice>, each: u32, shown: u32) -> Vec<Choice> {
    let mean = |choice: &Choice| {
        let sum: f32 = choice.scored.iter().map(|scored| scored.logprobs.chosen).sum();
        // An answer without a token is as likely as its end, which is not scored.
        if choice.scored.is_empty() { 0.0 } else { sum / choice.scored.len() as f32 }
    };
    let mut choices = choices.into_iter();
    let mut kept = Vec::new();
    while choices.len() > 0 {
        let mut group: Vec<Choice> = choices.by_ref().take(each as usize).collect();
        group.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
        group.truncate(shown as usize);
        kept.extend(group);
    }
    kept
}

impl Said {
    fn of(parts: Vec<Part>) -> Self {
        let mut said = Self::default();
        for part in parts {
            match part {
                Part::Thought(more) => said.thought.get_or_insert_default().push_str(&more),
                Part::Text(more) => said.text.push_str(&more),
                Part::Call { name, .. } => said.calls.push(Called { name, arguments: String::new() }),
                Part::Arguments { index, text } => said.calls[index as usize].arguments.push_str(&text),
            }
        }
        said
    }
}

/// What all parts of one answer have in common.
pub(crate) struct Reply {
    app: Arc<App>,
    shape: Shape,
    id: String,
    request: RequestId,
    tier: Tier,
    created: u64,
    /// Whether log-probabilities were asked for.
    logprobs: bool,
    /// Each choice's text begins with its prompt.
    echo: Option<Echo>,
}

/// The prompts, as texts begin with them.
#[derive(Debug)]
pub(crate) struct Echo {
    /// Choices that are shown of each.
    pub(crate) each: u32,
    pub(crate) texts: Vec<String>,
    pub(crate) prompts: Prompts,
    /// How likely the tokens of each were, from its second one on, where that was asked for.
    pub(crate) scores: Vec<Vec<TokenLogprobs>>,
}

impl Echo {
    fn prompt(&self, choice: usize) -> usize {
        choice / self.each as usize
    }
}

impl Reply {
    pub(crate) fn new(app: &Arc<App>, shape: Shape, ask: &Ask, logprobs: bool) -> Self {
        let request = &ask.origin.request;
        let prefix = match shape {
            Shape::Chat => "chatcmpl",
            Shape::Completion => "cmpl",
        };
        Self {
            app: Arc::clone(app),
            shape,
            id: format!("{prefix}-{request}"),
            request: request.clone(),
            tier: ask.tier,
            created: app.clock().wall().0 / 1_000_000_000,
            logprobs,
            echo: None,
        }
    }

    /// From now on texts begin with their prompts.
    pub(crate) fn echo(&mut self, echo: Echo) {
        self.echo = Some(echo);
    }

    /// How likely each prompt's tokens were.
    pub(crate) fn score(&mut self, scores: Vec<Vec<TokenLogprobs>>) {
        if let Some(echo) = &mut self.echo {
            echo.scores = scores;
        }
    }

    fn echoed(&self, choice: usize, text: &str) -> String {
        let echo = self.echo.as_ref();
        format!("{}{text}", echo.map_or("", |echo| echo.texts[echo.prompt(choice)].as_str()))
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
        let logprobs = match &self.echo {
            Some(echo) if self.logprobs => {
                let at = echo.prompt(index);
                let prompt = echo.prompts.each().nth(at).expect("each choice has a prompt");
                let begins = echo.texts[at].chars().count();
                logprobs::echoed(self.app.tokenizer(), prompt, &echo.scores[at], begins, &choice.scored)
            }
            _ => self.logprobs_of(&choice.scored),
        };
        let Said { thought, text, calls } = Said::of(choice.parts);
        let calls_made = !calls.is_empty();
        let mut value = match self.shape {
            Shape::Chat => {
                let content = if calls_made && text.is_empty() { Value::Null } else { json!(text) };
                let mut message = json!({"role": "assistant", "content": content, "refusal": null});
                if let Some(thought) = thought {
                    message["reasoning_content"] = json!(thought);
                }
                if calls_made {
                    let calls = calls.into_iter().enumerate().map(|(at, call)| {
                        json!({
                            "id": self.call_id(index, at),
                            "type": "function",
                            "function": {"name": call.name, "arguments": call.arguments},
                        })
                    });
                    message["tool_calls"] = Value::Array(calls.collect());
                }
                json!({"index": index, "message": message, "logprobs": logprobs})
            }
            Shape::Completion => {
                json!({"index": index, "text": self.echoed(index, &text), "logprobs": logprobs})
            }
        };
        finish_of(&mut value, choice.end.map(|end| end.finish), calls_made);
        value
    }

    fn call_id(&self, choice: usize, at: usize) -> String {
        call_id(&self.app, &self.request, "call_", choice, at)
    }

    /// A chunk with another part of a choice. The first of a chat's choice tells the role.
    pub(crate) fn part_chunk(
        &self,
        index: u32,
        first: bool,
        part: &Part,
        scored: &[Scored],
    ) -> Map<String, Value> {
        let logprobs = if scored.is_empty() { Value::Null } else { self.logprobs_of(scored) };
        let mut choice = match (self.shape, part) {
            (Shape::Completion, Part::Text(text)) if first => {
                json!({"index": index, "text": self.echoed(index as usize, text)})
            }
            (Shape::Completion, Part::Text(text)) => json!({"index": index, "text": text}),
            (Shape::Completion, _) => unreachable!("a completion is text"),
            (Shape::Chat, part) => {
                let mut delta = if first { json!({"role": "assistant"}) } else { json!({}) };
                let (name, value) = self.delta(index, part);
                delta[name] = value;
                json!({"index": index, "delta": delta})
            }
        };
        choice["logprobs"] = logprobs;
        finish_of(&mut choice, None, false);
        self.chunk(vec![choice])
    }

    fn delta(&self, choice: u32, part: &Part) -> (&'static str, Value) {
        match part {
            Part::Text(text) => ("content", json!(text)),
            Part::Thought(text) => ("reasoning_content", json!(text)),
            Part::Call { index, name } => {
                let call = json!({
                    "index": index,
                    "id": self.call_id(choice as usize, *index as usize),
                    "type": "function",
                    "function": {"name": name, "arguments": ""},
                });
                ("tool_calls", json!([call]))
            }
            Part::Arguments { index, text } => {
                ("tool_calls", json!([{"index": index, "function": {"arguments": text}}]))
            }
        }
    }

    /// The chunk that ends a choice, which may have made calls.
    pub(crate) fn finish_chunk(&self, index: u32, finish: Finish, called: bool) -> Map<String, Value> {
        let mut choice = match self.shape {
            Shape::Chat => json!({"index": index, "delta": {}, "logprobs": null}),
            Shape::Completion => json!({"index": index, "text": "", "logprobs": null}),
        };
        finish_of(&mut choice, Some(finish), called);
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
        frame.insert("service_tier".into(), json!(self.tier.as_str()));
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

/// Of call `at` of a choice; the same wherever it is named. Mistral's templates take nine letters and digits.
pub(crate) fn call_id(app: &App, request: &RequestId, prefix: &str, choice: usize, at: usize) -> String {
    let hash = blake3::hash(format!("{request} {choice} {at}").as_bytes()).to_hex();
    match app.dialect() {
        Some(dialect) if dialect.calls == CallFormat::Mistral => hash[..9].to_owned(),
        _ => format!("{prefix}{}", &hash[..24]),
    }
}

/// Sets `finish_reason`, of a choice that made calls or did not. A budget's end is OpenAI's `length`; `stop_reason` tells it apart.
fn finish_of(choice: &mut Value, finish: Option<Finish>, called: bool) {
    choice["finish_reason"] = match finish {
        Some(Finish::Length | Finish::Budget) => json!("length"),
        Some(Finish::Stop) if called => json!("tool_calls"),
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

/// The receipt as `usage` where nothing is generated.
pub(crate) fn usage_of_inputs(receipt: &Receipt) -> Value {
    let tokens = &receipt.usage.tokens;
    json!({
        "prompt_tokens": tokens.prompt,
        "total_tokens": tokens.prompt,
        "prompt_tokens_details": {"cached_tokens": tokens.cached},
        "cost": receipt.total().as_f64(),
        "obol": receipt.to_json(),
    })
}

/// Token counts so far, for `continuous_usage_stats`.
pub(super) fn usage_so_far(so_far: SoFar) -> Value {
    let SoFar { prompt, completion } = so_far;
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt as u64 + completion,
    })
}
