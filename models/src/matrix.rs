//! A weight matrix as it lies in a file: (out_features, in_features), rows one after another.
//!
//! Knows how to cut and turn; what the bytes mean is `blocks`' matter.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::quantized::GgmlDType;

use crate::error::LoadError;
use crate::gguf::{TensorView, type_name};

/// A weight matrix of a file.
#[derive(Debug, Clone)]
pub(crate) struct Matrix<'a> {
    /// The file's name of its tensor.
    pub name: String,
    pub dtype: GgmlDType,
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Blocks of `dtype`, row after row; not aligned.
    pub data: Cow<'a, [u8]>,
}

impl<'a> Matrix<'a> {
    /// Rows `rows` of the tensor (out_features, in_features).
    pub(crate) fn rows(view: &TensorView<'a>, rows: Range<usize>) -> Self {
        let k = view.shape[1];
        let bytes = k / view.dtype.block_size() * view.dtype.type_size();
        let data = Cow::Borrowed(&view.data[rows.start * bytes..rows.end * bytes]);
        Self { name: view.name.clone(), dtype: view.dtype, n: rows.len(), k, data }
    }

    /// Columns `columns` of the tensor (in_features, out_features), as rows.
    ///
    /// # Errors
    /// When the type's blocks cannot be turned.
    pub(crate) fn transposed(view: &TensorView<'a>, columns: Range<usize>) -> Result<Self, LoadError> {
        if view.dtype.block_size() != 1 {
            return Err(LoadError::TensorType {
                tensor: view.name.clone(),
                dtype: type_name(view.dtype),
                supported: "F32, F16, BF16",
            });
        }
        let (k, width, size) = (view.shape[0], view.shape[1], view.dtype.type_size());
        let mut data = Vec::with_capacity(columns.len() * k * size);
        for column in columns.clone() {
            for row in 0..k {
                data.extend_from_slice(&view.data[(row * width + column) * size..][..size]);
            }
        }
        let data = Cow::Owned(data);
        Ok(Self { name: view.name.clone(), dtype: view.dtype, n: columns.len(), k, data })
    }

    /// Bytes of a row.
    pub(crate) fn row_bytes(&self) -> usize {
        self.k / self.dtype.block_size() * self.dtype.type_size()
    }
}
