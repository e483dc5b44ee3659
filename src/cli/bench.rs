//! `obol bench`: flags to subjects and loads, figures to the terminal and to files.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use clap::Args;
use obol_models::KvDtype;
use obol_models::quant::Quant;

use crate::bench::{
    self, BenchError, Endpoint, EngineSetup, Facts, Kind, Load, Plan, Questions, Site, Started, Subject,
    Workload,
};
use crate::clock::{Clock, SystemClock};
use crate::config::{Config, PlaceFlags, ServeFlags};
use crate::ledger::RateCard;
use crate::measure::asking::Running;
use crate::measure::progress::Progress;
use crate::meter::partition::Partition;

use super::parts::{self, Early};
use super::values::{CLIENTS_MAX, at_least, clients};
use super::{Directories, Failure, model, print, serve};

#[derive(Debug, Args)]
pub(super) struct BenchFlags {
    /// Model by catalog name, or a GGUF file, for an engine in this process; without one, the default model
    #[arg(env = "OBOL_MODEL", value_name = "MODEL")]
    model: Option<String>,
    /// Branch, tag or commit of a model from the hub [default: main]
    #[arg(long, env = "OBOL_REVISION", value_name = "REV")]
    revision: Option<String>,
    /// Closed loops of so many clients, each of which asks again when it has its answer
    #[arg(long, value_delimiter = ',', default_value = "1,8,32", value_name = "CLIENTS", value_parser = clients)]
    concurrency: Vec<usize>,
    /// Requests of each client of a closed loop, one after another
    #[arg(long, default_value = "4", value_parser = at_least::<1>)]
    requests: usize,
    /// Random words of each prompt
    #[arg(long, default_value = "100", value_name = "WORDS", value_parser = at_least::<1>)]
    input_words: usize,
    /// Tokens of each answer
    #[arg(long, default_value = "64", value_name = "TOKENS", value_parser = at_least::<1>)]
    output_tokens: usize,
    /// Rounds, of which the median counts
    #[arg(long, default_value = "3", value_parser = at_least::<1>)]
    rounds: usize,
    /// Requests before measuring
    #[arg(long, default_value = "2", value_name = "REQUESTS")]
    warmup: usize,
    /// Precisions of the weights: file, f32, f16, bf16, int8 or int4
    #[arg(long, value_delimiter = ',', default_value = "file", value_name = "PRECISIONS")]
    quant: Vec<Quant>,
    /// Threads that compute [default: the cores this process may use]
    #[arg(long, env = "OBOL_THREADS")]
    threads: Option<usize>,
    /// Memory for the KV cache, like 512MiB or 4GiB [default: a quarter of what is free]
    #[arg(long, env = "OBOL_KV_MEMORY", value_name = "BYTES")]
    kv_memory: Option<String>,
}

impl From<BenchError> for Failure {
    fn from(error: BenchError) -> Self {
        match error {
            BenchError::Input(said) => Self::Usage(said),
            BenchError::Failed(said) => Self::Failed(said),
        }
    }
}

impl From<Failure> for BenchError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Usage(said) => Self::Input(said),
            Failure::Failed(said) => Self::Failed(said),
        }
    }
}

pub(super) fn run(
    flags: BenchFlags,
    places: &PlaceFlags,
    directories: &Directories,
    command: Vec<String>,
) -> Result<ExitCode, Failure> {
    let serve = ServeFlags {
        model: flags.model.clone(),
        revision: flags.revision.clone(),
        threads: flags.threads,
        kv_memory: flags.kv_memory.clone(),
        queue_depth: Some(CLIENTS_MAX),
        insecure_open: Some(true), // nobody listens
        ..ServeFlags::default()
    };
    let mut config = Config::resolve(serve, places, directories.data.clone()).map_err(Failure::usage)?;
    // The same for every engine, whatever the last one has left free.
    config.kv_memory = Some(parts::kv_memory(&config));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = config.threads.unwrap_or(cores);
    let rates = &config.rates;
    let plan = Plan {
        loads: flags.concurrency.iter().map(|&concurrency| Load::Closed { concurrency }).collect(),
        workload: Workload {
            questions: Questions::Words(flags.input_words),
            shared_prefix_words: 0,
            turns: 1,
            output_tokens: flags.output_tokens,
            seed: 1,
        },
        requests: flags.requests,
        num_prompts: 1,
        rounds: flags.rounds,
        warmup: flags.warmup,
        endpoint: Endpoint::Completions,
        ignore_eos: true,
        timeout: Duration::from_secs(600),
        rate: RateCard::parse(&rates.device_hour, &rates.kv_share, &rates.currency, None)
            .map_err(|error| Failure::usage(format!("rates: {error}")))?,
        threads,
        machine: serve::processor(),
        cores,
        command,
    };
    let setup = |&quant: &Quant| EngineSetup {
        quant,
        kv_dtype: KvDtype::default(),
        step_tokens: config.step_tokens,
        max_sequences: config.max_sequences,
        prefix_caching: config.prefix_caching,
    };
    let subjects: Vec<Subject> = flags
        .quant
        .iter()
        .map(|quant| Subject { name: quant.to_string(), kind: Kind::Engine(setup(quant)) })
        .collect();
    let file = model::locate(&config.model, config.revision.as_deref(), directories)?.file;
    let mut engines = Engines { config, threads, file };
    let progress = Progress::stderr();
    let report = bench::bench(subjects, plan, &mut engines, &progress)?;
    drop(progress);
    print(&report.to_table())?;
    Ok(ExitCode::SUCCESS)
}

/// Engines over one model file, from the same parts as the server's.
struct Engines {
    config: Config,
    threads: usize,
    file: PathBuf,
}

impl Site for Engines {
    fn start(&mut self, setup: &EngineSetup) -> Result<Started, BenchError> {
        let config = Config {
            quant: setup.quant,
            kv_dtype: setup.kv_dtype,
            step_tokens: setup.step_tokens,
            max_sequences: setup.max_sequences,
            prefix_caching: setup.prefix_caching,
            ..self.config.clone()
        };
        let begin = Instant::now();
        let loaded = parts::load_model(&self.file, &config, self.threads)?;
        let info = loaded.info;
        let load = begin.elapsed();
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::start());
        let (sender, reports) = mpsc::channel();
        let mut early = Early { clock, partition: Partition::default(), reports: sender };
        let ends = loaded.tokenizer.end_tokens();
        let ready = parts::prepare(loaded.model, &info, ends, &config, self.threads, &mut early)?;
        Ok(Started {
            running: Running { engine: parts::start(ready, early), reports },
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
