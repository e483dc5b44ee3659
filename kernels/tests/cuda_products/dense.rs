//! Products with weights that are not quantised, in each type.

use crate::device::rounded;
use crate::device::{gpu, upload};
use crate::numbers::{Random, assert_close, assert_same_bits};
use crate::scattered::Scattered;
use half::{bf16, f16};
use obol_kernels::cuda::{DeviceDense, Dtype, Gpu};
use obol_kernels::{Dense, DenseData, reference};

/// y (m, n) of rows x, rounded to the weights' type, at places that are not those of a matrix.
pub(crate) fn product(gpu: &Gpu, x: &[f32], w: &DeviceDense, bias: Option<&[f32]>) -> Vec<f32> {
    let m = x.len() / w.k();
    let rows = Scattered::new(gpu, x, w.k(), w.dtype(), 8, w.k() + 16);
    let bias = bias.map(|bias| upload(gpu, bias, Dtype::F32));
    let y = Scattered::room(gpu, m, w.n(), Dtype::F32, 5, w.n() + 3);
    gpu.matmul_dense(rows.rows(), m, w, bias.as_ref(), y.rows()).unwrap();
    y.read(gpu)
}

pub(crate) fn dense(n: usize, k: usize, values: &[f32]) -> Dense {
    Dense::new(n, k, DenseData::F32(values.to_vec()))
}

/// (m, n, k), each of the sizes that hurt at least once.
const SIZES: [(usize, usize, usize); 15] = [
    (1, 1, 32),
    (2, 15, 64),
    (7, 16, 8),
    (8, 17, 288),
    (9, 48, 576),
    (16, 200, 40),
    (17, 16, 1536),
    (33, 17, 2080),
    (64, 48, 96),
    (65, 200, 32),
    (130, 17, 288),
    (129, 130, 64),
    (1, 200, 2304),
    (32, 31, 520),
    (130, 1, 256),
];

#[test]
fn agrees_with_the_reference() {
    let gpu = &*gpu();
    let mut random = Random(1);
    for dtype in Dtype::ALL {
        for (i, (m, n, k)) in SIZES.into_iter().enumerate() {
            let (x, values) = (rounded(&random.vec(m * k), dtype), rounded(&random.vec(n * k), dtype));
            let bias = random.vec(n);
            let bias = (i % 2 == 0).then_some(&bias[..]);
            let w = dense(n, k, &values);
            let y = product(gpu, &x, &gpu.upload_dense(&w, dtype).unwrap(), bias);
            let mut expected = vec![0.0; m * n];
            reference::matmul_dense(&x, &w, bias, &mut expected);
            // Rounding of k terms up to 1.
            assert_close(&y, &expected, 1.2e-7 * k as f32 + 1e-6, &format!("{dtype:?} m={m} {n}x{k}"));
        }
    }
}

#[test]
fn f32_takes_rows_of_any_length() {
    let gpu = &*gpu();
    let mut random = Random(2);
    for (m, n, k) in [(1, 3, 1), (9, 5, 33), (3, 9, 100)] {
        let (x, values) = (random.vec(m * k), random.vec(n * k));
        let w = dense(n, k, &values);
        let y = product(gpu, &x, &gpu.upload_dense(&w, Dtype::F32).unwrap(), None);
        let mut expected = vec![0.0; m * n];
        reference::matmul_dense(&x, &w, None, &mut expected);
        assert_close(&y, &expected, 1e-5, &format!("m={m} {n}x{k}"));
    }
}

#[test]
fn a_row_is_the_same_bit_for_bit_in_every_batch() {
    let gpu = &*gpu();
    let mut random = Random(3);
    for dtype in Dtype::ALL {
        for (n, k, m) in [(17, 96, 140), (130, 2304, 41)] {
            let w = gpu.upload_dense(&dense(n, k, &random.vec(n * k)), dtype).unwrap();
            let (x, bias) = (random.vec(m * k), random.vec(n));
            let all = product(gpu, &x, &w, Some(&bias));
            for rows in [1, 8, 13, 32, 33] {
                for first in [0, m - rows, random.below(m - rows)] {
                    let some = product(gpu, &x[first * k..(first + rows) * k], &w, Some(&bias));
                    let what = format!("{dtype:?} {n}x{k} rows {first}+{rows} of {m}");
                    assert_same_bits(&some, &all[first * n..(first + rows) * n], &what);
                }
            }
        }
    }
}

#[test]
fn upload_rounds_the_hosts_numbers() {
    let gpu = &*gpu();
    let (n, k) = (17, 48);
    let values = Random(4).vec(n * k);
    let hosts = [
        DenseData::F32(values.clone()),
        DenseData::F16(values.iter().map(|x| f16::from_f32(*x)).collect()),
        DenseData::Bf16(values.iter().map(|x| bf16::from_f32(*x)).collect()),
    ];
    // Products with unit vectors are the weights.
    let unit: Vec<f32> = (0..k * k).map(|i| if i / k == i % k { 1.0 } else { 0.0 }).collect();
    for host in hosts {
        let w = Dense::new(n, k, host);
        let mut row = vec![0.0; k];
        for dtype in Dtype::ALL {
            let device = gpu.upload_dense(&w, dtype).unwrap();
            let y = product(gpu, &unit, &device, None);
            for r in 0..n {
                w.dequantize_row(r, &mut row);
                let column: Vec<f32> = (0..k).map(|at| y[at * n + r]).collect();
                assert_same_bits(&column, &rounded(&row, dtype), &format!("{dtype:?} row {r}"));
            }
        }
    }
}

#[test]
fn results_are_rounded_to_their_type() {
    let gpu = &*gpu();
    let (n, k) = (17, 96);
    for own in Dtype::ALL {
        let w = gpu.upload_dense(&dense(n, k, &Random(5).vec(n * k)), own).unwrap();
        for m in [3, 20, 40] {
            let x = Random(6).vec(m * k);
            let single = product(gpu, &x, &w, None);
            for dtype in [Dtype::F16, Dtype::Bf16] {
                let rows = Scattered::dense(gpu, &x, k, own);
                let y = Scattered::room(gpu, m, n, dtype, 1, n + 1);
                gpu.matmul_dense(rows.rows(), m, &w, None, y.rows()).unwrap();
                assert_same_bits(&y.read(gpu), &rounded(&single, dtype), &format!("{own:?} {dtype:?} m={m}"));
            }
        }
    }
}

#[test]
fn what_is_no_number_stays_in_its_row() {
    let gpu = &*gpu();
    let (n, k) = (33, 168);
    for dtype in Dtype::ALL {
        let w = gpu.upload_dense(&dense(n, k, &Random(7).vec(n * k)), dtype).unwrap();
        for m in [2, 9, 40] {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut x = Random(8).vec(m * k);
                x[k + 70] = bad;
                for (i, y) in product(gpu, &x, &w, None).iter().enumerate() {
                    assert_eq!(y.is_finite(), i / n != 1, "{dtype:?} m={m} {bad}: output {i} is {y}");
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "must be multiples of 8")]
fn refuses_16_bit_rows_that_are_not_aligned() {
    let gpu = &*gpu();
    let w = gpu.upload_dense(&dense(16, 32, &[0.0; 16 * 32]), Dtype::F16).unwrap();
    let x = Scattered::new(gpu, &[0.0; 32], 32, Dtype::F16, 4, 32);
    let y = Scattered::room(gpu, 1, 16, Dtype::F32, 0, 16);
    gpu.matmul_dense(x.rows(), 1, &w, None, y.rows()).unwrap();
}

#[test]
#[should_panic(expected = "x is F32, the weights are Bf16")]
fn refuses_rows_of_another_type() {
    let gpu = &*gpu();
    let w = gpu.upload_dense(&dense(16, 32, &[0.0; 16 * 32]), Dtype::Bf16).unwrap();
    let x = Scattered::dense(gpu, &[0.0; 32], 32, Dtype::F32);
    let y = Scattered::room(gpu, 1, 16, Dtype::F32, 0, 16);
    gpu.matmul_dense(x.rows(), 1, &w, None, y.rows()).unwrap();
}
