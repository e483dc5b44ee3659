//! Normalisers and pre-tokenizers of `tokenizer.json` as steps. Those that drop text or belong to other kinds of
//! model are refused by name.

use super::json::Node;
use crate::error::LoadError;
use crate::tokenizer::families::GPT2;
use crate::tokenizer::pattern::Pattern;
use crate::tokenizer::steps::{Behavior, Form, Prepend, PrependTo, Split, Step, Unless};
use crate::tokenizer::vocabulary::Spelling;

/// What a file does to texts.
#[derive(Debug, Default)]
pub(super) struct Cutting {
    pub(super) normalize: Vec<Step>,
    pub(super) split: Vec<Step>,
    pub(super) bytes: Bytes,
    /// What stands for a space.
    mark: Option<char>,
}

/// Whether pieces become bytes, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Bytes {
    #[default]
    No,
    /// After all else.
    Last,
    /// In the midst: what comes later sees the characters that stand for bytes.
    Spelled,
}

impl Cutting {
    pub(super) fn read(
        normalizer: Option<Node<'_>>,
        pre_tokenizer: Option<Node<'_>>,
    ) -> Result<Self, LoadError> {
        let mut cutting = Self::default();
        if let Some(node) = normalizer {
            cutting.normalizer(&node)?;
        }
        if let Some(node) = &pre_tokenizer {
            cutting.pre_tokenizer(node)?;
        }
        let spells = |steps: &[Step]| steps.iter().filter(|step| matches!(step, Step::SpellBytes)).count();
        let count = spells(&cutting.normalize) + spells(&cutting.split);
        cutting.bytes = match (count, cutting.split.last()) {
            (0, _) => Bytes::No,
            (1, Some(Step::SpellBytes)) => {
                cutting.split.pop();
                Bytes::Last
            }
            (1, _) => Bytes::Spelled,
            _ => {
                let node = pre_tokenizer.expect("normalisers of bytes come once; this is a bug");
                return Err(node.error("turns bytes to characters twice"));
            }
        };
        Ok(cutting)
    }

    pub(super) fn spelling(&self) -> Spelling {
        match (self.bytes, self.mark) {
            (Bytes::No, Some(mark)) => Spelling::Spaces(mark),
            (Bytes::No, None) => Spelling::Plain,
            _ => Spelling::Bytes,
        }
    }

    fn normalizer(&mut self, node: &Node<'_>) -> Result<(), LoadError> {
        let step = match node.need("type")?.string()? {
            "Sequence" => {
                for inner in node.need("normalizers")?.each()? {
                    self.normalizer(&inner)?;
                }
                return Ok(());
            }
            "NFC" => Step::Normal(Form::Nfc),
            "NFD" => Step::Normal(Form::Nfd),
            "NFKC" => Step::Normal(Form::Nfkc),
            "NFKD" => Step::Normal(Form::Nfkd),
            "Lowercase" => Step::Lowercase,
            "Strip" => Step::Trim { left: node.flag("strip_left")?, right: node.flag("strip_right")? },
            "Prepend" => Step::Prepend(Prepend {
                text: node.need("prepend")?.string()?.to_owned(),
                unless: Unless::Never,
                to: PrependTo::Every,
            }),
            "Replace" => {
                let (pattern, literal) = pattern(node)?;
                let content = node.need("content")?.string()?;
                if literal == Some(" ") {
                    self.mark = single_char(content).or(self.mark);
                }
                Step::Replace(pattern, content.to_owned())
            }
            "ByteLevel" if !self.normalize.iter().any(|step| matches!(step, Step::SpellBytes)) => {
                Step::SpellBytes
            }
            other => {
                let known =
                    "NFC, NFD, NFKC, NFKD, Lowercase, Strip, Prepend, Replace, ByteLevel (once), Sequence";
                return Err(not_supported(node, other, known));
            }
        };
        self.normalize.push(step);
        Ok(())
    }

    fn pre_tokenizer(&mut self, node: &Node<'_>) -> Result<(), LoadError> {
        match node.need("type")?.string()? {
            "Sequence" => {
                for inner in node.need("pretokenizers")?.each()? {
                    self.pre_tokenizer(&inner)?;
                }
            }
            "ByteLevel" => {
                if node.flag("add_prefix_space")? {
                    let (text, unless) = (" ".to_owned(), Unless::Char(' '));
                    self.split.push(Step::Prepend(Prepend { text, unless, to: PrependTo::Every }));
                }
                if node.find_bool("use_regex")?.unwrap_or(true) {
                    self.split.push(Step::isolate(GPT2).expect("the pattern is tested; this is a bug"));
                }
                self.split.push(Step::SpellBytes);
            }
            "Split" => {
                let (pattern, _) = pattern(node)?;
                let (behavior, invert) = (behavior(node)?, node.flag("invert")?);
                self.split.push(Step::Split(Split { pattern, behavior, invert }));
            }
            "Digits" => {
                let alone = node.flag("individual_digits")?;
                let behavior = if alone { Behavior::Isolated } else { Behavior::Contiguous };
                self.split.push(constant(r"\p{N}", behavior));
            }
            "Punctuation" => {
                self.split.push(constant(r"[\p{P}!-/:-@\[-`{-~]", behavior(node)?));
            }
            "Metaspace" => self.metaspace(node)?,
            other => {
                let known = "ByteLevel, Split, Digits, Punctuation, Metaspace, Sequence";
                return Err(not_supported(node, other, known));
            }
        }
        Ok(())
    }

    fn metaspace(&mut self, node: &Node<'_>) -> Result<(), LoadError> {
        let text = node.find_string("replacement")?.unwrap_or("▁");
        let mark = single_char(text).ok_or_else(|| node.fail("replacement", "should be one character"))?;
        let scheme = match (node.find_string("prepend_scheme")?, node.find_bool("add_prefix_space")?) {
            (Some(scheme), _) => scheme,
            (None, Some(false)) => "never",
            (None, _) => "always",
        };
        let to = match scheme {
            "always" => Some(PrependTo::Every),
            "first" => Some(PrependTo::Start),
            "never" => None,
            _ => return Err(node.fail("prepend_scheme", "should be always, first or never")),
        };
        self.mark = Some(mark);
        let problem = |why: String| node.error(&why);
        self.split.push(Step::replace(" ", text).map_err(problem)?);
        if let Some(to) = to {
            let prepend = Prepend { text: text.to_owned(), unless: Unless::Char(mark), to };
            self.split.push(Step::Prepend(prepend));
        }
        if node.find_bool("split")?.unwrap_or(true) {
            let pattern = Pattern::literal(text).map_err(problem)?;
            self.split.push(Step::Split(Split {
                pattern,
                behavior: Behavior::MergedWithNext,
                invert: false,
            }));
        }
        Ok(())
    }
}

fn not_supported(node: &Node<'_>, found: &str, known: &str) -> LoadError {
    node.fail("type", &format!("is `{found}`, which is not supported; supported: {known}"))
}

fn constant(pattern: &str, behavior: Behavior) -> Step {
    let pattern = Pattern::new(pattern).expect("the pattern is constant and tested; this is a bug");
    Step::Split(Split { pattern, behavior, invert: false })
}

fn single_char(text: &str) -> Option<char> {
    let mut chars = text.chars();
    chars.next().filter(|_| chars.next().is_none())
}

/// `{"String": text}` or `{"Regex": pattern}`; the text, if it is one.
fn pattern<'j>(node: &Node<'j>) -> Result<(Pattern, Option<&'j str>), LoadError> {
    let field = node.need("pattern")?;
    let (built, literal, field) = if let Some(regex) = field.get("Regex") {
        (Pattern::new(regex.string()?), None, regex)
    } else {
        let text = if field.value.is_string() { field } else { field.need("String")? };
        (Pattern::literal(text.string()?), Some(text.string()?), text)
    };
    Ok((built.map_err(|why| field.error(&why))?, literal))
}

fn behavior(node: &Node<'_>) -> Result<Behavior, LoadError> {
    Ok(match node.find_string("behavior")? {
        None | Some("Isolated") => Behavior::Isolated,
        Some("Removed") => Behavior::Removed,
        Some("Contiguous") => Behavior::Contiguous,
        Some("MergedWithPrevious") => Behavior::MergedWithPrevious,
        Some("MergedWithNext") => Behavior::MergedWithNext,
        Some(_) => {
            let known = "Isolated, Removed, Contiguous, MergedWithPrevious or MergedWithNext";
            return Err(node.fail("behavior", &format!("should be {known}")));
        }
    })
}
