//! Ropes from config.json: `rope_parameters` as transformers 5 writes them, for all layers or by layer type,
//! or the `rope_theta` and `rope_scaling` of before.

use obol_kernels::RopeStyle;
use serde_json::{Map, Value};

use crate::error::LoadError;
use crate::spec::family::Positions;
use crate::spec::keys::{CONTEXT_MAX, Sizes};
use crate::spec::{RopeScaling, RopeSpec};

use super::{Config, GLOBAL, LOCAL};

impl Config {
    /// The context that YaRN stretches to. Qwen's model cards have users state the stretching and leave
    /// `max_position_embeddings` at what it was.
    pub(super) fn context(&self, sizes: &Sizes, ropes: &[RopeSpec]) -> usize {
        let stated = ["rope_parameters", "rope_scaling"].into_iter().find_map(|key| self.get(key));
        if stated.is_none_or(|stated| stated.get("original_max_position_embeddings").is_none()) {
            return sizes.context;
        }
        let stretched = ropes.iter().map(|rope| match rope.scaling {
            RopeScaling::Yarn { factor, original, .. } => (factor * original) as usize,
            _ => 0,
        });
        stretched.max().unwrap_or(0).min(CONTEXT_MAX as usize).max(sizes.context)
    }

    /// One rope, or two: that of layers without a window, and that of those with one.
    pub(super) fn ropes(&self, sizes: &Sizes) -> Result<Vec<RopeSpec>, LoadError> {
        if self.family.positions == Positions::Learned {
            return Ok(Vec::new());
        }
        let (key, parameters) = match (self.get("rope_parameters"), self.get("rope_scaling")) {
            (Some(parameters), _) => ("rope_parameters", Some(parameters)),
            (None, scaling) => ("rope_scaling", scaling),
        };
        let object = |value: &Value| match value {
            Value::Object(map) => Ok(map.clone()),
            other => Err(self.wrong_type(key, "an object", other)),
        };
        let whole = parameters.map(object).transpose()?.unwrap_or_default();
        let part = |layer_type: &str| whole.get(layer_type).filter(|value| !value.is_null()).map(object);
        let base = self.number_of("rope_theta")?.unwrap_or(10_000.0);
        let local_base = self.number_of("rope_local_base_freq")?;
        let (global, local) = match (part(GLOBAL).transpose()?, part(LOCAL).transpose()?) {
            (None, None) => (whole, None),
            (global, local) => (global.unwrap_or_default(), Some(local.unwrap_or_default())),
        };
        let mut ropes = vec![self.rope(key, &global, base, sizes)?];
        if self.family.positions == Positions::RopeByWindow {
            let local = local.unwrap_or_default();
            ropes.push(self.rope(key, &local, local_base.unwrap_or(10_000.0), sizes)?);
        } else if let Some(local) = local {
            ropes.push(self.rope(key, &local, base, sizes)?);
        }
        Ok(ropes)
    }

    fn rope(
        &self,
        key: &'static str,
        parameters: &Map<String, Value>,
        base: f64,
        sizes: &Sizes,
    ) -> Result<RopeSpec, LoadError> {
        let rope = Rope { config: self, key, parameters };
        let base = rope.number("rope_theta")?.unwrap_or(base);
        if !(base.is_finite() && base > 1.0) {
            return Err(self.refuse("rope_theta", format!("{base} is no base")));
        }
        let stated = match rope.number("partial_rotary_factor")? {
            None => self.number_of("partial_rotary_factor")?,
            stated => stated,
        };
        let part = stated.unwrap_or(1.0);
        let partial = self.family.positions == Positions::PartialRope;
        if !(part > 0.0 && part <= 1.0) || (part < 1.0 && !partial) {
            let problem = format!("{part} is not supported of a {} model", self.family.model_type);
            return Err(self.refuse("partial_rotary_factor", problem));
        }
        let dim = (sizes.head_dim as f64 * part) as usize;
        if dim == 0 || !dim.is_multiple_of(2) {
            let problem = format!("{dim} of {} elements of a head cannot be rotated", sizes.head_dim);
            return Err(self.refuse("partial_rotary_factor", problem));
        }
        let scaling = rope.scaling(dim, sizes)?;
        Ok(RopeSpec { dim, base: base as f32, style: RopeStyle::Halves, scaling })
    }
}

/// The object that holds one rope's parameters.
struct Rope<'a> {
    config: &'a Config,
    /// Its key in the file.
    key: &'static str,
    parameters: &'a Map<String, Value>,
}

impl Rope<'_> {
    fn refuse(&self, key: &str, problem: impl Into<String>) -> LoadError {
        self.config.refuse(&format!("{}.{key}", self.key), problem)
    }

    /// A positive number, if there.
    fn number(&self, key: &str) -> Result<Option<f64>, LoadError> {
        let Some(value) = self.parameters.get(key).filter(|value| !value.is_null()) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if number.is_finite() && number > 0.0 => Ok(Some(number)),
            _ => Err(self.refuse(key, format!("{value} is no positive number"))),
        }
    }

    fn required(&self, key: &str) -> Result<f64, LoadError> {
        self.number(key)?.ok_or_else(|| self.refuse(key, "missing"))
    }

    fn factors(&self, key: &str, dim: usize) -> Result<Vec<f32>, LoadError> {
        let items = self.parameters.get(key).and_then(Value::as_array);
        let items = items.ok_or_else(|| self.refuse(key, "no array of numbers"))?;
        let factors: Vec<f32> = items.iter().filter_map(Value::as_f64).map(|factor| factor as f32).collect();
        if factors.len() != dim / 2 || items.len() != dim / 2 {
            return Err(self.refuse(key, format!("{} values, expected {} numbers", items.len(), dim / 2)));
        }
        match factors.iter().all(|factor| factor.is_finite() && *factor > 0.0) {
            true => Ok(factors),
            false => Err(self.refuse(key, "a factor is not a positive number")),
        }
    }

    fn scaling(&self, dim: usize, sizes: &Sizes) -> Result<RopeScaling, LoadError> {
        let stated = |key: &str| self.parameters.get(key).filter(|value| !value.is_null());
        let kind = match stated("rope_type").or_else(|| stated("type")) {
            None => "default",
            Some(Value::String(kind)) => kind,
            Some(other) => return Err(self.refuse("rope_type", format!("{other} is no name"))),
        };
        // Phi's first files call theirs su or yarn.
        let kind = if self.parameters.contains_key("long_factor") { "longrope" } else { kind };
        // Phi states it beside the object, where it counts more.
        let outer = self.config.number_of("original_max_position_embeddings")?;
        let inner = self.number("original_max_position_embeddings")?;
        let original = outer.or(inner).unwrap_or(sizes.context as f64);
        if !(1.0..=f64::from(CONTEXT_MAX)).contains(&original) {
            let problem = format!("{original} is outside 1 to {CONTEXT_MAX}");
            return Err(self.refuse("original_max_position_embeddings", problem));
        }
        let attention = self.number("attention_factor")?;
        match kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear(self.required("factor")?)),
            "llama3" => {
                let (low, high) = (self.required("low_freq_factor")?, self.required("high_freq_factor")?);
                if high <= low {
                    return Err(self.refuse("high_freq_factor", format!("{high} is not over {low}")));
                }
                Ok(RopeScaling::Llama3 { factor: self.required("factor")?, low, high, original })
            }
            "yarn" => {
                let factor = self.number("factor")?.unwrap_or(sizes.context as f64 / original);
                let louder = |by: f64| if factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 };
                let by_default = match (self.number("mscale")?, self.number("mscale_all_dim")?) {
                    (Some(one), Some(all)) => louder(one) / louder(all),
                    _ => louder(1.0),
                };
                Ok(RopeScaling::Yarn {
                    factor,
                    fast: self.number("beta_fast")?.unwrap_or(32.0),
                    slow: self.number("beta_slow")?.unwrap_or(1.0),
                    original,
                    truncated: self.parameters.get("truncate") != Some(&Value::Bool(false)),
                    attention: attention.unwrap_or(by_default),
                })
            }
            "longrope" => {
                let factor = self.number("factor")?.unwrap_or(sizes.context as f64 / original);
                let by_default = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
                Ok(RopeScaling::Long {
                    short: self.factors("short_factor", dim)?,
                    long: self.factors("long_factor", dim)?,
                    original: original as usize,
                    attention: attention.unwrap_or(by_default),
                })
            }
            other => {
                let known = "default, linear, llama3, yarn, longrope";
                Err(self.refuse("rope_type", format!("`{other}` is not supported; supported: {known}")))
            }
        }
    }
}
