//! The device's side of a step: the model, the batch, and a lane for each sequence in it. Knows no account,
//! lease, channel or clock.

use std::sync::Mutex;

use obol_models::batch::{Batch, CausalLm, ForwardError, Span};

use super::EngineConfig;
use super::lane::{Desk, SharedLane, lock};
use super::sequence::Sequence;

pub(super) struct Device {
    model: Box<dyn CausalLm>,
    batch: Batch,
    /// Of the batch's spans, in their order.
    lanes: Vec<SharedLane>,
    /// Each worker's own; locked only by the worker, so never waited for.
    desks: Vec<Mutex<Desk>>,
    end_tokens: Vec<u32>,
}

impl Device {
    pub(super) fn new(model: Box<dyn CausalLm>, config: &EngineConfig) -> Self {
        let desks = (0..model.workers()).map(|_| Mutex::default()).collect();
        let mut batch = Batch::default();
        // The largest step may come late; only where many share a long prefix are the tables longer than this.
        batch.block_tables.reserve(config.blocks);
        batch.tokens.reserve(config.step_tokens);
        batch.positions.reserve(config.step_tokens);
        batch.logit_rows.reserve(config.step_tokens);
        Self { model, batch, lanes: Vec::new(), desks, end_tokens: config.end_tokens.clone() }
    }

    /// Whether the host can do something else while a step runs.
    pub(super) fn overlaps(&self) -> bool {
        self.model.overlaps()
    }

    /// Lets go of the last step.
    pub(super) fn clear(&mut self) {
        self.batch.clear();
        self.lanes.clear();
    }

    /// Adds what the sequence computes in the step to come.
    pub(super) fn add(&mut self, sequence: &Sequence) {
        let batch = &mut self.batch;
        let positions = sequence.computed..sequence.computed + sequence.rows;
        let rows = batch.tokens.len()..batch.tokens.len() + sequence.rows;
        let table = batch.block_tables.len()..batch.block_tables.len() + sequence.lease.len();
        let known = sequence.computed..positions.end - sequence.drafts.len();
        batch.tokens.extend_from_slice(&sequence.tokens[known]);
        batch.tokens.extend_from_slice(&sequence.drafts);
        batch.positions.extend(positions.map(|p| p as u32));
        batch.block_tables.extend(sequence.lease.ids());
        batch.logit_rows.extend(rows.end - sequence.logits()..rows.end);
        batch.spans.push(Span { rows, table });
        lock(&sequence.lane).begin(&sequence.drafts);
        self.lanes.push(sequence.lane.clone());
    }

    /// Runs the step and samples on the model's threads; `meanwhile` as [`CausalLm::forward_each`] says.
    pub(super) fn run(&mut self, meanwhile: &mut dyn FnMut()) -> Result<(), ForwardError> {
        let Self { model, batch, lanes, desks, end_tokens } = self;
        let vocab = model.vocab_size();
        model.forward_each(batch, meanwhile, &|worker, span, logits| {
            lock(&lanes[span]).sample(logits, vocab, end_tokens, &mut lock(&desks[worker]));
        })
    }
}
