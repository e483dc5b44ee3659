//! The MLPs of a layer: one, or a mixture of experts.
//!
//! Invariant: a row's result depends on that row alone, bit for bit. Of a mixture each row adds its experts'
//! outputs in ascending order of the experts, and two equal probabilities are taken in that order too,
//! whichever rows share the batch.

use std::ops::Range;

use obol_kernels::{Act, Activations, Cpu};

use crate::cut::Part;
use crate::error::LoadError;
use crate::linear::{Linear, Loader, Named};
use crate::spec::{ExpertsSpec, FfnSpec, ModelSpec};

use super::fit;

/// A layer's MLP.
pub(super) enum Ffn {
    Dense(Mlp),
    Experts(Experts),
}

/// act(gate x) * (up x), or act(up x), then down.
pub(super) struct Mlp {
    act: Act,
    gated: bool,
    /// This device's part of it.
    pub(super) width: usize,
    hidden: usize,
    /// gate and up, or up alone
    pub(super) up: Linear,
    pub(super) down: Linear,
}

/// This device's part of an MLP's width: as even as the groups of `down` allow.
fn share(loader: &Loader<'_>, down: &str, hidden: usize, width: usize) -> Result<Range<usize>, LoadError> {
    if loader.rank.of == 1 {
        return Ok(0..width);
    }
    let unit = Linear::column_unit(loader, down, hidden, width)?;
    if width.div_ceil(unit) < loader.rank.of {
        return Err(LoadError::Options(format!(
            "tensor parallel {}: the {width} inputs of `{down}` are too few: they stay together in groups of {unit}; \
             choose fewer devices",
            loader.rank.of
        )));
    }
    Ok(loader.rank.share_in(width, unit))
}

/// Several MLPs, of which each row takes a few.
pub(super) struct Experts {
    /// The width is this device's part.
    pub(super) spec: ExpertsSpec,
    hidden: usize,
    /// (experts, hidden)
    pub(super) router: Linear,
    pub(super) experts: Vec<Mlp>,
}

/// Buffers between an MLP's operations, (rows, width) unless said otherwise.
#[derive(Default)]
pub(super) struct MlpWork {
    /// As [`Linear::place`] says: gate and up.
    gate_up: Vec<f32>,
    activated: Vec<f32>,
    // ---- a mixture's ----
    /// The router's logits, then probabilities: (rows, experts)
    router: Vec<f32>,
    /// (rows * used), each row's in ascending order of the experts.
    choices: Vec<Choice>,
    /// The inputs of an expert's rows.
    gathered: Vec<f32>,
    /// Their outputs.
    output: Vec<f32>,
}

/// A row's choice of an expert.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Choice {
    row: usize,
    expert: usize,
    weight: f32,
}

impl Ffn {
    pub(super) fn load(loader: &Loader<'_>, spec: &ModelSpec, layer: usize) -> Result<Self, LoadError> {
        match spec.layers[layer].ffn {
            FfnSpec::Dense { width } => {
                Mlp::load(loader, spec, layer, "", width, spec.ffn_bias).map(Self::Dense)
            }
            FfnSpec::Experts(experts) => Experts::load(loader, spec, layer, experts).map(Self::Experts),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Dense(mlp) => mlp.bytes(),
            Self::Experts(experts) => {
                experts.router.bytes() + experts.experts.iter().map(Mlp::bytes).sum::<usize>()
            }
        }
    }

    /// out (rows, hidden) of x (rows, hidden).
    pub(super) fn forward(
        &self,
        cpu: &Cpu,
        x: &[f32],
        quantized: &mut Activations,
        work: &mut MlpWork,
        out: &mut [f32],
    ) {
        match self {
            Self::Dense(mlp) => {
                let MlpWork { gate_up, activated, .. } = work;
                mlp.forward(cpu, x, quantized, (gate_up, activated), out);
            }
            Self::Experts(experts) => experts.forward(cpu, x, quantized, work, out),
        }
    }
}

impl Mlp {
    /// Loads the matrices `blk.LAYER.ffn_{gate,up,down}EXPERT`.
    fn load(
        loader: &Loader<'_>,
        spec: &ModelSpec,
        layer: usize,
        expert: &str,
        width: usize,
        bias: bool,
    ) -> Result<Self, LoadError> {
        let [gate, up, down] = ["gate", "up", "down"].map(|part| format!("blk.{layer}.ffn_{part}{expert}"));
        let share = share(loader, &down, spec.hidden, width)?;
        let part = if loader.rank.of == 1 { Part::Whole } else { Part::Rows(share.clone()) };
        let up = Named { name: &up, out_features: width, bias, part: part.clone() };
        let down_part = loader.rank.columns(share.clone());
        let down = Named { name: &down, out_features: spec.hidden, bias, part: down_part };
        let up = match spec.gated {
            true => {
                let gate = Named { name: &gate, out_features: width, bias, part };
                Linear::load(loader, spec.hidden, &[gate, up])?
            }
            false => Linear::load(loader, spec.hidden, &[up])?,
        };
        let down = Linear::load(loader, width, &[down])?;
        let width = share.len();
        Ok(Self { act: spec.act, gated: spec.gated, width, hidden: spec.hidden, up, down })
    }

    fn bytes(&self) -> usize {
        self.up.bytes() + self.down.bytes()
    }

    fn forward(
        &self,
        cpu: &Cpu,
        x: &[f32],
        quantized: &mut Activations,
        (gate_up, activated): (&mut Vec<f32>, &mut Vec<f32>),
        out: &mut [f32],
    ) {
        let rows = x.len() / self.hidden;
        let gate_up = fit(gate_up, rows * self.up.out_features());
        self.up.forward(cpu, x, quantized, gate_up);
        if !self.gated {
            cpu.act(self.act, gate_up);
            return self.down.forward(cpu, gate_up, quantized, out);
        }
        let activated = fit(activated, rows * self.width);
        if self.up.is_fused() {
            cpu.act_mul(self.act, gate_up, self.width, activated);
        } else {
            let (gate, up) = gate_up.split_at(rows * self.width);
            cpu.act_mul_split(self.act, gate, up, self.width, activated);
        }
        self.down.forward(cpu, activated, quantized, out);
    }
}

impl Experts {
    fn load(
        loader: &Loader<'_>,
        spec: &ModelSpec,
        layer: usize,
        experts: ExpertsSpec,
    ) -> Result<Self, LoadError> {
        let name = format!("blk.{layer}.ffn_gate_inp");
        let router = Named { name: &name, out_features: experts.count, bias: false, part: Part::Whole };
        let router = Linear::load(loader, spec.hidden, &[router])?;
        let expert = |index| Mlp::load(loader, spec, layer, &format!(".{index}"), experts.width, false);
        let loaded = (0..experts.count).map(expert).collect::<Result<Vec<_>, _>>()?;
        let width = loaded.iter().map(|expert| expert.width).max().unwrap_or(0);
        let experts = ExpertsSpec { width, ..experts };
        Ok(Self { spec: experts, hidden: spec.hidden, router, experts: loaded })
    }

    fn forward(
        &self,
        cpu: &Cpu,
        x: &[f32],
        quantized: &mut Activations,
        work: &mut MlpWork,
        out: &mut [f32],
    ) {
        let (hidden, rows) = (self.hidden, x.len() / self.hidden);
        let MlpWork { gate_up, activated, router, choices, gathered, output } = work;
        let router = fit(router, rows * self.spec.count);
        self.router.forward(cpu, x, quantized, router);
        choices.clear();
        for (row, logits) in router.chunks_exact_mut(self.spec.count).enumerate() {
            choose(&self.spec, row, logits, choices);
        }
        // By expert, and inside by row: the order in which rows are gathered.
        choices.sort_unstable_by_key(|choice| (choice.expert, choice.row));
        // All buffers as large as an expert's can become with so many rows, so that none grows when a later
        // batch is divided otherwise.
        quantized.reserve(rows, hidden.max(self.spec.width));
        let columns = self.experts.iter().map(|expert| expert.up.out_features()).max().unwrap_or(0);
        fit(gate_up, rows * columns);
        fit(activated, rows * self.spec.width);
        let (gathered, output) = (fit(gathered, rows * hidden), fit(output, rows * hidden));
        out.fill(0.0);
        for chosen in choices.chunk_by(|a, b| a.expert == b.expert) {
            let len = chosen.len() * hidden;
            for (choice, to) in chosen.iter().zip(gathered.chunks_exact_mut(hidden)) {
                to.copy_from_slice(&x[choice.row * hidden..][..hidden]);
            }
            let output = &mut output[..len];
            let expert = &self.experts[chosen[0].expert];
            expert.forward(cpu, &gathered[..len], quantized, (&mut *gate_up, &mut *activated), output);
            for (choice, from) in chosen.iter().zip(output.chunks_exact(hidden)) {
                for (to, from) in out[choice.row * hidden..][..hidden].iter_mut().zip(from) {
                    *to += choice.weight * from;
                }
            }
        }
    }
}

/// Adds the choices of a row with these router logits, which become probabilities.
fn choose(spec: &ExpertsSpec, row: usize, logits: &mut [f32], choices: &mut Vec<Choice>) {
    let largest = logits.iter().fold(f32::NEG_INFINITY, |largest, &logit| largest.max(logit));
    let mut total = 0.0;
    for logit in &mut *logits {
        *logit = (*logit - largest).exp();
        total += *logit;
    }
    let first = choices.len();
    let mut kept = 0.0;
    for _ in 0..spec.used {
        let taken = |expert: usize| choices[first..].iter().any(|choice| choice.expert == expert);
        // The first of the largest; where none is a number, the first that is left.
        let is_better = |expert: usize, best: usize| {
            logits[expert] > logits[best] || (logits[best].is_nan() && !logits[expert].is_nan())
        };
        let mut best: Option<usize> = None;
        for expert in (0..spec.count).filter(|&expert| !taken(expert)) {
            if best.is_none_or(|best| is_better(expert, best)) {
                best = Some(expert);
            }
        }
        let expert = best.expect("fewer are used than there are: checked in the spec; this is a bug");
        let weight = logits[expert] / total;
        kept += weight;
        choices.push(Choice { row, expert, weight });
    }
    if spec.normalized {
        choices[first..].iter_mut().for_each(|choice| choice.weight /= kept);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(used: usize, normalized: bool, logits: &[f32], expected: &[(usize, f32)]) {
        let spec = ExpertsSpec { count: logits.len(), used, width: 1, normalized };
        let mut choices = Vec::new();
        choose(&spec, 3, &mut logits.to_vec(), &mut choices);
        choices.sort_by_key(|choice| choice.expert);
        let found: Vec<usize> = choices.iter().map(|choice| choice.expert).collect();
        let experts: Vec<usize> = expected.iter().map(|(expert, _)| *expert).collect();
        assert_eq!(found, experts, "{logits:?}");
        for (choice, (_, weight)) in choices.iter().zip(expected) {
            assert!((choice.weight - weight).abs() < 1e-6, "{choices:?}, expected {expected:?}");
            assert_eq!(choice.row, 3);
        }
    }

    #[test]
    fn the_best_experts_are_chosen_and_ties_go_to_the_first() {
        let ln2 = std::f32::consts::LN_2;
        check(2, false, &[0.0, ln2, 0.0, 2.0 * ln2], &[(1, 0.25), (3, 0.5)]);
        check(2, true, &[0.0, ln2, 0.0, 2.0 * ln2], &[(1, 1.0 / 3.0), (3, 2.0 / 3.0)]);
        check(3, false, &[0.0; 4], &[(0, 0.25), (1, 0.25), (2, 0.25)]);
        check(1, true, &[-1.0, 5.0, 5.0], &[(1, 1.0)]);
        check(2, true, &[1000.0, -1000.0], &[(0, 1.0), (1, 0.0)]);
    }

    #[test]
    fn experts_whose_logits_are_no_numbers_come_last() {
        let check = |used: usize, logits: &[f32], expected: &[usize]| {
            let spec = ExpertsSpec { count: logits.len(), used, width: 1, normalized: true };
            let mut choices = Vec::new();
            choose(&spec, 0, &mut logits.to_vec(), &mut choices);
            let found: Vec<usize> = choices.iter().map(|choice| choice.expert).collect();
            assert_eq!(found, expected, "{used} of {logits:?}");
        };
        check(2, &[f32::NAN, 1.0, 2.0], &[2, 1]);
        check(2, &[1.0, f32::NAN, f32::NAN], &[0, 1]);
        check(3, &[f32::NAN, f32::NEG_INFINITY, f32::NAN, 1.0], &[3, 1, 0]);
        check(2, &[f32::NAN; 3], &[0, 1]);
    }
}
