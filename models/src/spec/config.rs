//! A spec from a Hugging Face directory's config.json, as transformers 4 and 5 write it.
//!
//! Knows the text model's part and no weights. Invariant: what would make another model of it is refused by
//! name, never ignored.

mod rope;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use obol_kernels::Act;
use serde_json::{Map, Value};

use crate::error::LoadError;
use crate::foreign;
use crate::gptq::GroupedConfig;
use crate::text_files::file_names;

use super::family::{AttentionScale, Biases, Experts, FAMILIES, Family, Positions, Windows};
use super::keys::{self, CONTEXT_MAX, Key, Sizes, Source};
use super::{LayerSpec, ModelSpec, Norm};

/// The file's name.
pub(crate) const CONFIG: &str = "config.json";
/// Longest file that is read: values take many times their text. Those of published models have kilobytes.
const BYTES_MAX: usize = 4 << 20;
/// Layer types.
const LOCAL: &str = "sliding_attention";
const GLOBAL: &str = "full_attention";

/// An open config.json.
pub(crate) struct Config {
    path: PathBuf,
    bytes: Vec<u8>,
    /// The text model's part.
    values: Map<String, Value>,
    family: &'static Family,
    /// What the whole file has as `quantization_config`.
    quantization: Option<Value>,
    name: Option<String>,
}

impl Config {
    /// Reads the config.json of `directory`.
    ///
    /// # Errors
    /// When there is none, it is no JSON object, or its `model_type` is not supported.
    pub(crate) fn open(directory: &Path) -> Result<Self, LoadError> {
        let path = directory.join(CONFIG);
        let bytes = std::fs::read(&path).map_err(|source| match source.kind() {
            ErrorKind::NotFound => no_config(directory),
            _ => LoadError::Io { path: path.clone(), source },
        })?;
        let problem = |problem: String| LoadError::File { file: path.clone(), problem };
        if bytes.len() > BYTES_MAX {
            return Err(problem(format!("it has {} bytes, more than {BYTES_MAX}", bytes.len())));
        }
        let mut values: Map<String, Value> = serde_json::from_slice(&bytes).map_err(|error| {
            problem(foreign::recognize(&bytes).map_or_else(|| no_json(&error), String::from))
        })?;
        let name = values.get("_name_or_path").and_then(Value::as_str).map(String::from);
        let quantization = values.get("quantization_config").filter(|value| !value.is_null()).cloned();
        let tied = values.get("tie_word_embeddings").cloned();
        let mut model_type = model_type(&values, &problem)?;
        // A text model inside one that also sees.
        if model_type == "gemma3" {
            let Some(Value::Object(mut text)) = values.remove("text_config") else {
                return Err(problem("a gemma3 model without `text_config`".into()));
            };
            if let (Some(tied), false) = (tied, text.contains_key("tie_word_embeddings")) {
                text.insert("tie_word_embeddings".into(), tied);
            }
            values = text;
            model_type = "gemma3_text".into();
        }
        let Some(family) = FAMILIES.iter().find(|family| family.model_type == model_type) else {
            let names: Vec<&str> = FAMILIES.iter().map(|family| family.model_type).collect();
            let problem = format!("`{model_type}` is not supported; supported: {}", names.join(", "));
            return Err(LoadError::ConfigValue { file: path, key: "model_type".into(), problem });
        };
        Ok(Self { path, bytes, values, family, quantization, name })
    }

    /// The file as it is.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn family(&self) -> &'static Family {
        self.family
    }

    /// The last part of what the file calls the model, where that is a name.
    pub(crate) fn name(&self) -> Option<&str> {
        let last = self.name.as_deref()?.rsplit('/').next()?.trim();
        (!matches!(last, "" | "." | "..")).then_some(last)
    }

    /// The spec of the model.
    ///
    /// # Errors
    /// When a key is missing, contradicts another or asks for what is not supported.
    pub(crate) fn spec(&self) -> Result<ModelSpec, LoadError> {
        let family = self.family;
        self.refuse_other_models()?;
        let sizes = Sizes::read(self, family)?;
        let sparse = self.sparse_layers()?;
        let ffns = sizes.ffns(self, family, false, sparse)?;
        let rotated = self.rotated_layers(sizes.layers)?;
        let windows = self.windows(&rotated)?;
        let ropes = self.ropes(&sizes)?;
        let layers = ffns
            .into_iter()
            .zip(windows)
            .zip(rotated)
            .map(|((ffn, window), rotated)| {
                let rope = if window.is_some() { ropes.len().saturating_sub(1) } else { 0 };
                LayerSpec { window, rope: rotated.then_some(rope), ffn }
            })
            .collect();
        let (attention_bias, mlp_bias) = self.biases()?;
        Ok(ModelSpec {
            architecture: family.model_type.into(),
            hidden: sizes.hidden,
            heads: sizes.heads,
            kv_heads: sizes.kv_heads,
            head_dim: sizes.head_dim,
            vocab: keys::find_vocab(self)?.ok_or_else(|| self.missing(&keys::VOCAB))?,
            context: self.context(&sizes, &ropes),
            layers,
            ropes,
            learned_positions: (family.positions == Positions::Learned).then_some(sizes.context),
            norm: family.norm,
            norm_eps: match family.norm {
                Norm::Rms => self.epsilon(&keys::RMS_EPS)?,
                Norm::Layer => self.epsilon(&keys::LAYER_EPS)?,
            },
            norm_offset: if family.norm_plus_one { 1.0 } else { 0.0 },
            qk_norm: family.qk_norm,
            pre_norms: family.pre_norms,
            post_norms: family.post_norms,
            qkv_bias: attention_bias || family.biases == Biases::Qkv,
            output_bias: attention_bias,
            ffn_bias: mlp_bias,
            act: self.act()?,
            gated: family.gated,
            attention_scale: self.attention_scale(sizes.head_dim)?,
            attention_softcap: self.attention_softcap()?,
            embedding_scale: match self.find_factor(&keys::EMBEDDING_SCALE)? {
                None if family.scaled_embedding => (sizes.hidden as f32).sqrt(),
                stated => stated.unwrap_or(1.0),
            },
            residual_scale: self.find_factor(&keys::RESIDUAL_SCALE)?.unwrap_or(1.0),
            logits_scale: self.find_factor(&keys::LOGITS_SCALE)?.map_or(1.0, f32::recip),
            logits_softcap: self.find_factor(&keys::LOGITS_SOFTCAP)?,
            tied_head: self.flag("tie_word_embeddings")?.unwrap_or(family.tied),
        })
    }

    // ---- single values: none where the key is absent or null ----

    fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    fn wrong_type(&self, key: &str, expected: &'static str, found: &Value) -> LoadError {
        let found: String = found.to_string().chars().take(40).collect();
        LoadError::ConfigType { file: self.path.clone(), key: key.into(), expected, found }
    }

    fn refuse(&self, key: &str, problem: impl Into<String>) -> LoadError {
        LoadError::ConfigValue { file: self.path.clone(), key: key.into(), problem: problem.into() }
    }

    /// A number, or the family's where the file does not have the key.
    fn number_of(&self, key: &str) -> Result<Option<f64>, LoadError> {
        match self.values.get(key) {
            None => Ok(self.family.default_of(key)),
            Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) => Ok(Some(number)),
                None => Err(self.wrong_type(key, "a number", value)),
            },
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.wrong_type(key, "a boolean", other)),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&str>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong_type(key, "a string", other)),
        }
    }

    /// Whole numbers.
    fn integers(&self, key: &str) -> Result<Option<Vec<u64>>, LoadError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let items = value.as_array().and_then(|items| items.iter().map(Value::as_u64).collect());
        items.map(Some).ok_or_else(|| self.wrong_type(key, "an array of whole numbers", value))
    }

    // ---- what a model is made of ----

    /// Keys whose other values make another model of it.
    fn refuse_other_models(&self) -> Result<(), LoadError> {
        let plain: [(&str, Value); 8] = [
            ("clip_qkv", Value::Null),
            ("use_bidirectional_attention", Value::Bool(false)),
            ("add_cross_attention", Value::Bool(false)),
            ("scale_attn_by_inverse_layer_idx", Value::Bool(false)),
            ("scale_attn_weights", Value::Bool(true)),
            ("is_encoder_decoder", Value::Bool(false)),
            ("attention_chunk_size", Value::Null),
            ("num_kv_shared_layers", Value::from(0)),
        ];
        for (key, plain) in plain {
            if let Some(value) = self.get(key).filter(|value| **value != plain) {
                return Err(self.refuse(key, format!("{value} is not supported; supported: {plain}")));
            }
        }
        self.grouped().map(drop)
    }

    /// How the weights are quantised, if they are.
    ///
    /// # Errors
    /// When they are in a way that is not supported.
    pub(crate) fn grouped(&self) -> Result<Option<GroupedConfig>, LoadError> {
        let read = |value| {
            GroupedConfig::from_json(value).map_err(|problem| self.refuse("quantization_config", problem))
        };
        self.quantization.as_ref().map(read).transpose()
    }

    fn act(&self) -> Result<Act, LoadError> {
        for key in ["hidden_activation", "hidden_act", "activation_function"] {
            return Ok(match self.text(key)? {
                None => continue,
                Some("silu" | "swish") => Act::Silu,
                Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_fast") => Act::GeluTanh,
                // Gemma's first files say gelu and mean its approximation.
                Some("gelu") if self.family.act == Act::GeluTanh && self.family.gated => Act::GeluTanh,
                Some("gelu") => Act::Gelu,
                Some(other) => {
                    let known = "silu, gelu, gelu_new, gelu_pytorch_tanh, gelu_fast";
                    return Err(self.refuse(key, format!("`{other}` is not supported; supported: {known}")));
                }
            });
        }
        Ok(self.family.act)
    }

    /// Whether attention's and the MLP's projections have biases.
    fn biases(&self) -> Result<(bool, bool), LoadError> {
        let stated = |key: &str| match (self.flag(key)?.unwrap_or(false), self.family.biases) {
            (stated, Biases::Stated) => Ok(stated),
            (false, biases) => Ok(biases == Biases::All),
            (true, Biases::All) => Ok(true),
            // Qwen 2 has those of q, k and v whatever is stated, and that of the output if it is there.
            (true, Biases::Qkv) if key == "attention_bias" => Ok(false),
            (true, _) => Err(self.refuse(key, format!("a {} model has none", self.family.model_type))),
        };
        Ok((stated("attention_bias")?, stated("mlp_bias")?))
    }

    fn attention_scale(&self, head_dim: usize) -> Result<f32, LoadError> {
        let key = "query_pre_attn_scalar";
        let by = match self.family.attention_scale {
            AttentionScale::Multiplier => {
                return Ok(self.find_factor(&keys::ATTENTION_SCALE)?.unwrap_or(1.0));
            }
            AttentionScale::HeadDim => head_dim as f64,
            AttentionScale::QueryScalar { .. } => self.number_of(key)?.unwrap_or(head_dim as f64),
        };
        if !(by.is_finite() && by > 0.0) {
            return Err(self.refuse(key, format!("{by} is no factor")));
        }
        Ok(by.sqrt().recip() as f32)
    }

    fn attention_softcap(&self) -> Result<Option<f32>, LoadError> {
        let cap = self.find_factor(&keys::ATTENTION_SOFTCAP)?;
        match cap {
            Some(_) if !self.family.attention_softcap => {
                let problem = format!("a {} model has none", self.family.model_type);
                Err(self.bad(&keys::ATTENTION_SOFTCAP, problem))
            }
            cap => Ok(cap),
        }
    }

    /// Which layers are mixtures of experts.
    fn sparse_layers(&self) -> Result<impl Fn(usize) -> bool, LoadError> {
        let (key, stated) = ("decoder_sparse_step", self.family.experts == Experts::Stated);
        let step = if stated { self.number_of(key)?.unwrap_or(1.0) } else { 1.0 };
        if !(step >= 1.0 && step.fract() == 0.0) {
            return Err(self.refuse(key, format!("{step} is no number of layers")));
        }
        let dense = if stated { self.integers("mlp_only_layers")?.unwrap_or_default() } else { Vec::new() };
        Ok(move |layer: usize| (layer + 1).is_multiple_of(step as usize) && !dense.contains(&(layer as u64)))
    }

    /// Which layers' q and k are rotated.
    fn rotated_layers(&self, layers: usize) -> Result<Vec<bool>, LoadError> {
        match self.family.positions {
            Positions::Learned => return Ok(vec![false; layers]),
            Positions::RopeButEveryFourth => {}
            _ => return Ok(vec![true; layers]),
        }
        // 1 where a layer is rotated.
        if let Some(rotated) = self.integers("no_rope_layers")? {
            if rotated.len() < layers {
                let problem = format!("{} values for {layers} layers", rotated.len());
                return Err(self.refuse("no_rope_layers", problem));
            }
            return Ok(rotated.iter().take(layers).map(|&rotated| rotated != 0).collect());
        }
        let key = "no_rope_layer_interval";
        let each = self.number_of(key)?.unwrap_or(4.0);
        if !(each >= 1.0 && each.fract() == 0.0) {
            return Err(self.refuse(key, format!("{each} is no number of layers")));
        }
        Ok((0..layers).map(|layer| !(layer + 1).is_multiple_of(each as usize)).collect())
    }

    /// Each layer's window.
    fn windows(&self, rotated: &[bool]) -> Result<Vec<Option<usize>>, LoadError> {
        let layers = rotated.len();
        let used = match self.family.windows {
            Windows::None => false,
            Windows::All | Windows::ButEach(_) => true,
            _ => self.flag("use_sliding_window")?.unwrap_or(false),
        };
        let window = if used { self.find_size(&keys::WINDOW, CONTEXT_MAX)? } else { None };
        let local = match self.family.windows {
            Windows::None | Windows::All | Windows::AllIfUsed => vec![window.is_some(); layers],
            Windows::UnrotatedIfUsed => rotated.iter().map(|rotated| !rotated && window.is_some()).collect(),
            Windows::FromIfUsed => {
                let first = self.number_of("max_window_layers")?.unwrap_or(0.0);
                (0..layers).map(|layer| layer as f64 >= first && window.is_some()).collect()
            }
            Windows::ButEach(each) => {
                let key = match self.get("sliding_window_pattern") {
                    None => "_sliding_window_pattern",
                    Some(_) => "sliding_window_pattern",
                };
                let each = self.number_of(key)?.unwrap_or(each as f64);
                if !(each >= 1.0 && each.fract() == 0.0) {
                    return Err(self.refuse(key, format!("{each} is no number of layers")));
                }
                (0..layers).map(|layer| !(layer + 1).is_multiple_of(each as usize)).collect()
            }
        };
        let local = self.layer_types(local, window.is_some())?;
        if window.is_none() && local.contains(&true) && used {
            return Err(self.missing(&keys::WINDOW));
        }
        Ok(local.into_iter().map(|local| window.filter(|_| local)).collect())
    }

    /// Which layers have the window by `layer_types`, or `otherwise` where the file does not have it.
    fn layer_types(&self, otherwise: Vec<bool>, windowed: bool) -> Result<Vec<bool>, LoadError> {
        let key = "layer_types";
        let Some(value) = self.get(key) else { return Ok(otherwise) };
        let items = value.as_array().ok_or_else(|| self.wrong_type(key, "an array of strings", value))?;
        if items.len() < otherwise.len() {
            let problem = format!("{} values for {} layers", items.len(), otherwise.len());
            return Err(self.refuse(key, problem));
        }
        let local = items.iter().take(otherwise.len()).map(|item| match item.as_str() {
            Some(LOCAL) => Ok(true),
            Some(GLOBAL) => Ok(false),
            _ => Err(self.refuse(key, format!("{item} is not supported; supported: {GLOBAL}, {LOCAL}"))),
        });
        let local = local.collect::<Result<Vec<bool>, _>>()?;
        // These families' layers are all alike, whatever the list says; so it must say that.
        let alike = matches!(self.family.windows, Windows::None | Windows::All | Windows::AllIfUsed);
        if (alike && local != otherwise) || (!windowed && local.contains(&true)) {
            let problem = format!("contradicts `sliding_window` of a {} model", self.family.model_type);
            return Err(self.refuse(key, problem));
        }
        Ok(local)
    }
}

impl Source for Config {
    fn find_u32(&self, key: &Key) -> Result<Option<u32>, LoadError> {
        for name in key.config {
            let Some(number) = self.number_of(name)? else { continue };
            let fits = number.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&number);
            let value = self.get(name).cloned().unwrap_or_default();
            return match fits {
                true => Ok(Some(number as u32)),
                false => Err(self.wrong_type(name, "an unsigned 32-bit integer", &value)),
            };
        }
        Ok(None)
    }

    fn find_f32(&self, key: &Key) -> Result<Option<f32>, LoadError> {
        for name in key.config {
            if let Some(number) = self.number_of(name)? {
                return Ok(Some(number as f32));
            }
        }
        Ok(None)
    }

    fn find_bool(&self, key: &Key) -> Result<Option<bool>, LoadError> {
        for name in key.config {
            if let Some(flag) = self.flag(name)? {
                return Ok(Some(flag));
            }
        }
        Ok(None)
    }

    fn missing(&self, key: &Key) -> LoadError {
        LoadError::MissingConfigKey { file: self.path.clone(), key: self.name_of(key).into() }
    }

    fn bad(&self, key: &Key, problem: String) -> LoadError {
        self.refuse(self.name_of(key), problem)
    }
}

impl Config {
    /// The name that the file has for the key, or its first.
    fn name_of(&self, key: &Key) -> &'static str {
        let there = key.config.iter().find(|name| self.values.contains_key(**name));
        there.or(key.config.first()).copied().unwrap_or(key.gguf)
    }
}

/// What is in a directory that is no model.
fn no_config(directory: &Path) -> LoadError {
    let names = file_names(directory);
    let found = |wanted: &dyn Fn(&str) -> bool| names.iter().find(|name| wanted(name));
    let missing = if let Some(name) = found(&|name| name.ends_with(".gguf")) {
        format!("config.json, but {name}; name that file itself")
    } else if found(&|name| name == "adapter_config.json").is_some() {
        "config.json, but adapter_config.json: it holds an adapter; merge it into its base model".into()
    } else {
        "config.json; a model is a GGUF file, or a directory with config.json, safetensors and tokenizer.json"
            .into()
    };
    LoadError::Directory { directory: directory.into(), missing }
}

fn no_json(error: &serde_json::Error) -> String {
    format!("it holds no JSON object: {error}; download it again")
}

fn model_type(
    values: &Map<String, Value>,
    problem: &dyn Fn(String) -> LoadError,
) -> Result<String, LoadError> {
    match values.get("model_type") {
        Some(Value::String(name)) => Ok(name.clone()),
        Some(other) => Err(problem(format!("key `model_type` should hold a string but holds {other}"))),
        None => Err(problem("no key `model_type`, which is needed; download the file again".into())),
    }
}
