//! The device's side of a step: the model, the batch, and what is drawn. Knows no account, lease, channel or
//! clock.
//!
//! A host's own cores run a step while it is waited for. A device beside the host is given a step ahead of the
//! one that it runs, whose tokens are not known then.

mod host;
mod queue;

use obol_models::batch::{Batch, CausalLm, ForwardError, Span};
use obol_models::queue::StepTime;

use super::EngineConfig;
use super::sequence::Sequence;

use host::Host;
use queue::Queue;

pub(super) enum Device {
    Host(Host),
    Queue(Queue),
}

impl Device {
    pub(super) fn new(mut model: Box<dyn CausalLm>, config: &EngineConfig) -> Self {
        match model.queue().map(|queue| queue.depth()) {
            None => Self::Host(Host::new(model, config)),
            Some(depth) => Self::Queue(Queue::new(model, depth, config)),
        }
    }

    /// Steps that may be in flight at a time.
    pub(super) fn depth(&self) -> usize {
        match self {
            Self::Host(_) => 1,
            Self::Queue(queue) => queue.depth,
        }
    }

    /// Whether the host can do something else while a step runs.
    pub(super) fn overlaps(&self) -> bool {
        match self {
            Self::Host(host) => host.overlaps(),
            Self::Queue(_) => true,
        }
    }

    /// Whether what a step draws is known before the next one is planned, so that proposals can be verified.
    pub(super) fn verifies(&self) -> bool {
        matches!(self, Self::Host(_))
    }

    /// Makes ready for another step.
    pub(super) fn clear(&mut self) {
        match self {
            Self::Host(host) => host.clear(),
            Self::Queue(queue) => queue.clear(),
        }
    }

    /// Adds what the sequence computes in the step to come. Returns the place of its draw among the step's, where
    /// it draws.
    pub(super) fn add(&mut self, sequence: &Sequence) -> Option<usize> {
        match self {
            Self::Host(host) => host.add(sequence),
            Self::Queue(queue) => queue.add(sequence),
        }
    }

    /// Gives the device what was added.
    pub(super) fn submit(&mut self) -> Result<(), ForwardError> {
        match self {
            // It begins when it is waited for.
            Self::Host(_) => Ok(()),
            Self::Queue(queue) => queue.submit(),
        }
    }

    /// Waits for the oldest step in flight; `meanwhile` is called while the device is at work, at most once. When
    /// the step ran, where the device says so.
    pub(super) fn wait(&mut self, meanwhile: &mut dyn FnMut()) -> Result<Option<StepTime>, ForwardError> {
        match self {
            Self::Host(host) => host.run(meanwhile).map(|()| None),
            Self::Queue(queue) => {
                meanwhile();
                queue.wait().map(Some)
            }
        }
    }

    /// Hands a sequence what the step just waited for drew for it.
    pub(super) fn deliver(&mut self, draw: usize, sequence: &Sequence) {
        match self {
            // The model's threads have drawn into its lane.
            Self::Host(_) => {}
            Self::Queue(queue) => queue.deliver(draw, sequence),
        }
    }
}

/// Adds the rows of a sequence; tokens that are not known yet are 0.
fn add_rows(batch: &mut Batch, sequence: &Sequence) {
    let start = sequence.start();
    let positions = start..start + sequence.rows;
    let rows = batch.tokens.len()..batch.tokens.len() + sequence.rows;
    let table = batch.block_tables.len()..batch.block_tables.len() + sequence.lease.len();
    let known = (positions.end - sequence.drafts.len()).min(sequence.tokens.len());
    batch.tokens.extend_from_slice(&sequence.tokens[start.min(known)..known]);
    batch.tokens.extend_from_slice(&sequence.drafts);
    batch.tokens.resize(rows.end, 0);
    batch.positions.extend(positions.map(|p| p as u32));
    batch.block_tables.extend(sequence.lease.ids());
    batch.logit_rows.extend(rows.end - sequence.logits()..rows.end);
    batch.hidden_rows.extend(sequence.to_pool().map(|position| rows.start + position - start));
    batch.spans.push(Span { rows, table });
}

fn reserve(batch: &mut Batch, config: &EngineConfig) {
    // The largest step may come late; only where many share a long prefix are the tables longer than this.
    batch.block_tables.reserve(config.blocks);
    batch.tokens.reserve(config.step_tokens);
    batch.positions.reserve(config.step_tokens);
    batch.logit_rows.reserve(config.step_tokens);
    batch.hidden_rows.reserve(config.step_tokens);
}
