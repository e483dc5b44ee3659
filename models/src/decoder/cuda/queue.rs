//! What steps beside the host need: three slots of host memory and events go round, as two steps may be in flight,
//! and the end of the one before the oldest is needed to know the time between.

use std::collections::VecDeque;

use obol_kernels::cuda::{
    Buffer, DeviceSampler, DrawLayout, DrawLists, DrawRecord, Event, Feeds, Gpu, GpuError, PackedDraws,
    Pinned, RECORD_BYTES, SamplingPasses, StepTokens,
};

use super::inputs::{Inputs, put};
use super::work::Work;
use crate::queue::{Draw, Step, StepOutput, StepTime};

const SLOTS: usize = 3;

/// Steps that may be in flight.
pub(super) const DEPTH: usize = SLOTS - 1;

pub(super) struct Queue {
    slots: [Slot; SLOTS],
    /// Oldest first.
    flights: VecDeque<Flight>,
    /// The slot of the next step.
    next: usize,
    /// Whether the step before the next one was submitted here, and nothing else since.
    chained: bool,
    /// Draws that a step may have.
    draws_most: usize,
    /// Words that the lists of a step's draws may have.
    words: usize,
    /// Draws of the last step.
    draws: usize,
    sampler: DeviceSampler,
    /// Pairs (row, draw), u32.
    feeds: Buffer,
    /// Packed draws.
    packed: Buffer,
    /// What the last step drew.
    records: Buffer,
}

/// What one step in flight has for itself.
pub(super) struct Slot {
    pub(super) inputs: Inputs,
    /// Attention's description.
    pub(super) plan: Pinned,
    feeds: Pinned,
    packed: Pinned,
    records: Pinned,
    start: Event,
    end: Event,
}

/// A step in flight.
#[derive(Debug, Clone, Copy)]
struct Flight {
    slot: usize,
    draws: usize,
    /// The slot of the step before it, whose end is known.
    before: Option<usize>,
}

impl Queue {
    /// For steps of at most `rows` rows and `draws` draws, whose plans take so many bytes and the lists of whose
    /// draws so many words.
    pub(super) fn new(
        gpu: &Gpu,
        vocab: usize,
        rows: usize,
        draws: usize,
        plan_bytes: usize,
        words: usize,
    ) -> Result<Self, GpuError> {
        let packed_bytes = DrawLayout { draws, words }.bytes();
        let slot = |_| {
            Ok(Slot {
                inputs: Inputs::new(gpu, rows)?,
                plan: gpu.pin(plan_bytes)?,
                feeds: gpu.pin(draws * 2 * size_of::<u32>())?,
                packed: gpu.pin(packed_bytes)?,
                records: gpu.pin(draws * RECORD_BYTES)?,
                start: gpu.event()?,
                end: gpu.event()?,
            })
        };
        let slots: Vec<Slot> = (0..SLOTS).map(slot).collect::<Result<_, GpuError>>()?;
        let Ok(slots) = slots.try_into() else { unreachable!("as many as were made") };
        Ok(Self {
            slots,
            flights: VecDeque::with_capacity(SLOTS),
            next: 0,
            chained: false,
            draws_most: draws,
            words,
            draws: 0,
            sampler: gpu.sampler(draws, vocab)?,
            feeds: gpu.allocate(draws * 2 * size_of::<u32>())?,
            packed: gpu.allocate(packed_bytes)?,
            records: gpu.allocate(draws * RECORD_BYTES)?,
        })
    }

    /// Whether the lists of the step's draws fit; if not, how many words they need.
    pub(super) fn words_for(&self, step: &Step) -> Option<usize> {
        let words = step.forbidden.len() + step.allowed.len();
        let need = DrawLayout::words_of(step.biases.len(), words, step.seen.len());
        (need > self.words).then_some(need)
    }

    /// Makes room for lists of so many words. What was recorded with the old room must not be launched again.
    pub(super) fn grow(&mut self, gpu: &Gpu, words: usize) -> Result<(), GpuError> {
        let words = words.next_power_of_two();
        let bytes = DrawLayout { draws: self.draws_most, words }.bytes();
        // What is in flight still reads the old room.
        gpu.synchronize()?;
        for slot in &mut self.slots {
            slot.packed = gpu.pin(bytes)?;
        }
        self.packed = gpu.allocate(bytes)?;
        self.words = words;
        Ok(())
    }

    /// Steps in flight, and draws of the step submitted last, which the next one may be fed from.
    pub(super) fn position(&self) -> (usize, Option<usize>) {
        (self.flights.len(), self.chained.then_some(self.draws))
    }

    /// The slot of the step to be submitted.
    pub(super) fn slot(&mut self) -> &mut Slot {
        &mut self.slots[self.next]
    }

    /// Marks the step's start.
    pub(super) fn begin(&self, gpu: &Gpu) -> Result<(), GpuError> {
        assert!(self.flights.len() < DEPTH, "a step too many in flight; this is a bug");
        gpu.record(&self.slots[self.next].start)
    }

    /// Puts what the step ahead drew into the tokens of the step's rows, and sends its draws, of which there are
    /// `places`, padding included. Returns the passes that they need.
    pub(super) fn send(
        &mut self,
        gpu: &Gpu,
        step: &Step,
        work: &Work,
        places: usize,
    ) -> Result<SamplingPasses, GpuError> {
        let Slot { feeds, packed, .. } = &mut self.slots[self.next];
        if !step.feeds.is_empty() {
            put(feeds, step.feeds.iter().flat_map(|feed| [feed.row as u32, feed.draw as u32]));
            gpu.send(feeds, step.feeds.len() * 2 * size_of::<u32>(), &self.feeds, 0)?;
            gpu.feed(Feeds {
                list: &self.feeds,
                many: step.feeds.len(),
                tokens: &work.tokens,
                rows: step.batch.tokens.len(),
                records: &self.records,
                draws: self.draws,
            })?;
        }
        let fed = |row: &usize| step.feeds.binary_search_by_key(row, |feed| feed.row).is_ok();
        let draws = step.draws.iter().zip(&step.batch.logit_rows);
        let draws = draws.map(|(draw, row)| (draw, Some(*row).filter(fed)));
        let lists = DrawLists {
            biases: step.biases.iter().copied(),
            forbidden: step.forbidden.iter().copied(),
            allowed: step.allowed.iter().copied(),
            seen: step.seen.iter().map(|seen| (seen.token, seen.times)),
        };
        let layout = DrawLayout { draws: places, words: self.words };
        let (bytes, passes) = layout.pack(draws, lists, packed.bytes_mut());
        gpu.send(packed, bytes, &self.packed, 0)?;
        Ok(passes)
    }

    /// Draws from the logits of `work`, as what was sent says.
    pub(super) fn sample(
        &self,
        gpu: &Gpu,
        work: &Work,
        rows: usize,
        places: usize,
        passes: SamplingPasses,
    ) -> Result<(), GpuError> {
        let layout = DrawLayout { draws: places, words: self.words };
        let packed = PackedDraws { layout, buffer: &self.packed, start: 0 };
        let tokens = StepTokens { buffer: &work.tokens, rows };
        gpu.sample(&self.sampler, work.logits(), packed, tokens, passes, &self.records)
    }

    /// Sends the records of `draws` draws to the host and marks the step's end: it is in flight now.
    pub(super) fn finish(&mut self, gpu: &Gpu, draws: usize) -> Result<(), GpuError> {
        let Self { slots, records, next, .. } = self;
        gpu.receive(records, 0, &mut slots[*next].records, draws * RECORD_BYTES)?;
        gpu.record(&slots[*next].end)?;
        let before = self.chained.then_some((self.next + SLOTS - 1) % SLOTS);
        self.flights.push_back(Flight { slot: self.next, draws, before });
        self.next = (self.next + 1) % SLOTS;
        self.chained = true;
        self.draws = draws;
        Ok(())
    }

    /// Waits for the oldest step and reads what it drew.
    ///
    /// # Panics
    /// When nothing is in flight.
    pub(super) fn wait(&mut self, output: &mut StepOutput) -> Result<(), GpuError> {
        let Flight { slot, draws, before } = self.flights.pop_front().expect("a step is in flight");
        let Slot { records, start, end, .. } = &self.slots[slot];
        end.wait()?;
        let run = start.nanos_until(end)?;
        let since_last_end = before.map(|before| self.slots[before].end.nanos_until(end)).transpose()?;
        output.time = StepTime { run, since_last_end };
        output.draws.resize_with(draws, Draw::default);
        for (at, draw) in output.draws.iter_mut().enumerate() {
            let record = DrawRecord::of(records.bytes(), at);
            (draw.token, draw.logprob) = (record.token(), record.logprob());
            draw.top.clear();
            draw.top.extend(record.top());
        }
        Ok(())
    }

    /// Forgets what is in flight; the next step stands behind none.
    pub(super) fn clear(&mut self) {
        self.flights.clear();
        self.chained = false;
        self.draws = 0;
    }
}
