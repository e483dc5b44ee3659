//! Between text and tokens: prompts into ids, ids into characters, and where an answer's text ends. Pure functions
//! and small states; knows no request, no HTTP and no thread.

mod detokenizer;
pub mod dialect;
pub mod prompt;
mod stop;
pub mod turn;

pub use detokenizer::Detokenizer;
pub use stop::{Released, StopMatcher};

/// A generator for the tests' random worlds (xorshift64*).
#[cfg(test)]
struct Random(u64);

#[cfg(test)]
impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n
    }
}
