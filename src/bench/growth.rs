//! How a step's time grows with the batch and with the context, and how well the fitted calibration says it.
//!
//! Does: time decode and prefill steps on the model's own forward pass, without an engine, and put each beside
//! what a calibration of the same model, measured as at a server's first start, makes of it. Knows no price: the
//! calibration sets proportions of a measured step, so its errors move shares and never sums.

mod picture;

use std::time::Duration;

use obol_models::batch::{CausalLm, ForwardError};
use serde_json::{Value, json};

use crate::measure::progress::Progress;
use crate::measure::statistics::{median, percentile};
use crate::measure::table::aligned;
use crate::meter::calibration::Calibration;
use crate::meter::calibration::steps::{Group, Steps, works};
use crate::meter::share::StepClass;

/// Sequences of the measured decode steps.
const BATCHES: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
/// New tokens of the measured prefill steps, one sequence each.
const CHUNKS: [usize; 6] = [16, 32, 64, 128, 256, 512];
/// Positions of each sequence after the step.
const LENGTHS: [usize; 6] = [128, 512, 1024, 2048, 4096, 8192];
/// Runs of each step, of which the median counts; a step that is slow is run less often.
const RUNS: usize = 7;
const SLOW: Duration = Duration::from_millis(1500);

/// A kind of step: what it took, and what the calibration says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    pub sequences: usize,
    /// New tokens of each sequence.
    pub tokens: usize,
    /// Positions of each sequence after the step.
    pub length: usize,
    /// In milliseconds.
    pub measured: f64,
    pub fitted: f64,
}

impl Point {
    fn group(&self) -> Group {
        Group::new(self.sequences, self.tokens, self.length - self.tokens)
    }

    /// Of the fit, relative to what was measured.
    #[must_use]
    pub fn error(&self) -> f64 {
        self.fitted / self.measured - 1.0
    }
}

/// What the machine can do at most with the threads that ran the steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// int8 and f32 operations a second.
    pub int8_ops: f64,
    pub f32_ops: f64,
    /// Bytes a second from a buffer as large as the weights.
    pub read: f64,
}

/// What the steps ran on, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    pub model: String,
    pub precision: String,
    pub machine: String,
    pub threads: usize,
    pub command: Vec<String>,
}

/// Everything that was measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Growth {
    pub setting: Setting,
    pub calibration: Calibration,
    /// `None` where they are not measured: of a device beside the host.
    pub limits: Option<Limits>,
    pub weight_bytes: u64,
    /// Decode steps by sequences, then length; then prefill steps by chunk, then length.
    pub points: Vec<Point>,
}

/// Measures every step that the model's context and its pool of `blocks` blocks of `block_size` tokens allow.
///
/// # Errors
/// When a forward pass fails.
pub fn measure(
    model: &mut dyn CausalLm,
    blocks: usize,
    block_size: usize,
    calibration: &Calibration,
    progress: &Progress,
) -> Result<Vec<Point>, ForwardError> {
    let mut steps = Steps::new(model, blocks, block_size);
    let groups: Vec<Group> = groups().filter(|group| steps.fit(&[*group])).collect();
    let needed = groups.iter().map(|group| steps.needed(&[*group])).max().unwrap_or(0);
    progress.stage("growth", "writing the KV cache", 1);
    steps.write(needed, None)?;
    progress.stage("growth", "steps", groups.len() as u64);
    let mut points = Vec::with_capacity(groups.len());
    for group in groups {
        let (class, works) = works(&[group]);
        let point = Point {
            sequences: group.sequences,
            tokens: group.tokens,
            length: group.context + group.tokens,
            measured: time(&mut steps, group)?.as_secs_f64() * 1e3,
            fitted: calibration.estimate(class, &works) / 1e6,
        };
        points.push(point);
        progress.at(points.len() as u64);
    }
    Ok(points)
}

fn groups() -> impl Iterator<Item = Group> {
    let decode = |batch| LENGTHS.map(|length| Group::new(batch, 1, length - 1));
    let prefill = |chunk: usize| {
        let longer = LENGTHS.into_iter().filter(move |length| *length > chunk && *length >= 1024);
        std::iter::once(chunk).chain(longer).map(move |length| Group::new(1, chunk, length - chunk))
    };
    BATCHES.into_iter().flat_map(decode).chain(CHUNKS.into_iter().flat_map(prefill))
}

/// The median of several runs, after one that does not count.
fn time(steps: &mut Steps<'_>, group: Group) -> Result<Duration, ForwardError> {
    steps.prepare(&[group]);
    let (mut all, mut times) = (steps.run()?, Vec::new());
    while times.len() < RUNS && (times.is_empty() || all < SLOW) {
        let time = steps.run()?;
        all += time;
        times.push(time.as_secs_f64());
    }
    Ok(Duration::from_secs_f64(median(times)))
}

impl Growth {
    /// Median and worst of the fit's absolute errors, over the steps that `of` takes.
    fn errors(&self, of: impl Fn(&Point) -> bool) -> (f64, f64) {
        let points = self.points.iter().filter(|point| of(point));
        let mut errors: Vec<f64> = points.map(|point| point.error().abs()).collect();
        errors.sort_by(f64::total_cmp);
        (percentile(&errors, 0.5), percentile(&errors, 1.0))
    }

    /// Bytes a second at which one sequence's decode goes through the weights, at the shortest context.
    fn streaming(&self) -> Option<f64> {
        let one = self.points.iter().find(|point| (point.sequences, point.tokens) == (1, 1))?;
        Some(self.weight_bytes as f64 / (one.measured / 1e3))
    }

    /// A table for a terminal.
    #[must_use]
    pub fn to_table(&self) -> String {
        let Setting { model, precision, machine, threads, .. } = &self.setting;
        let mut text = format!("{model}, {precision}; {machine}, {threads} threads\n");
        if let Some(Limits { int8_ops, f32_ops, read }) = self.limits {
            text += &format!(
                "peaks: int8 {:.0} GOPS, f32 {:.0} GOPS, reading {:.0} MiB {:.1} GB/s\n",
                int8_ops / 1e9,
                f32_ops / 1e9,
                self.weight_bytes as f64 / f64::from(1 << 20),
                read / 1e9
            );
        }
        if let Some(streaming) = self.streaming() {
            let part =
                self.limits.map(|limits| format!(", {:.0} % of reading", streaming / limits.read * 100.0));
            text += &format!(
                "one sequence streams the weights at {:.1} GB/s{}\n",
                streaming / 1e9,
                part.unwrap_or_default()
            );
        }
        let row = |point: &Point| {
            vec![
                if point.tokens == 1 { "decode" } else { "prefill" }.to_owned(),
                point.sequences.to_string(),
                point.tokens.to_string(),
                point.length.to_string(),
                format!("{:.2}", point.measured),
                format!("{:.2}", point.fitted),
                format!("{:+.1}", point.error() * 100.0),
            ]
        };
        text.push('\n');
        text += &aligned(
            &["step", "sequences", "tokens each", "positions", "measured ms", "fitted ms", "error %"],
            self.points.iter().map(row).collect(),
            1,
        );
        let mut say = |name: &str, (median, worst): (f64, f64)| {
            text += &format!(
                "\n{name} error of the fit: median {:.1} %, worst {:.1} %",
                median * 100.0,
                worst * 100.0
            );
        };
        say("decode:", self.errors(|point| point.tokens == 1));
        say("prefill:", self.errors(|point| point.tokens > 1));
        say("all:", self.errors(|_| true));
        text.push('\n');
        text
    }

    /// Everything, for machines. Times in milliseconds, coefficients in picoseconds.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let Setting { model, precision, machine, threads, command } = &self.setting;
        let peaks = self.limits.map(|Limits { int8_ops, f32_ops, read }| {
            json!({
                "int8_operations_per_second": int8_ops,
                "f32_operations_per_second": f32_ops,
                "weights_read_bytes_per_second": read,
                "weight_bytes": self.weight_bytes,
            })
        });
        let point = |point: &Point| {
            json!({
                "class": if point.tokens == 1 { StepClass::Decode } else { StepClass::Prefill },
                "sequences": point.sequences,
                "tokens": point.tokens,
                "positions": point.length,
                "measured_ms": point.measured,
                "fitted_ms": point.fitted,
                "error": point.error(),
            })
        };
        let (median, worst) = self.errors(|_| true);
        json!({
            "model": model,
            "precision": precision,
            "machine": machine,
            "threads": threads,
            "command": command,
            "peaks": peaks,
            "weights_streamed_bytes_per_second": self.streaming(),
            "calibration": self.calibration,
            "error_median": median,
            "error_worst": worst,
            "points": self.points.iter().map(point).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use obol_models::fake::FakeModel;

    use super::*;
    use crate::meter::share::Coefficients;

    fn growth() -> Growth {
        let mut model = FakeModel::new(100, 1024, 1);
        model.allocate_kv(128, 16).expect("a small pool");
        let of = Coefficients { step: 5_000_000_000, token: 400_000_000, attention: 90_000, logits: 0 };
        let calibration = Calibration::uniform(of);
        let points = measure(&mut model, 128, 16, &calibration, &Progress::silent()).expect("it runs");
        Growth {
            setting: Setting {
                model: "fake".into(),
                precision: "none".into(),
                machine: "this one".into(),
                threads: 1,
                command: vec!["obol".into()],
            },
            calibration,
            limits: Some(Limits { int8_ops: 2e12, f32_ops: 2e11, read: 1e10 }),
            weight_bytes: 1 << 20,
            points,
        }
    }

    #[test]
    fn what_context_and_pool_allow_is_measured() {
        let growth = growth();
        let kinds: Vec<_> = growth.points.iter().map(|p| (p.sequences, p.tokens, p.length)).collect();
        let decode: Vec<_> = kinds.iter().filter(|(_, tokens, _)| *tokens == 1).collect();
        // 128 blocks of 16 hold 2,048 positions; the context ends at 1,024.
        assert_eq!(decode.len(), 3 + 3 + 2 + 1 + 1, "{decode:?}");
        assert!(kinds.contains(&(1, 16, 16)) && kinds.contains(&(1, 512, 1024)), "{kinds:?}");
        let one = growth.points[0];
        assert!((one.fitted - (5.0 + 0.4 + 128.0 * 0.000_09)).abs() < 1e-6, "{one:?}");
        assert!(growth.points.iter().all(|point| point.measured > 0.0));
    }

    #[test]
    fn table_json_and_picture_show_the_same_points() {
        let mut growth = growth();
        for (index, point) in growth.points.iter_mut().enumerate() {
            point.measured = point.fitted / if index == 0 { 1.5 } else { 1.0 };
        }
        assert!(growth.errors(|_| true).0.abs() < 1e-9 && (growth.errors(|_| true).1 - 0.5).abs() < 1e-9);
        let table = growth.to_table();
        assert!(
            table.contains("+50.0") && table.contains("all: error of the fit: median 0.0 %, worst 50.0 %")
        );
        let json = growth.to_json();
        assert_eq!(json["points"].as_array().expect("points").len(), growth.points.len());
        assert_eq!(json["points"][0]["class"], "decode");
        let svg = growth.to_svg().expect("a picture");
        assert!(svg.matches("<circle").count() >= 8, "each measured decode step that is drawn is a dot");
    }
}
