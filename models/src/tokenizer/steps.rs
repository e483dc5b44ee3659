//! What is done to a text before merging: rewriting (normalisation, marks for spaces) and cutting into pieces.
//! Knows no vocabulary.

use std::borrow::Cow;

use unicode_normalization::UnicodeNormalization;

use super::bytes;
use super::pattern::Pattern;

/// One thing done to a text or to each of its pieces.
#[derive(Debug)]
pub(super) enum Step {
    Split(Split),
    Prepend(Prepend),
    /// Matches become the text.
    Replace(Pattern, String),
    Normal(Form),
    Lowercase,
    /// White space at the sides goes.
    Trim {
        left: bool,
        right: bool,
    },
    /// Bytes become the characters of the byte alphabet.
    SpellBytes,
}

/// Cuts a text by a pattern.
#[derive(Debug)]
pub(super) struct Split {
    pub(super) pattern: Pattern,
    pub(super) behavior: Behavior,
    /// What lies between the matches counts as matched, and the matches as not.
    pub(super) invert: bool,
}

/// What becomes of a match.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Behavior {
    /// A piece of its own.
    Isolated,
    /// Nothing.
    Removed,
    /// A piece together with the matches next to it.
    Contiguous,
    /// The end of the piece before it.
    MergedWithPrevious,
    /// The start of the piece after it.
    MergedWithNext,
}

/// Puts a text before another.
#[derive(Debug)]
pub(super) struct Prepend {
    pub(super) text: String,
    /// Not before a text that begins so.
    pub(super) unless: Unless,
    pub(super) to: PrependTo,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unless {
    Never,
    Char(char),
    Space,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PrependTo {
    /// Every text between special tokens.
    Every,
    /// The first text, special tokens before it or not.
    FirstText,
    /// Only a text with nothing before it.
    Start,
}

/// Unicode's normalisation forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Nfc,
    Nfd,
    Nfkc,
    Nfkd,
}

/// Where a text stands in the whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// No other text comes before it.
    pub(super) first_text: bool,
    /// Nothing comes before it.
    pub(super) start: bool,
}

impl Step {
    pub(super) fn replace(from: &str, to: &str) -> Result<Self, String> {
        Ok(Self::Replace(Pattern::literal(from)?, to.to_owned()))
    }

    pub(super) fn isolate(pattern: &str) -> Result<Self, String> {
        let pattern = Pattern::new(pattern)?;
        Ok(Self::Split(Split { pattern, behavior: Behavior::Isolated, invert: false }))
    }

    fn rewrite<'t>(&self, text: Cow<'t, str>, place: Place) -> Cow<'t, str> {
        match self {
            Self::Split(_) => text,
            Self::Prepend(prepend) => prepend.apply(text, place),
            Self::Replace(pattern, with) => replace_all(pattern, with, text),
            Self::Normal(form) => form.apply(text),
            Self::Lowercase => text.to_lowercase().into(),
            Self::Trim { left, right } => {
                let mut kept = &*text;
                if *left {
                    kept = kept.trim_start();
                }
                if *right {
                    kept = kept.trim_end();
                }
                if kept.len() == text.len() { text } else { kept.to_owned().into() }
            }
            Self::SpellBytes => text.bytes().map(bytes::char_of_byte).collect::<String>().into(),
        }
    }
}

/// `text` after all of `steps`, which cut nothing.
pub(super) fn rewrite<'t>(steps: &[Step], text: Cow<'t, str>, place: Place) -> Cow<'t, str> {
    steps.iter().fold(text, |text, step| step.rewrite(text, place))
}

/// Calls `piece` with each piece of `text` after all of `steps`, in order; none is empty.
pub(super) fn pieces(steps: &[Step], text: &str, place: Place, piece: &mut dyn FnMut(&str)) {
    if text.is_empty() {
        return;
    }
    let Some((step, rest)) = steps.split_first() else { return piece(text) };
    match step {
        Step::Split(split) => split.cut(text, &mut |start, end| {
            let place = if start == 0 { place } else { Place { first_text: false, start: false } };
            pieces(rest, &text[start..end], place, piece);
        }),
        step => pieces(rest, &step.rewrite(text.into(), place), place, piece),
    }
}

impl Split {
    /// Calls `part` with the borders of each part of `text`.
    fn cut(&self, text: &str, part: &mut dyn FnMut(usize, usize)) {
        match self.behavior {
            Behavior::Isolated => self.ranges(text, &mut |start, end, _| part(start, end)),
            Behavior::Removed => self.ranges(text, &mut |start, end, matched| {
                if !matched {
                    part(start, end);
                }
            }),
            Behavior::Contiguous => self.joined(text, part, |before, matched| before == matched),
            // A match that follows another stays alone.
            Behavior::MergedWithPrevious => self.joined(text, part, |before, matched| matched && !before),
            Behavior::MergedWithNext => self.joined(text, part, |before, matched| before && !matched),
        }
    }

    /// Parts of ranges that `joins` puts together: of two neighbours it is told whether each is a match.
    fn joined(&self, text: &str, part: &mut dyn FnMut(usize, usize), joins: impl Fn(bool, bool) -> bool) {
        let mut open: Option<(usize, usize, bool)> = None;
        self.ranges(text, &mut |start, end, matched| {
            open = match open {
                Some((first, _, before)) if joins(before, matched) => Some((first, end, matched)),
                Some((first, last, _)) => {
                    part(first, last);
                    Some((start, end, matched))
                }
                None => Some((start, end, matched)),
            };
        });
        if let Some((first, last, _)) = open {
            part(first, last);
        }
    }

    /// Calls `range` with the matches and what lies between them, none empty. An empty match only cuts.
    fn ranges(&self, text: &str, range: &mut dyn FnMut(usize, usize, bool)) {
        let (mut at, mut from) = (0, 0);
        while from <= text.len()
            && let Some((start, end)) = self.pattern.find(text, from)
        {
            if at < start {
                range(at, start, self.invert);
            }
            if start < end {
                range(start, end, !self.invert);
                from = end;
            } else {
                from = end + text[end..].chars().next().map_or(1, char::len_utf8);
            }
            at = end;
        }
        if at < text.len() {
            range(at, text.len(), self.invert);
        }
    }
}

impl Prepend {
    fn apply<'t>(&self, text: Cow<'t, str>, place: Place) -> Cow<'t, str> {
        let here = match self.to {
            PrependTo::Every => true,
            PrependTo::FirstText => place.first_text,
            PrependTo::Start => place.start,
        };
        let stands = |first: char| match self.unless {
            Unless::Never => false,
            Unless::Char(c) => first == c,
            Unless::Space => first.is_whitespace(),
        };
        if here && text.chars().next().is_some_and(|first| !stands(first)) {
            format!("{}{text}", self.text).into()
        } else {
            text
        }
    }
}

impl Form {
    fn apply<'t>(self, text: Cow<'t, str>) -> Cow<'t, str> {
        if text.is_ascii() {
            return text;
        }
        match self {
            Self::Nfc => text.nfc().collect::<String>(),
            Self::Nfd => text.nfd().collect(),
            Self::Nfkc => text.nfkc().collect(),
            Self::Nfkd => text.nfkd().collect(),
        }
        .into()
    }
}

fn replace_all<'t>(pattern: &Pattern, with: &str, text: Cow<'t, str>) -> Cow<'t, str> {
    let mut replaced = String::new();
    let (mut at, mut from) = (0, 0);
    while from <= text.len()
        && let Some((start, end)) = pattern.find(&text, from)
    {
        replaced.push_str(&text[at..start]);
        replaced.push_str(with);
        at = end;
        from = if start < end { end } else { end + text[end..].chars().next().map_or(1, char::len_utf8) };
    }
    if at == 0 && replaced.is_empty() {
        return text;
    }
    replaced.push_str(&text[at..]);
    replaced.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(behavior: Behavior, invert: bool, expected: &[&str]) {
        let split = Split { pattern: Pattern::new("-").expect("a pattern"), behavior, invert };
        let place = Place { first_text: true, start: true };
        let mut found = Vec::new();
        pieces(&[Step::Split(split)], "a-b--c-", place, &mut |piece| found.push(piece.to_owned()));
        assert_eq!(found, expected, "{behavior:?} {invert}");
    }

    #[test]
    fn matches_go_where_the_behavior_says() {
        check(Behavior::Isolated, false, &["a", "-", "b", "-", "-", "c", "-"]);
        check(Behavior::Removed, false, &["a", "b", "c"]);
        check(Behavior::Removed, true, &["-", "-", "-", "-"]);
        check(Behavior::Contiguous, false, &["a", "-", "b", "--", "c", "-"]);
        check(Behavior::MergedWithPrevious, false, &["a-", "b-", "-", "c-"]);
        check(Behavior::MergedWithNext, false, &["a", "-b", "-", "-c", "-"]);
    }

    #[test]
    fn an_empty_match_cuts() {
        let mut found = Vec::new();
        let step = Step::isolate(r"\b").expect("a pattern");
        let place = Place { first_text: true, start: true };
        pieces(&[step], "ab é!", place, &mut |piece| found.push(piece.to_owned()));
        assert_eq!(found, ["ab", " ", "é", "!"]);
    }
}
