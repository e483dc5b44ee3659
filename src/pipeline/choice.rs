//! One choice's text as it grows: bytes to characters, stop strings, and which tokens it is made of.
//!
//! Text that may turn out to be the beginning of a stop string is held back, and so are the
//! log-probabilities of its tokens: what a client sees of both always ends at the same place.

use std::collections::VecDeque;

use super::App;
use crate::request::TokenLogprobs;
use crate::text::{Detokenizer, StopMatcher};

/// A token of the answer with its log-probabilities.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    pub token: u32,
    /// Where the token's text begins, in characters from the beginning of the choice's text.
    pub offset: usize,
    pub logprobs: TokenLogprobs,
}

/// What a token added to the text.
#[derive(Debug, Default)]
pub(super) struct Grown {
    pub(super) text: String,
    pub(super) scored: Vec<Scored>,
    /// A stop string was found just now; the text ends before it.
    pub(super) stopped: bool,
}

impl Grown {
    pub(super) fn is_empty(&self) -> bool {
        self.text.is_empty() && self.scored.is_empty()
    }
}

pub(super) struct ChoiceText {
    bytes: Detokenizer,
    stops: StopMatcher,
    /// A stop string was found: whatever comes later is not part of the answer.
    stopped: bool,
    /// Characters decoded so far, and of them released to the client.
    decoded: usize,
    released: usize,
    held: VecDeque<Scored>,
}

impl ChoiceText {
    pub(super) fn new(stop: &[String], shown: &[u32]) -> Self {
        Self {
            bytes: Detokenizer::showing(shown),
            stops: StopMatcher::new(stop),
            stopped: false,
            decoded: 0,
            released: 0,
            held: VecDeque::new(),
        }
    }

    /// Adds a token.
    pub(super) fn push(&mut self, app: &App, token: u32, logprobs: Option<TokenLogprobs>) -> Grown {
        if self.stopped {
            return Grown::default();
        }
        if let Some(logprobs) = logprobs {
            self.held.push_back(Scored { token, offset: self.decoded, logprobs });
        }
        let text = self.bytes.push(app.tokenizer(), token);
        self.decoded += text.chars().count();
        let released = self.stops.push(&text);
        self.stopped = released.stopped;
        self.release(released.text, released.stopped)
    }

    /// The end of the choice: what was held back is text after all.
    pub(super) fn finish(&mut self) -> Grown {
        if self.stopped {
            return Grown::default();
        }
        let rest = self.bytes.finish();
        self.decoded += rest.chars().count();
        let mut released = self.stops.push(&rest);
        if !released.stopped {
            released.text.push_str(&self.stops.finish());
        }
        self.stopped = released.stopped;
        self.release(released.text, released.stopped)
    }

    /// The stop string that ended the text.
    pub(super) fn stopped_by(&self) -> Option<&str> {
        self.stops.found()
    }

    fn release(&mut self, text: String, stopped: bool) -> Grown {
        self.released += text.chars().count();
        let all = self.released == self.decoded;
        let ready = self.held.iter().take_while(|scored| all || scored.offset < self.released).count();
        let scored = self.held.drain(..ready).collect();
        Grown { text, scored, stopped }
    }
}
