//! `obol bench` in process: over the fake model, whose counts are known, and as a shell sees it, over a model
//! of a few kilobytes. Nothing here looks at a time.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use obol::bench::{
    Arrivals, Endpoint, EngineSetup, Facts, Kind, Load, Plan, Point, Questions, Report, Site, Standing,
    Started, Subject, Workload, bench,
};
use obol::clock::{Clock, SystemClock};
use obol::config::{Speculative, Weights};
use obol::engine::{EngineConfig, EngineHandle, Parts};
use obol::ledger::RateCard;
use obol::measure::MeasureError;
use obol::measure::asking::Running;
use obol::measure::progress::Progress;
use obol::meter::calibration::Calibration;
use obol::meter::partition::Partition;
use obol::meter::share::Coefficients;
use obol_models::KvDtype;
use obol_models::batch::CausalLm;
use obol_models::fake::FakeModel;
use obol_models::quant::Quant;
use serde_json::Value;

use crate::{http_tokens, tiny_model};

const CONTEXT: usize = 2048;

/// Engines over fake models. The n-th engine (from 0) may be told to fail.
#[derive(Default)]
struct Fakes {
    started: usize,
    fail_at: Option<u64>,
    panic_at: Option<u64>,
    /// These do not start at all.
    broken: Option<Quant>,
}

impl Site for Fakes {
    fn start(&mut self, setup: &EngineSetup) -> Result<Started, MeasureError> {
        self.started += 1;
        if self.broken == Some(setup.quant) {
            return Err(MeasureError::Failed("no memory for the weights".into()));
        }
        let tokenizer = http_tokens::tokenizer();
        let mut model = FakeModel::new(tokenizer.vocab_size(), CONTEXT, 7);
        if let Some(forward) = self.fail_at.take() {
            model = model.fail_at(forward);
        }
        if let Some(forward) = self.panic_at.take() {
            model = model.panic_at(forward);
        }
        let (blocks, block_size) = (1024, 16);
        model.allocate_kv(blocks, block_size).expect("a small pool");
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::start());
        let (sender, reports) = mpsc::channel();
        let engine = EngineHandle::start(Parts {
            encoder: None,
            config: EngineConfig {
                blocks,
                block_size,
                bytes_per_block: model.kv_bytes_per_token() * block_size as u64,
                max_model_len: CONTEXT,
                max_sequences: setup.max_sequences,
                step_tokens: setup.step_tokens,
                queue_depth: 4,
                prefix_caching: setup.prefix_caching,
                speculative: Speculative::Off,
                weights: Some(Weights::default()),
                end_tokens: Vec::new(),
            },
            model: Box::new(model),
            calibration: Calibration::uniform(Coefficients {
                step: 1000,
                token: 10,
                attention: 1,
                logits: 5,
            }),
            clock,
            partition: Partition::default(),
            energy: None,
            reports: sender,
        });
        Ok(Started {
            running: Running { engine, reports },
            tokenizer: Arc::new(tokenizer),
            template: Some(http_tokens::template()),
            facts: Facts {
                model: "Fake".into(),
                architecture: "fake".into(),
                precision: "none".into(),
                fingerprint: "f".into(),
                weight_bytes: 1,
                load: Duration::ZERO,
            },
        })
    }
}

fn engine(name: &str, quant: Quant, prefix_caching: bool) -> Subject {
    let setup = EngineSetup {
        quant,
        kv_dtype: KvDtype::default(),
        step_tokens: 64,
        max_sequences: 16,
        prefix_caching,
    };
    Subject { name: name.into(), kind: Kind::Engine(setup), peer: false }
}

fn plan(loads: Vec<Load>) -> Plan {
    Plan {
        loads,
        workload: Workload {
            questions: Questions::Words(6),
            shared_prefix_words: 0,
            turns: 1,
            output_tokens: 5,
            seed: 1,
        },
        requests: 2,
        num_prompts: 7,
        rounds: 2,
        warmup: 1,
        endpoint: Endpoint::Completions,
        ignore_eos: true,
        timeout: Duration::from_secs(60),
        rate: RateCard::parse("1", "0.2", "USD", None).expect("a rate card"),
        threads: 1,
        machine: "a test".into(),
        cores: 1,
        command: vec!["obol".into(), "bench".into()],
    }
}

fn closed(concurrency: usize) -> Load {
    Load::Closed { concurrency }
}

fn run(subjects: Vec<Subject>, plan: Plan, site: &mut Fakes) -> Report {
    bench(subjects, plan, site, &Progress::silent()).unwrap_or_else(|error| panic!("{error}"))
}

fn one(plan: Plan) -> Report {
    run(vec![engine("one", Quant::File, true)], plan, &mut Fakes::default())
}

/// A count of a point.
fn count(point: &Point, name: &str) -> u64 {
    point.figures.get(name).unwrap_or_else(|| panic!("{name} is not known")) as u64
}

#[test]
fn every_request_is_counted_once_in_closed_and_in_open_loops() {
    let open = Arrivals { rate: 500.0, burstiness: 1.0, max_concurrency: Some(2) };
    for (load, requests, in_flight_max) in [(closed(1), 4, 1), (closed(3), 12, 3), (Load::Open(open), 14, 2)]
    {
        let report = one(plan(vec![load]));
        let point = &report.points[0];
        assert_eq!((count(point, "completed"), report.failed()), (requests, 0), "{load}");
        assert_eq!(count(point, "total_output_tokens"), 5 * requests);
        assert!(count(point, "max_concurrent_requests") <= in_flight_max, "{load}");
        assert_eq!(point.rounds.len(), 2);
        // Prompts share nothing, and each of six words has a letter at least.
        assert_eq!(count(point, "prefix_cache_hit_tokens"), 0);
        assert!(count(point, "total_input_tokens") >= 11 * requests);
        for name in ["cost_per_million_tokens", "device_seconds", "output_throughput", "median_ttft_ms"] {
            assert!(point.figures.get(name).is_some_and(|figure| figure > 0.0), "{name}");
        }
        assert!(report.warnings().is_empty(), "{:?}", report.warnings());
    }
}

#[test]
fn shared_words_and_conversations_hit_the_prefix_cache_unless_it_is_off() {
    let shared = |workload: Workload| Workload { shared_prefix_words: 40, ..workload };
    let turns = |workload: Workload| Workload { turns: 3, ..workload };
    for (name, change) in [("shared", &shared as &dyn Fn(Workload) -> Workload), ("turns", &turns)] {
        let subjects = vec![engine("on", Quant::File, true), engine("off", Quant::File, false)];
        let mut plan = plan(vec![closed(1)]);
        plan.workload = change(plan.workload);
        let (requests, report) = (4 * plan.workload.turns as u64, run(subjects, plan, &mut Fakes::default()));
        let [on, off] = [0, 1].map(|index| count(&report.points[index], "prefix_cache_hit_tokens"));
        assert!(on > 0, "{name}: {on}");
        assert_eq!(off, 0, "{name}");
        let asked = [0, 1].map(|index| count(&report.points[index], "total_input_tokens"));
        assert_eq!(asked[0], asked[1], "{name}: both are asked the same");
        assert_eq!(count(&report.points[0], "completed"), requests, "{name}");
    }
}

#[test]
fn prompts_of_tokens_are_exact_and_chat_goes_through_the_template() {
    let mut tokens = plan(vec![closed(2)]);
    tokens.workload.questions = Questions::Tokens(33);
    assert_eq!(count(&one(tokens).points[0], "total_input_tokens"), 33 * 8);
    let dataset = |endpoint| {
        let mut plan = plan(vec![closed(1)]);
        plan.workload.questions = Questions::Dataset { name: "d".into(), prompts: vec!["abcd".into()] };
        plan.endpoint = endpoint;
        count(&one(plan).points[0], "total_input_tokens")
    };
    assert_eq!(dataset(Endpoint::Completions), 4 * 4);
    // Three control tokens, `user`, `assistant` and three line ends around it.
    assert_eq!(dataset(Endpoint::Chat), (4 + 3 + 4 + 9 + 3) * 4);
}

#[test]
fn what_fails_is_counted_and_told_and_everything_else_is_measured() {
    // Past the warm-up's steps, in the middle of the first load.
    let mut site = Fakes { fail_at: Some(20), ..Fakes::default() };
    let subjects = vec![engine("one", Quant::File, true), engine("other", Quant::Int8, true)];
    let report = run(subjects, plan(vec![closed(1), closed(3)]), &mut site);
    let all: u64 = report.points.iter().map(|point| count(point, "completed") + count(point, "failed")).sum();
    assert_eq!(all, 2 * 2 * (2 + 6));
    assert!(report.failed() > 0);
    let said: BTreeSet<&String> = report.points.iter().flat_map(|point| point.failures.keys()).collect();
    assert!(said.iter().all(|said| said.contains("the engine failed")), "{said:?}");
    assert!(report.to_table().contains(" x the engine failed; the log says why"), "{}", report.to_table());

    // An engine that cannot be had is its points' failure, for the first one is measured already.
    let mut site = Fakes { broken: Some(Quant::Int8), ..Fakes::default() };
    let subjects = vec![engine("one", Quant::File, true), engine("other", Quant::Int8, true)];
    let report = run(subjects, plan(vec![closed(1)]), &mut site);
    assert_eq!((count(&report.points[0], "completed"), report.failed()), (4, 4));
    assert_eq!([count(&report.points[1], "completed"), count(&report.points[1], "failed")], [0, 4]);
    assert_eq!(report.standings(), [Standing::Best, Standing::Unknown]);
    assert!(report.points[1].failures.keys().all(|said| said.contains("no memory for the weights")));
}

#[test]
fn a_panic_in_a_step_fails_its_requests_and_the_load_goes_on() {
    let mut site = Fakes { panic_at: Some(9), ..Fakes::default() };
    let report = run(vec![engine("one", Quant::File, true)], plan(vec![closed(2)]), &mut site);
    let point = &report.points[0];
    assert_eq!((site.started, point.rounds.len()), (1, 2));
    assert_eq!(count(point, "completed") + count(point, "failed"), 8);
    assert!((1..=2).contains(&report.failed()), "{:?}", point.failures);
}

#[test]
fn what_cannot_be_measured_at_all_is_told_first() {
    let says = |plan: Plan, site: &mut Fakes, part: &str| {
        let subjects = vec![engine("one", Quant::File, true)];
        let error = bench(subjects, plan, site, &Progress::silent()).err().expect("no result");
        assert!(error.to_string().contains(part), "{error}");
    };
    let mut long = plan(vec![closed(1)]);
    long.workload.output_tokens = CONTEXT;
    says(long, &mut Fakes::default(), "do not fit the context of 2048");
    let mut site = Fakes { broken: Some(Quant::File), ..Fakes::default() };
    says(plan(vec![closed(1)]), &mut site, "no memory for the weights");
}

#[test]
fn a_full_queue_is_a_failure_and_not_a_wait() {
    let mut plan = plan(vec![closed(64)]);
    (plan.requests, plan.rounds) = (1, 1);
    plan.workload.output_tokens = 40;
    let report = one(plan);
    let point = &report.points[0];
    assert_eq!(count(point, "completed") + count(point, "failed"), 64);
    assert!(point.failures.keys().any(|said| said.contains("queue is full")), "{:?}", point.failures);
}

// ---------------------------------------------------------------- the command

struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        tiny_model::write(&dir.path().join("tiny.gguf"), 1, "<s>");
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `obol bench MODEL` with little to do and these arguments.
    fn bench(&self, model: &str, arguments: &[&str]) -> Output {
        let quick =
            ["--rounds", "1", "--warmup", "1", "--kv-memory", "4MiB", "--data-dir", "data", "--threads", "2"];
        let sizes = ["--input-words", "5", "--output-tokens", "4"];
        let given = |flag: &str| arguments.contains(&flag);
        let flags = quick.chunks(2).chain(sizes.chunks(2)).filter(|pair| {
            // A flag may be given once, and some instead of others.
            let instead = pair[0] == "--input-words" && (given("--dataset") || given("--input-tokens"));
            !given(pair[0]) && !instead
        });
        Command::new(env!("CARGO_BIN_EXE_obol"))
            .arg("bench")
            .args(Some(model).filter(|model| !model.is_empty()))
            .args(flags.flatten())
            .args(arguments)
            .env_remove("OBOL_MODEL")
            .env_remove("OBOL_THREADS")
            .env_remove("OBOL_BENCH_API_KEY")
            .current_dir(self.dir.path())
            .output()
            .expect("the program runs")
    }

    fn json(&self, name: &str) -> Value {
        let text = std::fs::read_to_string(self.path(name)).expect("the file was written");
        serde_json::from_str(&text).expect("JSON")
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The names that `vllm bench serve` gives its figures, and ours.
const FIGURES: &[&str] = &[
    "completed",
    "cost",
    "cost_per_million_output_tokens",
    "cost_per_million_tokens",
    "device_seconds",
    "duration",
    "failed",
    "load_cpu_of_machine",
    "load_cpu_of_one_core",
    "max_concurrent_requests",
    "mean_e2el_ms",
    "mean_itl_ms",
    "mean_send_delay_ms",
    "mean_tpot_ms",
    "mean_ttft_ms",
    "median_e2el_ms",
    "median_itl_ms",
    "median_send_delay_ms",
    "median_tpot_ms",
    "median_ttft_ms",
    "output_throughput",
    "p99_e2el_ms",
    "p99_itl_ms",
    "p99_send_delay_ms",
    "p99_tpot_ms",
    "p99_ttft_ms",
    "prefix_cache_hit_tokens",
    "request_throughput",
    "std_e2el_ms",
    "std_itl_ms",
    "std_send_delay_ms",
    "std_tpot_ms",
    "std_ttft_ms",
    "total_input_tokens",
    "total_output_tokens",
    "total_token_throughput",
];

#[test]
fn a_sweep_is_written_whole_and_repeats_by_its_own_command() {
    let world = World::new();
    let sweep =
        ["--concurrency", "2,1", "--requests", "1", "--quant", "file,int8", "--step-tokens", "64,128"];
    let files = ["--json", "all.json", "--svg", "all.svg"];
    let output = world.bench("tiny.gguf", &[&sweep[..], &files[..]].concat());
    assert!(output.status.success(), "{}", said(&output));
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        table.contains("int8 step 128: Tiny (llama), int8, 128 tokens and 64 sequences a step"),
        "{table}"
    );
    let json = world.json("all.json");
    let subjects: Vec<&str> =
        json["subjects"].as_array().expect("a list").iter().filter_map(|s| s["name"].as_str()).collect();
    assert_eq!(subjects, ["file step 64", "file step 128", "int8 step 64", "int8 step 128"]);
    let points = json["points"].as_array().expect("a list");
    assert_eq!(points.len(), 8);
    for point in points {
        let figures: Vec<&str> =
            point["figures"].as_object().expect("figures").keys().map(String::as_str).collect();
        assert_eq!(figures, FIGURES);
        assert_eq!(point["figures"]["completed"], point["load"]["concurrency"]);
        assert_eq!(point["failures"], serde_json::json!([]));
        assert_eq!(point["pareto"]["best"], point["pareto"]["dominated_by"].is_null());
    }
    assert!(points.iter().any(|point| point["pareto"]["best"] == true));
    let svg = std::fs::read_to_string(world.path("all.svg")).expect("the picture");
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>") && svg.contains("int8 step 128"));
    // The command in the result is what a shell takes.
    let command = json["command"].as_str().expect("a command");
    let status =
        Command::new("sh").args(["-c", command]).current_dir(world.dir.path()).output().expect("a shell");
    assert!(status.status.success(), "{command}: {}", said(&status));
    let again = world.json("all.json");
    for name in ["subject", "load", "conversations"] {
        assert_eq!(again["points"][3][name], points[3][name]);
    }
    assert_eq!(
        again["points"][3]["figures"]["total_input_tokens"],
        points[3]["figures"]["total_input_tokens"]
    );
    assert!(!world.path("data").join("ledger.db").exists());
}

#[test]
fn a_gate_passes_equal_figures_and_says_what_is_worse() {
    let world = World::new();
    let load = ["--concurrency", "1", "--requests", "2"];
    let first = world.bench("tiny.gguf", &[&load[..], &["--json", "before.json"]].concat());
    assert!(first.status.success(), "{}", said(&first));
    let before = world.json("before.json");
    let gate = |change: &dyn Fn(&mut Value), flags: &[&str]| {
        let mut earlier = before.clone();
        change(&mut earlier);
        std::fs::write(world.path("earlier.json"), earlier.to_string()).expect("written");
        let output = world.bench("tiny.gguf", &[&load[..], &["--gate", "earlier.json"], flags].concat());
        (output.status.code(), said(&output))
    };
    // Far from any figure of a machine: these tests look at no time.
    let figure = |name: &'static str, value: f64| {
        move |result: &mut Value| {
            for (easy, limit) in [
                ("output_throughput", 1e-9),
                ("median_ttft_ms", 1e9),
                ("median_itl_ms", 1e9),
                ("cost_per_million_tokens", 1e9),
            ] {
                result["points"][0]["figures"][easy] = limit.into();
            }
            if !name.is_empty() {
                result["points"][0]["figures"][name] = value.into();
            }
        }
    };
    let (code, said) = gate(&figure("", 0.0), &[]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("1 point compared, 0 figures worse"), "{said}");
    for (name, value) in
        [("output_throughput", 1e9), ("median_ttft_ms", 1e-9), ("cost_per_million_tokens", 1e-9)]
    {
        let (code, said) = gate(&figure(name, value), &["--gate-tolerance", "50%"]);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains(&format!("1 client, obol: {name} is ")), "{said}");
    }
    let elsewhere = |result: &mut Value| {
        figure("", 0.0)(result);
        result["machine"]["device"] = "another".into();
    };
    let (code, said) = gate(&elsewhere, &[]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("another machine") && said.contains("--gate-any-machine"), "{said}");
    assert_eq!(gate(&elsewhere, &["--gate-any-machine"]).0, Some(0));
    let other = |result: &mut Value| {
        figure("", 0.0)(result);
        result["subjects"][0]["model"]["fingerprint"] = "another".into();
    };
    let (code, said) = gate(&other, &[]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("another model"), "{said}");
}

#[test]
fn what_cannot_be_measured_is_said() {
    let world = World::new();
    std::fs::write(world.path("empty.jsonl"), "\n").expect("written");
    std::fs::write(world.path("wrong.jsonl"), "{\"prompt\": \"a\"}\n{\"text\": \"b\"}\n").expect("written");
    std::fs::write(world.path("blank.key"), " \n").expect("written");
    let check = |flags: &[&str], parts: &[&str]| {
        let model = if flags.contains(&"--url") { "" } else { "tiny.gguf" };
        let output = world.bench(model, flags);
        let said = said(&output);
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {said}");
        assert!(!said.contains("panicked"), "{said}");
        for part in parts {
            assert!(said.contains(part), "{flags:?} should say {part}: {said}");
        }
    };
    check(&["--concurrency", "0"], &["from 1 to 1024"]);
    check(&["--concurrency", "9999"], &["from 1 to 1024"]);
    check(&["--request-rate", "0"], &["0.001 to 10000"]);
    check(&["--request-rate", "nan"], &["0.001 to 10000"]);
    check(&["--request-rate", "2", "--burstiness", "0"], &["from 0.01 to 100"]);
    check(&["--request-rate", "2", "--concurrency", "2"], &["two runs", "--max-concurrency"]);
    check(&["--num-prompts", "9"], &["--request-rate", "--requests"]);
    check(&["--burstiness", "0.5"], &["--request-rate"]);
    check(&["--input-words", "9999999999"], &["from 1 to 1048576"]);
    check(&["--input-words", "1000000", "--concurrency", "1024"], &["more than 100000000 words"]);
    check(&["--step-tokens", "8"], &["step_tokens: 8", "max_sequences (64)"]);
    check(&["--quant", "int3"], &["int3"]);
    check(&["--quant", "file,file"], &["called", "file"]);
    check(&["--dataset", "empty.jsonl"], &["empty.jsonl has no prompts"]);
    check(&["--dataset", "wrong.jsonl"], &["line 2", "`prompt`"]);
    check(&["--dataset", "missing.jsonl"], &["missing.jsonl"]);
    check(&["--json", "no/such/place.json"], &["no/such/place.json"]);
    check(&["--svg", "data.gguf/x.svg"], &["data.gguf/x.svg"]);
    check(&["--gate", "wrong.jsonl"], &["--gate", "wrong.jsonl"]);
    check(&["--gate-any-machine"], &["--gate"]);
    check(&["--gate-tolerance", "3"], &["2%"]);
    check(&["--url", "https://x"], &["only http://"]);
    check(&["--url", "http://x", "--quant", "int4"], &["--quant", "--url names a server"]);
    check(&["--url", "http://x", "--api-key-file", "blank.key"], &["blank.key is empty"]);
    check(&["--url", "http://x", "--against", "http://x/"], &["called x", "--against-name"]);
    check(&["--api-key-file", "blank.key"], &["--url"]);
    assert!(!world.path("data").exists(), "nothing was measured");
}
