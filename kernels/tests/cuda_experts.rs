//! A mixture's routing on a device against its definition.

mod device;
mod numbers;

use device::{download, download_u32, gpu, round, rounded, upload};
use numbers::{Random, assert_close, assert_same_bits};
use obol_kernels::cuda::{DeviceRows, Dtype, ExpertChoice};

/// A row's experts, ascending, with their weights.
fn choose(logits: &[f32], choice: ExpertChoice) -> Vec<(u32, f64)> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = logits.iter().map(|logit| f64::from(logit - largest).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
    order.truncate(choice.used);
    order.sort_unstable();
    let kept: f64 = order.iter().map(|expert| weights[*expert as usize] / total).sum();
    let divisor = if choice.normalized { kept } else { 1.0 };
    order.iter().map(|expert| (*expert, weights[*expert as usize] / total / divisor)).collect()
}

fn check(rows: usize, choice: ExpertChoice, dtype: Dtype, logits: &[f32]) {
    let gpu = gpu();
    let ExpertChoice { count, used, .. } = choice;
    let what = format!("{rows} rows, {choice:?}, {}", dtype.name());
    let routing = gpu.routing(rows + 3, choice).expect("memory");
    let buffer = upload(&gpu, logits, dtype);
    gpu.route(&routing, DeviceRows::new(&buffer, dtype, count), rows).expect("launched");
    let experts = &download_u32(&gpu, routing.experts())[..rows * used];
    let weights = &download(&gpu, routing.weights(), Dtype::F32)[..rows * used];
    let expected: Vec<(u32, f64)> = logits.chunks(count).flat_map(|row| choose(row, choice)).collect();
    assert_eq!(experts, expected.iter().map(|choice| choice.0).collect::<Vec<_>>(), "{what}");
    let of_weights: Vec<f32> = expected.iter().map(|choice| choice.1 as f32).collect();
    assert_close(weights, &of_weights, 1e-6, &what);

    let mut sorted: Vec<(u32, usize)> =
        experts.iter().enumerate().map(|(at, expert)| (*expert, at / used)).collect();
    sorted.sort_unstable();
    let rows_of = &download_u32(&gpu, routing.rows_of())[..rows * used];
    assert_eq!(rows_of, sorted.iter().map(|choice| choice.1 as u32).collect::<Vec<_>>(), "{what}");
    let ends: Vec<u32> = (0..count as u32)
        .map(|expert| sorted.iter().filter(|choice| choice.0 <= expert).count() as u32)
        .collect();
    assert_eq!(download_u32(&gpu, routing.ends()), ends, "{what}");

    // What an expert gives is a function of the expert and the row.
    for width in [1, 33] {
        let output = |(expert, row): &(u32, usize), i: usize| {
            round(((*expert as usize * 37 + row * 11 + i * 5) % 101) as f32 / 32.0 - 1.0, dtype)
        };
        let y: Vec<f32> =
            sorted.iter().flat_map(|choice| (0..width).map(move |i| output(choice, i))).collect();
        let (y, out) = (upload(&gpu, &y, dtype), gpu.allocate(rows * width * dtype.bytes()).expect("memory"));
        let [from, to] = [&y, &out].map(|buffer| DeviceRows::new(buffer, dtype, width));
        gpu.combine_experts(&routing, from, rows, width, to).expect("launched");
        let mut expected = vec![0f32; rows * width];
        for (at, (expert, weight)) in experts.iter().zip(weights).enumerate() {
            for i in 0..width {
                expected[at / used * width + i] += weight * output(&(*expert, at / used), i);
            }
        }
        let expected = rounded(&expected, dtype);
        assert_same_bits(&download(&gpu, &out, dtype), &expected, &what);
    }
}

#[test]
fn rows_take_their_experts_in_ascending_order() {
    let mut random = Random(21);
    for (at, (rows, count, used)) in
        [(1, 1, 1), (2, 4, 2), (33, 8, 2), (300, 60, 4), (5, 128, 8), (3, 33, 32), (2, 2048, 6)]
            .into_iter()
            .enumerate()
    {
        let dtype = Dtype::ALL[at % 3];
        let logits: Vec<f32> =
            rounded(&random.vec(rows * count), dtype).iter().map(|x| round(x * 8.0, dtype)).collect();
        for normalized in [false, true] {
            check(rows, ExpertChoice { count, used, normalized }, dtype, &logits);
        }
    }
}

#[test]
fn ties_go_to_the_first() {
    for used in 1..=4 {
        let choice = ExpertChoice { count: 4, used, normalized: true };
        check(2, choice, Dtype::F32, &[0.0, 0.0, 0.0, 0.0, -1.0, 5.0, 5.0, 2.0]);
    }
}

#[test]
fn rows_whose_logits_are_no_numbers_take_experts_that_exist() {
    let gpu = gpu();
    let routing = gpu.routing(2, ExpertChoice { count: 3, used: 2, normalized: false }).expect("memory");
    let logits = upload(&gpu, &[f32::NAN, f32::NAN, f32::NAN, 1.0, f32::NAN, 2.0], Dtype::F32);
    gpu.route(&routing, DeviceRows::new(&logits, Dtype::F32, 3), 2).expect("launched");
    assert_eq!(download_u32(&gpu, routing.experts()), [0, 1, 0, 2]);
    assert_eq!(download_u32(&gpu, routing.rows_of()), [0, 1, 0, 1]);
    assert_eq!(download_u32(&gpu, routing.ends()), [2, 3, 4]);
}
