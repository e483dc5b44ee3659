//! Every setting, once: flags over `OBOL_*` variables over the file over the default, resolved before
//! anything starts and never changed. Knows no part of the server; what only loading can tell
//! (blocks, bytes a block) is not here.

mod alerts;
mod batches;
mod budgets;
mod decimal;
mod limits;
mod origin;
mod rates;
mod responses;
mod scheduling;
mod size;
mod vectors;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, ValueEnum};
use obol_models::KvDtype;
use obol_models::device::{ComputeDtype, DeviceId};
use obol_models::quant::Quant;
use serde::{Deserialize, Deserializer};

use alerts::AlertsFile;
pub use alerts::{AlertsText, DailyText, WebhookText};
pub use batches::BatchLimits;
use batches::BatchesFile;
use budgets::BudgetFile;
pub use budgets::BudgetText;
pub use limits::{LimitSet, LimitSets, TaskCeilings};
use limits::{LimitsFile, TasksFile};
pub use origin::Origin;
use rates::RatesFile;
pub use rates::{DEFAULT_DEVICE_HOUR, DeviceRate, Rates};
use responses::ResponsesFile;
pub use responses::Retention;
use scheduling::SchedulingFile;
pub use scheduling::{Scheduling, Weight, Weights};
use size::bytes;
pub use vectors::Pooling;

use crate::request::Tag;

pub const DEFAULT_MODEL: &str = "smollm2-135m-instruct";

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration file {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("configuration file {path}: {source}")]
    Parse { path: PathBuf, source: Box<toml::de::Error> },
    #[error("{name}: {problem}")]
    Value { name: &'static str, problem: String },
}

/// Which devices compute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Devices {
    /// A CUDA device if there is one, else the processor.
    Auto,
    /// At least one.
    These(Vec<DeviceId>),
}

impl FromStr for Devices {
    type Err = String;

    /// `auto`, or names of devices with commas between.
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let devices =
            text.split(',').map(|name| name.trim().parse()).collect::<Result<Vec<DeviceId>, _>>()?;
        let twice = devices.iter().enumerate().find(|(at, device)| devices[..*at].contains(device));
        match twice {
            None => Ok(Self::These(devices)),
            Some((_, device)) => Err(format!("{device} is named twice")),
        }
    }
}

/// Where tokens come from that are verified several at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Speculative {
    Off,
    /// From what followed the same tokens earlier in the prompt or answer, where that pays.
    Ngram,
}

/// What happens to request fields that this server does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UnknownFields {
    Reject,
    Ignore,
}

/// What flags and environment say about serving; the file has the same names with underscores.
#[derive(Debug, Clone, Default, Args, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServeFlags {
    /// Model by catalog name, from the hub as owner/name or owner/name:file.gguf, or the path of a GGUF file or of
    /// a directory with config.json and safetensors
    #[arg(long, env = "OBOL_MODEL", value_name = "NAME|ID|PATH")]
    pub model: Option<String>,
    /// Branch, tag or commit of a model from the hub [default: main]
    #[arg(long, env = "OBOL_REVISION", value_name = "REV")]
    pub revision: Option<String>,
    /// Precision of the weights: file, f32, f16, bf16, int8 or int4 [default: file, as the file has them]
    #[arg(long, env = "OBOL_QUANT", value_name = "PRECISION")]
    #[serde(default, deserialize_with = "parsed")]
    pub quant: Option<Quant>,
    /// Type of the KV cache: f16, bf16, f32 or int8 [default: f16]
    #[arg(long, env = "OBOL_KV_DTYPE", value_name = "TYPE")]
    #[serde(default, deserialize_with = "parsed")]
    pub kv_dtype: Option<KvDtype>,
    /// Name under which clients ask for the model
    #[arg(long, env = "OBOL_SERVED_MODEL_NAME", value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// Address to listen on [default: 127.0.0.1:8080]
    #[arg(long, env = "OBOL_LISTEN", value_name = "ADDRESS:PORT")]
    pub listen: Option<SocketAddr>,
    /// File with the admin key: from then on every call but the probes needs a key. OBOL_ADMIN_KEY has the key itself
    #[arg(long, env = "OBOL_ADMIN_KEY_FILE", value_name = "FILE")]
    pub admin_key_file: Option<PathBuf>,
    /// File with a key that may read /metrics; without one they are open on loopback, else for the admin key
    #[arg(long, env = "OBOL_METRICS_KEY_FILE", value_name = "FILE")]
    pub metrics_key_file: Option<PathBuf>,
    /// Tags that every request must have, from its key or by itself: team, feature, environment, user, cost_center,
    /// task; several with commas
    #[arg(long, env = "OBOL_REQUIRE_TAGS", value_name = "TAGS", value_delimiter = ',')]
    pub require_tags: Option<Vec<Tag>>,
    /// Listen on another address than loopback without an admin key: anybody who reaches it can spend
    #[arg(long, env = "OBOL_INSECURE_OPEN", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub insecure_open: Option<bool>,
    /// Devices that compute: auto, cpu, cuda:0, or several as cuda:0,cuda:1, each with the whole model unless
    /// --tensor-parallel says otherwise [default: auto, a CUDA device if there is one]
    #[arg(long, env = "OBOL_DEVICE", value_name = "DEVICES")]
    #[serde(default, deserialize_with = "parsed")]
    pub device: Option<Devices>,
    /// Devices that compute each layer of the model together, with a part of it each [default: 1]
    #[arg(long, alias = "tensor-parallel-size", env = "OBOL_TENSOR_PARALLEL", value_name = "DEVICES")]
    #[serde(alias = "tensor_parallel_size")]
    pub tensor_parallel: Option<usize>,
    /// Type of activations on a CUDA device: f32, f16 or bf16 [default: the weights' own, bf16 with int8 and int4]
    #[arg(long, env = "OBOL_DTYPE", value_name = "TYPE")]
    #[serde(default, deserialize_with = "parsed")]
    pub dtype: Option<ComputeDtype>,
    /// Launch decode steps on a CUDA device as recorded graphs [default: true]
    #[arg(long, env = "OBOL_CUDA_GRAPHS", value_name = "BOOL")]
    pub cuda_graphs: Option<bool>,
    /// Share of a CUDA device's memory that weights, buffers and KV cache may have together [default: 0.9]
    #[arg(long, env = "OBOL_DEVICE_MEMORY", value_name = "SHARE")]
    pub device_memory: Option<f64>,
    /// Threads that compute; with several models on the CPU, of each [default: the cores this process may use]
    #[arg(long, env = "OBOL_THREADS")]
    pub threads: Option<usize>,
    /// Longest prompt and answer together, in tokens [default: the model's context, if the KV cache holds it]
    #[arg(long, env = "OBOL_MAX_MODEL_LEN", value_name = "TOKENS")]
    pub max_model_len: Option<usize>,
    /// Most sequences in one step [default: 64]
    #[arg(long, env = "OBOL_MAX_SEQUENCES")]
    pub max_sequences: Option<usize>,
    /// Most tokens computed in one step, decodes and prefill chunks together [default: 512]
    #[arg(long, env = "OBOL_STEP_TOKENS", value_name = "TOKENS")]
    pub step_tokens: Option<usize>,
    /// Requests that may wait; one more gets 429 [default: 1024]
    #[arg(long, env = "OBOL_QUEUE_DEPTH")]
    pub queue_depth: Option<usize>,
    /// Memory for the KV cache, like 512MiB or 4GiB; with several models, of each [default: a quarter of what is
    /// free; on a CUDA device what --device-memory leaves]
    #[arg(long, env = "OBOL_KV_MEMORY", value_name = "BYTES")]
    pub kv_memory: Option<String>,
    /// Tokens in a KV block [default: 16]
    #[arg(long, env = "OBOL_BLOCK_SIZE", value_name = "TOKENS")]
    pub block_size: Option<usize>,
    /// Reuse the KV of equal prefixes [default: true]
    #[arg(long, env = "OBOL_PREFIX_CACHING", value_name = "BOOL")]
    pub prefix_caching: Option<bool>,
    /// Guess the next tokens from the text so far and verify them in one step; answers stay the same [default: ngram]
    #[arg(long, env = "OBOL_SPECULATIVE")]
    pub speculative: Option<Speculative>,
    /// Whose request is next: that of the tenant charged least by its weight, or who came first [default: fair]
    #[arg(long, env = "OBOL_SCHEDULING")]
    pub scheduling: Option<Scheduling>,
    /// A second model, for embeddings: a catalog name (all-minilm-l6-v2) or the directory of a BERT with safetensors
    #[arg(long, env = "OBOL_EMBEDDING_MODEL", value_name = "NAME|PATH")]
    pub embedding_model: Option<String>,
    /// Hidden states of the model that an embedding is made of: last, of the input's last token, or mean, of all [default: last]
    #[arg(long, env = "OBOL_POOLING")]
    pub pooling: Option<Pooling>,
    /// Largest request body, like 8MiB [default: 8MiB]
    #[arg(long, env = "OBOL_MAX_BODY", value_name = "BYTES")]
    pub max_body: Option<String>,
    /// Request fields that the server does not know [default: reject]
    #[arg(long, env = "OBOL_UNKNOWN_FIELDS")]
    pub unknown_fields: Option<UnknownFields>,
    /// Web pages that may call this server, as https://tools.example.com, with commas between; or *, any [default: none]
    #[arg(long, env = "OBOL_CORS_ORIGINS", value_name = "ORIGINS", value_delimiter = ',')]
    pub cors_origins: Option<Vec<Origin>>,
    /// Seconds that running requests get to finish after SIGTERM [default: 30]
    #[arg(long, env = "OBOL_DRAIN_TIMEOUT", value_name = "SECONDS")]
    pub drain_timeout: Option<u64>,
}

/// A setting that is read from its text, in the file as on the command line.
fn parsed<'de, D: Deserializer<'de>, T: FromStr<Err = String>>(text: D) -> Result<Option<T>, D::Error> {
    let text = String::deserialize(text)?;
    text.parse().map(Some).map_err(serde::de::Error::custom)
}

/// Where models and the ledger are kept.
#[derive(Debug, Clone, Default, Args)]
pub struct PlaceFlags {
    /// Directory of the ledger [default: obol under the user's data directory]
    #[arg(long, env = "OBOL_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Configuration file [default: obol.toml in the working directory, if it exists]
    #[arg(long, env = "OBOL_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    data_dir: Option<PathBuf>,
    #[serde(default)]
    serve: ServeFlags,
    #[serde(default)]
    rates: RatesFile,
    #[serde(default)]
    scheduling: SchedulingFile,
    #[serde(default)]
    budgets: Vec<BudgetFile>,
    #[serde(default)]
    limits: LimitsFile,
    #[serde(default)]
    tasks: TasksFile,
    #[serde(default)]
    alerts: AlertsFile,
    #[serde(default)]
    responses: ResponsesFile,
    #[serde(default)]
    batches: BatchesFile,
}

/// Everything resolved.
#[derive(Debug, Clone)]
pub struct Config {
    pub model: String,
    pub revision: Option<String>,
    pub quant: Quant,
    pub kv_dtype: KvDtype,
    pub served_model_name: Option<String>,
    pub listen: SocketAddr,
    pub admin_key_file: Option<PathBuf>,
    pub metrics_key_file: Option<PathBuf>,
    pub require_tags: Vec<Tag>,
    pub insecure_open: bool,
    pub device: Devices,
    pub tensor_parallel: usize,
    pub dtype: Option<ComputeDtype>,
    pub cuda_graphs: bool,
    pub device_memory: f64,
    pub threads: Option<usize>,
    pub max_model_len: Option<usize>,
    pub max_sequences: usize,
    pub step_tokens: usize,
    pub queue_depth: usize,
    pub kv_memory: Option<u64>,
    pub block_size: usize,
    pub prefix_caching: bool,
    pub speculative: Speculative,
    pub scheduling: Scheduling,
    /// Of tenants, for fair scheduling.
    pub weights: Weights,
    pub embedding_model: Option<String>,
    pub pooling: Pooling,
    /// The tenants that may ask for the tier `priority`; `None`: all.
    pub priority: Option<Vec<String>>,
    pub max_body: usize,
    pub unknown_fields: UnknownFields,
    /// Whose web pages may call this server.
    pub cors_origins: Vec<Origin>,
    pub drain_timeout: Duration,
    pub data_dir: PathBuf,
    pub rates: Rates,
    pub budgets: Vec<BudgetText>,
    pub limits: LimitSets,
    pub tasks: TaskCeilings,
    pub alerts: AlertsText,
    pub responses: Retention,
    pub batches: BatchLimits,
}

/// The ledger's directory for commands that only read it.
///
/// # Errors
/// When the configuration file cannot be read or understood.
pub fn data_dir(places: &PlaceFlags, default: PathBuf) -> Result<PathBuf, ConfigError> {
    let file = read_file(places.config.as_deref())?;
    Ok(places.data_dir.clone().or(file.data_dir).unwrap_or(default))
}

/// The budgets that the configuration file names, as text.
///
/// # Errors
/// When it cannot be read or understood.
pub fn budgets(places: &PlaceFlags) -> Result<Vec<BudgetText>, ConfigError> {
    let file = read_file(places.config.as_deref())?;
    Ok(file.budgets.into_iter().map(Into::into).collect())
}

impl Config {
    /// # Errors
    /// Names the setting that is wrong and what it may be.
    pub fn resolve(
        flags: ServeFlags,
        places: &PlaceFlags,
        default_data_dir: PathBuf,
    ) -> Result<Self, ConfigError> {
        let file = read_file(places.config.as_deref())?;
        let serve = file.serve;
        // The file's revision is one of the file's model.
        let revision = serve.revision.filter(|_| flags.model.is_none());
        let config = Self {
            model: flags.model.or(serve.model).unwrap_or_else(|| DEFAULT_MODEL.into()),
            revision: flags.revision.or(revision),
            quant: flags.quant.or(serve.quant).unwrap_or_default(),
            kv_dtype: flags.kv_dtype.or(serve.kv_dtype).unwrap_or_default(),
            served_model_name: flags.served_model_name.or(serve.served_model_name),
            listen: flags.listen.or(serve.listen).unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 8080))),
            admin_key_file: flags.admin_key_file.or(serve.admin_key_file),
            metrics_key_file: flags.metrics_key_file.or(serve.metrics_key_file),
            require_tags: flags.require_tags.or(serve.require_tags).unwrap_or_default(),
            insecure_open: flags.insecure_open.or(serve.insecure_open).unwrap_or(false),
            device: flags.device.or(serve.device).unwrap_or(Devices::Auto),
            tensor_parallel: flags.tensor_parallel.or(serve.tensor_parallel).unwrap_or(1),
            dtype: flags.dtype.or(serve.dtype),
            cuda_graphs: flags.cuda_graphs.or(serve.cuda_graphs).unwrap_or(true),
            device_memory: flags.device_memory.or(serve.device_memory).unwrap_or(0.9),
            threads: flags.threads.or(serve.threads),
            max_model_len: flags.max_model_len.or(serve.max_model_len),
            max_sequences: flags.max_sequences.or(serve.max_sequences).unwrap_or(64),
            step_tokens: flags.step_tokens.or(serve.step_tokens).unwrap_or(512),
            queue_depth: flags.queue_depth.or(serve.queue_depth).unwrap_or(1024),
            kv_memory: bytes("kv_memory", flags.kv_memory.or(serve.kv_memory))?,
            block_size: flags.block_size.or(serve.block_size).unwrap_or(16),
            prefix_caching: flags.prefix_caching.or(serve.prefix_caching).unwrap_or(true),
            speculative: flags.speculative.or(serve.speculative).unwrap_or(Speculative::Ngram),
            scheduling: flags.scheduling.or(serve.scheduling).unwrap_or(Scheduling::Fair),
            priority: file.scheduling.priority.clone(),
            weights: file.scheduling.weights()?,
            embedding_model: flags.embedding_model.or(serve.embedding_model),
            pooling: flags.pooling.or(serve.pooling).unwrap_or_default(),
            max_body: bytes("max_body", flags.max_body.or(serve.max_body))?.map_or(8 << 20, |b| b as usize),
            cors_origins: flags.cors_origins.or(serve.cors_origins).unwrap_or_default(),
            unknown_fields: flags.unknown_fields.or(serve.unknown_fields).unwrap_or(UnknownFields::Reject),
            drain_timeout: Duration::from_secs(flags.drain_timeout.or(serve.drain_timeout).unwrap_or(30)),
            data_dir: places.data_dir.clone().or(file.data_dir).unwrap_or(default_data_dir),
            rates: Rates::resolve(file.rates)?,
            budgets: file.budgets.into_iter().map(Into::into).collect(),
            limits: file.limits.resolve()?,
            tasks: file.tasks.into(),
            alerts: file.alerts.into(),
            responses: file.responses.resolve()?,
            batches: file.batches.resolve()?,
        };
        config.check()?;
        Ok(config)
    }

    /// Whether an engine can have such steps.
    ///
    /// # Errors
    /// Names the one that is wrong and what it may be.
    pub fn check_steps(max_sequences: usize, step_tokens: usize) -> Result<(), ConfigError> {
        let wrong = |name, problem| Err(ConfigError::Value { name, problem });
        if !(1..=4096).contains(&max_sequences) {
            return wrong("max_sequences", format!("{max_sequences} is not between 1 and 4096"));
        }
        if step_tokens < max_sequences || step_tokens > 1 << 16 {
            let problem = format!("{step_tokens} is not between max_sequences ({max_sequences}) and 65536");
            return wrong("step_tokens", problem);
        }
        Ok(())
    }

    /// Whether the server may listen where it is told to.
    ///
    /// # Errors
    /// When other machines could reach it without keys.
    pub fn check_open(&self, has_admin_key: bool) -> Result<(), ConfigError> {
        if self.listen.ip().is_loopback() || has_admin_key || self.insecure_open {
            return Ok(());
        }
        let problem = format!(
            "{} is open to other machines, and without an admin key anybody who reaches it can spend; give one with \
             --admin-key-file or OBOL_ADMIN_KEY, listen on 127.0.0.1, or say --insecure-open if only trusted clients \
             reach it",
            self.listen
        );
        Err(ConfigError::Value { name: "listen", problem })
    }

    fn check(&self) -> Result<(), ConfigError> {
        let wrong = |name, problem: String| Err(ConfigError::Value { name, problem });
        Self::check_steps(self.max_sequences, self.step_tokens)?;
        if !(0.05..=1.0).contains(&self.device_memory) {
            return wrong("device_memory", format!("{} is not between 0.05 and 1", self.device_memory));
        }
        if self.tensor_parallel == 0 {
            return wrong("tensor_parallel", "0 devices cannot compute; use at least 1".into());
        }
        if self.queue_depth == 0 {
            return wrong("queue_depth", "0 would refuse every request; use at least 1".into());
        }
        if !matches!(self.block_size, 16 | 32 | 64) {
            return wrong("block_size", format!("{} is not 16, 32 or 64", self.block_size));
        }
        if self.threads.is_some_and(|t| t == 0 || t > 1024) {
            return wrong("threads", "must be between 1 and 1024".into());
        }
        if self.max_model_len.is_some_and(|n| n < 2) {
            return wrong("max_model_len", "must be at least 2: a token of prompt and one of answer".into());
        }
        Ok(())
    }
}

/// An explicit file must exist; `obol.toml` in the working directory may.
fn read_file(path: Option<&Path>) -> Result<File, ConfigError> {
    let (path, required) = path.map_or((Path::new("obol.toml"), false), |path| (path, true));
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !required => return Ok(File::default()),
        Err(source) => return Err(ConfigError::Read { path: path.into(), source }),
    };
    toml::from_str(&text).map_err(|source| ConfigError::Parse { path: path.into(), source: Box::new(source) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(file: &str, flags: ServeFlags) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("obol.toml");
        fs::write(&path, file).unwrap();
        Config::resolve(flags, &PlaceFlags { data_dir: None, config: Some(path) }, "data".into())
    }

    #[test]
    fn a_device_has_its_own_price_or_that_of_all() {
        let file = "[rates]\ndevice_hour = 2.5\n[rates.devices.'cuda:1']\ndevice_hour = '1.99'\n\
                    [rates.devices.cpu]\nkv_share = 0.5\n";
        let rates = resolve(file, ServeFlags::default()).unwrap().rates;
        let check = |device, hour: &str, share: &str| {
            let rate = rates.of(device);
            assert_eq!((rate.device_hour.as_str(), rate.kv_share.as_str()), (hour, share), "{device}");
        };
        check(DeviceId::Cuda(0), "2.5", "0.20");
        check(DeviceId::Cuda(1), "1.99", "0.20");
        check(DeviceId::Cpu(0), "2.5", "0.5");
        check(DeviceId::Cpu(1), "2.5", "0.20");
        assert!(!rates.is_default);
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let flags = ServeFlags { max_sequences: Some(3), ..ServeFlags::default() };
        let file = "data_dir = 'x'\n[serve]\nmax_sequences = 5\nqueue_depth = 7\nkv_memory = '1.5GiB'\n\
                    [rates]\ndevice_hour = 2.5\nkv_share = '0.3'\n";
        let config = resolve(file, flags).unwrap();
        assert_eq!((config.max_sequences, config.queue_depth, config.step_tokens), (3, 7, 512));
        assert_eq!(config.kv_memory, Some(1_610_612_736));
        assert_eq!((config.rates.device_hour.as_str(), config.rates.kv_share.as_str()), ("2.5", "0.3"));
        assert_eq!(config.data_dir, Path::new("x"));
        assert!(!config.rates.is_default);
        assert_eq!((config.quant, config.kv_dtype), (Quant::File, KvDtype::F16));
    }

    #[test]
    fn other_machines_are_let_in_with_keys_or_by_name() {
        let open = |file: &str, has_admin_key| {
            resolve(file, ServeFlags::default()).unwrap().check_open(has_admin_key).map_err(|e| e.to_string())
        };
        open("[serve]\nlisten = '127.0.0.1:80'", false).unwrap();
        open("[serve]\nlisten = '[::1]:80'", false).unwrap();
        open("[serve]\nlisten = '0.0.0.0:80'", true).unwrap();
        open("[serve]\nlisten = '0.0.0.0:80'\ninsecure_open = true", false).unwrap();
        let said = open("[serve]\nlisten = '0.0.0.0:80'", false).unwrap_err();
        assert!(said.contains("--admin-key-file") && said.contains("--insecure-open"), "{said}");
    }

    #[test]
    fn precisions_are_read_by_their_names() {
        let file = "[serve]\nquant = 'int4'\nkv_dtype = 'int8'\nrevision = 'v1'\nspeculative = 'off'\n";
        let config = resolve(file, ServeFlags::default()).unwrap();
        assert_eq!(config.speculative, Speculative::Off);
        assert_eq!(resolve("", ServeFlags::default()).unwrap().speculative, Speculative::Ngram);
        assert_eq!((config.quant, config.kv_dtype), (Quant::Int4, KvDtype::Int8));
        assert_eq!(config.revision.as_deref(), Some("v1"));
        let flags = ServeFlags { quant: Some(Quant::F32), ..ServeFlags::default() };
        assert_eq!(resolve(file, flags).unwrap().quant, Quant::F32);
    }

    #[test]
    fn wrong_settings_are_named() {
        let says = |file: &str, part: &str| {
            let error = resolve(file, ServeFlags::default()).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        says("[serve]\nmax_seqs = 3", "max_seqs");
        says("[serve]\nblock_size = 7", "block_size: 7 is not 16, 32 or 64");
        says("[serve]\nkv_memory = 'lots'", "kv_memory: `lots` is not a size");
        says("[serve]\nrequire_tags = ['team', 'colour']", "`colour` is no tag");
        says("[serve]\nstep_tokens = 3", "step_tokens");
        says("[serve]\nquant = 'q4'", "choose file, f32, f16, bf16, int8 or int4");
        says("[serve]\nkv_dtype = 'fp8'", "choose f16, bf16, f32 or int8");
        says("[serve]\ndevice = 'gpu'", "choose auto, cpu, or cuda:0");
        says("[serve]\ndevice = 'cuda:0,cuda:0'", "cuda:0 is named twice");
        says("[rates.devices.gpu]\ndevice_hour = 1", "rates.devices: `gpu` is no device");
        says("[rates.devices.cpu]\n[rates.devices.'cpu:0']", "cpu:0 is priced twice");
        says("[serve]\ntensor_parallel = 0", "tensor_parallel: 0 devices");
        says("[serve]\ndtype = 'fp8'", "choose f32, f16 or bf16");
        says("[serve]\ndevice_memory = 1.5", "device_memory: 1.5 is not between 0.05 and 1");
        says("broken", "obol.toml");
    }
}
