//! A spec from a GGUF file's metadata. Names: llama.cpp's `gguf-py/gguf/constants.py`.

use candle_core::quantized::gguf_file::Value;
use obol_kernels::RopeStyle;

use crate::error::LoadError;
use crate::gguf::GgufFile;

use super::family::{AttentionScale, Biases, Experts, FAMILIES, Family, Positions, Windows};
use super::keys::{self, CONTEXT_MAX, Key, Sizes, Source, WIDTH_MAX};
use super::{LayerSpec, ModelSpec, Norm, RopeScaling, RopeSpec};

impl ModelSpec {
    /// Reads the spec of the model in `file`.
    ///
    /// # Errors
    /// When the architecture is not supported, or a key is missing or contradicts another.
    pub fn from_gguf(file: &GgufFile) -> Result<Self, LoadError> {
        let architecture = file.architecture()?;
        let keys = Keys { file, prefix: architecture };
        let family = family(&keys)?;
        let sizes = Sizes::read(&keys, family)?;
        keys.refuse_other_values(&sizes)?;
        let ffns = sizes.ffns(&keys, family, true, |layer| {
            family.experts == Experts::All || file.has_tensor(&format!("blk.{layer}.ffn_gate_inp.weight"))
        })?;
        let windows = keys.windows(family, sizes.layers)?;
        let ropes = keys.ropes(family, &sizes, windows.iter().any(Option::is_some))?;
        let layers = ffns
            .into_iter()
            .zip(windows)
            .enumerate()
            .map(|(layer, (ffn, window))| {
                let rope = match family.positions {
                    Positions::Learned => None,
                    Positions::RopeButEveryFourth if (layer + 1).is_multiple_of(4) => None,
                    Positions::RopeByWindow if window.is_some() => Some(ropes.len() - 1),
                    _ => Some(0),
                };
                LayerSpec { window, rope, ffn }
            })
            .collect();
        let has_bias = |name: &str| file.has_tensor(&format!("blk.0.{name}.bias"));
        let all = family.biases == Biases::All;
        let softcap = keys.find_factor(&keys::ATTENTION_SOFTCAP)?;
        Ok(Self {
            hidden: sizes.hidden,
            heads: sizes.heads,
            kv_heads: sizes.kv_heads,
            head_dim: sizes.head_dim,
            vocab: vocab(&keys, sizes.hidden)?,
            context: sizes.context,
            layers,
            ropes,
            learned_positions: (family.positions == Positions::Learned).then_some(sizes.context),
            norm: family.norm,
            norm_eps: match family.norm {
                Norm::Rms => keys.epsilon(&keys::RMS_EPS)?,
                Norm::Layer => keys.epsilon(&keys::LAYER_EPS)?,
            },
            norm_offset: 0.0,
            qk_norm: family.qk_norm,
            pre_norms: family.pre_norms,
            post_norms: family.post_norms,
            qkv_bias: matches!(family.biases, Biases::Qkv | Biases::All) || has_bias("attn_q"),
            output_bias: all || has_bias("attn_output"),
            ffn_bias: all || has_bias("ffn_up"),
            act: family.act,
            gated: family.gated,
            attention_scale: attention_scale(&keys, family, &sizes)?,
            attention_softcap: if family.attention_softcap { softcap.or(Some(50.0)) } else { softcap },
            embedding_scale: match keys.find_factor(&keys::EMBEDDING_SCALE)? {
                None if family.scaled_embedding => (sizes.hidden as f32).sqrt(),
                stated => stated.unwrap_or(1.0),
            },
            residual_scale: keys.find_factor(&keys::RESIDUAL_SCALE)?.unwrap_or(1.0),
            logits_scale: keys.find_factor(&keys::LOGITS_SCALE)?.map_or(1.0, f32::recip),
            logits_softcap: match keys.find_factor(&keys::LOGITS_SOFTCAP)? {
                None if family.attention_softcap => Some(30.0),
                stated => stated,
            },
            tied_head: !file.has_tensor("output.weight"),
            architecture: architecture.into(),
        })
    }
}

/// The family of the file's architecture; of the llama architecture Mixtral is the one with experts.
fn family(keys: &Keys<'_>) -> Result<&'static Family, LoadError> {
    let mut found = FAMILIES.iter().filter(|family| family.architecture == keys.prefix);
    let Some(first) = found.next() else {
        let first_of = |name: &str| FAMILIES.iter().position(|family| family.architecture == name);
        let names = FAMILIES.iter().enumerate().map(|(index, family)| (index, family.architecture));
        let names: Vec<&str> =
            names.filter(|&(index, name)| first_of(name) == Some(index)).map(|(_, name)| name).collect();
        let supported = names.join(", ");
        let problem = format!("`{}` is not supported; supported: {supported}", keys.prefix);
        return Err(LoadError::key_value("general.architecture", problem));
    };
    let sparse = keys.find_u32(&keys::EXPERTS)?.unwrap_or(0) > 0;
    if sparse && first.experts == Experts::None {
        return Ok(found.find(|family| family.experts != Experts::None).unwrap_or(first));
    }
    Ok(first)
}

fn vocab(keys: &Keys<'_>, hidden: usize) -> Result<usize, LoadError> {
    let shape = keys.file.tensor("token_embd.weight")?.shape;
    let vocab = *shape.first().unwrap_or(&0);
    if shape.len() != 2 || shape[1] != hidden || u32::try_from(vocab).is_err() {
        return Err(LoadError::TensorShape {
            tensor: "token_embd.weight".into(),
            expected: vec![vocab, hidden],
            found: shape,
        });
    }
    match keys::find_vocab(keys)? {
        Some(stated) if stated != vocab => {
            Err(keys.bad(&keys::VOCAB, format!("{stated}, but the embedding has {vocab} rows")))
        }
        _ => Ok(vocab),
    }
}

fn attention_scale(keys: &Keys<'_>, family: &Family, sizes: &Sizes) -> Result<f32, LoadError> {
    let by_head_dim = (sizes.head_dim as f32).sqrt().recip();
    match (keys.find_factor(&keys::ATTENTION_SCALE)?, family.attention_scale) {
        (Some(scale), _) => Ok(scale),
        (None, AttentionScale::QueryScalar { largest_layers }) if sizes.layers == largest_layers => {
            Ok(((sizes.hidden / sizes.heads) as f32).sqrt().recip())
        }
        (None, _) => Ok(by_head_dim),
    }
}

/// Metadata under the architecture's name.
struct Keys<'a> {
    file: &'a GgufFile,
    prefix: &'a str,
}

impl Source for Keys<'_> {
    fn find_u32(&self, key: &Key) -> Result<Option<u32>, LoadError> {
        self.file.find_u32(&self.name(key.gguf))
    }

    fn find_f32(&self, key: &Key) -> Result<Option<f32>, LoadError> {
        self.file.find_f32(&self.name(key.gguf))
    }

    fn find_bool(&self, key: &Key) -> Result<Option<bool>, LoadError> {
        self.file.find_bool(&self.name(key.gguf))
    }

    fn missing(&self, key: &Key) -> LoadError {
        LoadError::MissingKey(self.name(key.gguf))
    }

    fn bad(&self, key: &Key, problem: String) -> LoadError {
        LoadError::key_value(&self.name(key.gguf), problem)
    }
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn refuse(&self, key: &str, problem: impl Into<String>) -> LoadError {
        LoadError::key_value(&self.name(key), problem)
    }

    /// Values that would make another model of it, under keys that are read nowhere else.
    fn refuse_other_values(&self, sizes: &Sizes) -> Result<(), LoadError> {
        let found = |key: &str| self.file.find_u32(&self.name(key));
        if found("attention.value_length")?.is_some_and(|length| length as usize != sizes.head_dim) {
            let problem = "values of another width than keys are not supported";
            return Err(self.refuse("attention.value_length", problem));
        }
        // 1 is softmax.
        for (key, plain) in [("expert_shared_count", 0), ("expert_group_count", 1), ("expert_gating_func", 1)]
        {
            if let Some(value) = found(key)?.filter(|&value| value != plain && value != 0) {
                return Err(self.refuse(key, format!("{value} is not supported; supported: {plain}")));
            }
        }
        if self.file.find_f32(&self.name("attention.clamp_kqv"))?.is_some_and(|clamp| clamp != 0.0) {
            return Err(self.refuse("attention.clamp_kqv", "clamped q, k and v are not supported"));
        }
        Ok(())
    }

    /// Each layer's window.
    fn windows(&self, family: &Family, layers: usize) -> Result<Vec<Option<usize>>, LoadError> {
        // Phi's files have 0 for none.
        let stated = self.find_u32(&keys::WINDOW)?.filter(|&window| window > 0);
        // Gemma 2's first files do not have it, nor the caps.
        let default = family.attention_softcap.then_some(4096);
        let Some(window) = stated.or(default).map(|window| window as usize) else {
            return Ok(vec![None; layers]);
        };
        // Olmo 3's files say they are Olmo 2's; its windowed layers have another rope.
        if family.architecture == "olmo2" {
            return Err(self.bad(&keys::WINDOW, "OLMo 3 is not supported, and OLMo 2 has no window".into()));
        }
        let pattern = "attention.sliding_window_pattern";
        let local: Vec<bool> = match (self.file.value(&self.name(pattern)), family.windows) {
            (Some(Value::Array(items)), _) => {
                let flags = items.iter().map(|item| match item {
                    Value::Bool(local) => Some(*local),
                    Value::U32(local) => Some(*local != 0),
                    Value::I32(local) => Some(*local != 0),
                    _ => None,
                });
                match flags.collect::<Option<Vec<bool>>>() {
                    Some(flags) if flags.len() >= layers => flags,
                    _ => return Err(self.refuse(pattern, format!("not {layers} booleans"))),
                }
            }
            (Some(_), _) => match self.file.u32(&self.name(pattern))? as usize {
                0 => vec![true; layers],
                each => (0..layers).map(|layer| layer % each < each - 1).collect(),
            },
            (None, Windows::ButEach(each)) => (0..layers).map(|layer| layer % each < each - 1).collect(),
            // Mistral's are llama files.
            (None, Windows::All | Windows::AllIfUsed) => vec![true; layers],
            (None, _) if family.architecture == "llama" => vec![true; layers],
            (None, _) => {
                let problem = format!("{window}, but which layers have it is not stated");
                return Err(self.bad(&keys::WINDOW, problem));
            }
        };
        Ok(local.into_iter().take(layers).map(|local| local.then_some(window)).collect())
    }

    /// One rope, or two: that of layers without a window, and that of those with one.
    fn ropes(&self, family: &Family, sizes: &Sizes, windows: bool) -> Result<Vec<RopeSpec>, LoadError> {
        if family.positions == Positions::Learned {
            return Ok(Vec::new());
        }
        let dim = self.find_size(&keys::ROPE_DIM, WIDTH_MAX)?.unwrap_or(sizes.head_dim);
        if dim > sizes.head_dim || !dim.is_multiple_of(2) {
            let problem = format!("{dim} of {} elements of a head cannot be rotated", sizes.head_dim);
            return Err(self.bad(&keys::ROPE_DIM, problem));
        }
        let style = if family.interleaved_in_gguf { RopeStyle::Interleaved } else { RopeStyle::Halves };
        let base = self.find_factor(&keys::ROPE_BASE)?.unwrap_or(10_000.0);
        let mut ropes = vec![RopeSpec { dim, base, style, scaling: self.rope_scaling(dim, sizes)? }];
        if family.positions == Positions::RopeByWindow && windows {
            let local = self.file.find_f32(&self.name("rope.freq_base_swa"))?.unwrap_or(10_000.0);
            if !(local.is_finite() && local > 0.0) {
                return Err(self.refuse("rope.freq_base_swa", format!("{local} is no base")));
            }
            ropes.push(RopeSpec { dim, base: local, style, scaling: RopeScaling::None });
        }
        Ok(ropes)
    }

    fn rope_scaling(&self, dim: usize, sizes: &Sizes) -> Result<RopeScaling, LoadError> {
        if let Some(factors) = self.rope_factors("rope_freqs.weight", dim)? {
            return Ok(RopeScaling::Factors(factors));
        }
        let original = self.file.find_u32(&self.name("rope.scaling.original_context_length"))?;
        let original = original.unwrap_or(sizes.context as u32);
        if original == 0 || original > CONTEXT_MAX {
            let problem = format!("{original} is outside 1 to {CONTEXT_MAX}");
            return Err(self.refuse("rope.scaling.original_context_length", problem));
        }
        let attention = self.number("rope.scaling.attn_factor")?;
        let (long, short) = ("rope_factors_long.weight", "rope_factors_short.weight");
        match (self.rope_factors(short, dim)?, self.rope_factors(long, dim)?) {
            (Some(short), Some(long)) => {
                let attention = attention.unwrap_or(1.0);
                return Ok(RopeScaling::Long { short, long, original: original as usize, attention });
            }
            (None, None) => {}
            (found, _) => {
                let missing = if found.is_some() { long } else { short };
                return Err(LoadError::MissingTensor(missing.into()));
            }
        }
        let kind = self.file.find_string(&self.name("rope.scaling.type"))?;
        // Files from before `rope.scaling` have the linear factor alone, under this name.
        let factor = match self.number("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.number("rope.scale_linear")?,
        };
        match (kind, factor) {
            (Some("none"), _) | (None, None | Some(1.0)) => Ok(RopeScaling::None),
            (None | Some("linear"), Some(factor)) => Ok(RopeScaling::Linear(factor)),
            (Some("yarn"), Some(factor)) => Ok(RopeScaling::Yarn {
                factor,
                fast: self.number("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                slow: self.number("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                original: original.into(),
                truncated: true,
                attention: match self.number("rope.scaling.yarn_attn_factor")? {
                    Some(stated) => stated,
                    None => attention.unwrap_or(1.0) * (1.0 + 0.1 * factor.max(1.0).ln()),
                },
            }),
            (Some("linear" | "yarn"), None) => Err(LoadError::MissingKey(self.name("rope.scaling.factor"))),
            (Some(other), _) => {
                let problem = format!("\"{other}\" is not supported; supported: none, linear, yarn");
                Err(self.refuse("rope.scaling.type", problem))
            }
        }
    }

    /// A positive number, if there.
    fn number(&self, key: &str) -> Result<Option<f64>, LoadError> {
        match self.file.find_f32(&self.name(key))? {
            Some(value) if !(value.is_finite() && value > 0.0) => {
                Err(self.refuse(key, format!("{value} is no factor")))
            }
            found => Ok(found.map(f64::from)),
        }
    }

    fn rope_factors(&self, name: &str, dim: usize) -> Result<Option<Vec<f32>>, LoadError> {
        if !self.file.has_tensor(name) {
            return Ok(None);
        }
        let factors = self.file.tensor_f32(name, &[dim / 2])?;
        if factors.iter().any(|factor| !(factor.is_finite() && *factor > 0.0)) {
            let problem = "a factor is not a positive number".into();
            return Err(LoadError::TensorData { tensor: name.into(), problem });
        }
        Ok(Some(factors))
    }
}
