//! `obol compare` as a shell sees it, over models of a few kilobytes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use crate::tiny_model;

struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        tiny_model::write(&dir.path().join("tiny.gguf"), 1, "<s>");
        tiny_model::write(&dir.path().join("other.gguf"), 2, "<s>");
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `obol compare tiny.gguf` with little to do and these arguments.
    fn compare(&self, arguments: &[&str]) -> Output {
        let quick = [
            "compare",
            "tiny.gguf",
            "--threads",
            "2",
            "--chunks",
            "2",
            "--chunk-tokens",
            "32",
            "--answer-tokens",
            "4",
            "--rounds",
            "1",
            "--requests",
            "1",
            "--prompt-tokens",
            "12",
            "--output-tokens",
            "4",
            "--kv-memory",
            "4MiB",
            "--data-dir",
            "data",
        ];
        let given = |flag: &str| arguments.contains(&flag);
        // A flag may be given once.
        let flags = quick[2..].chunks(2).filter(|pair| !given(pair[0])).flatten();
        Command::new(env!("CARGO_BIN_EXE_obol"))
            .args(&quick[..2])
            .args(flags)
            .args(arguments)
            .env_remove("OBOL_MODEL")
            .env_remove("OBOL_THREADS")
            .current_dir(self.dir.path())
            .output()
            .expect("the program runs")
    }
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).expect("the file was written")).expect("JSON")
}

/// Figures as `#`, and one space between cells.
fn masked(text: &str) -> String {
    let mut shape = String::new();
    for line in text.lines() {
        let words = line.split_whitespace().map(|word| {
            let bare = word.trim_start_matches(['+', '-']).trim_end_matches([',', ';']);
            let figure = !bare.is_empty() && bare.chars().all(|c| c.is_ascii_digit() || c == '.');
            if figure { word.replace(bare, "#").replace(['+', '-'], "") } else { word.to_owned() }
        });
        shape += &words.collect::<Vec<_>>().join(" ");
        shape.push('\n');
    }
    shape
}

/// Paths of an object's members; of a list, those of its last element.
fn keys(value: &Value, path: &str, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(members) => {
            for (name, member) in members {
                keys(member, &format!("{path}.{name}"), found);
            }
        }
        Value::Array(list) if list.last().is_some_and(Value::is_object) => {
            keys(list.last().expect("not empty"), &format!("{path}[]"), found);
        }
        _ => {
            found.insert(path.trim_start_matches('.').to_owned());
        }
    }
}

const TABLE: &str = "\
reference: file, F32 as the file has it
text: Persuasion by Jane Austen, chapters # to #, # chunks of # tokens, # positions scored

variant precision weights MiB KV B/token load s perplexity loss % KL mean KL # % top-1 same % |dp| % answers same tokens to difference
file F32 # # # # ± # - - - - - - -
file F32 # # # # ± # # ± # # # # # # of # #
other F32 # # # # ± # # ± # # # # # # of # #

variant clients output tokens/s TTFT p50 ms between p50 ms device s USD/1M output USD/1M tokens saved %
file # # # # # # # -
file # # # # # # # #
other # # # # # # # #
file # # # # # # # -
file # # # # # # # #
other # # # # # # # #

cost: # USD an hour, # of it through the KV pool, idle time not charged; medians of # round, # request a client, # tokens in and # out.
One model is loaded at a time: the order of clients alternates from round to round, that of variants
does not, so a machine that slows down shows as a difference.
";

const KEYS: &[&str] = &[
    "architecture",
    "machine.device",
    "machine.kv_memory_bytes",
    "machine.threads",
    "model",
    "rate.currency",
    "rate.device_hour",
    "rate.kv_share",
    "reference",
    "reference_statement",
    "settings.answer_tokens",
    "settings.chunk_tokens",
    "settings.chunks",
    "settings.clients",
    "settings.output_tokens",
    "settings.positions",
    "settings.prompt_tokens",
    "settings.prompts",
    "settings.requests",
    "settings.rounds",
    "text.blake3",
    "text.bytes",
    "text.name",
    "text.tokens",
    "variants[].answers.equal_tokens",
    "variants[].answers.prompts",
    "variants[].answers.same",
    "variants[].fingerprint",
    "variants[].kv_bytes_per_token",
    "variants[].kv_dtype",
    "variants[].label",
    "variants[].load_seconds",
    "variants[].precision",
    "variants[].quality.distance.kl_99",
    "variants[].quality.distance.kl_error",
    "variants[].quality.distance.kl_max",
    "variants[].quality.distance.kl_mean",
    "variants[].quality.distance.kl_median",
    "variants[].quality.distance.perplexity_loss",
    "variants[].quality.distance.perplexity_loss_error",
    "variants[].quality.distance.probability_shift",
    "variants[].quality.distance.same_top",
    "variants[].quality.perplexity",
    "variants[].quality.perplexity_error",
    "variants[].quant",
    "variants[].speed[].between_tokens_p50",
    "variants[].speed[].clients",
    "variants[].speed[].cost_per_million_output",
    "variants[].speed[].cost_per_million_tokens",
    "variants[].speed[].cost_saved",
    "variants[].speed[].device_seconds.decode",
    "variants[].speed[].device_seconds.prefill",
    "variants[].speed[].output_tokens",
    "variants[].speed[].output_tokens_per_second",
    "variants[].speed[].prompt_tokens",
    "variants[].speed[].requests",
    "variants[].speed[].ttft_p50",
    "variants[].weight_bytes",
    "version",
    "vocab_size",
];

#[test]
fn variants_are_measured_and_set_beside_the_reference() {
    let world = World::new();
    let files = ["--json", "all.json", "--svg", "all.svg"];
    let output =
        world.compare(&[&["--variants", "file,file,other.gguf", "--clients", "3,1"], &files[..]].concat());
    assert!(output.status.success(), "{}", said(&output));
    let table = out(&output);
    let (first, rest) = table.split_once('\n').expect("lines");
    assert!(first.starts_with("Tiny (llama) on "), "{first}");
    assert_eq!(masked(rest), TABLE);
    assert!(said(&output).contains("other: perplexity, 2 chunks of 32 tokens"), "{}", said(&output));

    let json = json(&world.path("all.json"));
    let mut found = BTreeSet::new();
    keys(&json, "", &mut found);
    assert_eq!(found.iter().map(String::as_str).collect::<Vec<_>>(), KEYS);
    let variants = json["variants"].as_array().expect("a list");
    let [reference, same, other] = &variants[..] else { panic!("three variants: {json}") };
    let distance =
        |variant: &Value, name: &str| variant["quality"]["distance"][name].as_f64().expect("a number");
    assert!(reference["quality"]["distance"].is_null() && reference["answers"].is_null());
    // The same weights are the same model, bit for bit.
    assert_eq!(same["quality"]["perplexity"], reference["quality"]["perplexity"]);
    assert!(distance(same, "kl_max") <= 0.0 && distance(same, "same_top") >= 1.0, "{same}");
    assert_eq!((&same["answers"]["same"], &same["answers"]["prompts"]), (&16.into(), &16.into()));
    assert!(distance(other, "kl_mean") > 0.01 && distance(other, "same_top") < 1.0, "{other}");
    assert!(other["answers"]["same"].as_u64() < Some(16));
    assert_eq!(json["settings"]["positions"], 2 * (32 - 1 - 16));
    let speed = &other["speed"][1];
    assert_eq!((&speed["clients"], &speed["requests"]), (&3.into(), &3.into()));
    assert_eq!((&speed["prompt_tokens"], &speed["output_tokens"]), (&36.into(), &12.into()));
    assert!(speed["cost_per_million_tokens"].as_f64() > Some(0.0), "{speed}");

    let svg = std::fs::read_to_string(world.path("all.svg")).expect("the picture");
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>") && svg.contains("other"));
    // A calibration, and no ledger and nothing left of the reference's rows.
    let left: Vec<_> = std::fs::read_dir(world.path("data"))
        .expect("the data directory")
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    assert_eq!(left, ["calibration"]);
}

#[test]
fn coarser_numbers_are_further_away() {
    let world = World::new();
    let output =
        world.compare(&["--only", "quality", "--variants", "f32,file,int8,int4", "--format", "json"]);
    assert!(output.status.success(), "{}", said(&output));
    let json: Value = serde_json::from_str(&out(&output)).expect("JSON");
    assert_eq!(json["reference_statement"], "reference: f32, converted from F32");
    let of =
        |index: usize, name: &str| json["variants"][index]["quality"]["distance"][name].as_f64().expect(name);
    let [file, int8, int4] = [1, 2, 3].map(|index| of(index, "kl_mean"));
    assert!(file < int8 && int8 < int4, "{file} {int8} {int4}");
    let bytes = |index: usize| json["variants"][index]["weight_bytes"].as_u64().expect("a number");
    assert!(bytes(3) < bytes(2) && bytes(2) < bytes(1), "{json}");
}

#[test]
fn a_limit_that_is_exceeded_is_an_exit_code() {
    let world = World::new();
    let check = |flags: &[&str], code: i32, parts: &[&str]| {
        let output = world.compare(&[&["--only", "quality", "--format", "json"], flags].concat());
        assert_eq!(output.status.code(), Some(code), "{flags:?}: {}", said(&output));
        let _printed: Value = serde_json::from_str(&out(&output)).expect("printed before the verdict");
        for part in parts {
            assert!(said(&output).contains(part), "{flags:?}: {}", said(&output));
        }
    };
    let same = ["--variants", "file,file"];
    check(&[&same[..], &["--max-perplexity-loss", "0%", "--max-kl", "0"]].concat(), 0, &[]);
    let other = ["--variants", "other.gguf,file,other.gguf"];
    let kl = ["file has a mean KL divergence of", "more than the 0.0001 allowed"];
    check(&[&other[..], &["--max-kl", "1e-4"]].concat(), 1, &kl);
    check(&[&other[..], &["--max-kl", "1e9", "--max-perplexity-loss", "1000000%"]].concat(), 0, &[]);
    // One of the two is worse than the other.
    let worse = |variants: &str| {
        let flags = ["--only", "quality", "--variants", variants, "--max-perplexity-loss", "0%"];
        let output = world.compare(&flags);
        if !output.status.success() {
            assert!(said(&output).contains("% of perplexity"), "{}", said(&output));
        }
        output.status.code()
    };
    let codes = BTreeSet::from([worse("file,other.gguf"), worse("other.gguf,file")]);
    assert_eq!(codes, BTreeSet::from([Some(0), Some(1)]));
}

#[test]
fn what_cannot_be_compared_is_said() {
    let world = World::new();
    std::fs::write(world.path("short.txt"), "Only a few bytes.").expect("a file");
    std::fs::write(world.path("none.txt"), "\n \n").expect("a file");
    std::fs::write(world.path("broken.txt"), b"\xff\xfe").expect("a file");
    tiny_model::write(&world.path("foreign.gguf"), 1, "<begin>");
    let check = |flags: &[&str], parts: &[&str]| {
        let output = world.compare(flags);
        let said = said(&output);
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {said}");
        assert!(!said.contains("panicked"), "{said}");
        for part in parts {
            assert!(said.contains(part), "{flags:?} should say {part}: {said}");
        }
    };
    check(&["--variants", "file,int3"], &["int3", "write file, f32, f16, bf16, int8 or int4"]);
    check(&["--variants", "file,none.gguf"], &["none.gguf"]);
    check(&["--variants", "tiny.gguf@q4"], &["choose file, f32, f16, bf16, int8 or int4"]);
    check(&["--variants", "file+kv-q8"], &["choose f16, bf16, f32 or int8"]);
    check(
        &["--variants", "file,foreign.gguf"],
        &["foreign has another vocabulary than file: token 256", "<begin>"],
    );
    let file = ["--variants", "file"];
    let short = [&file[..], &["--text", "short.txt"]].concat();
    check(&short, &["short.txt has 18 tokens", "needs 32"]);
    check(
        &[&file[..], &["--only", "speed", "--text", "short.txt", "--prompt-tokens", "40"]].concat(),
        &["needs 40"],
    );
    check(&[&file[..], &["--text", "missing.txt"]].concat(), &["missing.txt"]);
    check(&[&file[..], &["--text", "broken.txt"]].concat(), &["broken.txt"]);
    check(&[&file[..], &["--prompts", "none.txt"]].concat(), &["has 0 prompts"]);
    check(
        &[&file[..], &["--chunk-tokens", "257"]].concat(),
        &["257 is more than the model's context of 256"],
    );
    check(&[&file[..], &["--chunk-tokens", "3"]].concat(), &["from 4 on"]);
    check(&[&file[..], &["--output-tokens", "250"]].concat(), &["more than the context of 256"]);
    check(&[&file[..], &["--answer-tokens", "250"]].concat(), &["do not fit the context of 256"]);
    check(&[&file[..], &["--clients", "0"]].concat(), &["from 1 to 1024"]);
    check(&[&file[..], &["--max-perplexity-loss", "abc"]].concat(), &["`abc` is no percentage", "2%"]);
    check(&[&file[..], &["--max-perplexity-loss", "2"]].concat(), &["2%"]);
    check(&[&file[..], &["--max-kl=-1"]].concat(), &["--max-kl"]);
    check(&[&file[..], &["--only", "speed", "--max-kl", "1"]].concat(), &["--only"]);
    check(&[&file[..], &["--max-kl", "1"]].concat(), &["--variants f32,int4"]);
    check(&[&file[..], &["--json", "no/such/place.json"]].concat(), &["no/such/place.json"]);
    assert!(!world.path("data").join("ledger.db").exists());
}
