//! Weight matrices, dense or packed, behind one `Linear`, and how GGUF's tensors become them.
//!
//! A `Linear` may hold several matrices that read the same input (q, k and v; gate and up): fused into one
//! product where their formats agree, else one product each on an input that is quantised once. Knows no
//! layer and no model. Invariant: a loaded matrix holds exactly the values of the file's tensor.

use std::ops::Range;
use std::sync::OnceLock;

use candle_core::quantized::GgmlDType;
use half::{bf16, f16};
use obol_kernels::{Activations, Cpu, Dense, DenseData, Packed};

use crate::blocks::{Format, read_group};
use crate::checkpoint::Checkpoint;
use crate::error::LoadError;
use crate::gguf::type_name;
use crate::matrix::Matrix;

const SUPPORTED: &str = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K";

/// A weight matrix (out_features, in_features).
pub(crate) enum Weight {
    Packed(Packed),
    Dense(Dense),
}

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

/// Where an output's rows lie in the buffer that [`Linear::forward`] fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub start: usize,
    pub stride: usize,
}

/// Name and number of output features of a matrix to load.
pub(crate) struct Named<'a> {
    pub name: &'a str,
    pub out_features: usize,
    /// A bias must be there; one that is there is used in any case.
    pub bias: bool,
}

/// What matrices are loaded from and with.
#[derive(Clone, Copy)]
pub(crate) struct Loader<'a> {
    pub cpu: &'a Cpu,
    pub weights: &'a Checkpoint<'a>,
}

impl Linear {
    /// Loads matrices `NAME.weight` with `NAME.bias`, all of `in_features`.
    ///
    /// # Errors
    /// When a tensor is missing or has the wrong shape or an unsupported type.
    pub(crate) fn load(
        loader: &Loader<'_>,
        in_features: usize,
        matrices: &[Named<'_>],
    ) -> Result<Self, LoadError> {
        let weights = loader.weights;
        let mut tensors = Vec::with_capacity(matrices.len());
        let mut biases = Vec::with_capacity(matrices.len());
        for &Named { name, out_features, bias } in matrices {
            tensors.push(weights.matrix(&format!("{name}.weight"), out_features, in_features)?);
            let name = format!("{name}.bias");
            biases.push(match bias {
                true => Some(weights.vector(&name, out_features)?),
                false => weights.find_vector(&name, out_features)?,
            });
        }
        let mut linear = Self { in_features, products: Vec::new(), outputs: Vec::new() };
        for part in fusible(&tensors) {
            let first = linear.out_features();
            let mut column = 0;
            for matrix in &matrices[part.clone()] {
                linear.outputs.push(Output { product: linear.products.len(), column });
                column += matrix.out_features;
            }
            let bias = join_biases(&matrices[part.clone()], &biases[part.clone()]);
            let weight = Weight::load(loader.cpu, &tensors[part])?;
            linear.products.push(Product { weight, bias, first });
        }
        Ok(linear)
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

    /// Whether all matrices are one product, their outputs side by side in a row.
    pub(crate) fn is_fused(&self) -> bool {
        self.products.len() == 1
    }

    /// Where output `output` of `rows` rows lies.
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
        match &self.products[0].weight {
            Weight::Packed(weight) => weight.dequantize_row(row, out),
            Weight::Dense(weight) => weight.dequantize_row(row, out),
        }
    }
}

impl Weight {
    /// One matrix of the rows of all `tensors`, which have one format.
    pub(crate) fn load(cpu: &Cpu, tensors: &[Matrix<'_>]) -> Result<Self, LoadError> {
        let dtype = tensors[0].dtype;
        let k = tensors[0].k;
        let n = tensors.iter().map(|tensor| tensor.n).sum();
        let data = match dtype {
            GgmlDType::F32 => DenseData::F32(values(tensors, |b: [u8; 4]| f32::from_le_bytes(b))),
            GgmlDType::F16 => DenseData::F16(values(tensors, |b: [u8; 2]| f16::from_le_bytes(b))),
            GgmlDType::BF16 => DenseData::Bf16(values(tensors, |b: [u8; 2]| bf16::from_le_bytes(b))),
            _ => return pack(cpu, tensors, n, k).map(Self::Packed),
        };
        Ok(Self::Dense(Dense::new(n, k, data)))
    }

    pub(crate) fn out_features(&self) -> usize {
        match self {
            Self::Packed(weight) => weight.n(),
            Self::Dense(weight) => weight.n(),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Packed(weight) => weight.bytes(),
            Self::Dense(weight) => weight.bytes(),
        }
    }
}

fn values<const N: usize, T>(tensors: &[Matrix<'_>], value: fn([u8; N]) -> T) -> Vec<T> {
    let mut values = Vec::with_capacity(tensors.iter().map(|tensor| tensor.data.len() / N).sum());
    for tensor in tensors {
        let chunks = tensor.data.chunks_exact(N);
        values.extend(chunks.map(|bytes| value(bytes.try_into().expect("chunks have the length N"))));
    }
    values
}

fn pack(cpu: &Cpu, tensors: &[Matrix<'_>], n: usize, k: usize) -> Result<Packed, LoadError> {
    for tensor in tensors {
        if Format::of(tensor.dtype).is_none() {
            return Err(LoadError::TensorType {
                tensor: tensor.name.clone(),
                dtype: type_name(tensor.dtype),
                supported: SUPPORTED,
            });
        }
    }
    let format = Format::of(tensors[0].dtype).expect("just checked");
    let bad_tensor = OnceLock::new();
    let packed = Packed::build(cpu, n, k, format.bits, format.scales, &|row, group, q| {
        let (index, row) = locate(tensors, row);
        let tensor = &tensors[index];
        let bytes = tensor.row_bytes();
        let (scale, min) = read_group(tensor.dtype, &tensor.data[row * bytes..][..bytes], group, q);
        if format.holds(scale, min) {
            return (scale, min);
        }
        bad_tensor.get_or_init(|| index);
        (0.0, 0.0)
    });
    match bad_tensor.get() {
        None => Ok(packed),
        Some(&index) => Err(LoadError::TensorData {
            tensor: tensors[index].name.clone(),
            problem: "a scale is not a number, or out of range".into(),
        }),
    }
}

/// Which tensor holds row `row` of all rows together, and as which of its own.
fn locate(tensors: &[Matrix<'_>], mut row: usize) -> (usize, usize) {
    for (index, tensor) in tensors.iter().enumerate() {
        if row < tensor.n {
            return (index, row);
        }
        row -= tensor.n;
    }
    unreachable!("row {row} past the last tensor; this is a bug")
}

/// Cuts `tensors` into runs of one format.
fn fusible(tensors: &[Matrix<'_>]) -> Vec<Range<usize>> {
    let same = |a: &Matrix<'_>, b: &Matrix<'_>| match (Format::of(a.dtype), Format::of(b.dtype)) {
        (None, None) => a.dtype == b.dtype,
        (a, b) => a == b,
    };
    let mut start = 0;
    tensors
        .chunk_by(same)
        .map(|run| {
            start += run.len();
            start - run.len()..start
        })
        .collect()
}

/// The biases of fused matrices as one, zero for those without; none if none has one.
fn join_biases(matrices: &[Named<'_>], biases: &[Option<Vec<f32>>]) -> Option<Vec<f32>> {
    biases.iter().any(Option::is_some).then(|| {
        let mut joined = Vec::new();
        for (matrix, bias) in matrices.iter().zip(biases) {
            match bias {
                Some(bias) => joined.extend_from_slice(bias),
                None => joined.resize(joined.len() + matrix.out_features, 0.0),
            }
        }
        joined
    })
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use candle_core::quantized::{QStorage, QTensor};
    use std::borrow::Cow;

    use super::*;
    use crate::gguf::TensorView;

    /// Random blocks whose 16-bit scales are ordinary numbers.
    fn random_blocks(dtype: GgmlDType, blocks: usize, seed: u64) -> Vec<u8> {
        let mut state = seed;
        let mut random = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32
        };
        let halves = match dtype {
            GgmlDType::Q4_0 | GgmlDType::Q5_0 | GgmlDType::Q8_0 => 1,
            GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 => 0,
            _ => 2,
        };
        let mut bytes = Vec::new();
        for _ in 0..blocks {
            let start = bytes.len();
            bytes.extend((0..dtype.type_size()).map(|_| random() as u8));
            for half in 0..halves {
                // Down to subnormal ones, of either sign.
                let exponent = (random() % 30) as f32 - 25.0;
                let scale = exponent.exp2() * (1.0 + random() as f32 / (1u64 << 31) as f32);
                let scale = f16::from_f32(if random() % 2 == 0 { scale } else { -scale });
                bytes[start + 2 * half..][..2].copy_from_slice(&scale.to_le_bytes());
            }
        }
        bytes
    }

    /// Our rows equal candle's values as numbers (a zero may have the other sign).
    fn check(dtype: GgmlDType) {
        let (n, k) = (37, 512);
        let blocks = n * k / dtype.block_size();
        let mut data = random_blocks(dtype, blocks, 5);
        if matches!(dtype, GgmlDType::F16 | GgmlDType::BF16 | GgmlDType::F32) {
            // No NaNs, which equal nothing: the highest byte's exponent is kept small.
            data.iter_mut().skip(dtype.type_size() - 1).step_by(dtype.type_size()).for_each(|b| *b &= 0xbb);
        }
        let storage = QStorage::from_data(Cow::Borrowed(&data), &Device::Cpu, dtype).expect("storage");
        let theirs = QTensor::new(storage, (n, k)).expect("tensor").dequantize(&Device::Cpu).expect("values");
        let theirs: Vec<Vec<f32>> = theirs.to_vec2().expect("rows");
        let view = TensorView { name: "w".into(), dtype, shape: vec![n, k], data: &data };
        let cpu = Cpu::new(2);
        // Cut in two and fused again, at a row inside a panel.
        let parts = [Matrix::rows(&view, 0..21), Matrix::rows(&view, 21..n)];
        for tensors in [&[Matrix::rows(&view, 0..n)][..], &parts] {
            let weight = Weight::load(&cpu, tensors).expect("supported");
            for (row, theirs) in theirs.iter().enumerate() {
                let mut ours = vec![0.0; k];
                match &weight {
                    Weight::Packed(weight) => weight.dequantize_row(row, &mut ours),
                    Weight::Dense(weight) => weight.dequantize_row(row, &mut ours),
                }
                assert!(ours == *theirs, "{dtype:?}, row {row}:\nours   {ours:?}\ntheirs {theirs:?}");
            }
        }
    }

    #[test]
    fn every_supported_type_is_lossless() {
        for dtype in [
            GgmlDType::F32,
            GgmlDType::F16,
            GgmlDType::BF16,
            GgmlDType::Q4_0,
            GgmlDType::Q4_1,
            GgmlDType::Q5_0,
            GgmlDType::Q5_1,
            GgmlDType::Q8_0,
            GgmlDType::Q4K,
            GgmlDType::Q5K,
        ] {
            check(dtype);
        }
    }

    #[test]
    fn fused_outputs_lie_side_by_side_and_others_one_after_another() {
        let view = |dtype, n| Matrix { name: String::new(), dtype, n, k: 32, data: Cow::Borrowed(&[]) };
        let runs = fusible(&[view(GgmlDType::Q4_1, 4), view(GgmlDType::Q4_1, 2), view(GgmlDType::Q5_1, 2)]);
        assert_eq!(runs, [0..2, 2..3]);
        let runs = fusible(&[view(GgmlDType::F16, 4), view(GgmlDType::F32, 2)]);
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
