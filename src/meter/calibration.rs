//! Fits the coefficients of each step class to a short series of measured steps.
//!
//! The coefficients only set proportions; a step's total is always the measurement. They are
//! measured once per model, precision, device, thread count and build, and cached on disk.
//! Does not know prices, or where the cache directory lies.
//!
//! Each class is one straight line over the sequences' own work, as the split asks for. Against measured
//! steps of 1 to 64 sequences and 128 to 8,192 positions that errs by a few per cent in the median (`obol
//! bench --growth` draws it), provided that two things hold. The pool's memory has been written before: pages
//! of zeros are read from the cache, and attention then seems several times cheaper than it is. And the
//! steps reach as far as the budget allows, in number and in context, since relative errors are
//! least squares over what was measured and not over what was not.
//!
//! A device beside the host times its steps itself. It is kept busy for a while first, as its clocks rise with
//! work, and runs each kind of step once before that is timed, as what a first one needs is made ready then.

pub mod steps;

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use obol_models::batch::{CausalLm, ForwardError};
use obol_models::encoder::TextEncoder;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::share::{Coefficients, StepClass, Work};
use steps::{Group, Steps, works};

/// Counts the ways of measuring: a kept calibration of another way is measured again.
pub const VERSION: u32 = 2;

/// Runs of each short step.
const RUNS: usize = 3;

/// A device that warms up is kept busy for this part of the time that there is.
const WARM_UP: u32 = 8;

/// The fitted coefficients of one epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Calibration {
    pub decode: Coefficients,
    pub mixed: Coefficients,
    pub prefill: Coefficients,
    /// Of the encoder's steps, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embed: Option<Coefficients>,
}

impl Calibration {
    #[must_use]
    pub fn of(&self, class: StepClass) -> &Coefficients {
        match class {
            StepClass::Decode => &self.decode,
            StepClass::Mixed => &self.mixed,
            StepClass::Prefill => &self.prefill,
        }
    }

    /// What a step takes, in nanoseconds, by the fit.
    #[must_use]
    pub fn estimate(&self, class: StepClass, works: &[Work]) -> f64 {
        let of = self.of(class);
        let picos = u128::from(of.step) + works.iter().map(|work| of.own(*work)).sum::<u128>();
        picos as f64 / 1000.0
    }

    /// Names these coefficients and the rule they are used in; receipts carry it.
    #[must_use]
    pub fn method_id(&self) -> String {
        format!("shapley1-{}", &blake3::hash(self.json().as_bytes()).to_hex()[..12])
    }

    #[must_use]
    pub fn json(&self) -> String {
        serde_json::to_string(self).expect("integers serialise")
    }

    /// The same for every class, in picoseconds; for tests and simulated devices.
    #[must_use]
    pub fn uniform(coefficients: Coefficients) -> Self {
        Self { decode: coefficients, mixed: coefficients, prefill: coefficients, embed: None }
    }
}

/// One measured step: its sequences' work and its time in nanoseconds.
#[derive(Debug, Clone)]
pub struct Sample {
    pub class: StepClass,
    pub works: Vec<Work>,
    pub nanos: f64,
}

const fn alike(sequences: usize, tokens: usize, context: usize) -> Group {
    Group::new(sequences, tokens, context)
}

/// Steps to measure, first the ones that matter most: a slow model gets no further than the first few.
const GRID: [&[Group]; 19] = [
    &[alike(1, 1, 63)],
    &[alike(1, 64, 0)],
    &[alike(8, 1, 63)],
    &[alike(4, 1, 63), alike(1, 32, 0)],
    &[alike(1, 16, 0)],
    &[alike(1, 1, 1023)],
    &[alike(1, 32, 992)],
    &[alike(2, 1, 511), alike(1, 32, 992)],
    &[alike(32, 1, 63)],
    &[alike(1, 1, 4095)],
    &[alike(1, 16, 4080)],
    &[alike(2, 32, 0)],
    &[alike(1, 1, 63), alike(1, 64, 0)],
    &[alike(4, 1, 511)],
    &[alike(16, 1, 127)],
    &[alike(1, 128, 0)],
    &[alike(8, 1, 63), alike(2, 16, 0)],
    &[alike(2, 1, 2047)],
    &[alike(4, 1, 255), alike(1, 64, 448)],
];

/// Measures steps on the model for at most about `budget`, using the KV pool that is already there
/// (its content does not matter and is overwritten), and fits the coefficients.
///
/// # Errors
/// When a forward pass fails.
pub fn measure(
    model: &mut dyn CausalLm,
    blocks: usize,
    block_size: usize,
    budget: Duration,
) -> Result<Calibration, ForwardError> {
    let end = Instant::now() + budget;
    let mut samples = Vec::new();
    let mut steps = Steps::new(model, blocks, block_size);
    if steps.warms_up() && steps.fit(GRID[0]) {
        let warm = Instant::now() + budget / WARM_UP;
        steps.prepare(GRID[0]);
        while Instant::now() < warm {
            steps.run()?;
        }
    }
    for groups in GRID {
        if !steps.fit(groups) || !steps.write(steps.needed(groups), Some(end))? {
            continue;
        }
        let nanos = best_of(&mut steps, groups, budget, end)?;
        let (class, works) = works(groups);
        samples.push(Sample { class, works, nanos });
        if Instant::now() > end {
            break;
        }
    }
    Ok(fit(&samples))
}

/// The step's time in nanoseconds: the best of a few runs, since all that disturbs a run makes it longer. A long
/// step is run once.
fn best_of(
    steps: &mut Steps<'_>,
    groups: &[Group],
    budget: Duration,
    end: Instant,
) -> Result<f64, ForwardError> {
    steps.prepare(groups);
    if steps.warms_up() {
        steps.run()?;
    }
    let mut best = steps.run()?;
    for _ in 1..RUNS {
        if best > budget / 30 || Instant::now() > end {
            break;
        }
        best = best.min(steps.run()?);
    }
    Ok(best.as_nanos() as f64)
}

/// Texts of a step of the encoder, and how long each is.
const TEXTS: [(usize, usize); 9] =
    [(1, 16), (1, 64), (8, 16), (1, 256), (4, 64), (1, 4), (16, 8), (2, 128), (8, 64)];

/// Measures steps of the encoder for at most about `budget`, and fits the coefficients.
///
/// # Errors
/// When a step fails.
pub fn measure_encoder(
    encoder: &mut dyn TextEncoder,
    budget: Duration,
) -> Result<Coefficients, ForwardError> {
    let end = Instant::now() + budget;
    let mut samples: Vec<Sample> = Vec::new();
    let longest = encoder.context_length();
    for (texts, tokens) in TEXTS {
        let text: Vec<u32> = vec![0; tokens.min(longest)];
        let step = vec![&*text; texts];
        let mut best = f64::INFINITY;
        for _ in 0..=RUNS {
            let (start, mut vectors) = (Instant::now(), Vec::new());
            encoder.encode(&step, &mut || {}, &mut vectors)?;
            best = best.min(start.elapsed().as_nanos() as f64);
            if Instant::now() > end {
                break;
            }
        }
        let work = Work { tokens: text.len() as u64, context: 0, logits: 0 };
        samples.push(Sample { class: StepClass::Prefill, works: vec![work; texts], nanos: best });
        if Instant::now() > end {
            break;
        }
    }
    Ok(non_negative_least_squares(&samples.iter().collect::<Vec<_>>()))
}

/// Fits each class to its own samples; a class with too few borrows all of them.
#[must_use]
pub fn fit(samples: &[Sample]) -> Calibration {
    let class = |class: StepClass| {
        let own: Vec<&Sample> = samples.iter().filter(|s| s.class == class).collect();
        if own.len() >= 3 {
            non_negative_least_squares(&own)
        } else {
            non_negative_least_squares(&samples.iter().collect::<Vec<_>>())
        }
    };
    Calibration {
        decode: class(StepClass::Decode),
        mixed: class(StepClass::Mixed),
        prefill: class(StepClass::Prefill),
        embed: None,
    }
}

const TERMS: usize = 4;

/// Least squares of relative error with non-negative coefficients, exactly: with four terms, the
/// best of all fifteen non-empty subsets whose unconstrained solution is non-negative.
/// The logits term is tied to the token term's scale when the samples cannot tell them apart.
fn non_negative_least_squares(samples: &[&Sample]) -> Coefficients {
    let rows: Vec<([f64; TERMS], f64)> = samples
        .iter()
        .map(|s| {
            let sum = |f: fn(&Work) -> u64| s.works.iter().map(f).sum::<u64>() as f64;
            let terms = [1.0, sum(|w| w.tokens), sum(|w| w.pairs()), sum(|w| w.logits)];
            (terms.map(|t| t / s.nanos), 1.0)
        })
        .collect();
    let mut best = ([0.0; TERMS], f64::INFINITY);
    for subset in 1u32..1 << TERMS {
        let active: Vec<usize> = (0..TERMS).filter(|i| subset >> i & 1 == 1).collect();
        if active.len() > rows.len() {
            continue;
        }
        let Some(solution) = solve(&rows, &active) else { continue };
        if solution.iter().any(|x| *x < 0.0) {
            continue;
        }
        let mut terms = [0.0; TERMS];
        for (value, i) in solution.iter().zip(&active) {
            terms[*i] = *value;
        }
        let error: f64 = rows
            .iter()
            .map(|(row, y)| (row.iter().zip(terms).map(|(a, b)| a * b).sum::<f64>() - y).powi(2))
            .sum();
        if error < best.1 - 1e-12 {
            best = (terms, error);
        }
    }
    let picos = |nanos: f64| (nanos * 1000.0).round().clamp(0.0, 1e15) as u64;
    let [step, token, attention, logits] = best.0.map(picos);
    Coefficients { step, token, attention, logits }
}

/// Normal equations over the active columns by Gaussian elimination with pivoting; `None` when singular.
fn solve(rows: &[([f64; TERMS], f64)], active: &[usize]) -> Option<Vec<f64>> {
    let n = active.len();
    let mut matrix = vec![vec![0.0; n + 1]; n];
    // Columns scaled to unit length, so that the pivots can be compared.
    let scale: Vec<f64> =
        active.iter().map(|i| rows.iter().map(|(row, _)| row[*i] * row[*i]).sum::<f64>().sqrt()).collect();
    if scale.contains(&0.0) {
        return None;
    }
    for (row, y) in rows {
        for a in 0..n {
            for b in 0..n {
                matrix[a][b] += row[active[a]] / scale[a] * row[active[b]] / scale[b];
            }
            matrix[a][n] += row[active[a]] / scale[a] * y;
        }
    }
    for column in 0..n {
        let pivot =
            (column..n).max_by(|a, b| matrix[*a][column].abs().total_cmp(&matrix[*b][column].abs()))?;
        if matrix[pivot][column].abs() < 1e-9 {
            return None;
        }
        matrix.swap(column, pivot);
        for row in 0..n {
            if row != column {
                let factor = matrix[row][column] / matrix[column][column];
                let eliminated = matrix[column].clone();
                for (value, above) in matrix[row].iter_mut().zip(&eliminated) {
                    *value -= factor * above;
                }
            }
        }
    }
    Some((0..n).map(|i| matrix[i][n] / matrix[i][i] / scale[i]).collect())
}

/// The calibration, or the coefficients, kept in `file`, if there are readable ones.
#[must_use]
pub fn cached<T: DeserializeOwned>(file: &Path) -> Option<T> {
    let text = fs::read_to_string(file).ok()?;
    match serde_json::from_str(&text) {
        Ok(calibration) => Some(calibration),
        Err(error) => {
            tracing::warn!(
                "calibration in {} is unreadable and will be measured again: {error}",
                file.display()
            );
            None
        }
    }
}

/// Keeps a calibration, or coefficients, in `file`, replacing what is there at once or not at all.
///
/// # Errors
/// When the file cannot be written.
pub fn keep(calibration: &impl Serialize, file: &Path) -> io::Result<()> {
    if let Some(parent) = file.parent() {
        fs::create_dir_all(parent)?;
    }
    let partial = file.with_extension("partial");
    fs::write(&partial, serde_json::to_string(calibration).map_err(io::Error::other)?)?;
    fs::rename(partial, file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(works: &[(u64, u64)], c: Coefficients) -> Sample {
        let works: Vec<Work> = works
            .iter()
            .map(|(tokens, context)| Work { tokens: *tokens, context: *context, logits: 1 })
            .collect();
        let decoding = works.iter().filter(|w| w.tokens == 1).count();
        let nanos = (c.step as f64 + works.iter().map(|w| c.own(*w) as f64).sum::<f64>()) / 1000.0;
        Sample { class: StepClass::of(decoding, works.len() - decoding), works, nanos }
    }

    #[test]
    fn the_fit_finds_the_coefficients_that_made_the_samples() {
        let truth = Coefficients { step: 4_000_000_000, token: 300_000_000, attention: 90_000, logits: 0 };
        let samples: Vec<Sample> = [(1, 1, 31), (8, 1, 31), (1, 1, 1023), (16, 1, 31), (8, 1, 511)]
            .iter()
            .map(|(k, n, c)| sample(&vec![(*n, *c); *k], truth))
            .collect();
        let fitted = fit(&samples).decode;
        // Token and logits columns are the same in pure decode: only their sum can be known.
        assert!((fitted.token + fitted.logits).abs_diff(truth.token) < truth.token / 100, "{fitted:?}");
        assert!(fitted.step.abs_diff(truth.step) < truth.step / 100, "{fitted:?}");
        assert!(fitted.attention.abs_diff(truth.attention) < truth.attention / 20, "{fitted:?}");
    }

    #[test]
    fn coefficients_are_never_negative() {
        let mut samples = vec![];
        for (k, nanos) in [(1, 100.0), (2, 90.0), (4, 80.0), (8, 70.0)] {
            let works = vec![Work { tokens: 1, context: 10, logits: 1 }; k];
            samples.push(Sample { class: StepClass::Decode, works, nanos });
        }
        let fitted = fit(&samples).decode;
        assert!(fitted.step > 0 && fitted.token == 0, "{fitted:?}");
    }
}
