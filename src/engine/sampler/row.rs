//! A row of logits in pieces of 64: where the highest ones are is known from one fast pass, and a changed
//! logit costs a copy of its piece, not of the row.

use std::ops::Range;

/// Logits in a piece; the last piece may have fewer.
pub(super) const PIECE: usize = 64;

const PLAIN: u32 = u32::MAX;
/// A piece of which nothing may be drawn.
const BARRED: u32 = u32::MAX - 1;
static NOTHING: [f32; PIECE] = [f32::NEG_INFINITY; PIECE];

/// Copies of the pieces that were changed.
#[derive(Debug, Default)]
pub(super) struct Patch {
    copies: Vec<f32>,
    /// (pieces) where the copy of each begins, `PLAIN` or `BARRED`; empty while nothing was changed.
    starts: Vec<u32>,
}

impl Patch {
    pub(super) fn clear(&mut self) {
        self.copies.clear();
        self.starts.clear();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// The token's logit, to be changed; `None` when the row `plain` has no such token.
    pub(super) fn logit(&mut self, plain: &[f32], token: u32) -> Option<&mut f32> {
        let token = token as usize;
        if token >= plain.len() {
            return None;
        }
        if self.starts.is_empty() {
            self.starts.resize(plain.len().div_ceil(PIECE), PLAIN);
        }
        let start = &mut self.starts[token / PIECE];
        if *start == PLAIN {
            *start = u32::try_from(self.copies.len()).expect("a row has fewer than 2^32 logits");
            self.copies.extend_from_slice(&plain[place(token / PIECE, plain.len())]);
        }
        Some(&mut self.copies[*start as usize + token % PIECE])
    }

    /// Leaves only the tokens whose bits are set: token t is bit t % 32 of word t / 32, past the last word none. The
    /// last change of a row.
    pub(super) fn keep_only(&mut self, plain: &[f32], allowed: &[u32]) {
        self.starts.resize(plain.len().div_ceil(PIECE), PLAIN);
        for (piece, start) in self.starts.iter_mut().enumerate() {
            let word = |at: usize| u64::from(allowed.get(2 * piece + at).copied().unwrap_or(0));
            let bits = word(0) | word(1) << 32;
            let place = place(piece, plain.len());
            if bits == 0 {
                *start = BARRED;
            } else if bits.trailing_ones() < place.len() as u32 {
                if *start == PLAIN {
                    *start = u32::try_from(self.copies.len()).expect("a row has fewer than 2^32 logits");
                    self.copies.extend_from_slice(&plain[place.clone()]);
                }
                let copy = &mut self.copies[*start as usize..][..place.len()];
                let barred = copy.iter_mut().enumerate().filter(|(at, _)| bits >> at & 1 == 0);
                barred.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
            }
        }
    }
}

/// Tokens of a piece.
fn place(piece: usize, vocab: usize) -> Range<usize> {
    piece * PIECE..((piece + 1) * PIECE).min(vocab)
}

/// A row as its sampling changed it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row<'a> {
    pub(super) plain: &'a [f32],
    pub(super) patch: &'a Patch,
}

impl<'a> Row<'a> {
    pub(super) fn pieces(&self) -> usize {
        self.plain.len().div_ceil(PIECE)
    }

    pub(super) fn piece(&self, piece: usize) -> &'a [f32] {
        let place = place(piece, self.plain.len());
        match self.patch.starts.get(piece) {
            None | Some(&PLAIN) => &self.plain[place],
            Some(&BARRED) => &NOTHING[..place.len()],
            Some(&start) => &self.patch.copies[start as usize..][..place.len()],
        }
    }

    /// The highest finite logit of each piece; negative infinity where there is none.
    pub(super) fn highest(&self, out: &mut Vec<f32>) {
        out.clear();
        out.extend((0..self.pieces()).map(|piece| highest(self.piece(piece))));
    }

    /// The token with the highest finite logit, ties to the lower id; `None` when no logit is finite.
    pub(super) fn best(&self, highest_of: &[f32]) -> Option<(u32, f32)> {
        let best = highest(highest_of);
        let piece = highest_of.iter().position(|highest| *highest == best)?;
        let within = self.piece(piece).iter().position(|logit| *logit == best);
        (best > f32::NEG_INFINITY)
            .then(|| ((piece * PIECE + within.expect("the piece's highest is in it")) as u32, best))
    }
}

/// The highest finite number; negative infinity when there is none.
fn highest(numbers: &[f32]) -> f32 {
    // Eight at a time that do not wait for each other.
    let (eights, rest) = numbers.as_chunks::<8>();
    let eight = eights.iter().fold([f32::NEG_INFINITY; 8], higher);
    let highest = eight.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a });
    if highest == f32::INFINITY {
        let finite = numbers.iter().copied().filter(|number| *number < f32::INFINITY);
        return finite.fold(f32::NEG_INFINITY, f32::max);
    }
    highest
}

/// Lane by lane; a comparison with NaN is false, so a NaN in `b` is passed over.
#[inline(always)]
fn higher(a: [f32; 8], b: &[f32; 8]) -> [f32; 8] {
    std::array::from_fn(|lane| if b[lane] > a[lane] { b[lane] } else { a[lane] })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_logit_copies_its_piece_alone() {
        let plain: Vec<f32> = (0..200).map(|i| i as f32).collect();
        let mut patch = Patch::default();
        *patch.logit(&plain, 70).expect("in the row") += 1000.0;
        *patch.logit(&plain, 199).expect("in the row") = f32::NEG_INFINITY;
        assert_eq!(patch.logit(&plain, 200), None);
        assert_eq!(patch.copies.len(), PIECE + 8);
        let row = Row { plain: &plain, patch: &patch };
        let all: Vec<f32> = (0..row.pieces()).flat_map(|piece| row.piece(piece)).copied().collect();
        for (token, (got, plain)) in all.iter().zip(&plain).enumerate() {
            let expected = match token {
                70 => 1070.0,
                199 => f32::NEG_INFINITY,
                _ => *plain,
            };
            assert_eq!(*got, expected, "token {token}");
        }
        let mut highest = Vec::new();
        row.highest(&mut highest);
        assert_eq!(highest, [63.0, 1070.0, 191.0, 198.0]);
        assert_eq!(row.best(&highest), Some((70, 1070.0)));
    }

    #[test]
    fn only_allowed_tokens_are_left() {
        let plain: Vec<f32> = (0..300).map(|i| i as f32).collect();
        let mut patch = Patch::default();
        *patch.logit(&plain, 130).expect("in the row") += 1000.0;
        // Token 3; all of the second piece; of the third only what was changed; of the others nothing, the last
        // because there are no words for it.
        let mut allowed = vec![0; 8];
        (allowed[0], allowed[2], allowed[3], allowed[4]) = (1 << 3, u32::MAX, u32::MAX, 1 << 2);
        patch.keep_only(&plain, &allowed);
        let row = Row { plain: &plain, patch: &patch };
        let all = (0..row.pieces()).flat_map(|piece| row.piece(piece)).copied();
        for (token, got) in all.enumerate() {
            let expected = match token {
                3 | 64..128 => token as f32,
                130 => 1130.0,
                _ => f32::NEG_INFINITY,
            };
            assert_eq!(got, expected, "token {token}");
        }
        // Two pieces were copied, the rest not.
        assert_eq!(patch.copies.len(), 2 * PIECE);
    }

    #[test]
    fn the_highest_is_finite_whatever_is_around_it() {
        let mut numbers = vec![f32::NAN; 40];
        assert_eq!(highest(&numbers), f32::NEG_INFINITY);
        numbers[3] = f32::INFINITY;
        numbers[38] = -5.0;
        assert_eq!(highest(&numbers), -5.0);
        numbers[20] = -4.0;
        assert_eq!(highest(&numbers), -4.0);
        assert_eq!(highest(&[]), f32::NEG_INFINITY);
    }
}
