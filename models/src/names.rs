//! What the files of each family call their tensors, as data: safetensors as transformers writes them, and
//! GGUF where it joins several matrices in one tensor.
//!
//! Knows where a tensor lies and nothing of what is computed with it. The decoder's own names are GGUF's;
//! an expert's matrix is `blk.0.ffn_gate.7`.

use crate::checkpoint::{Location, Names, Tensors};
use crate::spec::{Family, FfnSpec, LayerSpec, ModelSpec};

/// A part of a tensor that holds several matrices one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Whole,
    Q,
    K,
    V,
    Gate,
    Up,
}

/// Our name of a layer's tensor, theirs, and which part of theirs is meant.
type Entry = (&'static str, &'static str, Part);

/// What most families have.
const COMMON: &[Entry] = &[
    ("attn_norm", "input_layernorm", Part::Whole),
    ("attn_q", "self_attn.q_proj", Part::Whole),
    ("attn_k", "self_attn.k_proj", Part::Whole),
    ("attn_v", "self_attn.v_proj", Part::Whole),
    ("attn_q_norm", "self_attn.q_norm", Part::Whole),
    ("attn_k_norm", "self_attn.k_norm", Part::Whole),
    ("attn_output", "self_attn.o_proj", Part::Whole),
    ("ffn_norm", "post_attention_layernorm", Part::Whole),
    ("ffn_gate", "mlp.gate_proj", Part::Whole),
    ("ffn_up", "mlp.up_proj", Part::Whole),
    ("ffn_down", "mlp.down_proj", Part::Whole),
    ("ffn_gate_inp", "mlp.gate", Part::Whole),
];

/// With norms after attention and MLP.
const SANDWICH: &[Entry] = &[
    ("post_attention_norm", "post_attention_layernorm", Part::Whole),
    ("ffn_norm", "pre_feedforward_layernorm", Part::Whole),
    ("post_ffw_norm", "post_feedforward_layernorm", Part::Whole),
];

/// What each family calls otherwise, by `model_type`.
const OTHERS: &[(&str, &[Entry])] = &[
    ("gemma2", SANDWICH),
    ("gemma3_text", SANDWICH),
    ("olmo2", SANDWICH),
    ("mixtral", &[("ffn_gate_inp", "block_sparse_moe.gate", Part::Whole)]),
    (
        "phi3",
        &[
            ("attn_q", "self_attn.qkv_proj", Part::Q),
            ("attn_k", "self_attn.qkv_proj", Part::K),
            ("attn_v", "self_attn.qkv_proj", Part::V),
            ("ffn_gate", "mlp.gate_up_proj", Part::Gate),
            ("ffn_up", "mlp.gate_up_proj", Part::Up),
        ],
    ),
    (
        "gpt2",
        &[
            ("attn_norm", "ln_1", Part::Whole),
            ("attn_q", "attn.c_attn", Part::Q),
            ("attn_k", "attn.c_attn", Part::K),
            ("attn_v", "attn.c_attn", Part::V),
            ("attn_output", "attn.c_proj", Part::Whole),
            ("ffn_norm", "ln_2", Part::Whole),
            ("ffn_up", "mlp.c_fc", Part::Whole),
            ("ffn_down", "mlp.c_proj", Part::Whole),
        ],
    ),
];

/// Where an expert's matrices may be: the module that holds them, and its names of gate, up and down.
const EXPERTS: &[(&str, [&str; 3])] = &[
    ("mlp.experts", ["gate_proj", "up_proj", "down_proj"]),
    ("block_sparse_moe.experts", ["w1", "w3", "w2"]),
    ("mlp.experts", ["w1", "w3", "w2"]),
];

/// What comes before the text model's tensors: each way of wrapping a model adds its own.
const PREFIXES: &[&str] =
    &["model.", "transformer.", "", "model.language_model.", "language_model.model.", "language_model."];
const HEADS: &[&str] = &["lm_head", "language_model.lm_head", "model.lm_head"];
/// The other half of models that also see.
const SEEING: &[&str] =
    &["vision_tower.", "model.vision_tower.", "multi_modal_projector.", "model.multi_modal_projector."];
/// Tables that are computed, and masks.
const COMPUTED: &[&str] = &[".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"];

/// The sizes that parts have.
struct Sizes {
    q: usize,
    kv: usize,
    layers: Vec<FfnSpec>,
}

impl Sizes {
    fn of(spec: &ModelSpec) -> Self {
        let ffn = |layer: &LayerSpec| layer.ffn;
        Self { q: spec.q_width(), kv: spec.kv_width(), layers: spec.layers.iter().map(ffn).collect() }
    }

    /// The rows of a part of a tensor of `layer`.
    fn rows(&self, part: Part, layer: usize) -> Option<std::ops::Range<usize>> {
        let (q, kv) = (self.q, self.kv);
        let ffn = match self.layers.get(layer) {
            Some(FfnSpec::Dense { width }) => *width,
            Some(FfnSpec::Experts(experts)) => experts.width,
            None => 0,
        };
        match part {
            Part::Whole => None,
            Part::Q => Some(0..q),
            Part::K => Some(q..q + kv),
            Part::V => Some(q + kv..q + 2 * kv),
            Part::Gate => Some(0..ffn),
            Part::Up => Some(ffn..2 * ffn),
        }
    }
}

/// `blk.3.ffn_gate.7.weight` in its parts.
struct LayerName<'a> {
    layer: usize,
    part: &'a str,
    expert: Option<usize>,
    /// weight, bias
    kind: &'a str,
}

impl<'a> LayerName<'a> {
    fn parse(name: &'a str) -> Option<Self> {
        let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
        let (rest, kind) = rest.rsplit_once('.')?;
        let (part, expert) = match rest.split_once('.') {
            Some((part, expert)) => (part, Some(expert.parse().ok()?)),
            None => (rest, None),
        };
        Some(Self { layer: layer.parse().ok()?, part, expert, kind })
    }
}

// ---------------------------------------------------------------- safetensors

/// The names of a family's safetensors.
pub(crate) struct HuggingFace {
    others: &'static [Entry],
    /// Before the text model's tensors.
    prefix: &'static str,
    head: &'static str,
    tied: bool,
    gpt2: bool,
    sizes: Sizes,
    /// Where experts are, if there are any.
    experts: Option<ExpertNames>,
}

struct ExpertNames {
    module: &'static str,
    names: [&'static str; 3],
    /// One tensor holds all experts: gate and up together, and down.
    joined: bool,
}

impl HuggingFace {
    /// The names in `files`, which hold a model of `family`.
    pub(crate) fn new(files: &dyn Tensors, family: &Family, spec: &ModelSpec) -> Self {
        let gpt2 = family.model_type == "gpt2";
        let embedding = if gpt2 { "wte.weight" } else { "embed_tokens.weight" };
        let there = |name: &str| files.find(name).is_ok_and(|found| found.is_some());
        let prefix = PREFIXES.iter().find(|prefix| there(&format!("{prefix}{embedding}")));
        let prefix = prefix.copied().unwrap_or(if gpt2 { "transformer." } else { "model." });
        let head = HEADS.iter().find(|head| there(&format!("{head}.weight")));
        let sparse = spec.layers.iter().position(|layer| matches!(layer.ffn, FfnSpec::Experts(_)));
        let experts = sparse.map(|layer| {
            let joined = |module: &str| there(&format!("{prefix}layers.{layer}.{module}.gate_up_proj"));
            // Those of GPTQ and AWQ have no `weight`.
            let apart = |&&(module, names): &&(&str, [&str; 3])| {
                let start = format!("{prefix}layers.{layer}.{module}.0.{}.", names[0]);
                files.names().iter().any(|name| name.starts_with(&start))
            };
            let &(module, names) = EXPERTS.iter().find(apart).unwrap_or(&EXPERTS[0]);
            ExpertNames { module, names, joined: joined(module) }
        });
        let mut others = OTHERS.iter().find(|(name, _)| *name == family.model_type).map_or(&[][..], |o| o.1);
        // Transformers 5 calls Mixtral's as everybody's.
        if family.model_type == "mixtral" && there(&format!("{prefix}layers.0.mlp.gate.weight")) {
            others = &[];
        }
        let head = head.copied().unwrap_or(HEADS[0]);
        Self { others, prefix, head, tied: spec.tied_head, gpt2, sizes: Sizes::of(spec), experts }
    }

    fn outside_layers(&self, name: &str) -> Location {
        let (part, kind) = name.rsplit_once('.').unwrap_or((name, "weight"));
        let part = match (part, self.gpt2) {
            ("token_embd", false) => "embed_tokens",
            ("output_norm", false) => "norm",
            ("token_embd", true) => "wte",
            ("position_embd", true) => "wpe",
            ("output_norm", true) => "ln_f",
            ("output", _) => return Location::whole(format!("{}.{kind}", self.head)),
            (other, _) => other,
        };
        Location::whole(format!("{}{part}.{kind}", self.prefix))
    }

    fn in_layer(&self, name: &LayerName<'_>) -> Location {
        let &LayerName { layer, part, expert, kind } = name;
        let module = format!("{}{}.{layer}", self.prefix, if self.gpt2 { "h" } else { "layers" });
        if let (Some(expert), Some(experts)) = (expert, &self.experts) {
            return experts.locate(&module, layer, part, expert, kind, &self.sizes);
        }
        let found = self.others.iter().chain(COMMON).find(|entry| entry.0 == part);
        let (theirs, part) = found.map_or((part, Part::Whole), |entry| (entry.1, entry.2));
        Location {
            tensor: format!("{module}.{theirs}.{kind}"),
            rows: self.sizes.rows(part, layer),
            // GPT-2's matrices are (in_features, out_features); norms and biases are none.
            transposed: self.gpt2 && kind == "weight" && !theirs.starts_with("ln_"),
            plane: None,
        }
    }
}

impl ExpertNames {
    fn locate(
        &self,
        layer_module: &str,
        layer: usize,
        part: &str,
        expert: usize,
        kind: &str,
        sizes: &Sizes,
    ) -> Location {
        let module = format!("{layer_module}.{}", self.module);
        let [gate, up, down] = self.names;
        let (name, cut) = match part {
            "ffn_gate" => (gate, Part::Gate),
            "ffn_up" => (up, Part::Up),
            _ => (down, Part::Whole),
        };
        if !self.joined {
            return Location::whole(format!("{module}.{expert}.{name}.{kind}"));
        }
        // Joined experts have no biases; their tensors have no ending.
        let tensor = match (kind, part) {
            ("weight", "ffn_down") => format!("{module}.down_proj"),
            ("weight", _) => format!("{module}.gate_up_proj"),
            _ => format!("{module}.{name}.{kind}"),
        };
        Location { tensor, rows: sizes.rows(cut, layer), transposed: false, plane: Some(expert) }
    }
}

impl Names for HuggingFace {
    fn locate(&self, name: &str) -> Location {
        match LayerName::parse(name) {
            Some(layer) => self.in_layer(&layer),
            None => self.outside_layers(name),
        }
    }

    fn is_spare(&self, tensor: &str) -> bool {
        // A tied head may be there again; the loader compares it.
        (self.tied && tensor == format!("{}.weight", self.head))
            || SEEING.iter().any(|prefix| tensor.starts_with(prefix))
            || COMPUTED.iter().any(|ending| tensor.ends_with(ending))
    }
}

// ---------------------------------------------------------------- GGUF

/// The names in a GGUF file.
pub(crate) struct Gguf {
    sizes: Sizes,
    /// One tensor holds q, k and v.
    joined_qkv: bool,
    /// `ffn_up` holds gate and up.
    joined_gate: bool,
    /// One tensor holds all experts.
    joined_experts: bool,
}

/// What the spec reads itself.
const ROPES: &[&str] = &["rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"];

impl Gguf {
    /// The names in `files`.
    pub(crate) fn new(files: &dyn Tensors, spec: &ModelSpec) -> Self {
        let there = |name: &str| files.find(name).is_ok_and(|found| found.is_some());
        // gate and up are one where up has the rows of both.
        let joined = |(layer, of): (usize, &LayerSpec)| match of.ffn {
            FfnSpec::Dense { width } => {
                let up = files.find(&format!("blk.{layer}.ffn_up.weight")).ok().flatten();
                up.is_some_and(|up| up.shape.first() == Some(&(2 * width)))
            }
            FfnSpec::Experts(_) => false,
        };
        Self {
            sizes: Sizes::of(spec),
            joined_qkv: there("blk.0.attn_qkv.weight"),
            joined_gate: spec.gated && spec.layers.iter().enumerate().any(joined),
            joined_experts: !(0..spec.layers.len())
                .any(|layer| there(&format!("blk.{layer}.ffn_gate.0.weight"))),
        }
    }
}

impl Names for Gguf {
    fn locate(&self, name: &str) -> Location {
        let Some(LayerName { layer, part, expert, kind }) = LayerName::parse(name) else {
            return Location::whole(name);
        };
        if let (Some(expert), true) = (expert, self.joined_experts) {
            let tensor = format!("blk.{layer}.{part}_exps.{kind}");
            return Location { plane: Some(expert), ..Location::whole(tensor) };
        }
        let (theirs, cut) = match part {
            "attn_q" if self.joined_qkv => ("attn_qkv", Part::Q),
            "attn_k" if self.joined_qkv => ("attn_qkv", Part::K),
            "attn_v" if self.joined_qkv => ("attn_qkv", Part::V),
            "ffn_gate" if self.joined_gate => ("ffn_up", Part::Gate),
            "ffn_up" if self.joined_gate => ("ffn_up", Part::Up),
            _ => return Location::whole(name),
        };
        let tensor = format!("blk.{layer}.{theirs}.{kind}");
        Location { rows: self.sizes.rows(cut, layer), ..Location::whole(tensor) }
    }

    fn is_spare(&self, tensor: &str) -> bool {
        ROPES.contains(&tensor)
    }
}
