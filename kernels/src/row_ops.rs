//! Operations on single rows and elements as safe functions: norms, activations, rotation, sums. Shapes are
//! checked here, the work is shared out over the pool.

use crate::act::{Act, ActInPlace, ActMul, Softcap};
use crate::cpu::{SharedMut, TASK_ELEMENTS};
use crate::rows::{LayerNorm, Norm};
use crate::simd::dispatch;
use crate::{Cpu, Rows};

impl Cpu {
    /// out = x / sqrt(mean(x^2) + eps) * weight, for rows of `weight.len()`.
    ///
    /// Also norms each head of q or k where weight is (head_dim) and the heads lie together.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        check_norm(x, weight, out);
        let width = weight.len();
        let to = SharedMut::new(out);
        self.each_row(x.len() / width, width, &|row| {
            let x = &x[row * width..][..width];
            // SAFETY: each row is handed out once.
            let out = unsafe { to.slice(row * width, width) };
            dispatch(self.isa(), Norm { x: x.as_ptr(), add: None, weight, eps, out: out.as_mut_ptr() });
        });
    }

    /// Norms in place the first `heads` heads (`weight.len()` each) of rows `stride` apart (q/k norm).
    pub fn rms_norm_heads(&self, x: &mut [f32], stride: usize, heads: usize, weight: &[f32], eps: f32) {
        let width = heads * weight.len();
        assert!(width > 0 && stride >= width, "head norm: stride {stride} is less than {width}");
        let rows = x.len().div_ceil(stride);
        Rows::new(x, stride).check("head norm", rows, width);
        let x = SharedMut::new(x);
        self.each_row(rows, width, &|row| {
            // SAFETY: each row is handed out once.
            let x = unsafe { x.slice(row * stride, width) };
            for head in x.chunks_exact_mut(weight.len()) {
                let head = head.as_mut_ptr();
                dispatch(self.isa(), Norm { x: head, add: None, weight, eps, out: head });
            }
        });
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
        let width = weight.len();
        let (residual, to) = (SharedMut::new(residual), SharedMut::new(out));
        self.each_row(delta.len() / width, width, &|row| {
            // SAFETY: each row is handed out once.
            let (residual, out) =
                unsafe { (residual.slice(row * width, width), to.slice(row * width, width)) };
            let residual = residual.as_mut_ptr();
            let add = Some((residual, &delta[row * width..][..width]));
            dispatch(self.isa(), Norm { x: residual, add, weight, eps, out: out.as_mut_ptr() });
        });
    }

    /// out = (x - mean) / sqrt(variance + eps) * weight + bias, for rows of `weight.len()`.
    pub fn layer_norm(&self, x: &[f32], weight: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]) {
        check_norm(x, weight, out);
        let width = weight.len();
        assert!(bias.is_none_or(|bias| bias.len() == width), "norm: the bias is not ({width})");
        let to = SharedMut::new(out);
        self.each_row(x.len() / width, width, &|row| {
            let x = &x[row * width..][..width];
            // SAFETY: each row is handed out once.
            let out = unsafe { to.slice(row * width, width) };
            dispatch(self.isa(), LayerNorm { x, weight, bias, eps, out });
        });
    }

    /// x += delta.
    pub fn add(&self, x: &mut [f32], delta: &[f32]) {
        assert_eq!(x.len(), delta.len(), "add: lengths differ");
        self.each_piece(x, &|start, x| {
            for (x, delta) in x.iter_mut().zip(&delta[start..]) {
                *x += delta;
            }
        });
    }

    /// x *= factor.
    pub fn scale(&self, x: &mut [f32], factor: f32) {
        self.each_piece(x, &|_, x| {
            for x in x {
                *x *= factor;
            }
        });
    }

    /// x = cap * tanh(x / cap).
    ///
    /// # Panics
    /// When the cap is not over zero.
    pub fn softcap(&self, x: &mut [f32], cap: f32) {
        assert!(cap > 0.0, "softcap: a cap of {cap}");
        self.each_piece(x, &|_, x| dispatch(self.isa(), Softcap { cap, x }));
    }

    /// x = act(x): an MLP without a gate.
    pub fn act(&self, act: Act, x: &mut [f32]) {
        self.each_piece(x, &|_, x| dispatch(self.isa(), ActInPlace { act, x }));
    }

    /// out (m, f) = act(gate) * up of rows (gate, up) of 2 f.
    pub fn act_mul(&self, act: Act, gate_up: &[f32], f: usize, out: &mut [f32]) {
        assert_eq!(gate_up.len(), 2 * out.len(), "act-mul: lengths differ");
        let up = gate_up.get(f..).unwrap_or(&[]);
        self.act_mul_rows(act, Rows::new(gate_up, 2 * f), Rows::new(up, 2 * f), f, out);
    }

    /// out (m, f) = act(gate) * up, where gate and up lie apart.
    pub fn act_mul_split(&self, act: Act, gate: &[f32], up: &[f32], f: usize, out: &mut [f32]) {
        self.act_mul_rows(act, Rows::new(gate, f), Rows::new(up, f), f, out);
    }

    fn act_mul_rows(&self, act: Act, gate: Rows<'_>, up: Rows<'_>, f: usize, out: &mut [f32]) {
        assert!(f > 0 && out.len().is_multiple_of(f), "act-mul: {} values are no rows of {f}", out.len());
        gate.check("act-mul gate", out.len() / f, f);
        up.check("act-mul up", out.len() / f, f);
        let rows = out.len() / f;
        let to = SharedMut::new(out);
        self.each_row(rows, 4 * f, &|row| {
            // SAFETY: each row is handed out once.
            let out = unsafe { to.slice(row * f, f) };
            dispatch(self.isa(), ActMul { act, gate: gate.row(row, f), up: up.row(row, f), out });
        });
    }

    /// `f(start, piece)` for all pieces of `x`, whose elements do not know each other, in parallel where that
    /// pays.
    fn each_piece(&self, x: &mut [f32], f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        let len = x.len();
        let x = SharedMut::new(x);
        self.pool().run(len.div_ceil(TASK_ELEMENTS), &|task| {
            let start = task * TASK_ELEMENTS;
            // SAFETY: each piece is handed out once.
            f(start, unsafe { x.slice(start, TASK_ELEMENTS.min(len - start)) });
        });
    }
}

fn check_norm(x: &[f32], weight: &[f32], out: &[f32]) {
    assert!(!weight.is_empty() && x.len().is_multiple_of(weight.len()), "norm: rows do not fit the weight");
    assert_eq!(x.len(), out.len(), "norm: lengths differ");
}
