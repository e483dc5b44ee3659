//! Between the plan and the step: proposals are added to the decodes they would speed up, as far as rows and
//! blocks are to spare. Nobody waits or loses blocks for a proposal.

use crate::config::Speculative;
use crate::engine::speculate::{Candidate, Plain};
use crate::meter::share::{StepClass, Work};

use super::Engine;

impl Engine {
    pub(super) fn speculate(&mut self) {
        let Self { config, calibration, running, buffers, speculator, .. } = self;
        if config.speculative == Speculative::Off || !buffers.plan.preempt.is_empty() {
            return;
        }
        let coefficients = calibration.of(StepClass::Decode);
        let row =
            |context: usize| coefficients.own(Work { tokens: 1, context: context as u64, logits: 1 }) as f64;
        let mut plain = Plain { tokens: 0, cost: coefficients.step as f64 };
        for sequence in buffers.planned.iter().map(|index| &running[*index]).filter(|s| s.decodes()) {
            plain.tokens += 1;
            plain.cost += row(sequence.computed);
        }
        if !speculator.begin(plain, row(0)) {
            return;
        }
        buffers.candidates.clear();
        for index in &buffers.planned {
            let sequence = &mut running[*index];
            if !sequence.decodes() {
                continue;
            }
            let cost = row(sequence.tokens.len());
            if let Some((proposed, chance)) = sequence.propose(&config.end_tokens, &speculator.prior) {
                buffers.candidates.push(Candidate { index: *index, proposed, chance, cost, take: 0 });
            }
        }
        speculator.choose(&mut buffers.candidates);
        let (mut spare_rows, mut spare_blocks) = (buffers.plan.spare_tokens, buffers.plan.spare_blocks);
        for candidate in &buffers.candidates {
            let sequence = &mut running[candidate.index];
            // What seems not to pay is tried now and then: texts change.
            let wanted = match candidate.take {
                0 => usize::from(speculator.worth_trying(candidate.cost) && sequence.drafter.may_try()),
                take => take,
            };
            let held = sequence.lease.len();
            let fits = (held + spare_blocks) * config.block_size - sequence.tokens.len();
            let rows = speculator.pay(wanted.min(spare_rows).min(fits), candidate.cost);
            if rows > 0 {
                sequence.draft(rows, config.block_size);
                spare_rows -= rows;
                spare_blocks -= sequence.lease.len() - held;
            }
        }
    }
}
