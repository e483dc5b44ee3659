//! A grammar for tiny vocabularies: which tokens may come next is a hash of those before.

use std::sync::Arc;

use obol::request::{Grammar, Guide, GuideError, Sampling, Stops};

#[derive(Debug)]
struct Hashed(u64);

#[derive(Debug)]
struct Place {
    state: u64,
    allowed: [u32; 1],
}

impl Grammar for Hashed {
    fn guide(&self) -> Box<dyn Guide> {
        let mut place = Place { state: self.0, allowed: [0] };
        place.look();
        Box::new(place)
    }
}

impl Place {
    /// A few of the first 32 tokens, token 1 always.
    fn look(&mut self) {
        let hash = blake3::hash(&self.state.to_le_bytes());
        let word = |at: usize| u32::from_le_bytes(*hash.as_bytes()[4 * at..].first_chunk().unwrap());
        self.allowed = [(word(0) & word(1)) | 2];
    }
}

impl Guide for Place {
    fn allowed(&mut self) -> Result<&[u32], GuideError> {
        Ok(&self.allowed)
    }

    fn drew(&mut self, token: u32) {
        assert!(self.allowed[0] >> token & 1 == 1, "token {token} was not allowed");
        self.state = self.state.wrapping_mul(31).wrapping_add(u64::from(token) + 1);
        self.look();
    }
}

/// A third of the requests that may come with a grammar do.
pub(crate) fn grammar_of(sampling: &Sampling, stops: &Stops) -> Option<Arc<dyn Grammar>> {
    let may = stops.min_tokens == 0 && !stops.ignore_eos;
    (may && sampling.seed % 3 == 1).then(|| Arc::new(Hashed(sampling.seed)) as Arc<dyn Grammar>)
}
