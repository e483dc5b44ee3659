//! One launch for all experts gives each row what its expert's matrix alone gives it.

use crate::device::{gpu, upload, upload_u32};
use crate::numbers::{Random, assert_same_bits};
use crate::scattered::Scattered;
use crate::{dense, packed};
use obol_kernels::cuda::{DeviceActivations, Dtype};

const EXPERTS: usize = 5;

/// Where experts' rows end, of so many rows: few and many, none, inside tiles, and rows of nobody at the end.
const ENDS: [(usize, [u32; EXPERTS]); 5] = [
    (1, [0, 0, 1, 1, 1]),
    (7, [3, 3, 4, 6, 7]),
    (30, [0, 11, 12, 12, 29]),
    (100, [5, 5, 38, 99, 100]),
    (250, [1, 2, 140, 141, 245]),
];

/// What each row's expert alone makes of it: (rows, n), NaN where a row has none.
fn expected(
    rows: usize,
    n: usize,
    ends: [u32; EXPERTS],
    product: impl Fn(usize, usize, usize) -> Vec<f32>,
) -> Vec<f32> {
    let mut out = vec![f32::NAN; rows * n];
    let mut start = 0;
    for (expert, end) in ends.into_iter().enumerate() {
        let end = end as usize;
        if start < end {
            out[start * n..end * n].copy_from_slice(&product(expert, start, end));
        }
        start = end;
    }
    out
}

#[test]
fn packed_experts_are_as_each_alone() {
    let gpu = &*gpu();
    let mut random = Random(1);
    for (n, k) in [(17, 96), (40, 256)] {
        let kinds: Vec<_> = (0..EXPERTS).map(|_| packed::every_kind(n, k, random.next())).collect();
        for kind in 0..kinds[0].len() {
            let matrices: Vec<_> = kinds.iter().map(|all| &all[kind].1).collect();
            let all = gpu.upload_packed_experts(&matrices).unwrap();
            let each: Vec<_> = matrices.iter().map(|w| gpu.upload_packed(w).unwrap()).collect();
            let biases = random.vec(EXPERTS * n);
            let bias = (kind % 2 == 0).then(|| upload(gpu, &biases, Dtype::F32));
            for (rows, ends) in ENDS {
                let x = random.vec(rows * k);
                let from = Scattered::dense(gpu, &x, k, Dtype::F32);
                let mut a = DeviceActivations::new(gpu, rows, k).unwrap();
                gpu.quantize(from.rows(), rows, k, &mut a).unwrap();
                let y = Scattered::room(gpu, rows, n, Dtype::F32, 0, n + 1);
                gpu.matmul_packed_experts(&a, rows, &upload_u32(gpu, &ends), &all, bias.as_ref(), y.rows())
                    .unwrap();
                let expected = expected(rows, n, ends, |expert, start, end| {
                    let bias = bias.is_some().then(|| &biases[expert * n..][..n]);
                    packed::product(gpu, &x[start * k..end * k], &each[expert], bias)
                });
                assert_same_bits(
                    &y.read(gpu),
                    &expected,
                    &format!("{} {n}x{k} {rows} rows", kinds[0][kind].0),
                );
            }
        }
    }
}

#[test]
fn dense_experts_are_as_each_alone() {
    let gpu = &*gpu();
    let mut random = Random(2);
    let (n, k) = (17, 96);
    for dtype in Dtype::ALL {
        let matrices: Vec<_> = (0..EXPERTS).map(|_| dense::dense(n, k, &random.vec(n * k))).collect();
        let all = gpu.upload_dense_experts(&matrices.iter().collect::<Vec<_>>(), dtype).unwrap();
        let each: Vec<_> = matrices.iter().map(|w| gpu.upload_dense(w, dtype).unwrap()).collect();
        let biases = random.vec(EXPERTS * n);
        let bias = upload(gpu, &biases, Dtype::F32);
        for (rows, ends) in ENDS {
            let x = random.vec(rows * k);
            let from = Scattered::dense(gpu, &x, k, dtype);
            let y = Scattered::room(gpu, rows, n, Dtype::F32, 0, n);
            gpu.matmul_dense_experts(from.rows(), rows, &upload_u32(gpu, &ends), &all, Some(&bias), y.rows())
                .unwrap();
            let expected = expected(rows, n, ends, |expert, start, end| {
                dense::product(gpu, &x[start * k..end * k], &each[expert], Some(&biases[expert * n..][..n]))
            });
            assert_same_bits(&y.read(gpu), &expected, &format!("{dtype:?} {rows} rows"));
        }
    }
}

#[test]
#[should_panic(expected = "the weights are of 2 experts")]
fn experts_need_ends() {
    let gpu = &*gpu();
    let w = dense::dense(16, 32, &[0.0; 16 * 32]);
    let w = gpu.upload_dense_experts(&[&w, &w], Dtype::F32).unwrap();
    let x = Scattered::dense(gpu, &[0.0; 32], 32, Dtype::F32);
    let y = Scattered::room(gpu, 1, 16, Dtype::F32, 0, 16);
    gpu.matmul_dense(x.rows(), 1, &w, None, y.rows()).unwrap();
}
