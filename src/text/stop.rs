//! Stop strings in a growing text. What may be the beginning of one is held back until it is clear.
//!
//! Invariants: the stop string that is complete first ends the text, before its first character (of several that are
//! complete at once, the longest); so the result does not depend on how the text was cut into pieces.

/// Watches one answer.
#[derive(Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// The longest end of the text so far that begins a stop string.
    held: String,
    /// Which stop string ended the text.
    found: Option<usize>,
}

/// Text that is certain to be part of the answer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Released {
    /// May be empty.
    pub text: String,
    /// A stop string was found: the answer ends after `text`. Do not push on.
    pub stopped: bool,
}

impl StopMatcher {
    /// Empty stop strings are ignored.
    #[must_use]
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).cloned().collect();
        Self { stops, held: String::new(), found: None }
    }

    /// Adds text to the answer.
    #[must_use]
    pub fn push(&mut self, text: &str) -> Released {
        self.held.push_str(text);
        let found = |(which, stop): (usize, &String)| {
            self.held.find(stop.as_str()).map(|start| (start + stop.len(), start, which))
        };
        if let Some((_, start, which)) = self.stops.iter().enumerate().filter_map(found).min() {
            self.found = Some(which);
            self.held.truncate(start);
            return Released { text: std::mem::take(&mut self.held), stopped: true };
        }
        let keep = self.stops.iter().map(|stop| self.begun(stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Released { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// The end of the answer: what was held back is text after all.
    #[must_use]
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// The stop string that ended the text.
    #[must_use]
    pub fn found(&self) -> Option<&str> {
        self.found.map(|which| self.stops[which].as_str())
    }

    /// Length of the longest proper beginning of `stop` that ends the held text.
    fn begun(&self, stop: &str) -> usize {
        let mut ends = stop.char_indices().rev().map(|(at, _)| at); // the last is 0: nothing begun
        ends.find(|&at| self.held.ends_with(&stop[..at])).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Random;

    /// The texts released for each piece, then the rest; `!` marks where it stopped.
    fn check(stops: &[&str], pieces: &[&str], expected: &[&str]) {
        let stops: Vec<String> = stops.iter().map(|&stop| stop.to_owned()).collect();
        let mut matcher = StopMatcher::new(&stops);
        let mut texts = Vec::new();
        for piece in pieces {
            let released = matcher.push(piece);
            texts.push(released.text + if released.stopped { "!" } else { "" });
            if released.stopped {
                break;
            }
        }
        texts.push(matcher.finish());
        assert_eq!(texts, expected, "{stops:?} {pieces:?}");
    }

    #[test]
    fn text_that_may_be_a_stop_waits() {
        check(&["END"], &["a", "bE", "N", "x"], &["a", "b", "", "ENx", ""]);
        check(&["END"], &["aE", "ND", "x"], &["a", "!", ""]);
        check(&["END"], &["aE", "N"], &["a", "", "EN"]);
        check(&["aab"], &["aaa", "ab"], &["a", "a!", ""]);
        check(&["\n\n", "User:"], &["hi\n", "User", ":"], &["hi", "\n", "!", ""]);
        check(&["é!"], &["xé", "?"], &["x", "é?", ""]);
        check(&[], &["all", "of it"], &["all", "of it", ""]);
        check(&[""], &["all"], &["all", ""]);
    }

    #[test]
    fn the_stop_that_is_complete_first_counts() {
        check(&["abcd", "bc"], &["abcd"], &["a!", ""]);
        check(&["abcd", "bc"], &["a", "b", "c", "d"], &["", "", "a!", ""]);
        check(&["bc", "abc"], &["xabc"], &["x!", ""]);
    }

    #[test]
    fn the_stop_that_counted_is_named() {
        let mut matcher = StopMatcher::new(&["never".into(), "bc".into(), "abc".into()]);
        assert!(!matcher.push("xab").stopped && matcher.found().is_none());
        assert!(matcher.push("c").stopped);
        assert_eq!(matcher.found(), Some("abc"), "the longest of those that are complete at once");
    }

    #[test]
    fn any_cutting_gives_what_watching_character_by_character_gives() {
        const LETTERS: [&str; 4] = ["a", "b", "c", "é"];
        let word = |random: &mut Random, len: usize| -> String {
            (0..len).map(|_| LETTERS[random.below(4)]).collect()
        };
        for seed in 1..5000 {
            let mut random = Random(seed);
            let mut stops = Vec::new();
            for _ in 0..random.below(4) {
                let len = 1 + random.below(4);
                stops.push(word(&mut random, len));
            }
            let len = random.below(14);
            let text = word(&mut random, len);
            let ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
            let cut = ends.into_iter().find_map(|end| {
                let done = stops.iter().filter(|stop| text[..end].ends_with(stop.as_str()));
                done.map(|stop| end - stop.len()).min()
            });

            let mut matcher = StopMatcher::new(&stops);
            let (mut answer, mut stopped) = (String::new(), false);
            let mut chars = text.chars().peekable();
            while chars.peek().is_some() && !stopped {
                let piece: String = chars.by_ref().take(1 + random.below(3)).collect();
                let released = matcher.push(&piece);
                answer.push_str(&released.text);
                stopped = released.stopped;
            }
            answer.push_str(&matcher.finish());
            assert_eq!(answer, text[..cut.unwrap_or(text.len())], "seed {seed}: {text} {stops:?}");
            assert_eq!(stopped, cut.is_some(), "seed {seed}: {text} {stops:?}");
        }
    }
}
