//! All weights of a model, loaded once and only read then: by one decoder, by the ranks that share each layer's
//! work, or by several replicas.

use obol_kernels::{Cpu, KvDtype};

use crate::cut::{Rank, divisors};
use crate::device::DeviceId;
use crate::error::LoadError;
use crate::linear::{Linear, Loader, Named};
use crate::load::LoadOptions;
use crate::model_files::ModelFiles;
use crate::spec::ModelSpec;

use super::layer::{Layer, Norm};

/// A model's weights in memory.
pub struct Weights {
    pub(super) spec: ModelSpec,
    pub(super) kv_dtype: KvDtype,
    pub(super) embedding: Vocabulary,
    pub(super) positions: Option<Linear>,
    pub(super) final_norm: Norm,
    /// None: the embedding's matrix is the head.
    pub(super) head: Option<Vocabulary>,
    /// Each rank's part of each layer.
    pub(super) ranks: Vec<Vec<Layer>>,
}

/// A matrix of a row a token. For CPUs it is cut by tokens: each rank computes its part of the logits, and as all
/// can read all of it, an embedding is looked up where it is.
pub(super) struct Vocabulary {
    /// One for each rank, or for all together, its tokens following those of the one before.
    parts: Vec<Linear>,
}

impl Weights {
    /// Loads the weights of `files` for `options.tensor_parallel` ranks, packing them with the threads of `cpu`.
    ///
    /// # Errors
    /// When the model or a tensor's type is not supported, a key or tensor is missing or wrong, or the
    /// options do not suit the model.
    pub fn load(files: &ModelFiles, cpu: &Cpu, options: &LoadOptions) -> Result<Self, LoadError> {
        let mut spec = files.spec()?;
        if let Some(length) = options.max_model_len {
            if length == 0 || length > spec.context {
                return Err(LoadError::Options(format!(
                    "a maximum length of {length} tokens; this model's context has {}",
                    spec.context
                )));
            }
            spec.context = length;
        }
        let ranks = options.tensor_parallel;
        if ranks == 0 || !spec.kv_heads.is_multiple_of(ranks) {
            return Err(LoadError::Options(format!(
                "tensor parallel {ranks}: each device takes as many of the model's {} kv heads; possible here: {}",
                spec.kv_heads,
                divisors(spec.kv_heads)
            )));
        }
        let weights = files.checkpoint(&spec)?;
        let loader = Loader { cpu, weights: &weights, quant: options.quant, rank: Rank::ALONE };
        let of_rank = |rank| Loader { rank, ..loader };
        // CUDA devices have the whole vocabulary each: all have the logits then, and draw for themselves.
        let shares = if matches!(options.device, DeviceId::Cuda(_)) { 1 } else { ranks };
        let vocabulary = |name: &str| {
            let part = |rank: Rank| {
                let part = rank.rows(spec.vocab);
                let named = Named { name, out_features: spec.vocab, bias: false, part };
                Linear::load(&of_rank(rank), spec.hidden, &[named])
            };
            Ok::<_, LoadError>(Vocabulary { parts: Rank::all(shares).map(part).collect::<Result<_, _>>()? })
        };
        let embedding = vocabulary("token_embd")?;
        let positions = spec.learned_positions.map(|rows| {
            let part = crate::cut::Part::Whole;
            let named = Named { name: "position_embd", out_features: rows, bias: false, part };
            Linear::load(&loader, spec.hidden, &[named])
        });
        let positions = positions.transpose()?;
        let head = if spec.tied_head { None } else { Some(vocabulary("output")?) };
        let final_norm = Norm::load(&weights, &spec, "output_norm")?;
        let mut layers: Vec<Vec<Layer>> = Rank::all(ranks).map(|_| Vec::new()).collect();
        for index in 0..spec.layers.len() {
            for (rank, layers) in Rank::all(ranks).zip(&mut layers) {
                layers.push(Layer::load(&of_rank(rank), &spec, index)?);
            }
        }
        let count = spec.layers.len();
        let plural = if count == 1 { "" } else { "s" };
        weights.refuse_unread(&format!("a {} model of {count} layer{plural}", spec.architecture))?;
        let kv_dtype = options.kv_dtype;
        Ok(Self { spec, kv_dtype, embedding, positions, final_norm, head, ranks: layers })
    }

    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Devices that share each layer's work.
    pub fn ranks(&self) -> usize {
        self.ranks.len()
    }

    /// Bytes held in memory, all ranks together.
    pub fn bytes(&self) -> u64 {
        let layers: usize = self.ranks.iter().flatten().map(Layer::bytes).sum();
        let ends: usize = self.head.iter().chain([&self.embedding]).map(Vocabulary::bytes).sum();
        let positions = self.positions.as_ref().map_or(0, Linear::bytes);
        (layers + ends + positions + self.final_norm.bytes()) as u64
    }

    /// The matrix that makes logits.
    pub(super) fn head(&self) -> &Vocabulary {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// A rank's view of the spec: its heads. (Its parts of the MLPs' widths are the layers' own matter.)
    pub(super) fn spec_of_rank(&self) -> ModelSpec {
        let ranks = self.ranks();
        let spec = self.spec.clone();
        ModelSpec { heads: spec.heads / ranks, kv_heads: spec.kv_heads / ranks, ..spec }
    }
}

impl Vocabulary {
    fn bytes(&self) -> usize {
        self.parts.iter().map(Linear::bytes).sum()
    }

    /// Writes a token's row (hidden).
    pub(super) fn row(&self, token: usize, out: &mut [f32]) {
        let mut row = token;
        for part in &self.parts {
            match row.checked_sub(part.out_features()) {
                Some(further) => row = further,
                None => return part.row(row, out),
            }
        }
        unreachable!("token {token} past the vocabulary; this is a bug")
    }

    /// A rank's part.
    pub(super) fn part(&self, rank: usize) -> &Linear {
        &self.parts[rank]
    }
}
