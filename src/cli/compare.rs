//! `obol compare`: flags to settings, model files to variants, figures to the terminal and to files.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::time::Instant;

use clap::{Args, ValueEnum};
use obol_models::load::Loaded;

use crate::clock::{Clock, SystemClock};
use crate::compare::{self, Settings, Site, Stages, Subject, Text, Variant};
use crate::config::{Config, PlaceFlags, ServeFlags};
use crate::measure::MeasureError;
use crate::measure::asking::Running;
use crate::measure::progress::Progress;
use crate::meter::partition::Partition;

use super::files::{self, Format};
use super::parts::{self, Early};
use super::values::{CLIENTS_MAX, DeviceFlags, at_least, clients, percent};
use super::{Directories, Failure, devices, model, print};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Stage {
    /// Perplexity and divergence
    Quality,
    /// Greedy answers
    Answers,
    /// Speed and cost
    Speed,
}

#[derive(Debug, Args)]
pub(super) struct CompareFlags {
    /// Model by catalog name, or a GGUF file; without one, the default model
    #[arg(env = "OBOL_MODEL", value_name = "MODEL")]
    model: Option<String>,
    /// Branch, tag or commit of a model from the hub [default: main]
    #[arg(long, env = "OBOL_REVISION", value_name = "REV")]
    revision: Option<String>,
    /// What is compared, the reference first: file, f32, f16, bf16, int8 or int4, or another FILE or NAME
    /// of the same model, with @int8 and the like after it; +kv-int8 and the like sets the KV cache's type
    #[arg(long, value_delimiter = ',', default_value = "f32,file,int8,int4")]
    variants: Vec<Variant>,
    /// Text for perplexity [default: 71 kB of a novel that come with the program]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Chunks of the text that are scored, 0 for all; meanwhile the reference's log-probabilities take
    /// half a chunk's tokens x vocabulary x 4 bytes of disk for each, 50 MB with 49,152 tokens
    #[arg(long, default_value = "8")]
    chunks: usize,
    /// Tokens in a chunk
    #[arg(long, default_value = "512", value_name = "TOKENS", value_parser = at_least::<4>)]
    chunk_tokens: usize,
    /// Prompts for greedy answers, one a line [default: 16 that come with the program]
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Tokens of a greedy answer
    #[arg(long, default_value = "64", value_name = "TOKENS", value_parser = at_least::<1>)]
    answer_tokens: usize,
    /// Numbers of clients that ask at once
    #[arg(long, value_delimiter = ',', default_value = "1,16", value_parser = clients)]
    clients: Vec<usize>,
    /// Rounds, of which the median counts
    #[arg(long, default_value = "3", value_parser = at_least::<1>)]
    rounds: usize,
    /// Requests of each client in a round
    #[arg(long, default_value = "2", value_parser = at_least::<1>)]
    requests: usize,
    /// Tokens of the clients' prompts
    #[arg(long, default_value = "100", value_name = "TOKENS", value_parser = at_least::<1>)]
    prompt_tokens: usize,
    /// Tokens of the clients' answers
    #[arg(long, default_value = "64", value_name = "TOKENS", value_parser = at_least::<1>)]
    output_tokens: usize,
    /// Make only these measurements
    #[arg(long, value_enum, value_delimiter = ',', value_name = "STAGES")]
    only: Vec<Stage>,
    /// What is printed
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    /// Write everything measured to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw quality against cost and size into this file, as SVG
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Exit with 1 if a variant's perplexity is more than this above the reference's, like 2%
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    max_perplexity_loss: Option<f64>,
    /// Exit with 1 if a variant's mean KL divergence from the reference is more than this
    #[arg(long, value_name = "NATS", value_parser = nats)]
    max_kl: Option<f64>,
    /// Threads that compute [default: the cores this process may use]
    #[arg(long, env = "OBOL_THREADS")]
    threads: Option<usize>,
    /// Memory for each variant's KV cache, like 512MiB or 4GiB [default: a quarter of what is free]
    #[arg(long, env = "OBOL_KV_MEMORY", value_name = "BYTES")]
    kv_memory: Option<String>,
    #[command(flatten)]
    place: DeviceFlags,
}

fn nats(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| number.is_finite() && *number >= 0.0);
    number.ok_or_else(|| format!("`{text}` is no divergence; write a number like 0.05"))
}

pub(super) fn run(
    flags: CompareFlags,
    places: &PlaceFlags,
    directories: &Directories,
) -> Result<ExitCode, Failure> {
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
    let mut config = Config::resolve(serve, places, directories.data.clone()).map_err(Failure::usage)?;
    devices::choose_one(&mut config)?;
    // The same for every variant, whatever the last one has left free.
    let kv_memory = parts::kv_memory(&config)?;
    config.kv_memory = Some(kv_memory);
    let settings = settings(&flags, &config, kv_memory)?;
    for file in flags.json.iter().chain(&flags.svg) {
        files::writable(file)?;
    }
    let mut files = Files { threads: settings.threads, models: Vec::new(), config };
    files.find(&flags.variants, directories)?;
    let progress = Progress::stderr();
    let comparison = compare::compare(&flags.variants, &mut files, &settings, &progress)?;
    drop(progress);
    print(&match flags.format {
        Format::Table => comparison.to_table(),
        Format::Json => files::pretty(&comparison.to_json())?,
    })?;
    if let Some(file) = &flags.json {
        files::write(file, &(files::pretty(&comparison.to_json())? + "\n"))?;
    }
    if let Some(file) = &flags.svg {
        files::write(file, &comparison.to_svg().map_err(Failure::failed)?)?;
    }
    let exceeded = comparison.exceeded(flags.max_perplexity_loss, flags.max_kl);
    if exceeded.is_empty() { Ok(ExitCode::SUCCESS) } else { Err(Failure::Failed(exceeded.join("\nobol: "))) }
}

fn settings(flags: &CompareFlags, config: &Config, kv_memory: u64) -> Result<Settings, Failure> {
    let limited = flags.max_perplexity_loss.is_some() || flags.max_kl.is_some();
    let only = |stage| flags.only.is_empty() || flags.only.contains(&stage);
    let stages =
        Stages { quality: only(Stage::Quality), answers: only(Stage::Answers), speed: only(Stage::Speed) };
    if !stages.quality && limited {
        return Err(Failure::usage("--max-perplexity-loss and --max-kl need `quality` among --only"));
    }
    if limited && flags.variants.len() < 2 {
        return Err(Failure::usage(
            "a limit needs a variant to compare with the first one, the reference: --variants f32,int4",
        ));
    }
    let mut clients = flags.clients.clone();
    clients.sort_unstable();
    clients.dedup();
    let threads =
        config.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    Ok(Settings {
        text: match &flags.text {
            None => Text::bundled(),
            Some(file) => Text {
                name: file.file_name().unwrap_or(file.as_os_str()).to_string_lossy().into_owned(),
                content: files::read("--text", file)?,
            },
        },
        chunks: flags.chunks,
        chunk_tokens: flags.chunk_tokens,
        prompts: match &flags.prompts {
            None => Vec::new(),
            Some(file) => prompts(file)?,
        },
        answer_tokens: flags.answer_tokens,
        clients,
        rounds: flags.rounds,
        requests: flags.requests,
        prompt_tokens: flags.prompt_tokens,
        output_tokens: flags.output_tokens,
        stages,
        rate: devices::rate_together(config)?,
        threads,
        machine: devices::processor(),
        kv_memory,
        spool: vec![config.data_dir.clone(), std::env::temp_dir()],
    })
}

fn prompts(file: &Path) -> Result<Vec<String>, Failure> {
    let text = files::read("--prompts", file)?;
    let prompts: Vec<String> =
        text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect();
    if prompts.is_empty() || prompts.len() > CLIENTS_MAX {
        return Err(Failure::usage(format!(
            "--prompts: {} has {} prompts; write from 1 to {CLIENTS_MAX}, one a line",
            file.display(),
            prompts.len()
        )));
    }
    Ok(prompts)
}

/// Variants from model files, over the same parts as the server.
struct Files {
    config: Config,
    threads: usize,
    /// The file of each variant.
    models: Vec<(Variant, PathBuf)>,
}

impl Files {
    /// All files at once, so that a missing one is told before anything is measured.
    fn find(&mut self, variants: &[Variant], directories: &Directories) -> Result<(), Failure> {
        // Each model once: what a hub's branch means must not change between two variants.
        let mut known: Vec<(Option<&str>, PathBuf)> = Vec::new();
        for variant in variants {
            let model = variant.model.as_deref();
            let file = match known.iter().find(|(known, _)| *known == model) {
                Some((_, file)) => file.clone(),
                None => self.locate(model, directories)?,
            };
            known.push((model, file.clone()));
            self.models.push((variant.clone(), file));
        }
        Ok(())
    }

    /// The model that a variant names, or the command's own.
    fn locate(&self, named: Option<&str>, directories: &Directories) -> Result<PathBuf, Failure> {
        let revision = self.config.revision.as_deref();
        let located = match named {
            None => model::locate(&self.config.model, revision, directories)?,
            Some(other) => model::locate(other, None, directories).map_err(|failure| match failure {
                Failure::Usage(said) => Failure::Usage(format!("--variants: {said}; {}", Variant::FORMS)),
                failed @ Failure::Failed(_) => failed,
            })?,
        };
        Ok(located.file)
    }

    fn config_of(&self, variant: &Variant) -> Config {
        Config { quant: variant.quant, kv_dtype: variant.kv_dtype, ..self.config.clone() }
    }
}

impl Site for Files {
    fn open(&mut self, variant: &Variant) -> Result<Subject, MeasureError> {
        let (_, file) = self.models.iter().find(|(known, _)| known == variant).expect("found before");
        let begin = Instant::now();
        let loaded = parts::load_model(file, &self.config_of(variant), self.threads, &[])?;
        Ok(Subject { loaded, load: begin.elapsed() })
    }

    fn start(&mut self, variant: &Variant, loaded: Loaded) -> Result<Running, MeasureError> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::start());
        let (sender, reports) = mpsc::channel();
        let mut early = Early { clock, partition: Partition::default(), reports: sender };
        let ends = loaded.tokenizer.end_tokens();
        let config = self.config_of(variant);
        let ready = parts::prepare(loaded.model, &loaded.info, ends, &config, self.threads, &mut early)?;
        Ok(Running { engine: parts::start(ready, early, &[]), reports })
    }
}
