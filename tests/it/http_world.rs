//! A whole server over the fake model, for the HTTP tests: real engine, real ledger, no sockets unless
//! asked for.
//!
//! Tokens are bytes, so any text is a prompt; what the model answers is a hash of it, byte salad.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use http_body_util::BodyExt;
use obol::alerting::{self, Alerting, Webhook};
use obol::archive::Archive;
use obol::clock::{Clock, SystemClock};
use obol::config::{Pooling, Retention, Speculative, Weights};
use obol::control::alerts::rules::Rules;
use obol::control::{ConfiguredKey, Control};
use obol::engine::{self, EngineConfig, EngineHandle};
use obol::http::{Access, HttpConfig, Server, router};
use obol::ledger::{DeviceInfo, Ledger, MeteredDevice, OpenOptions, RateCard, Tuning};
use obol::meter::calibration::Calibration;
use obol::meter::partition::Partition;
use obol::meter::share::Coefficients;
use obol::metrics::Metrics;
use obol::pipeline::{Admission, App, Parts, Policy, Replica, Replicas, Served};
use obol::request::Tier;
use obol::usage::MeterReport;
use obol_models::batch::CausalLm;
use obol_models::chat_template::ChatTemplate;
use obol_models::fake::FakeModel;
use serde_json::Value;
use tower::ServiceExt;

pub(crate) const CONTEXT: usize = 256;

/// What a test may want otherwise.
pub(crate) struct Options {
    /// Each with a device of its own.
    pub(crate) engines: usize,
    pub(crate) queue_depth: usize,
    /// The server stays as it is before its model is loaded.
    pub(crate) loading: bool,
    /// How long a step takes at least.
    pub(crate) step: Duration,
    /// The n-th forward pass fails, or panics; of several engines the last one's.
    pub(crate) fail_at: Option<u64>,
    pub(crate) panic_at: Option<u64>,
    pub(crate) policy: Policy,
    pub(crate) alerts: Rules,
    pub(crate) webhooks: Vec<Webhook>,
    pub(crate) http: HttpConfig,
    /// With keys of its own data directory, whatever it says of them.
    pub(crate) access: Access,
    pub(crate) retention: Retention,
    pub(crate) template: ChatTemplate,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            engines: 1,
            queue_depth: 64,
            loading: false,
            step: Duration::ZERO,
            fail_at: None,
            panic_at: None,
            policy: Policy::default(),
            alerts: Rules::default(),
            webhooks: Vec::new(),
            http: HttpConfig::new("cpu", "USD"),
            access: Access::default(),
            retention: Retention { days: 30, bytes: 1 << 20 },
            template: crate::http_tokens::template(),
        }
    }
}

pub(crate) struct World {
    pub(crate) app: Arc<App>,
    pub(crate) server: Arc<Server>,
    /// The first one.
    pub(crate) engine: EngineHandle,
    pub(crate) ledger: Ledger,
    pub(crate) control: Control,
    router: Router,
    pub(crate) data_dir: tempfile::TempDir,
}

impl Drop for World {
    fn drop(&mut self) {
        self.app.engines().shutdown();
    }
}

/// The admin key of `guarded`.
pub(crate) const ADMIN: &str = "sk-admin-of-the-tests";

/// What every call needs a key for.
pub(crate) fn guarded() -> Access {
    let admin = ConfiguredKey::new(ADMIN).expect("long enough");
    Access { admin: Some(admin), ..Access::default() }
}

pub(crate) fn world() -> World {
    world_with(Options::default())
}

pub(crate) fn world_with(options: Options) -> World {
    let data_dir = tempfile::tempdir().expect("a temporary directory");
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::start());
    let rate = RateCard::parse("2.50", "0.20", "USD", Some("test")).expect("a good rate card");
    let rate = rate.with_tiers([(Tier::Flex, "0.7")]).expect("a good price");
    let devices: Vec<String> = match options.engines {
        1 => vec!["cpu".into()],
        several => (0..several).map(|at| format!("cpu:{at}")).collect(),
    };
    let metered = |id: &String| {
        let info = DeviceInfo { id: id.clone(), kind: "cpu".into(), name: "a test".into() };
        vec![MeteredDevice { info, rate: rate.clone() }]
    };
    let engines = devices.iter().map(metered).collect();
    let open = OpenOptions { engines, wall: clock.wall(), boot_id: "boot".into() };
    let (ledger, reports) = Ledger::open_tuned(data_dir.path(), &open, Tuning::default()).expect("a ledger");
    let tokenizer = crate::http_tokens::tokenizer();
    let start = |(at, reports): (usize, Sender<MeterReport>)| {
        let spoiled = at + 1 == options.engines;
        Replica {
            engine: start(tokenizer.vocab_size(), &options, spoiled, &clock, reports),
            device: devices[at].as_str().into(),
            rates: vec![rate.clone()],
        }
    };
    let engines = Replicas::new(reports.into_iter().enumerate().map(start).collect());
    let engine = engines.each()[0].engine.clone();
    let control = Control::open(data_dir.path(), Arc::clone(&clock)).expect("keys");
    let keys = control.keys().expect("keys").into_iter().map(|(key, _)| key);
    let admission = Admission::new(options.policy, keys, &ledger, clock.wall()).expect("a readable ledger");
    let parts = alerting::Parts {
        data_dir: data_dir.path().to_owned(),
        rules: options.alerts,
        webhooks: options.webhooks,
        budgets: admission.budgets().clone(),
        ledger: ledger.clone(),
        control: Some(control.clone()),
        clock: Arc::clone(&clock),
        currency: "USD".into(),
        tuning: crate::alerts::TUNING,
    };
    let alerting = if parts.webhooks.is_empty() {
        Alerting::default()
    } else {
        Alerting::start(parts).expect("webhooks that can be called")
    };
    let app = App::new(Parts {
        engines,
        ledger: ledger.clone(),
        admission,
        alerting,
        tokenizer: Arc::new(tokenizer),
        template: Some(options.template),
        served: Served {
            id: "fake/model".into(),
            aliases: vec!["fake".into()],
            created: 1_700_000_000,
            precision: "Q4_1".into(),
            device: devices.join(","),
            context_length: CONTEXT,
            pooling: Pooling::Last,
            row_invariant: true,
            fingerprint: "0123456789abcdef".into(),
        },
        embedder: None,
        clock: Arc::clone(&clock),
        metrics: Metrics::new(),
        probes: Vec::new(),
        tokenizing_max: 2,
    });
    let access = Access { control: Some(control.clone()), ..options.access };
    let archive = Archive::open(data_dir.path(), options.retention, Arc::clone(&clock)).expect("an archive");
    let http = HttpConfig { device: devices.join(","), ..options.http };
    let server = Server::loading(http, access, ledger.clone(), archive);
    if !options.loading {
        server.ready(Arc::clone(&app));
    }
    let router = router(Arc::clone(&server));
    World { app, server, engine, ledger, control, router, data_dir }
}

/// An engine over a fake model, which fails as the options say if it is `spoiled`.
fn start(
    vocab_size: usize,
    options: &Options,
    spoiled: bool,
    clock: &Arc<dyn Clock>,
    reports: Sender<MeterReport>,
) -> EngineHandle {
    let (blocks, block_size) = (64, 16);
    let mut model = FakeModel::new(vocab_size, CONTEXT, 7);
    if let Some(forward) = options.fail_at.filter(|_| spoiled) {
        model = model.fail_at(forward);
    }
    if let Some(forward) = options.panic_at.filter(|_| spoiled) {
        model = model.panic_at(forward);
    }
    let step = options.step;
    let mut model = model.on_forward(move |_| std::thread::sleep(step));
    model.allocate_kv(blocks, block_size).expect("a small pool");
    EngineHandle::start(engine::Parts {
        encoder: None,
        config: EngineConfig {
            blocks,
            block_size,
            bytes_per_block: model.kv_bytes_per_token() * block_size as u64,
            max_model_len: CONTEXT,
            max_sequences: 16,
            step_tokens: 64,
            queue_depth: options.queue_depth,
            prefix_caching: true,
            speculative: Speculative::Off,
            weights: Some(Weights::default()),
            end_tokens: Vec::new(),
        },
        model: Box::new(model),
        calibration: Calibration::uniform(Coefficients { step: 1000, token: 10, attention: 1, logits: 5 }),
        clock: Arc::clone(clock),
        partition: Partition::default(),
        energy: None,
        reports,
    })
}

/// A response, read to its end.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) trailers: Option<HeaderMap>,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// `data:` events; `[DONE]` as a string.
    pub(crate) fn events(&self) -> Vec<Value> {
        let datas = self.text.split("\n\n").filter_map(|frame| frame.strip_prefix("data: "));
        datas.map(|data| serde_json::from_str(data).unwrap_or_else(|_| Value::String(data.into()))).collect()
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_else(|| panic!("no header {name}")).to_str().expect("ASCII")
    }
}

impl World {
    pub(crate) async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.expect("the router never fails");
        let (head, body) = response.into_parts();
        let collected = body.collect().await.expect("the body comes to its end");
        let trailers = collected.trailers().cloned();
        let text = String::from_utf8(collected.to_bytes().to_vec()).expect("UTF-8");
        Answer { status: head.status, headers: head.headers, trailers, text }
    }

    /// One call with a key: GET without a body, else POST.
    pub(crate) async fn with_key(&self, key: &str, path: &str, body: Option<Value>) -> Answer {
        let method = if body.is_some() { "POST" } else { "GET" };
        let request =
            Request::builder().method(method).uri(path).header("authorization", format!("Bearer {key}"));
        let body = body.map_or_else(Body::empty, |body| Body::from(body.to_string()));
        self.send(request.body(body).expect("a request")).await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).expect("a request")).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Answer {
        self.post_text(path, body.to_string()).await
    }

    pub(crate) async fn post_text(&self, path: &str, body: impl Into<Body>) -> Answer {
        self.send(Request::post(path).body(body.into()).expect("a request")).await
    }

    pub(crate) async fn chat(&self, body: Value) -> Answer {
        self.post("/v1/chat/completions", body).await
    }

    /// Serves on a free port of loopback; on a thread of its own, until the process ends.
    pub(crate) fn listen(&self) -> SocketAddr {
        let server = Arc::clone(&self.server);
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
                tell.send(listener.local_addr().expect("an address")).expect("the test waits");
                obol::http::serve(listener, server, std::future::pending()).await
            })
        });
        told.recv().expect("the server listens")
    }

    /// Waits until nothing runs or waits and no block is held.
    pub(crate) fn wait_until_idle(&self) {
        wait_until("the engines to be idle", || {
            let mut stats = self.app.engines().stats();
            stats.all(|(_, stats)| stats.running == 0 && stats.waiting == 0 && stats.blocks.held == 0)
        });
    }
}

pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "waited 10 s for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
