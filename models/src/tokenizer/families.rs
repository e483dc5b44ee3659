//! Pre-tokenizers by the names that GGUF files give them (`tokenizer.ggml.pre`): text is cut into pieces before
//! merging, by patterns that belong to the model.
//!
//! Invariant: the pieces of a text, put together, are the text.

use super::steps::Step;

/// GPT-2's pattern.
pub(super) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Llama 3's: contractions in any case, a leading sign kept with its word, digits by three.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen2's: as Llama 3's with single digits.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen3.5's: as Qwen2's with marks kept in their word.
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// DeepSeek's: words of the alphabets with cases.
const DEEPSEEK_LETTERS: &str = concat!(
    r"\s?[",
    r"A-Za-z\u{B5}\u{C0}-\u{D6}\u{D8}-\u{F6}\u{F8}-\u{1BA}\u{1BC}-\u{1BF}\u{1C4}-\u{293}",
    r"\u{295}-\u{2AF}\u{370}-\u{373}\u{376}\u{377}\u{37B}-\u{37D}\u{37F}\u{386}\u{388}-\u{38A}\u{38C}",
    r"\u{38E}-\u{3A1}\u{3A3}-\u{3F5}\u{3F7}-\u{481}\u{48A}-\u{52F}\u{531}-\u{556}\u{10A0}-\u{10C5}",
    r"\u{13A0}-\u{13F5}\u{13F8}-\u{13FD}\u{1C90}-\u{1CBA}\u{1CBD}-\u{1CBF}\u{1D00}-\u{1D2B}",
    r"\u{1D6B}-\u{1D77}\u{1D79}-\u{1D9A}\u{1E00}-\u{1F15}\u{1F18}-\u{1F1D}\u{1F20}-\u{1F45}",
    r"\u{1F48}-\u{1F4D}\u{1F50}-\u{1F57}\u{1F59}\u{1F5B}\u{1F5D}\u{1F5F}-\u{1F7D}\u{1F80}-\u{1FB4}",
    r"\u{1FB6}-\u{1FBC}\u{1FBE}\u{1FC2}-\u{1FC4}\u{1FC6}-\u{1FCC}\u{1FD0}-\u{1FD3}\u{1FD6}-\u{1FDB}",
    r"\u{1FE0}-\u{1FEC}\u{1FF2}-\u{1FF4}\u{1FF6}-\u{1FFC}\u{2102}\u{2107}\u{210A}-\u{2113}\u{2115}",
    r"\u{2119}-\u{211D}\u{2124}\u{2126}\u{2128}\u{212A}-\u{212D}\u{212F}-\u{2134}\u{2139}",
    r"\u{213C}-\u{213F}\u{2145}-\u{2149}\u{214E}\u{2183}\u{2184}\u{2C00}-\u{2C7B}\u{2C7E}-\u{2CE4}",
    r"\u{2CEB}-\u{2CEE}\u{2CF2}\u{2CF3}\u{A640}-\u{A66D}\u{A680}-\u{A69B}\u{A722}-\u{A76F}",
    r"\u{A771}-\u{A787}\u{A78B}-\u{A78E}\u{AB70}-\u{ABBF}\u{FB00}-\u{FB06}\u{FB13}-\u{FB17}",
    r"\u{FF21}-\u{FF3A}\u{FF41}-\u{FF5A}\u{10400}-\u{1044F}\u{104B0}-\u{104D3}\u{104D8}-\u{104FB}",
    r"\u{10C80}-\u{10CB2}\u{10CC0}-\u{10CF2}\u{118A0}-\u{118DF}\u{1E900}-\u{1E943}",
    r"]+",
);
const DEEPSEEK_SIGNS: &str =
    r"\s?[!-/:-~\u{FF01}-\u{FF0F}\u{FF1A}-\u{FF5E}\u{2018}-\u{201F}\u{3000}-\u{3002}]+";
const DEEPSEEK_CJK: &str = r"[\u{4E00}-\u{9FA5}\u{800}-\u{4E00}\u{AC00}-\u{D7FF}]+";
/// DeepSeek V3's: a sign before an ASCII word stays with it, marks stay in words, signs by Unicode's classes.
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
/// Mistral's: words end where capitals follow small letters.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-4o's: as Mistral's, with contractions at the end of words and digits by three.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

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
        names: &["deepseek-llm"],
        stages: &[r"[\r\n]", DEEPSEEK_LETTERS, DEEPSEEK_SIGNS, r"\s+$", DEEPSEEK_CJK, r"\p{N}+"],
        ignore_merges: false,
        add_bos: false,
    },
    Family {
        names: &["deepseek-coder"],
        stages: &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_CJK, r"\p{N}"],
        ignore_merges: false,
        add_bos: false,
    },
    Family {
        names: &["deepseek-v3", "hunyuan-dense", "joyai-llm"],
        stages: &[r"\p{N}{1,3}", r"[\u{4E00}-\u{9FA5}\u{3040}-\u{30FF}]+", DEEPSEEK3],
        ignore_merges: false,
        add_bos: false,
    },
    Family { names: &["tekken", "pixtral"], stages: &[TEKKEN], ignore_merges: true, add_bos: true },
    Family {
        names: &["gpt-4o", "llama4", "kanana2"],
        stages: &[GPT4O],
        ignore_merges: false,
        add_bos: false,
    },
    Family {
        names: &["dbrx", "smaug-bpe", "chatglm-bpe"],
        stages: &[LLAMA3],
        ignore_merges: false,
        add_bos: false,
    },
    Family { names: &["glm4"], stages: &[LLAMA3], ignore_merges: true, add_bos: false },
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

/// How a family's texts are cut.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    pub(super) steps: Vec<Step>,
    pub(super) ignore_merges: bool,
    pub(super) add_bos: bool,
}

/// The pre-tokenizer of that name; an error lists the names there are.
pub(super) fn by_name(name: &str) -> Result<PreTokenizer, String> {
    let Some(family) = FAMILIES.iter().find(|family| family.names.contains(&name)) else {
        let known = FAMILIES.iter().flat_map(|family| family.names).copied().collect::<Vec<_>>().join(", ");
        return Err(format!("the pre-tokenizer `{name}` is not supported; supported: {known}"));
    };
    Ok(PreTokenizer {
        steps: family.stages.iter().map(|stage| Step::isolate(stage)).collect::<Result<_, _>>()?,
        ignore_merges: family.ignore_merges,
        add_bos: family.add_bos,
    })
}

#[cfg(test)]
mod tests {
    use super::super::steps::{self, Place};
    use super::*;

    fn check(name: &str, text: &str, expected: &[&str]) {
        let mut pieces = Vec::new();
        let place = Place { first_text: true, start: true };
        let steps = by_name(name).expect("known name").steps;
        steps::pieces(&steps, text, place, &mut |piece| pieces.push(piece.to_owned()));
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
        let error = by_name("pre-of-tomorrow").expect_err("unknown");
        assert!(error.contains("pre-of-tomorrow") && error.contains("llama-bpe"), "{error}");
        for name in FAMILIES.iter().flat_map(|family| family.names) {
            by_name(name).expect("every family's patterns compile");
        }
    }
}
