//! What is measured: subjects, loads and everything that is the same for all of them.

use std::fmt;
use std::time::Duration;

use obol_models::KvDtype;
use obol_models::quant::Quant;

use super::workload::Workload;
use crate::ledger::RateCard;

/// How requests come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Load {
    /// So many clients, each of which asks again when it has its answer.
    Closed { concurrency: usize },
    /// Requests come by themselves, whether or not there are answers to the last ones.
    Open(Arrivals),
}

/// When requests of an open loop come: the times between them follow a gamma distribution.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Arrivals {
    /// Requests a second, above 0.
    pub rate: f64,
    /// The distribution's shape: 1 is a Poisson process, less comes in bursts, more is more even.
    pub burstiness: f64,
    /// At most so many are asked at once; the others wait, and their waiting counts.
    pub max_concurrency: Option<usize>,
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed { concurrency: 1 } => f.write_str("1 client"),
            Self::Closed { concurrency } => write!(f, "{concurrency} clients"),
            Self::Open(Arrivals { rate, .. }) => write!(f, "{rate} req/s"),
        }
    }
}

/// Which of the API's endpoints is asked; in process, whether the model's template is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    Completions,
    Chat,
}

/// An engine to be made in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineSetup {
    pub quant: Quant,
    pub kv_dtype: KvDtype,
    pub step_tokens: usize,
    pub max_sequences: usize,
    pub prefix_caching: bool,
}

/// A key that no error and no log shows.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    /// `None` for nothing but blanks.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        let text = text.trim();
        (!text.is_empty()).then(|| Self(text.to_owned()))
    }

    pub(super) fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(..)")
    }
}

/// A server that is there already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerSetup {
    /// As `http://127.0.0.1:8080`, with or without the API's `/v1`.
    pub url: String,
    /// The `model` of requests; `None` is the first that the server lists.
    pub model: Option<String>,
    pub api_key: Option<ApiKey>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    Engine(EngineSetup),
    Server(ServerSetup),
}

/// What is measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// Short, for tables; no two have the same.
    pub name: String,
    pub kind: Kind,
    /// Others are set beside it, and it is held to no limit. At most one is.
    pub peer: bool,
}

/// Everything that is the same for all subjects.
#[derive(Debug, Clone)]
pub struct Plan {
    pub loads: Vec<Load>,
    pub workload: Workload,
    /// Conversations of each client of a closed loop, one after another.
    pub requests: usize,
    /// Conversations of an open loop, of all together.
    pub num_prompts: usize,
    pub rounds: usize,
    /// Requests before each subject's first measurement, all at once.
    pub warmup: usize,
    pub endpoint: Endpoint,
    /// Answers go on past the model's end tokens, so that all are equally long.
    pub ignore_eos: bool,
    /// How long one request may take.
    pub timeout: Duration,
    /// Prices in process; servers tell their own costs, or none.
    pub rate: RateCard,
    pub threads: usize,
    /// For people: the processor.
    pub machine: String,
    /// That this process may use.
    pub cores: usize,
    /// The arguments that make this measurement, without secrets.
    pub command: Vec<String>,
}

impl Plan {
    /// Conversations of one round under a load.
    #[must_use]
    pub fn conversations(&self, load: &Load) -> usize {
        match load {
            Load::Closed { concurrency } => concurrency * self.requests,
            Load::Open(_) => self.num_prompts,
        }
    }
}

/// One measurement: a subject under a load, by their indices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Visit {
    pub(super) round: usize,
    pub(super) subject: usize,
    pub(super) load: usize,
}

/// The order of all measurements. Subjects and loads go forth in one round and back in the next, so that a
/// machine that slows down does so for all. `apart`: only one subject is in memory at a time, and each does
/// all its loads before the next comes; else subjects take turns at each load.
pub(super) fn visits(subjects: usize, loads: usize, rounds: usize, apart: bool) -> Vec<Visit> {
    let order = |count: usize, round: usize| -> Vec<usize> {
        if round.is_multiple_of(2) { (0..count).collect() } else { (0..count).rev().collect() }
    };
    let mut visits = Vec::with_capacity(subjects * loads * rounds);
    for round in 0..rounds {
        let (subjects, loads) = (order(subjects, round), order(loads, round));
        if apart {
            for &subject in &subjects {
                visits.extend(loads.iter().map(|&load| Visit { round, subject, load }));
            }
        } else {
            for &load in &loads {
                visits.extend(subjects.iter().map(|&subject| Visit { round, subject, load }));
            }
        }
    }
    visits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_take_turns_and_the_order_turns_round() {
        let said = |apart| {
            let visits = visits(2, 2, 2, apart);
            let words =
                visits.iter().map(|visit| format!("{}{}", ["a", "b"][visit.subject], ["1", "8"][visit.load]));
            words.collect::<Vec<_>>().join(" ")
        };
        assert_eq!(said(false), "a1 b1 a8 b8 b8 a8 b1 a1");
        assert_eq!(said(true), "a1 a8 b1 b8 b8 b1 a8 a1");
    }
}
