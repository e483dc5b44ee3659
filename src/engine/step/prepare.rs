//! Before a step: the scheduler's views, its plan carried out, the device loaded.

use std::cmp::Reverse;

use crate::engine::device::Device;
use crate::engine::flight::{Flight, Member};
use crate::engine::lines::Line;
use crate::engine::scheduler::{self, Limits, Running};
use crate::meter::share::StepClass;
use crate::request::Finish;
use crate::units::DeviceNanos;

use super::turns::{self, Turns};
use super::{Buffers, Engine, SCORED_A_STEP};

impl Engine {
    /// Views of the queues for the pure scheduler.
    pub(super) fn plan(&mut self) {
        let Self { config, blocks, running, waiting, buffers, fair, flights, calibration, partition, .. } =
            self;
        let Buffers { views, plan, order, .. } = buffers;
        let available = blocks.available();
        order.begin(fair, flights, running, waiting);
        let favoured = order.favour(fair, running, waiting, config.max_sequences);
        // What a preemption would free matters only when blocks may run out in this step, or are to be given away.
        let tight = available < running.len() + config.step_tokens.div_ceil(config.block_size)
            || order.contended(running, waiting);
        views.clear();
        views.extend(order.running.iter().map(|index| &running[*index]).map(|s| Running {
            line: s.line,
            computed: s.start(),
            length: s.wanted(),
            blocks: s.lease.len(),
            exclusive: if tight { s.lease.exclusive() } else { 0 },
            crowd: turns::in_crowd(fair, s.line),
            held: order.holds(s.line),
        }));
        let now = partition.cursor();
        let batch_tokens = |parts| turns::parts(&calibration.decode, parts, config.step_tokens);
        let limits = Limits {
            step_tokens: config.step_tokens,
            crowd_tokens: order.crowd_tokens(fair, now, config.step_tokens, &calibration.decode),
            batch_tokens: batch_tokens(turns::BATCH_PARTS),
            batch_tokens_beside: batch_tokens(turns::BATCH_PARTS_BESIDE),
            favoured,
            sequences: config.max_sequences,
            block_size: config.block_size,
        };
        let coefficients = &calibration.prefill;
        let mut turns = Turns { order, fair, running, waiting, views, blocks, config, coefficients };
        turns.begin();
        scheduler::plan(views, &mut turns, available, &limits, plan);
        turns::make_room(&mut turns, plan);
        order.planned(plan);
        plan.run.iter_mut().for_each(|(index, _)| *index = order.running[*index]);
        plan.preempt.iter_mut().for_each(|index| *index = order.running[*index]);
        // They leave one after another.
        plan.preempt.sort_unstable_by_key(|index| Reverse(*index));
    }

    /// Carries the plan out: preempts, admits, takes blocks. What takes part is then in `planned`. Gives whether a
    /// request was refused, and has ended.
    pub(super) fn apply(&mut self, now: DeviceNanos) -> bool {
        let plan = std::mem::take(&mut self.buffers.plan);
        for sequence in &mut self.running {
            sequence.rows = 0;
            sequence.drafts.clear();
        }
        for (index, tokens) in &plan.run {
            self.running[*index].rows = *tokens;
        }
        for index in &plan.preempt {
            self.preempt(*index);
        }
        // Prefixes first: fresh blocks taken before could evict them.
        let mut refused = false;
        // Turns of the sequences that left together with the one that was refused.
        let mut over: Vec<(Line, usize)> = Vec::new();
        for (turn, tokens) in &plan.admit {
            let line = self.buffers.order.lines[*turn];
            if let Some((_, turns)) = over.iter_mut().find(|(of, turns)| *of == line && *turns > 0) {
                *turns -= 1;
            } else if self.may_begin(line) {
                self.admit(line, *tokens, now);
            } else {
                over.push((line, self.waiting.of_head(line) - 1));
                let head = self.waiting.get(line, 0).expect("the plan admits waiting sequences");
                self.end_request(head.request, Finish::Budget);
                refused = true;
            }
        }
        self.buffers.plan = plan;
        self.buffers.planned.clear();
        let block_size = self.config.block_size;
        let mut scored = SCORED_A_STEP;
        for (index, sequence) in self.running.iter_mut().enumerate().filter(|(_, s)| s.rows > 0) {
            if sequence.scores() {
                sequence.rows = sequence.rows.min(scored);
                scored -= sequence.rows;
                if sequence.rows == 0 {
                    continue;
                }
            }
            sequence.lease.grow_to((sequence.start() + sequence.rows).div_ceil(block_size));
            self.buffers.planned.push(index);
        }
        refused
    }

    fn preempt(&mut self, index: usize) {
        let mut victim = self.running.remove(index);
        self.stats.preemptions += 1;
        // Dropping the old lease pays for the blocks and gives them back.
        victim.lease = self.blocks.lease(self.requests[&victim.request].kv_paid.clone());
        victim.computed = 0;
        self.waiting.insert(victim);
    }

    /// The line's head starts to run, with what the prefix cache has of it.
    fn admit(&mut self, line: Line, tokens: usize, now: DeviceNanos) {
        let block_size = self.config.block_size;
        let mut sequence = self.waiting.pop(line).expect("the plan admits waiting sequences");
        sequence.rows = tokens;
        sequence.drafts.clear();
        sequence.lease.reserve(sequence.blocks_max(block_size));
        if self.config.prefix_caching {
            let found = self.blocks.match_prefix(sequence.reusable_keys(block_size)).blocks;
            sequence.lease.take_prefix(&sequence.keys[..found]);
            sequence.computed = found * block_size;
            sequence.high_water = sequence.high_water.max(sequence.computed);
        }
        let request = self.requests.get_mut(&sequence.request).expect("a sequence has a request");
        if request.begin(sequence.choice, sequence.computed as u64, now, &self.calibration) {
            self.stats.prefix_queries += sequence.prompt as u64;
            self.stats.prefix_hits += sequence.computed as u64;
            self.stats.prompt_tokens += sequence.prompt as u64;
        }
        let place = (sequence.request, sequence.choice);
        let at = self.running.partition_point(|s| (s.request, s.choice) < place);
        self.running.insert(at, sequence);
    }

    /// Notes who takes part, and with what weight.
    ///
    /// Never inlined, so that `scripts/metering-share` can count its instructions.
    #[inline(never)]
    pub(super) fn weigh(&mut self) -> Flight {
        let Self { running, buffers, flights, calibration, .. } = self;
        let (mut flight, sequences) = (flights.fresh(), buffers.planned.len());
        let decoding = buffers.planned.iter().filter(|index| running[**index].decodes()).count();
        let coefficients = calibration.of(StepClass::of(decoding, sequences - decoding));
        let members = buffers.planned.iter().map(|index| {
            let sequence = &running[*index];
            Member {
                request: sequence.request,
                choice: sequence.choice,
                line: sequence.line,
                rows: sequence.rows,
                draw: None,
                prefill: sequence.start() < sequence.prompt,
                part: sequence.part(sequences, coefficients),
            }
        });
        flight.members.extend(members);
        flight
    }

    /// Makes the device ready for what takes part.
    pub(super) fn load(&mut self, device: &mut Device, flight: &mut Flight) {
        device.clear();
        for (member, index) in flight.members.iter_mut().zip(&self.buffers.planned) {
            let sequence = &mut self.running[*index];
            member.draw = device.add(sequence);
            sequence.took_off(member.rows, member.draw);
        }
    }
}
