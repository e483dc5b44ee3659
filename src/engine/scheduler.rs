//! Decides what the next step computes. A pure function of views: no device, channel, clock or log.
//!
//! One token budget a step: running decodes first, then chunks of running prefills, then waiting
//! sequences in order of arrival, as vLLM's V1 scheduler does. When blocks run out the sequence that
//! arrived last is preempted and will be computed again. A waiting sequence is admitted only when all
//! its tokens fit beside what is running, and nobody overtakes it.

/// A running sequence, as the scheduler sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Running {
    /// Tokens whose KV is there.
    pub computed: usize,
    /// Tokens it has: prompt and generated so far. At least `computed + 1`.
    pub length: usize,
    pub blocks: usize,
    /// Blocks that come free if it is preempted.
    pub exclusive: usize,
}

/// A waiting sequence, as the scheduler sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    pub length: usize,
    /// Leading blocks found in the prefix cache, at most what leaves one token to compute.
    pub cached_blocks: usize,
    /// Those of them that nobody holds.
    pub cached_unheld: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub step_tokens: usize,
    /// At most `step_tokens`, so that every decode fits in a step.
    pub sequences: usize,
    pub block_size: usize,
}

/// The next step, in buffers that are used again. Indices are into the views; tokens are how many each computes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StepPlan {
    /// (index of running, tokens), in order of arrival.
    pub run: Vec<(usize, usize)>,
    /// Tokens that each of the first waiting sequences computes.
    pub admit: Vec<usize>,
    /// Indices of running sequences that lose their blocks, last arrival first.
    pub preempt: Vec<usize>,
    /// What is left for this step when everybody has what they need, and nothing was preempted.
    pub spare_tokens: usize,
    pub spare_blocks: usize,
    /// Tokens given to each running sequence.
    tokens: Vec<usize>,
}

impl StepPlan {
    fn clear(&mut self, running: usize) {
        self.run.clear();
        self.admit.clear();
        self.preempt.clear();
        self.tokens.clear();
        self.tokens.resize(running, 0);
    }
}

/// Plans a step into `plan`. `running` and `waiting` are in order of arrival, and no more of `waiting` is looked at
/// than can be admitted; `available` is the number of blocks that can be given out.
pub fn plan(
    running: &[Running],
    waiting: impl IntoIterator<Item = Waiting>,
    available: usize,
    limits: &Limits,
    plan: &mut StepPlan,
) {
    plan.clear(running.len());
    let StepPlan { run, admit, preempt, spare_tokens, spare_blocks, tokens } = plan;
    let budget = limits.step_tokens;
    let mut step = Step { running, limits, available, tokens, kept: running.len(), budget };
    for decode in [true, false] {
        for (index, view) in running.iter().enumerate() {
            let remaining = view.length - view.computed;
            if (remaining == 1) == decode && index < step.kept {
                step.schedule(index, remaining);
            }
        }
    }
    preempt.extend((step.kept..running.len()).rev());
    if preempt.is_empty() {
        step.admit(waiting, admit);
    }
    (*spare_tokens, *spare_blocks) = (step.budget, step.available);
    run.extend((0..step.kept).filter(|i| step.tokens[*i] > 0).map(|i| (i, step.tokens[i])));
}

struct Step<'a> {
    running: &'a [Running],
    limits: &'a Limits,
    available: usize,
    tokens: &'a mut [usize],
    /// Running sequences from here on are preempted.
    kept: usize,
    budget: usize,
}

impl Step<'_> {
    fn new_blocks(&self, index: usize, tokens: usize) -> usize {
        let view = &self.running[index];
        (view.computed + tokens).div_ceil(self.limits.block_size).saturating_sub(view.blocks)
    }

    fn new_blocks_in_all(&self, index: usize) -> usize {
        self.new_blocks(index, self.running[index].length - self.running[index].computed)
    }

    /// Gives the sequence what the budget allows, preempting later arrivals for blocks.
    fn schedule(&mut self, index: usize, remaining: usize) {
        let mut tokens = remaining.min(self.budget);
        while tokens > 0 && self.new_blocks(index, tokens) > self.available {
            self.preempt_last();
            if index >= self.kept {
                return; // it was itself the last to arrive
            }
            tokens = remaining.min(self.budget);
        }
        self.available -= self.new_blocks(index, tokens);
        self.budget -= tokens;
        self.tokens[index] = tokens;
    }

    fn preempt_last(&mut self) {
        self.kept -= 1;
        let victim = self.kept;
        self.available += self.running[victim].exclusive + self.new_blocks(victim, self.tokens[victim]);
        self.budget += self.tokens[victim];
        self.tokens[victim] = 0;
    }

    fn admit(&mut self, waiting: impl IntoIterator<Item = Waiting>, admitted: &mut Vec<usize>) {
        // What running prefills will still need is spoken for.
        let outstanding: usize =
            (0..self.kept).map(|i| self.new_blocks_in_all(i) - self.new_blocks(i, self.tokens[i])).sum();
        self.available = self.available.saturating_sub(outstanding);
        let mut waiting = waiting.into_iter();
        loop {
            let sequences = self.kept + admitted.len();
            if sequences == self.limits.sequences || self.budget == 0 {
                break;
            }
            let Some(view) = waiting.next() else { break };
            let fresh = view.length.div_ceil(self.limits.block_size) - view.cached_blocks;
            let needed = fresh + view.cached_unheld;
            // A block to grow into for each that runs already, or admission would end in preemption.
            if needed > self.available || (sequences > 0 && needed + sequences > self.available) {
                break;
            }
            let tokens = (view.length - view.cached_blocks * self.limits.block_size).min(self.budget);
            // All of its blocks are spoken for, though the first chunk may take fewer.
            self.available -= needed;
            self.budget -= tokens;
            admitted.push(tokens);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { step_tokens: 16, sequences: 4, block_size: 4 };

    fn decode(length: usize) -> Running {
        let blocks = (length - 1).div_ceil(4);
        Running { computed: length - 1, length, blocks, exclusive: blocks }
    }

    fn prefill(computed: usize, length: usize) -> Running {
        let blocks = computed.div_ceil(4);
        Running { computed, length, blocks, exclusive: blocks }
    }

    fn fresh(length: usize) -> Waiting {
        Waiting { length, cached_blocks: 0, cached_unheld: 0 }
    }

    fn check(running: &[Running], waiting: &[Waiting], available: usize, expected: &str) {
        // What is left of another step must not show.
        let mut plan = StepPlan { run: vec![(7, 7)], tokens: vec![3; 9], ..StepPlan::default() };
        super::plan(running, waiting.iter().copied(), available, &LIMITS, &mut plan);
        let list = |items: &[(usize, usize)]| {
            items.iter().map(|(i, n)| format!("{i}x{n}")).collect::<Vec<_>>().join(" ")
        };
        let preempt: Vec<String> = plan.preempt.iter().map(ToString::to_string).collect();
        let got = format!(
            "run {} | admit {} | preempt {}",
            list(&plan.run),
            list(&plan.admit.iter().copied().enumerate().collect::<Vec<_>>()),
            preempt.join(" ")
        );
        assert_eq!(got, expected);
    }

    #[test]
    fn decodes_go_first_then_prefill_chunks_share_what_is_left() {
        check(&[prefill(4, 40), decode(9), decode(6)], &[], 99, "run 0x14 1x1 2x1 | admit  | preempt ");
        check(&[decode(9)], &[fresh(10), fresh(10)], 99, "run 0x1 | admit 0x10 1x5 | preempt ");
    }

    #[test]
    fn nobody_overtakes_a_waiting_sequence_that_does_not_fit() {
        check(&[decode(9)], &[fresh(40), fresh(4)], 6, "run 0x1 | admit  | preempt ");
        check(&[], &[fresh(24)], 6, "run  | admit 0x16 | preempt ");
        check(&[], &[fresh(25)], 6, "run  | admit  | preempt ");
    }

    #[test]
    fn cached_blocks_are_not_computed_but_taking_unheld_ones_uses_the_pool() {
        let hit = Waiting { length: 18, cached_blocks: 4, cached_unheld: 4 };
        check(&[], &[hit], 5, "run  | admit 0x2 | preempt ");
        check(&[], &[hit], 4, "run  | admit  | preempt ");
        check(&[], &[Waiting { cached_unheld: 0, ..hit }], 1, "run  | admit 0x2 | preempt ");
    }

    #[test]
    fn the_last_to_arrive_is_preempted_and_nothing_is_admitted_then() {
        check(&[decode(9), decode(9), decode(6)], &[fresh(1)], 0, "run 0x1 1x1 | admit  | preempt 2");
        check(&[decode(9), decode(5)], &[fresh(1)], 0, "run 0x1 | admit  | preempt 1");
        // The last one preempts itself when it is the one that needs a block.
        check(&[decode(8), decode(9)], &[], 0, "run 0x1 | admit  | preempt 1");
    }

    #[test]
    fn a_preempted_sequence_gives_back_blocks_and_budget() {
        // The decode takes the last block; the prefill before it needs two more and gets them back.
        check(&[prefill(4, 12), decode(5)], &[], 1, "run 0x8 | admit  | preempt 1");
    }

    #[test]
    fn blocks_that_running_prefills_will_need_are_not_given_to_others() {
        // 16 of 36 tokens are computed after this step's chunk; 5 more blocks are spoken for.
        check(&[prefill(4, 36), decode(6)], &[fresh(4)], 11, "run 0x15 1x1 | admit  | preempt ");
        let limits = Limits { step_tokens: 64, ..LIMITS };
        let admitted = |available| {
            let mut plan = StepPlan::default();
            super::plan(&[prefill(4, 36)], [fresh(4)], available, &limits, &mut plan);
            plan.admit.len()
        };
        assert_eq!((admitted(9), admitted(10)), (0, 1));
    }

    #[test]
    fn what_nobody_needs_is_to_spare() {
        let spare = |running: &[Running], waiting: &[Waiting], available| {
            let mut plan = StepPlan::default();
            super::plan(running, waiting.iter().copied(), available, &LIMITS, &mut plan);
            (plan.spare_tokens, plan.spare_blocks)
        };
        assert_eq!(spare(&[decode(6), decode(9)], &[], 5), (14, 4), "one takes a block");
        assert_eq!(spare(&[decode(6)], &[fresh(7)], 5), (8, 3), "as does who is admitted");
        assert_eq!(spare(&[prefill(4, 36)], &[], 9), (0, 1), "a prefill will need the rest of its blocks");
    }

    #[test]
    fn no_more_sequences_than_the_limit() {
        let waiting = vec![fresh(1); 9];
        check(&[decode(2)], &waiting, 99, "run 0x1 | admit 0x1 1x1 2x1 | preempt ");
    }
}
