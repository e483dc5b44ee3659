//! `obol bench`: flags to subjects and loads, figures to the terminal and to files.

mod growth;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use obol_models::KvDtype;
use obol_models::quant::Quant;

use crate::bench::{
    self, ApiKey, Arrivals, Endpoint, EngineSetup, Facts, Gate, Kind, Load, Plan, Questions, Report,
    ServerSetup, Site, Started, Subject, Workload,
};
use crate::clock::{Clock, SystemClock};
use crate::config::{Config, PlaceFlags, ServeFlags};
use crate::measure::MeasureError;
use crate::measure::asking::Running;
use crate::measure::progress::Progress;
use crate::measure::table::counted;
use crate::meter::partition::Partition;

use super::files::{self, Format};
use super::parts::{self, Early};
use super::values::{CLIENTS_MAX, DeviceFlags, between, clients, percent};
use super::{Directories, Failure, devices, model, print};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum EndpointName {
    /// /v1/completions: prompts as they are
    Completions,
    /// /v1/chat/completions: prompts through the model's template
    Chat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(Debug, Args)]
pub(super) struct BenchFlags {
    /// Model by catalog name, or a GGUF file, for an engine in this process; without one, the default model
    #[arg(env = "OBOL_MODEL", value_name = "MODEL")]
    model: Option<String>,
    /// Branch, tag or commit of a model from the hub [default: main]
    #[arg(long, env = "OBOL_REVISION", value_name = "REV")]
    revision: Option<String>,

    /// Ask this OpenAI-compatible server instead of an engine in this process, as http://127.0.0.1:8080
    #[arg(long, help_heading = "Servers")]
    url: Option<String>,
    /// What the server at --url is called in results [default: its address]
    #[arg(long, help_heading = "Servers", requires = "url")]
    name: Option<String>,
    /// Ask this server too, by turns, and set all others beside it
    #[arg(long, help_heading = "Servers", value_name = "URL")]
    against: Option<String>,
    /// What the server at --against is called in results [default: its address]
    #[arg(long, help_heading = "Servers", requires = "against", value_name = "NAME")]
    against_name: Option<String>,
    /// Endpoint that servers are asked at
    #[arg(long, help_heading = "Servers", value_enum, default_value = "completions")]
    endpoint: EndpointName,
    /// Model that the server at --url is asked for [default: the first that it lists]
    #[arg(long, help_heading = "Servers", requires = "url", value_name = "ID")]
    model_name: Option<String>,
    /// Model that the server at --against is asked for [default: the first that it lists]
    #[arg(long, help_heading = "Servers", requires = "against", value_name = "ID")]
    against_model_name: Option<String>,
    /// File with the API key for --url [default: the variable OBOL_BENCH_API_KEY]
    #[arg(long, help_heading = "Servers", requires = "url", value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// File with the API key for --against
    #[arg(long, help_heading = "Servers", requires = "against", value_name = "FILE")]
    against_api_key_file: Option<PathBuf>,
    /// Seconds that a request may take
    #[arg(long, help_heading = "Servers", default_value = "600", value_parser = between::<1, 86_400>)]
    timeout: usize,

    /// Closed loops of so many clients, each of which asks again when it has its answer [default: 1,8,32]
    #[arg(long, help_heading = "Load", value_delimiter = ',', value_name = "CLIENTS", value_parser = clients)]
    concurrency: Vec<usize>,
    /// Requests of each client of a closed loop, one after another [default: 4]
    #[arg(long, help_heading = "Load", value_parser = between::<1, 100_000>)]
    requests: Option<usize>,
    /// Open loops instead: requests come at random instants, so many a second, whatever is answered
    #[arg(long, help_heading = "Load", value_delimiter = ',', value_name = "PER_SECOND", value_parser = rate)]
    request_rate: Vec<f64>,
    /// Requests of an open loop, all together [default: 64]
    #[arg(long, help_heading = "Load", value_parser = between::<1, 100_000>)]
    num_prompts: Option<usize>,
    /// How even the instants of an open loop are: 1 is a Poisson process, less is burstier [default: 1]
    #[arg(long, help_heading = "Load", value_parser = burstiness)]
    burstiness: Option<f64>,
    /// Most requests of an open loop at once; others wait, and their waiting counts as latency
    #[arg(long, help_heading = "Load", value_parser = between::<1, 100_000>)]
    max_concurrency: Option<usize>,
    /// Rounds, of which the median counts; subjects and loads take turns from round to round
    #[arg(long, help_heading = "Load", default_value = "3", value_parser = between::<1, 1000>)]
    rounds: usize,
    /// Requests before measuring, all at once
    #[arg(long, help_heading = "Load", default_value = "2", value_parser = between::<0, CLIENTS_MAX>)]
    warmup: usize,

    /// Random words of each prompt [default: 100]
    #[arg(long, help_heading = "Prompts", value_name = "WORDS", value_parser = size)]
    input_words: Option<usize>,
    /// Random tokens of each prompt; over HTTP as many words, of about a token each
    #[arg(long, help_heading = "Prompts", value_name = "TOKENS", value_parser = size,
          conflicts_with = "input_words")]
    input_tokens: Option<usize>,
    /// Prompts from a file instead: a JSON object with `prompt` on each line
    #[arg(long, help_heading = "Prompts", value_name = "FILE", conflicts_with_all = ["input_words", "input_tokens"])]
    dataset: Option<PathBuf>,
    /// Words that all prompts of one load in one round begin with
    #[arg(long, help_heading = "Prompts", default_value = "0", value_name = "WORDS",
          value_parser = between::<0, SIZE_MAX>)]
    shared_prefix_words: usize,
    /// Conversations of so many questions; each repeats what was said before it
    #[arg(long, help_heading = "Prompts", default_value = "1", value_parser = between::<1, 1000>)]
    turns: usize,
    /// Tokens of each answer
    #[arg(long, help_heading = "Prompts", default_value = "64", value_name = "TOKENS", value_parser = size)]
    output_tokens: usize,
    /// Let answers end where the model ends them, instead of at --output-tokens
    #[arg(long, help_heading = "Prompts")]
    no_ignore_eos: bool,
    /// Other seed, other prompts and other instants
    #[arg(long, help_heading = "Prompts", default_value = "1")]
    seed: u64,

    /// Precisions of the weights: file, f32, f16, bf16, int8 or int4 [default: file]
    #[arg(long, help_heading = "Engine in this process", value_delimiter = ',', value_name = "PRECISIONS")]
    quant: Vec<Quant>,
    /// Types of the KV cache: f16, bf16, f32 or int8 [default: f16]
    #[arg(long, help_heading = "Engine in this process", value_delimiter = ',', value_name = "TYPES")]
    kv_dtype: Vec<KvDtype>,
    /// Most tokens computed in one step; several make a sweep, as with the other flags here [default: 512]
    #[arg(long, help_heading = "Engine in this process", value_delimiter = ',', value_name = "TOKENS")]
    step_tokens: Vec<usize>,
    /// Most sequences in one step [default: 64]
    #[arg(long, help_heading = "Engine in this process", value_delimiter = ',', value_name = "SEQUENCES")]
    max_sequences: Vec<usize>,
    /// Reuse of equal prefixes [default: on]
    #[arg(long, help_heading = "Engine in this process", value_enum, value_delimiter = ',')]
    prefix_caching: Vec<Switch>,
    /// Threads that compute [default: the cores this process may use]
    #[arg(long, help_heading = "Engine in this process", env = "OBOL_THREADS")]
    threads: Option<usize>,
    /// Memory for the KV cache, like 512MiB or 4GiB [default: a quarter of what is free]
    #[arg(long, help_heading = "Engine in this process", env = "OBOL_KV_MEMORY", value_name = "BYTES")]
    kv_memory: Option<String>,
    #[command(flatten)]
    place: DeviceFlags,

    /// Instead of a load: time single steps against batch and context, beside the cost model's fit
    #[arg(long, help_heading = "Results", conflicts_with_all = ["url", "gate"])]
    growth: bool,
    /// What is printed
    #[arg(long, help_heading = "Results", value_enum, default_value = "table")]
    format: Format,
    /// Write everything measured to this file, as JSON
    #[arg(long, help_heading = "Results", value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw latency against throughput, and cost against load, into this file, as SVG
    #[arg(long, help_heading = "Results", value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Exit with 1 if throughput, latency or cost is worse than in this earlier --json
    #[arg(long, help_heading = "Results", value_name = "FILE")]
    gate: Option<PathBuf>,
    /// How much worse each figure may be
    #[arg(long, help_heading = "Results", value_name = "PERCENT", default_value = "10%", value_parser = percent)]
    gate_tolerance: f64,
    /// Hold the result against one from another machine too
    #[arg(long, help_heading = "Results", requires = "gate")]
    gate_any_machine: bool,
}

/// Words or tokens of one prompt or answer: more than any context holds.
const SIZE_MAX: usize = 1 << 20;
/// Words of one load's prompts, which are all in memory at once.
const WORDS_MAX: usize = 100_000_000;

fn size(text: &str) -> Result<usize, String> {
    between::<1, SIZE_MAX>(text)
}

fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate| (0.001..=10_000.0).contains(rate));
    rate.ok_or_else(|| format!("`{text}` is no number of requests a second from 0.001 to 10000"))
}

fn burstiness(text: &str) -> Result<f64, String> {
    let shape = text.parse().ok().filter(|shape| (0.01..=100.0).contains(shape));
    shape.ok_or_else(|| format!("`{text}` is no number from 0.01 to 100"))
}

pub(super) fn run(
    flags: BenchFlags,
    places: &PlaceFlags,
    directories: &Directories,
    command: Vec<String>,
) -> Result<ExitCode, Failure> {
    let mut config = config(&flags, &command, places, directories)?;
    if flags.url.is_none() {
        devices::choose_one(&mut config)?;
    }
    if flags.growth {
        return growth::run(&flags, &config, directories, command);
    }
    let subjects = subjects(&flags, &config, directories)?;
    let plan = plan(&flags, &config, command)?;
    for file in flags.json.iter().chain(&flags.svg) {
        files::writable(file)?;
    }
    let gate = flags.gate.as_ref().map(|file| gate(&flags, file, &plan, &subjects)).transpose()?;
    let file = match flags.url {
        Some(_) => None,
        None => Some(model::locate(&config.model, config.revision.as_deref(), directories)?.file),
    };
    // The same for every engine, whatever the last one has left free.
    if flags.url.is_none() {
        config.kv_memory = Some(parts::kv_memory(&config)?);
    }
    let mut engines = Engines { config, threads: plan.threads, file };
    let progress = Progress::stderr();
    let report = bench::bench(subjects, plan, &mut engines, &progress)?;
    drop((progress, engines));
    finish(&flags, &report, gate.as_ref())
}

/// Prints and writes the report; then says what is wrong with it.
fn finish(flags: &BenchFlags, report: &Report, gate: Option<&Gate>) -> Result<ExitCode, Failure> {
    let json = report.to_json();
    print(&match flags.format {
        Format::Table => report.to_table(),
        Format::Json => files::pretty(&json)?,
    })?;
    if let Some(file) = &flags.json {
        files::write(file, &(files::pretty(&json)? + "\n"))?;
    }
    if let Some(file) = &flags.svg {
        files::write(file, &report.to_svg().map_err(Failure::failed)?)?;
    }
    let mut wrong = Vec::new();
    if report.failed() > 0 {
        wrong.push(format!("{} failed; the result says how", counted(report.failed(), "request")));
    }
    if let Some(gate) = gate {
        let verdict = gate.judge(&json).map_err(|said| Failure::Failed(format!("--gate: {said}")))?;
        for point in &verdict.unmeasured {
            eprintln!("obol: --gate: not measured now: {point}");
        }
        eprintln!(
            "obol: --gate: {} compared, {} worse than allowed",
            counted(verdict.compared, "point"),
            counted(verdict.worse.len(), "figure")
        );
        wrong.extend(verdict.worse);
    }
    if wrong.is_empty() { Ok(ExitCode::SUCCESS) } else { Err(Failure::Failed(wrong.join("\nobol: "))) }
}

/// The earlier result, if this one can be held against it as far as is known now.
fn gate(flags: &BenchFlags, file: &Path, plan: &Plan, subjects: &[Subject]) -> Result<Gate, Failure> {
    let text = files::read("--gate", file)?;
    let gate = Gate::new(&text, flags.gate_tolerance, flags.gate_any_machine);
    let gate = gate.map_err(|said| Failure::Usage(format!("--gate: {}: {said}", file.display())))?;
    let comparable = gate.comparable(&bench::describe(plan, subjects));
    comparable.map_err(|said| Failure::Usage(format!("--gate: {}: {said}", file.display())))?;
    Ok(gate)
}

fn config(
    flags: &BenchFlags,
    command: &[String],
    places: &PlaceFlags,
    directories: &Directories,
) -> Result<Config, Failure> {
    if flags.url.is_some() {
        let engine = [
            (!flags.quant.is_empty(), "--quant"),
            (!flags.kv_dtype.is_empty(), "--kv-dtype"),
            (!flags.step_tokens.is_empty(), "--step-tokens"),
            (!flags.max_sequences.is_empty(), "--max-sequences"),
            (!flags.prefix_caching.is_empty(), "--prefix-caching"),
            // OBOL_MODEL may be set for other commands.
            (flags.model.as_ref().is_some_and(|model| command.contains(model)), "MODEL"),
        ];
        if let Some((_, flag)) = engine.into_iter().find(|(given, _)| *given) {
            return Err(Failure::Usage(format!(
                "{flag} is of an engine in this process, and --url names a server, which has its own; name one of them"
            )));
        }
    }
    let serve = ServeFlags {
        model: flags.model.clone(),
        revision: flags.revision.clone(),
        threads: flags.threads,
        kv_memory: flags.kv_memory.clone(),
        device: flags.place.device.clone(),
        tensor_parallel: flags.place.tensor_parallel,
        dtype: flags.place.dtype,
        queue_depth: Some(CLIENTS_MAX),
        insecure_open: Some(true), // nobody listens
        ..ServeFlags::default()
    };
    // A sweep's own values are checked with each of its engines.
    Config::resolve(serve, places, directories.data.clone()).map_err(Failure::usage)
}

fn plan(flags: &BenchFlags, config: &Config, command: Vec<String>) -> Result<Plan, Failure> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let workload = Workload {
        questions: match (&flags.dataset, flags.input_tokens) {
            (Some(file), _) => dataset(file)?,
            (None, Some(tokens)) => Questions::Tokens(tokens),
            (None, None) => Questions::Words(flags.input_words.unwrap_or(100)),
        },
        shared_prefix_words: flags.shared_prefix_words,
        turns: flags.turns,
        output_tokens: flags.output_tokens,
        seed: flags.seed,
    };
    let plan = Plan {
        loads: loads(flags)?,
        workload,
        requests: flags.requests.unwrap_or(4),
        num_prompts: flags.num_prompts.unwrap_or(64),
        rounds: flags.rounds,
        warmup: flags.warmup,
        endpoint: match flags.endpoint {
            EndpointName::Completions => Endpoint::Completions,
            EndpointName::Chat => Endpoint::Chat,
        },
        ignore_eos: !flags.no_ignore_eos,
        timeout: Duration::from_secs(flags.timeout as u64),
        rate: devices::rate_together(config)?,
        threads: config.threads.unwrap_or(cores),
        machine: devices::processor(),
        cores,
        command,
    };
    let words =
        flags.input_tokens.or(flags.input_words).unwrap_or(100) * flags.turns + flags.shared_prefix_words;
    let most = plan.loads.iter().map(|load| plan.conversations(load)).max().unwrap_or(0);
    if words.saturating_mul(most) > WORDS_MAX {
        return Err(Failure::Usage(format!(
            "{most} conversations of {words} words would be asked of one load, more than {WORDS_MAX} words in all; \
             ask less"
        )));
    }
    Ok(plan)
}

/// Loads, ascending, each once. A run has one kind, so that its figures can be set beside each other.
fn loads(flags: &BenchFlags) -> Result<Vec<Load>, Failure> {
    if flags.request_rate.is_empty() {
        let open = [
            (flags.num_prompts.is_some(), "--num-prompts", "clients have --requests each"),
            (flags.burstiness.is_some(), "--burstiness", "clients ask when they have their answers"),
            (
                flags.max_concurrency.is_some(),
                "--max-concurrency",
                "clients are as many as --concurrency says",
            ),
        ];
        if let Some((_, flag, why)) = open.into_iter().find(|(given, ..)| *given) {
            return Err(Failure::Usage(format!("{flag} needs --request-rate: {why}")));
        }
        let mut clients =
            if flags.concurrency.is_empty() { vec![1, 8, 32] } else { flags.concurrency.clone() };
        clients.sort_unstable();
        clients.dedup();
        return Ok(clients.into_iter().map(|concurrency| Load::Closed { concurrency }).collect());
    }
    if !flags.concurrency.is_empty() || flags.requests.is_some() {
        return Err(Failure::usage(
            "--request-rate is an open loop, and --concurrency and --requests are of a closed one; measure them in \
             two runs, or bound the open loop with --max-concurrency and --num-prompts",
        ));
    }
    let mut rates = flags.request_rate.clone();
    rates.sort_by(f64::total_cmp);
    rates.dedup();
    let (burstiness, max_concurrency) = (flags.burstiness.unwrap_or(1.0), flags.max_concurrency);
    let open = |rate| Load::Open(Arrivals { rate, burstiness, max_concurrency });
    Ok(rates.into_iter().map(open).collect())
}

fn dataset(file: &Path) -> Result<Questions, Failure> {
    let wrong =
        |line: usize, why: &str| Failure::Usage(format!("--dataset: {}, line {line}: {why}", file.display()));
    let mut prompts = Vec::new();
    for (number, line) in files::read("--dataset", file)?.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let object: serde_json::Value =
            serde_json::from_str(line).map_err(|error| wrong(number + 1, &format!("no JSON: {error}")))?;
        let prompt = object["prompt"].as_str().filter(|prompt| !prompt.trim().is_empty());
        let prompt = prompt.ok_or_else(|| wrong(number + 1, "no text under `prompt`"))?;
        prompts.push(prompt.to_owned());
    }
    if prompts.is_empty() {
        return Err(Failure::Usage(format!("--dataset: {} has no prompts", file.display())));
    }
    Ok(Questions::Dataset {
        name: file.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        prompts,
    })
}

/// What is measured: the server at --url or engines here, and the peer.
fn subjects(flags: &BenchFlags, config: &Config, directories: &Directories) -> Result<Vec<Subject>, Failure> {
    let mut subjects = match &flags.url {
        Some(url) => {
            let api_key = match &flags.api_key_file {
                Some(file) => Some(api_key("--api-key-file", file)?),
                None => directories.bench_api_key.clone(),
            };
            let setup = ServerSetup { url: url.clone(), model: flags.model_name.clone(), api_key };
            vec![server(flags.name.as_ref(), setup, false)]
        }
        None => engines(flags, config)?,
    };
    if let Some(url) = &flags.against {
        let file = flags.against_api_key_file.as_ref();
        let api_key = file.map(|file| api_key("--against-api-key-file", file)).transpose()?;
        let setup = ServerSetup { url: url.clone(), model: flags.against_model_name.clone(), api_key };
        subjects.push(server(flags.against_name.as_ref(), setup, true));
    }
    let mut names: Vec<&str> = subjects.iter().map(|subject| subject.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(Failure::Usage(format!(
            "two of what is measured are called {}; give names with --name and --against-name, and each value once",
            pair[0]
        ))),
        None => Ok(subjects),
    }
}

fn server(name: Option<&String>, setup: ServerSetup, peer: bool) -> Subject {
    let address = setup.url.split("//").last().unwrap_or_default().trim_end_matches('/').to_owned();
    Subject { name: name.cloned().unwrap_or(address), kind: Kind::Server(setup), peer }
}

fn api_key(flag: &str, file: &Path) -> Result<ApiKey, Failure> {
    let key = ApiKey::new(&files::read(flag, file)?);
    key.ok_or_else(|| Failure::Usage(format!("{flag}: {} is empty", file.display())))
}

/// Every combination of the engine's flags, named by what differs.
fn engines(flags: &BenchFlags, config: &Config) -> Result<Vec<Subject>, Failure> {
    fn or<T: Clone>(given: &[T], otherwise: T) -> Vec<T> {
        if given.is_empty() { vec![otherwise] } else { given.to_vec() }
    }
    let switches: Vec<bool> = flags.prefix_caching.iter().map(|switch| *switch == Switch::On).collect();
    let mut subjects = Vec::new();
    for &quant in &or(&flags.quant, config.quant) {
        for &kv_dtype in &or(&flags.kv_dtype, config.kv_dtype) {
            for &step_tokens in &or(&flags.step_tokens, config.step_tokens) {
                for &max_sequences in &or(&flags.max_sequences, config.max_sequences) {
                    for &prefix_caching in &or(&switches, config.prefix_caching) {
                        let setup =
                            EngineSetup { quant, kv_dtype, step_tokens, max_sequences, prefix_caching };
                        Config::check_steps(max_sequences, step_tokens).map_err(Failure::usage)?;
                        let parts = [
                            (flags.quant.len() > 1, quant.to_string()),
                            (flags.kv_dtype.len() > 1, format!("kv-{kv_dtype}")),
                            (flags.step_tokens.len() > 1, format!("step {step_tokens}")),
                            (flags.max_sequences.len() > 1, format!("seq {max_sequences}")),
                            (
                                switches.len() > 1,
                                format!("cache {}", if prefix_caching { "on" } else { "off" }),
                            ),
                        ];
                        let named = parts.into_iter().filter(|(differs, _)| *differs).map(|(_, part)| part);
                        let name = named.collect::<Vec<_>>().join(" ");
                        let name = if name.is_empty() { "obol".to_owned() } else { name };
                        subjects.push(Subject { name, kind: Kind::Engine(setup), peer: false });
                    }
                }
            }
        }
    }
    Ok(subjects)
}

/// Engines over one model file, from the same parts as the server's.
struct Engines {
    config: Config,
    threads: usize,
    /// `None` where only servers are measured.
    file: Option<PathBuf>,
}

impl Site for Engines {
    fn start(&mut self, setup: &EngineSetup) -> Result<Started, MeasureError> {
        let config = Config {
            quant: setup.quant,
            kv_dtype: setup.kv_dtype,
            step_tokens: setup.step_tokens,
            max_sequences: setup.max_sequences,
            prefix_caching: setup.prefix_caching,
            ..self.config.clone()
        };
        let begin = Instant::now();
        let file = self.file.as_ref().expect("a model is found before engines are measured");
        let loaded = parts::load_model(file, &config, self.threads, &[])?;
        let info = loaded.info;
        let load = begin.elapsed();
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::start());
        let (sender, reports) = mpsc::channel();
        let mut early = Early { clock, partition: Partition::default(), reports: sender };
        let ends = loaded.tokenizer.end_tokens();
        let ready = parts::prepare(loaded.model, &info, ends, &config, self.threads, &mut early)?;
        Ok(Started {
            running: Running { engine: parts::start(ready, early, &[]), reports },
            tokenizer: loaded.tokenizer,
            template: loaded.template,
            facts: Facts {
                model: info.name,
                architecture: info.architecture,
                precision: info.precision,
                fingerprint: info.fingerprint,
                weight_bytes: info.weight_bytes,
                load,
            },
        })
    }
}
