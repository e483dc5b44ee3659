//! Prompt lookup (n-gram speculation): what followed the last time that a sequence's last tokens stood there
//! is proposed for what follows now. Knows one sequence's tokens, and how often its proposals held; no
//! model, cost or batch. A proposal is a guess: whether it holds is decided by sampling.

/// Most tokens proposed at once: with the token before them they fill one tile of rows of the kernels.
pub(super) const DRAFTS_MAX: usize = 15;
/// Lengths of the ends that are looked up, the one that says more first.
const ENDS: [usize; 2] = [3, 2];
/// Weight that an estimate keeps of what it knew, a verification.
const DECAY: f64 = 0.85;
/// Most steps without a try when proposals do not hold.
const PAUSE_MAX: u32 = 64;

/// Which of `ENDS` a proposal was found by.
pub(super) type Found = usize;

/// How often one more proposed token holds, after those before it held: recent ones count more.
#[derive(Debug, Clone, Copy)]
pub(super) struct Estimate {
    held: f64,
    failed: f64,
}

impl Estimate {
    /// As if this much had been seen.
    pub(super) fn new(chance: f64, weight: f64) -> Self {
        Self { held: chance * weight, failed: (1.0 - chance) * weight }
    }

    pub(super) fn chance(&self) -> f64 {
        self.held / (self.held + self.failed)
    }

    pub(super) fn learn(&mut self, decay: f64, verified: Verified) {
        self.held = self.held * decay + verified.accepted as f64;
        self.failed = self.failed * decay + f64::from(u8::from(verified.accepted < verified.proposed));
    }
}

/// What became of a proposal.
#[derive(Debug, Clone, Copy)]
pub(super) struct Verified {
    pub(super) found: Found,
    pub(super) proposed: usize,
    pub(super) accepted: usize,
}

/// One sequence's index of its own tokens.
pub(super) struct Drafter {
    /// By a hash of the last tokens, where what followed them lies; 0: nowhere yet. Later ones replace
    /// earlier ones, and whether the tokens are the same is looked at where they lie.
    tables: [Vec<u32>; ENDS.len()],
    /// What lies before this follows ends that are in the tables.
    indexed: usize,
    estimates: Option<[Estimate; ENDS.len()]>,
    proposal: Vec<u32>,
    found: Found,
    /// Steps until the next try, where the estimate says that it would not pay; and how many it will be
    /// when that fails as well.
    pause: u32,
    next_pause: u32,
}

impl Drafter {
    pub(super) fn new() -> Self {
        Self {
            tables: Default::default(),
            indexed: 1,
            estimates: None,
            proposal: Vec::new(),
            found: 0,
            pause: 0,
            next_pause: 1,
        }
    }

    /// Looks up what might follow `tokens`, of which there will be `longest` at most: up to `room` tokens
    /// and none that `ends` the sequence, since nothing follows that.
    pub(super) fn propose(
        &mut self,
        tokens: &[u32],
        longest: usize,
        room: usize,
        ends: impl Fn(u32) -> bool,
    ) -> &[u32] {
        self.index(tokens, longest);
        self.proposal.clear();
        let found = ENDS.iter().enumerate().find_map(|(found, &n)| {
            let end = &tokens[tokens.len().checked_sub(n)?..];
            let next = self.tables[found][slot(end, &self.tables[found])] as usize;
            (next > 0 && &tokens[next - n..next] == end).then_some((found, next))
        });
        if let Some((found, next)) = found {
            self.found = found;
            for offset in 0..room.min(DRAFTS_MAX) {
                // What repeats with a short period goes on as the proposal itself.
                let known = tokens.get(next + offset);
                let token = known.copied().unwrap_or_else(|| self.proposal[next + offset - tokens.len()]);
                if ends(token) {
                    break;
                }
                self.proposal.push(token);
            }
        }
        &self.proposal
    }

    /// Takes the ends of all tokens but the last into the tables: nothing follows the last one yet.
    fn index(&mut self, tokens: &[u32], longest: usize) {
        if self.proposal.capacity() == 0 {
            self.proposal.reserve_exact(DRAFTS_MAX);
            self.tables = ENDS.map(|_| vec![0; longest.next_power_of_two()]);
        }
        for next in self.indexed..tokens.len() {
            for (table, n) in self.tables.iter_mut().zip(ENDS) {
                if next >= n {
                    let at = slot(&tokens[next - n..next], table);
                    table[at] = next as u32;
                }
            }
        }
        self.indexed = tokens.len();
    }

    /// The last proposal.
    pub(super) fn proposal(&self) -> &[u32] {
        &self.proposal
    }

    /// How likely each further token of the last proposal is to hold; `prior` is what others know.
    pub(super) fn chance(&mut self, prior: &[Estimate; ENDS.len()]) -> f64 {
        let estimates =
            self.estimates.get_or_insert_with(|| prior.map(|known| Estimate::new(known.chance(), 1.0)));
        estimates[self.found].chance()
    }

    pub(super) fn found(&self) -> Found {
        self.found
    }

    /// Whether it is time to try a proposal that does not seem to pay.
    pub(super) fn may_try(&mut self) -> bool {
        self.pause = self.pause.saturating_sub(1);
        self.pause == 0
    }

    pub(super) fn learn(&mut self, verified: Verified) {
        if let Some(estimates) = &mut self.estimates {
            estimates[verified.found].learn(DECAY, verified);
        }
        if verified.accepted == 0 {
            self.next_pause = (self.next_pause * 2).min(PAUSE_MAX);
            self.pause = self.next_pause;
        } else {
            (self.pause, self.next_pause) = (0, 1);
        }
    }
}

/// Where the table, whose length is a power of two, keeps these tokens.
fn slot(tokens: &[u32], table: &[u32]) -> usize {
    // Multiplicative hashing (Knuth, "The Art of Computer Programming" 3, 6.4), the highest bits of which are good.
    let hash = tokens.iter().fold(0u64, |hash, token| {
        (hash ^ u64::from(*token)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23)
    });
    (hash.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize & (table.len() - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn propose(tokens: &[u32], room: usize) -> Vec<u32> {
        Drafter::new().propose(tokens, 64, room, |token| token == 99).to_vec()
    }

    #[test]
    fn what_followed_the_same_end_is_proposed() {
        assert_eq!(propose(&[1, 2, 3, 4, 5, 1, 2, 3], 4), [4, 5, 1, 2]);
        assert_eq!(propose(&[1, 2, 3, 4, 5, 1, 2, 3], 2), [4, 5]);
        assert_eq!(propose(&[7, 2, 3, 4, 5, 6, 1, 2, 3], 3), [4, 5, 6], "two tokens will do");
        assert_eq!(propose(&[1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 2), [4, 9], "three tokens say more than two");
        assert_eq!(propose(&[1, 2, 8, 1, 2, 9, 1, 2], 2), [9, 1], "the latest place counts");
        assert!(propose(&[1, 2, 3], 4).is_empty());
        assert!(propose(&[1], 4).is_empty());
        assert!(propose(&[5, 6, 99, 4, 5, 6], 4).is_empty(), "nothing follows an end");
        assert_eq!(propose(&[5, 6, 7, 99, 4, 5, 6], 4), [7]);
    }

    #[test]
    fn a_short_period_goes_on() {
        assert_eq!(propose(&[4, 4, 4], 5), [4; 5]);
        assert_eq!(propose(&[1, 2, 1, 2, 1], 5), [2, 1, 2, 1, 2]);
        assert_eq!(propose(&[1; 40], 99), [1; DRAFTS_MAX]);
    }

    #[test]
    fn the_index_grows_with_the_tokens() {
        let mut state = 9u64;
        let tokens: Vec<u32> = (0..200)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 62) as u32
            })
            .collect();
        let mut grown = Drafter::new();
        for length in 1..=tokens.len() {
            let at_once = Drafter::new().propose(&tokens[..length], 200, 6, |_| false).to_vec();
            assert_eq!(grown.propose(&tokens[..length], 200, 6, |_| false), at_once, "{length} tokens");
        }
        // Whatever the hash does, what is proposed followed the same end somewhere.
        let proposal = grown.proposal().to_vec();
        let end = &tokens[tokens.len() - 2..];
        let stood = tokens.windows(3).any(|window| &window[..2] == end && window[2] == proposal[0]);
        assert!(stood, "{proposal:?}");
    }

    #[test]
    fn estimates_follow_what_happens_and_tries_become_rare() {
        let mut drafter = Drafter::new();
        let prior = [Estimate::new(0.5, 1.0); 2];
        drafter.propose(&[1, 2, 3, 1, 2], 8, 3, |_| false);
        assert_eq!(drafter.chance(&prior), 0.5);
        let outcome = |accepted| Verified { found: 1, proposed: 2, accepted };
        let tries = |drafter: &mut Drafter| (1..).find(|_| drafter.may_try()).expect("some time");
        assert_eq!(tries(&mut drafter), 1);
        let mut pauses = Vec::new();
        for _ in 0..8 {
            drafter.learn(outcome(0));
            pauses.push(tries(&mut drafter));
        }
        assert_eq!(pauses, [2, 4, 8, 16, 32, 64, 64, 64]);
        assert!(drafter.chance(&prior) < 0.1);
        drafter.learn(outcome(2));
        drafter.learn(outcome(2));
        assert!(drafter.chance(&prior) > 0.4);
        assert_eq!(tries(&mut drafter), 1);
    }
}
