//! After a step was read: its time is split, the sequences go on or end. Clients hear of it in `post`.

use crate::engine::device::Device;
use crate::engine::flight::{self, Flight};
use crate::engine::lines;
use crate::engine::sequence::Sequence;
use crate::meter::share::split;
use crate::request::Finish;
use crate::units::DeviceNanos;
use crate::usage::HouseTime;

use super::{Engine, Post};

impl Engine {
    /// Splits the step's time over its sequences; what a preemption made us compute again is the house's.
    ///
    /// Never inlined, so that `scripts/metering-share` can count its instructions.
    #[inline(never)]
    pub(super) fn meter(&mut self, flight: &Flight, start: DeviceNanos, end: DeviceNanos) {
        let Self { running, requests, buffers, partition, fair, .. } = self;
        buffers.weights.clear();
        buffers.weights.extend(flight.members.iter().map(|member| member.part.weight));
        let time = partition.step(start, end);
        self.blocks.tick(partition.cursor());
        split(time, &buffers.weights, &mut buffers.shares);
        self.stats.steps += 1;
        self.changed = true;
        let mut siblings = false;
        let mut index = 0;
        for (member, share) in flight.members.iter().zip(&buffers.shares) {
            index = flight::find(running, index, member);
            let (pays, again) = member.part.split(*share);
            partition.return_to_house(HouseTime::Preemption, again);
            let request = requests.get_mut(&member.request).expect("a sequence has a request");
            fair.charge(lines::account(member.line), pays);
            request.charge(self.stats.steps, pays, member.part.alone, member.prefill);
            request.holds(running[index].lease.len() as u64);
            siblings |= request.open > 1;
        }
        if siblings {
            self.peaks_of_siblings(flight);
        }
    }

    /// Choices of one request share blocks: their peak counts each block once.
    fn peaks_of_siblings(&mut self, flight: &Flight) {
        let mut last = None;
        for member in &flight.members {
            let key = member.request;
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

    /// Appends what was drawn; sequences that end give their blocks back, when they take part in no other step.
    pub(super) fn advance(&mut self, device: &mut Device, flight: &Flight) {
        let Self { config, running, requests, buffers, outbox, stats, speculator, partition, .. } = self;
        let at = partition.cursor();
        buffers.ended.clear();
        buffers.prompts_done.clear();
        let mut index = 0;
        for member in &flight.members {
            index = flight::find(running, index, member);
            let sequence = &mut running[index];
            let (key, choice) = (sequence.request, sequence.choice);
            sequence.landed(member.rows);
            if let Some(finish) = sequence.ended {
                // What it drew past its end is nobody's.
                sequence.computed_past_end(member.rows, config.block_size);
                if !sequence.flies() {
                    buffers.ended.push((key, choice, finish));
                }
                continue;
            }
            if let Some(draw) = member.draw {
                device.deliver(draw, sequence);
            }
            let request = requests.get_mut(&key).expect("a sequence has a request");
            if sequence.scores() {
                let scores = sequence.take_scores();
                if !scores.is_empty() {
                    outbox.push(Post::Prompt { request: key, choice, scores });
                }
            }
            let (mut drawn, mut broken) = sequence.take_drawn();
            let (generated, mut end) = (drawn.len() as u64, None);
            match sequence.take_vector() {
                Some(Ok(vector)) => {
                    outbox.push(Post::Vector { request: key, choice, vector });
                    end = Some(Finish::Stop);
                }
                Some(Err(why)) => broken = Some(why),
                None => {}
            }
            for (token, logprobs) in drawn.drain(..) {
                sequence.tokens.push(token);
                let stops = &request.new.stops;
                let at_end = !stops.ignore_eos && config.end_tokens.contains(&token);
                if at_end || stops.stop_token_ids.contains(&token) {
                    end = Some(Finish::Stop);
                } else {
                    outbox.push(Post::Token { request: key, choice, token, logprobs });
                    if sequence.generated() >= stops.max_tokens as usize {
                        end = Some(Finish::Length);
                    }
                }
            }
            sequence.give_back(drawn);
            if let Some(why) = broken {
                tracing::error!(request = %request.new.id, "{why}");
                end = Some(Finish::Error);
            } else if sequence.drafts.is_empty() {
                sequence.computed_more(member.rows, config.block_size);
            } else {
                let verified = sequence.verified(generated as usize - 1, config.block_size);
                speculator.learn(verified);
                request.drafted(verified);
                stats.drafts += 1;
                stats.draft_tokens += verified.proposed as u64;
                stats.draft_tokens_accepted += verified.accepted as u64;
            }
            if generated > 0 {
                request.generated(generated, at);
                stats.generation_tokens += generated;
                if !request.unstarted.is_empty() {
                    buffers.prompts_done.push((key, choice));
                }
            }
            if let Some(finish) = end {
                match sequence.flies() {
                    true => sequence.ended = Some(finish),
                    false => buffers.ended.push((key, choice, finish)),
                }
            }
        }
        self.end_sequences(at);
        self.start_siblings();
    }

    /// Ends what was found at its end.
    pub(super) fn end_sequences(&mut self, at: DeviceNanos) {
        let mut ended = std::mem::take(&mut self.buffers.ended);
        for (request, choice, finish) in ended.drain(..) {
            let place = |s: &Sequence| (s.request, s.choice);
            let index = self.running.binary_search_by_key(&(request, choice), place);
            drop(self.running.remove(index.expect("what took part in a step still runs")));
            self.outbox.push(Post::End { request, choice, finish, at });
            // Nobody computes the prompt for the others any more, if it was not computed already.
            self.start_siblings_of(request, choice);
        }
        self.buffers.ended = ended;
    }

    /// The choices of prompts that are computed now find them in the prefix cache.
    fn start_siblings(&mut self) {
        let mut done = std::mem::take(&mut self.buffers.prompts_done);
        for (key, choice) in done.drain(..) {
            self.start_siblings_of(key, choice);
        }
        self.buffers.prompts_done = done;
    }
}
