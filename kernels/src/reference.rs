//! The operations once more, slow and obvious: every test's oracle. Sums are in f64.

use crate::attention::Attention;
use crate::kv::KvData;
use crate::{Act, Activations, Dense, GROUP, KvLayer, Packed, RopeStyle, RopeTable, Rows, Span};

/// int8 of each group of 32: (integers, scales).
pub fn quantize(x: &[f32]) -> (Vec<i8>, Vec<f32>) {
    let mut q = Vec::with_capacity(x.len());
    let mut scales = Vec::with_capacity(x.len() / GROUP);
    for group in x.chunks_exact(GROUP) {
        let (integers, scale) = quantize_all(group);
        q.extend(integers);
        scales.push(scale);
    }
    (q, scales)
}

/// int8 with one scale.
fn quantize_all(x: &[f32]) -> (Vec<i8>, f32) {
    let amax = x.iter().fold(0f32, |a, x| a.max(x.abs()));
    let inverse = if amax < f32::MIN_POSITIVE * 128.0 { 0.0 } else { 127.0 / amax };
    let scale = if inverse == 0.0 { 0.0 } else { amax / 127.0 };
    (x.iter().map(|x| (x * inverse).round_ties_even() as i8).collect(), scale)
}

/// y (m, n) of quantised rows and packed weights: integer dots per group, exact, then f64.
pub fn matmul_packed(x: &Activations, w: &Packed, bias: Option<&[f32]>, y: &mut [f32]) {
    let n = w.n();
    for row in 0..x.m() {
        for column in 0..n {
            let mut sum = bias.map_or(0.0, |bias| f64::from(bias[column]));
            for group in 0..w.k() / GROUP {
                let weights = w.group(column, group);
                let (a, a_scale) = x.group(row, group);
                let halves = weights.q.chunks(GROUP / 2).zip(a.chunks(GROUP / 2)).zip(weights.halves);
                for ((q, a), (scale, min)) in halves {
                    let dot: i32 = q.iter().zip(a).map(|(q, a)| i32::from(*q) * i32::from(*a)).sum();
                    let total: i32 = a.iter().map(|a| i32::from(*a)).sum();
                    sum += f64::from(a_scale)
                        * (f64::from(scale) * f64::from(dot) + f64::from(min) * f64::from(total));
                }
            }
            y[row * n + column] = sum as f32;
        }
    }
}

/// y (m, n) = x (m, k) * w^T + bias.
pub fn matmul_dense(x: &[f32], w: &Dense, bias: Option<&[f32]>, y: &mut [f32]) {
    let mut weights = vec![0.0; w.k()];
    for column in 0..w.n() {
        w.dequantize_row(column, &mut weights);
        for (row, x) in x.chunks_exact(w.k()).enumerate() {
            let dot: f64 = x.iter().zip(&weights).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
            y[row * w.n() + column] = (dot + bias.map_or(0.0, |bias| f64::from(bias[column]))) as f32;
        }
    }
}

/// out = x / sqrt(mean(x^2) + eps) * weight, rows of weight's length.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        let mean = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>() / x.len() as f64;
        let factor = 1.0 / (mean + f64::from(eps)).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = (f64::from(*x) * factor * f64::from(*weight)) as f32;
        }
    }
}

/// residual += delta, then [`rms_norm`].
pub fn add_rms_norm(residual: &mut [f32], delta: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    for (residual, delta) in residual.iter_mut().zip(delta) {
        *residual += delta;
    }
    rms_norm(residual, weight, eps, out);
}

/// out = (x - mean) / sqrt(variance + eps) * weight + bias, rows of weight's length.
pub fn layer_norm(x: &[f32], weight: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    let width = weight.len();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let mean = x.iter().map(|x| f64::from(*x)).sum::<f64>() / width as f64;
        let variance = x.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / width as f64;
        let factor = 1.0 / (variance + f64::from(eps)).sqrt();
        for i in 0..width {
            let bias = bias.map_or(0.0, |bias| f64::from(bias[i]));
            out[i] = ((f64::from(x[i]) - mean) * factor * f64::from(weight[i]) + bias) as f32;
        }
    }
}

/// One element's activation.
pub fn act(act: Act, x: f64) -> f64 {
    match act {
        Act::Silu => x / (1.0 + (-x).exp()),
        Act::GeluTanh => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
            x / (1.0 + (-2.0 * u).exp())
        }
        Act::Gelu => x * normal_below(x),
    }
}

/// The standard normal distribution's share below x: Simpson's rule over its density from -12 on.
fn normal_below(x: f64) -> f64 {
    if x < -12.0 {
        return 0.0;
    }
    let to = x.min(12.0);
    let steps = 4000;
    let width = (to + 12.0) / f64::from(steps);
    let density = |z: f64| (-z * z / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let weighted = |i: i32| {
        let weight = if i == 0 || i == steps { 1.0 } else { f64::from(2 + 2 * (i % 2)) };
        weight * density(-12.0 + f64::from(i) * width)
    };
    (0..=steps).map(weighted).sum::<f64>() * width / 3.0
}

/// out = act(gate) * up.
pub fn act_mul(function: Act, gate: Rows<'_>, up: Rows<'_>, width: usize, out: &mut [f32]) {
    for (row, out) in out.chunks_exact_mut(width).enumerate() {
        let (gate, up) = (gate.row(row, width), up.row(row, width));
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out = (act(function, f64::from(*gate)) * f64::from(*up)) as f32;
        }
    }
}

/// x = cap * tanh(x / cap).
pub fn softcap(x: &mut [f32], cap: f32) {
    let cap = f64::from(cap);
    x.iter_mut().for_each(|x| *x = (cap * (f64::from(*x) / cap).tanh()) as f32);
}

/// Rotates the first `heads` heads of every row of `x` in place.
pub fn rope(
    x: &mut [f32],
    stride: usize,
    heads: usize,
    head_dim: usize,
    table: &RopeTable,
    style: RopeStyle,
) {
    let half = table.rotary_dim() / 2;
    for row in 0..table.rows() {
        for head in 0..heads {
            let x = &mut x[row * stride + head * head_dim..][..head_dim];
            for i in 0..half {
                let (a, b) = match style {
                    RopeStyle::Interleaved => (2 * i, 2 * i + 1),
                    RopeStyle::Halves => (i, i + half),
                };
                let angle = row * half + i;
                let (cos, sin) = (table.cos[angle], table.sin[angle]);
                (x[a], x[b]) = (x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos);
            }
        }
    }
}

/// Writes each row's K and V (kv_heads, head_dim), rounded to the layer's type, at its position.
pub fn kv_write(
    layer: &mut KvLayer,
    k: Rows<'_>,
    v: Rows<'_>,
    spans: &[Span],
    positions: &[u32],
    block_tables: &[u32],
) {
    let shape = layer.shape();
    let width = shape.kv_heads * shape.head_dim;
    for span in spans {
        for row in span.rows.clone() {
            let position = positions[row] as usize;
            let block = block_tables[span.table.start + position / shape.block_size] as usize;
            let slot = position % shape.block_size;
            for head in 0..shape.kv_heads {
                let from = head * shape.head_dim..(head + 1) * shape.head_dim;
                let (k, v) = (&k.row(row, width)[from.clone()], &v.row(row, width)[from]);
                put(layer, (block, head, slot), k, v);
            }
        }
    }
}

fn put(layer: &mut KvLayer, (block, head, slot): (usize, usize, usize), k: &[f32], v: &[f32]) {
    let shape = layer.shape();
    let (k_start, v_start) = (shape.k_start(block, head), shape.v_start(block, head) + slot * shape.v_dim());
    let k_at = |d| k_start + shape.k_offset(slot, d);
    for d in 0..shape.head_dim {
        match &mut layer.data {
            KvData::Half(parts) => {
                parts.k[k_at(d)] = half::f16::from_f32(k[d]).to_bits();
                parts.v[v_start + d] = half::f16::from_f32(v[d]).to_bits();
            }
            KvData::Brain(parts) => {
                parts.k[k_at(d)] = half::bf16::from_f32(k[d]).to_bits();
                parts.v[v_start + d] = half::bf16::from_f32(v[d]).to_bits();
            }
            KvData::Single(parts) => (parts.k[k_at(d)], parts.v[v_start + d]) = (k[d], v[d]),
            KvData::Byte(_) => {}
        }
    }
    if let KvData::Byte(parts) = &mut layer.data {
        let scale_at = shape.scale_start(block, head) + slot;
        let ((k, k_scale), (v, v_scale)) = (quantize_all(k), quantize_all(v));
        (parts.k_scales[scale_at], parts.v_scales[scale_at]) = (k_scale, v_scale);
        parts.v[v_start..][..shape.head_dim].copy_from_slice(&v);
        (0..shape.head_dim).for_each(|d| parts.k[k_at(d)] = k[d]);
    }
}

/// out (rows, heads, head_dim): each row attends to the positions it sees of its own sequence.
pub fn paged_attention(q: Rows<'_>, attention: &Attention<'_>, out: &mut [f32]) {
    let shape = attention.layer.shape();
    let width = attention.heads * shape.head_dim;
    for span in attention.spans {
        let table = &attention.block_tables[span.table.clone()];
        for row in span.rows.clone() {
            let position = attention.positions[row] as usize;
            for head in 0..attention.heads {
                let q = &q.row(row, width)[head * shape.head_dim..][..shape.head_dim];
                let kv_head = head / (attention.heads / shape.kv_heads);
                let seen: Vec<(f64, Vec<f32>)> = (attention.first_seen(position)..=position)
                    .map(|p| {
                        let block = table[p / shape.block_size] as usize;
                        let (k, v) = attention.layer.read(block, kv_head, p % shape.block_size);
                        let dot: f64 = q.iter().zip(&k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                        let score = dot * f64::from(attention.scale);
                        let capped =
                            attention.softcap.map(|cap| f64::from(cap) * (score / f64::from(cap)).tanh());
                        (capped.unwrap_or(score), v)
                    })
                    .collect();
                let max = seen.iter().fold(f64::NEG_INFINITY, |max, (score, _)| max.max(*score));
                let total: f64 = seen.iter().map(|(score, _)| (score - max).exp()).sum();
                let out = &mut out[row * width + head * shape.head_dim..][..shape.head_dim];
                for (d, out) in out.iter_mut().enumerate() {
                    let sum: f64 = seen.iter().map(|(score, v)| (score - max).exp() * f64::from(v[d])).sum();
                    *out = (sum / total) as f32;
                }
            }
        }
    }
}
