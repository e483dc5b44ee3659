//! Pre-tokenizers: text is cut into pieces before merging, by patterns that belong to the model.
//!
//! Invariant: the pieces of a text, put together, are the text. The names and patterns are those that GGUF files
//! give in `tokenizer.ggml.pre`; time is linear in the text (the patterns hold no look-ahead, see `Stage`).

use regex::Regex;

/// GPT-2's pattern.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";
/// Llama 3's: contractions in any case, a leading sign kept with its word, digits by three.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";
/// Qwen2's: as Llama 3's with single digits.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";
/// Qwen3.5's: as Qwen2's with marks kept in their word.
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+";

/// What a name of `tokenizer.ggml.pre` means.
struct Family {
    names: &'static [&'static str],
    stages: &'static [&'static str],
    /// A piece that is a token is taken whole, without merging.
    ignore_merges: bool,
    /// Whether a beginning-of-text token is added where the file does not say.
    add_bos: bool,
}

const FAMILIES: &[Family] = &[
    Family {
        names: &["gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "mellum"],
        stages: &[GPT2],
        ignore_merges: false,
        add_bos: false,
    },
    Family {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
        stages: &[r"\p{N}", GPT2],
        ignore_merges: false,
        add_bos: false,
    },
    Family {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "lfm2"],
        stages: &[LLAMA3],
        ignore_merges: true,
        add_bos: true,
    },
    Family {
        names: &["qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"],
        stages: &[QWEN2],
        ignore_merges: false,
        add_bos: false,
    },
    Family { names: &["qwen35"], stages: &[QWEN35], ignore_merges: false, add_bos: false },
    Family {
        names: &["falcon"],
        stages: &[r"[\p{P}$+<=>^~|`]+", GPT2, "[0-9][0-9][0-9]"],
        ignore_merges: false,
        add_bos: false,
    },
    Family {
        names: &["default"],
        stages: &[r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        ignore_merges: false,
        add_bos: false,
    },
];

/// Cuts text into pieces.
#[derive(Debug)]
pub(super) struct Splitter {
    stages: Vec<Stage>,
    pub(super) ignore_merges: bool,
    pub(super) add_bos: bool,
}

/// One pattern: its matches and what lies between them become pieces, each cut further by the next stage.
///
/// The originals have `\s+(?!\S)` before `\s+`: a run of white space before a word leaves its last character to
/// that word. Here `\s+` takes the run and gives that character back, which needs no look-ahead.
#[derive(Debug)]
struct Stage {
    pattern: Regex,
    /// The pattern ends in `\s+`.
    gives_back: bool,
    /// It has `\s*[\r\n]+` before that, which gives nothing back.
    keeps_newlines: bool,
}

impl Splitter {
    /// The pre-tokenizer of that name; an error lists the names there are.
    pub(super) fn by_name(name: &str) -> Result<Self, String> {
        let Some(family) = FAMILIES.iter().find(|family| family.names.contains(&name)) else {
            let known =
                FAMILIES.iter().flat_map(|family| family.names).copied().collect::<Vec<_>>().join(", ");
            return Err(format!("the pre-tokenizer `{name}` is not supported; supported: {known}"));
        };
        let stage = |pattern: &&str| Stage {
            pattern: Regex::new(pattern).expect("the patterns are constant and tested; this is a bug"),
            gives_back: pattern.ends_with(r"|\s+"),
            keeps_newlines: pattern.contains(r"|\s*[\r\n]+|"),
        };
        Ok(Self {
            stages: family.stages.iter().map(stage).collect(),
            ignore_merges: family.ignore_merges,
            add_bos: family.add_bos,
        })
    }

    /// Calls `piece` with each piece of `text`, in order.
    pub(super) fn split<'t>(&self, text: &'t str, piece: &mut impl FnMut(&'t str)) {
        split_by(&self.stages, text, piece);
    }
}

fn split_by<'t>(stages: &[Stage], text: &'t str, piece: &mut impl FnMut(&'t str)) {
    if text.is_empty() {
        return;
    }
    let Some((stage, rest)) = stages.split_first() else { return piece(text) };
    let mut at = 0;
    while let Some(found) = stage.pattern.find_at(text, at) {
        split_by(rest, &text[at..found.start()], piece);
        let end = stage.end_of(text, found.start(), found.end());
        split_by(rest, &text[found.start()..end], piece);
        at = end;
    }
    split_by(rest, &text[at..], piece);
}

impl Stage {
    /// The end of the match `start..end`: a run of white space that is not at the end of the text leaves its last
    /// character to what follows, unless that is all it has.
    fn end_of(&self, text: &str, start: usize, end: usize) -> usize {
        let run = &text[start..end];
        let Some(last) = run.chars().next_back().filter(|c| c.is_whitespace()) else { return end };
        let keeps = self.keeps_newlines && matches!(last, '\r' | '\n');
        if !self.gives_back || keeps || end == text.len() || !run.chars().all(char::is_whitespace) {
            return end;
        }
        if run.len() == last.len_utf8() { end } else { end - last.len_utf8() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, text: &str, expected: &[&str]) {
        let mut pieces = Vec::new();
        Splitter::by_name(name).expect("known name").split(text, &mut |piece| pieces.push(piece));
        assert_eq!(pieces, expected, "{name}: {text:?}");
        assert_eq!(pieces.concat(), text, "pieces make up the text");
    }

    #[test]
    fn white_space_leaves_its_last_character_to_the_word() {
        check("gpt-2", "a  b", &["a", " ", " b"]);
        check("gpt-2", "a\n\nb", &["a", "\n", "\n", "b"]);
        check("gpt-2", "a \n b  ", &["a", " \n", " b", "  "]);
        check("llama-bpe", "a\n\nb", &["a", "\n\n", "b"]);
        check("llama-bpe", "a \n\n  b", &["a", " \n\n", " ", " b"]);
        check("llama-bpe", "a!\n\n b", &["a", "!\n\n", " b"]);
        check("qwen2", "\t\tb\u{3000}\u{3000}c", &["\t", "\tb", "\u{3000}", "\u{3000}c"]);
    }

    #[test]
    fn digits_and_contractions() {
        check("gpt-2", "It's 12345 YOU'LL", &["It", "'s", " 12345", " YOU", "'", "LL"]);
        check("smollm", "x12 34", &["x", "1", "2", " ", "3", "4"]);
        check("llama-bpe", "12345 YOU'LL", &["123", "45", " YOU", "'LL"]);
        check("qwen2", "12 'tis", &["1", "2", " '", "tis"]);
        check("default", "a==12345", &["a", "==", "123", "45"]);
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_known_ones() {
        let error = Splitter::by_name("pre-of-tomorrow").expect_err("unknown");
        assert!(error.contains("pre-of-tomorrow") && error.contains("llama-bpe"), "{error}");
        for name in FAMILIES.iter().flat_map(|family| family.names) {
            Splitter::by_name(name).expect("every family's patterns compile");
        }
    }
}
