//! A device that computes beside the host: steps are given to it in order, and what they drew is read later.
//!
//! So that the device need not wait for the host, a step may be given before the one ahead of it has been
//! read: rows whose token is not known yet are fed on the device by that step's draws. Tokens are drawn there
//! too, by the rules of the host's sampler; who asked for them is not known here.

pub use obol_kernels::RowDraw;

use crate::batch::{Batch, BatchLimits, ForwardError};

/// A row whose token is what the step ahead drew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feed {
    /// The row of this step's batch; the token given there is not read.
    pub row: usize,
    /// Index among the draws of the step ahead. Where that draw came to nothing, any token may be fed.
    pub draw: usize,
}

/// A token that a sequence has seen, for penalties.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    pub token: u32,
    /// Times it was generated; 0: it is in the prompt only.
    pub times: u32,
}

/// The work of one step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Step {
    pub batch: Batch,
    /// Ascending by row.
    pub feeds: Vec<Feed>,
    /// One for each of the batch's logit rows, in their order.
    pub draws: Vec<RowDraw>,
    /// (token, what is added to its logit); tokens outside the vocabulary have no effect.
    pub biases: Vec<(u32, f32)>,
    /// Never drawn; tokens outside the vocabulary have no effect.
    pub forbidden: Vec<u32>,
    /// Bits of the tokens that may be drawn.
    pub allowed: Vec<u32>,
    /// A fed row's token counts as generated once more than is said here.
    pub seen: Vec<Seen>,
}

impl Step {
    pub fn clear(&mut self) {
        self.batch.clear();
        self.feeds.clear();
        self.draws.clear();
        self.biases.clear();
        self.forbidden.clear();
        self.allowed.clear();
        self.seen.clear();
    }

    /// Makes this the same step, in the memory that it has where that is enough.
    pub fn copy_from(&mut self, other: &Self) {
        self.batch.copy_from(&other.batch);
        self.feeds.clone_from(&other.feeds);
        self.draws.clone_from(&other.draws);
        self.biases.clone_from(&other.biases);
        self.forbidden.clone_from(&other.forbidden);
        self.allowed.clone_from(&other.allowed);
        self.seen.clone_from(&other.seen);
    }

    /// Whether a device with these limits can run this step behind one of `ahead` draws; none: behind none.
    ///
    /// # Errors
    /// As [`Batch::check`], and when feeds, draws or lists contradict each other.
    pub fn check(&self, limits: BatchLimits, ahead: Option<usize>) -> Result<(), ForwardError> {
        self.batch.check(limits)?;
        let fail = |what: String| Err(ForwardError(format!("inconsistent step: {what}")));
        if !self.batch.hidden_rows.is_empty() {
            return fail(format!("{} hidden rows, which are never read", self.batch.hidden_rows.len()));
        }
        if self.draws.len() != self.batch.logit_rows.len() {
            return fail(format!("{} draws, {} logit rows", self.draws.len(), self.batch.logit_rows.len()));
        }
        if !self.feeds.is_sorted_by(|a, b| a.row < b.row) {
            return fail("feeds are not ascending by row".into());
        }
        let (rows, ahead) = (self.batch.tokens.len(), ahead.unwrap_or(0));
        if let Some(feed) = self.feeds.iter().find(|feed| feed.row >= rows || feed.draw >= ahead) {
            return fail(format!("{feed:?} with {rows} rows and {ahead} draws ahead"));
        }
        for draw in &self.draws {
            let lists = [
                (&draw.biases, self.biases.len()),
                (&draw.forbidden, self.forbidden.len()),
                (&draw.allowed, self.allowed.len()),
                (&draw.seen, self.seen.len()),
            ];
            if let Some((range, len)) =
                lists.into_iter().find(|(range, len)| range.start > range.end || range.end > *len)
            {
                return fail(format!("a draw's part {range:?} of a list of {len}"));
            }
            let seen = &self.seen[draw.seen.clone()];
            if !seen.is_sorted_by(|a, b| a.token < b.token)
                || seen.last().is_some_and(|seen| seen.token as usize >= limits.vocab_size)
            {
                return fail("seen tokens are not ascending within the vocabulary".into());
            }
        }
        Ok(())
    }
}

/// What was drawn from one row of logits.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Draw {
    /// None: no logit was a finite number.
    pub token: Option<u32>,
    /// Of the token, where it was asked for; else 0.
    pub logprob: f32,
    /// (token, log-probability) of the most likely, as many as were asked for, best first.
    pub top: Vec<(u32, f32)>,
}

/// When a step ran, by the device's own clock, in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepTime {
    /// From its start on the device to its end.
    pub run: u64,
    /// From the end of the step before it to its end; none where there was none or that is not known.
    pub since_last_end: Option<u64>,
}

/// A step's outcome.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepOutput {
    /// One for each of the step's draws.
    pub draws: Vec<Draw>,
    pub time: StepTime,
}

/// The largest step that will be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepLimits {
    pub rows: usize,
    pub sequences: usize,
    /// Of all sequences' block tables together.
    pub table_entries: usize,
}

/// Runs steps in the order in which they are given. After an error, or a panic, nothing is in flight, and what the
/// steps that were have written is undefined.
pub trait StepQueue: Send {
    /// Steps that may be in flight at a time: 1 or 2.
    fn depth(&self) -> usize;

    /// Gives the device a step; returns before it has run.
    ///
    /// # Errors
    /// When the step contradicts itself or the device refuses it.
    ///
    /// # Panics
    /// When as many steps are in flight as may be.
    fn submit(&mut self, step: &Step) -> Result<(), ForwardError>;

    /// Waits for the oldest step in flight, and says what came of it.
    ///
    /// # Errors
    /// When it failed.
    ///
    /// # Panics
    /// When nothing is in flight.
    fn wait(&mut self, output: &mut StepOutput) -> Result<(), ForwardError>;
}
