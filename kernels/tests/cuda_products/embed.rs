//! Rows of every layout, picked on the device.

use crate::common::{KINDS, packed};
use crate::device::rounded;
use crate::device::{gpu, upload_u32};
use crate::numbers::{Random, assert_same_bits};
use crate::packed::every_kind;
use crate::scattered::Scattered;
use obol_kernels::cuda::{DevicePick, DeviceTable, Dtype, Gpu};
use obol_kernels::{Bits, Cpu, Dense, DenseData};

fn picked(gpu: &Gpu, table: DeviceTable<'_>, k: usize, of: &[u32], factor: f32) -> Vec<f32> {
    let out = Scattered::room(gpu, of.len(), k, Dtype::F32, 2, k + 1);
    // One more in front, which is not asked for.
    let buffer = upload_u32(gpu, &[&[7], of].concat());
    let pick = DevicePick { table, indices: &buffer, start: 1 };
    gpu.embed(pick, factor, None, of.len(), out.rows()).unwrap();
    out.read(gpu)
}

const ROWS: [u32; 7] = [0, 36, 7, 8, 15, 16, 8];

#[test]
fn packed_rows_are_those_of_the_host() {
    let gpu = &*gpu();
    for k in [96, 512] {
        for (name, w) in every_kind(37, k, 5) {
            let device = gpu.upload_packed(&w).unwrap();
            for factor in [1.0, 22.627_417] {
                let rows = picked(gpu, DeviceTable::Packed(&device), k, &ROWS, factor);
                let mut expected = vec![0.0; k];
                for (row, got) in ROWS.iter().zip(rows.chunks_exact(k)) {
                    w.dequantize_row(*row as usize, &mut expected);
                    expected.iter_mut().for_each(|x| *x *= factor);
                    assert_same_bits(got, &expected, &format!("{name} k={k} row {row}"));
                }
            }
        }
    }
}

#[test]
fn dense_rows_are_those_of_the_host() {
    let gpu = &*gpu();
    for (dtype, k) in [(Dtype::F32, 33), (Dtype::F16, 72), (Dtype::Bf16, 72)] {
        let values = rounded(&Random(1).vec(37 * k), dtype);
        let device = gpu.upload_dense(&Dense::new(37, k, DenseData::F32(values.clone())), dtype).unwrap();
        let rows = picked(gpu, DeviceTable::Dense(&device), k, &ROWS, 1.0);
        for (row, got) in ROWS.iter().zip(rows.chunks_exact(k)) {
            assert_same_bits(got, &values[*row as usize * k..][..k], &format!("{dtype:?} row {row}"));
        }
    }
}

#[test]
fn positions_are_added() {
    let gpu = &*gpu();
    let (k, cpu) = (64, Cpu::new(1));
    let tokens = packed(&cpu, 37, k, Bits::Four, KINDS[0], 1);
    let positions = Dense::new(10, k, DenseData::F32(Random(2).vec(10 * k)));
    let (token_table, position_table) =
        (gpu.upload_packed(&tokens).unwrap(), gpu.upload_dense(&positions, Dtype::F32).unwrap());
    let (ids, places) = ([3, 36, 3], [9, 0, 1]);
    let (id_buffer, place_buffer) = (upload_u32(gpu, &ids), upload_u32(gpu, &places));
    let out = Scattered::room(gpu, 3, k, Dtype::F32, 0, k);
    let pick = DevicePick { table: DeviceTable::Packed(&token_table), indices: &id_buffer, start: 0 };
    let learned = DevicePick { table: DeviceTable::Dense(&position_table), indices: &place_buffer, start: 0 };
    gpu.embed(pick, 2.0, Some(learned), 3, out.rows()).unwrap();
    let (mut token, mut position) = (vec![0.0; k], vec![0.0; k]);
    for (row, got) in out.read(gpu).chunks_exact(k).enumerate() {
        tokens.dequantize_row(ids[row] as usize, &mut token);
        positions.dequantize_row(places[row] as usize, &mut position);
        let expected: Vec<f32> = token.iter().zip(&position).map(|(t, p)| 2.0 * t + p).collect();
        assert_same_bits(got, &expected, &format!("row {row}"));
    }
}

#[test]
fn a_row_that_is_not_there_is_no_number() {
    let gpu = &*gpu();
    let w = gpu.upload_packed(&packed(&Cpu::new(1), 37, 32, Bits::Eight, KINDS[1], 1)).unwrap();
    let rows = picked(gpu, DeviceTable::Packed(&w), 32, &[36, 37, u32::MAX, 0], 1.0);
    for (i, x) in rows.iter().enumerate() {
        assert_eq!(x.is_nan(), (32..96).contains(&i), "element {i}");
    }
}

#[test]
#[should_panic(expected = "2 indices, need 3")]
fn refuses_too_few_indices() {
    let gpu = &*gpu();
    let w = gpu.upload_packed(&packed(&Cpu::new(1), 37, 32, Bits::Eight, KINDS[1], 1)).unwrap();
    let (ids, out) = (upload_u32(gpu, &[1, 2]), Scattered::room(gpu, 3, 32, Dtype::F32, 0, 32));
    let pick = DevicePick { table: DeviceTable::Packed(&w), indices: &ids, start: 0 };
    gpu.embed(pick, 1.0, None, 3, out.rows()).unwrap();
}
