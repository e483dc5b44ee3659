//! What the tests share: numbers from a seed, sequences in a shuffled cache, and attention to them in any batch.

use crate::device::{download, epsilon, round, upload};
use crate::numbers::{Random, assert_same_bits};
use obol_kernels::cuda::{
    AttentionLimits, AttentionPlan, AttentionWorkspace, BatchShape, DeviceAttention, DeviceBatch, DeviceKv,
    DeviceQkv, DeviceRows, Dtype, Gpu, Pinned,
};
use obol_kernels::{Attention, KvDtype, KvLayer, KvShape, Rows, Span, reference};

/// In -`most`..`most`, as the type holds it.
pub(crate) fn values(random: &mut Random, dtype: Dtype, len: usize, most: f32) -> Vec<f32> {
    (0..len).map(|_| round(most * random.unit(), dtype)).collect()
}

pub(crate) fn open() -> Gpu {
    let gpu =
        Gpu::open(0).unwrap_or_else(|error| panic!("a CUDA device, or the emulator, is needed: {error}"));
    gpu.bind().unwrap();
    gpu
}

/// A planned batch on the device.
pub(crate) struct Batch {
    pub(crate) plan: AttentionPlan,
    pub(crate) staging: Pinned,
    pub(crate) device: DeviceBatch,
}

impl Batch {
    pub(crate) fn new(gpu: &Gpu, limits: AttentionLimits) -> Self {
        let plan = AttentionPlan::new(limits);
        let staging = gpu.pin(plan.bytes_most()).unwrap();
        Self { plan, staging, device: DeviceBatch::new(gpu, limits).unwrap() }
    }

    pub(crate) fn send(&mut self, gpu: &Gpu) {
        gpu.send_batch(&self.plan, &mut self.staging, &self.device).unwrap();
    }
}

/// Numbers that a kind of test has in common.
#[derive(Clone, Copy)]
pub(crate) struct Case {
    pub(crate) dtype: Dtype,
    pub(crate) shape: KvShape,
    pub(crate) heads: usize,
    pub(crate) window: Option<usize>,
    pub(crate) softcap: Option<f32>,
}

pub(crate) const SMOL: Case = Case {
    dtype: Dtype::F16,
    shape: KvShape { kv_heads: 1, head_dim: 64, block_size: 16, dtype: KvDtype::F16 },
    heads: 3,
    window: None,
    softcap: None,
};

impl Case {
    pub(crate) fn kv(self, dtype: Dtype, kv: KvDtype) -> Self {
        Self { dtype, shape: KvShape { dtype: kv, ..self.shape }, ..self }
    }

    pub(crate) fn name(&self) -> String {
        let Self { dtype, shape, heads, window, softcap } = self;
        format!("{} {shape:?} {heads} heads, window {window:?}, cap {softcap:?}", dtype.name())
    }

    /// The type of the numbers of the products: of q, and of the weights.
    fn products(&self) -> Dtype {
        match (self.dtype, self.shape.dtype) {
            (Dtype::F32, _) | (_, KvDtype::F32) => Dtype::F32,
            (_, KvDtype::F16 | KvDtype::Int8) => Dtype::F16,
            (_, KvDtype::Bf16) => Dtype::Bf16,
        }
    }
}

/// Sequences of some lengths in a shuffled pool, with the queries of their last rows.
pub(crate) struct World<'a> {
    pub(crate) gpu: &'a Gpu,
    pub(crate) case: Case,
    pub(crate) kv: DeviceKv,
    pub(crate) layer: KvLayer,
    /// Of each sequence: (length, new rows, block table)
    pub(crate) sequences: Vec<(usize, usize, Vec<u32>)>,
    /// Of each sequence: (new rows, heads * head_dim)
    pub(crate) queries: Vec<Vec<f32>>,
}

/// A sequence's number, and the first and last of its new rows.
pub(crate) type Piece = (usize, usize, usize);

impl<'a> World<'a> {
    pub(crate) fn new(gpu: &'a Gpu, seed: u64, case: Case, lengths: &[(usize, usize)]) -> Self {
        let mut random = Random(seed);
        let Case { dtype, shape, heads, .. } = case;
        let blocks: usize =
            lengths.iter().map(|(length, _)| length.div_ceil(shape.block_size)).sum::<usize>() + 3;
        let mut free: Vec<u32> = (0..blocks as u32).collect();
        for i in (1..free.len()).rev() {
            free.swap(i, random.below(i + 1));
        }
        // Layer 1 of 2 is used, so that a wrong layer shows.
        let kv = DeviceKv::new(gpu, shape, 2, blocks).unwrap();
        let layer = KvLayer::new(shape, blocks);
        let mut world = Self { gpu, case, kv, layer, sequences: Vec::new(), queries: Vec::new() };
        let width = shape.kv_heads * shape.head_dim;
        // What an earlier owner left behind must not be seen.
        let rows = blocks * shape.block_size;
        let left = vec![f32::INFINITY; rows * width];
        world.write(&(0..blocks as u32).collect::<Vec<_>>(), &left, &left);
        for (length, new) in lengths {
            let table: Vec<u32> = free.drain(..length.div_ceil(shape.block_size)).collect();
            let (k, v) = (
                values(&mut random, dtype, length * width, 1.0),
                values(&mut random, dtype, length * width, 1.0),
            );
            world.write(&table, &k, &v);
            world.sequences.push((*length, *new, table));
            world.queries.push(values(&mut random, dtype, new * heads * shape.head_dim, 3.0));
        }
        world
    }

    pub(crate) fn limits(
        &self,
        rows: usize,
        spans: usize,
        table_entries: usize,
        partials: usize,
    ) -> AttentionLimits {
        AttentionLimits {
            rows,
            spans,
            table_entries,
            context: 4096,
            group: self.case.heads / self.case.shape.kv_heads,
            blocks: self.kv.blocks(),
            block_size: self.case.shape.block_size,
            partials,
        }
    }

    /// Writes K and V (rows, kv_heads, head_dim) of positions from 0 on, on the device and in the reference.
    fn write(&mut self, table: &[u32], k: &[f32], v: &[f32]) {
        let Case { dtype, shape, .. } = self.case;
        let width = shape.kv_heads * shape.head_dim;
        let rows = k.len() / width;
        let positions: Vec<u32> = (0..rows as u32).collect();
        let spans = [Span { rows: 0..rows, table: 0..table.len() }];
        reference::kv_write(
            &mut self.layer,
            Rows::new(k, width),
            Rows::new(v, width),
            &spans,
            &positions,
            table,
        );
        let mut batch = Batch::new(self.gpu, self.limits(rows, 1, table.len(), 0));
        let planned = batch.plan.plan(&spans, &positions, table);
        batch.send(self.gpu);
        let upload = |x| upload(self.gpu, x, dtype);
        let (k, v) = (upload(k), upload(v));
        let none = self.gpu.allocate(0).unwrap();
        let qkv = DeviceQkv {
            heads: 0,
            q: DeviceRows::new(&none, dtype, 0),
            k: DeviceRows::new(&k, dtype, width),
            v: DeviceRows::new(&v, dtype, width),
        };
        let empty = BatchShape { rows: 0, ..planned };
        self.gpu.rope_kv_write(qkv, None, (&self.kv, 1), &batch.device, empty).unwrap();
        self.gpu.rope_kv_write(qkv, None, (&self.kv, 1), &batch.device, planned).unwrap();
        self.gpu.synchronize().unwrap();
    }

    /// Spans, positions and block tables of pieces, with their queries (rows, heads * head_dim).
    pub(crate) fn batch(&self, pieces: &[Piece]) -> (Vec<Span>, Vec<u32>, Vec<u32>, Vec<f32>) {
        let width = self.case.heads * self.case.shape.head_dim;
        let (mut q, mut positions, mut tables, mut spans) = (vec![], vec![], vec![], vec![]);
        for (sequence, from, to) in pieces {
            let (length, new, table) = &self.sequences[*sequence];
            let row = positions.len();
            q.extend_from_slice(&self.queries[*sequence][from * width..to * width]);
            positions.extend((*from..*to).map(|i| (length - new + i) as u32));
            spans.push(Span { rows: row..positions.len(), table: tables.len()..tables.len() + table.len() });
            tables.extend_from_slice(table);
        }
        (spans, positions, tables, q)
    }

    pub(crate) fn whole(&self) -> Vec<Piece> {
        self.sequences.iter().enumerate().map(|(i, (_, new, _))| (i, 0, *new)).collect()
    }

    fn scale(&self) -> f32 {
        1.0 / (self.case.shape.head_dim as f32).sqrt()
    }

    fn expected(&self) -> Vec<Vec<f32>> {
        let (spans, positions, tables, q) = self.batch(&self.whole());
        let width = self.case.heads * self.case.shape.head_dim;
        let attention = Attention {
            layer: &self.layer,
            spans: &spans,
            positions: &positions,
            block_tables: &tables,
            heads: self.case.heads,
            scale: self.scale(),
            window: self.case.window,
            softcap: self.case.softcap,
        };
        let mut out = vec![f32::NAN; q.len()];
        reference::paged_attention(Rows::new(&q, width), &attention, &mut out);
        spans.iter().map(|span| out[span.rows.start * width..span.rows.end * width].to_vec()).collect()
    }

    /// Attention of `pieces` in one batch, in a workspace for `partials`; one output for each piece.
    pub(crate) fn attend(&self, partials: usize, pieces: &[Piece]) -> Vec<Vec<f32>> {
        let (spans, positions, tables, q) = self.batch(pieces);
        let Case { dtype, heads, shape, .. } = self.case;
        let width = heads * shape.head_dim;
        // Queries lie in wider rows, as a fused product leaves them, and results too.
        let (start, stride) = (6, width + 10);
        let mut wide = vec![f32::NAN; start + positions.len() * stride];
        for (wide, q) in wide[start..].chunks_mut(stride).zip(q.chunks(width)) {
            wide[..width].copy_from_slice(q);
        }
        let q = upload(self.gpu, &wide, dtype);
        let out = upload(self.gpu, &vec![-7.0; wide.len()], dtype);
        let mut batch =
            Batch::new(self.gpu, self.limits(positions.len(), spans.len(), tables.len(), partials));
        let planned = batch.plan.plan(&spans, &positions, &tables);
        batch.send(self.gpu);
        let workspace =
            AttentionWorkspace::new(self.gpu, batch.plan.limits(), heads, shape.head_dim).unwrap();
        let rows = |buffer| DeviceRows { buffer, dtype, start, stride };
        let attention = self.attention(&batch.device, planned, &workspace);
        self.gpu.paged_attention(rows(&q), &attention, rows(&out)).unwrap();
        let out = download(self.gpu, &out, dtype);
        assert!(out[..start].iter().all(|x| *x == -7.0), "something before the results was written");
        let rows: Vec<&[f32]> = out[start..].chunks(stride).collect();
        assert!(
            rows.iter().all(|row| row[width..].iter().all(|x| *x == -7.0)),
            "something between was written"
        );
        let piece =
            |span: &Span| rows[span.rows.clone()].iter().flat_map(|row| &row[..width]).copied().collect();
        spans.iter().map(piece).collect()
    }

    pub(crate) fn attention<'b>(
        &'b self,
        batch: &'b DeviceBatch,
        shape: BatchShape,
        workspace: &'b AttentionWorkspace,
    ) -> DeviceAttention<'b> {
        DeviceAttention {
            kv: &self.kv,
            layer: 1,
            batch,
            shape,
            workspace,
            heads: self.case.heads,
            scale: self.scale(),
            window: self.case.window,
            softcap: self.case.softcap,
        }
    }

    /// Values are within -1..1. Rounding q, and sums in f32, put a score off by at most `score`, and so a weight by
    /// a factor of e^(2 score); rounding weights and the result comes on top.
    pub(crate) fn check(&self) {
        let Case { dtype, shape, .. } = self.case;
        let products = self.case.products();
        let q_unit = if dtype == Dtype::F16 && products == Dtype::Bf16 { epsilon(products) } else { 0.0 };
        let expected = self.expected();
        let got = self.attend(64, &self.whole());
        for (sequence, (got, expected)) in got.iter().zip(&expected).enumerate() {
            let queries = self.queries[sequence].chunks(shape.head_dim);
            let heads = got.chunks(shape.head_dim).zip(expected.chunks(shape.head_dim));
            for (i, (q, (got, expected))) in queries.zip(heads).enumerate() {
                let size: f32 = q.iter().map(|q| q.abs()).sum::<f32>() * self.scale();
                let score = size * (q_unit + 2e-6) + self.case.softcap.map_or(0.0, |cap| cap * 1e-6);
                let bound = (2.0 * score).exp_m1() + epsilon(products) + epsilon(dtype) + 2e-6;
                for (d, (got, expected)) in got.iter().zip(expected).enumerate() {
                    assert!(
                        (got - expected).abs() <= bound,
                        "{}: sequence {sequence} head {i} dim {d}: {got}, not {expected}, bound {bound}",
                        self.case.name()
                    );
                }
            }
        }
    }

    /// Any cut of the batch, by either variant: the same bits.
    pub(crate) fn check_invariance(&self) {
        let name = self.case.name();
        let mut random = Random(9);
        let width = self.case.heads * self.case.shape.head_dim;
        let all = self.attend(64, &self.whole());
        for (i, tiles) in self.attend(0, &self.whole()).iter().enumerate() {
            assert_same_bits(tiles, &all[i], &format!("{name}: sequence {i} in tiles only"));
        }
        // Each batch has a piece of every sequence that is not yet done.
        let mut done = vec![0; self.sequences.len()];
        loop {
            let mut pieces: Vec<Piece> = Vec::new();
            for (i, (_, new, _)) in self.sequences.iter().enumerate() {
                let to = (done[i] + 1 + random.below(5)).min(*new);
                if done[i] < to {
                    pieces.push((i, done[i], to));
                    done[i] = to;
                }
            }
            if pieces.is_empty() {
                return;
            }
            let partials = [64, 3, 0][random.below(3)];
            for ((i, from, to), got) in pieces.iter().zip(self.attend(partials, &pieces)) {
                let expected = &all[*i][from * width..to * width];
                assert_same_bits(&got, expected, &format!("{name}: sequence {i} rows {from}..{to}"));
            }
        }
    }
}
