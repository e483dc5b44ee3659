//! Tokenizers and chat templates against other implementations: llama.cpp's vectors, and real templates.
//! Needs what `scripts/test` fetches.

use std::path::{Path, PathBuf};
use std::time::Instant;

use obol_models::chat_template::{ChatTemplate, TemplateError, TemplateOptions};
use obol_models::gguf::GgufFile;
use obol_models::tokenizer::{Special, Tokenizer};
use serde_json::{Value, json};

const PLAIN: Special = Special { parse: false, add: false };

fn path_from(variable: &str) -> PathBuf {
    std::env::var_os(variable)
        .map(PathBuf::from)
        .unwrap_or_else(|| panic!("{variable} is not set: run this test through scripts/test, which sets it"))
}

fn test_model() -> GgufFile {
    GgufFile::open(&path_from("OBOL_TEST_MODEL")).expect("the test model opens")
}

fn vocabs() -> PathBuf {
    path_from("OBOL_TEST_DATA").join("vocabs")
}

fn vocab(name: &str) -> Tokenizer {
    let path = vocabs().join(format!("ggml-vocab-{name}.gguf"));
    assert!(path.exists(), "{} is missing: scripts/fetch-test-vocabs fetches it", path.display());
    Tokenizer::from_gguf(&GgufFile::open(&path).expect("the vocabulary opens"))
        .expect("the vocabulary is supported")
}

fn check_vectors(name: &str, texts: &str) {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vocabs");
    let read = |file: String| std::fs::read_to_string(fixtures.join(file)).expect("the fixture is committed");
    let (texts, ids) = (read(texts.to_owned()), read(format!("{name}.ids")));
    let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
    // The line of the last, empty text may be missing its newline.
    let ids: Vec<Vec<u32>> = ids
        .split('\n')
        .map(|line| line.split_whitespace().map(|id| id.parse().expect("a number")).collect())
        .collect();
    let tokenizer = vocab(name);
    assert!(
        texts.len() >= 40 && ids.len() >= texts.len(),
        "{} texts, {} lines of ids",
        texts.len(),
        ids.len()
    );
    for (text, ids) in texts.iter().zip(&ids) {
        let found = tokenizer.encode(text, PLAIN);
        assert_eq!(&found, ids, "{name}: {text:?}");
        assert_eq!(tokenizer.decode(&found, false), **text, "{name}");
    }
}

#[test]
fn ids_equal_those_of_llama_cpp() {
    for name in ["gpt-2", "llama-bpe", "qwen2", "starcoder", "falcon", "mpt", "refact", "command-r"] {
        check_vectors(name, "texts.txt");
    }
    for name in ["llama-spm", "phi-3", "deepseek-llm", "deepseek-coder"] {
        check_vectors(name, "texts.txt");
    }
    check_vectors("gemma-4", "texts-gemma-4.txt");
    check_vectors("qwen35", "texts-qwen35.txt");
}

#[test]
fn ids_of_nasty_texts_equal_those_of_llama_cpp() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vocabs/nasty.json");
    let nasty = std::fs::read_to_string(path).expect("the fixture is committed");
    let nasty: Value = serde_json::from_str(&nasty).expect("JSON");
    let texts = nasty["texts"].as_array().expect("a list");
    let vocabularies = nasty["ids"].as_object().expect("an object");
    assert!(vocabularies.len() >= 17);
    for (name, ids) in vocabularies {
        let tokenizer = vocab(name);
        for (text, ids) in texts.iter().zip(ids.as_array().expect("a list")) {
            let found = tokenizer.encode(text.as_str().expect("a text"), PLAIN);
            assert_eq!(json!(found), *ids, "{name}: {text}");
        }
    }
}

#[test]
fn other_kinds_are_refused_with_those_there_are() {
    let file = GgufFile::open(&vocabs().join("ggml-vocab-bert-bge.gguf")).expect("opens");
    let error = Tokenizer::from_gguf(&file).expect_err("refused").to_string();
    assert!(error.contains("`bert`") && error.contains("gpt2") && error.contains("llama"), "{error}");
}

/// Phi-3's control tokens swallow the white space to their right, as its own tokenizer says.
#[test]
fn phi_3s_control_tokens_strip() {
    let tokenizer = vocab("phi-3");
    let parse = Special { parse: true, add: false };
    let ids = tokenizer.encode("<|user|>\n hi<|end|>\n<|assistant|>\n", parse);
    assert_eq!(ids, tokenizer.encode("<|user|>hi<|end|><|assistant|>", parse));
    assert_eq!(tokenizer.decode(&ids, false), "<|user|>hi<|end|><|assistant|>");
    assert_eq!(tokenizer.decode(&tokenizer.encode("<s> hi", parse), false), "<s> hi");
}

#[test]
fn a_long_text_is_no_attack_on_scores() {
    let tokenizer = vocab("llama-spm");
    for text in ["a".repeat(1 << 20), "ab ".repeat(1 << 18), "\u{2028}".repeat(1 << 18)] {
        let started = Instant::now();
        let ids = tokenizer.encode(&text, PLAIN);
        println!("{} bytes, {} tokens in {:?}", text.len(), ids.len(), started.elapsed());
        assert!(started.elapsed().as_secs() < 20, "took {:?}", started.elapsed());
    }
}

#[test]
fn the_default_model_is_tokenised_without_a_space_before() {
    let tokenizer = Tokenizer::from_gguf(&test_model()).expect("supported");
    assert_eq!(tokenizer.encode("Hello world", PLAIN), [19556, 905]);
    let ids = [33, 34, 35, 36, 37, 29856, 79, 6299, 8866, 1792];
    assert_eq!(tokenizer.encode("12345 foo_bar\n\n  x", PLAIN), ids);
    assert_eq!(tokenizer.decode(&ids, false), "12345 foo_bar\n\n  x");
    assert_eq!(tokenizer.encode("Hello world", Special { parse: true, add: true }), [19556, 905]);
    assert_eq!(
        (tokenizer.bos(), tokenizer.end_tokens(), tokenizer.vocab_size()),
        (Some(1), &[0, 2][..], 49152)
    );
}

#[test]
fn the_default_models_template_gives_its_golden_prompt() {
    let file = test_model();
    let source = file.string("tokenizer.chat_template").expect("the file has a template");
    let template = ChatTemplate::new(source, "<|im_start|>", "<|im_end|>").expect("parses");
    let options = || TemplateOptions { add_generation_prompt: true, ..TemplateOptions::default() };
    let text = template.render(&json!([{ "role": "user", "content": "Hi" }]), options()).expect("renders");
    let golden = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
                  <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(text, golden);
    let messages = json!([{ "role": "system", "content": "S" }, { "role": "user", "content": "U" },
        { "role": "assistant", "content": "A" }]);
    let text = template.render(&messages, TemplateOptions::default()).expect("renders");
    let golden = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n";
    assert_eq!(text, golden);
}

fn render(name: &str, conversation: &Value) -> Result<String, TemplateError> {
    let path = vocabs().join("templates").join(format!("{name}.jinja"));
    let source = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    // Names that some of them need, as the script that made the renderings gives them.
    let extra = json!({ "functions": "[]", "datetime": "now", "date_string": "1 Jan 2026" });
    let options = TemplateOptions {
        add_generation_prompt: true,
        tools: conversation.get("tools").cloned(),
        extra: extra.as_object().expect("an object").clone(),
    };
    ChatTemplate::new(&source, "<s>", "</s>")?.render(&conversation["messages"], options)
}

/// Against Jinja2 set up as transformers does it; `make_template_goldens.py` made the renderings.
/// OBOL_TEMPLATES names a longer file of them.
#[test]
fn templates_render_as_in_python() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/templates.json");
    let path = std::env::var_os("OBOL_TEMPLATES").map_or(fixture, PathBuf::from);
    let golden = std::fs::read_to_string(&path).expect("the fixture is there");
    let golden: Value = serde_json::from_str(&golden).expect("JSON");
    let conversations = golden["conversations"].as_array().expect("a list");
    let mut failed = Vec::new();
    for (name, expected) in golden["templates"].as_object().expect("an object") {
        for (at, (conversation, expected)) in
            conversations.iter().zip(expected.as_array().unwrap()).enumerate()
        {
            match (render(name, conversation), expected.as_str()) {
                (Ok(found), Some(expected)) if found == expected => {}
                (Err(TemplateError::Refused(_)), None) if expected.is_null() => {}
                (_, None) if *expected == json!(false) => {}
                (found, expected) => failed.push(format!("{name} {at}:\n{found:?}\n{expected:?}")),
            }
        }
    }
    assert!(failed.is_empty(), "{} differ:\n{}", failed.len(), failed.join("\n"));
}

/// Every template of the collection parses, and a plain conversation comes out in order or is refused in words.
#[test]
fn real_templates_render_a_plain_conversation() {
    let dir = vocabs().join("templates");
    let files =
        std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}; run scripts/test", dir.display()));
    let turns = ["be-brief", "question-1", "answer-1", "question-2"];
    let roles = ["system", "user", "assistant", "user"];
    let message = |(role, content): (&str, &str)| json!({ "role": role, "content": content });
    let messages: Vec<Value> = roles.into_iter().zip(turns).map(message).collect();
    let (mut rendered, mut refused, mut failed) = (0, 0, Vec::new());
    for path in files.map(|file| file.expect("readable").path()) {
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        // What takes no system message is asked again without one.
        for first in [0, 1] {
            match render(&name, &json!({ "messages": messages[first..] })) {
                Ok(text) => {
                    // Some put the system's words into the last turn.
                    let places: Vec<_> = turns[1..].iter().map(|part| text.find(part)).collect();
                    assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{name}: {text}");
                    assert!(first == 1 || text.contains(turns[0]), "{name}: {text}");
                    rendered += 1;
                    break;
                }
                Err(TemplateError::Refused(_)) => refused += 1,
                Err(error) => failed.push(format!("{name}: {error}")),
            }
        }
    }
    println!("{rendered} rendered, {refused} refusals");
    assert!(failed.is_empty(), "{rendered} rendered, but:\n{}", failed.join("\n"));
    assert!(rendered >= 70, "only {rendered}");
}

/// The prompt of 8,192 tokens that fills the default model's context.
#[test]
fn encoding_a_full_context_takes_milliseconds() {
    let tokenizer = Tokenizer::from_gguf(&test_model()).expect("supported");
    let text =
        "The quick brown fox (born in 1987) doesn't jump over lazy dogs; it walks around them.\n".repeat(600);
    let started = Instant::now();
    let ids = tokenizer.encode(&text, PLAIN);
    let took = started.elapsed();
    println!("{} tokens, {} bytes in {took:?}", ids.len(), text.len());
    assert!(ids.len() > 8192);
    assert!(took.as_millis() < 200, "{} tokens took {took:?}", ids.len());
    assert_eq!(tokenizer.decode(&ids, false), text);
}
