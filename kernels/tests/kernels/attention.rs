//! Paged attention against the reference, and bit for bit the same in every batch.

use crate::common::{cpus, kv_write};
use crate::numbers::{Random, assert_close, assert_same_bits};
use obol_kernels::{Attention, Cpu, Isa, KvDtype, KvLayer, KvShape, Place, Qkv, Rows, Span, reference};

/// Sequences of some lengths in a shuffled pool, with the queries of their last rows.
struct World {
    layer: KvLayer,
    heads: usize,
    /// Of each sequence: (length, new rows, block table)
    sequences: Vec<(usize, usize, Vec<u32>)>,
    /// Of each sequence: (new rows, heads * head_dim)
    queries: Vec<Vec<f32>>,
    window: Option<usize>,
    softcap: Option<f32>,
}

fn world(seed: u64, shape: KvShape, heads: usize, lengths: &[(usize, usize)]) -> World {
    let mut random = Random(seed);
    let blocks: usize =
        lengths.iter().map(|(length, _)| length.div_ceil(shape.block_size)).sum::<usize>() + 3;
    let mut free: Vec<u32> = (0..blocks as u32).collect();
    for i in (1..free.len()).rev() {
        free.swap(i, random.below(i + 1));
    }
    let mut layer = KvLayer::new(shape, blocks);
    let width = shape.kv_heads * shape.head_dim;
    // What an earlier owner left behind must not be seen.
    let table: Vec<u32> = (0..blocks as u32).collect();
    let rows = blocks * shape.block_size;
    let left = vec![f32::INFINITY; rows * width];
    let positions: Vec<u32> = (0..rows as u32).collect();
    let span = Span { rows: 0..rows, table: 0..blocks };
    let cpu = Cpu::new(2);
    kv_write(&cpu, &mut layer, Rows::new(&left, width), Rows::new(&left, width), &[span], &positions, &table);
    let mut sequences = Vec::new();
    let mut queries = Vec::new();
    for (length, new) in lengths {
        let table: Vec<u32> = free.drain(..length.div_ceil(shape.block_size)).collect();
        let (k, v) = (random.vec(length * width), random.vec(length * width));
        let positions: Vec<u32> = (0..*length as u32).collect();
        let span = Span { rows: 0..*length, table: 0..table.len() };
        kv_write(&cpu, &mut layer, Rows::new(&k, width), Rows::new(&v, width), &[span], &positions, &table);
        sequences.push((*length, *new, table));
        queries.push(random.vec(new * heads * shape.head_dim).iter().map(|q| q * 3.0).collect());
    }
    World { layer, heads, sequences, queries, window: None, softcap: None }
}

impl World {
    /// Attention of `pieces` (sequence, first and last new row) in one batch; one output for each piece.
    fn attend(
        &self,
        run: &dyn Fn(Rows<'_>, &Attention<'_>, &mut [f32]),
        pieces: &[(usize, usize, usize)],
    ) -> Vec<Vec<f32>> {
        let width = self.heads * self.layer.shape().head_dim;
        // Queries lie in wider rows, as a fused product leaves them.
        let stride = width + 7;
        let (mut q, mut positions, mut tables, mut spans) = (vec![], vec![], vec![], vec![]);
        for (sequence, from, to) in pieces {
            let (length, new, table) = &self.sequences[*sequence];
            let row = positions.len();
            for i in *from..*to {
                q.extend_from_slice(&self.queries[*sequence][i * width..][..width]);
                q.extend_from_slice(&[f32::NAN; 7]);
                positions.push((length - new + i) as u32);
            }
            spans.push(Span { rows: row..positions.len(), table: tables.len()..tables.len() + table.len() });
            tables.extend_from_slice(table);
        }
        let attention = Attention {
            layer: &self.layer,
            spans: &spans,
            positions: &positions,
            block_tables: &tables,
            heads: self.heads,
            scale: 1.0 / (self.layer.shape().head_dim as f32).sqrt(),
            window: self.window,
            softcap: self.softcap,
        };
        let mut out = vec![f32::NAN; positions.len() * width];
        run(Rows::new(&q, stride), &attention, &mut out);
        spans.iter().map(|span| out[span.rows.start * width..span.rows.end * width].to_vec()).collect()
    }

    fn whole(&self) -> Vec<(usize, usize, usize)> {
        self.sequences.iter().enumerate().map(|(i, (_, new, _))| (i, 0, *new)).collect()
    }

    fn check(&self, what: &str) {
        let expected = self.attend(&reference::paged_attention, &self.whole());
        for cpu in cpus() {
            let got = self.attend(&|q, a, out| cpu.paged_attention(q, a, out), &self.whole());
            for (got, expected) in got.iter().zip(&expected) {
                assert_close(got, expected, 2e-6, &format!("{what} {}", cpu.isa()));
            }
        }
    }

    /// Any cut of the batch, any number of threads: the same bits.
    fn check_invariance(&self, what: &str) {
        let mut random = Random(9);
        for isa in Isa::available() {
            let run = |threads: usize, pieces: &[(usize, usize, usize)]| {
                let cpu = Cpu::with_isa(threads, isa);
                self.attend(&|q, a, out| cpu.paged_attention(q, a, out), pieces)
            };
            let all = run(1, &self.whole());
            for threads in [2, 7] {
                assert_eq!(run(threads, &self.whole()).len(), all.len());
                for (a, b) in run(threads, &self.whole()).iter().zip(&all) {
                    assert_same_bits(a, b, &format!("{what} {isa} {threads} threads"));
                }
            }
            let width = self.heads * self.layer.shape().head_dim;
            for (sequence, from, to) in self.whole() {
                let mut row = from;
                while row < to {
                    let rows = (1 + random.below(8)).min(to - row);
                    let one = run(1 + random.below(4), &[(sequence, row, row + rows)]);
                    let expected = &all[sequence][row * width..(row + rows) * width];
                    assert_same_bits(&one[0], expected, &format!("{what} {isa} rows {row}+{rows}"));
                    row += rows;
                }
            }
        }
    }
}

const SMOL: KvShape = KvShape { kv_heads: 3, head_dim: 64, block_size: 16, dtype: KvDtype::F16 };

#[test]
fn decodes_contexts_around_the_strips_and_parts() {
    let lengths = [1, 2, 15, 16, 17, 31, 32, 33, 255, 256, 257, 513, 4097].map(|length| (length, 1));
    let world = world(1, SMOL, 9, &lengths);
    world.check("decode");
    world.check_invariance("decode");
}

#[test]
fn prefills_and_decodes_in_one_batch() {
    let world = world(2, SMOL, 9, &[(40, 40), (300, 1), (530, 37), (1, 1), (17, 17), (290, 290)]);
    world.check("mixed");
    world.check_invariance("mixed");
}

#[test]
fn takes_any_shape() {
    for (kv_heads, heads, head_dim, block_size) in
        [(1, 1, 16, 16), (1, 8, 80, 32), (2, 2, 128, 64), (2, 14, 64, 16), (1, 20, 24, 16), (4, 4, 7, 48)]
    {
        let shape = KvShape { kv_heads, head_dim, block_size, dtype: KvDtype::F16 };
        let world = world(3, shape, heads, &[(270, 5), (20, 20), (33, 1)]);
        world.check(&format!("{shape:?} {heads}"));
        world.check_invariance(&format!("{shape:?} {heads}"));
    }
}

#[test]
fn takes_the_head_sizes_of_models_and_odder_ones() {
    for head_dim in [2, 6, 34, 64, 80, 96, 112, 128, 130, 256] {
        let shape = KvShape { kv_heads: 2, head_dim, block_size: 16, dtype: KvDtype::F16 };
        let world = world(7, shape, 6, &[(261, 3), (18, 18)]);
        world.check(&format!("head size {head_dim}"));
        world.check_invariance(&format!("head size {head_dim}"));
    }
}

#[test]
fn a_window_hides_what_is_older() {
    for window in [1, 2, 16, 17, 100, 300, 4096] {
        let mut world = world(4, SMOL, 9, &[(600, 30), (300, 1), (20, 20)]);
        world.window = Some(window);
        world.check(&format!("window {window}"));
        world.check_invariance(&format!("window {window}"));
    }
}

#[test]
fn scores_are_capped() {
    let mut world = world(5, SMOL, 6, &[(100, 10), (300, 1)]);
    world.softcap = Some(1.5);
    world.check("softcap");
    world.check_invariance("softcap");
}

#[test]
fn every_type_of_kv_is_attended_to() {
    for dtype in KvDtype::ALL {
        let what = dtype.name();
        for (shape, heads) in [
            (KvShape { dtype, ..SMOL }, 9),
            (KvShape { kv_heads: 2, head_dim: 80, block_size: 32, dtype }, 8),
            (KvShape { kv_heads: 1, head_dim: 7, block_size: 16, dtype }, 3),
        ] {
            let mut world = world(8, shape, heads, &[(270, 21), (530, 1), (1, 1), (33, 33)]);
            world.check(what);
            world.check_invariance(what);
            world.window = Some(100);
            world.check(&format!("{what} window"));
            world.check_invariance(&format!("{what} window"));
            world.softcap = Some(1.5);
            world.check(&format!("{what} window and cap"));
            world.check_invariance(&format!("{what} window and cap"));
        }
    }
}

/// Against unrounded K and V: values within -1..1 are off by at most `unit`, so a score by at most scale *
/// unit * (sum of |q|), a probability by a factor of at most e^(2 * that), and a result by that and `unit`.
#[test]
fn rounded_kv_is_as_near_as_its_type_allows() {
    let lengths = [(300, 20), (40, 40)];
    for (dtype, unit) in
        [(KvDtype::F16, 0.5f32.powi(11)), (KvDtype::Bf16, 0.5f32.powi(8)), (KvDtype::Int8, 1.0 / 254.0)]
    {
        // The same seed writes the same numbers.
        let exact = world(11, KvShape { dtype: KvDtype::F32, ..SMOL }, 9, &lengths);
        let rounded = world(11, KvShape { dtype, ..SMOL }, 9, &lengths);
        let exact_out = exact.attend(&reference::paged_attention, &exact.whole());
        for cpu in cpus() {
            let out = rounded.attend(&|q, a, out| cpu.paged_attention(q, a, out), &rounded.whole());
            for sequence in 0..lengths.len() {
                let heads = exact.queries[sequence].chunks(SMOL.head_dim);
                let pairs =
                    out[sequence].chunks(SMOL.head_dim).zip(exact_out[sequence].chunks(SMOL.head_dim));
                for (q, (out, exact)) in heads.zip(pairs) {
                    let sum: f32 = q.iter().map(|q| q.abs()).sum();
                    let score = unit * sum / (SMOL.head_dim as f32).sqrt();
                    let bound = (2.0 * score).exp_m1() + unit + 1e-5;
                    for (out, exact) in out.iter().zip(exact) {
                        assert!(
                            (out - exact).abs() <= bound,
                            "{dtype}: {out}, exactly {exact}, bound {bound}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn kv_states_the_bytes_it_holds() {
    for (dtype, token) in
        [(KvDtype::F16, 2 * 3 * 128), (KvDtype::Bf16, 2 * 3 * 128), (KvDtype::F32, 4 * 3 * 128)]
    {
        assert_eq!(KvShape { dtype, ..SMOL }.token_bytes(), token);
    }
    assert_eq!(KvShape { dtype: KvDtype::Int8, ..SMOL }.token_bytes(), 3 * (128 + 8));
    for (dtype, head_dim) in KvDtype::ALL.into_iter().flat_map(|dtype| [(dtype, 64), (dtype, 70)]) {
        let shape = KvShape { kv_heads: 3, head_dim, block_size: 32, dtype };
        assert_eq!(shape.block_bytes(), 32 * shape.token_bytes());
        assert_eq!(KvLayer::new(shape, 5).bytes(), 5 * shape.block_bytes());
        assert_eq!(KvLayer::new(shape, 0).bytes(), 0);
        for blocks in [usize::MAX / 1000, usize::MAX] {
            let error = KvLayer::try_new(shape, blocks).err().expect("no machine has this memory");
            assert!(error.bytes > 1 << 50, "{error}");
        }
    }
}

#[test]
fn kv_is_written_where_the_table_says_on_every_instruction_set() {
    let mut random = Random(6);
    for cpu in cpus() {
        let sizes = [(3, 64, 100), (1, 7, 5), (2, 600, 40)];
        for ((kv_heads, head_dim, rows), dtype) in
            sizes.into_iter().flat_map(|sizes| KvDtype::ALL.map(|dtype| (sizes, dtype)))
        {
            let shape = KvShape { kv_heads, head_dim, block_size: 32, dtype };
            let width = kv_heads * head_dim;
            let (mut k, v) = (random.vec(rows * (width + 3)), random.vec(rows * (width + 5)));
            // A zero head, ties, and values that overflow or vanish.
            k[..head_dim].fill(0.0);
            k[width + 3..][..5].copy_from_slice(&[127.0, 0.5, 1.5, -2.5, 1.003_906_2]);
            k[2 * (width + 3)..][..3].copy_from_slice(&[1e-40, 65_520.0, -1e-8]);
            let (k, v) = (Rows::new(&k, width + 3), Rows::new(&v, width + 5));
            let (spans, tables) = ([Span { rows: 0..rows, table: 1..6 }], [9, 4, 2, 6, 3, 5]);
            let positions: Vec<u32> = (7..7 + rows as u32).collect();
            let (mut layer, mut expected) = (KvLayer::new(shape, 8), KvLayer::new(shape, 8));
            kv_write(&cpu, &mut layer, k, v, &spans, &positions, &tables);
            reference::kv_write(&mut expected, k, v, &spans, &positions, &tables);
            for block in 0..8 {
                for head in 0..kv_heads {
                    for slot in 0..32 {
                        assert_eq!(layer.read(block, head, slot), expected.read(block, head, slot));
                    }
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "overlap")]
fn queries_and_keys_in_one_place_are_refused() {
    let shape = KvShape { kv_heads: 1, head_dim: 16, block_size: 16, dtype: KvDtype::F16 };
    let place = |start| Place { start, stride: 40 };
    let qkv = Qkv { data: &mut [0.0; 96], heads: 1, q: place(0), k: place(15), v: place(31) };
    let span = Span { rows: 0..2, table: 0..1 };
    Cpu::new(1).rope_kv_write(qkv, None, &mut KvLayer::new(shape, 1), &[span], &[0, 1], &[0]);
}
