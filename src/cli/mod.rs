//! The commands: what a person types, turned into calls. Each has an example in its help.
//! Exit codes: 0 done, 1 failed, 2 wrong usage.

mod alerts;
mod bench;
mod books;
mod compare;
mod devices;
mod embedding;
mod files;
mod keys;
mod model;
mod parts;
mod report;
mod serve;
mod values;

use std::ffi::OsString;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use obol_models::fetch::Token;

use crate::bench::ApiKey;
use crate::config::{PlaceFlags, ServeFlags};
use crate::measure::MeasureError;

/// An LLM inference server that charges every request its exact device time and KV-cache memory.
///
/// `obol` alone serves the default model on http://127.0.0.1:8080.
#[derive(Debug, Parser)]
#[command(name = "obol", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a model behind an OpenAI-compatible API
    ///
    /// Settings come from flags, then OBOL_* variables, then the configuration file ([serve], [rates]).
    #[command(
        after_help = "Example:\n  obol serve --model smollm2-135m-instruct --listen 127.0.0.1:8080 --kv-memory 2GiB"
    )]
    Serve {
        #[command(flatten)]
        serve: Box<ServeFlags>,
        #[command(flatten)]
        places: PlaceFlags,
    },
    /// Fetch a model with progress and checksum, and print its path
    ///
    /// The hub is asked even if the model is there, and every file is looked at. HF_TOKEN opens what is gated or
    /// private; HF_ENDPOINT names another hub.
    #[command(
        after_help = "Example:\n  obol pull smollm2-135m-instruct\n  obol pull owner/name:file.gguf --revision v1.0"
    )]
    Pull {
        /// Name in the catalog, or a model of the hub as owner/name or owner/name:file.gguf; without one, the
        /// default model
        name: Option<String>,
        /// Branch, tag or commit of a model from the hub [default: main]
        #[arg(long, value_name = "REV")]
        revision: Option<String>,
        /// Print model, path, commit and files (sizes and checksums) as JSON
        #[arg(long)]
        json: bool,
    },
    /// Throughput, latency and cost under load: an engine in this process, or any OpenAI-compatible server
    ///
    /// Without --url the engine that the server uses is asked in this process, without HTTP and without a ledger;
    /// several values of its flags make a sweep. Exit code 1 if a request failed or a limit of --gate is exceeded.
    #[command(
        after_help = "Example:\n  obol bench smollm2-135m-instruct --concurrency 1,8,32 --quant file,int8,int4 --json all.json\n  \
                      obol bench --url http://127.0.0.1:8080 --against http://127.0.0.1:8081 --request-rate 2,4,8"
    )]
    Bench {
        #[command(flatten)]
        bench: Box<bench::BenchFlags>,
        #[command(flatten)]
        places: PlaceFlags,
    },
    /// One model in several precisions beside each other: quality, speed, memory and cost
    ///
    /// Variants run one after another, each loaded alone: perplexity and KL divergence over a text (in the
    /// convention of llama-perplexity), greedy answers, then speed and exact cost through the engine that
    /// the server uses. Nothing is written to the ledger. Exit code 1 if a limit is exceeded.
    #[command(
        after_help = "Example:\n  obol compare smollm2-135m-instruct --variants f32,file,int8,int4+kv-int8 --max-perplexity-loss 2%"
    )]
    Compare {
        #[command(flatten)]
        compare: Box<compare::CompareFlags>,
        #[command(flatten)]
        places: PlaceFlags,
    },
    /// Showback: spend by team, feature, user, model, day and more, with idle and house time
    ///
    /// Usage cost is what receipts say; loaded cost adds the idle and house money of each clock hour, split over
    /// that hour's usage. Requests without a label are listed as untagged. All adds up to the devices' bill.
    #[command(
        after_help = "Example:\n  obol report --by team,feature --since 2026-11-01 --until 2026-12-01\n  \
                      obol report --by user,month --timezone Europe/Berlin --format csv"
    )]
    Report {
        #[command(flatten)]
        report: report::ReportFlags,
        #[command(flatten)]
        places: PlaceFlags,
    },
    /// API keys: who may ask, for how much, and what their requests are booked under
    ///
    /// Works on the data directory, beside a running server too: a change is in force within 100 ms. Keys are needed
    /// where the server has an admin key (--admin-key-file); without one it is open to all who reach it. A key is named
    /// by its id, its alias or its token.
    #[command(
        after_help = "Example:\n  obol keys create --alias search-prod --team search --max-budget 25.00 --budget-duration 30d\n  \
                      obol keys rotate search-prod --grace 24h"
    )]
    Keys {
        #[command(subcommand)]
        command: keys::KeysCommand,
    },
    /// Rebuild every balance from the ledger and compare: `reconciled: difference 0`, or exit code 1
    #[command(after_help = "Example:\n  obol audit --data-dir /var/lib/obol")]
    Audit {
        /// Print the figures as JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        places: PlaceFlags,
    },
}

/// What the environment names and no flag does, read once by `main`.
#[derive(Clone)]
pub struct Directories {
    pub data: PathBuf,
    pub models: PathBuf,
    pub hub_token: Option<Token>,
    /// As the variable has it; whoever uses it says what is wrong with it.
    pub admin_key: Option<OsString>,
    /// For the server that `obol bench` asks.
    pub bench_api_key: Option<ApiKey>,
}

/// Runs the command that the arguments name.
#[must_use]
pub fn run(mut arguments: Vec<OsString>, directories: &Directories) -> ExitCode {
    if arguments.len() == 1 {
        arguments.push("serve".into());
    }
    let command = arguments.iter().map(|argument| argument.to_string_lossy().into_owned()).collect();
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    let outcome = match cli.command {
        Command::Serve { serve, places } => serve::run(*serve, &places, directories),
        Command::Pull { name, revision, json } => {
            model::pull(name.as_deref(), revision.as_deref(), json, directories)
        }
        Command::Bench { bench, places } => bench::run(*bench, &places, directories, command),
        Command::Compare { compare, places } => compare::run(*compare, &places, directories),
        Command::Report { report, places } => report::report(&report, &places, directories),
        Command::Keys { command } => keys::run(command, directories),
        Command::Audit { json, places } => books::audit(json, &places, directories),
    };
    match outcome {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("obol: {failure}");
            match failure {
                Failure::Usage(_) => ExitCode::from(2),
                Failure::Failed(_) => ExitCode::FAILURE,
            }
        }
    }
}

/// Why a command did not do what it was asked.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Failed(String),
}

impl Failure {
    fn failed(error: impl std::fmt::Display) -> Self {
        Self::Failed(error.to_string())
    }

    fn usage(error: impl std::fmt::Display) -> Self {
        Self::Usage(error.to_string())
    }
}

impl From<MeasureError> for Failure {
    fn from(error: MeasureError) -> Self {
        match error {
            MeasureError::Input(said) => Self::Usage(said),
            MeasureError::Failed(said) => Self::Failed(said),
        }
    }
}

impl From<Failure> for MeasureError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Usage(said) => Self::Input(said),
            Failure::Failed(said) => Self::Failed(said),
        }
    }
}

/// Writes a command's result. A reader that has seen enough, as `head` has, is no failure.
fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Failure::failed(error)),
        _ => Ok(()),
    }
}
