//! `obol serve`: parts -> serve -> drain. The listener opens first, so that a taken port is known at
//! once and probes get an answer while the model loads; the ledger opens before the model, so that
//! loading is on the bill.

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use obol_models::device::{self, DeviceId};
use obol_models::load::ModelInfo;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use crate::clock::{Clock, SystemClock};
use crate::config::{Config, PlaceFlags, ServeFlags};
use crate::engine::EngineConfig;
use crate::http::{self, HttpConfig, Server};
use crate::ledger::{DeviceInfo, Ledger, MethodRecord, OpenOptions, RateCard};
use crate::meter::partition::Partition;
use crate::metrics::Metrics;
use crate::nvml::Probe;
use crate::pipeline::{self, App, Served};
use crate::units::{RequestId, UnixNanos};

use super::parts::{self, Early};
use super::{Directories, Failure, model};

/// After the last request, how long open connections get to read what was sent.
const LINGER: Duration = Duration::from_secs(5);

pub(super) fn run(
    flags: ServeFlags,
    places: &PlaceFlags,
    directories: &Directories,
) -> Result<ExitCode, Failure> {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::start());
    let mut config = Config::resolve(flags, places, directories.data.clone()).map_err(Failure::usage)?;
    let device = parts::choose_device(&mut config)?;
    // Each connection is an open file, and the usual limit of 1,024 is soon reached.
    if let Err(error) = rlimit::increase_nofile_limit(rlimit::INFINITY) {
        tracing::warn!("the limit of open files could not be raised: {error}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(Failure::failed)?;
    let outcome = runtime.block_on(serve(config, device, clock, directories));
    // A start that was interrupted may still be loading; nobody waits for it.
    runtime.shutdown_background();
    outcome.map(|()| ExitCode::SUCCESS)
}

async fn serve(
    config: Config,
    device: DeviceId,
    clock: Arc<dyn Clock>,
    directories: &Directories,
) -> Result<(), Failure> {
    let rates = &config.rates;
    let rate = RateCard::parse(&rates.device_hour, &rates.kv_share, &rates.currency, None)
        .map_err(|error| Failure::usage(format!("rates: {error}")))?;
    let listener = TcpListener::bind(config.listen).await.map_err(|error| {
        let address = config.listen;
        Failure::failed(format!("cannot listen on {address}: {error}; choose another address with --listen"))
    })?;
    let address = listener.local_addr().map_err(Failure::failed)?;
    let device = match device {
        DeviceId::Cpu(_) => DeviceInfo { id: "cpu".into(), kind: "cpu".into(), name: processor() },
        DeviceId::Cuda(index) => DeviceInfo {
            id: device.to_string(),
            kind: "cuda".into(),
            name: device::cuda_facts(index).map_err(Failure::failed)?.name,
        },
    };
    let options = OpenOptions {
        device: device.clone(),
        rate,
        wall: UnixNanos(clock.wall().0.saturating_sub(clock.now().0)),
        boot_id: RequestId::new().0,
    };
    let (ledger, reports) = Ledger::open(&config.data_dir, options).map_err(Failure::failed)?;
    let mut stop = Stop::listen()?;

    let mut http_config = HttpConfig::new(device.id.clone(), rates.currency.clone());
    http_config.unknown_fields = config.unknown_fields;
    http_config.body_bytes_max = config.max_body;
    let server = Server::loading(http_config);
    let (close, closed) = oneshot::channel::<()>();
    let serving = tokio::spawn(http::serve(listener, server.clone(), async {
        // Dropped or sent: either way it is time to close.
        drop(closed.await);
    }));

    let early = || Early { clock: clock.clone(), partition: Partition::default(), reports: reports.clone() };
    let phase = Arc::new(Mutex::new(Phase::Loading));
    let starting = Starting {
        phase: phase.clone(),
        config: config.clone(),
        directories: directories.clone(),
        ledger: ledger.clone(),
        device,
        address: address.to_string(),
    };
    let starting_early = early();
    let mut started = tokio::task::spawn_blocking(move || starting.run(starting_early));
    let mut stopped = false;
    let started = tokio::select! {
        started = &mut started => started,
        () = stop.requested() => {
            stopped = true;
            let was = std::mem::replace(&mut *lock(&phase), Phase::Stopped);
            if was == Phase::Loading {
                early().give_up();
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
    let engine = app.engine().clone();
    tokio::task::spawn_blocking(move || engine.shutdown()).await.map_err(Failure::failed)?;
    let _closing = close.send(());
    match tokio::time::timeout(LINGER, serving).await {
        Ok(ended) => ended.map_err(Failure::failed)?.map_err(Failure::failed)?,
        Err(_) => tracing::warn!("connections still open after the last answer are cut"),
    }
    close_ledger(ledger).await
}

/// Resolves when the engine's thread has ended by itself.
async fn engine_death(app: &App) {
    while !app.engine().is_dead() {
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
    device: DeviceInfo,
    address: String,
}

impl Starting {
    fn run(self, mut early: Early) -> Result<(Arc<App>, String), Failure> {
        let config = &self.config;
        let threads =
            config.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        let mut begin = Instant::now();
        let located = model::locate(&config.model, config.revision.as_deref(), &self.directories);
        let prepared = located.and_then(|located| {
            begin = Instant::now();
            let loaded = parts::load_model(&located.file, config, threads)?;
            let (info, ends) = (loaded.info, loaded.tokenizer.end_tokens());
            let ready = parts::prepare(loaded.model, &info, ends, config, threads, &mut early)?;
            Ok((located.id, located.alias, info, loaded.tokenizer, loaded.template, ready))
        });
        let (catalog_id, alias, info, tokenizer, template, ready) = match prepared {
            Ok(prepared) => prepared,
            Err(failure) => {
                early.give_up();
                return Err(failure);
            }
        };
        let calibration = &ready.calibration;
        self.ledger.record_method(MethodRecord { id: calibration.method_id(), json: calibration.json() });
        let clock = early.clock.clone();
        let engine = {
            let mut phase = lock(&self.phase);
            if *phase == Phase::Stopped {
                return Err(Failure::failed("stopped while loading"));
            }
            *phase = Phase::Running;
            parts::start(ready, early)
        };
        let id = config.served_model_name.clone().unwrap_or_else(|| catalog_id.clone());
        let banner = self.banner(&id, &info, threads, engine.config(), begin.elapsed());
        let served = Served {
            aliases: [catalog_id, info.name].into_iter().chain(alias).collect(),
            created: clock.wall().0 / 1_000_000_000,
            precision: info.precision,
            device: self.device.id,
            context_length: engine.config().max_model_len,
            row_invariant: true,
            fingerprint: info.fingerprint[..12].to_owned(),
            id,
        };
        let probe = Probe::open(parts::device_of(config)).unwrap_or_else(|reason| {
            tracing::warn!("no energy and load of the device in /metrics: NVML: {reason}");
            None
        });
        let app = App::new(pipeline::Parts {
            engine,
            ledger: self.ledger,
            tokenizer,
            template,
            served,
            clock,
            metrics: Metrics::new(),
            probe,
            tokenizing_max: threads.max(2),
        });
        Ok((app, banner))
    }

    fn device_line(&self, threads: usize) -> String {
        let DeviceInfo { id, kind, name } = &self.device;
        if kind == "cpu" {
            format!("device    {id}: {name}, {threads} threads")
        } else {
            format!("device    {id}: {name}")
        }
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
        let rates = &self.config.rates;
        let default = if rates.is_default { ", the default: set your own in obol.toml, [rates]" } else { "" };
        let address = &self.address;
        let lines = [
            format!(
                "model     {id}: {} ({}), {}, {:.0} MiB of weights",
                info.name,
                info.architecture,
                info.precision,
                mib(info.weight_bytes)
            ),
            self.device_line(threads),
            format!(
                "kv cache  {} blocks of {} tokens, {:.0} KiB each, {:.0} MiB in all",
                sizes.blocks,
                sizes.block_size,
                sizes.bytes_per_block as f64 / 1024.0,
                mib(sizes.blocks as u64 * sizes.bytes_per_block)
            ),
            format!(
                "limits    {} tokens a request, {} sequences and {} tokens a step, {} requests in the queue",
                sizes.max_model_len, sizes.max_sequences, sizes.step_tokens, sizes.queue_depth
            ),
            format!(
                "rate      {} {} a device-hour, {} of it through KV memory{default}",
                rates.device_hour, rates.currency, rates.kv_share
            ),
            format!("ledger    {}", self.config.data_dir.display()),
            format!("ready     http://{address}, {:.2} s after the model was found", took.as_secs_f64()),
            String::new(),
            format!(
                "curl -i http://{address}/v1/chat/completions -H 'content-type: application/json' \\\n  \
                 -d '{{\"model\": \"{id}\", \"messages\": [{{\"role\": \"user\", \
                 \"content\": \"What is a coin?\"}}], \"max_tokens\": 48}}'\n"
            ),
        ];
        lines.join("\n")
    }
}

/// Refuses new requests and waits for running ones, until the deadline or a second signal.
async fn drain(app: &App, timeout: Duration, stop: &mut Stop) {
    app.drain();
    let stats = app.engine().stats();
    tracing::info!(
        "draining: {} sequences run and {} wait; they have {} s to finish",
        stats.running,
        stats.waiting,
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

/// The processor's name, for people.
pub(super) fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

/// A closed standard output is no reason not to serve.
fn print(banner: &str) {
    let mut out = std::io::stdout().lock();
    if out.write_all(banner.as_bytes()).and_then(|()| out.flush()).is_err() {
        tracing::info!("standard output is closed");
    }
}
