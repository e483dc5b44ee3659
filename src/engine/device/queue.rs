//! A device beside the host: it draws itself, from what each sequence's lane says of its draw, and feeds the
//! rows whose token is not known yet.

use obol_models::batch::{CausalLm, ForwardError};
use obol_models::queue::{Feed, Step, StepOutput, StepQueue, StepTime};

use crate::engine::EngineConfig;
use crate::engine::lane::lock;
use crate::engine::sequence::Sequence;

pub(in crate::engine) struct Queue {
    model: Box<dyn CausalLm>,
    pub(super) depth: usize,
    step: Step,
    output: StepOutput,
    end_tokens: Vec<u32>,
}

impl Queue {
    pub(super) fn new(model: Box<dyn CausalLm>, depth: usize, config: &EngineConfig) -> Self {
        let mut step = Step::default();
        super::reserve(&mut step.batch, config);
        Self { model, depth, step, output: StepOutput::default(), end_tokens: config.end_tokens.clone() }
    }

    pub(super) fn clear(&mut self) {
        self.step.clear();
    }

    pub(super) fn add(&mut self, sequence: &Sequence) -> Option<usize> {
        let row = self.step.batch.tokens.len();
        super::add_rows(&mut self.step.batch, sequence);
        // Everything before the token that the step ahead draws is known.
        if let Some(draw) = sequence.fed() {
            self.step.feeds.push(Feed { row, draw });
        }
        (sequence.logits() > 0).then(|| {
            lock(&sequence.lane).ask(sequence.length(), &self.end_tokens, &mut self.step);
            self.step.draws.len() - 1
        })
    }

    pub(super) fn submit(&mut self) -> Result<(), ForwardError> {
        queue(&mut self.model).submit(&self.step)
    }

    pub(super) fn wait(&mut self) -> Result<StepTime, ForwardError> {
        queue(&mut self.model).wait(&mut self.output)?;
        Ok(self.output.time)
    }

    pub(super) fn deliver(&mut self, draw: usize, sequence: &Sequence) {
        lock(&sequence.lane).take(&mut self.output.draws[draw]);
    }
}

fn queue(model: &mut Box<dyn CausalLm>) -> &mut dyn StepQueue {
    model.queue().expect("a model that had a queue keeps it")
}
