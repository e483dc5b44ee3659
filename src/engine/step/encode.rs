//! Steps of the encoder: whole texts, between steps of the model.
//!
//! While both have work they take turns, so that neither waits for more than a step of the other. A step takes texts by
//! tier and, within it, of the tenants that were charged least: as many as a step of the model takes tokens, and one at
//! least. Those of the tiers behind `default` wait for who waits before them, and those of the tier `batch` share no
//! step. A step is metered and split as the model's are, by coefficients of its own; its texts hold no blocks.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use crate::engine::Command;
use crate::engine::fair::Service;
use crate::engine::lines::{self, Line};
use crate::engine::sequence::{RequestKey, Sequence};
use crate::engine::texts::Text;
use crate::meter::share::{Work, split};
use crate::request::{Finish, NewRequest, Tier, Use};
use crate::units::{BlockNanos, DeviceNanos};

use super::{Engine, Post, attempt};

/// A request asks its allowance for as many steps ahead, so that it asks rarely.
const AHEAD: u64 = 16;

/// A text's part in a step.
struct Part {
    text: Text,
    line: Line,
    new: Arc<NewRequest>,
}

fn work(text: Text) -> Work {
    Work { tokens: text.tokens as u64, context: 0, logits: 0 }
}

impl Engine {
    /// All texts of a request wait for the encoder.
    pub(super) fn start_texts(&mut self, key: RequestKey) {
        let Self { requests, texts, .. } = self;
        let request = requests.get_mut(&key).expect("texts wait while their request lives");
        let line = request.line;
        for choice in request.unstarted.drain(..) {
            let tokens = request.new.prompt_of(choice).len();
            texts.push(line, Text { request: key, choice, tokens });
        }
    }

    /// Whether the next step is the encoder's.
    pub(super) fn encodes_next(&self) -> bool {
        let idle = self.running.is_empty() && self.waiting.is_empty();
        !self.texts.is_empty() && (idle || !self.encoded_last)
    }

    /// Whether a line's texts wait for sequences that come before them.
    fn is_held(&self, line: Line) -> bool {
        let tier = lines::tier(line);
        if lines::takes_turns(line) {
            return false;
        }
        // As it is for sequences of the tier `batch`: they sit out while prompts of others are computed.
        let prompt = |s: &Sequence| lines::tier(s.line) < tier && s.wanted() > s.start() + 1;
        self.waiting.waiting().any(|other| lines::tier(other) < tier)
            || tier == Tier::Batch && self.running.iter().any(prompt)
    }

    /// Takes the step's texts out of their lines. Those whose request may not begin end with it.
    fn take_texts(&mut self) -> Vec<Part> {
        let coefficients = self.calibration.embed.unwrap_or(self.calibration.prefill);
        let (mut parts, mut tokens) = (Vec::<Part>::new(), 0);
        // What each line is given in this step.
        let mut given: Vec<(Line, Service)> = Vec::new();
        loop {
            let Self { texts, fair, .. } = &*self;
            let next = texts.waiting().min_by_key(|line| {
                let more = given.iter().find(|(known, _)| known == line).map_or(0, |(_, more)| *more);
                (lines::tier(*line), fair.service(lines::account(*line)) + more, *line)
            });
            let Some(line) = next else { break };
            let with_others = parts.first().is_some_and(|first| lines::tier(first.line) != Tier::Batch);
            if self.is_held(line) || lines::tier(line) == Tier::Batch && with_others {
                break;
            }
            let head = texts.head(line).expect("a text waits there");
            if !parts.is_empty() && tokens + head.tokens > self.config.step_tokens {
                break;
            }
            let request = &self.requests[&head.request];
            let alone = coefficients.alone(work(head));
            let first = |steps: u64| Use { device: times(alone, steps), kv: BlockNanos::ZERO };
            if let Some(allowance) = request.new.allowance.as_deref().filter(|_| request.has_not_begun())
                && !allowance.covers(first(1), first(AHEAD))
            {
                self.end_request(head.request, Finish::Budget);
                continue;
            }
            let new = Arc::clone(&request.new);
            let worth = fair.worth(lines::account(line), alone);
            match given.iter_mut().find(|(known, _)| *known == line) {
                Some((_, more)) => *more += worth,
                None => given.push((line, worth)),
            }
            let text = self.texts.pop(line).expect("its head was there");
            tokens += text.tokens;
            parts.push(Part { text, line, new });
        }
        parts
    }

    /// Runs a step of the encoder, where there is something to run.
    pub(super) fn encode(&mut self, inbox: &Receiver<Command>) {
        self.encoded_last = true;
        let parts = self.take_texts();
        if parts.is_empty() {
            return;
        }
        let Some(mut encoder) = self.encoder.take() else {
            tracing::error!("texts reached an engine without an encoder; this is a bug");
            return self.end_texts(&parts, Finish::Error);
        };
        let coefficients = self.calibration.embed.unwrap_or(self.calibration.prefill);
        let start = self.clock.now();
        self.book_gap(start);
        for part in &parts {
            let request = self.requests.get_mut(&part.text.request).expect("a text has a request");
            if request.begin(part.text.choice, 0, start, &self.calibration) {
                self.stats.prompt_tokens += part.text.tokens as u64;
            }
        }
        self.encoding = parts.len();
        let texts: Vec<&[u32]> = parts.iter().map(|part| part.new.prompt_of(part.text.choice)).collect();
        let mut vectors = Vec::with_capacity(texts.len());
        let outcome = attempt(|| encoder.encode(&texts, &mut || self.meanwhile(inbox), &mut vectors));
        let end = self.clock.now();
        self.encoder = Some(encoder);
        self.encoding = 0;
        // ---- meter ----
        let time = self.partition.step(start, end);
        self.blocks.tick(self.partition.cursor());
        self.stats.device_busy = DeviceNanos(self.stats.device_busy.0.saturating_add((end - start).0));
        self.stats.steps += 1;
        self.changed = true;
        let count = parts.len();
        let weights: Vec<u128> =
            parts.iter().map(|part| coefficients.weight(work(part.text), count)).collect();
        let mut shares = Vec::with_capacity(count);
        split(time, &weights, &mut shares);
        for (part, share) in parts.iter().zip(&shares) {
            let request = self.requests.get_mut(&part.text.request).expect("a text has a request");
            self.fair.charge(lines::account(part.line), *share);
            request.charge(self.stats.steps, *share, coefficients.alone(work(part.text)), true);
        }
        self.energy.read_if_due(self.partition.cursor(), &mut self.requests);
        // ---- advance ----
        match outcome {
            Ok(()) => {
                assert_eq!(vectors.len(), count, "a vector for each text");
                let at = self.partition.cursor();
                for (part, vector) in parts.iter().zip(vectors) {
                    let Text { request, choice, .. } = part.text;
                    self.outbox.push(Post::Vector { request, choice, vector });
                    self.outbox.push(Post::End { request, choice, finish: Finish::Stop, at });
                }
                self.ask_for_texts(&parts, &shares);
            }
            Err(why) => {
                tracing::error!("a step of the encoder failed: {why}");
                self.end_texts(&parts, Finish::Error);
            }
        }
    }

    /// Asks for the requests of a step that have more texts whether they may go on; ends those that may not.
    fn ask_for_texts(&mut self, parts: &[Part], shares: &[DeviceNanos]) {
        let mut asked = None;
        for (part, share) in parts.iter().zip(shares) {
            let key = part.text.request;
            let Some(allowance) = part.new.allowance.as_deref().filter(|_| asked != Some(key)) else {
                continue;
            };
            asked = Some(key);
            let used = Use { device: self.requests[&key].device(), kv: BlockNanos::ZERO };
            let next = |steps: u64| Use { device: times(*share, steps), kv: BlockNanos::ZERO };
            if !allowance.covers(used + next(1), used + next(AHEAD)) {
                self.buffers.broke.push(key);
            }
        }
        self.end_the_broke();
    }

    /// Ends the requests of texts that were taken.
    fn end_texts(&mut self, parts: &[Part], finish: Finish) {
        let at = self.partition.cursor();
        for part in parts {
            let Text { request, choice, .. } = part.text;
            self.outbox.push(Post::End { request, choice, finish, at });
        }
        for part in parts {
            self.end_request(part.text.request, finish);
        }
    }
}

fn times(time: DeviceNanos, steps: u64) -> DeviceNanos {
    DeviceNanos(time.0.saturating_mul(steps))
}
