//! Matrices of 4-bit integers in groups, as GPTQ and AWQ checkpoints have them.
//!
//! In place of `NAME.weight` lie `NAME.qweight`, eight integers a word, `NAME.qzeros` and `NAME.scales`, for
//! each group of inputs, and with GPTQ perhaps `NAME.g_idx`, each input's group. A weight is
//! `scale * (q - zero)`, exact in f32 as `scale * q + min`. Layouts: GPTQ's words run along the inputs,
//! (in / 8, out); AWQ's ("gemm") along the outputs, (in, out / 8), in the order 0 2 4 6 1 3 5 7.
//!
//! Knows neither model nor kernels. Invariant: a [`Grouped`] has been checked; reading it does not fail.

use candle_core::quantized::GgmlDType;
use half::{bf16, f16};
use obol_kernels::{Bits, GROUP, ScaleKind};
use serde_json::Value;

use crate::blocks::{Format, Scales};
use crate::checkpoint::Tensors;
use crate::error::LoadError;
use crate::gguf::TensorView;

const SUPPORTED: &str = "supported: gptq with 4 bits (checkpoint_format gptq or gptq_v2), awq with 4 bits (version gemm), \
     both in groups of a multiple of 32 or -1; or choose the unquantised model and --quant";

/// How a checkpoint's matrices are quantised: `quantization_config` of its `config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GroupedConfig {
    packing: Packing,
    /// Inputs that share a scale; all if none.
    group_size: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Packing {
    /// Zeros are stored less this: 1 but for `gptq_v2`.
    Gptq {
        zero_offset: u8,
    },
    Awq,
}

impl GroupedConfig {
    /// Reads the value of `quantization_config`.
    ///
    /// # Errors
    /// Says what is not supported, and what is.
    pub(crate) fn from_json(quantization: &Value) -> Result<Self, String> {
        let text = |key: &str| quantization.get(key).and_then(Value::as_str).map(str::to_lowercase);
        let refuse = |what: String| Err(format!("{what} is not supported; {SUPPORTED}"));
        let Some(method) = text("quant_method") else {
            return refuse("a quantisation without `quant_method`".into());
        };
        let packing = match method.as_str() {
            "gptq" => match text("checkpoint_format").as_deref().unwrap_or("gptq") {
                "gptq" => Packing::Gptq { zero_offset: 1 },
                "gptq_v2" => Packing::Gptq { zero_offset: 0 },
                other => return refuse(format!("gptq with checkpoint_format `{other}`")),
            },
            "awq" => match text("version").as_deref().unwrap_or("gemm") {
                "gemm" => Packing::Awq,
                other => return refuse(format!("awq with version `{other}`")),
            },
            other => return refuse(format!("`{other}`")),
        };
        if quantization.get("is_marlin_format").and_then(Value::as_bool) == Some(true) {
            return refuse(format!("{method} in Marlin's layout"));
        }
        let bits = quantization.get("bits").or_else(|| quantization.get("w_bit"));
        match bits.and_then(Value::as_i64) {
            Some(4) => {}
            Some(bits) => return refuse(format!("{method} with {bits} bits")),
            None => return refuse(format!("{method} without `bits`")),
        }
        let group_size = quantization.get("group_size").or_else(|| quantization.get("q_group_size"));
        let group_size = match group_size.and_then(Value::as_i64) {
            Some(-1) => None,
            Some(size @ 32..=1_048_576) if size % 32 == 0 => Some(size as usize),
            Some(size) => return refuse(format!("{method} with a group_size of {size}")),
            None => return refuse(format!("{method} without `group_size`")),
        };
        Ok(Self { packing, group_size })
    }

    /// The precision's name: "GPTQ int4".
    pub(crate) fn label(self) -> &'static str {
        match self.packing {
            Packing::Gptq { .. } => "GPTQ int4",
            Packing::Awq => "AWQ int4",
        }
    }

    /// Names of the tensors that stand for `tensor` (`....q_proj.weight`); none for other than weights.
    pub(crate) fn parts(tensor: &str) -> Option<[String; 4]> {
        let stem = tensor.strip_suffix(".weight")?;
        Some(["qweight", "qzeros", "scales", "g_idx"].map(|part| format!("{stem}.{part}")))
    }
}

/// A tensor of 32-bit integers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Integers<'a> {
    pub shape: &'a [usize],
    /// Little-endian.
    pub data: &'a [u8],
}

impl Integers<'_> {
    fn at(&self, index: usize) -> u32 {
        let b = &self.data[4 * index..][..4];
        u32::from_le_bytes([b[0], b[1], b[2], b[3]])
    }
}

/// A quantised matrix (out_features, in_features), whole.
#[derive(Debug, Clone)]
pub(crate) struct Grouped<'a> {
    packing: Packing,
    n: usize,
    group_size: usize,
    words: Integers<'a>,
    zeros: Integers<'a>,
    /// (groups, n)
    scales: TensorView<'a>,
    /// Each input's group, where they do not lie one after another.
    scrambled: Option<Integers<'a>>,
    /// All zeros are 8 and all scales f16.
    centred: bool,
}

impl<'a> Grouped<'a> {
    /// The matrix whose tensors are called `parts`, with `k` inputs; none where there is no such matrix.
    ///
    /// # Errors
    /// When a part is missing or does not fit the others.
    pub(crate) fn find(
        files: &'a dyn Tensors,
        config: GroupedConfig,
        parts: &[String; 4],
        k: usize,
    ) -> Result<Option<Self>, LoadError> {
        let [qweight, qzeros, scales_name, g_idx] = parts;
        let Some(words) = files.find_integers(qweight)? else { return Ok(None) };
        let missing = |name: &String| LoadError::MissingTensor(name.clone());
        let zeros = files.find_integers(qzeros)?.ok_or_else(|| missing(qzeros))?;
        let scales = files.find(scales_name)?.ok_or_else(|| missing(scales_name))?;
        let &[groups, n] = &scales.shape[..] else {
            let problem = format!("its shape is {:?}, not (groups, outputs)", scales.shape);
            return Err(LoadError::TensorData { tensor: scales_name.clone(), problem });
        };
        let group_size = config.group_size.unwrap_or(k);
        if !k.is_multiple_of(GROUP) || !n.is_multiple_of(8) {
            let problem =
                format!("({n}, {k}) cannot be packed: the outputs must be a multiple of 8, the inputs of 32");
            return Err(LoadError::TensorData { tensor: qweight.clone(), problem });
        }
        let expect = |name: &String, found: &[usize], expected: &[usize]| {
            if found == expected {
                return Ok(());
            }
            let (tensor, expected) = (name.clone(), expected.to_vec());
            Err(LoadError::TensorShape { tensor, expected, found: found.to_vec() })
        };
        expect(scales_name, &scales.shape, &[k.div_ceil(group_size), n])?;
        expect(qzeros, zeros.shape, &[groups, n / 8])?;
        match config.packing {
            Packing::Gptq { .. } => expect(qweight, words.shape, &[k / 8, n])?,
            Packing::Awq => expect(qweight, words.shape, &[k, n / 8])?,
        }
        if !matches!(scales.dtype, GgmlDType::F16 | GgmlDType::BF16 | GgmlDType::F32) {
            let problem = "its type is none of F16, BF16 and F32".into();
            return Err(LoadError::TensorData { tensor: scales_name.clone(), problem });
        }
        let scrambled = match files.find_integers(g_idx)? {
            Some(order) if config.packing != Packing::Awq => {
                expect(g_idx, order.shape, &[k])?;
                if let Some(at) = (0..k).find(|&i| order.at(i) as usize >= groups) {
                    let problem = format!("input {at} is in group {} of {groups}", order.at(at));
                    return Err(LoadError::TensorData { tensor: g_idx.clone(), problem });
                }
                let in_order = (0..k).all(|i| order.at(i) as usize == i / group_size);
                (!in_order).then_some(order)
            }
            _ => None,
        };
        let packing = config.packing;
        let mut grouped = Self { packing, n, group_size, words, zeros, scales, scrambled, centred: false };
        grouped.centred = grouped.scales.dtype == GgmlDType::F16
            && (0..groups).all(|group| (0..n).all(|column| grouped.zero(group, column) == 8));
        Ok(Some(grouped))
    }

    /// Outputs.
    pub(crate) fn n(&self) -> usize {
        self.n
    }

    /// The file's part that holds the integers.
    pub(crate) fn data(&self) -> &'a [u8] {
        self.words.data
    }

    /// The packed format that holds the matrix without loss; none where inputs that lie together have
    /// several scales.
    pub(crate) fn format(&self) -> Option<Format> {
        let kind = if self.centred { ScaleKind::F16Centred } else { ScaleKind::F32 };
        self.scrambled.is_none().then_some(Format { bits: Bits::Four, scales: Scales::Groups(kind) })
    }

    /// The 32 integers of output `column` from input `32 * group` on; returns (scale, min). Not for scrambled.
    pub(crate) fn group(&self, column: usize, group: usize, q: &mut [u8; GROUP]) -> (f32, f32) {
        for (i, q) in q.iter_mut().enumerate() {
            *q = self.integer(column, group * GROUP + i);
        }
        let group = group * GROUP / self.group_size;
        let scale = self.scale(group, column);
        (scale, -f32::from(self.zero(group, column)) * scale)
    }

    /// The weights of output `column` from input `start` on.
    pub(crate) fn values(&self, column: usize, start: usize, out: &mut [f32]) {
        let mut last = None;
        for (i, out) in (start..).zip(out) {
            let group = self.scrambled.map_or(i / self.group_size, |order| order.at(i) as usize);
            let (scale, zero) = match last {
                Some((known, scale, zero)) if known == group => (scale, zero),
                _ => (self.scale(group, column), self.zero(group, column)),
            };
            last = Some((group, scale, zero));
            *out = scale * (f32::from(self.integer(column, i)) - f32::from(zero));
        }
    }

    fn integer(&self, column: usize, i: usize) -> u8 {
        match self.packing {
            Packing::Gptq { .. } => nibble(self.words.at(i / 8 * self.n + column), i % 8),
            Packing::Awq => nibble(self.words.at(i * (self.n / 8) + column / 8), awq_place(column)),
        }
    }

    fn zero(&self, group: usize, column: usize) -> u8 {
        let word = self.zeros.at(group * (self.n / 8) + column / 8);
        match self.packing {
            // The sum wraps as 4 bits in some readers; 16 does not occur in files that were made with care.
            Packing::Gptq { zero_offset } => nibble(word, column % 8) + zero_offset,
            Packing::Awq => nibble(word, awq_place(column)),
        }
    }

    fn scale(&self, group: usize, column: usize) -> f32 {
        let (at, data) = (group * self.n + column, self.scales.data);
        match self.scales.dtype {
            GgmlDType::F16 => f16::from_le_bytes([data[2 * at], data[2 * at + 1]]).to_f32(),
            GgmlDType::BF16 => bf16::from_le_bytes([data[2 * at], data[2 * at + 1]]).to_f32(),
            _ => f32::from_le_bytes([data[4 * at], data[4 * at + 1], data[4 * at + 2], data[4 * at + 3]]),
        }
    }
}

fn nibble(word: u32, place: usize) -> u8 {
    (word >> (4 * place) & 15) as u8
}

/// Where in a word AWQ keeps a column.
fn awq_place(column: usize) -> usize {
    [0, 4, 1, 5, 2, 6, 3, 7][column % 8]
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::safetensors::Safetensors;

    /// What is packed and what is dequantised are the same numbers, in every matrix of every checkpoint.
    #[test]
    fn integers_with_scales_are_the_values() {
        let families = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families");
        let (mut packed, mut scrambled) = (0, 0);
        for name in ["gptq_g128", "gptq_g32_act_order", "gptq_v2_g64", "awq_g64", "awq_g128"] {
            let config = std::fs::read(families.join(name).join("config.json")).expect("the fixture");
            let config: Value = serde_json::from_slice(&config).expect("JSON");
            let config = GroupedConfig::from_json(&config["quantization_config"]).expect("supported");
            let files = Safetensors::open(&families.join(name)).expect("the fixture");
            for qweight in files.names() {
                let Some(stem) = qweight.strip_suffix(".qweight") else { continue };
                let shape = files.find_raw(qweight).expect("a tensor").shape;
                let k = if config.packing == Packing::Awq { shape[0] } else { 8 * shape[0] };
                let parts = GroupedConfig::parts(&format!("{stem}.weight")).expect("a weight");
                let grouped = Grouped::find(&files, config, &parts, k).expect("good").expect("there");
                if grouped.format().is_none() {
                    scrambled += 1;
                    continue;
                }
                packed += 1;
                for column in 0..grouped.n() {
                    for group in 0..k / GROUP {
                        let (mut q, mut values) = ([0; GROUP], [0.0; GROUP]);
                        let (scale, min) = grouped.group(column, group, &mut q);
                        grouped.values(column, group * GROUP, &mut values);
                        assert_eq!(q.map(|q| scale * f32::from(q) + min), values, "{name}: {stem}");
                    }
                }
            }
        }
        assert!(packed > 20 && scrambled > 3, "{packed} in order, {scrambled} not");
    }

    #[test]
    fn other_methods_are_refused_by_name() {
        let check = |quantization: Value, what: &str| {
            let error = GroupedConfig::from_json(&quantization).expect_err(what);
            assert_eq!(error, format!("{what} is not supported; {SUPPORTED}"));
        };
        let gptq = |key: &str, value: Value| {
            let mut config = json!({ "quant_method": "gptq", "bits": 4, "group_size": 128 });
            config[key] = value;
            config
        };
        for method in ["bitsandbytes", "compressed-tensors", "fp8", "exl2", "mxfp4", "hqq"] {
            check(json!({ "quant_method": method, "bits": 4 }), &format!("`{method}`"));
        }
        check(json!({ "load_in_4bit": true }), "a quantisation without `quant_method`");
        check(gptq("bits", json!(8)), "gptq with 8 bits");
        check(gptq("bits", json!(3)), "gptq with 3 bits");
        check(gptq("bits", json!("four")), "gptq without `bits`");
        check(gptq("group_size", json!(16)), "gptq with a group_size of 16");
        check(gptq("group_size", json!(0)), "gptq with a group_size of 0");
        check(gptq("group_size", Value::Null), "gptq without `group_size`");
        check(gptq("checkpoint_format", json!("marlin")), "gptq with checkpoint_format `marlin`");
        check(gptq("is_marlin_format", json!(true)), "gptq in Marlin's layout");
        let awq = json!({ "quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv" });
        check(awq, "awq with version `gemv`");
        assert!(GroupedConfig::from_json(&gptq("group_size", json!(-1))).is_ok());
    }
}
