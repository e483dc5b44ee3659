//! Forms against texts that look like them and texts that do not, through the sets of tokens of a real vocabulary.

use std::path::Path;
use std::sync::Arc;

use obol::grammar::{Form, Grammars};
use obol::request::Grammar;
use obol_models::gguf::GgufFile;
use obol_models::tokenizer::{Special, Tokenizer};
use serde_json::{Value, json};

use crate::engine_sim::Rng;

fn tokenizer() -> Tokenizer {
    let path = std::env::var_os("OBOL_TEST_MODEL")
        .expect("OBOL_TEST_MODEL is not set: run scripts/test, which fetches the model");
    let file = GgufFile::open(Path::new(&path)).expect("the test model opens");
    Tokenizer::from_gguf(&file).expect("it has a tokenizer")
}

fn is_allowed(allowed: &[u32], token: u32) -> bool {
    allowed.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
}

struct World {
    tokenizer: Tokenizer,
    grammars: Grammars,
}

impl World {
    fn new() -> Self {
        let tokenizer = tokenizer();
        let grammars = Grammars::new(&tokenizer, 2);
        Self { tokenizer, grammars }
    }

    fn compile(&self, form: &Form) -> Arc<dyn Grammar> {
        self.grammars.compile(form).unwrap_or_else(|error| panic!("{form:?}: {error}"))
    }

    fn error(&self, form: &Form) -> String {
        match self.grammars.compile(form) {
            Ok(_) => panic!("{form:?} was understood"),
            Err(error) => error.to_string(),
        }
    }

    /// Whether the text may be drawn, as the tokenizer cuts it, and end.
    fn reads(&self, grammar: &dyn Grammar, text: &str) -> bool {
        let mut guide = grammar.guide();
        for token in self.tokenizer.encode(text, Special::default()) {
            if !is_allowed(guide.allowed().expect("a set"), token) {
                return false;
            }
            guide.drew(token);
        }
        let allowed = guide.allowed().expect("a set");
        self.tokenizer.end_tokens().iter().any(|end| is_allowed(allowed, *end))
    }

    /// A text of tokens that are drawn as they come; those of few bytes more often, so that it ends.
    fn wander(&self, grammar: &dyn Grammar, random: &mut Rng) -> Option<String> {
        let (mut guide, mut tokens) = (grammar.guide(), Vec::new());
        for _ in 0..300 {
            let allowed = guide.allowed().expect("a set").to_vec();
            let ends = self.tokenizer.end_tokens();
            if ends.iter().any(|end| is_allowed(&allowed, *end)) {
                return Some(self.tokenizer.decode(&tokens, false));
            }
            let all = (0..self.tokenizer.vocab_size() as u32).filter(|token| is_allowed(&allowed, *token));
            let all: Vec<u32> = all.collect();
            assert!(all.iter().all(|token| !self.tokenizer.is_special(*token)), "a control token in a text");
            let token = all[random.below(all.len() as u64) as usize];
            guide.drew(token);
            tokens.push(token);
        }
        None
    }
}

#[test]
fn forms_allow_the_texts_that_look_like_them_and_no_others() {
    let world = World::new();
    let schema = json!({
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": false,
    });
    let list = "root ::= item (\", \" item)* \".\" # a list\nitem ::= [a-z]+ | \n   number\nnumber ::= [0-9]{1,3} (\"\\x2f\" [^0\\]])?";
    let cases: &[(Form, &[&str], &[&str])] = &[
        (
            Form::JsonObject,
            &["{}", r#"{"a": [1, 2.5, null, "x\n"]}"#, r#"{"a": {"b": true}}"#],
            &["", "[]", "{", r#"{"a"}"#, "{} "],
        ),
        (
            Form::JsonSchema(schema),
            &[r#"{"name": "Ada", "age": 36}"#, r#"{"name": "", "age": 0}"#],
            &["{}", r#"{"name": "Ada"}"#, r#"{"name": "Ada", "age": 151}"#, r#"{"name": 1, "age": 3}"#],
        ),
        (Form::JsonSchema(json!({"enum": ["a", 2]})), &[r#""a""#, "2"], &["a", "3"]),
        (
            Form::Regex(r"\d{3}-[a-f]+".into()),
            &["123-abc", "000-f"],
            &["12-abc", "123-", "123-xyz", "a123-a"],
        ),
        (
            Form::Choice(vec!["yes".into(), "no \"way\"".into()]),
            &["yes", "no \"way\""],
            &["no", "maybe", "yesno"],
        ),
        (
            Form::Grammar("start: \"<\" WORD \">\"\nWORD: /[a-z]+/".into()),
            &["<a>", "<word>"],
            &["<>", "word", "<Word>"],
        ),
        (Form::Grammar(list.into()), &["a.", "abc, 12, 5/x.", "777."], &["1234.", "a", "a,b.", "5/0.", "A."]),
        // Nothing is matched greedily.
        (Form::Grammar("root ::= [a-z]* \"b\"".into()), &["b", "ab", "abb"], &["a", ""]),
        (Form::Grammar("root ::= \"(\" root? \")\"".into()), &["()", "((()))"], &["(", "(()"]),
    ];
    for (form, good, bad) in cases {
        let grammar = world.compile(form);
        for text in *good {
            assert!(world.reads(grammar.as_ref(), text), "{form:?} refuses {text:?}");
        }
        for text in *bad {
            assert!(!world.reads(grammar.as_ref(), text), "{form:?} takes {text:?}");
        }
    }
}

#[test]
fn what_nothing_can_look_like_is_refused() {
    let world = World::new();
    let cases: &[(Form, &str)] = &[
        (Form::JsonSchema(json!({"type": "string", "minLength": 3, "maxLength": 2})), "minLength"),
        (Form::JsonSchema(json!({"type": "integer", "minimum": 3, "maximum": 2})), "minimum"),
        (Form::JsonSchema(json!({"type": "fruit"})), "fruit"),
        (Form::JsonSchema(json!({"$ref": "#/$defs/none"})), "none"),
        (Form::JsonSchema(json!(false)), ""),
        (Form::JsonSchema(json!(5)), ""),
        (Form::Regex("(".into()), "unclosed"),
        (Form::Choice(vec![]), "nothing to choose"),
        (Form::Grammar("start: missing".into()), "missing"),
        (Form::Grammar("root ::= missing".into()), "line 1 of the grammar: there is no rule `missing`"),
        (Form::Grammar("other ::= \"a\"".into()), "there is no rule `root`"),
        (Form::Grammar("root ::= \"a".into()), "a `\"` is missing"),
        (Form::Grammar("root ::= (\"a\"".into()), "a `)` is missing"),
        (
            Form::Grammar("root ::= \"a\"\nroot ::= \"b\"".into()),
            "line 2 of the grammar: the rule `root` is defined twice",
        ),
        (Form::Grammar("root ::= [a-z]{2,1}".into()), ""),
        (Form::Regex("x".repeat(300_000)), "bytes"),
    ];
    for (form, expected) in cases {
        let error = world.error(form);
        assert!(error.contains(expected), "{form:?}: {error}");
        assert!(error.len() < 400 && !error.contains('\n'), "{form:?}: {error}");
    }
}

#[test]
fn whatever_is_drawn_is_json_of_the_schema() {
    let world = World::new();
    let mut random = Rng(7);
    let schema = json!({
        "type": "object",
        "properties": {
            "kind": {"enum": ["a", "b"]},
            "count": {"type": "integer", "minimum": -3, "maximum": 12},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 3},
            "inner": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": false},
        },
        "required": ["kind", "count", "tags", "inner"],
        "additionalProperties": false,
    });
    let grammar = world.compile(&Form::JsonSchema(schema));
    let mut ended = 0;
    for _ in 0..30 {
        let Some(text) = world.wander(grammar.as_ref(), &mut random) else { continue };
        ended += 1;
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert!(value["kind"] == "a" || value["kind"] == "b", "{text}");
        // -0 and 3.0 are whole numbers to JSON schema.
        let count = value["count"].as_f64().expect("a number");
        assert!((-3.0..=12.0).contains(&count) && count.fract() == 0.0, "{text}");
        let tags = value["tags"].as_array().expect("an array");
        assert!(tags.len() <= 3, "{text}");
        for tag in tags {
            assert!(tag.as_str().expect("a string").chars().count() <= 4, "{text}");
        }
        assert!(value["inner"]["ok"].is_boolean(), "{text}");
    }
    assert!(ended > 25, "{ended} of 30 texts ended");
}
