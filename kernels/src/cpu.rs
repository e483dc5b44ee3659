//! The operations' safe functions: shapes are checked here, the work is shared out over the pool.

use std::marker::PhantomData;

use crate::attention::{Attention, check_spans};
use crate::{
    Activations, Dense, GROUP, Isa, KvLayer, Packed, Pool, RopeStyle, RopeTable, Rows, Span, reference,
};

/// A number of threads and an instruction set: every operation is a method.
pub struct Cpu {
    pool: Pool,
    isa: Isa,
}

impl Cpu {
    /// With the best instruction set of this machine.
    pub fn new(threads: usize) -> Self {
        Self::with_isa(threads, Isa::detect())
    }

    /// # Panics
    /// When this machine has no such instruction set.
    pub fn with_isa(threads: usize, isa: Isa) -> Self {
        assert!(isa.is_available(), "this machine has no {isa}");
        Self { pool: Pool::new(threads), isa }
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Quantises `x` (m, k) to int8: per group of 32 one scale, amax / 127, rounding half to even.
    pub fn quantize(&self, x: &[f32], k: usize, out: &mut Activations) {
        assert!(k > 0 && k.is_multiple_of(GROUP), "quantize: k = {k} is no multiple of {GROUP}");
        assert!(x.len().is_multiple_of(k), "quantize: {} values are no rows of {k}", x.len());
        out.resize(x.len() / k, k);
        let (q, scales) = reference::quantize(x);
        for (group, scale) in scales.iter().enumerate() {
            let total = q[group * GROUP..][..GROUP].iter().map(|q| i32::from(*q)).sum();
            out.isums[group] = total;
            out.sums[group] = scale * total as f32;
        }
        out.q.copy_from_slice(&q);
        out.scales.copy_from_slice(&scales);
    }

    /// y (m, n) = x (m, k) * w^T + bias (n).
    pub fn matmul_packed(&self, x: &Activations, w: &Packed, bias: Option<&[f32]>, y: &mut [f32]) {
        assert_eq!(x.k(), w.k(), "packed product: k differs");
        check_product(x.m(), w.n(), bias, y);
        reference::matmul_packed(x, w, bias, y);
    }

    /// y (m, n) = x (m, k) * w^T + bias (n).
    pub fn matmul_dense(&self, x: &[f32], w: &Dense, bias: Option<&[f32]>, y: &mut [f32]) {
        assert!(x.len().is_multiple_of(w.k()), "dense product: {} values are no rows of {}", x.len(), w.k());
        check_product(x.len() / w.k(), w.n(), bias, y);
        reference::matmul_dense(x, w, bias, y);
    }

    /// out = x / sqrt(mean(x^2) + eps) * weight, for rows of `weight.len()`.
    ///
    /// Also norms each head of q or k where weight is (head_dim) and the heads lie together.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        check_norm(x, weight, out);
        reference::rms_norm(x, weight, eps, out);
    }

    /// Norms in place the first `heads` heads (`weight.len()` each) of rows `stride` apart (q/k norm).
    pub fn rms_norm_heads(&self, x: &mut [f32], stride: usize, heads: usize, weight: &[f32], eps: f32) {
        let width = heads * weight.len();
        assert!(width > 0 && stride >= width, "head norm: stride {stride} is less than {width}");
        let mut out = vec![0.0; weight.len()];
        for row in x.chunks_mut(stride) {
            assert!(row.len() >= width, "head norm: the last row is short");
            for head in row[..width].chunks_exact_mut(weight.len()) {
                reference::rms_norm(head, weight, eps, &mut out);
                head.copy_from_slice(&out);
            }
        }
    }

    /// residual += delta, then out = the norm of residual.
    pub fn add_rms_norm(
        &self,
        residual: &mut [f32],
        delta: &[f32],
        weight: &[f32],
        eps: f32,
        out: &mut [f32],
    ) {
        assert_eq!(residual.len(), delta.len(), "add and norm: lengths differ");
        check_norm(residual, weight, out);
        reference::add_rms_norm(residual, delta, weight, eps, out);
    }

    /// x += delta.
    pub fn add(&self, x: &mut [f32], delta: &[f32]) {
        assert_eq!(x.len(), delta.len(), "add: lengths differ");
        for (x, delta) in x.iter_mut().zip(delta) {
            *x += delta;
        }
    }

    /// out (m, f) = silu(gate) * up of rows (gate, up) of 2 f.
    pub fn silu_mul(&self, gate_up: &[f32], f: usize, out: &mut [f32]) {
        assert_eq!(gate_up.len(), 2 * out.len(), "silu-mul: lengths differ");
        self.silu_mul_rows(
            Rows::new(gate_up, 2 * f),
            Rows::new(gate_up.get(f..).unwrap_or(&[]), 2 * f),
            f,
            out,
        );
    }

    /// out (m, f) = silu(gate) * up, where gate and up lie apart.
    pub fn silu_mul_split(&self, gate: &[f32], up: &[f32], f: usize, out: &mut [f32]) {
        self.silu_mul_rows(Rows::new(gate, f), Rows::new(up, f), f, out);
    }

    fn silu_mul_rows(&self, gate: Rows<'_>, up: Rows<'_>, f: usize, out: &mut [f32]) {
        assert!(f > 0 && out.len().is_multiple_of(f), "silu-mul: {} values are no rows of {f}", out.len());
        gate.check("silu-mul gate", out.len() / f, f);
        up.check("silu-mul up", out.len() / f, f);
        reference::silu_mul(gate, up, f, out);
    }

    /// Rotates in place the first `heads` heads of rows `stride` apart, row `i` by `positions[i]`.
    ///
    /// With q and k side by side in a row, `heads` may count both. Elements of a head past the table's
    /// rotary_dim stay as they are.
    #[expect(clippy::too_many_arguments, reason = "the sizes are the operation's own")]
    pub fn rope(
        &self,
        x: &mut [f32],
        stride: usize,
        heads: usize,
        head_dim: usize,
        positions: &[u32],
        table: &RopeTable,
        style: RopeStyle,
    ) {
        Rows::new(x, stride).check("rope", positions.len(), heads * head_dim);
        assert!(table.rotary_dim() <= head_dim, "rope: rotary_dim is over head_dim");
        for position in positions {
            assert!((*position as usize) < table.positions(), "rope: no position {position} in the table");
        }
        reference::rope(x, stride, heads, head_dim, positions, table, style);
    }

    /// Writes each row's k and v (kv_heads, head_dim), rounded to f16, at its position.
    pub fn kv_write(
        &self,
        layer: &mut KvLayer,
        k: Rows<'_>,
        v: Rows<'_>,
        spans: &[Span],
        positions: &[u32],
        block_tables: &[u32],
    ) {
        let width = layer.shape().kv_heads * layer.shape().head_dim;
        k.check("kv write k", positions.len(), width);
        v.check("kv write v", positions.len(), width);
        check_spans("kv write", layer, spans, positions, block_tables);
        reference::kv_write(layer, k, v, spans, positions, block_tables);
    }

    /// out (rows, heads, head_dim) of queries q (rows, heads, head_dim): a row at position p attends to
    /// positions `max(0, p + 1 - window)..=p` of its sequence, through its block table.
    ///
    /// Rows that no span covers are left as they are.
    pub fn paged_attention(&self, q: Rows<'_>, attention: &Attention<'_>, out: &mut [f32]) {
        let Attention { layer, spans, positions, block_tables, heads, window, .. } = *attention;
        let shape = layer.shape();
        assert!(
            heads > 0 && heads.is_multiple_of(shape.kv_heads),
            "attention: {heads} heads do not share kv heads"
        );
        assert!(window != Some(0), "attention: a window of 0 positions");
        q.check("attention q", positions.len(), heads * shape.head_dim);
        assert_eq!(out.len(), positions.len() * heads * shape.head_dim, "attention: wrong output length");
        check_spans("attention", layer, spans, positions, block_tables);
        reference::paged_attention(q, attention, out);
    }
}

fn check_product(m: usize, n: usize, bias: Option<&[f32]>, y: &[f32]) {
    assert_eq!(y.len(), m * n, "product: the output is not ({m}, {n})");
    assert!(bias.is_none_or(|bias| bias.len() == n), "product: the bias is not ({n})");
}

fn check_norm(x: &[f32], weight: &[f32], out: &[f32]) {
    assert!(!weight.is_empty() && x.len().is_multiple_of(weight.len()), "norm: rows do not fit the weight");
    assert_eq!(x.len(), out.len(), "norm: lengths differ");
}

/// A slice that tasks write at places they promise to be disjoint.
pub(crate) struct SharedMut<'a, T> {
    start: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a slice handed out in pieces; `slice` makes the caller promise that they do not overlap.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), owner: PhantomData }
    }

    /// `len` elements from `start`.
    ///
    /// # Safety
    /// No other piece that overlaps this one is alive.
    #[expect(clippy::mut_from_ref, reason = "the pieces are disjoint, by the caller's promise")]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "a piece past the slice's end; this is a bug");
        // SAFETY: in bounds, and by the caller's promise nobody else's.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}
