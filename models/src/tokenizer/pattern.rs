//! Patterns of pre-tokenizers, as their files write them, for an engine that matches in linear time.
//!
//! The files are written for Oniguruma. Three things of it are put differently here; what else the engine cannot
//! do (look-ahead in other places, look-behind, back-references) is an error that names the pattern:
//! - `\s+(?!\S)|\s+`, which leaves the last character of a run of white space to the word after it: `\s+` takes
//!   the run and `Pattern::find` gives that character back;
//! - possessive quantifiers lose their mark: in these patterns nothing could be given back anyway, but for `\s++$`,
//!   which is white space at the end of the text;
//! - `^` and `$` stand at every line, as in Ruby.

use regex_automata::Input;
use regex_automata::meta::{Config, Regex};

/// Longer ones are no pre-tokenizer's.
const PATTERN_CHARS_MAX: usize = 1 << 16;
/// What a compiled pattern may take. Classes such as `\p{L}` make real ones a few hundred kilobytes.
const PATTERN_BYTES_MAX: usize = 32 << 20;

/// A compiled pattern.
#[derive(Debug)]
pub(super) struct Pattern {
    /// The pattern; then, if `gives_back`, `\s+`, which matches where the first does not.
    regex: Regex,
    gives_back: bool,
}

impl Pattern {
    /// Translates and compiles `source`; an error says why not.
    pub(super) fn new(source: &str) -> Result<Self, String> {
        let fail = |why: &dyn std::fmt::Display| {
            let shown: String = source.chars().take(200).collect();
            format!("the pattern `{shown}` cannot be used: {why}")
        };
        if source.len() > PATTERN_CHARS_MAX {
            return Err(fail(&format!("it has {} bytes", source.len())));
        }
        let mut alternatives = alternatives(source);
        let gives_back = takes_runs_of_space(&mut alternatives);
        let mut patterns = vec![alternatives.join("|")];
        if gives_back {
            patterns.push(r"\s+".to_owned());
            if patterns[0].is_empty() {
                patterns.remove(0);
            }
        }
        let config = Config::new().nfa_size_limit(Some(PATTERN_BYTES_MAX));
        let regex = Regex::builder().configure(config).build_many(&patterns);
        let regex = regex.map_err(|error| fail(&cause(&error)))?;
        Ok(Self { regex, gives_back })
    }

    /// A pattern for exactly this text.
    pub(super) fn literal(text: &str) -> Result<Self, String> {
        Self::new(&regex::escape(text))
    }

    /// The first match that begins at `from` or later; it may be empty.
    pub(super) fn find(&self, text: &str, from: usize) -> Option<(usize, usize)> {
        let found = self.regex.find(Input::new(text).range(from..))?;
        let (start, mut end) = (found.start(), found.end());
        let is_run = self.gives_back && found.pattern().as_usize() + 1 == self.regex.pattern_len();
        if is_run && end < text.len() {
            let last = text[start..end].chars().next_back().map_or(0, char::len_utf8);
            if end - start > last {
                end -= last;
            }
        }
        Some((start, end))
    }
}

/// The innermost reason, in one line.
fn cause(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(inner) = error.source() {
        error = inner;
    }
    let text = error.to_string();
    // The parser draws the pattern and an arrow; the last line has the words.
    text.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned()
}

/// Takes the end `\s+(?!\S)|\s+` off; whether it was there.
fn takes_runs_of_space(alternatives: &mut Vec<String>) -> bool {
    let Some(at) = alternatives.iter().position(|alternative| alternative == r"\s+(?!\S)") else {
        return false;
    };
    let rest = &alternatives[at + 1..];
    // What the look-ahead refuses is a single character, so `\s` does as well; without either it is a gap
    // between matches, which is a piece too.
    if rest.len() > 1 || rest.iter().any(|last| ![r"\s+", r"\s", r"\s{1}"].contains(&last.as_str())) {
        return false;
    }
    alternatives.truncate(at);
    true
}

/// The pattern's alternatives, translated.
fn alternatives(source: &str) -> Vec<String> {
    // All in one group is the same as without it; a few levels are all that is seen.
    let source = (0..8).fold(source, |source, _| {
        let inside = source.strip_prefix("(?:").and_then(|rest| rest.strip_suffix(')'));
        inside.filter(|inside| closes_at_the_end(inside)).unwrap_or(source)
    });
    #[derive(PartialEq)]
    enum Last {
        Atom,
        Quantifier,
        /// `(`, after which `?` begins the group's kind.
        Open,
    }
    let mut alternatives = vec![String::new()];
    let (mut groups, mut classes) = (0usize, 0usize);
    let mut last = Last::Open;
    let mut chars = source.chars().peekable();
    while let Some(c) = chars.next() {
        let out = alternatives.last_mut().expect("there is always one; this is a bug");
        let before = std::mem::replace(&mut last, Last::Atom);
        match c {
            '\\' => {
                out.push(c);
                out.extend(chars.next());
            }
            '[' => {
                classes += 1;
                out.push(c);
                // A bracket at the start of a class is a character of it.
                if chars.peek() == Some(&'^') {
                    out.extend(chars.next());
                }
                if chars.peek() == Some(&']') {
                    out.push('\\');
                    out.extend(chars.next());
                }
            }
            ']' if classes > 0 => {
                classes -= 1;
                out.push(c);
            }
            _ if classes > 0 => out.push(c),
            '(' => {
                groups += 1;
                last = Last::Open;
                out.push(c);
            }
            ')' => {
                groups = groups.saturating_sub(1);
                out.push(c);
            }
            '|' => {
                last = Last::Open;
                if groups == 0 {
                    alternatives.push(String::new());
                } else {
                    out.push(c);
                }
            }
            '^' => out.push_str("(?m:^)"),
            '$' => out.push_str("(?m:$)"),
            // `??` and the like are lazy, `?+` and the like possessive.
            // All of a run of white space is followed by a line's end only where the text ends.
            '+' if before == Last::Quantifier && chars.peek() == Some(&'$') && out.ends_with(r"\s+") => {
                chars.next();
                out.push_str(r"\z");
            }
            '+' if before == Last::Quantifier => {}
            '?' | '*' | '+' if before == Last::Atom => {
                last = Last::Quantifier;
                out.push(c);
            }
            _ => out.push(c),
        }
    }
    alternatives
}

/// Whether the group that holds `inside` is not closed within it.
fn closes_at_the_end(inside: &str) -> bool {
    let (mut depth, mut classes, mut escaped) = (0i64, 0, false);
    for c in inside.chars() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '[' => classes += 1,
            ']' if classes > 0 => classes -= 1,
            '(' if classes == 0 => depth += 1,
            ')' if classes == 0 => depth -= 1,
            _ => {}
        }
        if depth < 0 {
            return false;
        }
    }
    depth == 0 && !escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all<'t>(pattern: &str, text: &'t str) -> Vec<&'t str> {
        let pattern = Pattern::new(pattern).expect("a pattern");
        let (mut found, mut at) = (Vec::new(), 0);
        while let Some((start, end)) = pattern.find(text, at) {
            found.push(&text[start..end]);
            at = end.max(start + 1);
        }
        found
    }

    #[test]
    fn runs_of_space_give_their_last_character_back() {
        assert_eq!(all(r" ?\w+|\s+(?!\S)|\s+", "a  b\n\n"), ["a", " ", " b", "\n\n"]);
        assert_eq!(all(r"(?: ?\w+|\s+(?!\S)|\s)", "a  b \t"), ["a", " ", " b", " \t"]);
        assert_eq!(all(r"\s*[\r\n]+|\s+(?!\S)|\s+", " \n  x"), [" \n", " ", " "]);
        assert_eq!(all(r"\s*[\r\n]|\s+(?!\S)", " \n\n  x"), [" \n\n", " ", " "]);
        // Three wide, and a look-alike in a class or behind an escape.
        assert_eq!(all(r"\s+(?!\S)|\s+", "\u{3000}\u{3000}x"), ["\u{3000}", "\u{3000}"]);
        assert_eq!(all(r"[|]|\||x", "|x"), ["|", "x"]);
    }

    #[test]
    fn possessive_quantifiers_and_line_ends_are_translated() {
        assert_eq!(all(r"[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+", "..ab1234"), [".ab", "1234"]);
        assert_eq!(all(r"\++|a*+b", "+++aab"), ["+++", "aab"]);
        assert_eq!(all(r"\s+$", "a  \nb  "), ["  ", "  "]);
        assert_eq!(all(r"\s++$|\s*[\r\n]|\s", "\n\nx\n \n"), ["\n\n", "\n \n"]);
        assert_eq!(all(r"[]x]+|[^]]", "]x]y"), ["]x]", "y"]);
        assert_eq!(all(r"a??", "a"), ["", ""], "lazy stays lazy");
    }

    #[test]
    fn what_the_engine_cannot_do_is_named() {
        for pattern in [r"(?=\d)", r"(?<!a)b", r"(a)\1", "[a", r"\s+(?!\S)|x|y", "(a{9999}){999}"] {
            let error = Pattern::new(pattern).expect_err(pattern);
            assert!(error.contains(pattern), "{error}");
        }
        assert!(Pattern::new(&"a".repeat(1 << 20)).expect_err("long").contains("bytes"));
        assert!(Pattern::new(&"(".repeat(60_000)).is_err());
    }
}
