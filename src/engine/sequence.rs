//! One request and its sequences inside the engine: what was computed, what was used, when it ends.
//! Knows no device, channel of commands, or other sequences.

use std::cell::Cell;
use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use tokio::sync::mpsc::UnboundedSender;

use crate::config::Pooling;
use crate::meter::calibration::Calibration;
use crate::meter::energy::Share;
use crate::meter::share::{Coefficients, Work, split_recompute};
use crate::request::{Event, Finish, NewRequest, TokenLogprobs, Vectors};
use crate::units::{BlockNanos, DeviceNanos, UnixNanos};
use crate::usage::{Accrual, TokenCounts, Usage};

use super::blocks::BlockLease;
use super::draft::{DRAFTS_MAX, Drafter, Estimate, Verified};
use super::fair::{Account, Service};
use super::lane::{Broken, Drawn, Lane, SharedLane, lock};
use super::lines::{self, Line};
use super::prefix::{self, PrefixKey};
use super::step::Allowed;
use super::{Place, Submission};

/// Requests are known inside the engine by their order of arrival.
pub(super) type RequestKey = u64;

/// A request while any of its sequences lives.
pub(super) struct Request {
    pub(super) new: Arc<NewRequest>,
    pub(super) events: UnboundedSender<Event>,
    /// Its place in the queue, until it first runs.
    pub(super) place: Option<Place>,
    /// Block-time paid by leases that ended.
    pub(super) kv_paid: Rc<Cell<BlockNanos>>,
    /// Choices that have not ended.
    pub(super) open: u32,
    /// Choices that wait until the first over their prompt has computed it, or ended; they find the prompt in
    /// the prefix cache then. Ascending.
    pub(super) unstarted: Vec<u32>,
    /// Keys of each prompt's full blocks.
    pub(super) keys: Vec<Vec<PrefixKey>>,
    /// Which prompts were begun.
    begun: Vec<bool>,
    pub(super) line: Line,
    /// What its tenant was given when it came, where it was the only one.
    begins: Option<Service>,
    submitted: DeviceNanos,
    submitted_at: UnixNanos,
    first_run: Option<DeviceNanos>,
    first_token: Option<DeviceNanos>,
    status: Finish,
    tokens: TokenCounts,
    prefill: DeviceNanos,
    decode: DeviceNanos,
    steps: u64,
    last_step: u64,
    peak_blocks: u64,
    saved_by_prefix_cache: DeviceNanos,
    alone: DeviceNanos,
    pub(super) energy: Share,
    pub(super) allowed: Allowed,
}

impl Request {
    pub(super) fn new(
        submission: Submission,
        wall: UnixNanos,
        account: Account,
        begins: Option<Service>,
    ) -> Self {
        let Submission { request: new, keys, events, place, at } = submission;
        let tokens = TokenCounts { prompt: new.prompt.tokens() as u64, ..TokenCounts::default() };
        Self {
            open: new.choices,
            unstarted: (0..new.choices).collect(),
            begun: vec![false; new.prompt.count()],
            line: lines::line(account, new.tier),
            new: Arc::new(new),
            keys,
            begins,
            events,
            place: Some(place),
            kv_paid: Rc::default(),
            submitted: at,
            submitted_at: wall,
            first_run: None,
            first_token: None,
            status: Finish::Stop,
            tokens,
            prefill: DeviceNanos::ZERO,
            decode: DeviceNanos::ZERO,
            steps: 0,
            last_step: 0,
            peak_blocks: 0,
            saved_by_prefix_cache: DeviceNanos::ZERO,
            alone: DeviceNanos::ZERO,
            energy: Share::default(),
            allowed: Allowed::default(),
        }
    }

    /// A sequence is scheduled. With the request's first one the place in the queue is free again. `false` when the
    /// choice's prompt was begun before.
    pub(super) fn begin(
        &mut self,
        choice: u32,
        cached: u64,
        now: DeviceNanos,
        calibration: &Calibration,
    ) -> bool {
        if self.first_run.is_none() {
            self.first_run = Some(now);
            self.place = None;
        }
        let prompt = self.new.prompt_index(choice);
        if std::mem::replace(&mut self.begun[prompt], true) {
            return false;
        }
        self.tokens.cached += cached;
        let spared = Work { tokens: cached, context: 0, logits: 0 };
        let saved = u64::try_from(calibration.prefill.own(spared) / 1000).unwrap_or(0);
        self.saved_by_prefix_cache.0 = self.saved_by_prefix_cache.0.saturating_add(saved);
        true
    }

    /// The choices over the same prompt as this one.
    pub(super) fn siblings(&self, choice: u32) -> Range<u32> {
        let each = self.new.choices_each();
        let first = choice / each * each;
        first..first + each
    }

    pub(super) fn has_not_begun(&self) -> bool {
        self.first_run.is_none()
    }

    /// Charged so far.
    pub(super) fn device(&self) -> DeviceNanos {
        self.prefill + self.decode
    }

    /// Charges its share of a step.
    pub(super) fn charge(&mut self, step: u64, share: DeviceNanos, alone: DeviceNanos, prefill: bool) {
        if prefill {
            self.prefill += share;
        } else {
            self.decode += share;
        }
        self.energy.time += share;
        self.alone += alone;
        if self.last_step != step {
            self.last_step = step;
            self.steps += 1;
        }
    }

    pub(super) fn generated(&mut self, tokens: u64, now: DeviceNanos) {
        self.tokens.completion += tokens;
        self.first_token.get_or_insert(now);
    }

    pub(super) fn drafted(&mut self, verified: Verified) {
        self.tokens.draft_accepted += verified.accepted as u64;
        self.tokens.draft_rejected += (verified.proposed - verified.accepted) as u64;
    }

    pub(super) fn holds(&mut self, blocks: u64) {
        self.peak_blocks = self.peak_blocks.max(blocks);
    }

    /// One choice has ended. The request's status is the gravest of its choices'.
    pub(super) fn end_choice(&mut self, choice: u32, finish: Finish) {
        self.open -= 1;
        let gravity = |f: Finish| match f {
            Finish::Stop => 0,
            Finish::Length => 1,
            Finish::Budget => 2,
            Finish::Cancelled => 3,
            Finish::Error => 4,
        };
        if gravity(finish) > gravity(self.status) {
            self.status = finish;
        }
        // A receiver that is gone is a client that is gone; its cancellation is on the way.
        let _gone = self.events.send(Event::Finished { choice, finish });
    }

    pub(super) fn accrual(&self, held: BlockNanos) -> Accrual {
        Accrual {
            request: self.new.id.clone(),
            ticket: self.new.ticket,
            device: self.device(),
            kv: self.kv_paid.get() + held,
        }
    }

    /// The final account, once every choice has ended and every lease is back.
    pub(super) fn usage(self, now: DeviceNanos, wall: UnixNanos, energy_mj: Option<u64>) -> Usage {
        let device = self.prefill + self.decode;
        // The books may stand at an instant just before the submission was stamped.
        let since = |at: DeviceNanos| DeviceNanos(at.0.saturating_sub(self.submitted.0));
        Usage {
            request: self.new.id.clone(),
            ticket: self.new.ticket,
            status: self.status,
            seed: self.new.sampling.seed,
            tokens: self.tokens,
            prefill: self.prefill,
            decode: self.decode,
            steps: self.steps,
            kv: self.kv_paid.get(),
            kv_peak_blocks: self.peak_blocks,
            queue: since(self.first_run.unwrap_or(now)),
            ttft: self.first_token.map(since),
            wall: since(now),
            submitted_at: self.submitted_at,
            finished_at: wall,
            saved_by_prefix_cache: self.saved_by_prefix_cache,
            saved_by_batching: DeviceNanos(self.alone.0.saturating_sub(device.0)),
            energy_mj,
        }
    }
}

/// One choice of a request: a growing list of tokens chased by its KV.
pub(super) struct Sequence {
    pub(super) request: RequestKey,
    pub(super) choice: u32,
    /// Where it waits.
    pub(super) line: Line,
    /// Its prompt, once begun, has the turn that its tenant had with this, whatever it is charged meanwhile.
    pub(super) begins: Option<Service>,
    /// Prompt, then generated.
    pub(super) tokens: Vec<u32>,
    pub(super) prompt: usize,
    /// Tokens of the prompt that are scored, or need not be.
    pub(super) scored: usize,
    /// Rows of the prompt that its vector is made of and has, or that it needs not.
    pooled: usize,
    /// Tokens whose KV is in the lease's blocks, as far as steps were read.
    pub(super) computed: usize,
    /// The most it ever was: computing below it again is our doing (a preemption).
    pub(super) high_water: usize,
    /// Keys of the full blocks of `tokens[..]`, as far as they were needed.
    pub(super) keys: Vec<PrefixKey>,
    pub(super) root: PrefixKey,
    pub(super) lease: BlockLease,
    pub(super) lane: SharedLane,
    new: Arc<NewRequest>,
    pub(super) drafter: Drafter,
    /// Tokens that it computes in the step that is being made ready, or was last.
    pub(super) rows: usize,
    /// The last of those that are only proposed.
    pub(super) drafts: Vec<u32>,
    flying: Flying,
    /// It has ended, but takes part in a step in flight.
    pub(super) ended: Option<Finish>,
}

/// A sequence's part in steps that the device has but whose outcome was not read yet.
#[derive(Default)]
struct Flying {
    steps: usize,
    /// Tokens that they compute.
    rows: usize,
    /// Where the last of them draws its next token.
    draw: Option<usize>,
}

/// What one sequence does in a step, with its weights.
pub(super) struct Part {
    pub(super) weight: u128,
    new: u128,
    again: u128,
    pub(super) alone: DeviceNanos,
}

impl Part {
    /// What the request will pay, by the fit, for its part in a step of so many sequences.
    pub(super) fn expected(&self, sequences: usize) -> DeviceNanos {
        let picos = self.new / sequences as u128;
        DeviceNanos(u64::try_from(picos / 1000).unwrap_or(u64::MAX))
    }

    /// Splits the sequence's share into what the request pays and what recomputing costs the house.
    pub(super) fn split(&self, share: DeviceNanos) -> (DeviceNanos, DeviceNanos) {
        split_recompute(share, self.new, self.again)
    }
}

impl Sequence {
    /// Has room for all that it will ever have, so that growing allocates nothing.
    pub(super) fn new(key: RequestKey, choice: u32, request: &Request, lease: BlockLease) -> Self {
        let (new, block_size) = (&request.new, lease.block_size());
        let prompt = new.prompt_of(choice);
        let longest = prompt.len() + new.stops.max_tokens as usize;
        let mut tokens = Vec::with_capacity(longest);
        tokens.extend_from_slice(prompt);
        let mut keys = Vec::with_capacity(longest / block_size);
        keys.extend_from_slice(&request.keys[new.prompt_index(choice)]);
        Self {
            request: key,
            choice,
            line: request.line,
            begins: request.begins,
            tokens,
            prompt: prompt.len(),
            // Before the first token nothing says how likely it is.
            scored: if new.score_prompts && choice.is_multiple_of(new.choices_each()) {
                1
            } else {
                prompt.len()
            },
            pooled: match new.vectors {
                Some(Vectors::Pooled(Pooling::Mean)) => 0,
                Some(Vectors::Pooled(Pooling::Last)) => prompt.len() - 1,
                Some(Vectors::Encoded) | None => prompt.len(),
            },
            computed: 0,
            high_water: 0,
            keys,
            root: prefix::root(new.salt),
            lease,
            lane: Arc::new(Mutex::new(Lane::new(new, choice))),
            new: new.clone(),
            drafter: Drafter::new(),
            rows: 0,
            drafts: Vec::new(),
            flying: Flying::default(),
            ended: None,
        }
    }

    /// Tokens whose KV is there when all steps in flight have run.
    pub(super) fn start(&self) -> usize {
        self.computed + self.flying.rows
    }

    /// Tokens that it has then, when it goes on: what the last step in flight draws is not known yet.
    pub(super) fn length(&self) -> usize {
        self.tokens.len() + usize::from(self.flying.draw.is_some())
    }

    /// Tokens that it will have when steps in flight have run, as far as they are to be computed: none more than
    /// are when it has ended, or will have by its number of tokens.
    pub(super) fn wanted(&self) -> usize {
        let drawn = self.flying.draw.is_some();
        let last = drawn && self.length() >= self.longest();
        // What a grammar allows after a token is known only when the token is.
        let guided = drawn && self.new.grammar.is_some();
        if self.ended.is_some() || last || guided { self.start() } else { self.length() }
    }

    /// Which draw of the step in flight its row is to be fed by.
    pub(super) fn fed(&self) -> Option<usize> {
        self.flying.draw.filter(|_| self.start() + self.rows == self.length())
    }

    /// The device was given a step that computes `rows` of its tokens.
    pub(super) fn took_off(&mut self, rows: usize, draw: Option<usize>) {
        self.flying.steps += 1;
        self.flying.rows += rows;
        self.flying.draw = draw;
    }

    /// The oldest step that it takes part in was read.
    pub(super) fn landed(&mut self, rows: usize) {
        self.flying.steps -= 1;
        self.flying.rows -= rows;
        if self.flying.steps == 0 {
            self.flying.draw = None;
        }
    }

    /// What was in flight is lost.
    pub(super) fn crashed(&mut self) {
        self.flying = Flying::default();
    }

    pub(super) fn flies(&self) -> bool {
        self.flying.steps > 0
    }

    /// What the step drew, and why it could not. The buffer is to be given back.
    pub(super) fn take_drawn(&self) -> (Vec<Drawn>, Option<Broken>) {
        let mut lane = lock(&self.lane);
        (std::mem::take(&mut lane.drawn), lane.broken.take())
    }

    /// What the step found out about its prompt.
    pub(super) fn take_scores(&mut self) -> Vec<TokenLogprobs> {
        let scores = std::mem::take(&mut lock(&self.lane).scores);
        self.scored += scores.len();
        scores
    }

    pub(super) fn give_back(&self, buffer: Vec<Drawn>) {
        lock(&self.lane).drawn = buffer;
    }

    /// Rows of logits in the step that is being made ready: those that score the prompt, then those that are drawn
    /// from.
    pub(super) fn logits(&self) -> usize {
        if self.new.vectors.is_some() {
            return 0;
        }
        let drafts = self.drafts.len();
        let drawn = if self.start() + self.rows - drafts == self.length() { 1 + drafts } else { 0 };
        self.to_score().len() + drawn
    }

    /// Positions of the prompt's tokens that the step scores: a row says how likely the token behind it was.
    pub(super) fn to_score(&self) -> Range<usize> {
        let from = self.scored.max(self.start() + 1);
        from..(self.start() + self.rows + 1).min(self.prompt).max(from)
    }

    /// Whether tokens of its prompt are still to be scored.
    pub(super) fn scores(&self) -> bool {
        self.scored < self.prompt
    }

    /// Positions whose hidden states the step gives for its vector.
    pub(super) fn to_pool(&self) -> Range<usize> {
        let from = self.pooled.max(self.start());
        from..(self.start() + self.rows).min(self.prompt).max(from)
    }

    /// Its vector, when the step that was read gave the last row of it.
    pub(super) fn take_vector(&mut self) -> Option<Result<Vec<f32>, Broken>> {
        if self.pooled == self.prompt {
            return None;
        }
        self.pooled = self.to_pool().end;
        (self.pooled == self.prompt).then(|| lock(&self.lane).vector())
    }

    /// Whether only its last token is to be computed, and another one to be drawn.
    pub(super) fn decodes(&self) -> bool {
        self.length() - self.start() == 1 && self.new.vectors.is_none()
    }

    /// Tokens that it has in the end, at most.
    fn longest(&self) -> usize {
        self.prompt + self.new.stops.max_tokens as usize
    }

    /// Proposes what may follow: how many tokens, and the chance that each holds.
    pub(super) fn propose(&mut self, end_tokens: &[u32], prior: &[Estimate; 2]) -> Option<(usize, f64)> {
        if self.new.grammar.is_some() {
            // What is allowed after a proposal is known only when it was drawn.
            return None;
        }
        // The step draws one token more than hold.
        let (longest, stops) = (self.longest(), &self.new.stops);
        let room = longest.saturating_sub(self.tokens.len() + 1);
        let ends =
            |token| stops.stop_token_ids.contains(&token) || !stops.ignore_eos && end_tokens.contains(&token);
        let proposed = self.drafter.propose(&self.tokens, longest, room, ends).len();
        (proposed > 0).then(|| (proposed, self.drafter.chance(prior)))
    }

    /// Adds the first `rows` tokens of its proposal to the step, and the blocks that they need.
    pub(super) fn draft(&mut self, rows: usize, block_size: usize) {
        self.drafts.reserve_exact(DRAFTS_MAX);
        self.drafts.extend_from_slice(&self.drafter.proposal()[..rows]);
        self.rows += rows;
        self.lease.grow_to((self.computed + self.rows).div_ceil(block_size));
    }

    /// After a step that drew `drawn` tokens: its KV goes as far as proposals held, and blocks beyond that are
    /// given back.
    pub(super) fn verified(&mut self, accepted: usize, block_size: usize) -> Verified {
        let proposed = self.drafts.len();
        self.computed_more(self.rows - (proposed - accepted), block_size);
        self.lease.shrink_to(self.computed.div_ceil(block_size));
        let verified = Verified { found: self.drafter.found(), proposed, accepted };
        self.drafter.learn(verified);
        verified
    }

    /// The most blocks that it will ever hold.
    pub(super) fn blocks_max(&self, block_size: usize) -> usize {
        self.longest().div_ceil(block_size)
    }

    /// Keys of the prefix that may come from the cache: at least one token is always computed.
    /// What is to be scored must be computed.
    pub(super) fn reusable_keys(&self, block_size: usize) -> &[PrefixKey] {
        if self.scores() {
            return &[];
        }
        // So must what is to be pooled.
        let known = if self.new.vectors.is_some() { self.pooled } else { self.tokens.len() };
        &self.keys[..self.keys.len().min(known.min(self.tokens.len() - 1) / block_size)]
    }

    pub(super) fn generated(&self) -> usize {
        self.tokens.len() - self.prompt
    }

    /// Its work and weight in the step that is being made ready, which has `sequences`.
    pub(super) fn part(&self, sequences: usize, of: &Coefficients) -> Part {
        let (tokens, logits, start) = (self.rows, self.logits() as u64, self.start());
        let again = self.high_water.saturating_sub(start).min(tokens);
        let recomputed = Work { tokens: again as u64, context: start as u64, logits: 0 };
        let fresh = Work { tokens: (tokens - again) as u64, context: (start + again) as u64, logits };
        let fixed = u128::from(of.step);
        let (mut new, mut redone) =
            (sequences as u128 * of.own(fresh), sequences as u128 * of.own(recomputed));
        if again < tokens {
            new = (new + fixed).max(1);
        } else {
            redone = (redone + fixed).max(1);
        }
        // Alone, nothing would have been preempted.
        let alone = if again < tokens { of.alone(fresh) } else { DeviceNanos::ZERO };
        Part { weight: new + redone, new, again: redone, alone }
    }

    /// Its KV has grown by `tokens`, all of them known: full blocks become available to others.
    pub(super) fn computed_more(&mut self, tokens: usize, block_size: usize) {
        let before = self.computed / block_size;
        self.computed += tokens;
        self.high_water = self.high_water.max(self.computed);
        let after = self.computed / block_size;
        if after > before {
            prefix::extend(&mut self.keys, self.root, &self.tokens[..after * block_size], block_size);
            for index in before..after {
                self.lease.publish(index, self.keys[index]);
            }
        }
    }

    /// As [`Sequence::computed_more`], after it has ended: what it ended by may never have been computed.
    pub(super) fn computed_past_end(&mut self, tokens: usize, block_size: usize) {
        if self.ended != Some(Finish::Error) && self.computed + tokens <= self.tokens.len() {
            self.computed_more(tokens, block_size);
        }
    }
}
