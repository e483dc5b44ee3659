//! A model's tensors under one set of names, whatever the file calls them and however it joins them.
//!
//! The names are GGUF's: `token_embd`, `blk.3.attn_q`, `output_norm`, with `.weight` or `.bias`. Knows no
//! file format beyond [`Tensors`] and no model beyond [`Names`]. Remembers what was asked for, so that a
//! tensor that nobody reads, which means that the model computes something else, can be refused.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use candle_core::quantized::GgmlDType;
use half::{bf16, f16};

use crate::error::LoadError;
use crate::gguf::{TensorView, type_name};
use crate::gptq::{Grouped, GroupedConfig, Integers};
use crate::matrix::Matrix;

/// A file's tensors by the file's own names.
pub(crate) trait Tensors: Sync {
    /// The tensor `name`, if there.
    ///
    /// # Errors
    /// When it has a type that cannot be read, or does not lie inside the file.
    fn find(&self, name: &str) -> Result<Option<TensorView<'_>>, LoadError>;

    /// All names, in no order.
    fn names(&self) -> Vec<&str>;

    /// The tensor `name` of 32-bit integers, if there; files of one type of weights have none.
    ///
    /// # Errors
    /// When it has another type.
    fn find_integers(&self, _name: &str) -> Result<Option<Integers<'_>>, LoadError> {
        Ok(None)
    }

    /// `data`, a part of the file, will not be read again soon.
    fn forget(&self, _data: &[u8]) {}
}

/// Where a tensor lies in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Location {
    /// The file's name of the tensor.
    pub tensor: String,
    /// The part of its rows that is meant; all if none.
    pub rows: Option<Range<usize>>,
    /// The file has it as (in_features, out_features).
    pub transposed: bool,
    /// The matrix's index in a tensor of several (experts).
    pub plane: Option<usize>,
}

impl Location {
    /// A whole tensor.
    pub(crate) fn whole(tensor: impl Into<String>) -> Self {
        Self { tensor: tensor.into(), rows: None, transposed: false, plane: None }
    }
}

/// How a family's files name things.
pub(crate) trait Names: Sync {
    /// Where `name` (`blk.0.attn_q.weight`) lies.
    fn locate(&self, name: &str) -> Location;

    /// Whether the tensor of the file holds nothing that the model computes with (a table that can be
    /// computed, a buffer).
    fn is_spare(&self, tensor: &str) -> bool;
}

/// The tensors of a model.
pub(crate) struct Checkpoint<'a> {
    files: &'a dyn Tensors,
    names: Box<dyn Names + 'a>,
    /// How matrices are quantised that are no tensors of their own.
    grouped: Option<GroupedConfig>,
    /// The file's names of what was read.
    read: Mutex<HashSet<String>>,
}

impl<'a> Checkpoint<'a> {
    pub(crate) fn new(files: &'a dyn Tensors, names: impl Names + 'a) -> Self {
        Self { files, names: Box::new(names), grouped: None, read: Mutex::default() }
    }

    /// The same, with matrices of 4-bit integers (GPTQ, AWQ) where `grouped` is given.
    pub(crate) fn with_grouped(self, grouped: Option<GroupedConfig>) -> Self {
        Self { grouped, ..self }
    }

    /// Whether there is a tensor `name`.
    ///
    /// # Errors
    /// As [`Tensors::find`].
    pub(crate) fn has(&self, name: &str) -> Result<bool, LoadError> {
        let tensor = self.names.locate(name).tensor;
        if self.files.find(&tensor)?.is_some() {
            return Ok(true);
        }
        match self.grouped.and_then(|_| GroupedConfig::parts(&tensor)) {
            Some([qweight, ..]) => Ok(self.files.find_integers(&qweight)?.is_some()),
            None => Ok(false),
        }
    }

    /// Refuses a file in which a second tensor `again` has other values than `name`, which is used for it.
    ///
    /// # Errors
    /// Names both.
    pub(crate) fn expect_equal(&self, name: &str, again: &str) -> Result<(), LoadError> {
        let [name, again] = [name, again].map(|name| self.names.locate(name).tensor);
        match (self.files.find(&name)?, self.files.find(&again)?) {
            (Some(used), Some(other)) if used.dtype != other.dtype || used.data != other.data => {
                let problem = format!("the model uses `{name}` for it, which has other values");
                Err(LoadError::TensorData { tensor: again, problem })
            }
            _ => Ok(()),
        }
    }

    fn tensor(&self, location: &Location) -> Result<TensorView<'a>, LoadError> {
        let found = self.files.find(&location.tensor)?;
        self.read.lock().unwrap_or_else(PoisonError::into_inner).insert(location.tensor.clone());
        found.ok_or_else(|| LoadError::MissingTensor(location.tensor.clone()))
    }

    /// The weight matrix `name` (`blk.0.attn_q.weight`) of that shape.
    ///
    /// # Errors
    /// When there is none or it has another shape.
    pub(crate) fn matrix(
        &self,
        name: &str,
        out_features: usize,
        in_features: usize,
    ) -> Result<Matrix<'a>, LoadError> {
        let location = self.names.locate(name);
        if let Some(matrix) = self.grouped_matrix(&location, name, out_features, in_features)? {
            return Ok(matrix);
        }
        let mut view = self.tensor(&location)?;
        if let Some(plane) = location.plane {
            view = view.plane(plane)?;
        }
        let outputs = view.shape.get(usize::from(location.transposed)).copied();
        let stored = match &location.rows {
            Some(rows) => outputs.unwrap_or(rows.end),
            None => out_features,
        };
        let fits = location.rows.as_ref().is_none_or(|rows| rows.end <= stored && rows.len() == out_features);
        let expected = if location.transposed { [in_features, stored] } else { [stored, in_features] };
        view.expect_shape(&expected)?;
        if !fits {
            let problem = format!("its {stored} rows are not enough for `{name}`");
            return Err(LoadError::TensorData { tensor: view.name, problem });
        }
        let rows = location.rows.unwrap_or(0..out_features);
        if location.transposed { Matrix::transposed(&view, rows) } else { Ok(Matrix::rows(&view, rows)) }
    }

    /// The matrix, where the file has it as 4-bit integers.
    fn grouped_matrix(
        &self,
        location: &Location,
        name: &str,
        out_features: usize,
        in_features: usize,
    ) -> Result<Option<Matrix<'a>>, LoadError> {
        let Some(config) = self.grouped else { return Ok(None) };
        let Some(parts) = GroupedConfig::parts(&location.tensor) else { return Ok(None) };
        if self.files.find(&location.tensor)?.is_some() {
            return Ok(None);
        }
        let Some(grouped) = Grouped::find(self.files, config, &parts, in_features)? else { return Ok(None) };
        let rows = location.rows.clone().unwrap_or(0..grouped.n());
        let [tensor, ..] = parts.clone();
        if rows.len() != out_features || rows.end > grouped.n() {
            let problem = format!("its {} outputs do not fit the {out_features} of `{name}`", grouped.n());
            return Err(LoadError::TensorData { tensor, problem });
        }
        self.read.lock().unwrap_or_else(PoisonError::into_inner).extend(parts);
        if grouped.format().is_none() {
            tracing::info!(
                tensor,
                "its groups do not lie in the order of the inputs (desc_act); kept as int8, not without loss"
            );
        }
        Ok(Some(Matrix::grouped(tensor, grouped, in_features, rows)))
    }

    /// The small tensor `name` (a norm's weight, a bias) of `len` values.
    ///
    /// # Errors
    /// When there is none, it has another length or a quantised type.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, LoadError> {
        let location = self.names.locate(name);
        let view = self.tensor(&location)?;
        let Some(rows) = location.rows else {
            view.expect_shape(&[len])?;
            return view.to_f32();
        };
        let values = view.to_f32()?;
        match values.get(rows.clone()) {
            Some(part) if part.len() == len => Ok(part.to_vec()),
            _ => Err(LoadError::TensorShape {
                tensor: view.name,
                expected: vec![rows.end],
                found: vec![values.len()],
            }),
        }
    }

    /// As [`Checkpoint::vector`], none where it is absent.
    ///
    /// # Errors
    /// As [`Checkpoint::vector`], but for absence.
    pub(crate) fn find_vector(&self, name: &str, len: usize) -> Result<Option<Vec<f32>>, LoadError> {
        if self.has(name)? { self.vector(name, len).map(Some) } else { Ok(None) }
    }

    /// The matrix has been converted: its pages of the file need not stay in memory.
    pub(crate) fn forget(&self, matrix: &Matrix<'_>) {
        if let Some(data) = matrix.file_data() {
            self.files.forget(data);
        }
    }

    /// Refuses a file with a tensor that was not read.
    ///
    /// # Errors
    /// Names the first such tensor.
    pub(crate) fn refuse_unread(&self, model: &str) -> Result<(), LoadError> {
        let read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let names = self.files.names().into_iter();
        match names.filter(|&name| !read.contains(name) && !self.names.is_spare(name)).min() {
            None => Ok(()),
            Some(name) => Err(LoadError::TensorData {
                tensor: name.into(),
                problem: format!(
                    "not part of {model}; the weights and the configuration are not of one model"
                ),
            }),
        }
    }
}

impl<'a> TensorView<'a> {
    /// Matrix `index` of a tensor of several.
    fn plane(self, index: usize) -> Result<Self, LoadError> {
        if self.shape.len() != 3 || index >= self.shape[0] {
            let problem = format!("its shape {:?} has no matrix {index}", self.shape);
            return Err(LoadError::TensorData { tensor: self.name, problem });
        }
        let bytes = self.data.len() / self.shape[0];
        Ok(Self { data: &self.data[index * bytes..][..bytes], shape: self.shape[1..].to_vec(), ..self })
    }

    /// A small F32, F16 or BF16 tensor's values.
    ///
    /// # Errors
    /// When it has another type, or a value is not finite.
    pub(crate) fn to_f32(&self) -> Result<Vec<f32>, LoadError> {
        let halves = |value: fn([u8; 2]) -> f32| {
            self.data.chunks_exact(2).map(|b| value([b[0], b[1]])).collect::<Vec<f32>>()
        };
        let values: Vec<f32> = match self.dtype {
            GgmlDType::F32 => {
                let values = self.data.chunks_exact(4);
                values.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            GgmlDType::F16 => halves(|b| f16::from_le_bytes(b).to_f32()),
            GgmlDType::BF16 => halves(|b| bf16::from_le_bytes(b).to_f32()),
            other => {
                return Err(LoadError::TensorType {
                    tensor: self.name.clone(),
                    dtype: type_name(other),
                    supported: "F32, F16, BF16",
                });
            }
        };
        if !values.iter().all(|value| value.is_finite()) {
            let problem = "a value is not a finite number".into();
            return Err(LoadError::TensorData { tensor: self.name.clone(), problem });
        }
        Ok(values)
    }
}
