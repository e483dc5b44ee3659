//! The engine's thread: take commands, then one step: `plan` -> `forward` -> `sample` -> `meter` -> `commit`.
//!
//! Invariants: every sequence is in `running` or `waiting`, both in order of arrival; every request
//! ends in exactly one `Usage`; after each step the snapshot's two laws hold.

mod report;

use std::any::Any;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::Duration;

use obol_models::batch::{Batch, Span};

use crate::meter::share::{StepClass, split};
use crate::request::{Event, Finish, TokenLogprobs};
use crate::units::{BlockNanos, DeviceNanos, RequestId};
use crate::usage::{HouseTime, Usage};

use super::blocks::{Blocks, PrefixMatch};
use super::sampler::{self, Draw};
use super::scheduler::{self, Limits, Running, StepPlan, Waiting};
use super::sequence::{Part, Request, RequestKey, Sequence};
use super::{Command, EngineStats, Parts, Shared};

/// How often the whole pool is walked.
const INTEGRITY: DeviceNanos = DeviceNanos(60_000_000_000);
/// A crowd of commands must not hold up what runs.
const COMMANDS_A_STEP: usize = 64;

/// Runs until told to shut down, or until a bug ends it; either way every request is settled.
pub(super) fn run(parts: Parts, inbox: Receiver<Command>, shared: Arc<Shared>) {
    let mut engine = Engine::new(parts, shared.clone());
    let outcome = catch_unwind(AssertUnwindSafe(|| engine.serve(&inbox)));
    shared.dead.store(true, Ordering::Release);
    if let Err(panic) = outcome {
        tracing::error!("the engine failed and stops: {}", message(&*panic));
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| engine.end_everything(Finish::Error))) {
            tracing::error!("the engine's requests could not be settled: {}", message(&*panic));
        }
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without a message")
}

struct Engine {
    parts: Parts,
    shared: Arc<Shared>,
    blocks: Blocks,
    since: DeviceNanos,
    running: Vec<Sequence>,
    waiting: VecDeque<Sequence>,
    requests: BTreeMap<RequestKey, Request>,
    by_id: HashMap<RequestId, RequestKey>,
    arrivals: RequestKey,
    finished: Vec<Usage>,
    settled_device: DeviceNanos,
    settled_kv: BlockNanos,
    reported: DeviceNanos,
    changed: bool,
    checked: DeviceNanos,
    stats: EngineStats,
    batch: Batch,
    scratch: sampler::Scratch,
    weights: Vec<u128>,
    shares: Vec<DeviceNanos>,
}

/// A sequence's next token, or why there is none.
type Sampled = Result<Option<(u32, Option<TokenLogprobs>)>, sampler::NotFinite>;

impl Engine {
    fn new(parts: Parts, shared: Arc<Shared>) -> Self {
        let since = parts.partition.cursor();
        Self {
            blocks: Blocks::new(parts.config.blocks, parts.config.block_size, since),
            since,
            parts,
            shared,
            running: Vec::new(),
            waiting: VecDeque::new(),
            requests: BTreeMap::new(),
            by_id: HashMap::new(),
            arrivals: 0,
            finished: Vec::new(),
            settled_device: DeviceNanos::ZERO,
            settled_kv: BlockNanos::ZERO,
            reported: DeviceNanos::ZERO,
            changed: true,
            checked: DeviceNanos::ZERO,
            stats: EngineStats::default(),
            batch: Batch::default(),
            scratch: sampler::Scratch::default(),
            weights: Vec::new(),
            shares: Vec::new(),
        }
    }

    fn serve(&mut self, inbox: &Receiver<Command>) {
        self.report();
        loop {
            for _ in 0..COMMANDS_A_STEP {
                match inbox.try_recv() {
                    Ok(Command::Shutdown) | Err(TryRecvError::Disconnected) => return self.stop(inbox),
                    Ok(command) => self.obey(command),
                    Err(TryRecvError::Empty) => break,
                }
            }
            if self.running.is_empty() && self.waiting.is_empty() {
                self.check_integrity();
                match self.wait(inbox) {
                    Ok(Some(Command::Shutdown)) | Err(()) => return self.stop(inbox),
                    Ok(Some(command)) => self.obey(command),
                    Ok(None) => {}
                }
            } else {
                self.step();
            }
            self.report_if_due();
        }
    }

    /// Waits for a command with nothing to run; that time is idle.
    fn wait(&mut self, inbox: &Receiver<Command>) -> Result<Option<Command>, ()> {
        self.report_if_due();
        let received = inbox.recv_timeout(Duration::from_millis(500));
        self.parts.partition.book(HouseTime::Idle, self.parts.clock.now());
        match received {
            Ok(command) => Ok(Some(command)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(()),
        }
    }

    /// Ends what runs, and what was submitted before anybody could know of the end.
    fn stop(&mut self, inbox: &Receiver<Command>) {
        while let Ok(command) = inbox.try_recv() {
            if !matches!(command, Command::Shutdown) {
                self.obey(command);
            }
        }
        self.end_everything(Finish::Cancelled);
        self.blocks.check_integrity();
    }

    /// Walks all blocks now and then, when nothing else is to do.
    fn check_integrity(&mut self) {
        let now = self.parts.clock.now();
        if now >= self.checked + INTEGRITY {
            self.checked = now;
            self.blocks.check_integrity();
        }
    }

    /// Settles all that is open and sends the last report.
    fn end_everything(&mut self, finish: Finish) {
        let keys: Vec<RequestKey> = self.requests.keys().copied().collect();
        for key in keys {
            self.end_request(key, finish);
        }
        self.report();
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => {
                let key = self.arrivals;
                self.arrivals += 1;
                let request = Request::new(*submission, self.parts.clock.wall());
                let longest = request.new.prompt.len() + request.new.stops.max_tokens as usize;
                let fits = !request.new.prompt.is_empty() && longest <= self.parts.config.max_model_len;
                self.by_id.insert(request.new.id.clone(), key);
                self.requests.insert(key, request);
                self.start_choices(key, 1);
                if !fits {
                    tracing::error!("a request of {longest} tokens reached the engine; this is a bug");
                    self.end_request(key, Finish::Error);
                }
            }
            Command::StopChoice { request, choice } => {
                if let Some(key) = self.by_id.get(&request).copied() {
                    self.end_choice(key, choice, Finish::Stop);
                }
            }
            Command::Cancel { request } => {
                if let Some(key) = self.by_id.get(&request).copied() {
                    self.end_request(key, Finish::Cancelled);
                }
            }
            // Nobody may be waiting for the answer any more.
            Command::Ping(reply) => drop(reply.send(())),
            Command::Shutdown => unreachable!("handled by the loop"),
        }
        self.changed = true;
    }

    /// Lets up to `count` more of a request's choices wait for their turn.
    fn start_choices(&mut self, key: RequestKey, count: usize) {
        let request = self.requests.get_mut(&key).expect("choices start while their request lives");
        let count = count.min(request.unstarted.len());
        for choice in request.unstarted.drain(..count).collect::<Vec<_>>() {
            let lease = self.blocks.lease(request.kv_paid.clone());
            let sequence = Sequence::new(key, choice, request, lease);
            let at = self.waiting.partition_point(|s| (s.request, s.choice) < (key, choice));
            self.waiting.insert(at, sequence);
        }
    }

    // ---- one step ----

    fn step(&mut self) {
        let now = self.parts.clock.now();
        self.parts.partition.book(HouseTime::HostGap, now);
        self.blocks.tick(self.parts.partition.cursor());
        let plan = self.plan();
        let preempted = !plan.preempt.is_empty();
        let planned = self.apply(plan);
        if planned.is_empty() {
            // After a preemption there is room, and the next plan will not be empty.
            if !preempted {
                self.nothing_fits();
            }
            return;
        }
        self.build_batch(&planned);
        let start = self.parts.clock.now();
        let outcome = catch_unwind(AssertUnwindSafe(|| self.forward_and_sample(&planned)));
        let end = self.parts.clock.now();
        self.meter(&planned, start, end);
        match outcome {
            Ok(Ok(sampled)) => self.commit(&planned, sampled),
            Ok(Err(error)) => self.fail(&planned, &error.to_string()),
            Err(panic) => self.fail(&planned, message(&*panic)),
        }
        self.drop_ended();
    }

    /// Views of the queues for the pure scheduler.
    fn plan(&self) -> StepPlan {
        let config = &self.parts.config;
        let available = self.blocks.available();
        // What a preemption would free matters only when blocks may run out in this step.
        let tight = available < self.running.len() + config.step_tokens.div_ceil(config.block_size);
        let running: Vec<Running> = self
            .running
            .iter()
            .map(|s| Running {
                computed: s.computed,
                length: s.tokens.len(),
                blocks: s.lease.len(),
                exclusive: if tight { s.lease.exclusive() } else { 0 },
            })
            .collect();
        let waiting = self.waiting.iter().map(|s| {
            let found = match config.prefix_caching {
                true => self.blocks.match_prefix(s.reusable_keys(config.block_size)),
                false => PrefixMatch::default(),
            };
            Waiting { length: s.tokens.len(), cached_blocks: found.blocks, cached_unheld: found.unheld }
        });
        let limits = Limits {
            step_tokens: config.step_tokens,
            sequences: config.max_sequences,
            block_size: config.block_size,
        };
        scheduler::plan(&running, waiting, available, &limits)
    }

    /// Carries the plan out: preempts, admits, takes blocks. Returns (index in `running`, tokens).
    fn apply(&mut self, plan: StepPlan) -> Vec<(usize, usize)> {
        for index in plan.preempt {
            let mut victim = self.running.remove(index);
            self.stats.preemptions += 1;
            // Dropping the old lease pays for the blocks and gives them back.
            victim.lease = self.blocks.lease(self.requests[&victim.request].kv_paid.clone());
            victim.computed = 0;
            let place = (victim.request, victim.choice);
            let at = self.waiting.partition_point(|s| (s.request, s.choice) < place);
            self.waiting.insert(at, victim);
        }
        let now = self.parts.partition.cursor();
        let mut admitted = Vec::with_capacity(plan.admit.len());
        // Prefixes first: fresh blocks taken before could evict them.
        for tokens in plan.admit {
            let mut sequence = self.waiting.pop_front().expect("the plan admits waiting sequences");
            let request = self.requests.get_mut(&sequence.request).expect("a sequence has a request");
            if self.parts.config.prefix_caching {
                let keys = sequence.reusable_keys(self.parts.config.block_size);
                let found = self.blocks.match_prefix(keys).blocks;
                let keys = keys[..found].to_vec();
                sequence.lease.take_prefix(&keys);
                sequence.computed = found * self.parts.config.block_size;
                sequence.high_water = sequence.high_water.max(sequence.computed);
            }
            if request.begin(sequence.computed as u64, now, &self.parts.calibration) {
                self.stats.prefix_queries += sequence.prompt as u64;
                self.stats.prefix_hits += sequence.computed as u64;
                self.stats.prompt_tokens += sequence.prompt as u64;
            }
            admitted.push((sequence, tokens));
        }
        let mut tokens_of: HashMap<(RequestKey, u32), usize> =
            plan.run.iter().map(|(i, n)| ((self.running[*i].request, self.running[*i].choice), *n)).collect();
        for (sequence, tokens) in admitted {
            tokens_of.insert((sequence.request, sequence.choice), tokens);
            let place = (sequence.request, sequence.choice);
            let at = self.running.partition_point(|s| (s.request, s.choice) < place);
            self.running.insert(at, sequence);
        }
        let block_size = self.parts.config.block_size;
        let mut planned = Vec::with_capacity(tokens_of.len());
        for (index, sequence) in self.running.iter_mut().enumerate() {
            if let Some(tokens) = tokens_of.get(&(sequence.request, sequence.choice)) {
                sequence.lease.grow_to((sequence.computed + tokens).div_ceil(block_size));
                planned.push((index, *tokens));
            }
        }
        planned
    }

    /// The plan was empty: the head of the queue can never run, which admission should have prevented.
    fn nothing_fits(&mut self) {
        let stuck = self.running.is_empty() && self.blocks.counts().held == 0;
        if stuck && let Some(head) = self.waiting.front() {
            let key = head.request;
            tracing::error!("a request fits in an empty pool or not at all; this is a bug");
            self.end_request(key, Finish::Error);
        }
    }

    fn build_batch(&mut self, planned: &[(usize, usize)]) {
        let batch = &mut self.batch;
        batch.clear();
        for (index, tokens) in planned {
            let sequence = &self.running[*index];
            let positions = sequence.computed..sequence.computed + tokens;
            let rows = batch.tokens.len()..batch.tokens.len() + tokens;
            let table = batch.block_tables.len()..batch.block_tables.len() + sequence.lease.len();
            batch.tokens.extend_from_slice(&sequence.tokens[positions.clone()]);
            batch.positions.extend(positions.clone().map(|p| p as u32));
            batch.block_tables.extend(sequence.lease.ids());
            if positions.end == sequence.tokens.len() {
                batch.logit_rows.push(rows.end - 1);
            }
            batch.spans.push(Span { rows, table });
        }
    }

    fn forward_and_sample(
        &mut self,
        planned: &[(usize, usize)],
    ) -> Result<Vec<Sampled>, obol_models::batch::ForwardError> {
        let vocab = self.parts.model.vocab_size();
        let mut rows = self.parts.model.forward(&self.batch)?.chunks_exact(vocab);
        let mut forbidden = Vec::new();
        Ok(planned
            .iter()
            .map(|(index, tokens)| {
                let sequence = &self.running[*index];
                if sequence.computed + tokens < sequence.tokens.len() {
                    return Ok(None);
                }
                let logits = rows.next().expect("a row of logits for each sequence that asked");
                let new = &self.requests[&sequence.request].new;
                forbidden.clear();
                if sequence.generated() < new.stops.min_tokens as usize {
                    forbidden.extend_from_slice(&new.stops.stop_token_ids);
                    if !new.stops.ignore_eos {
                        forbidden.extend_from_slice(&self.parts.config.end_tokens);
                    }
                }
                let position = sequence.tokens.len() as u64;
                let draw = Draw { seed: new.sampling.seed, choice: sequence.choice, position };
                let history = &sequence.history;
                sampler::sample(logits, &new.sampling, history, &forbidden, draw, &mut self.scratch).map(Some)
            })
            .collect())
    }

    /// Splits the step's time over its sequences; what a preemption made us compute again is the house's.
    fn meter(&mut self, planned: &[(usize, usize)], start: DeviceNanos, end: DeviceNanos) {
        let decodes = |(index, _): &&(usize, usize)| {
            self.running[*index].tokens.len() - self.running[*index].computed == 1
        };
        let decoding = planned.iter().filter(decodes).count();
        let class = StepClass::of(decoding, planned.len() - decoding);
        let coefficients = self.parts.calibration.of(class);
        let parts: Vec<Part> =
            planned.iter().map(|(i, n)| self.running[*i].part(*n, planned.len(), coefficients)).collect();
        self.weights.clear();
        self.weights.extend(parts.iter().map(|p| p.weight));
        let time = self.parts.partition.step(start, end);
        self.blocks.tick(self.parts.partition.cursor());
        split(time, &self.weights, &mut self.shares);
        self.stats.steps += 1;
        for (((index, _), part), share) in planned.iter().zip(&parts).zip(&self.shares) {
            let sequence = &self.running[*index];
            let (pays, again) = part.split(*share);
            self.parts.partition.return_to_house(HouseTime::Preemption, again);
            let request = self.requests.get_mut(&sequence.request).expect("a sequence has a request");
            request.charge(self.stats.steps, pays, part.alone, sequence.computed < sequence.prompt);
            request.holds(sequence.lease.len() as u64);
        }
        self.peaks_of_siblings(planned);
        self.changed = true;
    }

    /// Choices of one request share blocks: their peak counts each block once.
    fn peaks_of_siblings(&mut self, planned: &[(usize, usize)]) {
        let mut last = None;
        for (index, _) in planned {
            let key = self.running[*index].request;
            let request = self.requests.get_mut(&key).expect("a sequence has a request");
            if request.open < 2 || last == Some(key) {
                continue;
            }
            last = Some(key);
            let family = self.running.iter().filter(|s| s.request == key);
            let mut blocks: Vec<u32> = family.flat_map(|s| s.lease.ids()).collect();
            blocks.sort_unstable();
            blocks.dedup();
            request.holds(blocks.len() as u64);
        }
    }

    /// Appends what was sampled and ends what is done.
    fn commit(&mut self, planned: &[(usize, usize)], sampled: Vec<Sampled>) {
        let now = self.parts.partition.cursor();
        let block_size = self.parts.config.block_size;
        let (mut ended, mut prompts_done) = (Vec::new(), Vec::new());
        for ((index, tokens), sampled) in planned.iter().zip(sampled) {
            let sequence = &mut self.running[*index];
            let request = self.requests.get_mut(&sequence.request).expect("a sequence has a request");
            let place = (sequence.request, sequence.choice);
            let (token, logprobs) = match sampled {
                Ok(None) => {
                    sequence.computed_more(*tokens, block_size);
                    continue;
                }
                Ok(Some(sampled)) => sampled,
                Err(sampler::NotFinite) => {
                    tracing::error!(request = %request.new.id, "the model's logits are not numbers");
                    ended.push((place, Finish::Error));
                    continue;
                }
            };
            sequence.computed_more(*tokens, block_size);
            if !request.unstarted.is_empty() {
                prompts_done.push(sequence.request);
            }
            sequence.tokens.push(token);
            sequence.history.push(token);
            request.generated_one(now);
            self.stats.generation_tokens += 1;
            let stops = &request.new.stops;
            let at_end = !stops.ignore_eos && self.parts.config.end_tokens.contains(&token);
            if at_end || stops.stop_token_ids.contains(&token) {
                ended.push((place, Finish::Stop));
                continue;
            }
            let choice = sequence.choice;
            // A receiver that is gone is a client that is gone; its cancellation is on the way.
            let _gone = request.events.send(Event::Token { choice, token, logprobs });
            if sequence.generated() >= stops.max_tokens as usize {
                ended.push((place, Finish::Length));
            }
        }
        for ((key, choice), finish) in ended {
            self.end_choice(key, choice, finish);
        }
        for key in prompts_done {
            if self.requests.contains_key(&key) {
                self.start_choices(key, usize::MAX);
            }
        }
    }

    /// The step failed: what took part ends with an error, the rest goes on.
    fn fail(&mut self, planned: &[(usize, usize)], why: &str) {
        tracing::error!("a step of {} sequences failed: {why}", planned.len());
        let mut keys: Vec<RequestKey> =
            planned.iter().map(|(index, _)| self.running[*index].request).collect();
        keys.dedup();
        for key in keys {
            self.end_request(key, Finish::Error);
        }
    }

    // ---- endings ----

    fn end_choice(&mut self, key: RequestKey, choice: u32, finish: Finish) {
        let place = |s: &Sequence| (s.request, s.choice);
        let request = self.requests.get_mut(&key).expect("choices end while their request lives");
        if let Ok(at) = self.running.binary_search_by_key(&(key, choice), place) {
            drop(self.running.remove(at));
        } else if let Ok(at) = self.waiting.binary_search_by_key(&(key, choice), place) {
            drop(self.waiting.remove(at));
        } else if let Ok(at) = request.unstarted.binary_search(&choice) {
            request.unstarted.remove(at);
        } else {
            return; // it has ended already
        }
        request.end_choice(choice, finish);
        if request.open == 0 {
            self.settle(key);
        } else if choice == 0 {
            // Nobody computes the prompt for the others any more, if it was not computed already.
            self.start_choices(key, usize::MAX);
        }
    }

    fn end_request(&mut self, key: RequestKey, finish: Finish) {
        let Some(request) = self.requests.get_mut(&key) else { return };
        let mut choices = std::mem::take(&mut request.unstarted);
        let (from, to) = (
            self.running.partition_point(|s| s.request < key),
            self.running.partition_point(|s| s.request <= key),
        );
        choices.extend(self.running.drain(from..to).map(|s| s.choice));
        let (from, to) = (
            self.waiting.partition_point(|s| s.request < key),
            self.waiting.partition_point(|s| s.request <= key),
        );
        choices.extend(self.waiting.drain(from..to).map(|s| s.choice));
        for choice in choices {
            request.end_choice(choice, finish);
        }
        assert_eq!(request.open, 0, "every open choice is running, waiting or unstarted");
        self.settle(key);
    }

    fn settle(&mut self, key: RequestKey) {
        let request = self.requests.remove(&key).expect("a request is settled once");
        self.by_id.remove(&request.new.id);
        let usage = request.usage(self.parts.clock.now(), self.parts.clock.wall());
        self.settled_device += usage.device();
        self.settled_kv += usage.kv;
        self.finished.push(usage);
    }

    /// Requests whose client is gone end here at the latest, without waiting for their command.
    fn drop_ended(&mut self) {
        let gone: Vec<RequestKey> =
            self.requests.iter().filter(|(_, r)| r.events.is_closed()).map(|(key, _)| *key).collect();
        for key in gone {
            self.end_request(key, Finish::Cancelled);
        }
    }
}
