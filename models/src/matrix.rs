//! A weight matrix as it lies in a file: (out_features, in_features), rows one after another.
//!
//! Knows how to cut, turn and read; what the bytes of quantised types mean is `blocks`' matter.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::quantized::GgmlDType;
use half::{bf16, f16};
use obol_kernels::{GROUP, SuperBlock};

use crate::blocks::{Format, read_group, read_super};
use crate::error::LoadError;
use crate::gguf::{TensorView, type_name};
use crate::gptq::Grouped;
use crate::quantize::{DenseType, INT8, Target};

/// A weight matrix of a file.
#[derive(Debug, Clone)]
pub(crate) struct Matrix<'a> {
    /// The file's name of its tensor.
    pub name: String,
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    stored: Stored<'a>,
}

/// In which form the file has it.
#[derive(Debug, Clone)]
enum Stored<'a> {
    /// Blocks of `dtype`, row after row; not aligned.
    Blocks { dtype: GgmlDType, data: Cow<'a, [u8]>, within: Within },
    /// Rows from `row` and inputs from `column` on of a matrix of 4-bit integers.
    Grouped { grouped: Grouped<'a>, row: usize, column: usize },
}

/// Where the matrix's columns are in rows that hold more.
#[derive(Debug, Clone, Copy)]
struct Within {
    /// From one row to the next.
    row_bytes: usize,
    /// Before a row's first column.
    skipped_bytes: usize,
}

impl<'a> Matrix<'a> {
    /// Rows `rows` of the tensor (out_features, in_features).
    pub(crate) fn rows(view: &TensorView<'a>, rows: Range<usize>) -> Self {
        let k = view.shape[1];
        let bytes = k / view.dtype.block_size() * view.dtype.type_size();
        let data = Cow::Borrowed(&view.data[rows.start * bytes..rows.end * bytes]);
        let stored = Stored::Blocks { dtype: view.dtype, data, within: Within::whole(bytes) };
        Self { name: view.name.clone(), n: rows.len(), k, stored }
    }

    /// Rows `rows` of a matrix of `k` inputs kept as 4-bit integers.
    pub(crate) fn grouped(name: String, grouped: Grouped<'a>, k: usize, rows: Range<usize>) -> Self {
        Self { name, n: rows.len(), k, stored: Stored::Grouped { grouped, row: rows.start, column: 0 } }
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
        let stored =
            Stored::Blocks { dtype: view.dtype, data: Cow::Owned(data), within: Within::whole(k * size) };
        Ok(Self { name: view.name.clone(), n: columns.len(), k, stored })
    }

    /// The matrix of these rows alone.
    pub(crate) fn cut_rows(self, rows: Range<usize>) -> Self {
        assert!(rows.end <= self.n, "rows {rows:?} of {}; this is a bug", self.n);
        let stored = match self.stored {
            Stored::Blocks { dtype, data, within } => {
                let bytes = rows.start * within.row_bytes..rows.end * within.row_bytes;
                let data = match data {
                    Cow::Borrowed(data) => Cow::Borrowed(&data[bytes]),
                    Cow::Owned(data) => Cow::Owned(data[bytes].to_vec()),
                };
                Stored::Blocks { dtype, data, within }
            }
            Stored::Grouped { grouped, row, column } => {
                Stored::Grouped { grouped, row: row + rows.start, column }
            }
        };
        Self { n: rows.len(), stored, ..self }
    }

    /// The matrix of these columns alone, which are whole [units](Self::column_unit).
    pub(crate) fn cut_columns(self, columns: Range<usize>) -> Self {
        assert!(columns.end <= self.k, "columns {columns:?} of {}; this is a bug", self.k);
        let stored = match self.stored {
            Stored::Blocks { dtype, data, mut within } => {
                within.skipped_bytes += columns.start / dtype.block_size() * dtype.type_size();
                Stored::Blocks { dtype, data, within }
            }
            Stored::Grouped { grouped, row, column } => {
                Stored::Grouped { grouped, row, column: column + columns.start }
            }
        };
        Self { k: columns.len(), stored, ..self }
    }

    /// Columns that must stay together where the matrix is cut and becomes `target`: those of a block of the
    /// file, and of a group that shares its scales in memory.
    pub(crate) fn column_unit(&self, target: Target) -> usize {
        let stored = match &self.stored {
            Stored::Blocks { dtype, .. } => dtype.block_size(),
            Stored::Grouped { .. } => GROUP,
        };
        // Powers of two: the larger is a multiple of the smaller.
        stored.max(target.group())
    }

    /// The form that holds the matrix without loss; none where its type is not supported.
    pub(crate) fn own_target(&self) -> Option<Target> {
        match &self.stored {
            Stored::Blocks { dtype, .. } => match DenseType::of(*dtype) {
                Some(dense) => Some(Target::Dense(dense)),
                None => Format::of(*dtype).map(Target::Kept),
            },
            // Inputs in another order than their groups: 8 bits are closest to what 4 bits of many scales say.
            Stored::Grouped { grouped, .. } => {
                Some(grouped.format().map_or(Target::Rounded(INT8), Target::Kept))
            }
        }
    }

    /// The type's name in messages.
    pub(crate) fn type_name(&self) -> String {
        match &self.stored {
            Stored::Blocks { dtype, .. } => type_name(*dtype),
            Stored::Grouped { .. } => "grouped int4".into(),
        }
    }

    /// The part of the file that was read, where the matrix is not a copy.
    pub(crate) fn file_data(&self) -> Option<&'a [u8]> {
        match &self.stored {
            Stored::Blocks { data: Cow::Borrowed(data), .. } => Some(data),
            Stored::Blocks { .. } => None,
            Stored::Grouped { grouped, .. } => Some(grouped.data()),
        }
    }

    /// The bytes of `row`, should the matrix be a dense one of that type.
    pub(crate) fn dense_row(&self, row: usize, dense: DenseType) -> Option<&[u8]> {
        match &self.stored {
            Stored::Blocks { dtype, data, within } if DenseType::of(*dtype) == Some(dense) => {
                Some(within.row_of(*dtype, data, self.k, row))
            }
            _ => None,
        }
    }

    /// Reads the 32 integers of a row's group into `q`; returns (scale, min). For forms of groups of 32.
    pub(crate) fn group(&self, row: usize, group: usize, q: &mut [u8; GROUP]) -> (f32, f32) {
        match &self.stored {
            Stored::Blocks { dtype, data, within } => {
                read_group(*dtype, within.row_of(*dtype, data, self.k, row), group, q)[0]
            }
            Stored::Grouped { grouped, row: first, column } => {
                grouped.group(first + row, column / GROUP + group, q)
            }
        }
    }

    /// Reads a row's super-block `at`; false where its factors are not numbers. For forms of super-blocks.
    pub(crate) fn super_block(&self, row: usize, at: usize, out: &mut SuperBlock) -> bool {
        match &self.stored {
            Stored::Blocks { dtype, data, within } => {
                read_super(*dtype, within.row_of(*dtype, data, self.k, row), at, out)
            }
            Stored::Grouped { .. } => unreachable!("grouped integers have no super-blocks; this is a bug"),
        }
    }

    /// Writes the values of `row` from column `start` on, as many as `out` has. Both are whole groups of 32
    /// where the matrix is not dense.
    pub(crate) fn values(&self, row: usize, start: usize, out: &mut [f32]) {
        let (dtype, data) = match &self.stored {
            Stored::Blocks { dtype, data, within } => (*dtype, within.row_of(*dtype, data, self.k, row)),
            Stored::Grouped { grouped, row: first, column } => {
                return grouped.values(first + row, column + start, out);
            }
        };
        let halves = |value: fn([u8; 2]) -> f32, out: &mut [f32]| {
            let bytes = data[2 * start..].chunks_exact(2);
            out.iter_mut().zip(bytes).for_each(|(out, b)| *out = value([b[0], b[1]]));
        };
        match DenseType::of(dtype) {
            Some(DenseType::F32) => {
                for (out, b) in out.iter_mut().zip(data[4 * start..].chunks_exact(4)) {
                    *out = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            Some(DenseType::F16) => halves(|b| f16::from_le_bytes(b).to_f32(), out),
            Some(DenseType::Bf16) => halves(|b| bf16::from_le_bytes(b).to_f32(), out),
            None => {
                let mut q = [0; GROUP];
                for (index, out) in out.chunks_exact_mut(GROUP).enumerate() {
                    let scales = read_group(dtype, data, start / GROUP + index, &mut q);
                    for (i, (out, q)) in out.iter_mut().zip(q).enumerate() {
                        let (scale, min) = scales[i / (GROUP / 2)];
                        *out = scale * f32::from(q) + min;
                    }
                }
            }
        }
    }
}

impl Within {
    /// Rows that hold nothing else.
    fn whole(row_bytes: usize) -> Self {
        Self { row_bytes, skipped_bytes: 0 }
    }

    /// The bytes of `row`'s `k` columns.
    fn row_of(self, dtype: GgmlDType, data: &[u8], k: usize, row: usize) -> &[u8] {
        let bytes = k / dtype.block_size() * dtype.type_size();
        &data[row * self.row_bytes + self.skipped_bytes..][..bytes]
    }
}
