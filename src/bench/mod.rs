//! Throughput, latency and cost of engines in this process and of servers elsewhere, under load.
//!
//! Does: run every subject under every load in rounds that take turns, and reduce what came back to figures.
//! Knows no command line and no model file: a `Site` starts engines. Nothing is written to the ledger; costs
//! in process are priced as on receipts, from the meter's exact charges.

mod arrivals;
mod drive;
mod engine;
mod figures;
mod gate;
pub mod growth;
mod http;
mod pareto;
mod plan;
mod plot;
mod random;
mod render;
mod sse;
mod stream;
mod workload;

use std::collections::BTreeMap;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

pub use engine::{Facts, Started};
pub use figures::Figures;
pub use gate::{Gate, Verdict};
pub use pareto::Standing;
pub use plan::{ApiKey, Arrivals, Endpoint, EngineSetup, Kind, Load, Plan, ServerSetup, Subject};
pub use render::describe;
pub use workload::{Questions, Workload};

use crate::measure::MeasureError;
use crate::measure::asking::runtime;
use crate::measure::progress::Progress;
use crate::measure::table::counted;
use drive::{Driven, drive};
use engine::Asking;
use figures::Round;
use http::Server;
use plan::visits;

/// Where engines come from.
pub trait Site {
    /// Loads the model and starts an engine over it.
    ///
    /// # Errors
    /// When the model cannot be loaded so, or there is no memory for its KV pool.
    fn start(&mut self, setup: &EngineSetup) -> Result<Started, MeasureError>;
}

/// What was found about a subject.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Found {
    /// The model's name, or the id that the server gives it.
    pub model: String,
    /// Of engines.
    pub facts: Option<Facts>,
    /// A server told an answer's tokens by no count of its own.
    pub counted_parts: bool,
    /// Of the costs that a server tells.
    pub currency: Option<String>,
}

/// A subject under a load.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// Indices into the report's subjects and the plan's loads.
    pub subject: usize,
    pub load: usize,
    pub rounds: Vec<Figures>,
    /// Of all rounds: sums of what is counted, medians of everything else.
    pub figures: Figures,
    /// What failed requests said, and how many said so.
    pub failures: BTreeMap<String, usize>,
}

/// Everything that was measured.
pub struct Report {
    pub plan: Plan,
    pub subjects: Vec<Subject>,
    /// As many as subjects.
    pub found: Vec<Found>,
    /// By loads, then subjects.
    pub points: Vec<Point>,
}

/// A subject that can be asked.
enum Open {
    Engine(Box<Started>),
    Server(Box<Server>),
}

/// Measures all subjects under all loads.
///
/// # Errors
/// When a subject cannot be measured at all: told before anything is. What fails later is in the report.
///
/// # Panics
/// Without subjects or loads.
pub fn bench(
    subjects: Vec<Subject>,
    plan: Plan,
    site: &mut dyn Site,
    progress: &Progress,
) -> Result<Report, MeasureError> {
    let runtime = runtime()?;
    let mut bench = Bench {
        plan: &plan,
        subjects: &subjects,
        site,
        progress,
        runtime,
        open: (0..subjects.len()).map(|_| None).collect(),
        found: vec![Found::default(); subjects.len()],
    };
    // The first engine and every server, so that what is wrong with them is told now.
    let engines = || (0..subjects.len()).filter(|&index| matches!(subjects[index].kind, Kind::Engine(_)));
    for index in (0..subjects.len()).filter(|&index| engines().skip(1).all(|later| later != index)) {
        bench.open(index)?;
    }
    let points_of = |load: usize| {
        let point = move |subject| Point {
            subject,
            load,
            rounds: Vec::new(),
            figures: Figures::default(),
            failures: BTreeMap::new(),
        };
        (0..subjects.len()).map(point)
    };
    let mut points: Vec<Point> = (0..plan.loads.len()).flat_map(points_of).collect();
    for visit in visits(subjects.len(), plan.loads.len(), plan.rounds, engines().count() > 1) {
        let point = &mut points[visit.load * subjects.len() + visit.subject];
        match bench.open(visit.subject).and_then(|()| bench.round(visit.subject, visit.load, visit.round)) {
            Ok((figures, failures)) => {
                point.rounds.push(figures);
                for said in failures {
                    *point.failures.entry(said).or_default() += 1;
                }
            }
            // Others are measured still, and what was measured is told.
            Err(error) => {
                let all = plan.conversations(&plan.loads[visit.load]) * plan.workload.turns;
                *point.failures.entry(error.to_string()).or_default() += all;
                bench.open[visit.subject] = None;
            }
        }
    }
    for point in &mut points {
        // Rounds that did not take place count too.
        point.figures = Figures::middle(&point.rounds).with_failed(point.failures.values().sum());
    }
    let found = bench.found();
    Ok(Report { plan, subjects, found, points })
}

struct Bench<'a> {
    plan: &'a Plan,
    subjects: &'a [Subject],
    site: &'a mut dyn Site,
    progress: &'a Progress,
    runtime: tokio::runtime::Runtime,
    /// As many as subjects; at most one engine.
    open: Vec<Option<Open>>,
    found: Vec<Found>,
}

impl Bench<'_> {
    /// Makes a subject ready, and warms it up.
    fn open(&mut self, index: usize) -> Result<(), MeasureError> {
        if self.open[index].is_some() {
            return Ok(());
        }
        let Subject { name, kind, .. } = &self.subjects[index];
        match kind {
            Kind::Engine(setup) => {
                // The model before it makes room first.
                self.open
                    .iter_mut()
                    .filter(|open| matches!(open, Some(Open::Engine(_))))
                    .for_each(|open| *open = None);
                self.progress.stage(name, "loading", 1);
                let started = self.site.start(setup)?;
                self.found[index] = Found {
                    model: started.facts.model.clone(),
                    facts: Some(started.facts.clone()),
                    ..Found::default()
                };
                self.open[index] = Some(Open::Engine(Box::new(started)));
            }
            Kind::Server(setup) => {
                self.progress.stage(name, "connecting", 1);
                let server = self.runtime.block_on(Server::find(setup))?;
                self.found[index] = Found { model: server.model().to_owned(), ..Found::default() };
                self.open[index] = Some(Open::Server(Box::new(server)));
            }
        }
        self.warm_up(index)
    }

    /// What is known of the subjects once all is measured.
    fn found(self) -> Vec<Found> {
        let told = |(found, open): (Found, Option<Open>)| match open {
            Some(Open::Server(server)) => {
                Found { counted_parts: server.counted_parts.get(), currency: server.currency.take(), ..found }
            }
            Some(Open::Engine(_)) | None => found,
        };
        self.found.into_iter().zip(self.open).map(told).collect()
    }

    fn warm_up(&mut self, index: usize) -> Result<(), MeasureError> {
        let Subject { name, .. } = &self.subjects[index];
        if self.plan.warmup == 0 {
            return Ok(());
        }
        self.progress.stage(name, &counted(self.plan.warmup, "warm-up request"), self.plan.warmup as u64);
        let all = self.plan.warmup;
        let (_, failures) = self.measure(index, &Load::Closed { concurrency: all }, all, "warm-up")?;
        match failures.into_iter().next() {
            Some(said) => Err(MeasureError::Failed(format!("{name}: a warm-up request failed: {said}"))),
            None => Ok(()),
        }
    }

    fn round(
        &mut self,
        index: usize,
        load: usize,
        round: usize,
    ) -> Result<(Figures, Vec<String>), MeasureError> {
        let (name, load) = (&self.subjects[index].name, &self.plan.loads[load]);
        let conversations = self.plan.conversations(load);
        let what = format!("{load}, round {} of {}", round + 1, self.plan.rounds);
        self.progress.stage(name, &what, conversations as u64);
        self.measure(index, load, conversations, &round.to_string())
    }

    /// One load's figures, and what its failed requests said.
    fn measure(
        &mut self,
        index: usize,
        load: &Load,
        conversations: usize,
        round: &str,
    ) -> Result<(Figures, Vec<String>), MeasureError> {
        let plan = self.plan;
        let (named, seed) = (load.to_string(), plan.workload.seed);
        let scripts = plan.workload.scripts(round, &named, conversations);
        let arrivals = match load {
            Load::Closed { .. } => Vec::new(),
            Load::Open(open) => open.instants(seed, &[round, &named, "arrivals"], conversations),
        };
        let told = |ended| self.progress.at(ended);
        let Some(open) = &self.open[index] else { unreachable!("opened before it is measured") };
        let (driven, charged, load_cpu) = match open {
            Open::Engine(started) => {
                let salt = format!("{seed} {round} {named}");
                let output = plan.workload.output_tokens;
                let asking = Asking::new(started, plan.endpoint, plan.ignore_eos, output, &salt);
                let begin = cpu(ClockId::ThreadCPUTime);
                let ask = async |dialogue: &_| asking.ask(dialogue).await;
                let driven = self.runtime.block_on(drive(load, &scripts, &arrivals, ask, told));
                let load_cpu = cpu(ClockId::ThreadCPUTime).saturating_sub(begin);
                (driven, Some(asking.charged(&plan.rate)?), load_cpu)
            }
            Open::Server(server) => {
                let begin = cpu(ClockId::ProcessCPUTime);
                let ask = async |dialogue: &_| server.ask(dialogue, plan).await;
                let driven = self.runtime.block_on(drive(load, &scripts, &arrivals, ask, told));
                (driven, None, cpu(ClockId::ProcessCPUTime).saturating_sub(begin))
            }
        };
        let figures = Round { driven: &driven, charged, load_cpu, cores: plan.cores }.figures();
        let Driven { records, .. } = driven;
        Ok((figures, records.into_iter().filter_map(|record| record.outcome.err()).collect()))
    }
}

/// Processor time so far.
fn cpu(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
