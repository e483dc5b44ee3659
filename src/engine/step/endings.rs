//! How choices and requests begin to wait and end, and what clients hear of it.

use crate::engine::sequence::{RequestKey, Sequence};
use crate::request::{Event, Finish};
use crate::units::{DeviceNanos, UnixNanos};

use super::{Engine, Post};

impl Engine {
    /// Lets up to `count` more of a request's choices wait for their turn.
    pub(super) fn start_choices(&mut self, key: RequestKey, count: usize) {
        let request = self.requests.get_mut(&key).expect("choices start while their request lives");
        let count = count.min(request.unstarted.len());
        if count == 0 {
            return;
        }
        for choice in request.unstarted.drain(..count).collect::<Vec<_>>() {
            let lease = self.blocks.lease(request.kv_paid.clone());
            let sequence = Sequence::new(key, choice, request, lease);
            let at = self.waiting.partition_point(|s| (s.request, s.choice) < (key, choice));
            self.waiting.insert(at, sequence);
        }
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

    /// The step failed: what took part ends with an error, the rest goes on.
    pub(super) fn fail(&mut self, why: &str) {
        tracing::error!("a step of {} sequences failed: {why}", self.buffers.planned.len());
        let mut keys: Vec<RequestKey> =
            self.buffers.planned.iter().map(|index| self.running[*index].request).collect();
        keys.dedup();
        for key in keys {
            self.end_request(key, Finish::Error);
        }
    }

    /// Requests whose client is gone end as soon as that is seen, without waiting for their command.
    pub(super) fn end_the_gone(&mut self) {
        while let Some(key) = self.gone.pop() {
            self.end_request(key, Finish::Cancelled);
        }
    }

    pub(super) fn end_choice(&mut self, key: RequestKey, choice: u32, finish: Finish) {
        // It may have ended by itself, and what it said comes first.
        self.post();
        let place = |s: &Sequence| (s.request, s.choice);
        let Some(request) = self.requests.get_mut(&key) else { return };
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
            self.settle(key, self.clock.now());
        } else if choice == 0 {
            // Nobody computes the prompt for the others any more, if it was not computed already.
            self.start_choices(key, usize::MAX);
        }
    }

    pub(super) fn end_request(&mut self, key: RequestKey, finish: Finish) {
        self.post();
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
        self.settle(key, self.clock.now());
    }

    /// Settles all that is open and sends the last report.
    pub(super) fn end_everything(&mut self, finish: Finish) {
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
        let usage = request.usage(at, self.wall_at(at));
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
