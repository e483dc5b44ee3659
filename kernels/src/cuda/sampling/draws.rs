//! Draws as bytes for the device, and what was drawn out of its bytes. Nothing is allocated.

use std::ops::Range;

use crate::RowDraw;

/// The most likely tokens that a draw can ask for.
pub const TOP_MAX: usize = 20;

/// Bytes of what a draw leaves: token, its log-probability, how many of the most likely follow, one word unused,
/// then those as (token, log-probability), all of 4 bytes.
pub const RECORD_BYTES: usize = 16 + 8 * TOP_MAX;

/// Below this a temperature is 0.
const TEMPERATURE_MIN: f32 = 1e-5;

/// e^-30 of the best: tokens under it weigh nothing.
const EXPONENT_MIN: f32 = -30.0;

/// No token, row or list.
const NONE: u32 = u32::MAX;

/// Bytes of a packed draw.
const DRAW_BYTES: usize = 96;

impl RowDraw {
    fn is_greedy(&self) -> bool {
        self.temperature < TEMPERATURE_MIN || self.top_k == 1
    }

    fn is_penalised(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// What the kernels do for it, as they count; with a row that is fed to it or not.
    fn asks(&self, is_fed: bool) -> u32 {
        let sampled = !self.is_greedy();
        let lists = [&self.biases, &self.forbidden, &self.allowed, &self.seen];
        let has_lists = lists.iter().any(|part| !part.is_empty());
        let all = [
            (true, ACTIVE),
            (sampled, SAMPLED),
            (sampled && self.top_k > 0, TOP_K),
            (sampled && self.top_p < 1.0, TOP_P),
            (self.logprobs.is_some(), LOGPROBS),
            (has_lists || (is_fed && self.is_penalised()), ADJUSTED),
        ];
        all.iter().filter(|(asked, _)| *asked).fold(0, |asks, (_, bit)| asks | bit)
    }
}

const ACTIVE: u32 = 1;
const SAMPLED: u32 = 2;
const TOP_K: u32 = 4;
const TOP_P: u32 = 8;
const LOGPROBS: u32 = 16;
const ADJUSTED: u32 = 32;

/// The lists of all draws, one after the other.
#[derive(Debug, Clone)]
pub struct DrawLists<B, F, A, S> {
    /// (token, what is added to its logit)
    pub biases: B,
    /// Never drawn.
    pub forbidden: F,
    /// Bits of the tokens that may be drawn, 32 a word.
    pub allowed: A,
    /// (token, times generated; 0: it is in the prompt only), ascending by token within a draw.
    pub seen: S,
}

/// The passes that some draws need; a pass that none needs may be left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SamplingPasses {
    pub sampled: bool,
    pub top_k: bool,
    pub top_p: bool,
    pub logprobs: bool,
}

impl SamplingPasses {
    /// For any draws: what a graph records.
    pub const ALL: Self = Self { sampled: true, top_k: true, top_p: true, logprobs: true };
}

/// Room for packed draws: the first `draws` places for draws, then `words` of 4 bytes for lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DrawLayout {
    pub draws: usize,
    pub words: usize,
}

impl DrawLayout {
    /// Words of lists with so many entries; `single`: of forbidden tokens and of bits together.
    #[must_use]
    pub fn words_of(biases: usize, single: usize, seen: usize) -> usize {
        2 * biases + single + 2 * seen
    }

    pub fn bytes(&self) -> usize {
        self.draws * DRAW_BYTES + self.words * 4
    }

    /// Packs draws and their lists into `out`; places without a draw are marked so. A draw comes with the row of
    /// the step's tokens that is fed to it, if one is: that token counts as generated once more than its `seen`
    /// says, where a penalty asks. Returns how many bytes of `out` the device needs, and the passes that the draws
    /// need.
    ///
    /// # Panics
    /// When they do not fit, or a draw names more of a list than there is.
    pub fn pack<'a>(
        &self,
        draws: impl Iterator<Item = (&'a RowDraw, Option<usize>)>,
        lists: DrawLists<
            impl Iterator<Item = (u32, f32)>,
            impl Iterator<Item = u32>,
            impl Iterator<Item = u32>,
            impl Iterator<Item = (u32, u32)>,
        >,
        out: &mut [u8],
    ) -> (usize, SamplingPasses) {
        let (places, rest) = out[..self.bytes()].split_at_mut(self.draws * DRAW_BYTES);
        let mut words = Words { of: rest, len: 0 };
        // Pairs first: they are aligned then.
        let biases = words.list(2, lists.biases.map(|(token, bias)| [token, bias.to_bits()]));
        let seen = words.list(2, lists.seen.map(|(token, times)| [token, times]));
        let forbidden = words.list(1, lists.forbidden.map(|token| [token]));
        let allowed = words.list(1, lists.allowed.map(|bits| [bits]));
        let bytes = self.draws * DRAW_BYTES + words.len * 4;
        let mut passes = SamplingPasses::default();
        let mut places = places.chunks_exact_mut(DRAW_BYTES);
        for (draw, fed) in draws {
            let place = places.next().expect("more draws than there are places");
            let asks = draw.asks(fed.is_some());
            passes.sampled |= asks & SAMPLED > 0;
            passes.top_k |= asks & TOP_K > 0;
            passes.top_p |= asks & TOP_P > 0;
            passes.logprobs |= asks & LOGPROBS > 0;
            let first = self.draws * DRAW_BYTES / 4;
            let parts = [
                biases.part(first, &draw.biases),
                forbidden.part(first, &draw.forbidden),
                seen.part(first, &draw.seen),
                allowed.part(first, &draw.allowed),
            ];
            write_draw((draw, fed), asks, parts, place);
        }
        places.for_each(|place| place.fill(0));
        (bytes, passes)
    }
}

/// Words that are being written.
struct Words<'a> {
    of: &'a mut [u8],
    len: usize,
}

/// A list that was written.
struct List {
    start: usize,
    len: usize,
    each: usize,
}

impl Words<'_> {
    fn list<const N: usize>(&mut self, each: usize, entries: impl Iterator<Item = [u32; N]>) -> List {
        let start = self.len;
        for word in entries.flatten() {
            self.of[self.len * 4..][..4].copy_from_slice(&word.to_le_bytes());
            self.len += 1;
        }
        List { start, len: (self.len - start) / each, each }
    }
}

impl List {
    /// Where a draw's part is, in words from the draws' beginning, and its entries.
    fn part(&self, first: usize, part: &Range<usize>) -> [u32; 2] {
        assert!(
            part.start <= part.end && part.end <= self.len,
            "a draw's {part:?} of a list of {}",
            self.len
        );
        [first + self.start + part.start * self.each, part.len()]
            .map(|n| u32::try_from(n).expect("lists are short"))
    }
}

/// As `Draw` in sampling.cuh.
fn write_draw((draw, fed): (&RowDraw, Option<usize>), asks: u32, lists: [[u32; 2]; 4], place: &mut [u8]) {
    let floor = if draw.min_p > 0.0 { draw.min_p.ln().max(EXPONENT_MIN) } else { EXPONENT_MIN };
    let halves = |x: u64| [x as u32, (x >> 32) as u32];
    let [seed, position] = [halves(draw.seed), halves(draw.position)];
    let fed = fed.map_or(NONE, |row| u32::try_from(row).expect("a batch has fewer rows"));
    let top = draw.logprobs.unwrap_or(0);
    assert!(top as usize <= TOP_MAX, "{top} of the most likely tokens; {TOP_MAX} are kept");
    let words = [
        seed[0],
        seed[1],
        position[0],
        position[1],
        draw.choice,
        asks,
        (1.0 / draw.temperature).to_bits(),
        floor.to_bits(),
        draw.top_k,
        draw.top_p.to_bits(),
        draw.repetition_penalty.to_bits(),
        draw.presence_penalty.to_bits(),
        draw.frequency_penalty.to_bits(),
        top,
        fed,
        lists[0][0],
        lists[0][1],
        lists[1][0],
        lists[1][1],
        lists[2][0],
        lists[2][1],
        lists[3][0],
        lists[3][1],
        0,
    ];
    for (to, word) in place.as_chunks_mut().0.iter_mut().zip(words) {
        *to = word.to_le_bytes();
    }
}

/// What was drawn from one row of logits.
#[derive(Debug, Clone, Copy)]
pub struct DrawRecord<'a>(&'a [u8]);

impl<'a> DrawRecord<'a> {
    /// Record `index` of what the device left.
    ///
    /// # Panics
    /// When there are not so many.
    pub fn of(records: &'a [u8], index: usize) -> Self {
        Self(&records[index * RECORD_BYTES..][..RECORD_BYTES])
    }

    fn word(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.0.as_chunks().0[at])
    }

    /// None: no logit was a finite number.
    pub fn token(&self) -> Option<u32> {
        Some(self.word(0)).filter(|token| *token != NONE)
    }

    /// Of the token, where it was asked for; else 0.
    pub fn logprob(&self) -> f32 {
        f32::from_bits(self.word(1))
    }

    /// (token, log-probability) of the most likely, as many as were asked for, best first.
    pub fn top(self) -> impl Iterator<Item = (u32, f32)> + 'a {
        let len = self.word(2) as usize;
        (0..len.min(TOP_MAX)).map(move |at| (self.word(4 + 2 * at), f32::from_bits(self.word(5 + 2 * at))))
    }
}
