//! Operations on single rows on a device, against the reference, and the law of rows.

mod device;
mod numbers;

use device::{download, download_u32, epsilon, gpu, round, rounded, upload, upload_u32};
use numbers::{Random, assert_close, assert_same_bits};
use obol_kernels::cuda::{Buffer, DeviceNorm, DeviceRows, Dtype, Feeds, Gpu, NormKind, RECORD_BYTES};
use obol_kernels::{Act, Rows, reference};

/// (rows, width) where rows share a block, fill it, and are longer than what a block keeps.
const SIZES: [(usize, usize); 12] = [
    (1, 1),
    (2, 31),
    (33, 32),
    (300, 33),
    (2, 64),
    (33, 576),
    (1, 896),
    (2, 2049),
    (2, 4096),
    (33, 4097),
    (1, 8193),
    (2, 16_500),
];

/// `row` alone, at another distance from 16 bytes.
fn moved(gpu: &Gpu, x: &[f32], row: usize, width: usize, dtype: Dtype) -> Buffer {
    upload(gpu, &[&[7.0], &x[row * width..][..width]].concat(), dtype)
}

fn after_one(buffer: &Buffer, dtype: Dtype, width: usize) -> DeviceRows<'_> {
    DeviceRows { start: 1, ..DeviceRows::new(buffer, dtype, width) }
}

fn expect(kind: NormKind, x: &[f32], weight: &[f32], bias: Option<&[f32]>, out: &mut [f32]) {
    match kind {
        NormKind::Rms => reference::rms_norm(x, weight, 1e-5, out),
        NormKind::Layer => reference::layer_norm(x, weight, bias, 1e-5, out),
    }
}

#[test]
fn norms_agree_with_the_reference_and_row_by_row() {
    let gpu = gpu();
    let mut random = Random(1);
    for (at, (rows, width)) in SIZES.into_iter().enumerate() {
        let dtype = Dtype::ALL[at % 3];
        for (kind, with_bias) in [(NormKind::Rms, false), (NormKind::Layer, false), (NormKind::Layer, true)] {
            let what = format!("{kind:?} {rows}x{width} {}", dtype.name());
            let x: Vec<f32> = random.vec(rows * width).iter().map(|x| x + 3.0).collect();
            let delta = rounded(&random.vec(rows * width), dtype);
            let (weight, bias) = (random.vec(width), random.vec(width));
            let bias = with_bias.then_some(&bias[..]);
            let (weights, biases) =
                (upload(&gpu, &weight, Dtype::F32), bias.map(|bias| upload(&gpu, bias, Dtype::F32)));
            let norm = DeviceNorm { kind, weight: &weights, bias: biases.as_ref(), width, eps: 1e-5 };
            // A constant row has no deviation but for rounding.
            let bound = epsilon(dtype) + if width == 1 { 1e-3 } else { 2e-5 };

            let from = upload(&gpu, &x, Dtype::F32);
            let to = gpu.allocate(rows * width * dtype.bytes()).expect("memory");
            let (x_rows, out) =
                (DeviceRows::new(&from, Dtype::F32, width), DeviceRows::new(&to, dtype, width));
            gpu.norm(&norm, x_rows, rows, out).expect("launched");
            let y = download(&gpu, &to, dtype);
            let mut expected = vec![0.0; rows * width];
            expect(kind, &x, &weight, bias, &mut expected);
            assert_close(&y, &expected, bound, &what);

            let added = upload(&gpu, &delta, dtype);
            gpu.add_norm(&norm, x_rows, DeviceRows::new(&added, dtype, width), rows, out).expect("launched");
            let sums: Vec<f32> = x.iter().zip(&delta).map(|(x, delta)| x + delta).collect();
            assert_same_bits(&download(&gpu, &from, Dtype::F32), &sums, &what);
            let y_sums = download(&gpu, &to, dtype);
            expect(kind, &sums, &weight, bias, &mut expected);
            assert_close(&y_sums, &expected, bound, &what);
            // The fused norm is the plain norm of the sum.
            gpu.norm(&norm, x_rows, rows, out).expect("launched");
            assert_same_bits(&download(&gpu, &to, dtype), &y_sums, &what);

            let row = rows - 1;
            let (from, added) =
                (moved(&gpu, &x, row, width, Dtype::F32), moved(&gpu, &delta, row, width, dtype));
            let to = gpu.allocate((width + 1) * dtype.bytes()).expect("memory");
            let (x_rows, out) = (after_one(&from, Dtype::F32, width), after_one(&to, dtype, width));
            gpu.norm(&norm, x_rows, 1, out).expect("launched");
            assert_same_bits(&download(&gpu, &to, dtype)[1..], &y[row * width..], &what);
            gpu.add_norm(&norm, x_rows, after_one(&added, dtype, width), 1, out).expect("launched");
            assert_same_bits(&download(&gpu, &to, dtype)[1..], &y_sums[row * width..], &what);
        }
    }
}

#[test]
fn head_norms_leave_the_rest_of_a_row() {
    let gpu = gpu();
    let mut random = Random(2);
    for (at, (rows, heads, width, start, stride)) in
        [(5, 3, 24, 2, 100), (33, 2, 64, 64, 256), (2, 1, 576, 0, 576), (1, 4, 128, 0, 512)]
            .into_iter()
            .enumerate()
    {
        for dtype in Dtype::ALL {
            let what = format!("case {at} {}", dtype.name());
            let x = rounded(&random.vec(start + rows * stride), dtype);
            let weight = random.vec(width);
            let (buffer, weights) = (upload(&gpu, &x, dtype), upload(&gpu, &weight, Dtype::F32));
            let norm = DeviceNorm { kind: NormKind::Rms, weight: &weights, bias: None, width, eps: 1e-6 };
            gpu.norm_heads(&norm, DeviceRows { buffer: &buffer, dtype, start, stride }, rows, heads)
                .expect("launched");
            let y = download(&gpu, &buffer, dtype);
            assert_same_bits(&y[..start], &x[..start], &what);
            for row in 0..rows {
                let at = start + row * stride;
                let (heads_of_x, rest_of_x) = x[at..][..stride].split_at(heads * width);
                let (heads_of_y, rest_of_y) = y[at..][..stride].split_at(heads * width);
                let mut expected = vec![0.0; heads * width];
                reference::rms_norm(heads_of_x, &weight, 1e-6, &mut expected);
                assert_close(heads_of_y, &expected, 2.0 * epsilon(dtype) + 1e-6, &what);
                assert_same_bits(rest_of_y, rest_of_x, &what);
            }
        }
    }
}

const ACTS: [Act; 3] = [Act::Silu, Act::GeluTanh, Act::Gelu];

#[test]
fn activations_agree_with_the_reference_also_far_out() {
    let gpu = gpu();
    let mut random = Random(3);
    for (act, dtype) in ACTS.into_iter().flat_map(|act| Dtype::ALL.map(|dtype| (act, dtype))) {
        for (rows, width) in [(1, 1), (2, 33), (3, 96), (2, 1025)] {
            let what = format!("{act:?} {rows}x{width} {}", dtype.name());
            let far = |x: &f32| round(x * 20.0, dtype);
            let mut x: Vec<f32> = rounded(&random.vec(rows * 2 * width), dtype).iter().map(far).collect();
            x[0] = -200.0;
            if width > 3 {
                (x[1], x[2], x[3]) = (0.0, 200.0, -85.0);
            }
            let buffer = upload(&gpu, &x, dtype);
            let out = gpu.allocate(rows * width * dtype.bytes()).expect("memory");
            let gate = DeviceRows::new(&buffer, dtype, 2 * width);
            let up = DeviceRows { start: width, ..gate };
            gpu.act_mul(act, gate, up, rows, width, DeviceRows::new(&out, dtype, width)).expect("launched");
            let y = download(&gpu, &out, dtype);
            let mut expected = vec![0.0; rows * width];
            let (gates, ups) = (Rows::new(&x, 2 * width), Rows::new(&x[width..], 2 * width));
            reference::act_mul(act, gates, ups, width, &mut expected);
            assert_close(&y, &expected, epsilon(dtype) + 2e-6, &what);

            let part = |start: usize| -> Vec<f32> {
                x.chunks(2 * width).flat_map(|row| row[start..start + width].to_vec()).collect()
            };
            let (gates, ups) = (upload(&gpu, &part(0), dtype), upload(&gpu, &part(width), dtype));
            let [gate, up, to] = [&gates, &ups, &out].map(|buffer| DeviceRows::new(buffer, dtype, width));
            gpu.act_mul(act, gate, up, rows, width, to).expect("launched");
            assert_same_bits(&download(&gpu, &out, dtype), &y, "gate and up apart");

            gpu.act(act, gate, rows, width).expect("launched");
            let expected: Vec<f32> =
                part(0).iter().map(|x| reference::act(act, f64::from(*x)) as f32).collect();
            assert_close(&download(&gpu, &gates, dtype), &expected, epsilon(dtype) + 2e-6, &what);
        }
    }
}

#[test]
fn elements_are_added_cast_scaled_and_capped() {
    let gpu = gpu();
    let mut random = Random(4);
    for dtype in Dtype::ALL {
        for (rows, width) in [(1, 1), (3, 33), (2, 576), (33, 40)] {
            let what = format!("{rows}x{width} {}", dtype.name());
            let (x, delta) = (random.vec(rows * width), rounded(&random.vec(rows * width), dtype));
            let sums: Vec<f32> = x.iter().zip(&delta).map(|(x, delta)| x + delta).collect();
            let cast = |x: &[f32]| rounded(x, dtype);
            let (a, b) = (upload(&gpu, &x, Dtype::F32), upload(&gpu, &delta, dtype));
            let out = gpu.allocate(rows * width * dtype.bytes()).expect("memory");
            let a_rows = DeviceRows::new(&a, Dtype::F32, width);
            let [b_rows, to] = [&b, &out].map(|buffer| DeviceRows::new(buffer, dtype, width));
            gpu.cast(a_rows, rows, width, to).expect("launched");
            assert_same_bits(&download(&gpu, &out, dtype), &cast(&x), &what);
            gpu.add(a_rows, b_rows, rows, width).expect("launched");
            assert_same_bits(&download(&gpu, &a, Dtype::F32), &sums, &what);
            let a = upload(&gpu, &x, Dtype::F32);
            let a_rows = DeviceRows::new(&a, Dtype::F32, width);
            gpu.add_cast(a_rows, b_rows, rows, width, to).expect("launched");
            assert_same_bits(&download(&gpu, &a, Dtype::F32), &sums, &what);
            assert_same_bits(&download(&gpu, &out, dtype), &cast(&sums), &what);

            gpu.scale(b_rows, rows, width, 0.3).expect("launched");
            let scaled: Vec<f32> = delta.iter().map(|x| x * 0.3).collect();
            assert_same_bits(&download(&gpu, &b, dtype), &cast(&scaled), &what);
            gpu.softcap(a_rows, rows, width, 0.7).expect("launched");
            let mut capped = sums.clone();
            reference::softcap(&mut capped, 0.7);
            assert_close(&download(&gpu, &a, Dtype::F32), &capped, 1e-6, &what);
        }
    }
}

#[test]
fn an_element_of_a_wider_row_is_left_alone() {
    let gpu = gpu();
    let x: Vec<f32> = (0..40).map(|i| i as f32).collect();
    let buffer = upload(&gpu, &x, Dtype::F16);
    // Two rows of 7 at a distance of 16, from 3 on.
    gpu.scale(DeviceRows { buffer: &buffer, dtype: Dtype::F16, start: 3, stride: 16 }, 2, 7, -1.0)
        .expect("launched");
    let expected: Vec<f32> = (0..40)
        .map(|i| if (3..10).contains(&i) || (19..26).contains(&i) { -(i as f32) } else { i as f32 })
        .collect();
    assert_same_bits(&download(&gpu, &buffer, Dtype::F16), &expected, "two rows in wider ones");
}

#[test]
fn rows_are_gathered_and_what_is_not_there_is_zero() {
    let gpu = gpu();
    let mut random = Random(5);
    for dtype in Dtype::ALL {
        for width in [1, 8, 33, 576] {
            let (rows, list) = (9, [8u32, 0, 0, u32::MAX, 3, 9]);
            let x = rounded(&random.vec(rows * width), dtype);
            let (from, indices) = (upload(&gpu, &x, dtype), upload_u32(&gpu, &list));
            let out = gpu.allocate(list.len() * width * dtype.bytes()).expect("memory");
            let [x_rows, to] = [&from, &out].map(|buffer| DeviceRows::new(buffer, dtype, width));
            gpu.gather_rows(x_rows, rows, &indices, list.len(), width, to).expect("launched");
            let expected: Vec<f32> = list
                .iter()
                .flat_map(|row| match x.chunks(width).nth(*row as usize) {
                    Some(row) => row.to_vec(),
                    None => vec![0.0; width],
                })
                .collect();
            assert_same_bits(&download(&gpu, &out, dtype), &expected, &format!("{width} {}", dtype.name()));
        }
    }
}

#[test]
fn drawn_tokens_are_fed_to_rows() {
    let gpu = gpu();
    let words = RECORD_BYTES / 4;
    let mut records = vec![77u32; 3 * words];
    (records[0], records[words], records[2 * words]) = (40, 41, u32::MAX);
    let list = [[0, 1], [3, 0], [u32::MAX, 0], [2, 3], [9, 1], [1, 2]].concat();
    let (records, list) = (upload_u32(&gpu, &records), upload_u32(&gpu, &list));
    let tokens = upload_u32(&gpu, &[10, 11, 12, 13]);
    let feeds = Feeds { list: &list, many: 6, tokens: &tokens, rows: 4, records: &records, draws: 3 };
    gpu.feed(feeds).expect("launched");
    assert_eq!(download_u32(&gpu, &tokens), [41, 0, 12, 40]);
}

#[test]
fn no_rows_are_no_work() {
    let gpu = gpu();
    let buffer = upload(&gpu, &[1.0, 2.0], Dtype::F32);
    let rows = DeviceRows::new(&buffer, Dtype::F32, 2);
    let norm = DeviceNorm { kind: NormKind::Rms, weight: &buffer, bias: None, width: 2, eps: 0.0 };
    gpu.norm(&norm, rows, 0, rows).expect("nothing is launched");
    gpu.scale(rows, 0, 2, 5.0).expect("nothing is launched");
    assert_same_bits(&download(&gpu, &buffer, Dtype::F32), &[1.0, 2.0], "no rows");
}
