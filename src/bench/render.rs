//! A report as a table and as JSON. Figures are computed elsewhere; only ratios to the peer are taken here,
//! and who is better than whom.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::figures as name;
use super::pareto::{Merits, Standing, standings};
use super::plan::{Arrivals, Endpoint, Kind, Load, Plan, Subject};
use super::workload::Questions;
use super::{Found, Point, Report};
use crate::measure::table::{aligned, counted};

/// What a result says it is.
pub(super) const KIND: &str = "obol bench";
const NONE: &str = "-";
/// More of the prompts than this in the cache, where nothing is shared, is no accident.
const CACHED_BY_ACCIDENT: f64 = 0.05;

impl Report {
    /// Whether each point is worse in everything than another: output tokens a second, median latency of a
    /// request, and cost of a million tokens where it is known.
    #[must_use]
    pub fn standings(&self) -> Vec<Standing> {
        let merits = |point: &Point| {
            let figure = |name: &str| point.figures.get(name);
            Some(Merits {
                throughput: figure(name::OUTPUT_THROUGHPUT)?,
                latency: figure(name::MEDIAN_E2EL)?,
                cost: figure(name::COST_TOKENS),
            })
        };
        standings(&self.points.iter().map(merits).collect::<Vec<_>>())
    }

    /// Failed requests of all points.
    #[must_use]
    pub fn failed(&self) -> usize {
        self.points.iter().flat_map(|point| point.failures.values()).sum()
    }

    fn label(&self, point: &Point) -> String {
        format!("{}, {}", self.plan.loads[point.load], self.subjects[point.subject].name)
    }

    /// A figure over the peer's under the same load; `None` for the peer itself.
    fn ratio(&self, point: &Point, name: &str) -> Option<f64> {
        let peer = self.subjects.iter().position(|subject| subject.peer)?;
        let other = self.points.iter().find(|other| other.subject == peer && other.load == point.load)?;
        let base = other.figures.get(name).filter(|base| *base > 0.0 && point.subject != peer)?;
        Some(point.figures.get(name)? / base)
    }

    /// Of the costs in the report.
    fn currency(&self) -> &str {
        let told = self.found.iter().find_map(|found| found.currency.as_deref());
        told.filter(|_| !self.has_engine()).unwrap_or_else(|| self.plan.rate.currency())
    }

    fn has_engine(&self) -> bool {
        self.subjects.iter().any(|subject| matches!(subject.kind, Kind::Engine(_)))
    }

    fn is_open(&self) -> bool {
        self.plan.loads.iter().any(|load| matches!(load, Load::Open(_)))
    }

    /// What a reader should know before trusting the figures.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        for (subject, found) in self.subjects.iter().zip(&self.found) {
            let name = &subject.name;
            if found.counted_parts {
                warnings
                    .push(format!("{name} tells no usage: its output tokens are parts of streams, counted"));
            }
            if found.currency.as_deref().is_some_and(|currency| currency != self.currency()) {
                let currency = found.currency.as_deref().unwrap_or_default();
                warnings.push(format!("{name} tells its costs in {currency}, not in {}", self.currency()));
            }
        }
        let workload = &self.plan.workload;
        if workload.shared_prefix_words == 0 && workload.turns == 1 {
            for point in &self.points {
                let figure = |name: &str| point.figures.get(name);
                let cached = figure(name::CACHED_TOKENS).zip(figure(name::INPUT_TOKENS));
                if cached.is_some_and(|(cached, input)| cached > input * CACHED_BY_ACCIDENT) {
                    warnings.push(format!(
                        "{}: much of the prompts was in the prefix cache, though they share nothing: they were \
                         asked before, so give another --seed or start the server anew",
                        self.label(point)
                    ));
                }
            }
        }
        warnings
    }

    /// Aligned columns for a terminal: what was measured, the figures, and how to read them.
    #[must_use]
    pub fn to_table(&self) -> String {
        let plan = &self.plan;
        let mut text = format!(
            "obol {} bench on {}, {}",
            env!("CARGO_PKG_VERSION"),
            plan.machine,
            counted(plan.cores, "core")
        );
        if self.has_engine() {
            text += &format!(", {}", counted(plan.threads, "compute thread"));
        }
        text.push('\n');
        for (subject, found) in self.subjects.iter().zip(&self.found) {
            text += &format!("{}: {}\n", subject.name, about(subject, found));
        }
        text += &format!("{}\n\n{}\n", asked(plan), self.figures_table());
        let best: Vec<String> = self
            .points
            .iter()
            .zip(self.standings())
            .filter(|(_, standing)| *standing == Standing::Best)
            .map(|(point, _)| self.label(point))
            .collect();
        let mut line = |said: String| {
            text += &said;
            text.push('\n');
        };
        line(
            "Latency counts from when a request was due; load CPU is what making the load took, of one core."
                .into(),
        );
        if self.has_engine() {
            line(format!(
                "Engines are asked in this process, without HTTP and ledger. Cost: {}, idle time not charged.",
                plan.rate
            ));
        }
        if self.points.len() > 1 && !best.is_empty() {
            line(format!(
                "* No other is better in output tokens/s, E2E p50 and cost at once: {}.",
                best.join("; ")
            ));
        }
        for point in &self.points {
            for (said, number) in &point.failures {
                line(format!("failed, {}: {number} x {said}", self.label(point)));
            }
        }
        self.warnings().into_iter().for_each(|warning| line(format!("warning: {warning}")));
        text
    }

    fn figures_table(&self) -> String {
        let currency = self.currency();
        let (per_output, per_token) = (format!("{currency}/1M output"), format!("{currency}/1M tokens"));
        let peer = self.subjects.iter().find(|subject| subject.peer).map(|peer| peer.name.as_str());
        let mut header = vec!["load", "subject", "", "done", "failed", "output tokens/s"];
        header.extend(peer.map(|_| "x peer"));
        header.extend(["TTFT p50 ms", "p99"]);
        header.extend(peer.map(|_| "x peer"));
        header.extend(["ITL p50 ms", "TPOT p50 ms", "E2E p50 ms"]);
        header.extend(self.is_open().then_some("sent late p99 ms"));
        header.extend([per_output.as_str(), &per_token, "cached %", "load CPU %"]);
        let rows = self.points.iter().zip(self.standings()).map(|(point, standing)| {
            let shown = |value: Option<f64>, decimals: usize, unit: &str| {
                value.map_or_else(|| NONE.to_owned(), |value| format!("{value:.decimals$}{unit}"))
            };
            let figure = |name: &str, decimals: usize| shown(point.figures.get(name), decimals, "");
            let ratio = |name: &str| peer.map(|_| shown(self.ratio(point, name), 2, "x"));
            let part = |part: Option<f64>| shown(part.map(|part| part * 100.0), 1, "");
            let cached = point.figures.get(name::CACHED_TOKENS).zip(point.figures.get(name::INPUT_TOKENS));
            let mut row = vec![
                self.plan.loads[point.load].to_string(),
                self.subjects[point.subject].name.clone(),
                if standing == Standing::Best { "*" } else { "" }.to_owned(),
                figure(name::COMPLETED, 0),
                point.failures.values().sum::<usize>().to_string(),
                figure(name::OUTPUT_THROUGHPUT, 1),
            ];
            row.extend(ratio(name::OUTPUT_THROUGHPUT));
            row.extend([figure(name::MEDIAN_TTFT, 0), figure(name::P99_TTFT, 0)]);
            row.extend(ratio(name::MEDIAN_TTFT));
            row.extend([
                figure(name::MEDIAN_ITL, 1),
                figure(name::MEDIAN_TPOT, 1),
                figure(name::MEDIAN_E2EL, 0),
            ]);
            row.extend(self.is_open().then(|| figure(name::P99_SEND_DELAY, 0)));
            row.extend([
                figure(name::COST_OUTPUT, 4),
                figure(name::COST_TOKENS, 4),
                part(cached.map(|(cached, input)| cached / input).filter(|part| part.is_finite())),
                part(point.figures.get(name::LOAD_CORE)),
            ]);
            row
        });
        aligned(&header, rows.collect(), 3)
    }

    /// One document with everything. Names of figures are those of `vllm bench serve`; times that end in
    /// `_ms` are milliseconds, others seconds; shares are parts of 1.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut document = describe(&self.plan, &self.subjects);
        let subjects =
            self.subjects.iter().zip(&self.found).map(|(subject, found)| subject_json(subject, found));
        let standings = self.standings();
        let points =
            self.points.iter().zip(&standings).map(|(point, standing)| self.point_json(point, *standing));
        document["currency"] = json!(self.currency());
        document["subjects"] = subjects.collect();
        document["points"] = points.collect();
        document["warnings"] = json!(self.warnings());
        document
    }

    fn point_json(&self, point: &Point, standing: Standing) -> Value {
        let failures = point.failures.iter().map(|(said, count)| json!({ "message": said, "count": count }));
        let ratios = [name::OUTPUT_THROUGHPUT, name::MEDIAN_TTFT, name::MEDIAN_ITL, name::MEDIAN_E2EL]
            .into_iter()
            .filter_map(|name| Some((name.to_owned(), json!(self.ratio(point, name)?))));
        let load = &self.plan.loads[point.load];
        json!({
            "subject": self.subjects[point.subject].name,
            "load": load_json(load),
            "conversations": self.plan.conversations(load),
            "figures": point.figures.to_json(),
            "ratio_to_peer": ratios.collect::<serde_json::Map<_, _>>(),
            "pareto": {
                "best": standing == Standing::Best,
                "dominated_by": match standing {
                    Standing::Dominated { by } => Some(self.label(&self.points[by])),
                    Standing::Best | Standing::Unknown => None,
                },
            },
            "failures": failures.collect::<Vec<_>>(),
            "rounds": point.rounds.iter().map(super::Figures::to_json).collect::<Vec<_>>(),
        })
    }
}

/// What is known before anything is measured: the plan as part of a report's JSON.
#[must_use]
pub fn describe(plan: &Plan, subjects: &[Subject]) -> Value {
    let workload = &plan.workload;
    let mut asked = json!({
        "endpoint": match plan.endpoint {
            Endpoint::Completions => "completions",
            Endpoint::Chat => "chat",
        },
        "shared_prefix_words": workload.shared_prefix_words,
        "turns": workload.turns,
        "output_tokens": workload.output_tokens,
        "ignore_eos": plan.ignore_eos,
        "seed": workload.seed,
    });
    match &workload.questions {
        Questions::Words(words) => asked["input_words"] = json!(words),
        Questions::Tokens(tokens) => asked["input_tokens"] = json!(tokens),
        Questions::Dataset { name, prompts } => {
            asked["dataset"] = json!(name);
            asked["dataset_blake3"] = json!(blake3::hash(prompts.join("\0").as_bytes()).to_hex().as_str());
        }
    }
    let engines = subjects.iter().any(|subject| matches!(subject.kind, Kind::Engine(_)));
    json!({
        "kind": KIND,
        "version": env!("CARGO_PKG_VERSION"),
        "command": plan.command.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" "),
        "machine": { "device": plan.machine, "cores": plan.cores, "threads": plan.threads },
        "workload": asked,
        "settings": {
            "rounds": plan.rounds,
            "warmup": plan.warmup,
            "requests": plan.requests,
            "num_prompts": plan.num_prompts,
            "timeout": plan.timeout.as_secs(),
        },
        "rate": engines.then(|| json!({
            "device_hour": plan.rate.device_hour_decimal(),
            "kv_share": plan.rate.kv_share_decimal(),
            "currency": plan.rate.currency(),
        })),
    })
}

fn load_json(load: &Load) -> Value {
    match load {
        Load::Closed { concurrency } => {
            json!({ "name": load.to_string(), "kind": "closed", "concurrency": concurrency })
        }
        Load::Open(Arrivals { rate, burstiness, max_concurrency }) => json!({
            "name": load.to_string(),
            "kind": "open",
            "request_rate": rate,
            "burstiness": burstiness,
            "max_concurrency": max_concurrency,
        }),
    }
}

/// `setup` and `model` are what two results must share to be compared: a server goes by its name, for its
/// port may be another.
fn subject_json(subject: &Subject, found: &Found) -> Value {
    let facts = found.facts.as_ref();
    let (kind, setup, url) = match &subject.kind {
        Kind::Engine(setup) => {
            let setup = json!({
                "quant": setup.quant.to_string(),
                "kv_dtype": setup.kv_dtype.to_string(),
                "step_tokens": setup.step_tokens,
                "max_sequences": setup.max_sequences,
                "prefix_caching": setup.prefix_caching,
            });
            ("engine", setup, None)
        }
        Kind::Server(setup) => ("server", json!({ "server": subject.name }), Some(&setup.url)),
    };
    json!({
        "name": subject.name,
        "kind": kind,
        "peer": subject.peer,
        "setup": setup,
        "url": url,
        "model": {
            "name": found.model,
            "architecture": facts.map(|facts| &facts.architecture),
            "precision": facts.map(|facts| &facts.precision),
            "fingerprint": facts.map(|facts| &facts.fingerprint),
        },
        "weight_bytes": facts.map(|facts| facts.weight_bytes),
        "load_seconds": facts.map(|facts| facts.load.as_secs_f64()),
    })
}

fn about(subject: &Subject, found: &Found) -> String {
    match &subject.kind {
        Kind::Server(setup) => format!("{} at {}", found.model, setup.url),
        Kind::Engine(setup) => {
            let model = match &found.facts {
                Some(facts) => format!("{} ({}), {}", facts.model, facts.architecture, facts.precision),
                None => "not loaded".to_owned(),
            };
            format!(
                "{model}, {} tokens and {} sequences a step, prefix caching {}",
                setup.step_tokens,
                setup.max_sequences,
                if setup.prefix_caching { "on" } else { "off" }
            )
        }
    }
}

/// The workload in words.
fn asked(plan: &Plan) -> String {
    let workload = &plan.workload;
    let mut text = match &workload.questions {
        Questions::Words(words) => format!("prompts of {}", counted(*words, "random word")),
        Questions::Tokens(tokens) => format!("prompts of {}", counted(*tokens, "random token")),
        Questions::Dataset { name, prompts } => format!("{} of {name}", counted(prompts.len(), "prompt")),
    };
    if workload.shared_prefix_words > 0 {
        let _infallible =
            write!(text, " after {} that all share", counted(workload.shared_prefix_words, "word"));
    }
    if workload.turns > 1 {
        let _infallible = write!(text, ", conversations of {} turns", workload.turns);
    }
    let _infallible = write!(text, "; {} each", counted(workload.output_tokens, "output token"));
    let thing = if workload.turns > 1 { "conversation" } else { "request" };
    for load in plan.loads.iter().take(1) {
        match load {
            Load::Closed { .. } => {
                let _infallible = write!(text, "; {} of each client", counted(plan.requests, thing));
            }
            Load::Open(Arrivals { burstiness, .. }) => {
                let _infallible = write!(
                    text,
                    "; {} at random instants (burstiness {burstiness})",
                    counted(plan.num_prompts, thing)
                );
            }
        }
    }
    let _infallible = write!(text, "; medians of {}, seed {}", counted(plan.rounds, "round"), workload.seed);
    text
}

/// A word as a POSIX shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use obol_models::KvDtype;
    use obol_models::quant::Quant;

    use super::super::engine::Facts;
    use super::super::figures::Figures;
    use super::super::plan::{EngineSetup, ServerSetup};
    use super::super::workload::Workload;
    use super::*;
    use crate::ledger::RateCard;

    fn plan(loads: Vec<Load>) -> Plan {
        Plan {
            loads,
            workload: Workload {
                questions: Questions::Words(100),
                shared_prefix_words: 0,
                turns: 1,
                output_tokens: 64,
                seed: 1,
            },
            requests: 2,
            num_prompts: 9,
            rounds: 3,
            warmup: 1,
            endpoint: Endpoint::Completions,
            ignore_eos: true,
            timeout: Duration::from_secs(600),
            rate: RateCard::parse("0.10", "0.20", "USD", None).unwrap(),
            threads: 2,
            machine: "a processor".into(),
            cores: 2,
            command: ["obol", "bench", "my model.gguf", "it's", ""].map(str::to_owned).to_vec(),
        }
    }

    fn subjects() -> Vec<Subject> {
        let engine = Kind::Engine(EngineSetup {
            quant: Quant::Int8,
            kv_dtype: KvDtype::default(),
            step_tokens: 512,
            max_sequences: 64,
            prefix_caching: true,
        });
        let server =
            Kind::Server(ServerSetup { url: "http://127.0.0.1:8081".into(), model: None, api_key: None });
        let of = |name: &str, kind, peer| Subject { name: name.into(), kind, peer };
        vec![of("obol", engine, false), of("other", server, true)]
    }

    fn report(loads: Vec<Load>) -> Report {
        let facts = Facts {
            model: "Tiny".into(),
            architecture: "llama".into(),
            precision: "int8".into(),
            fingerprint: "f".into(),
            weight_bytes: 1 << 20,
            load: Duration::from_millis(500),
        };
        let engine = Found { model: "Tiny".into(), facts: Some(facts), ..Found::default() };
        let server = Found { model: "tiny.gguf".into(), counted_parts: true, ..Found::default() };
        let figures = |throughput: f64| {
            let factor = throughput / 100.0;
            vec![
                (name::COMPLETED, 6.0),
                (name::FAILED, 0.0),
                (name::OUTPUT_THROUGHPUT, throughput),
                (name::MEDIAN_TTFT, 200.0 / factor),
                (name::P99_TTFT, 300.0 / factor),
                (name::MEDIAN_ITL, 10.0 / factor),
                (name::MEDIAN_TPOT, 11.0 / factor),
                (name::MEDIAN_E2EL, 900.0 / factor),
                (name::P99_SEND_DELAY, 7.0),
                (name::LOAD_CORE, 0.021),
            ]
        };
        let own = [(name::COST_OUTPUT, 0.5), (name::COST_TOKENS, 0.25)];
        let cache = [(name::INPUT_TOKENS, 600.0), (name::CACHED_TOKENS, 60.0)];
        let point = |subject, load, figures: &[(&'static str, f64)]| Point {
            subject,
            load,
            rounds: Vec::new(),
            figures: Figures::of(figures),
            failures: BTreeMap::new(),
        };
        let mut points = vec![
            point(0, 0, &[&figures(100.0)[..], &own[..]].concat()),
            point(1, 0, &figures(50.0)),
            point(0, 1, &[&figures(400.0)[..], &own[..], &cache[..]].concat()),
            point(1, 1, &[(name::COMPLETED, 0.0), (name::FAILED, 6.0)]),
        ];
        points[3].failures.insert("cannot connect".into(), 6);
        Report { plan: plan(loads), subjects: subjects(), found: vec![engine, server], points }
    }

    fn closed() -> Vec<Load> {
        vec![Load::Closed { concurrency: 1 }, Load::Closed { concurrency: 8 }]
    }

    #[test]
    fn the_table_says_what_was_measured_and_what_went_wrong() {
        let table = report(closed()).to_table().replace(env!("CARGO_PKG_VERSION"), "VERSION");
        insta::assert_snapshot!("closed", table);
        let open = |rate| Load::Open(Arrivals { rate, burstiness: 0.5, max_concurrency: None });
        let table =
            report(vec![open(0.5), open(8.0)]).to_table().replace(env!("CARGO_PKG_VERSION"), "VERSION");
        insta::assert_snapshot!("open", table);
    }

    #[test]
    fn the_json_has_everything_that_a_rerun_needs() {
        let mut json = report(closed()).to_json();
        assert_eq!(json["version"], env!("CARGO_PKG_VERSION"));
        json["version"] = json!("VERSION");
        assert_eq!(json["command"], r"obol bench 'my model.gguf' 'it'\''s' ''");
        insta::assert_json_snapshot!("json", json);
    }

    #[test]
    fn a_picture_of_points_without_costs_can_be_drawn() {
        let mut report = report(closed());
        report.points.iter_mut().for_each(|point| point.figures = Figures::default());
        let svg = report.to_svg().unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("Cost of load"));
    }
}
