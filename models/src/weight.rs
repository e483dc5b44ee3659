//! One weight matrix in memory, and how the matrices of a file become it.
//!
//! Panels and rows are converted in parallel, straight from the file's map into their final place, so that
//! loading needs no second copy of a matrix. Knows no layer. Invariant: under `Target::Kept`, and as dense
//! f32 or in the file's dense type, a loaded matrix holds exactly the file's values.

use std::sync::{Mutex, OnceLock, PoisonError};

use half::{bf16, f16};
use obol_kernels::{Cpu, Dense, DenseData, GROUP, Packed, SuperBlock};

use crate::blocks::Scales;
use crate::error::LoadError;
use crate::matrix::Matrix;
use crate::quantize::{DenseType, INT8, Target};

/// Values that one task converts.
const TASK_VALUES: usize = 1 << 17;

const BAD_SCALE: &str =
    "a scale is not a number, or out of range; download the file again, or choose another --quant";

/// A weight matrix (out_features, in_features).
pub(crate) enum Weight {
    Packed(Packed),
    Dense(Dense),
}

/// The first tensor with something that cannot be kept, and what.
type Bad = OnceLock<(usize, &'static str)>;

impl Weight {
    /// One matrix of the rows of all `tensors`, each of which becomes what `targets` says; they fuse.
    pub(crate) fn load(cpu: &Cpu, tensors: &[Matrix<'_>], targets: &[Target]) -> Result<Self, LoadError> {
        let k = tensors[0].k;
        let n = tensors.iter().map(|tensor| tensor.n).sum();
        let bad = Bad::new();
        let weight = match targets[0] {
            Target::Dense(dense) => {
                let data = match dense {
                    DenseType::F32 => DenseData::F32(values(cpu, tensors, &bad)),
                    DenseType::F16 => DenseData::F16(values(cpu, tensors, &bad)),
                    DenseType::Bf16 => DenseData::Bf16(values(cpu, tensors, &bad)),
                };
                Self::Dense(Dense::new(n, k, data))
            }
            Target::Kept(format) | Target::Rounded(format) => {
                let fill = |row, group, q: &mut [u8; GROUP]| {
                    let (index, row) = locate(tensors, row);
                    let tensor = &tensors[index];
                    let group = match targets[index] {
                        Target::Kept(_) => {
                            Some(tensor.group(row, group, q)).filter(|&(a, b)| format.holds(a, b))
                        }
                        _ => round(cpu, tensor, row, group, format == INT8, q),
                    };
                    group.unwrap_or_else(|| {
                        bad.get_or_init(|| (index, BAD_SCALE));
                        (0.0, 0.0)
                    })
                };
                let fill_super = |row, at, out: &mut SuperBlock| {
                    let (index, row) = locate(tensors, row);
                    if !tensors[index].super_block(row, at, out) {
                        bad.get_or_init(|| (index, BAD_SCALE));
                    }
                };
                Self::Packed(match format.scales {
                    Scales::Groups(kind) => Packed::build(cpu, n, k, format.bits, kind, &fill),
                    Scales::Super(kind) => Packed::build_super(cpu, n, k, format.bits, kind, &fill_super),
                })
            }
        };
        match bad.get() {
            None => Ok(weight),
            Some(&(index, problem)) => {
                Err(LoadError::TensorData { tensor: tensors[index].name.clone(), problem: problem.into() })
            }
        }
    }

    /// The packed matrix, should it be one.
    #[cfg(feature = "cuda")]
    pub(crate) fn packed(&self) -> Option<&Packed> {
        match self {
            Self::Packed(weight) => Some(weight),
            Self::Dense(_) => None,
        }
    }

    /// The dense matrix, should it be one.
    #[cfg(feature = "cuda")]
    pub(crate) fn dense(&self) -> Option<&Dense> {
        match self {
            Self::Packed(_) => None,
            Self::Dense(weight) => Some(weight),
        }
    }

    /// Whether both are kept in the same way.
    #[cfg(feature = "cuda")]
    pub(crate) fn is_alike(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Packed(ours), Self::Packed(theirs)) => obol_kernels::cuda::packed_alike(ours, theirs),
            (Self::Dense(_), Self::Dense(_)) => true,
            _ => false,
        }
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

    /// Writes row `row` (in_features) as f32.
    pub(crate) fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        match self {
            Self::Packed(weight) => weight.dequantize_row(row, out),
            Self::Dense(weight) => weight.dequantize_row(row, out),
        }
    }
}

/// Rounds a group of `tensor` into `q`; (scale, min), or none where they are no numbers of f16.
fn round(
    cpu: &Cpu,
    tensor: &Matrix<'_>,
    row: usize,
    group: usize,
    eight: bool,
    q: &mut [u8; GROUP],
) -> Option<(f32, f32)> {
    let mut values = [0.0; GROUP];
    tensor.values(row, group * GROUP, &mut values);
    if !eight {
        return cpu.quantize_int4(&values, q);
    }
    cpu.quantize_int8(&values, q).map(|scale| (scale, -128.0 * scale))
}

/// A number of a dense matrix.
trait Number: Copy + Default + Send {
    const TYPE: DenseType;
    fn from_bytes(bytes: &[u8]) -> Self;
    fn from_f32(x: f32) -> Self;
    fn is_finite(self) -> bool;
}

impl Number for f32 {
    const TYPE: DenseType = DenseType::F32;

    fn from_bytes(b: &[u8]) -> Self {
        Self::from_le_bytes([b[0], b[1], b[2], b[3]])
    }

    fn from_f32(x: f32) -> Self {
        x
    }

    fn is_finite(self) -> bool {
        self.is_finite()
    }
}

impl Number for f16 {
    const TYPE: DenseType = DenseType::F16;

    fn from_bytes(b: &[u8]) -> Self {
        Self::from_le_bytes([b[0], b[1]])
    }

    fn from_f32(x: f32) -> Self {
        Self::from_f32(x)
    }

    fn is_finite(self) -> bool {
        self.is_finite()
    }
}

impl Number for bf16 {
    const TYPE: DenseType = DenseType::Bf16;

    fn from_bytes(b: &[u8]) -> Self {
        Self::from_le_bytes([b[0], b[1]])
    }

    fn from_f32(x: f32) -> Self {
        Self::from_f32(x)
    }

    fn is_finite(self) -> bool {
        self.is_finite()
    }
}

/// The values of all rows of `tensors`, in the file's numbers where they have the type `T`, else rounded.
fn values<T: Number>(cpu: &Cpu, tensors: &[Matrix<'_>], bad: &Bad) -> Vec<T> {
    let k = tensors[0].k;
    let n: usize = tensors.iter().map(|tensor| tensor.n).sum();
    let mut values = vec![T::default(); n * k];
    let rows_each = (TASK_VALUES / k).max(1);
    // Each task takes its own rows, once: the locks are never waited for.
    let tasks: Vec<Mutex<&mut [T]>> = values.chunks_mut(rows_each * k).map(Mutex::new).collect();
    cpu.pool().run(tasks.len(), &|task| {
        let mut rows = tasks[task].lock().unwrap_or_else(PoisonError::into_inner);
        let mut row_values = vec![0.0; k];
        for (row, out) in rows.chunks_exact_mut(k).enumerate() {
            let (index, row) = locate(tensors, task * rows_each + row);
            let tensor = &tensors[index];
            if let Some(bytes) = tensor.dense_row(row, T::TYPE) {
                let chunks = bytes.chunks_exact(size_of::<T>());
                out.iter_mut().zip(chunks).for_each(|(out, bytes)| *out = T::from_bytes(bytes));
                continue;
            }
            tensor.values(row, 0, &mut row_values);
            for (out, &x) in out.iter_mut().zip(&row_values) {
                *out = T::from_f32(x);
            }
            if !out.iter().all(|x| x.is_finite()) {
                let problem = if row_values.iter().all(|x| x.is_finite()) {
                    "a value is too large for f16; choose bf16 or f32"
                } else {
                    "a value or scale is not a number; download the file again"
                };
                bad.get_or_init(|| (index, problem));
            }
        }
    });
    values
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

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use candle_core::Device;
    use candle_core::quantized::{GgmlDType, QStorage, QTensor};

    use super::*;
    use crate::gguf::TensorView;
    use crate::quant::Quant;

    fn load(cpu: &Cpu, quant: Quant, tensors: &[Matrix<'_>]) -> Weight {
        let targets: Vec<Target> = tensors
            .iter()
            .map(|tensor| Target::of(quant, "blk.0.attn_q", tensor).expect("supported"))
            .collect();
        Weight::load(cpu, tensors, &targets).expect("good data")
    }

    /// Random blocks whose 16-bit scales are ordinary numbers.
    fn random_blocks(dtype: GgmlDType, blocks: usize, seed: u64) -> Vec<u8> {
        let mut state = seed;
        let mut random = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32
        };
        // Where the 16-bit factors are.
        let halves: &[usize] = match dtype {
            GgmlDType::Q4_0 | GgmlDType::Q5_0 | GgmlDType::Q8_0 => &[0],
            GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 => &[],
            GgmlDType::Q2K => &[80, 82],
            GgmlDType::Q3K => &[108],
            GgmlDType::Q6K => &[208],
            _ => &[0, 2],
        };
        let mut bytes = Vec::new();
        for _ in 0..blocks {
            let start = bytes.len();
            bytes.extend((0..dtype.type_size()).map(|_| random() as u8));
            for half in halves {
                // Down to subnormal ones, of either sign.
                let exponent = (random() % 30) as f32 - 25.0;
                let scale = exponent.exp2() * (1.0 + random() as f32 / (1u64 << 31) as f32);
                let scale = f16::from_f32(if random() % 2 == 0 { scale } else { -scale });
                bytes[start + half..][..2].copy_from_slice(&scale.to_le_bytes());
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
            let weight = load(&cpu, Quant::File, tensors);
            for (row, theirs) in theirs.iter().enumerate() {
                let mut ours = vec![0.0; k];
                weight.dequantize_row(row, &mut ours);
                assert!(ours == *theirs, "{dtype:?}, row {row}:\nours   {ours:?}\ntheirs {theirs:?}");
                let mut values = vec![0.0; k];
                Matrix::rows(&view, 0..n).values(row, 0, &mut values);
                assert!(values == *theirs, "{dtype:?}, row {row} of the file");
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
            GgmlDType::Q2K,
            GgmlDType::Q3K,
            GgmlDType::Q4K,
            GgmlDType::Q5K,
            GgmlDType::Q6K,
        ] {
            check(dtype);
        }
    }

    /// Values as the gguf Python package dequantises them, of scales of all kinds.
    #[test]
    fn every_supported_type_has_the_values_that_gguf_gives() {
        let types = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/types");
        let file = crate::gguf::GgufFile::open(&types.join("types.gguf")).expect("the fixture");
        let expected = std::fs::read(types.join("expected.safetensors")).expect("the values");
        let expected = safetensors::SafeTensors::deserialize(&expected).expect("the values");
        let (n, k) = (8, 512);
        assert_eq!(expected.len(), 13);
        for (name, values) in expected.tensors() {
            let view = file.tensor(&name).expect("the type's tensor");
            let weight = load(&Cpu::new(1), Quant::File, &[Matrix::rows(&view, 0..n)]);
            let values: Vec<f32> = values.data().chunks_exact(4).map(Number::from_bytes).collect();
            for (row, values) in values.chunks_exact(k).enumerate() {
                let mut ours = vec![0.0; k];
                weight.dequantize_row(row, &mut ours);
                assert!(ours == values, "{name}, row {row}:\n{ours:?}\n{values:?}");
            }
        }
    }

    /// A dense random matrix of which each precision is made, fused from two.
    #[test]
    fn other_precisions_are_as_exact_as_they_say() {
        let (n, k) = (37, 96);
        let numbers: Vec<f32> = (0..n * k).map(|i| ((i * 7919 % 1009) as f32 / 504.5 - 1.0) * 0.05).collect();
        let data: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        let view = TensorView { name: "w".into(), dtype: GgmlDType::F32, shape: vec![n, k], data: &data };
        let parts = [Matrix::rows(&view, 0..21), Matrix::rows(&view, 21..n)];
        let cpu = Cpu::new(2);
        let check = |quant, bytes: usize, bound: &dyn Fn(&Weight, usize, usize) -> f32| {
            let weight = load(&cpu, quant, &parts);
            assert_eq!(weight.bytes(), bytes, "{quant}");
            for row in 0..n {
                let mut ours = vec![0.0; k];
                weight.dequantize_row(row, &mut ours);
                for (i, x) in ours.iter().enumerate() {
                    let number = numbers[row * k + i];
                    let bound = bound(&weight, row, i / GROUP) * number.abs().max(1.0);
                    assert!((x - number).abs() <= bound, "{quant}, ({row}, {i}): {x} for {number}");
                }
            }
        };
        let scale = |weight: &Weight, row, group| match weight {
            Weight::Packed(weight) => weight.group(row, group).halves[0].0,
            Weight::Dense(_) => panic!("not packed"),
        };
        check(Quant::F32, n * k * 4, &|_, _, _| 0.0);
        check(Quant::F16, n * k * 2, &|_, _, _| 0.05 / 2048.0);
        check(Quant::Bf16, n * k * 2, &|_, _, _| 0.05 / 256.0);
        // Rows are stored in panels of 16.
        check(Quant::Int8, 48 * k / 32 * 34, &|w, row, group| scale(w, row, group) * 0.500_01);
        check(Quant::Int4, 48 * k / 32 * 20, &|w, row, group| scale(w, row, group) * 2.5);
    }

    #[test]
    fn what_a_precision_cannot_hold_is_an_error() {
        let check = |quant, value: f32, message: &str| {
            let mut numbers = vec![0.5f32; 64];
            numbers[40] = value;
            let data: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
            let view =
                TensorView { name: "w".into(), dtype: GgmlDType::F32, shape: vec![2, 32], data: &data };
            let matrix = Matrix::rows(&view, 0..2);
            let target = Target::of(quant, "blk.0.attn_q", &matrix).expect("supported");
            let error = Weight::load(&Cpu::new(1), &[matrix], &[target]).err().expect(message).to_string();
            assert_eq!(error, format!("tensor `w`: {message}"));
        };
        check(Quant::F16, 70_000.0, "a value is too large for f16; choose bf16 or f32");
        for quant in [Quant::F16, Quant::Bf16] {
            check(quant, f32::NAN, "a value or scale is not a number; download the file again");
        }
        for quant in [Quant::Int8, Quant::Int4] {
            check(quant, f32::NAN, BAD_SCALE);
            check(quant, 1e20, BAD_SCALE);
        }
    }
}
