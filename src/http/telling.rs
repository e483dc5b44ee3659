//! What the generating endpoints share of telling an answer: a choice as it is put together, and what an API must
//! be able to write. Knows no API's words.

use std::sync::Arc;

use bytes::Bytes;
use serde_json::Value;

use super::error::ApiError;
use crate::ledger::Receipt;
use crate::pipeline::{Answer, Failure, Piece, Scored};
use crate::request::{Finish, Prompts, TokenLogprobs};
use crate::text::turn::{Part, TurnForm, TurnReader, join};

/// How a choice ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) finish: Finish,
    /// The stop string that ended it.
    pub(crate) stop: Option<String>,
}

/// One choice, whole.
#[derive(Debug)]
pub(crate) struct Choice {
    reader: TurnReader,
    /// In the order they were said.
    pub(crate) parts: Vec<Part>,
    pub(crate) scored: Vec<Scored>,
    /// Of an answer of one choice.
    pub(crate) thinking: Thinking,
    /// `None`: it has not ended.
    pub(crate) end: Option<End>,
}

impl Choice {
    pub(crate) fn new(form: &TurnForm) -> Self {
        Self {
            reader: TurnReader::new(form.clone()),
            parts: Vec::new(),
            scored: Vec::new(),
            thinking: Thinking::default(),
            end: None,
        }
    }

    /// `so_far`: tokens of all choices, these ones included.
    fn push(&mut self, text: &str, scored: Vec<Scored>, so_far: u64) {
        let parts = self.reader.push(text);
        self.hear(parts, scored, so_far);
    }

    fn finish(&mut self, text: &str, scored: Vec<Scored>, so_far: u64, end: End) {
        let mut parts = self.reader.push(text);
        parts.extend(self.reader.finish());
        self.hear(parts, scored, so_far);
        self.parts = join(std::mem::take(&mut self.parts));
        self.end = Some(end);
    }

    fn hear(&mut self, parts: Vec<Part>, scored: Vec<Scored>, so_far: u64) {
        self.thinking.hears(&parts, so_far);
        self.parts.extend(parts);
        self.scored.extend(scored);
    }
}

/// Counts the tokens of thoughts in an answer of one choice: all until it begins to speak or to call, what ends the
/// thought included.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Thinking {
    thinks: bool,
    /// Before the parts heard last.
    before: u64,
    /// Known once it has begun to speak.
    tokens: Option<u64>,
}

impl Thinking {
    /// `so_far`: tokens up to now, those of these parts included.
    pub(crate) fn hears(&mut self, parts: &[Part], so_far: u64) {
        self.thinks |= parts.iter().any(|part| matches!(part, Part::Thought(_)));
        if self.tokens.is_none() && parts.iter().any(|part| !matches!(part, Part::Thought(_))) {
            self.tokens = Some(if self.thinks { self.before } else { 0 });
        }
        self.before = so_far;
    }

    /// Of an answer that has `all` tokens.
    pub(crate) fn tokens(&self, all: u64) -> u64 {
        self.tokens.unwrap_or(if self.thinks { all } else { 0 })
    }
}

/// An answer that is not streamed.
#[derive(Debug)]
pub(crate) struct Whole {
    pub(crate) choices: Vec<Choice>,
    /// How likely each prompt's tokens were, where that was asked for.
    pub(crate) prompt_scores: Vec<Vec<TokenLogprobs>>,
}

/// The whole answer. Dropping this future (the client left) drops the answer, which cancels it.
pub(super) async fn collect(mut answer: Answer, choices: u32) -> Result<(Whole, Arc<Receipt>), Failure> {
    let prompts = answer.prompts().count();
    let mut whole = Whole {
        choices: (0..choices).map(|_| Choice::new(answer.form())).collect(),
        prompt_scores: vec![Vec::new(); prompts],
    };
    while let Some(piece) = answer.next().await {
        match piece? {
            Piece::Text { choice, text, scored } => {
                whole.choices[choice as usize].push(&text, scored, answer.completion_tokens());
            }
            Piece::Prompt { choice, scores } => {
                whole.prompt_scores[choice as usize * prompts / choices as usize].extend(scores);
            }
            Piece::Vector { .. } => unreachable!("vectors are no answer's text"),
            Piece::Finished { choice, text, scored, finish, stop } => {
                let choice = &mut whole.choices[choice as usize];
                choice.finish(&text, scored, answer.completion_tokens(), End { finish, stop });
            }
            Piece::Settled(receipt) => return Ok((whole, receipt)),
        }
    }
    Err(Failure::LedgerUnavailable)
}

/// The vectors of all inputs, in their order. Dropping this future cancels what still runs.
pub(super) async fn collect_vectors(mut answer: Answer) -> Result<(Vec<Vec<f32>>, Arc<Receipt>), ApiError> {
    let mut vectors = vec![Vec::new(); answer.prompts().count()];
    let mut spent = false;
    while let Some(piece) = answer.next().await {
        match piece? {
            Piece::Vector { input, vector } => vectors[input as usize] = vector,
            Piece::Finished { finish, .. } => spent |= finish == Finish::Budget,
            // A budget that ends a text leaves a part of it; of a vector there is none.
            Piece::Settled(_) if spent => return Err(ApiError::VectorsOverBudget),
            Piece::Settled(receipt) => return Ok((vectors, receipt)),
            Piece::Text { .. } | Piece::Prompt { .. } => unreachable!("inputs are not continued"),
        }
    }
    Err(Failure::LedgerUnavailable.into())
}

/// Tokens of an answer up to now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SoFar {
    pub(crate) prompt: usize,
    /// Of all choices.
    pub(crate) completion: u64,
}

/// An API's words for one answer. What its methods return are events as they go over the wire, in order; of a stream
/// `begins` comes first, `ends` or `fails` last, and each choice has its `parts` and then one `finishes`.
pub(super) trait Teller: Send + Sized + 'static {
    /// Sent while nothing else is, so that proxies keep the stream open.
    const KEEP_ALIVE: &'static str;

    /// What is continued, before anything else.
    fn takes(&mut self, _prompts: &Prompts) {}

    /// The body of an answer that is not streamed.
    fn whole(&mut self, whole: Whole, receipt: &Receipt) -> Value;

    /// Makes durable what this API keeps of an answer: once all is said, before it is told that all is said.
    ///
    /// # Errors
    /// When that is not possible: the answer fails with it.
    fn keep(&mut self, _receipt: &Receipt) -> impl Future<Output = Result<(), ApiError>> + Send {
        std::future::ready(Ok(()))
    }

    /// Before anything was said.
    fn begins(&mut self, so_far: SoFar) -> Vec<Bytes>;

    /// More of a choice; `scored` are the tokens of these parts, where log-probabilities were asked for.
    fn parts(&mut self, choice: u32, parts: Vec<Part>, scored: &[Scored], so_far: SoFar) -> Vec<Bytes>;

    /// A choice is complete.
    fn finishes(&mut self, choice: u32, end: End, so_far: SoFar) -> Vec<Bytes>;

    /// All is said, and the receipt and what is kept are durable.
    fn ends(&mut self, receipt: &Receipt) -> Vec<Bytes>;

    /// The answer will not be complete.
    fn fails(&mut self, error: ApiError) -> Vec<Bytes>;

    /// As `fails`, of a stream whose teller panicked.
    fn broke() -> Bytes;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_a_thoughts_until_something_is_said() {
        let (thought, text) = (|| vec![Part::Thought("a".into())], || vec![Part::Text("b".into())]);
        let count = |heard: &[(Vec<Part>, u64)]| {
            let mut thinking = Thinking::default();
            heard.iter().for_each(|(parts, so_far)| thinking.hears(parts, *so_far));
            thinking.tokens(9)
        };
        assert_eq!(count(&[]), 0);
        assert_eq!(count(&[(text(), 3), (text(), 9)]), 0);
        assert_eq!(count(&[(thought(), 3), (thought(), 8)]), 9);
        // The fifth token ends the thought, and counts as one of its tokens.
        assert_eq!(count(&[(thought(), 4), (Vec::new(), 5), (text(), 6), (text(), 8)]), 5);
    }
}
