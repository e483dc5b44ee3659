//! The host's own cores: a batch, and a lane for each sequence in it, sampled or pooled on the model's threads.

use std::sync::Mutex;

use obol_models::batch::{Batch, CausalLm, ForwardError, SpanOutput};

use crate::engine::EngineConfig;
use crate::engine::lane::{Desk, SharedLane, lock};
use crate::engine::sequence::Sequence;

pub(in crate::engine) struct Host {
    model: Box<dyn CausalLm>,
    batch: Batch,
    /// Of the batch's spans, in their order.
    lanes: Vec<SharedLane>,
    /// Each worker's own; locked only by the worker, so never waited for.
    desks: Vec<Mutex<Desk>>,
    end_tokens: Vec<u32>,
}

impl Host {
    pub(super) fn new(model: Box<dyn CausalLm>, config: &EngineConfig) -> Self {
        let desks = (0..model.workers()).map(|_| Mutex::default()).collect();
        let mut batch = Batch::default();
        super::reserve(&mut batch, config);
        Self { model, batch, lanes: Vec::new(), desks, end_tokens: config.end_tokens.clone() }
    }

    pub(super) fn overlaps(&self) -> bool {
        self.model.overlaps()
    }

    /// Lets go of the last step.
    pub(super) fn clear(&mut self) {
        self.batch.clear();
        self.lanes.clear();
    }

    pub(super) fn add(&mut self, sequence: &Sequence) -> Option<usize> {
        super::add_rows(&mut self.batch, sequence);
        let mut lane = lock(&sequence.lane);
        lane.begin(sequence.to_score(), &sequence.drafts);
        lane.begin_pooling(sequence.to_pool().len());
        drop(lane);
        self.lanes.push(sequence.lane.clone());
        (sequence.logits() > 0).then_some(self.lanes.len() - 1)
    }

    /// Runs the step and samples on the model's threads; `meanwhile` as [`CausalLm::forward_each`] says.
    pub(super) fn run(&mut self, meanwhile: &mut dyn FnMut()) -> Result<(), ForwardError> {
        let Self { model, batch, lanes, desks, end_tokens } = self;
        let vocab = model.vocab_size();
        model.forward_each(batch, meanwhile, &|worker, span, made| {
            let mut lane = lock(&lanes[span]);
            match made {
                SpanOutput::Logits(rows) => lane.sample(rows, vocab, end_tokens, &mut lock(&desks[worker])),
                SpanOutput::Hidden(rows) => lane.pool(rows),
            }
        })
    }
}
