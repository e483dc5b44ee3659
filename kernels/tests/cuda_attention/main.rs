//! The KV cache, rope and paged attention on a CUDA device, or one emulated, against the reference; and bit for bit
//! the same in every batch.

#[path = "../device/mod.rs"]
mod device;
#[path = "../numbers/mod.rs"]
mod numbers;
mod world;

use device::{bytes_of, download, rounded, upload};
use numbers::{Random, assert_same_bits};
use obol_kernels::cuda::{
    AttentionLimits, AttentionWorkspace, DecodeBucket, DeviceKv, DeviceQkv, DeviceRope, DeviceRows, Dtype,
    Gpu, GpuError,
};
use obol_kernels::{KvDtype, KvLayer, KvShape, RopeScaling, RopeStyle, RopeTable, Rows, Span, reference};
use world::{Batch, Case, Piece, SMOL, World, open, values};

fn check(seed: u64, case: Case, lengths: &[(usize, usize)]) {
    let gpu = open();
    let world = World::new(&gpu, seed, case, lengths);
    world.check();
    world.check_invariance();
}

const HALVES: [Dtype; 2] = [Dtype::F16, Dtype::Bf16];

#[test]
fn decodes_contexts_around_the_tiles_and_parts() {
    let lengths = [1, 15, 16, 17, 31, 32, 33, 255, 256, 257, 300, 600].map(|length| (length, 1));
    for dtype in Dtype::ALL {
        check(1, SMOL.kv(dtype, KvDtype::F16), &lengths);
    }
}

#[test]
fn prefills_and_decodes_in_one_batch() {
    for (dtype, kv) in [(Dtype::F16, KvDtype::F16), (Dtype::Bf16, KvDtype::Bf16), (Dtype::F32, KvDtype::F32)]
    {
        check(2, SMOL.kv(dtype, kv), &[(40, 40), (300, 1), (530, 37), (1, 1), (17, 17), (290, 50)]);
    }
}

#[test]
fn takes_groups_of_any_size() {
    for (kv_heads, heads) in [(2, 2), (1, 3), (2, 8), (1, 8), (1, 20)] {
        let shape = KvShape { kv_heads, ..SMOL.shape };
        check(3, Case { heads, shape, ..SMOL }, &[(270, 9), (20, 20), (33, 1), (600, 1)]);
    }
}

#[test]
fn takes_every_head_size_block_size_and_type() {
    for (i, head_dim) in [64, 80, 96, 128, 256, 34].into_iter().enumerate() {
        for (j, kv) in [KvDtype::F16, KvDtype::Bf16, KvDtype::Int8].into_iter().enumerate() {
            for dtype in HALVES {
                let block_size = if (i + j) % 2 == 0 { 16 } else { 32 };
                let shape = KvShape { kv_heads: 1, head_dim, block_size, dtype: kv };
                check(4, Case { dtype, shape, ..SMOL }, &[(258, 2), (18, 18), (40, 1)]);
            }
        }
    }
}

#[test]
fn takes_a_cache_of_f32_with_halves() {
    for dtype in HALVES {
        let case = SMOL.kv(dtype, KvDtype::F32);
        check(4, case, &[(40, 3), (18, 18)]);
    }
}

#[test]
fn takes_f32_with_every_type_of_cache() {
    for kv in KvDtype::ALL {
        for head_dim in [64, 80, 256, 6] {
            let shape = KvShape { kv_heads: 1, head_dim, block_size: 48, dtype: kv };
            let case = Case { dtype: Dtype::F32, shape, heads: 5, window: Some(70), softcap: Some(2.0) };
            check(5, case, &[(100, 3), (18, 18)]);
        }
    }
}

#[test]
fn a_window_hides_what_is_older() {
    for window in [1, 17, 256, 300] {
        let case = Case { window: Some(window), ..SMOL };
        check(6, case, &[(530, 24), (300, 1), (20, 20), (513, 3)]);
    }
    for kv in [KvDtype::Bf16, KvDtype::Int8] {
        let case = Case { window: Some(40), ..SMOL.kv(Dtype::Bf16, kv) };
        check(6, case, &[(290, 40), (300, 1), (20, 20)]);
    }
}

#[test]
fn scores_are_capped() {
    for (dtype, kv) in [(Dtype::F16, KvDtype::F16), (Dtype::Bf16, KvDtype::Int8), (Dtype::F32, KvDtype::F32)]
    {
        let case = Case { softcap: Some(1.5), ..SMOL.kv(dtype, kv) };
        check(7, case, &[(100, 10), (300, 1)]);
    }
}

#[test]
fn the_cache_holds_what_the_reference_holds() {
    let gpu = open();
    for dtype in Dtype::ALL {
        for kv in KvDtype::ALL {
            for (head_dim, block_size) in [(64, 16), (80, 32), (256, 16), (6, 48)] {
                let shape = KvShape { kv_heads: 3, head_dim, block_size, dtype: kv };
                let case = Case { dtype, shape, heads: 3, ..SMOL };
                let world = World::new(&gpu, 8, case, &[(block_size + 5, 1), (3, 1)]);
                for block in 0..world.kv.blocks() {
                    for (head, slot) in [(0, 0), (1, 2), (2, 3), (0, block_size - 1)] {
                        let (k, v) = world.kv.read(&gpu, 1, block, head, slot).unwrap();
                        let (k_expected, v_expected) = world.layer.read(block, head, slot);
                        let what = format!("{} block {block} head {head} slot {slot}", case.name());
                        assert_same_bits(&k, &k_expected, &what);
                        assert_same_bits(&v, &v_expected, &what);
                    }
                }
                assert_eq!(
                    world.kv.bytes(),
                    2 * world.kv.blocks() * block_size * DeviceKv::token_bytes(shape)
                );
            }
        }
    }
}

/// Rotates and writes rows of fused products: bit for bit the reference, which rounds where the kernel does.
fn check_rope(gpu: &Gpu, dtype: Dtype, style: RopeStyle, rotary_dim: usize, head_dim: usize) {
    let mut random = Random(10);
    let (heads, kv_heads, rows) = (5, 2, 7);
    let shape = KvShape { kv_heads, head_dim, block_size: 16, dtype: KvDtype::F32 };
    let (q_width, width) = (heads * head_dim, kv_heads * head_dim);
    let stride = q_width + 2 * width + 4;
    let mut data = values(&mut random, dtype, rows * stride, 2.0);
    // Two sequences, and rows of none.
    let spans = [Span { rows: 0..3, table: 0..2 }, Span { rows: 5..6, table: 2..5 }];
    let (positions, tables) = ([14, 15, 16, 0, 1, 40, 3], [3, 1, 0, 4, 2]);
    let limits = AttentionLimits {
        rows,
        spans: 2,
        table_entries: 5,
        context: 48,
        group: 1,
        blocks: 5,
        block_size: 16,
        partials: 0,
    };
    let mut batch = Batch::new(gpu, limits);
    let planned = batch.plan.plan(&spans, &positions, &tables);
    batch.send(gpu);
    let mut table = RopeTable::new(rotary_dim, 1e4, &RopeScaling::Linear(1.5));
    let rope = DeviceRope::new(gpu, &table, style, 48).unwrap();
    let kv = DeviceKv::new(gpu, shape, 1, 5).unwrap();
    let buffer = upload(gpu, &data, dtype);
    let part = |start| DeviceRows { buffer: &buffer, dtype, start, stride };
    let qkv = DeviceQkv { heads, q: part(0), k: part(q_width), v: part(q_width + width) };
    gpu.rope_kv_write(qkv, Some(&rope), (&kv, 0), &batch.device, planned).unwrap();
    let got = download(gpu, &buffer, dtype);

    let given = data.clone();
    table.turn_to(&positions);
    reference::rope(&mut data, stride, heads + kv_heads, head_dim, &table, style);
    let mut layer = KvLayer::new(shape, 5);
    let (k, v) = (Rows::new(&data[q_width..], stride), Rows::new(&data[q_width + width..], stride));
    reference::kv_write(&mut layer, k, v, &spans, &positions, &tables);
    let what = format!("{} {style:?} {rotary_dim} of {head_dim}", dtype.name());
    for row in 0..rows {
        let is_covered = spans.iter().any(|span| span.rows.contains(&row));
        let from = if is_covered { &data } else { &given };
        let q = rounded(&from[row * stride..][..q_width], dtype);
        assert_same_bits(&got[row * stride..][..q_width], &q, &format!("{what}: q of row {row}"));
        let rest = row * stride + q_width..(row + 1) * stride;
        assert_same_bits(&got[rest.clone()], &given[rest], &format!("{what}: beside q of row {row}"));
    }
    for (block, slot) in [(3, 14), (3, 15), (1, 0), (2, 8)] {
        for head in 0..kv_heads {
            let (k, v) = kv.read(gpu, 0, block, head, slot).unwrap();
            let (k_expected, v_expected) = layer.read(block, head, slot);
            assert_same_bits(&k, &k_expected, &format!("{what}: k in block {block}"));
            assert_same_bits(&v, &v_expected, &format!("{what}: v in block {block}"));
        }
    }
}

#[test]
fn rope_turns_q_and_k_as_the_reference_does() {
    let gpu = open();
    for dtype in Dtype::ALL {
        for style in [RopeStyle::Halves, RopeStyle::Interleaved] {
            for (rotary_dim, head_dim) in [(64, 64), (32, 80), (128, 128), (256, 256), (2, 6)] {
                check_rope(&gpu, dtype, style, rotary_dim, head_dim);
            }
        }
    }
}

/// A graph of one bucket's shape, launched for several batches, of which none fills it.
#[test]
fn a_captured_batch_is_replayed_with_other_contents() {
    let gpu = open();
    for case in [
        SMOL,
        Case { window: Some(20), ..SMOL },
        SMOL.kv(Dtype::F32, KvDtype::F16),
        Case { heads: 20, ..SMOL },
    ] {
        let lengths = [(600, 1), (1, 1), (257, 1), (513, 1), (32, 1)];
        let world = World::new(&gpu, 12, case, &lengths);
        let expected: Vec<Vec<f32>> = world.attend(64, &world.whole());
        let bucket = DecodeBucket { sequences: 4, parts: DecodeBucket::parts_of(700) };
        let mut batch = Batch::new(&gpu, world.limits(4, 4, 4 * 44, 12));
        let (heads, head_dim) = (case.heads, case.shape.head_dim);
        let width = heads * head_dim;
        let workspace = AttentionWorkspace::new(&gpu, batch.plan.limits(), heads, head_dim).unwrap();
        let element = case.dtype.bytes();
        let (q, out) =
            (gpu.allocate(4 * width * element).unwrap(), gpu.allocate(4 * width * element).unwrap());
        let rows = |buffer| DeviceRows::new(buffer, case.dtype, width);
        let shape = bucket.shape(batch.plan.limits().group);
        let attention = world.attention(&batch.device, shape, &workspace);
        let graph = gpu.capture(|| gpu.paged_attention(rows(&q), &attention, rows(&out))).unwrap();
        for sequences in [&[0, 1, 2][..], &[4], &[3, 2, 1, 0], &[1, 3]] {
            let pieces: Vec<Piece> = sequences.iter().map(|i| (*i, 0, 1)).collect();
            let (spans, positions, tables, queries) = world.batch(&pieces);
            assert_eq!(batch.plan.plan_decode(&spans, &positions, &tables, bucket), shape);
            gpu.send_batch(&batch.plan, &mut batch.staging, &batch.device).unwrap();
            gpu.write(&q, 0, &bytes_of(&queries, case.dtype)).unwrap();
            gpu.write(&out, 0, &bytes_of(&vec![-7.0; 4 * width], case.dtype)).unwrap();
            graph.launch().unwrap();
            let got = download(&gpu, &out, case.dtype);
            for (row, sequence) in sequences.iter().enumerate() {
                let what = format!("{}: sequence {sequence} of {sequences:?}", case.name());
                assert_same_bits(&got[row * width..][..width], &expected[*sequence], &what);
            }
            assert!(got[sequences.len() * width..].iter().all(|x| *x == -7.0), "a padded row was written");
        }
    }
}

/// K and V in one layer's slots of more than the device has.
#[test]
fn a_cache_that_does_not_fit_is_an_error() {
    let gpu = open();
    let (_, total) = gpu.memory().unwrap();
    let blocks = total as usize / SMOL.shape.block_size / DeviceKv::token_bytes(SMOL.shape) + 1;
    assert!(matches!(DeviceKv::new(&gpu, SMOL.shape, 1, blocks), Err(GpuError::OutOfMemory { .. })));
    assert!(matches!(DeviceKv::new(&gpu, SMOL.shape, 2, usize::MAX / 2), Err(GpuError::OutOfMemory { .. })));
}
