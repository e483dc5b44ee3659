//! Chat completions and completions as a stream: chunks as they come, the usage when it is durable, then `[DONE]`.
//!
//! Invariant: `[DONE]` follows a durable receipt only; a stream that ends without it has failed.

use bytes::Bytes;
use serde_json::{Map, Value};

use super::{Delivery, Echo, Reply, best, usage, usage_so_far};
use crate::http::error::ApiError;
use crate::http::telling::{End, SoFar, Teller, Whole};
use crate::ledger::Receipt;
use crate::pipeline::Scored;
use crate::request::{Finish, Prompts};
use crate::text::turn::Part;

const DONE: &str = "data: [DONE]\n\n";

/// Tells an answer in OpenAI's older two shapes.
pub(crate) struct Chunks {
    reply: Reply,
    delivery: Delivery,
    /// Choices over each prompt.
    each: u32,
    /// The prompts' texts, until the answer takes them.
    echo: Option<Vec<String>>,
    choices: Vec<Progress>,
    running: usize,
    /// The chunk that ends the last choice waits here for the usage it carries.
    last_finish: Option<Map<String, Value>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Progress {
    /// Its first chunk is out.
    started: bool,
    called: bool,
}

impl Chunks {
    /// `each`: choices over each prompt; `echo`: the prompts' texts, where answers begin with them.
    pub(crate) fn new(
        reply: Reply,
        delivery: Delivery,
        (each, prompts): (u32, usize),
        echo: Option<Vec<String>>,
    ) -> Self {
        let choices = vec![Progress::default(); each as usize * prompts];
        Self { reply, delivery, each, echo, running: choices.len(), choices, last_finish: None }
    }

    /// A chunk that is not the last, with the usage that its place asks for.
    fn chunk(&self, mut chunk: Map<String, Value>, so_far: SoFar) -> Bytes {
        if self.delivery.continuous_usage {
            chunk.insert("usage".into(), usage_so_far(so_far));
        } else if self.delivery.include_usage {
            chunk.insert("usage".into(), Value::Null);
        }
        data(&Value::Object(chunk))
    }
}

impl Teller for Chunks {
    const KEEP_ALIVE: &'static str = ": keep-alive\n\n";

    fn takes(&mut self, prompts: &Prompts) {
        if let Some(texts) = self.echo.take() {
            let each = self.delivery.best.unwrap_or(self.each);
            self.reply.echo(Echo { each, texts, prompts: prompts.clone(), scores: Vec::new() });
        }
    }

    fn whole(&mut self, whole: Whole, receipt: &Receipt) -> Value {
        let Whole { mut choices, prompt_scores } = whole;
        self.reply.score(prompt_scores);
        if let Some(shown) = self.delivery.best {
            choices = best(choices, self.each, shown);
        }
        self.reply.body(choices, receipt)
    }

    fn begins(&mut self, _: SoFar) -> Vec<Bytes> {
        Vec::new()
    }

    /// The tokens of a text go with its first part, or with an empty one while its characters are held back.
    fn parts(
        &mut self,
        choice: u32,
        mut parts: Vec<Part>,
        mut scored: &[Scored],
        so_far: SoFar,
    ) -> Vec<Bytes> {
        if parts.is_empty() && !scored.is_empty() {
            parts.push(Part::Text(String::new()));
        }
        let told = parts.iter().map(|part| {
            let progress = &mut self.choices[choice as usize];
            progress.called |= matches!(part, Part::Call { .. });
            let first = !std::mem::replace(&mut progress.started, true);
            let chunk = self.reply.part_chunk(choice, first, part, std::mem::take(&mut scored));
            self.chunk(chunk, so_far)
        });
        told.collect()
    }

    fn finishes(&mut self, choice: u32, end: End, so_far: SoFar) -> Vec<Bytes> {
        self.running -= 1;
        if matches!(end.finish, Finish::Error | Finish::Cancelled) {
            // No way to end that OpenAI's clients know: an error event follows.
            return Vec::new();
        }
        let mut told = Vec::new();
        if !self.choices[choice as usize].started {
            told = self.parts(choice, vec![Part::Text(String::new())], &[], so_far);
        }
        let called = self.choices[choice as usize].called;
        let chunk = self.reply.finish_chunk(choice, end.finish, called);
        if self.running == 0 && !self.delivery.include_usage {
            self.last_finish = Some(chunk);
        } else {
            told.push(self.chunk(chunk, so_far));
        }
        told
    }

    fn ends(&mut self, receipt: &Receipt) -> Vec<Bytes> {
        let mut chunk = self.last_finish.take().unwrap_or_else(|| self.reply.chunk(Vec::new()));
        chunk.insert("usage".into(), usage(receipt));
        vec![data(&Value::Object(chunk)), Bytes::from_static(DONE.as_bytes())]
    }

    fn fails(&mut self, error: ApiError) -> Vec<Bytes> {
        vec![data(&error.into_object())]
    }

    fn broke() -> Bytes {
        data(&ApiError::Bug.into_object())
    }
}

fn data(value: &Value) -> Bytes {
    Bytes::from(format!("data: {value}\n\n"))
}
