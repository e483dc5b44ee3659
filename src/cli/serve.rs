//! `obol serve`: parts -> serve -> drain. The listener opens first, so that a taken port is known at
//! once and probes get an answer while the model loads; the ledger opens before the model, so that
//! loading is on the bill.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use obol_models::batch::CausalLm;
use obol_models::device::DeviceId;
use obol_models::load::ModelInfo;
use tokio::net::{TcpListener, TcpSocket};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use crate::alerting::{self, Alerting, Webhook};
use crate::archive::Archive;
use crate::batches::Batches;
use crate::clock::{Clock, SystemClock};
use crate::config::{Config, PlaceFlags, ServeFlags, WebhookText};
use crate::control::alerts::rules::Rules as AlertRules;
use crate::control::{ConfiguredKey, Control, rules};
use crate::engine::EngineConfig;
use crate::http::{self, Access, HttpConfig, MetricsAccess, Server};
use crate::ledger::{DeviceInfo, Ledger, MeteredDevice, MethodRecord, OpenOptions, RateCard, Tuning};
use crate::meter::partition::Partition;
use crate::metrics::Metrics;
use crate::nvml::Probe;
use crate::pipeline::{self, Admission, App, Policy, Replica, Replicas, Served};
use crate::units::{RequestId, UnixNanos};
use crate::usage::MeterReport;

use super::devices::{self, Engines};
use super::embedding::{self, Embedding};
use super::parts::{self, Early, Ready};
use super::{Directories, Failure, files, model};

/// After the last request, how long open connections get to read what was sent.
const LINGER: Duration = Duration::from_secs(5);

pub(super) fn run(
    flags: ServeFlags,
    places: &PlaceFlags,
    directories: &Directories,
) -> Result<ExitCode, Failure> {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::start());
    let mut config = Config::resolve(flags, places, directories.data.clone()).map_err(Failure::usage)?;
    let admin = admin_key(&config, directories)?;
    config.check_open(admin.is_some()).map_err(Failure::usage)?;
    let metrics = metrics_access(&config)?;
    let engines = devices::choose(&mut config)?;
    embedding::check(&config, &engines)?;
    // Each connection is an open file, and the usual limit of 1,024 is soon reached.
    if let Err(error) = rlimit::increase_nofile_limit(rlimit::INFINITY) {
        tracing::warn!("the limit of open files could not be raised: {error}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(Failure::failed)?;
    let outcome = runtime.block_on(serve(config, (admin, metrics), engines, clock, directories));
    // A start that was interrupted may still be loading; nobody waits for it.
    runtime.shutdown_background();
    outcome.map(|()| ExitCode::SUCCESS)
}

/// The key that the file has, or the variable.
fn admin_key(config: &Config, directories: &Directories) -> Result<Option<ConfiguredKey>, Failure> {
    if let Some(file) = &config.admin_key_file {
        return configured_key("--admin-key-file", file).map(Some);
    }
    let Some(text) = &directories.admin_key else { return Ok(None) };
    let text = text.to_str().ok_or_else(|| Failure::usage("OBOL_ADMIN_KEY: it is not UTF-8"))?;
    let key = ConfiguredKey::new(text);
    key.map(Some).map_err(|problem| Failure::usage(format!("OBOL_ADMIN_KEY: {problem}")))
}

fn configured_key(flag: &str, file: &Path) -> Result<ConfiguredKey, Failure> {
    let text = files::read(flag, file)?;
    ConfiguredKey::new(&text)
        .map_err(|problem| Failure::usage(format!("{flag}: {}: {problem}", file.display())))
}

fn metrics_access(config: &Config) -> Result<MetricsAccess, Failure> {
    match &config.metrics_key_file {
        Some(file) => Ok(MetricsAccess::Keyed(Some(configured_key("--metrics-key-file", file)?))),
        None if config.listen.ip().is_loopback() => Ok(MetricsAccess::Everybody),
        None => Ok(MetricsAccess::Keyed(None)),
    }
}

/// Who may do what, once the data directory is ours.
fn access(
    config: &Config,
    (admin, metrics): (Option<ConfiguredKey>, MetricsAccess),
    clock: Arc<dyn Clock>,
) -> Result<Access, Failure> {
    let control = Control::open(&config.data_dir, clock).map_err(Failure::failed)?;
    if admin.is_none() && !control.keys().map_err(Failure::failed)?.is_empty() {
        tracing::warn!("there are keys but no admin key: who sends none is served too; see --admin-key-file");
    }
    Ok(Access {
        control: Some(control),
        admin,
        metrics,
        require_tags: config.require_tags.clone().into(),
        priority: config.priority.clone().map(Into::into),
    })
}

/// Connections that may wait to be accepted, as far as the system lets them: of more that come at once, some are reset.
const BACKLOG: u32 = 16_384;

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // As soon as a server has stopped the next one gets its address.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// With the keys' own budgets.
fn admission(policy: Policy, access: &Access, ledger: &Ledger, now: UnixNanos) -> Result<Admission, Failure> {
    let keys = access.control.as_ref().map_or(Ok(Vec::new()), Control::keys).map_err(Failure::failed)?;
    let living = keys.into_iter().map(|(key, _)| key).filter(|key| key.deleted.is_none());
    Admission::new(policy, living, ledger, now).map_err(Failure::failed)
}

/// The webhooks that the configuration names.
fn webhooks(config: &Config) -> Result<Vec<Webhook>, Failure> {
    let named = |(at, text): (usize, &WebhookText)| {
        let at = at + 1;
        let url = match (&text.url, &text.url_file) {
            (Some(url), None) => url.clone(),
            (None, Some(file)) => files::read(&format!("alerts.webhooks {at}: url_file"), file)?,
            _ => return Err(Failure::usage(format!("alerts.webhooks {at}: give it a url or a url_file"))),
        };
        let webhook = Webhook::parse(at, &url, text.format.as_deref()).map_err(Failure::usage)?;
        let Some(file) = &text.ca_file else { return Ok(webhook) };
        let pem = files::read(&format!("alerts.webhooks {at}: ca_file"), file)?;
        webhook.trusting(at, &pem).map_err(Failure::usage)
    };
    config.alerts.webhooks.iter().enumerate().map(named).collect()
}

async fn serve(
    config: Config,
    keys: (Option<ConfiguredKey>, MetricsAccess),
    engines: Engines,
    clock: Arc<dyn Clock>,
    directories: &Directories,
) -> Result<(), Failure> {
    let metered = devices::metered(&engines, &config)?;
    let rules = rules::parse(&config.budgets).map_err(Failure::usage)?;
    let policy = Policy::new(rules, config.limits.clone(), &config.tasks).map_err(Failure::usage)?;
    let alert_rules = AlertRules::parse(&config.alerts).map_err(Failure::usage)?;
    let webhooks = webhooks(&config)?;
    let listener = listen(config.listen).map_err(|error| {
        let address = config.listen;
        Failure::failed(format!("cannot listen on {address}: {error}; choose another address with --listen"))
    })?;
    let address = listener.local_addr().map_err(Failure::failed)?;
    let start = UnixNanos(clock.wall().0.saturating_sub(clock.now().0));
    let options = OpenOptions { engines: metered.clone(), wall: start, boot_id: RequestId::new().0 };
    let opened = Ledger::open_tuned(&config.data_dir, &options, Tuning::default());
    let (ledger, reports) = opened.map_err(Failure::failed)?;
    let early = |reports: &mpsc::Sender<MeterReport>| Early {
        clock: clock.clone(),
        partition: Partition::default(),
        reports: reports.clone(),
    };
    let earlies = || reports.iter().map(early).collect::<Vec<_>>();
    let ready = access(&config, keys, clock.clone()).and_then(|access| {
        let admission = admission(policy, &access, &ledger, clock.wall())?;
        let alerting = Alerting::start(alerting::Parts {
            data_dir: config.data_dir.clone(),
            rules: alert_rules,
            webhooks,
            budgets: admission.budgets().clone(),
            ledger: ledger.clone(),
            control: access.control.clone(),
            clock: clock.clone(),
            currency: config.rates.currency.clone(),
            tuning: alerting::Tuning::default(),
        });
        let archive = Archive::open(&config.data_dir, config.responses, clock.clone());
        let batches = Batches::open(&config.data_dir, clock.clone(), config.batches);
        let kept = (archive.map_err(Failure::failed)?, batches.map_err(Failure::failed)?);
        Ok((access, admission, alerting.map_err(Failure::failed)?, kept))
    });
    let (access, admission, alerting, (archive, batches)) = match ready {
        Ok(ready) => ready,
        Err(failure) => {
            earlies().into_iter().for_each(Early::give_up);
            close_ledger(ledger).await?;
            return Err(failure);
        }
    };
    let mut stop = Stop::listen()?;

    let mut http_config = HttpConfig::new(devices::label(&metered.concat()), config.rates.currency.clone());
    http_config.unknown_fields = config.unknown_fields;
    http_config.cors_origins.clone_from(&config.cors_origins);
    http_config.body_bytes_max = config.max_body;
    http_config.batches = Some(batches);
    let control = access.control.clone();
    let server = Server::loading(http_config, access, ledger.clone(), archive);
    let (close, closed) = oneshot::channel::<()>();
    let serving = tokio::spawn(http::serve(listener, server.clone(), async {
        // Dropped or sent: either way it is time to close.
        drop(closed.await);
    }));

    let phase = Arc::new(Mutex::new(Phase::Loading));
    let starting = Starting {
        phase: phase.clone(),
        config: config.clone(),
        directories: directories.clone(),
        ledger: ledger.clone(),
        admission,
        alerting: alerting.clone(),
        engines,
        metered,
        address: address.to_string(),
    };
    let starting_earlies = earlies();
    let mut started = tokio::task::spawn_blocking(move || starting.run(starting_earlies));
    let mut stopped = false;
    let started = tokio::select! {
        started = &mut started => started,
        () = stop.requested() => {
            stopped = true;
            let was = std::mem::replace(&mut *lock(&phase), Phase::Stopped);
            if was == Phase::Loading {
                earlies().into_iter().for_each(Early::give_up);
                return close_ledger(ledger).await;
            }
            started.await
        }
    };
    drop(reports);
    let (app, banner) = match started.map_err(Failure::failed)? {
        Ok(started) => started,
        Err(failure) => {
            close_ledger(ledger).await?;
            return Err(failure);
        }
    };
    server.ready(app.clone());
    if let Some(control) = control {
        // It ends with the runtime.
        tokio::spawn(pipeline::follow(app.clone(), control));
    }
    let runner = http::Runner::start(&server);
    print(&banner);

    if !stopped {
        tokio::select! {
            () = stop.requested() => {}
            () = engine_death(&app) => {
                // Its last report is on the way to the disk. The epoch stays open on purpose: from its last
                // checkpoint to the next start the device's time is booked as lost to a crash.
                tokio::time::sleep(Duration::from_secs(1)).await;
                return Err(Failure::failed("the engine has stopped; the log says why. Start the server again"));
            }
        }
    }
    drain(&app, config.drain_timeout, &mut stop).await;
    runner.stop().await;
    let engines = app.engines().clone();
    tokio::task::spawn_blocking(move || engines.shutdown()).await.map_err(Failure::failed)?;
    let _closing = close.send(());
    match tokio::time::timeout(LINGER, serving).await {
        Ok(ended) => ended.map_err(Failure::failed)?.map_err(Failure::failed)?,
        Err(_) => tracing::warn!("connections still open after the last answer are cut"),
    }
    tokio::task::spawn_blocking(move || alerting.close()).await.map_err(Failure::failed)?;
    close_ledger(ledger).await
}

/// Resolves when an engine's thread has ended by itself.
async fn engine_death(app: &App) {
    while !app.engines().is_dead() {
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// How far starting is: whoever changes it first decides whether there will be an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Loading,
    Running,
    Stopped,
}

fn lock(phase: &Mutex<Phase>) -> MutexGuard<'_, Phase> {
    phase.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn close_ledger(ledger: Ledger) -> Result<(), Failure> {
    let closed = tokio::task::spawn_blocking(move || ledger.close()).await;
    closed.map_err(Failure::failed)?.map_err(Failure::failed)
}

/// Everything that takes long: fetch, load, calibrate, start the engine.
struct Starting {
    phase: Arc<Mutex<Phase>>,
    config: Config,
    directories: Directories,
    ledger: Ledger,
    admission: Admission,
    alerting: Alerting,
    engines: Engines,
    metered: Vec<Vec<MeteredDevice>>,
    address: String,
}

impl Starting {
    /// `earlies`: the meter of each engine.
    fn run(self, mut earlies: Vec<Early>) -> Result<(Arc<App>, String), Failure> {
        let config = &self.config;
        let threads = devices::threads(config, self.engines.len());
        let mut begin = Instant::now();
        let located = model::locate(&config.model, config.revision.as_deref(), &self.directories);
        let prepared = located.and_then(|located| {
            begin = Instant::now();
            let further: Vec<DeviceId> = self.engines[1..].iter().map(|devices| devices[0]).collect();
            let loaded = parts::load_model(&located.file, config, threads, &further)?;
            let mut embedding = self.embedding(threads, &earlies)?;
            let mut ready =
                self.prepare(&loaded.info, loaded.tokenizer.end_tokens(), threads, &mut earlies, {
                    let mut models = vec![loaded.model];
                    models.extend(loaded.replicas);
                    models
                })?;
            if let Some(embedding) = &mut embedding {
                embedding.equip(&mut ready);
            }
            Ok((located.id, located.alias, loaded.info, loaded.tokenizer, loaded.template, ready, embedding))
        });
        let (catalog_id, alias, info, tokenizer, template, ready, embedding) = match prepared {
            Ok(prepared) => prepared,
            Err(failure) => {
                earlies.into_iter().for_each(Early::give_up);
                return Err(failure);
            }
        };
        for (engine, ready) in ready.iter().enumerate() {
            let (id, json) = (ready.calibration.method_id(), ready.calibration.json());
            self.ledger.record_method(engine, MethodRecord { id, json });
        }
        let clock = earlies[0].clock.clone();
        let engines = {
            let mut phase = lock(&self.phase);
            if *phase == Phase::Stopped {
                return Err(Failure::failed("stopped while loading"));
            }
            *phase = Phase::Running;
            let devices = self.engines.iter().zip(&self.metered);
            let start =
                |((ready, early), (devices, metered)): ((Ready, Early), (&Vec<_>, &Vec<_>))| Replica {
                    engine: parts::start(ready, early, devices),
                    device: devices::label(metered).into(),
                    rates: metered.iter().map(|device| device.rate.clone()).collect(),
                };
            Replicas::new(ready.into_iter().zip(earlies).zip(devices).map(start).collect())
        };
        let id = config.served_model_name.clone().unwrap_or_else(|| catalog_id.clone());
        let mut banner = self.banner(&id, &info, threads, engines.config(), begin.elapsed());
        if let Some(Embedding { line, .. }) = &embedding {
            banner = format!("{line}\n{banner}");
        }
        let served = Served {
            aliases: [catalog_id, info.name].into_iter().chain(alias).collect(),
            created: clock.wall().0 / 1_000_000_000,
            precision: info.precision,
            device: devices::label(&self.metered.concat()),
            context_length: engines.config().max_model_len,
            pooling: config.pooling,
            row_invariant: true,
            fingerprint: info.fingerprint[..12].to_owned(),
            id,
        };
        let probes = self.probes();
        let app = App::new(pipeline::Parts {
            engines,
            ledger: self.ledger,
            admission: self.admission,
            alerting: self.alerting,
            tokenizer,
            template,
            served,
            embedder: embedding.map(|embedding| embedding.embedder),
            clock,
            metrics: Metrics::new(),
            probes,
            tokenizing_max: (threads * self.engines.len()).max(2),
        });
        Ok((app, banner))
    }

    /// The encoder for each engine, if one is configured.
    fn embedding(&self, threads: usize, earlies: &[Early]) -> Result<Option<Embedding>, Failure> {
        let created = earlies[0].clock.wall().0 / 1_000_000_000;
        let device = devices::label(&self.metered.concat());
        embedding::load(&self.config, &self.directories, (self.engines.len(), threads), created, device)
    }

    /// Sizes and calibrates each engine's model, one after another.
    fn prepare(
        &self,
        info: &ModelInfo,
        end_tokens: &[u32],
        threads: usize,
        earlies: &mut [Early],
        models: Vec<Box<dyn CausalLm>>,
    ) -> Result<Vec<Ready>, Failure> {
        let mut config = self.config.clone();
        if models.len() > 1 && matches!(self.engines[0][0], DeviceId::Cpu(_)) {
            // They share the machine's memory.
            let each = parts::kv_memory(&config)? / models.len() as u64;
            config.kv_memory.get_or_insert(each);
        }
        let ready = models
            .into_iter()
            .zip(earlies)
            .map(|(model, early)| parts::prepare(model, info, end_tokens, &config, threads, early));
        ready.collect()
    }

    /// The devices that say more of themselves than the meter sees.
    fn probes(&self) -> Vec<(String, Probe)> {
        let devices = self.engines.iter().flatten().zip(self.metered.iter().flatten());
        let open = |(device, metered): (&DeviceId, &MeteredDevice)| {
            let id = metered.info.id.clone();
            match Probe::open(*device) {
                Ok(probe) => Some((id, probe?)),
                Err(reason) => {
                    tracing::warn!("no energy and load of {id} in /metrics: NVML: {reason}");
                    None
                }
            }
        };
        devices.filter_map(open).collect()
    }

    /// What the engines run on, a line each.
    fn device_lines(&self, threads: usize) -> Vec<String> {
        let line = |devices: &Vec<MeteredDevice>| {
            let (ids, DeviceInfo { kind, name, .. }) = (devices::label(devices), &devices[0].info);
            let plural = if threads == 1 { "" } else { "s" };
            let threads = if kind == "cpu" { format!(", {threads} thread{plural}") } else { String::new() };
            format!("device    {ids}: {name}{threads}")
        };
        self.metered.iter().map(line).collect()
    }

    /// Prices, a line for each that differs.
    fn rate_lines(&self) -> Vec<String> {
        let rates = &self.config.rates;
        let default = if rates.is_default { ", the default: set your own in obol.toml, [rates]" } else { "" };
        let mut cards: Vec<(&RateCard, Vec<&str>)> = Vec::new();
        for MeteredDevice { info, rate } in self.metered.iter().flatten() {
            match cards.iter_mut().find(|(known, _)| *known == rate) {
                Some((_, ids)) => ids.push(&info.id),
                None => cards.push((rate, vec![&info.id])),
            }
        }
        let several = cards.len() > 1;
        let line = |(rate, ids): (&RateCard, Vec<&str>)| {
            let of = if several { format!("{}: ", ids.join(",")) } else { String::new() };
            let (hour, share) = (rate.device_hour_decimal(), rate.kv_share_decimal());
            format!(
                "rate      {of}{hour} {} a device-hour, {share} of it through KV memory{default}",
                rate.currency()
            )
        };
        cards.into_iter().map(line).collect()
    }

    fn banner(
        &self,
        id: &str,
        info: &ModelInfo,
        threads: usize,
        sizes: &EngineConfig,
        took: Duration,
    ) -> String {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let address = &self.address;
        let of_each = if self.engines.len() > 1 { ", on each" } else { "" };
        let model = format!(
            "model     {id}: {} ({}), {}, {:.0} MiB of weights",
            info.name,
            info.architecture,
            info.precision,
            mib(info.weight_bytes)
        );
        let sizes = [
            format!(
                "kv cache  {} blocks of {} tokens, {:.0} KiB each, {:.0} MiB in all{of_each}",
                sizes.blocks,
                sizes.block_size,
                sizes.bytes_per_block as f64 / 1024.0,
                mib(sizes.blocks as u64 * sizes.bytes_per_block)
            ),
            format!(
                "limits    {} tokens a request, {} sequences and {} tokens a step, {} requests in the queue",
                sizes.max_model_len, sizes.max_sequences, sizes.step_tokens, sizes.queue_depth
            ),
        ];
        let end = [
            format!("ledger    {}", self.config.data_dir.display()),
            format!("ready     http://{address}, {:.2} s after the model was found", took.as_secs_f64()),
            String::new(),
            format!(
                "curl -i http://{address}/v1/chat/completions -H 'content-type: application/json' \\\n  \
                 -d '{{\"model\": \"{id}\", \"messages\": [{{\"role\": \"user\", \
                 \"content\": \"What is a coin?\"}}], \"max_tokens\": 48}}'\n"
            ),
        ];
        let lines = [vec![model], self.device_lines(threads), sizes.into(), self.rate_lines(), end.into()];
        lines.concat().join("\n")
    }
}

/// Refuses new requests and waits for running ones, until the deadline or a second signal.
async fn drain(app: &App, timeout: Duration, stop: &mut Stop) {
    app.drain();
    let (running, waiting) = app
        .engines()
        .stats()
        .fold((0, 0), |(running, waiting), (_, stats)| (running + stats.running, waiting + stats.waiting));
    tracing::info!(
        "draining: {running} sequences run and {waiting} wait; they have {} s to finish",
        timeout.as_secs()
    );
    tokio::select! {
        () = app.idle() => return,
        () = tokio::time::sleep(timeout) => {}
        () = stop.requested() => {}
    }
    tracing::warn!("what still runs is cut off, and settled for what it used");
}

/// SIGTERM or SIGINT.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn listen() -> Result<Self, Failure> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).map_err(Failure::failed)?,
            interrupt: signal(SignalKind::interrupt()).map_err(Failure::failed)?,
        })
    }

    async fn requested(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// A closed standard output is no reason not to serve.
fn print(banner: &str) {
    let mut out = std::io::stdout().lock();
    if out.write_all(banner.as_bytes()).and_then(|()| out.flush()).is_err() {
        tracing::info!("standard output is closed");
    }
}
