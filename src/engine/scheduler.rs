//! Decides what the next step computes. A pure function of views: no device, channel, clock or log.
//!
//! One token budget a step: running decodes first, then prompts in turns that the caller decides on: chunks of
//! running prefills, and waiting sequences. When blocks run out the running sequence that is last in the caller's
//! order is preempted and will be computed again. A waiting sequence is admitted only when all its tokens fit beside
//! what is running, and nobody overtakes it. When a prompt of one line is done in a step, those of lines after it
//! take part with few tokens, for they would hold its first token up. Nor do prompts that have others of their tenant
//! beside them make a step longer than `crowd_tokens`: whoever comes meanwhile waits for its end. Who is held back for
//! a prompt takes no part in a step that computes some of it, and keeps its blocks. The tier `batch` has few tokens of
//! a step, so that whoever comes meanwhile does not wait for long, and fewer beside others, whose step it makes longer.

use super::lines::{Line, tier};
use crate::request::Tier;

/// A running sequence, as the scheduler sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Running {
    /// Whose it is.
    pub line: usize,
    /// Tokens whose KV is there.
    pub computed: usize,
    /// Tokens it has: prompt and generated so far. At least `computed + 1`, unless it has ended.
    pub length: usize,
    pub blocks: usize,
    /// Blocks that come free if it is preempted.
    pub exclusive: usize,
    /// Its tenant has more than its request.
    pub crowd: bool,
    /// Takes no part where the step computes of `Limits::favoured`.
    pub held: bool,
}

impl Running {
    /// Tokens that it can compute now.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.length - self.computed
    }
}

/// A waiting sequence, as the scheduler sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    /// Whose it is.
    pub line: usize,
    pub length: usize,
    /// Leading blocks found in the prefix cache, at most what leaves one token to compute.
    pub cached_blocks: usize,
    /// Those of them that nobody holds.
    pub cached_unheld: usize,
    /// Its tenant has more than its request.
    pub crowd: bool,
}

/// Whose prompt is next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Of `running`, by its index.
    Running(usize),
    Waiting(Waiting),
}

/// Whose prompts others are held back for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Favoured {
    /// This line's.
    Line(usize),
    /// Those of everybody who is not held back.
    Prompts,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub step_tokens: usize,
    /// Tokens of a step with which prompts of a crowd end, but for a few: from 1 to `step_tokens`.
    pub crowd_tokens: usize,
    /// Tokens that sequences of the tier `batch` may have in a step, together: by themselves, and beside others.
    pub batch_tokens: usize,
    pub batch_tokens_beside: usize,
    /// Nobody who is held back for it has turns.
    pub favoured: Option<Favoured>,
    /// At most `step_tokens`, so that every decode fits in a step.
    pub sequences: usize,
    pub block_size: usize,
}

impl Limits {
    /// Prompt tokens that a line may compute in a step in which a prompt of a line before it is done, and crowds in one
    /// that is long with decodes.
    fn beside(&self) -> usize {
        (self.crowd_tokens / 8).max(1)
    }
}

fn is_batch(line: Line) -> bool {
    tier(line) == Tier::Batch
}

/// The next step, in buffers that are used again. Indices are into the views; tokens are how many each computes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StepPlan {
    /// (index of running, tokens), in the order of the views.
    pub run: Vec<(usize, usize)>,
    /// (which of the waiting sequences that had a turn, tokens), in their order.
    pub admit: Vec<(usize, usize)>,
    /// Indices of running sequences that lose their blocks, last first.
    pub preempt: Vec<usize>,
    /// The waiting sequence for which there was no room.
    pub blocked: Option<Waiting>,
    /// Whether those take no part that are held back.
    pub held: bool,
    /// What is left for this step when everybody has what they need, and nothing was preempted.
    pub spare_tokens: usize,
    pub spare_blocks: usize,
    /// Tokens given to each running sequence.
    tokens: Vec<usize>,
    /// Prompt tokens given to each line.
    lines: Vec<usize>,
}

impl StepPlan {
    fn clear(&mut self, running: usize) {
        self.run.clear();
        self.admit.clear();
        self.preempt.clear();
        self.blocked = None;
        self.held = false;
        self.tokens.clear();
        self.tokens.resize(running, 0);
        self.lines.clear();
    }
}

/// Plans a step into `plan`. `running` begins with who keeps its blocks longest; of one line, with who arrived first.
/// `turns` has prefills of `running` and waiting sequences, and no more of it is looked at than can take part, and
/// one; `available` is the number of blocks that can be given out.
pub fn plan(
    running: &[Running],
    turns: impl IntoIterator<Item = Turn>,
    available: usize,
    limits: &Limits,
    plan: &mut StepPlan,
) {
    plan.clear(running.len());
    let StepPlan { run, admit, preempt, blocked, held, spare_tokens, spare_blocks, tokens, lines } = plan;
    let budget = limits.step_tokens;
    let (kept, prompts, done) = (running.len(), 0, None);
    let (batch, others) = (0, 0);
    let mut step =
        Step { running, limits, available, tokens, kept, budget, prompts, batch, others, lines, done };
    step.decode(|view| !view.held);
    // With blocks for all that runs nobody needs to be preempted for a prompt.
    let mut free = step.free().filter(|_| step.kept == running.len());
    if let Some(free) = &mut free {
        *blocked = step.take_turns(turns, free, admit);
    }
    *held = step.favours();
    if !*held {
        step.decode(|view| view.held);
    }
    // Those that had no turn.
    for (index, view) in running.iter().enumerate() {
        let takes_part = !(*held && view.held);
        if index < step.kept && view.remaining() > 1 && step.tokens[index] == 0 && takes_part {
            step.schedule(index);
        }
    }
    preempt.extend((step.kept..running.len()).rev());
    let spare = if step.batch > 0 { step.left_to_batch() } else { step.budget };
    (*spare_tokens, *spare_blocks) = (spare, free.unwrap_or(0));
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
    /// Prompt tokens given.
    prompts: usize,
    /// Tokens given to the tier `batch`, and to all others.
    batch: usize,
    others: usize,
    /// Prompt tokens given to each line.
    lines: &'a mut Vec<usize>,
    /// Of the first prompt that is done in this step.
    done: Option<usize>,
}

impl Step<'_> {
    fn new_blocks(&self, index: usize, tokens: usize) -> usize {
        let view = &self.running[index];
        (view.computed + tokens).div_ceil(self.limits.block_size).saturating_sub(view.blocks)
    }

    /// One token for each of these that decodes.
    fn decode(&mut self, of: impl Fn(&Running) -> bool) {
        for (index, _) in
            self.running.iter().enumerate().filter(|(_, view)| view.remaining() == 1 && of(view))
        {
            if index < self.kept {
                self.schedule(index);
            }
        }
    }

    /// Whether the step computes something for which others are held back. Asked before any of them has tokens.
    fn favours(&self) -> bool {
        self.limits.favoured.is_some_and(|favoured| match favoured {
            Favoured::Line(line) => {
                let given = self.lines.get(line).is_some_and(|tokens| *tokens > 0);
                given || (0..self.kept).any(|i| self.running[i].line == line && self.tokens[i] > 0)
            }
            Favoured::Prompts => self.prompts > 0,
        })
    }

    /// Blocks that nobody who runs will need for the tokens that it has; `None` when there are too few for these.
    fn free(&self) -> Option<usize> {
        let waits = |i: &usize| self.tokens[*i] == 0;
        let outstanding: usize =
            (0..self.kept).filter(waits).map(|i| self.new_blocks(i, self.running[i].remaining())).sum();
        self.available.checked_sub(outstanding)
    }

    /// Gives the sequence what it may have, preempting the last ones for blocks.
    fn schedule(&mut self, index: usize) {
        let Running { line, crowd, .. } = self.running[index];
        let remaining = self.running[index].remaining();
        let mut tokens = self.most(line, crowd, remaining);
        while tokens > 0 && self.new_blocks(index, tokens) > self.available {
            self.preempt_last();
            if index >= self.kept {
                return; // it was itself the last
            }
            tokens = self.most(line, crowd, remaining);
        }
        self.available -= self.new_blocks(index, tokens);
        self.spend(line, tokens);
        self.tokens[index] = tokens;
        if remaining > 1 {
            self.gave(line, tokens, remaining);
        }
    }

    fn preempt_last(&mut self) {
        self.kept -= 1;
        let victim = self.kept;
        self.available += self.running[victim].exclusive + self.new_blocks(victim, self.tokens[victim]);
        self.budget += self.tokens[victim];
        if is_batch(self.running[victim].line) {
            self.batch -= self.tokens[victim];
        } else {
            self.others -= self.tokens[victim];
        }
        if self.running[victim].remaining() > 1 {
            self.prompts -= self.tokens[victim];
        }
        self.tokens[victim] = 0;
    }

    /// The tokens that a line may have of as many: one decodes, more are of a prompt.
    fn most(&self, line: usize, crowd: bool, remaining: usize) -> usize {
        let mut most = remaining.min(self.budget);
        if is_batch(line) {
            most = most.min(self.left_to_batch());
        }
        if remaining > 1 && crowd {
            let used = self.limits.step_tokens - self.budget;
            let room = self.limits.crowd_tokens.saturating_sub(used);
            most = most.min(room.max(self.limits.beside().saturating_sub(self.prompts)));
        }
        if self.done.is_some_and(|done| done != line) {
            let given = self.lines.get(line).copied().unwrap_or(0);
            most = most.min(self.limits.beside().saturating_sub(given));
        }
        most
    }

    /// What the tier `batch` may still have. Its turns come after everybody's, so that others have theirs by then.
    fn left_to_batch(&self) -> usize {
        let Limits { batch_tokens, batch_tokens_beside, .. } = self.limits;
        let most = if self.others > 0 { *batch_tokens_beside } else { *batch_tokens };
        most.saturating_sub(self.batch).min(self.budget)
    }

    fn spend(&mut self, line: usize, tokens: usize) {
        self.budget -= tokens;
        if is_batch(line) {
            self.batch += tokens;
        } else {
            self.others += tokens;
        }
    }

    fn gave(&mut self, line: usize, tokens: usize, remaining: usize) {
        if line >= self.lines.len() {
            self.lines.resize(line + 1, 0);
        }
        self.lines[line] += tokens;
        self.prompts += tokens;
        if tokens == remaining {
            self.done.get_or_insert(line);
        }
    }

    /// Gives out the budget and `free` blocks by turns, until a waiting sequence finds no room: that one is given
    /// back.
    fn take_turns(
        &mut self,
        turns: impl IntoIterator<Item = Turn>,
        free: &mut usize,
        admitted: &mut Vec<(usize, usize)>,
    ) -> Option<Waiting> {
        let block_size = self.limits.block_size;
        let mut turns = turns.into_iter();
        let mut waiting = 0;
        while self.budget > 0 {
            let view = match turns.next()? {
                Turn::Running(index) => {
                    self.schedule(index);
                    continue;
                }
                Turn::Waiting(view) => view,
            };
            waiting += 1;
            let remaining = view.length - view.cached_blocks * block_size;
            let tokens = self.most(view.line, view.crowd, remaining);
            if tokens == 0 {
                // Its line has no more in this step, and whoever comes after it was given more: a line may be long.
                return None;
            }
            let sequences = self.kept + admitted.len();
            let needed = view.length.div_ceil(block_size) - view.cached_blocks + view.cached_unheld;
            // A block to grow into for each that runs already, or admission would end in preemption.
            if sequences == self.limits.sequences || needed + sequences > *free {
                return Some(view);
            }
            // All of its blocks are spoken for, though the first chunk may take fewer.
            *free -= needed;
            self.spend(view.line, tokens);
            self.gave(view.line, tokens, remaining);
            admitted.push((waiting - 1, tokens));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        step_tokens: 16,
        crowd_tokens: 16,
        batch_tokens: 16,
        batch_tokens_beside: 16,
        favoured: None,
        sequences: 4,
        block_size: 4,
    };

    fn decode(length: usize) -> Running {
        let blocks = (length - 1).div_ceil(4);
        Running {
            line: 0,
            computed: length - 1,
            length,
            blocks,
            exclusive: blocks,
            crowd: false,
            held: false,
        }
    }

    fn prefill(computed: usize, length: usize) -> Running {
        let blocks = computed.div_ceil(4);
        Running { line: 0, computed, length, blocks, exclusive: blocks, crowd: false, held: false }
    }

    fn fresh(length: usize) -> Waiting {
        Waiting { line: 0, length, cached_blocks: 0, cached_unheld: 0, crowd: false }
    }

    /// Whoever runs first, all in order.
    fn turns(running: &[Running], waiting: &[Waiting]) -> Vec<Turn> {
        let prefills = (0..running.len()).filter(|i| running[*i].remaining() > 1).map(Turn::Running);
        prefills.chain(waiting.iter().copied().map(Turn::Waiting)).collect()
    }

    fn check(running: &[Running], waiting: &[Waiting], available: usize, expected: &str) {
        // What is left of another step must not show.
        let mut plan = StepPlan { run: vec![(7, 7)], tokens: vec![3; 9], ..StepPlan::default() };
        super::plan(running, turns(running, waiting), available, &LIMITS, &mut plan);
        let list = |items: &[(usize, usize)]| {
            items.iter().map(|(i, n)| format!("{i}x{n}")).collect::<Vec<_>>().join(" ")
        };
        let preempt: Vec<String> = plan.preempt.iter().map(ToString::to_string).collect();
        let got =
            format!("run {} | admit {} | preempt {}", list(&plan.run), list(&plan.admit), preempt.join(" "));
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
        let hit = Waiting { line: 0, length: 18, cached_blocks: 4, cached_unheld: 4, crowd: false };
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
        let limits = Limits { step_tokens: 64, crowd_tokens: 64, ..LIMITS };
        let admitted = |available| {
            let mut plan = StepPlan::default();
            let running = [prefill(4, 36)];
            super::plan(&running, turns(&running, &[fresh(4)]), available, &limits, &mut plan);
            plan.admit.len()
        };
        assert_eq!((admitted(9), admitted(10)), (0, 1));
    }

    #[test]
    fn what_nobody_needs_is_to_spare() {
        let spare = |running: &[Running], waiting: &[Waiting], available| {
            let mut plan = StepPlan::default();
            super::plan(running, turns(running, waiting), available, &LIMITS, &mut plan);
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

    /// What each turn gets: of those that run, then of those that wait.
    fn given(running: &[Running], turns: &[Turn], crowd_tokens: usize) -> (Vec<usize>, Vec<usize>) {
        let mut plan = StepPlan::default();
        super::plan(running, turns.iter().copied(), 99, &Limits { crowd_tokens, ..LIMITS }, &mut plan);
        let tokens = |list: &[(usize, usize)]| list.iter().map(|(_, tokens)| *tokens).collect();
        (tokens(&plan.run), tokens(&plan.admit))
    }

    fn of(line: usize, length: usize) -> Turn {
        Turn::Waiting(Waiting { line, ..fresh(length) })
    }

    #[test]
    fn beside_a_prompt_that_is_done_each_other_line_has_an_eighth_of_a_step() {
        assert_eq!(given(&[], &[of(0, 5), of(2, 10), of(4, 10)], 16).1, [5, 2, 2]);
        assert_eq!(given(&[], &[of(0, 5), of(0, 6), of(2, 10)], 16).1, [5, 6, 2], "its own line goes on");
        assert_eq!(given(&[], &[of(0, 5), of(2, 1), of(2, 1), of(4, 9)], 16).1, [5, 1, 1, 2]);
        assert_eq!(given(&[], &[of(0, 20)], 16).1, [16], "nobody's is done");
        let other = [Running { line: 2, ..prefill(4, 40) }];
        assert_eq!(given(&other, &[of(0, 5), Turn::Running(0)], 16), (vec![2], vec![5]));
        assert_eq!(given(&other, &[Turn::Running(0), of(0, 5)], 16), (vec![16], vec![]));
    }

    #[test]
    fn a_line_that_has_no_more_in_a_step_is_not_walked_to_its_end() {
        let mut looked = 0;
        let turns = (0..1_000).map(|index| {
            looked = index;
            if index == 0 { of(0, 5) } else { of(2, 10) }
        });
        super::plan(&[], turns, 99, &LIMITS, &mut StepPlan::default());
        assert_eq!(looked, 2);
    }

    #[test]
    fn prompts_of_a_crowd_make_no_long_step() {
        let crowd = |length| Turn::Waiting(Waiting { line: 2, crowd: true, ..fresh(length) });
        assert_eq!(given(&[], &[crowd(10), crowd(10)], 4).1, [4]);
        assert_eq!(given(&[], &[crowd(3), crowd(10)], 4).1, [3, 1]);
        assert_eq!(
            given(&[], &[of(0, 10), crowd(10)], 4).1,
            [10],
            "a request that is alone has its prompt whole"
        );
        let running =
            [Running { crowd: true, ..prefill(4, 40) }, decode(9), Running { crowd: true, ..decode(6) }];
        assert_eq!(given(&running, &[Turn::Running(0)], 4).0, [2, 1, 1], "decodes make steps long, too");
        assert_eq!(given(&running, &[Turn::Running(0)], 2).0, [1, 1, 1], "but do not keep prompts out");
    }

    #[test]
    fn who_is_held_back_sits_out_a_step_of_the_favoured_prompt_and_no_other() {
        let held = |view: Running| Running { line: 2, held: true, ..view };
        let crowd = [held(decode(9)), held(prefill(4, 40)), Running { line: 4, ..decode(6) }];
        let plan = |running: &[Running], turns: &[Turn], available| {
            let mut plan = StepPlan::default();
            let limits = Limits { favoured: Some(Favoured::Line(0)), ..LIMITS };
            super::plan(running, turns.iter().copied(), available, &limits, &mut plan);
            (plan.held, plan.run, plan.admit, plan.spare_blocks)
        };
        // The blocks that they will need stay theirs: 1 of the second decode, 9 of the other prompt.
        assert_eq!(plan(&crowd, &[of(0, 5)], 20), (true, vec![(2, 1)], vec![(0, 5)], 8));
        assert_eq!(plan(&crowd, &[of(0, 28)], 20), (true, vec![(2, 1)], vec![(0, 15)], 3));
        let own = [crowd[0], prefill(4, 40)];
        assert_eq!(plan(&own, &[Turn::Running(1)], 20).1, [(1, 16)]);
        assert_eq!(plan(&[crowd[0], decode(9)], &[], 20).1, [(1, 1)], "a prompt's last token");
        // Where the favoured one finds no room there is nothing to wait for.
        assert_eq!(plan(&crowd, &[of(0, 48)], 20).1, [(0, 1), (1, 14), (2, 1)]);
        assert_eq!(plan(&crowd, &[], 20).1, [(0, 1), (1, 14), (2, 1)]);
    }

    #[test]
    fn a_batch_has_few_tokens_of_a_step_and_fewer_beside_others() {
        let batch = |view: Running| Running { line: 3, ..view };
        let plan = |running: &[Running], waiting: &[Waiting]| {
            let mut plan = StepPlan::default();
            let limits = Limits { batch_tokens: 5, batch_tokens_beside: 1, ..LIMITS };
            super::plan(running, turns(running, waiting), 99, &limits, &mut plan);
            (plan.run, plan.admit, plan.spare_tokens)
        };
        let waiting = Waiting { line: 3, ..fresh(9) };
        let decodes = [batch(decode(6)), batch(decode(9))];
        assert_eq!(plan(&decodes, &[waiting]), (vec![(0, 1), (1, 1)], vec![(0, 3)], 0));
        assert_eq!(plan(&decodes, &[]), (vec![(0, 1), (1, 1)], vec![], 3));
        let beside = [decode(6), batch(decode(6)), batch(decode(9)), batch(prefill(4, 40))];
        assert_eq!(plan(&beside, &[]), (vec![(0, 1), (1, 1)], vec![], 0), "the others sit this one out");
        assert_eq!(plan(&[decode(6)], &[waiting]), (vec![(0, 1)], vec![(0, 1)], 0));
        assert_eq!(plan(&[decode(6)], &[fresh(9), waiting]), (vec![(0, 1)], vec![(0, 9), (1, 1)], 0));
    }

    #[test]
    fn who_is_held_back_for_all_prompts_sits_out_a_step_that_computes_any() {
        let held = |view: Running| Running { line: 2, held: true, ..view };
        let batch = [decode(6), held(decode(9)), held(prefill(4, 40))];
        let plan = |running: &[Running], turns: &[Turn]| {
            let mut plan = StepPlan::default();
            let limits = Limits { favoured: Some(Favoured::Prompts), ..LIMITS };
            super::plan(running, turns.iter().copied(), 20, &limits, &mut plan);
            (plan.held, plan.run, plan.admit)
        };
        assert_eq!(plan(&batch, &[of(0, 5)]), (true, vec![(0, 1)], vec![(0, 5)]));
        assert_eq!(plan(&batch, &[of(4, 5)]), (true, vec![(0, 1)], vec![(0, 5)]), "whosever it is");
        assert_eq!(
            plan(&batch, &[]),
            (false, vec![(0, 1), (1, 1), (2, 14)], vec![]),
            "decodes are no prompts"
        );
    }
}
