//! Greedy answers, and closed loops of clients with what the meter charged for them.

use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;

use super::Settings;
use crate::ledger::RateCard;
use crate::measure::MeasureError;
use crate::measure::asking::{Answer, NoAnswer, Running, ask, closed_loop, request, runtime, settled};
use crate::measure::progress::Progress;
use crate::measure::statistics::{median, percentile};
use crate::units::{DeviceNanos, Picos};
use crate::usage::Usage;

/// Speed and cost at one number of clients: the median of the rounds, figure by figure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speed {
    pub clients: usize,
    pub output_tokens_per_second: f64,
    pub ttft_p50: Duration,
    pub between_tokens_p50: Duration,
    /// Of one round, of all its requests.
    pub requests: u64,
    pub prompt_tokens: u64,
    pub output_tokens: u64,
    pub prefill_seconds: f64,
    pub decode_seconds: f64,
    /// Everything the round's requests are charged, over a million of its output tokens.
    pub cost_per_million_output: f64,
    /// The same over a million of all its tokens, prompts included.
    pub cost_per_million_tokens: f64,
}

impl Speed {
    #[must_use]
    pub fn device_seconds(&self) -> f64 {
        self.prefill_seconds + self.decode_seconds
    }
}

/// Where two lists of answers part.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Agreement {
    pub prompts: usize,
    /// Answers equal from the first token to the last.
    pub same: usize,
    /// Mean number of equal tokens at the answers' beginnings.
    pub equal_tokens: f64,
}

pub(super) fn agreement(reference: &[Vec<u32>], own: &[Vec<u32>]) -> Agreement {
    let pairs = || reference.iter().zip(own);
    let equal = pairs().map(|(a, b)| a.iter().zip(b).take_while(|(a, b)| a == b).count());
    Agreement {
        prompts: reference.len(),
        same: pairs().filter(|(a, b)| a == b).count(),
        equal_tokens: equal.sum::<usize>() as f64 / reference.len() as f64,
    }
}

/// The greedy answers to `prompts`, all asked at once.
pub(super) fn answers(
    running: &Running,
    prompts: &[Arc<[u32]>],
    settings: &Settings,
    progress: &Progress,
) -> Result<Vec<Vec<u32>>, MeasureError> {
    let done = Cell::new(0);
    let asked = prompts.iter().map(async |prompt| {
        let answer = ask(&running.engine, request(prompt.clone(), settings.answer_tokens, false, None)).await;
        done.set(done.get() + 1);
        progress.at(done.get());
        answer
    });
    let answers = runtime()?.block_on(join_all(asked));
    let answers = answers.into_iter().map(|answer| answer.map(|answer| answer.tokens));
    let answers = answers.collect::<Result<_, NoAnswer>>()?;
    settled(&running.reports, prompts.len())?;
    Ok(answers)
}

/// Rounds of closed loops at each number of clients, every other round in the opposite order.
pub(super) fn speeds(
    running: &Running,
    prompts: &Prompts,
    settings: &Settings,
    progress: &Progress,
) -> Result<Vec<Speed>, MeasureError> {
    let mut rounds: Vec<Vec<Speed>> = vec![Vec::new(); settings.clients.len()];
    for round in 0..settings.rounds {
        let forth = 0..settings.clients.len();
        let order: Vec<usize> = if round % 2 == 0 { forth.collect() } else { forth.rev().collect() };
        for (done, index) in order.into_iter().enumerate() {
            let clients = settings.clients[index];
            rounds[index].push(one_round(running, clients, round, prompts, settings)?);
            progress.at((round * settings.clients.len() + done) as u64 + 1);
        }
    }
    Ok(rounds.iter().map(|rounds| middle(rounds)).collect())
}

fn one_round(
    running: &Running,
    clients: usize,
    round: usize,
    prompts: &Prompts,
    settings: &Settings,
) -> Result<Speed, MeasureError> {
    let begin = Instant::now();
    let answers = runtime()?.block_on(closed_loop(clients, settings.requests, async |client, index| {
        let prompt = prompts.get((round * clients + client) * settings.requests + index);
        ask(&running.engine, request(prompt, settings.output_tokens, true, None)).await
    }));
    let answers: Vec<Answer> = answers.into_iter().collect::<Result<_, NoAnswer>>()?;
    let wall = begin.elapsed();
    let usages = settled(&running.reports, answers.len())?;
    Ok(figures(clients, wall, &answers, &usages, running, &settings.rate))
}

fn figures(
    clients: usize,
    wall: Duration,
    answers: &[Answer],
    usages: &[Usage],
    running: &Running,
    rate: &RateCard,
) -> Speed {
    let sorted_median = |values: Vec<f64>| Duration::from_secs_f64(median(values).max(0.0));
    let first = |answer: &Answer| answer.came.first().map(|came| (*came - answer.sent).as_secs_f64());
    let gaps = |answer: &Answer| {
        let pairs = answer.came.windows(2);
        pairs.map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect::<Vec<f64>>()
    };
    // As on a receipt: priced by the request, each part rounded down once.
    let prices = rate.prices(Some(running.engine.config().pool(DeviceNanos::ZERO)));
    let cost: Picos = usages.iter().map(|usage| prices.time(usage.device()) + prices.memory(usage.kv)).sum();
    let count = |of: fn(&Usage) -> u64| usages.iter().map(of).sum::<u64>();
    let (prompt_tokens, output_tokens) = (count(|u| u.tokens.prompt), count(|u| u.tokens.completion));
    let seconds = |of: fn(&Usage) -> DeviceNanos| usages.iter().map(of).sum::<DeviceNanos>().as_secs_f64();
    let per_million = |tokens: u64| cost.as_f64() * 1e6 / tokens as f64;
    let between: Vec<f64> = answers.iter().flat_map(gaps).collect();
    Speed {
        clients,
        output_tokens_per_second: output_tokens as f64 / wall.as_secs_f64(),
        ttft_p50: sorted_median(answers.iter().filter_map(first).collect()),
        between_tokens_p50: sorted_median(between),
        requests: usages.len() as u64,
        prompt_tokens,
        output_tokens,
        prefill_seconds: seconds(|usage| usage.prefill),
        decode_seconds: seconds(|usage| usage.decode),
        cost_per_million_output: per_million(output_tokens),
        cost_per_million_tokens: per_million(prompt_tokens + output_tokens),
    }
}

/// Figure by figure the median of the rounds.
fn middle(rounds: &[Speed]) -> Speed {
    let of = |figure: fn(&Speed) -> f64| {
        let mut values: Vec<f64> = rounds.iter().map(figure).collect();
        values.sort_by(f64::total_cmp);
        percentile(&values, 0.5)
    };
    Speed {
        output_tokens_per_second: of(|r| r.output_tokens_per_second),
        ttft_p50: Duration::from_secs_f64(of(|r| r.ttft_p50.as_secs_f64())),
        between_tokens_p50: Duration::from_secs_f64(of(|r| r.between_tokens_p50.as_secs_f64())),
        prefill_seconds: of(|r| r.prefill_seconds),
        decode_seconds: of(|r| r.decode_seconds),
        cost_per_million_output: of(|r| r.cost_per_million_output),
        cost_per_million_tokens: of(|r| r.cost_per_million_tokens),
        ..rounds[0]
    }
}

/// Prompts of one length for the closed loops: windows of the text, each somewhere else.
pub(super) struct Prompts {
    tokens: Vec<u32>,
    begin: Option<u32>,
    length: usize,
}

impl Prompts {
    /// `tokens` has at least `length` tokens.
    pub(super) fn new(tokens: Vec<u32>, begin: Option<u32>, length: usize) -> Self {
        Self { tokens, begin, length }
    }

    fn get(&self, index: usize) -> Arc<[u32]> {
        let starts = self.tokens.len() - self.length + 1;
        // A stride that shares no factor with most lengths walks through all of the text.
        let start = index * 1009 % starts;
        let mut prompt = self.tokens[start..start + self.length].to_vec();
        prompt[0] = self.begin.unwrap_or(prompt[0]);
        prompt.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_agree_up_to_their_first_difference() {
        let found = agreement(
            &[vec![1, 2, 3], vec![4, 5, 6], vec![7], vec![]],
            &[vec![1, 2, 3], vec![4, 9, 6], vec![7, 8], vec![]],
        );
        assert_eq!((found.prompts, found.same), (4, 2));
        assert!((found.equal_tokens - 5.0 / 4.0).abs() < 1e-12);
    }

    #[test]
    fn prompts_are_windows_of_the_text() {
        let prompts = Prompts::new((0..10).collect(), Some(99), 4);
        assert_eq!(*prompts.get(0), [99, 1, 2, 3]);
        for index in 0..100 {
            let prompt = prompts.get(index);
            assert!(prompt[0] == 99 && prompt[3] == prompt[1] + 2 && prompt[3] < 10, "{prompt:?}");
        }
        assert_eq!(*Prompts::new(vec![5, 6], None, 2).get(7), [5, 6]);
    }
}
