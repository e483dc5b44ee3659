//! Which of several replicas takes a request: where most of its prompt has been computed before, unless too much
//! is waiting there.
//!
//! Pure. Does not know engines: what a replica has is judged by what was sent to it. Invariant: with equal
//! histories requests are placed equally.

use std::collections::{BTreeMap, HashMap};

use crate::engine::prefix::PrefixKey;

/// A cached token outweighs this many tokens of other requests: it is not computed again, while those wait for
/// little, as steps take many sequences at once.
const CACHED_WORTH: u64 = 4;

/// However much it has cached, a replica is passed over when it has this many tokens more to compute than the
/// least loaded one.
pub(super) const LOAD_LEAD_MAX: u64 = 4_096;

/// A replica that could take a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Candidate {
    /// Tokens of the request's prompt, from its beginning, that are in the replica's prefix cache.
    pub(super) cached: u64,
    /// Tokens of the requests that wait or run there, answers included.
    pub(super) load: u64,
    /// Requests that it was given so far: the fewest takes what nothing else decides.
    pub(super) placed: u64,
}

/// The replica to take: an index into `candidates`, of which there is at least one.
///
/// # Panics
/// When there is none.
#[must_use]
pub(super) fn place(candidates: &[Candidate]) -> usize {
    let least = |at: &usize| {
        let Candidate { load, placed, .. } = candidates[*at];
        (load, placed, *at)
    };
    let idlest = (0..candidates.len()).min_by_key(least).expect("there is a replica");
    let longest = candidates.iter().map(|candidate| candidate.cached).max().expect("there is a replica");
    let holders = (0..candidates.len()).filter(|&at| candidates[at].cached == longest);
    let best = holders.min_by_key(least).expect("somebody has the longest");
    let lead = candidates[best].load - candidates[idlest].load;
    if lead <= lead_max(longest - candidates[idlest].cached) { best } else { idlest }
}

/// How many tokens more than the least loaded replica one may have to compute that has so many more cached.
fn lead_max(cached: u64) -> u64 {
    cached.saturating_mul(CACHED_WORTH).min(LOAD_LEAD_MAX)
}

/// The blocks that a replica's cache presumably holds: those of the prompts sent to it, as many as its pool has,
/// least recently used first out.
#[derive(Debug, Default)]
pub(super) struct Recent {
    capacity: usize,
    uses: u64,
    used: HashMap<PrefixKey, u64>,
    by_use: BTreeMap<u64, PrefixKey>,
}

impl Recent {
    #[must_use]
    pub(super) fn new(capacity: usize) -> Self {
        Self { capacity, ..Self::default() }
    }

    /// How many of these keys, from the first on, are held.
    #[must_use]
    pub(super) fn held(&self, keys: &[PrefixKey]) -> usize {
        keys.iter().take_while(|key| self.used.contains_key(key)).count()
    }

    /// A prompt with these keys is computed here. Of a prompt the last blocks are given up first: nothing is found
    /// behind a block that is gone.
    pub(super) fn touch(&mut self, keys: &[PrefixKey]) {
        for key in keys.iter().take(self.capacity).rev() {
            self.uses += 1;
            if let Some(before) = self.used.insert(*key, self.uses) {
                self.by_use.remove(&before);
            }
            self.by_use.insert(self.uses, *key);
        }
        while self.used.len() > self.capacity {
            let (_, key) = self.by_use.pop_first().expect("as many as are used");
            self.used.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::prefix;
    use crate::random::Random;
    use crate::request::CacheSalt;

    fn keys(tokens: &[u32]) -> Vec<PrefixKey> {
        let mut keys = Vec::new();
        prefix::extend(&mut keys, prefix::root(CacheSalt([7; 32])), tokens, 4);
        keys
    }

    #[test]
    fn the_longest_prefix_wins_within_the_bound_and_the_least_load_else() {
        let check = |candidates: &[(u64, u64, u64)], expected| {
            let candidates: Vec<Candidate> =
                candidates.iter().map(|&(cached, load, placed)| Candidate { cached, load, placed }).collect();
            assert_eq!(place(&candidates), expected, "{candidates:?}");
        };
        check(&[(0, 0, 0)], 0);
        check(&[(0, 0, 1), (0, 0, 0)], 1);
        check(&[(0, 7, 0), (0, 6, 9)], 1);
        // What all prompts begin with holds nobody back.
        check(&[(16, 64, 0), (0, 0, 0)], 0);
        check(&[(16, 65, 0), (0, 0, 0)], 1);
        check(&[(16, 90, 0), (16, 89, 9)], 1);
        check(&[(512, 500, 0), (256, 0, 0), (0, 0, 0)], 0);
        check(&[(512, 1_025, 0), (256, 0, 0), (0, 1, 0)], 1);
        check(&[(8_000, LOAD_LEAD_MAX, 0), (0, 0, 0)], 0);
        check(&[(8_000, LOAD_LEAD_MAX + 1, 0), (0, 0, 0)], 1);
        check(&[(48, 9, 0), (48, 8, 0), (48, 8, 1)], 1);
    }

    #[test]
    fn random_worlds_keep_the_rules() {
        for seed in 0..5_000 {
            let mut random = Random(seed);
            let most = [40, 3 * LOAD_LEAD_MAX][random.below(2) as usize];
            let candidates: Vec<Candidate> = (0..1 + random.below(5))
                .map(|_| Candidate {
                    cached: 16 * random.below(4) * random.below(60),
                    load: random.below(most),
                    placed: random.below(3),
                })
                .collect();
            let chosen = candidates[place(&candidates)];
            let idlest = candidates.iter().min_by_key(|it| (it.load, it.placed)).expect("one");
            let what = format!("seed {seed}: {candidates:?}");
            assert!(
                chosen.load <= idlest.load + lead_max(chosen.cached.saturating_sub(idlest.cached)),
                "{what}"
            );
            let longest = candidates.iter().map(|candidate| candidate.cached).max().expect("one");
            let holders = candidates.iter().filter(|candidate| candidate.cached == longest);
            let cheapest = holders.map(|candidate| candidate.load).min().expect("one");
            // Nobody is passed over but for the bound.
            if cheapest - idlest.load <= lead_max(longest - idlest.cached) {
                assert_eq!((chosen.cached, chosen.load), (longest, cheapest), "{what}");
            } else {
                assert_eq!((chosen.load, chosen.placed), (idlest.load, idlest.placed), "{what}");
            }
        }
    }

    /// Conversations that begin alike and grow turn by turn stay where they were, and work is shared.
    #[test]
    fn conversations_stay_and_the_load_is_shared() {
        for seed in 0..50 {
            let mut random = Random(seed);
            let mut recent: Vec<Recent> = (0..3).map(|_| Recent::new(4_000)).collect();
            let mut candidates = [Candidate::default(); 3];
            let mut conversations: Vec<(Vec<u32>, Option<usize>)> =
                (0..12).map(|first| ([vec![77; 8], vec![first; 8]].concat(), None)).collect();
            let mut running: Vec<(usize, u64)> = Vec::new();
            for turn in 0..300 {
                let who = random.below(12) as usize;
                let (tokens, home) = &mut conversations[who];
                let keys = keys(tokens);
                for (candidate, recent) in candidates.iter_mut().zip(&recent) {
                    candidate.cached = 4 * recent.held(&keys) as u64;
                }
                let chosen = place(&candidates);
                let idlest = candidates.iter().min_by_key(|it| (it.load, it.placed)).expect("three");
                if let Some(home) = *home
                    && candidates[home].cached > candidates.map(|it| it.cached)[(home + 1) % 3]
                    && candidates[home].cached > candidates.map(|it| it.cached)[(home + 2) % 3]
                    && candidates[home].load - idlest.load
                        <= lead_max(candidates[home].cached - idlest.cached)
                {
                    assert_eq!(chosen, home, "seed {seed}, turn {turn}: conversation {who} moved");
                }
                *home = Some(chosen);
                recent[chosen].touch(&keys);
                let load = tokens.len() as u64 + 30;
                candidates[chosen].load += load;
                candidates[chosen].placed += 1;
                running.push((chosen, load));
                tokens.extend((0..12).map(|_| random.below(1_000) as u32));
                while running.len() > 8 {
                    let (at, load) = running.swap_remove(random.below(running.len() as u64) as usize);
                    candidates[at].load -= load;
                }
            }
            assert!(candidates.iter().all(|candidate| candidate.placed > 30), "seed {seed}: {candidates:?}");
        }
    }

    #[test]
    fn what_was_used_longest_ago_is_forgotten_from_its_end() {
        let long: Vec<u32> = (0..40).collect();
        let (long, other) = (keys(&long), keys(&[9; 16]));
        let mut recent = Recent::new(10);
        recent.touch(&long);
        assert_eq!((recent.held(&long), recent.held(&other)), (10, 0));
        recent.touch(&other);
        assert_eq!((recent.held(&long), recent.held(&other)), (6, 4));
        recent.touch(&long[..2]);
        recent.touch(&keys(&[8; 32]));
        assert_eq!((recent.held(&long), recent.held(&other)), (2, 0));
        let mut none = Recent::new(0);
        none.touch(&long);
        assert_eq!(none.held(&long), 0);
    }
}
