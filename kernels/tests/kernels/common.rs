//! What the kernels' tests share: matrices made of random numbers, and calls.

use crate::numbers::{Random, assert_close};
use obol_kernels::{
    Bits, Cpu, GROUP, Isa, KvLayer, Packed, Place, Qkv, RopeStyle, RopeTable, Rows, ScaleKind, Span,
};

/// Scales as the kind can hold them, any integers.
pub(crate) fn packed(cpu: &Cpu, n: usize, k: usize, bits: Bits, kind: ScaleKind, seed: u64) -> Packed {
    Packed::build(cpu, n, k, bits, kind, &|row, group, q: &mut [u8; GROUP]| {
        let mut random = Random(seed ^ ((row as u64) << 32 | group as u64));
        for q in q.iter_mut() {
            *q = random.below(if bits == Bits::Four { 16 } else { 256 }) as u8;
        }
        let half = |x: f32| half::f16::from_f32(x).to_f32();
        let (scale, min) = (random.unit() * 0.1, random.unit());
        match kind {
            ScaleKind::F16Centred => (half(scale), -f32::from(bits.centre()) * half(scale)),
            ScaleKind::F16 => (half(scale), half(min)),
            ScaleKind::F32 => (scale, min),
        }
    })
}

pub(crate) const KINDS: [ScaleKind; 3] = [ScaleKind::F16Centred, ScaleKind::F16, ScaleKind::F32];

/// Each instruction set of this machine with 1 and 3 threads.
pub(crate) fn cpus() -> Vec<Cpu> {
    Isa::available().into_iter().flat_map(|isa| [1, 3].map(|threads| Cpu::with_isa(threads, isa))).collect()
}

/// Writes k and v as they are.
pub(crate) fn kv_write(
    cpu: &Cpu,
    layer: &mut KvLayer,
    k: Rows<'_>,
    v: Rows<'_>,
    spans: &[Span],
    positions: &[u32],
    block_tables: &[u32],
) {
    let mut data = [k.data, v.data].concat();
    let (k, v) = (Place { start: 0, stride: k.stride }, Place { start: k.data.len(), stride: v.stride });
    let qkv = Qkv { data: &mut data, heads: 0, q: k, k, v };
    cpu.rope_kv_write(qkv, None, layer, spans, positions, block_tables);
}

/// Rotates the first `heads` heads of each row: all but the last as queries, the last as a key.
pub(crate) fn rope(
    cpu: &Cpu,
    x: &mut [f32],
    stride: usize,
    heads: usize,
    head_dim: usize,
    table: &RopeTable,
    style: RopeStyle,
) {
    let rows = table.rows();
    let shape = obol_kernels::KvShape { kv_heads: 1, head_dim, block_size: 16, dtype: Default::default() };
    let blocks = rows.div_ceil(16);
    let mut data = x.to_vec();
    data.resize(rows * stride.max(head_dim) + rows * head_dim, 0.0);
    let q = Place { start: 0, stride };
    let k = Place { start: (heads - 1) * head_dim, stride };
    let v = Place { start: data.len() - rows * head_dim, stride: head_dim };
    let positions: Vec<u32> = (0..rows as u32).collect();
    let tables: Vec<u32> = (0..blocks as u32).collect();
    let spans = [Span { rows: 0..rows, table: 0..blocks }];
    let mut layer = KvLayer::new(shape, blocks);
    let qkv = Qkv { data: &mut data, heads: heads - 1, q, k, v };
    cpu.rope_kv_write(qkv, Some((table, style)), &mut layer, &spans, &positions, &tables);
    x.copy_from_slice(&data[..x.len()]);
    // What was written is the rotated key.
    let end = (rows - 1) * stride + heads * head_dim;
    let (key, _) = layer.read((rows - 1) / 16, 0, (rows - 1) % 16);
    assert_close(&key, &x[end - head_dim..end], 1e-3, "the key that was written");
}
