//! Quantising on the device gives the CPU's bits.

use crate::device::gpu;
use crate::device::rounded;
use crate::numbers::Random;
use crate::scattered::Scattered;
use obol_kernels::cuda::{DeviceActivations, Dtype, HostActivations};
use obol_kernels::{Activations, Cpu, GROUP};

/// As the CPU quantises.
fn expected(x: &[f32], k: usize) -> HostActivations {
    let mut a = Activations::new();
    Cpu::new(1).quantize(x, k, &mut a);
    let mut out = HostActivations::default();
    for row in 0..x.len() / k {
        for group in 0..k / GROUP {
            let (q, scale) = a.group(row, group);
            let half = |q: &[i8]| q.iter().map(|q| i32::from(*q)).sum::<i32>();
            let (first, last) = (half(&q[..16]), half(&q[16..]));
            out.q.extend(q);
            out.scales.push(scale);
            out.sums.push(scale * (first + last) as f32);
            out.half_sums.extend([scale * first as f32, scale * last as f32]);
        }
    }
    out
}

#[test]
fn gives_the_bits_of_the_cpu() {
    let gpu = &*gpu();
    let mut random = Random(1);
    for dtype in Dtype::ALL {
        for (m, k) in [(1, 32), (2, 64), (7, 96), (9, 288), (33, 576), (3, 2080)] {
            let mut x = random.vec(m * k);
            // A group of zeros, one too small to be scaled, one with ties.
            x[..32].fill(0.0);
            if m > 1 {
                x[k..k + 32].fill(1e-40);
                x[k + 5] = -3e-39;
            }
            if m > 2 {
                (0..32).for_each(|i| x[2 * k + i] = if i == 0 { 127.0 } else { i as f32 + 0.5 });
            }
            let x = rounded(&x, dtype);
            let expected = expected(&x, k);
            // Aligned, and not.
            for (start, stride) in [(0, k), (3, k + 5)] {
                let rows = Scattered::new(gpu, &x, k, dtype, start, stride);
                let mut a = DeviceActivations::new(gpu, m, k).unwrap();
                gpu.quantize(rows.rows(), m, k, &mut a).unwrap();
                assert_eq!((a.rows(), a.k()), (m, k));
                let got = a.download(gpu).unwrap();
                assert_eq!(got, expected, "{dtype:?} ({m}, {k}) from {start} at a distance of {stride}");
            }
        }
    }
}

#[test]
fn room_serves_other_shapes() {
    let gpu = &*gpu();
    let mut random = Random(2);
    let mut a = DeviceActivations::new(gpu, 8, 576).unwrap();
    for (m, k) in [(8, 576), (1, 32), (64, 64), (3, 96)] {
        let x = random.vec(m * k);
        let rows = Scattered::dense(gpu, &x, k, Dtype::F32);
        gpu.quantize(rows.rows(), m, k, &mut a).unwrap();
        assert_eq!(a.download(gpu).unwrap(), expected(&x, k), "({m}, {k})");
    }
}

#[test]
fn what_is_no_number_shows() {
    let gpu = &*gpu();
    let k = 96;
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = Random(3).vec(2 * k);
        x[k + 40] = bad;
        let rows = Scattered::dense(gpu, &x, k, Dtype::F32);
        let mut a = DeviceActivations::new(gpu, 2, k).unwrap();
        gpu.quantize(rows.rows(), 2, k, &mut a).unwrap();
        let got = a.download(gpu).unwrap();
        for (group, scale) in got.scales.iter().enumerate() {
            assert_eq!(scale.is_nan(), group == 4, "group {group} of {bad}");
            assert_eq!(got.sums[group].is_nan(), group == 4, "group {group} of {bad}");
        }
    }
}

#[test]
#[should_panic(expected = "k = 48 is no multiple of 32")]
fn refuses_part_of_a_group() {
    let gpu = &*gpu();
    let rows = Scattered::dense(gpu, &[0.0; 48], 48, Dtype::F32);
    let mut a = DeviceActivations::new(gpu, 1, 64).unwrap();
    gpu.quantize(rows.rows(), 1, 48, &mut a).unwrap();
}

#[test]
#[should_panic(expected = "no room for (9, 64)")]
fn refuses_more_than_there_is_room_for() {
    let gpu = &*gpu();
    let rows = Scattered::dense(gpu, &[0.0; 9 * 64], 64, Dtype::F32);
    let mut a = DeviceActivations::new(gpu, 8, 64).unwrap();
    gpu.quantize(rows.rows(), 9, 64, &mut a).unwrap();
}
