//! Weight matrices, dense or packed, behind one `Linear`.
//!
//! A `Linear` may hold several matrices that read the same input (q, k and v; gate and up): fused into one
//! product where their formats agree, else one product each on an input that is quantised once. Knows no
//! layer and no model; what a matrix becomes at loading is `quantize`'s and `weight`'s matter.

use std::ops::Range;

use obol_kernels::{Activations, Cpu, Place};

use crate::checkpoint::Checkpoint;
use crate::cut::{Part, Rank};
use crate::error::LoadError;
use crate::gguf::SUPPORTED_TYPES;
use crate::matrix::Matrix;
use crate::quant::Quant;
use crate::quantize::Target;
use crate::weight::Weight;

/// Matrices that read the same input, each with an optional bias.
pub(crate) struct Linear {
    in_features: usize,
    products: Vec<Product>,
    outputs: Vec<Output>,
}

struct Product {
    weight: Weight,
    bias: Option<Vec<f32>>,
    /// Its first column among all columns of the `Linear`.
    first: usize,
}

/// Where one matrix's columns are.
#[derive(Debug, Clone, Copy)]
struct Output {
    product: usize,
    /// First column inside its product.
    column: usize,
}

/// Name and number of output features of a matrix to load.
pub(crate) struct Named<'a> {
    pub name: &'a str,
    pub out_features: usize,
    /// A bias must be there; one that is there is used in any case.
    pub bias: bool,
    /// What this device has of it.
    pub part: Part,
}

/// What matrices are loaded from and with.
#[derive(Clone, Copy)]
pub(crate) struct Loader<'a> {
    pub cpu: &'a Cpu,
    pub weights: &'a Checkpoint<'a>,
    /// What becomes of them.
    pub quant: Quant,
    /// The device that they are loaded for.
    pub rank: Rank,
}

impl Linear {
    /// Loads matrices `NAME.weight` with `NAME.bias`, all of `in_features`, or the same part of it.
    ///
    /// # Errors
    /// When a tensor is missing or has the wrong shape or an unsupported type, or cannot be cut where it should.
    pub(crate) fn load(
        loader: &Loader<'_>,
        in_features: usize,
        matrices: &[Named<'_>],
    ) -> Result<Self, LoadError> {
        let weights = loader.weights;
        let mut tensors = Vec::with_capacity(matrices.len());
        let mut targets = Vec::with_capacity(matrices.len());
        let mut biases = Vec::with_capacity(matrices.len());
        for matrix in matrices {
            let (tensor, target) = find(loader, matrix.name, matrix.out_features, in_features)?;
            tensors.push(match &matrix.part {
                Part::Whole => tensor,
                Part::Rows(rows) => tensor.cut_rows(rows.clone()),
                Part::Columns { columns, .. } => cut_columns(loader, tensor, target, columns)?,
            });
            targets.push(target);
            biases.push(find_bias(loader, matrix)?);
        }
        let mut linear = Self { in_features: tensors[0].k, products: Vec::new(), outputs: Vec::new() };
        for part in fusible(&targets) {
            let first = linear.out_features();
            let mut column = 0;
            for matrix in &tensors[part.clone()] {
                linear.outputs.push(Output { product: linear.products.len(), column });
                column += matrix.n;
            }
            let bias = join_biases(&tensors[part.clone()], &biases[part.clone()]);
            let weight = Weight::load(loader.cpu, &tensors[part.clone()], &targets[part.clone()])?;
            tensors[part].iter().for_each(|tensor| weights.forget(tensor));
            linear.products.push(Product { weight, bias, first });
        }
        Ok(linear)
    }

    /// Inputs of the matrix `NAME.weight` that must stay together.
    ///
    /// # Errors
    /// As [`Linear::load`].
    pub(crate) fn column_unit(
        loader: &Loader<'_>,
        name: &str,
        out_features: usize,
        in_features: usize,
    ) -> Result<usize, LoadError> {
        let (tensor, target) = find(loader, name, out_features, in_features)?;
        Ok(tensor.column_unit(target))
    }

    /// Columns of all outputs together.
    pub(crate) fn out_features(&self) -> usize {
        self.products.last().map_or(0, |product| product.first + product.weight.out_features())
    }

    /// Bytes of weights and biases held.
    pub(crate) fn bytes(&self) -> usize {
        let bias = |product: &Product| product.bias.as_ref().map_or(0, |bias| bias.len() * 4);
        self.products.iter().map(|product| product.weight.bytes() + bias(product)).sum()
    }

    /// Its products: weight, bias, and the first column among all columns.
    #[cfg(feature = "cuda")]
    pub(crate) fn products(&self) -> impl Iterator<Item = (&Weight, Option<&[f32]>, usize)> {
        self.products.iter().map(|product| (&product.weight, product.bias.as_deref(), product.first))
    }

    /// Whether all matrices are one product, their outputs side by side in a row.
    pub(crate) fn is_fused(&self) -> bool {
        self.products.len() == 1
    }

    /// Where output `output` of `rows` rows lies in the buffer that [`Linear::forward`] fills.
    pub(crate) fn place(&self, output: usize, rows: usize) -> Place {
        let Output { product, column } = self.outputs[output];
        let product = &self.products[product];
        Place { start: rows * product.first + column, stride: product.weight.out_features() }
    }

    /// Computes all outputs of `x` (rows, in_features) into `y` (rows * out_features), each at its place.
    pub(crate) fn forward(&self, cpu: &Cpu, x: &[f32], quantized: &mut Activations, y: &mut [f32]) {
        let rows = x.len() / self.in_features;
        if self.products.iter().any(|product| matches!(product.weight, Weight::Packed(_))) {
            cpu.quantize(x, self.in_features, quantized);
        }
        for product in &self.products {
            let columns = product.weight.out_features();
            let y = &mut y[rows * product.first..][..rows * columns];
            match &product.weight {
                Weight::Packed(weight) => cpu.matmul_packed(quantized, weight, product.bias.as_deref(), y),
                Weight::Dense(weight) => cpu.matmul_dense(x, weight, product.bias.as_deref(), y),
            }
        }
    }

    /// Writes row `row` of the first matrix (in_features): an embedding.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        self.products[0].weight.dequantize_row(row, out);
    }
}

/// The matrix `NAME.weight`, and what becomes of it.
fn find<'a>(
    loader: &Loader<'a>,
    name: &str,
    out_features: usize,
    in_features: usize,
) -> Result<(Matrix<'a>, Target), LoadError> {
    let tensor = loader.weights.matrix(&format!("{name}.weight"), out_features, in_features)?;
    match Target::of(loader.quant, name, &tensor) {
        Some(target) => Ok((tensor, target)),
        None => Err(LoadError::TensorType {
            tensor: tensor.name.clone(),
            dtype: tensor.type_name(),
            supported: SUPPORTED_TYPES,
        }),
    }
}

/// The bias that goes with the part of a matrix, if it has one.
fn find_bias(loader: &Loader<'_>, matrix: &Named<'_>) -> Result<Option<Vec<f32>>, LoadError> {
    let name = format!("{}.bias", matrix.name);
    let whole = match matrix.bias {
        true => Some(loader.weights.vector(&name, matrix.out_features)?),
        false => loader.weights.find_vector(&name, matrix.out_features)?,
    };
    Ok(match &matrix.part {
        Part::Whole | Part::Columns { with_bias: true, .. } => whole,
        Part::Rows(rows) => whole.map(|bias| bias[rows.clone()].to_vec()),
        Part::Columns { with_bias: false, .. } => None,
    })
}

fn cut_columns<'a>(
    loader: &Loader<'_>,
    tensor: Matrix<'a>,
    target: Target,
    columns: &Range<usize>,
) -> Result<Matrix<'a>, LoadError> {
    let unit = tensor.column_unit(target);
    for at in [columns.start, columns.end] {
        if at != tensor.k && !at.is_multiple_of(unit) {
            return Err(LoadError::Options(format!(
                "tensor parallel {}: tensor `{}` ({}) would be cut at input {at}, inside a group of {unit} that \
                 share their scales; choose another number of devices",
                loader.rank.of,
                tensor.name,
                tensor.type_name()
            )));
        }
    }
    Ok(tensor.cut_columns(columns.clone()))
}

/// Cuts matrices into runs that can be one product.
fn fusible(targets: &[Target]) -> Vec<Range<usize>> {
    let mut start = 0;
    targets
        .chunk_by(|a, b| a.fuses_with(*b))
        .map(|run| {
            start += run.len();
            start - run.len()..start
        })
        .collect()
}

/// The biases of fused matrices as one, zero for those without; none if none has one.
fn join_biases(matrices: &[Matrix<'_>], biases: &[Option<Vec<f32>>]) -> Option<Vec<f32>> {
    biases.iter().any(Option::is_some).then(|| {
        let mut joined = Vec::new();
        for (matrix, bias) in matrices.iter().zip(biases) {
            match bias {
                Some(bias) => joined.extend_from_slice(bias),
                None => joined.resize(joined.len() + matrix.n, 0.0),
            }
        }
        joined
    })
}

#[cfg(test)]
mod tests {
    use obol_kernels::{Dense, DenseData};

    use super::*;
    use crate::quantize::{DenseType, INT4, INT8};

    #[test]
    fn fused_outputs_lie_side_by_side_and_others_one_after_another() {
        let runs = fusible(&[Target::Kept(INT4), Target::Rounded(INT4), Target::Kept(INT8)]);
        assert_eq!(runs, [0..2, 2..3]);
        let runs = fusible(&[Target::Dense(DenseType::F16), Target::Dense(DenseType::F32)]);
        assert_eq!(runs, [0..1, 1..2]);
        let product = |n, first| {
            let weight = Weight::Dense(Dense::new(n, 1, DenseData::F32(vec![1.0; n])));
            Product { weight, bias: None, first }
        };
        let linear = Linear {
            in_features: 1,
            products: vec![product(6, 0), product(2, 6)],
            outputs: vec![
                Output { product: 0, column: 0 },
                Output { product: 0, column: 4 },
                Output { product: 1, column: 0 },
            ],
        };
        assert_eq!(linear.out_features(), 8);
        let places = [0, 1, 2].map(|output| linear.place(output, 3));
        let expected = [(0, 6), (4, 6), (18, 2)].map(|(start, stride)| Place { start, stride });
        assert_eq!(places, expected);
        let mut y = vec![0.0; 24];
        linear.forward(&Cpu::new(1), &[1.0, 2.0, 3.0], &mut Activations::new(), &mut y);
        assert_eq!(y[18..], [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]);
        assert_eq!(y[12..18], [3.0; 6]);
    }
}
