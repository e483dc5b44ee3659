//! How choices and requests begin to wait and end, and what clients hear of it.

use std::ops::Range;

use crate::engine::fair::{Account, Service};
use crate::engine::lines;
use crate::engine::sequence::{RequestKey, Sequence};
use crate::request::{Event, Finish, NewRequest};
use crate::units::{DeviceNanos, UnixNanos};

use super::{Engine, Post};

/// A prompt is short that takes so many steps of its own.
const SHORT: usize = 4;

impl Engine {
    /// Lets the choices over the same prompt wait for their turn, too: it was computed, or will not be.
    pub(super) fn start_siblings_of(&mut self, key: RequestKey, choice: u32) {
        let request = &self.requests[&key];
        if !request.unstarted.is_empty() {
            let siblings = request.siblings(choice);
            self.start_choices(key, siblings);
        }
    }

    /// Lets those of a request's choices that did not start wait for their turn.
    pub(super) fn start_choices(&mut self, key: RequestKey, choices: Range<u32>) {
        let request = self.requests.get_mut(&key).expect("choices start while their request lives");
        let from = request.unstarted.partition_point(|choice| *choice < choices.start);
        let to = request.unstarted.partition_point(|choice| *choice < choices.end);
        if from == to {
            return;
        }
        for choice in request.unstarted.drain(from..to).collect::<Vec<_>>() {
            let lease = self.blocks.lease(request.kv_paid.clone());
            let sequence = Sequence::new(key, choice, request, lease);
            self.waiting.insert(sequence);
        }
    }

    /// A request comes: the account of its tenant, who is lifted to where the others are if nothing of it waits; and
    /// where that is, if the tenant had nothing here and the prompt is not long.
    pub(super) fn join(&mut self, new: &NewRequest) -> (Account, Option<Service>) {
        let Self { fair, waiting, texts, .. } = self;
        let least = waiting.accounts().chain(texts.accounts()).map(|account| fair.service(account)).min();
        let level = least.unwrap_or_else(|| fair.service(waiting.last()));
        let account = fair.join(&new.tenant, level);
        let none_waits = |line| waiting.get(line, 0).is_none() && texts.head(line).is_none();
        if lines::of(account).all(none_waits) {
            fair.lift(account, level);
        }
        let short = new.prompt.longest() <= SHORT * self.config.step_tokens;
        (account, (short && fair.has_one(account)).then(|| fair.service(account)))
    }

    /// Says what the last step left to say.
    pub(super) fn post(&mut self) {
        let mut outbox = std::mem::take(&mut self.outbox);
        for post in outbox.drain(..) {
            match post {
                Post::Token { request, choice, token, logprobs } => {
                    let events = &self.requests[&request].events;
                    if events.send(Event::Token { choice, token, logprobs }).is_err() {
                        self.gone.push(request);
                    }
                }
                Post::Prompt { request, choice, scores } => {
                    let events = &self.requests[&request].events;
                    if events.send(Event::Prompt { choice, scores }).is_err() {
                        self.gone.push(request);
                    }
                }
                Post::Vector { request, choice, vector } => {
                    let events = &self.requests[&request].events;
                    if events.send(Event::Vector { choice, vector }).is_err() {
                        self.gone.push(request);
                    }
                }
                Post::End { request: key, choice, finish, at } => {
                    let request = self.requests.get_mut(&key).expect("a request lives until its last end");
                    request.end_choice(choice, finish);
                    if request.open == 0 {
                        self.settle(key, at);
                    }
                }
            }
        }
        self.outbox = outbox;
    }

    /// The device failed: what is in flight ends with an error, the rest goes on. The time until now is the oldest
    /// step's, which is the one that ran.
    pub(super) fn crash(&mut self, why: &str) {
        let Some(flight) = self.flights.land() else { return };
        self.failures += 1;
        self.meter(&flight, flight.submitted, self.clock.now());
        let mut lost = vec![flight];
        lost.extend(std::iter::from_fn(|| self.flights.land()));
        tracing::error!("{} steps in flight failed: {why}", lost.len());
        self.timeline.lose();
        self.buffers.ended.clear();
        let mut failed: Vec<RequestKey> = Vec::new();
        for sequence in self.running.iter_mut().filter(|s| s.flies()) {
            sequence.crashed();
            match sequence.ended {
                // Nothing that it still computed was for anybody.
                Some(finish) => self.buffers.ended.push((sequence.request, sequence.choice, finish)),
                None => failed.push(sequence.request),
            }
        }
        self.end_sequences(self.partition.cursor());
        failed.dedup();
        for key in failed {
            self.end_request(key, Finish::Error);
        }
        lost.into_iter().for_each(|flight| self.flights.give_back(flight));
    }

    /// Requests whose client is gone end as soon as that is seen, without waiting for their command.
    pub(super) fn end_the_gone(&mut self) {
        while let Some(key) = self.gone.pop() {
            self.end_request(key, Finish::Cancelled);
        }
    }

    /// What takes part in a step in flight has ended then, and leaves when that was read.
    pub(super) fn end_choice(&mut self, key: RequestKey, choice: u32, finish: Finish) {
        // It may have ended by itself, and what it said comes first.
        self.post();
        let place = |s: &Sequence| (s.request, s.choice);
        let Some(request) = self.requests.get_mut(&key) else { return };
        if let Ok(at) = self.running.binary_search_by_key(&(key, choice), place) {
            if self.running[at].flies() {
                self.running[at].ended.get_or_insert(finish);
                return;
            }
            drop(self.running.remove(at));
        } else if self.waiting.remove(request.line, key, choice).is_some() {
            // It held nothing.
        } else if self.texts.remove(request.line, key, choice) {
            // Nor did it.
        } else if let Ok(at) = request.unstarted.binary_search(&choice) {
            request.unstarted.remove(at);
        } else {
            return; // it has ended already
        }
        request.end_choice(choice, finish);
        if request.open == 0 {
            self.settle(key, self.clock.now());
        } else {
            // Nobody computes the prompt for the others any more, if it was not computed already.
            self.start_siblings_of(key, choice);
        }
    }

    /// As [`Engine::end_choice`], for all that the request still has.
    pub(super) fn end_request(&mut self, key: RequestKey, finish: Finish) {
        self.post();
        let Some(request) = self.requests.get_mut(&key) else { return };
        let mut choices: Vec<(u32, Finish)> = request.unstarted.drain(..).map(|c| (c, finish)).collect();
        let (from, to) = (
            self.running.partition_point(|s| s.request < key),
            self.running.partition_point(|s| s.request <= key),
        );
        let mut flying = 0;
        for sequence in self.running[from..to].iter_mut().filter(|s| s.flies()) {
            sequence.ended.get_or_insert(finish);
            flying += 1;
        }
        let landed = self.running.extract_if(from..to, |s| !s.flies());
        choices.extend(landed.map(|s| (s.choice, s.ended.unwrap_or(finish))));
        choices.extend(self.waiting.remove_all(request.line, key).into_iter().map(|c| (c, finish)));
        choices.extend(self.texts.remove_all(request.line, key).into_iter().map(|c| (c, finish)));
        for (choice, finish) in choices {
            request.end_choice(choice, finish);
        }
        assert_eq!(request.open, flying, "every open choice is running, waiting or unstarted");
        if flying == 0 {
            self.settle(key, self.clock.now());
        }
    }

    /// Settles all that is open and sends the last report. What is in flight is never read.
    pub(super) fn end_everything(&mut self, finish: Finish) {
        while let Some(lost) = self.flights.land() {
            self.flights.give_back(lost);
        }
        self.running.iter_mut().for_each(Sequence::crashed);
        self.energy.read(self.partition.cursor(), &mut self.requests);
        let keys: Vec<RequestKey> = self.requests.keys().copied().collect();
        for key in keys {
            self.end_request(key, finish);
        }
        self.report();
    }

    /// The request's account, as of `at`, is closed.
    fn settle(&mut self, key: RequestKey, at: DeviceNanos) {
        let request = self.requests.remove(&key).expect("a request is settled once");
        self.by_id.remove(&request.new.id);
        self.bounded -= usize::from(request.new.allowance.is_some());
        self.fair.leave(lines::account(request.line));
        let energy = self.energy.settle(request.energy);
        let usage = request.usage(at, self.wall_at(at), energy);
        self.settled_device += usage.device();
        self.settled_kv += usage.kv;
        self.finished.push(usage);
    }

    /// The wall clock at an instant just past.
    pub(super) fn wall_at(&self, at: DeviceNanos) -> UnixNanos {
        let since = self.clock.now().0.saturating_sub(at.0);
        UnixNanos(self.clock.wall().0.saturating_sub(since))
    }
}
