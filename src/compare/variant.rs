//! What a person may write for a variant: `int4`, `file+kv-int8`, `other.gguf`, `other.gguf@int8+kv-f32`.

use std::fmt;
use std::str::FromStr;

use obol_models::KvDtype;
use obol_models::quant::Quant;

/// A model's weights in one precision, with a KV cache in one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Variant {
    /// Another file of the model; `None` is the one that the command names.
    pub model: Option<String>,
    pub quant: Quant,
    pub kv_dtype: KvDtype,
}

const KV: &str = "+kv-";

impl FromStr for Variant {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (weights, kv_dtype) = match text.rsplit_once(KV) {
            // So is a +kv- further up.
            Some((weights, kv)) if !kv.contains(['/', '.']) => (weights, kv.parse()?),
            _ => (text, KvDtype::default()),
        };
        let weights = weights.trim_end_matches('/');
        if let Ok(quant) = weights.parse() {
            return Ok(Self { model: None, quant, kv_dtype });
        }
        let (model, quant) = match weights.rsplit_once('@') {
            // An @ further up is part of a path.
            Some((model, quant)) if !quant.contains(['/', '.']) => (model, quant.parse()?),
            _ => (weights, Quant::default()),
        };
        if model.is_empty() {
            return Err(format!("`{text}` is no variant; {}", Self::FORMS));
        }
        Ok(Self { model: Some(model.to_owned()), quant, kv_dtype })
    }
}

impl Variant {
    /// What may be written.
    pub const FORMS: &str = "write file, f32, f16, bf16, int8 or int4, or a model's name or file, with @int8 and the like \
         after it; +kv-int8 and the like at the end sets the KV cache's type";

    /// Short, for tables: a file goes by its name.
    #[must_use]
    pub fn label(&self) -> String {
        let mut label = match &self.model {
            None => self.quant.to_string(),
            Some(model) => {
                let name = model.rsplit('/').next().unwrap_or(model);
                let name = name.strip_suffix(".gguf").unwrap_or(name);
                match self.quant {
                    Quant::File => name.to_owned(),
                    quant => format!("{name}@{quant}"),
                }
            }
        };
        if self.kv_dtype != KvDtype::default() {
            label += &format!("{KV}{}", self.kv_dtype);
        }
        label
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.label())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_are_read_and_labelled() {
        let check = |text: &str, model: Option<&str>, quant, kv_dtype, label: &str| {
            let variant: Variant = text.parse().unwrap();
            assert_eq!(variant, Variant { model: model.map(str::to_owned), quant, kv_dtype }, "{text}");
            assert_eq!(variant.label(), label);
        };
        check("int4", None, Quant::Int4, KvDtype::F16, "int4");
        check("file+kv-int8", None, Quant::File, KvDtype::Int8, "file+kv-int8");
        check("int8+kv-f16", None, Quant::Int8, KvDtype::F16, "int8");
        check("a/b.Q4.gguf", Some("a/b.Q4.gguf"), Quant::File, KvDtype::F16, "b.Q4");
        check("a@b/c.gguf", Some("a@b/c.gguf"), Quant::File, KvDtype::F16, "c");
        check("b.gguf@int8+kv-bf16", Some("b.gguf"), Quant::Int8, KvDtype::Bf16, "b@int8+kv-bf16");
        check("a+kv-1/c.gguf", Some("a+kv-1/c.gguf"), Quant::File, KvDtype::F16, "c");
        check("models/d/", Some("models/d"), Quant::File, KvDtype::F16, "d");
        check("org/name", Some("org/name"), Quant::File, KvDtype::F16, "name");
        check("int3", Some("int3"), Quant::File, KvDtype::F16, "int3");
        for (wrong, says) in
            [("", "no variant"), ("@int8", "no variant"), ("m@int3", "int3"), ("f32+kv-q8", "q8")]
        {
            let said = wrong.parse::<Variant>().unwrap_err();
            assert!(said.contains(says), "{wrong}: {said}");
        }
    }
}
