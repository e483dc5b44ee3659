//! The engine's thread: take commands, then one turn: plan -> submit -> wait -> meter -> advance; what a step
//! leaves to say (`post`) is said while the next one runs.
//!
//! A device that can have two steps is given the next one while a step runs, before its tokens are known: `submit`
//! and `wait` are then of different steps. What ends in the one that is read may take part in the one that runs
//! already: it stays in `running`, has ended, and leaves when that step was read as well.
//!
//! Invariants: every sequence is in `running` or `waiting`, the first and each line of the
//! second in order of arrival; every request
//! ends in exactly one `Usage`; after each step the snapshot's two laws hold; while a step is in flight, the
//! blocks of its sequences are not given back, and the books stand before its end. In a steady state nothing is
//! allocated here.

mod advance;
mod allowance;
mod encode;
mod endings;
mod energy;
mod prepare;
mod report;
mod speculate;
mod turns;

use std::any::Any;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::Duration;

use obol_models::batch::ForwardError;
use obol_models::encoder::TextEncoder;

use crate::clock::Clock;
use crate::config::Speculative;
use crate::meter::calibration::Calibration;
use crate::meter::partition::Partition;
use crate::meter::timeline::{Ran, Timeline};
use crate::request::{Finish, NewRequest, TokenLogprobs, Vectors};
use crate::units::{BlockNanos, DeviceNanos, RequestId};
use crate::usage::{HouseTime, MeterReport, Usage};

use super::blocks::Blocks;
use super::device::Device;
use super::fair::Fair;
use super::flight::{Flight, Flights};
use super::lines::Lines;
use super::scheduler::{Running, StepPlan};
use super::sequence::{Request, RequestKey, Sequence};
use super::speculate::{Candidate, Speculator};
use super::texts::Texts;
use super::{Command, EngineConfig, EngineStats, Parts, Shared};

pub(super) use allowance::Allowed;
use energy::Metered;
use turns::Order;

/// How often the whole pool is walked.
const INTEGRITY: DeviceNanos = DeviceNanos(60_000_000_000);
/// A device that fails so many steps in a row is lost.
const FAILURES_MAX: u32 = 5;
/// A crowd of commands must not hold up what runs.
const COMMANDS_A_STEP: usize = 64;
/// Prompt tokens that a step scores at most: each needs a row of logits as long as the vocabulary.
const SCORED_A_STEP: usize = 64;

/// Runs until told to shut down, or until a bug ends it; either way every request is settled.
pub(super) fn run(parts: Parts, inbox: Receiver<Command>, shared: Arc<Shared>) {
    let (mut engine, mut device) = Engine::new(parts, shared.clone());
    let outcome = catch_unwind(AssertUnwindSafe(|| engine.serve(&mut device, &inbox)));
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
    config: EngineConfig,
    calibration: Calibration,
    clock: Arc<dyn Clock>,
    partition: Partition,
    timeline: Timeline,
    energy: Metered,
    reports: Sender<MeterReport>,
    shared: Arc<Shared>,
    blocks: Blocks,
    since: DeviceNanos,
    running: Vec<Sequence>,
    waiting: Lines,
    encoder: Option<Box<dyn TextEncoder>>,
    /// Most tokens of a text; none without an encoder.
    text_tokens: usize,
    texts: Texts,
    /// Texts in the step that the encoder runs.
    encoding: usize,
    /// The last step was the encoder's.
    encoded_last: bool,
    fair: Fair,
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
    /// What steps left to say, in order.
    outbox: Vec<Post>,
    /// Requests whose client turned out to be gone while something was said to it.
    gone: Vec<RequestKey>,
    /// Commands that came during a step and may end sequences that take part in it.
    later: VecDeque<Command>,
    /// Steps that failed since one was read.
    failures: u32,
    /// Requests that an allowance bounds.
    bounded: usize,
    flights: Flights,
    speculator: Speculator,
    buffers: Buffers,
}

/// Something to tell a client, when the device is at work again.
enum Post {
    Token {
        request: RequestKey,
        choice: u32,
        token: u32,
        logprobs: Option<TokenLogprobs>,
    },
    Prompt {
        request: RequestKey,
        choice: u32,
        scores: Vec<TokenLogprobs>,
    },
    Vector {
        request: RequestKey,
        choice: u32,
        vector: Vec<f32>,
    },
    /// The choice's sequence is gone already.
    End {
        request: RequestKey,
        choice: u32,
        finish: Finish,
        at: DeviceNanos,
    },
}

/// What each step fills anew.
#[derive(Default)]
struct Buffers {
    views: Vec<Running>,
    plan: StepPlan,
    order: Order,
    /// Indices in `running` of what takes part in the step that is made ready, ascending.
    planned: Vec<usize>,
    candidates: Vec<Candidate>,
    weights: Vec<u128>,
    shares: Vec<DeviceNanos>,
    ended: Vec<(RequestKey, u32, Finish)>,
    prompts_done: Vec<(RequestKey, u32)>,
    /// Requests that may not go on.
    broke: Vec<RequestKey>,
}

/// Whether the loop goes on.
enum Next {
    Go,
    Stop,
}

impl Engine {
    fn new(parts: Parts, shared: Arc<Shared>) -> (Self, Device) {
        let Parts { model, encoder, config, calibration, clock, partition, energy, reports } = parts;
        let device = Device::new(model, &config);
        if !device.verifies() && config.speculative != Speculative::Off {
            tracing::info!(
                "proposals are not verified on this device: it is given steps ahead of their tokens"
            );
        }
        let since = partition.cursor();
        let engine = Self {
            blocks: Blocks::new(config.blocks, config.block_size, since),
            since,
            calibration,
            clock,
            partition,
            timeline: Timeline::default(),
            energy: Metered::new(energy),
            reports,
            shared,
            running: Vec::new(),
            waiting: Lines::default(),
            text_tokens: encoder.as_ref().map_or(0, |encoder| encoder.context_length()),
            encoder,
            texts: Texts::default(),
            encoding: 0,
            encoded_last: false,
            fair: Fair::new(config.weights.clone()),
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
            outbox: Vec::new(),
            gone: Vec::new(),
            later: VecDeque::new(),
            failures: 0,
            bounded: 0,
            flights: Flights::default(),
            speculator: Speculator::new(),
            buffers: Buffers::default(),
            config,
        };
        (engine, device)
    }

    fn serve(&mut self, device: &mut Device, inbox: &Receiver<Command>) {
        self.energy.read(self.partition.cursor(), &mut self.requests);
        self.report();
        loop {
            if let Next::Stop = self.take_commands(inbox) {
                return self.stop(device, inbox);
            }
            if self.is_idle() {
                self.post();
                self.check_integrity();
                if let Next::Stop = self.wait(inbox) {
                    return self.stop(device, inbox);
                }
                self.report_if_due();
            } else {
                self.turn(device, inbox);
                if self.failures >= FAILURES_MAX {
                    return self.give_up(inbox);
                }
            }
        }
    }

    /// Nothing runs or waits.
    fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty() && self.texts.is_empty()
    }

    /// Obeys what has come, between steps: first what had to wait for the end of the last one.
    fn take_commands(&mut self, inbox: &Receiver<Command>) -> Next {
        let waited = self.later.len();
        for _ in 0..waited + COMMANDS_A_STEP {
            let command = match self.later.pop_front() {
                Some(command) => Ok(command),
                None => inbox.try_recv(),
            };
            match command {
                Ok(Command::Shutdown) | Err(TryRecvError::Disconnected) => return Next::Stop,
                Ok(command) => self.obey(command),
                Err(TryRecvError::Empty) => break,
            }
        }
        Next::Go
    }

    /// Obeys what has come, during a step: what might end one of its sequences waits for the step's end.
    fn take_harmless_commands(&mut self, inbox: &Receiver<Command>) {
        for _ in 0..COMMANDS_A_STEP {
            match inbox.try_recv() {
                Ok(command @ (Command::Submit(_) | Command::Ping(_))) => self.obey(command),
                Ok(command) => self.later.push_back(command),
                // The loop finds out that nobody is left.
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
            }
        }
    }

    /// Waits for a command with nothing to run; that time is idle.
    fn wait(&mut self, inbox: &Receiver<Command>) -> Next {
        self.report_if_due();
        let received = inbox.recv_timeout(Duration::from_millis(500));
        self.partition.book(HouseTime::Idle, self.clock.now());
        self.energy.read_if_due(self.partition.cursor(), &mut self.requests);
        match received {
            Ok(Command::Shutdown) | Err(RecvTimeoutError::Disconnected) => return Next::Stop,
            Ok(command) => self.obey(command),
            Err(RecvTimeoutError::Timeout) => {}
        }
        Next::Go
    }

    /// Ends what runs, and what was submitted before anybody could know of the end.
    fn stop(&mut self, device: &mut Device, inbox: &Receiver<Command>) {
        while !self.flights.is_empty() {
            self.land(device, inbox);
        }
        while let Some(command) = self.later.pop_front().or_else(|| inbox.try_recv().ok()) {
            if !matches!(command, Command::Shutdown) {
                self.obey(command);
            }
        }
        self.end_everything(Finish::Cancelled);
        self.blocks.check_integrity();
    }

    /// The device is lost: everything ends with an error, and the engine with it, so that its server can be started
    /// again.
    fn give_up(&mut self, inbox: &Receiver<Command>) {
        tracing::error!("the device has failed {} steps in a row: the engine stops", self.failures);
        while let Some(command) = self.later.pop_front().or_else(|| inbox.try_recv().ok()) {
            if !matches!(command, Command::Shutdown) {
                self.obey(command);
            }
        }
        self.end_everything(Finish::Error);
    }

    /// Walks all blocks now and then, when nothing else is to do.
    fn check_integrity(&mut self) {
        let now = self.clock.now();
        if now >= self.checked + INTEGRITY {
            self.checked = now;
            self.blocks.check_integrity();
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => {
                let key = self.arrivals;
                self.arrivals += 1;
                let (account, begins) = self.join(&submission.request);
                let request = Request::new(*submission, self.clock.wall(), account, begins);
                let NewRequest { prompt, choices, stops, vectors, .. } = &*request.new;
                let longest = prompt.longest() + stops.max_tokens as usize;
                let (prompts, choices) = (prompt.count() as u32, *choices);
                let most = match vectors {
                    Some(Vectors::Encoded) => self.text_tokens,
                    _ => self.config.max_model_len,
                };
                let fits = prompt.each().all(|prompt| !prompt.is_empty()) && longest <= most;
                assert!(choices % prompts == 0, "as many choices for each prompt");
                self.by_id.insert(request.new.id.clone(), key);
                self.bounded += usize::from(request.new.allowance.is_some());
                self.requests.insert(key, request);
                if self.requests[&key].new.vectors == Some(Vectors::Encoded) {
                    self.start_texts(key);
                }
                for first in (0..choices).step_by((choices / prompts) as usize) {
                    self.start_choices(key, first..first + 1);
                }
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

    /// Gives the device a step where it can have one more; then, unless it can have yet another, reads the oldest.
    fn turn(&mut self, device: &mut Device, inbox: &Receiver<Command>) {
        if self.encodes_next() {
            // What is in flight comes first: each step is metered by itself.
            match self.flights.is_empty() {
                true => self.encode(inbox),
                false => self.land(device, inbox),
            }
            return self.end_the_gone();
        }
        self.encoded_last = false;
        let launched = self.launch(device, inbox);
        if !launched || self.flights.len() == device.depth() {
            self.land(device, inbox);
        }
        self.end_the_gone();
    }

    /// Gives the device a step. `false`: there is nothing to give, or not before what is in flight was read.
    fn launch(&mut self, device: &mut Device, inbox: &Receiver<Command>) -> bool {
        let now = self.clock.now();
        self.book_gap(now);
        self.blocks.tick(self.partition.cursor());
        self.plan();
        let preempts = !self.buffers.plan.preempt.is_empty();
        if preempts && !self.flights.is_empty() {
            // What loses its blocks must not be in flight.
            return false;
        }
        let refused = self.apply(now);
        if self.buffers.planned.is_empty() {
            // After a preemption there is room, and who was refused is gone: the next plan will not be empty.
            if !preempts && !refused {
                self.nothing_fits();
            }
            return false;
        }
        if device.verifies() {
            self.speculate();
        }
        let mut flight = self.weigh();
        self.load(device, &mut flight);
        if !device.overlaps() {
            self.meanwhile(inbox);
        }
        flight.submitted = self.clock.now();
        flight.behind = !self.flights.is_empty();
        self.book_gap(flight.submitted);
        self.flights.take_off(flight);
        if let Err(why) = attempt(|| device.submit()) {
            self.crash(&why);
        }
        true
    }

    /// The device waits for the host until `now`, unless it has something to do. While it has, the books stand where
    /// the last step that was read ended.
    fn book_gap(&mut self, now: DeviceNanos) {
        if self.flights.is_empty() {
            self.partition.book(HouseTime::HostGap, now);
        }
    }

    /// Reads the oldest step in flight, if there is one.
    fn land(&mut self, device: &mut Device, inbox: &Receiver<Command>) {
        if self.flights.is_empty() {
            return;
        }
        let outcome = attempt(|| device.wait(&mut || self.meanwhile(inbox)));
        let heard = self.clock.now();
        match outcome {
            Ok(time) => {
                self.failures = 0;
                let flight = self.flights.land().expect("a step is in flight");
                let Flight { submitted, behind, .. } = flight;
                let (start, end) = time.map_or((submitted, heard), |time| {
                    let (run, since) = (DeviceNanos(time.run), time.since_last_end.map(DeviceNanos));
                    self.timeline.place(Ran { submitted, behind, run, since_last_end: since, heard })
                });
                let busy = time.map_or(end - start, |time| DeviceNanos(time.run));
                self.stats.device_busy = DeviceNanos(self.stats.device_busy.0.saturating_add(busy.0));
                self.meter(&flight, start, end);
                self.ask_allowances(&flight, end - start);
                self.energy.read_if_due(self.partition.cursor(), &mut self.requests);
                self.advance(device, &flight);
                self.end_the_broke();
                self.flights.give_back(flight);
            }
            Err(why) => self.crash(&why),
        }
    }

    /// What the host does while the device is at work. Touches no sequence that takes part in the step.
    fn meanwhile(&mut self, inbox: &Receiver<Command>) {
        self.post();
        self.report_in_step_if_due();
        self.take_harmless_commands(inbox);
    }

    /// The plan was empty: the head of the queue can never run, which admission should have prevented.
    fn nothing_fits(&mut self) {
        let stuck = self.running.is_empty() && self.blocks.counts().held == 0;
        let line = self.waiting.waiting().next();
        if stuck && let Some(head) = line.and_then(|line| self.waiting.get(line, 0)) {
            let key = head.request;
            tracing::error!("a request fits in an empty pool or not at all; this is a bug");
            self.end_request(key, Finish::Error);
        }
    }
}

/// Errors and panics of the device as one kind of failure.
fn attempt<T>(call: impl FnOnce() -> Result<T, ForwardError>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(outcome) => outcome.map_err(|error| error.to_string()),
        Err(panic) => Err(message(&*panic).to_owned()),
    }
}
