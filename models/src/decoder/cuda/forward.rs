//! A batch's way through the layers on a device: the same operations in the same order as on the CPU, put into
//! the stream one after another.

use obol_kernels::cuda::{
    AttentionWorkspace, BatchShape, Buffer, Communicator, DeviceAttention, DeviceBatch, DeviceKv, DeviceQkv,
    DeviceRope, DeviceRows, Dtype, Gpu, GpuError,
};

use super::weights::{DeviceLayer, DeviceLinear, DeviceMlp, NormWeights};
use super::work::Work;
use crate::spec::ModelSpec;

/// Weights and what belongs to them.
pub(super) struct Weights {
    pub(super) embedding: DeviceLinear,
    pub(super) positions: Option<DeviceLinear>,
    pub(super) layers: Vec<DeviceLayer>,
    pub(super) final_norm: NormWeights,
    /// None: the embedding's matrix is the head.
    pub(super) head: Option<DeviceLinear>,
    pub(super) ropes: Vec<DeviceRope>,
}

/// The KV pool, and what says which of it a batch uses.
pub(super) struct Cache {
    pub(super) kv: DeviceKv,
    pub(super) batch: DeviceBatch,
    pub(super) workspace: AttentionWorkspace,
}

/// Everything that the operations read and write.
#[derive(Clone, Copy)]
pub(super) struct Stage<'a> {
    pub(super) gpu: &'a Gpu,
    pub(super) spec: &'a ModelSpec,
    pub(super) weights: &'a Weights,
    pub(super) cache: &'a Cache,
    pub(super) work: &'a Work,
    /// With those that share each layer's work, if it is shared.
    pub(super) others: Option<&'a Communicator>,
}

impl Stage<'_> {
    /// Tokens, which are on the device, to the residual of the logit rows after all layers, but for the last
    /// addition, which is left in `delta`.
    pub(super) fn run_layers(&self, shape: BatchShape, logit_rows: usize) -> Result<(), GpuError> {
        let Self { gpu, spec, weights, work, .. } = *self;
        let rows = shape.rows as usize;
        self.embed(rows)?;
        let last = weights.layers.len() - 1;
        for (index, layer) in weights.layers.iter().enumerate() {
            // ---- attention ----
            let pending = (index > 0).then(|| work.delta());
            let x = self.read(layer.attention_norm.as_ref(), work.residual(), pending, rows)?;
            layer.qkv.forward(gpu, x, rows, &work.quantized, (&work.qkv, work.dtype))?;
            let [q, k, v] = [0, 1, 2].map(|output| layer.qkv.place(output, rows, &work.qkv, work.dtype));
            if let Some(norms) = &layer.qk_norm {
                for (x, width, norm) in [(q, spec.q_width(), &norms[0]), (k, spec.kv_width(), &norms[1])] {
                    gpu.norm_heads(&norm.get(), x, rows, width / norm.width())?;
                }
            }
            let rope = spec.layers[index].rope.map(|rope| &weights.ropes[rope]);
            let qkv = DeviceQkv { heads: spec.heads, q, k, v };
            gpu.rope_kv_write(qkv, rope, (&self.cache.kv, index), &self.cache.batch, shape)?;
            if index == last && logit_rows == 0 {
                return Ok(());
            }
            gpu.paged_attention(q, &self.attention(index, shape), work.attended())?;
            let (mut attended, mut residual, mut rows) = (work.attended(), work.residual(), rows);
            if index == last {
                // What follows keeps rows apart, so only those that are asked for need it.
                for (from, width, to) in [
                    (attended, spec.q_width(), work.kept_attended()),
                    (residual, spec.hidden, work.kept_residual()),
                ] {
                    gpu.gather_rows(from, rows, &work.logit_rows, logit_rows, width, to)?;
                }
                (attended, residual, rows) = (work.kept_attended(), work.kept_residual(), logit_rows);
            }
            let delta = work.delta();
            layer.attention_out.forward(gpu, attended, rows, &work.quantized, (delta.buffer, work.dtype))?;
            self.add_up(rows)?;
            self.settle(layer.attention_post_norm.as_ref(), rows)?;
            // ---- MLP ----
            let x = self.read(layer.ffn_norm.as_ref(), residual, Some(delta), rows)?;
            self.feed_forward(layer, x, rows)?;
            self.add_up(rows)?;
            self.settle(layer.ffn_post_norm.as_ref(), rows)?;
        }
        Ok(())
    }

    /// Logits of the logit rows `first..first + rows` from what [`Stage::run_layers`] left of `all`; the final
    /// norm is computed with the first of them.
    pub(super) fn run_head(&self, first: usize, rows: usize, all: usize) -> Result<(), GpuError> {
        let Self { gpu, spec, weights, work, .. } = *self;
        if first == 0 {
            gpu.add_norm(&weights.final_norm.get(), work.kept_residual(), work.delta(), all, work.normed())?;
        }
        let head = weights.head.as_ref().unwrap_or(&weights.embedding);
        let normed = work.normed();
        let x = DeviceRows { start: first * normed.stride, ..normed };
        head.forward(gpu, x, rows, &work.quantized, (&work.logits, Dtype::F32))?;
        if spec.logits_scale != 1.0 {
            gpu.scale(work.logits(), rows, spec.vocab, spec.logits_scale)?;
        }
        if let Some(cap) = spec.logits_softcap {
            gpu.softcap(work.logits(), rows, spec.vocab, cap)?;
        }
        Ok(())
    }

    fn embed(&self, rows: usize) -> Result<(), GpuError> {
        let Self { gpu, spec, weights, work, .. } = *self;
        let tokens = weights.embedding.pick(&work.tokens);
        let positions = weights.positions.as_ref().map(|positions| positions.pick(&work.positions));
        gpu.embed(tokens, spec.embedding_scale, positions, rows, work.residual())
    }

    /// residual += what is pending; then what a layer's half reads: the norm of the residual, or itself.
    fn read<'a>(
        &'a self,
        norm: Option<&NormWeights>,
        residual: DeviceRows<'_>,
        pending: Option<DeviceRows<'_>>,
        rows: usize,
    ) -> Result<DeviceRows<'a>, GpuError> {
        let Self { gpu, spec, work, .. } = *self;
        let out = work.normed();
        match (norm, pending) {
            (Some(norm), Some(pending)) => gpu.add_norm(&norm.get(), residual, pending, rows, out)?,
            (Some(norm), None) => gpu.norm(&norm.get(), residual, rows, out)?,
            (None, Some(pending)) => gpu.add_cast(residual, pending, rows, spec.hidden, out)?,
            (None, None) => gpu.cast(residual, rows, spec.hidden, out)?,
        }
        Ok(out)
    }

    /// Adds up what all devices have of a layer's half.
    fn add_up(&self, rows: usize) -> Result<(), GpuError> {
        let Self { gpu, spec, work, others, .. } = *self;
        others.map_or(Ok(()), |others| gpu.all_reduce(others, work.delta(), rows, spec.hidden))
    }

    /// What a layer's half adds to the residual, as the family has it.
    fn settle(&self, norm: Option<&NormWeights>, rows: usize) -> Result<(), GpuError> {
        let Self { gpu, spec, work, .. } = *self;
        if let Some(norm) = norm {
            gpu.norm_heads(&norm.get(), work.delta(), rows, 1)?;
        }
        if spec.residual_scale != 1.0 {
            gpu.scale(work.delta(), rows, spec.hidden, spec.residual_scale)?;
        }
        Ok(())
    }

    fn attention(&self, index: usize, shape: BatchShape) -> DeviceAttention<'_> {
        let Self { spec, cache, .. } = *self;
        DeviceAttention {
            kv: &cache.kv,
            layer: index,
            batch: &cache.batch,
            shape,
            workspace: &cache.workspace,
            heads: spec.heads,
            scale: spec.attention_scale,
            window: spec.layers[index].window,
            softcap: spec.attention_softcap,
        }
    }

    fn feed_forward(&self, layer: &DeviceLayer, x: DeviceRows<'_>, rows: usize) -> Result<(), GpuError> {
        let Self { gpu, spec, work, .. } = *self;
        let Some((router, choice)) = &layer.router else {
            return self.mlp(&layer.ffn, x, rows, None, work.delta().buffer);
        };
        let Some(experts) = work.experts(choice) else {
            unreachable!("there is room for every layer's experts")
        };
        router.forward(gpu, x, rows, &work.quantized, (&experts.logits, Dtype::F32))?;
        let logits = DeviceRows::new(&experts.logits, Dtype::F32, choice.count);
        gpu.route(&experts.routing, logits, rows)?;
        let places = rows * choice.used;
        let gathered = DeviceRows::new(&experts.gathered, work.dtype, spec.hidden);
        gpu.gather_rows(x, rows, experts.routing.rows_of(), places, spec.hidden, gathered)?;
        self.mlp(&layer.ffn, gathered, places, Some(experts.routing.ends()), &experts.output)?;
        let output = DeviceRows::new(&experts.output, work.dtype, spec.hidden);
        gpu.combine_experts(&experts.routing, output, rows, spec.hidden, work.delta())
    }

    /// One MLP, or those of experts whose rows end where `ends` says.
    fn mlp(
        &self,
        ffn: &DeviceMlp,
        x: DeviceRows<'_>,
        rows: usize,
        ends: Option<&Buffer>,
        out: &Buffer,
    ) -> Result<(), GpuError> {
        let Self { gpu, spec, work, .. } = *self;
        ffn.up.multiply(gpu, x, rows, &work.quantized, ends, (&work.gate_up, work.dtype))?;
        let place = |output| ffn.up.place(output, rows, &work.gate_up, work.dtype);
        let activated = if spec.gated {
            let activated = DeviceRows::new(&work.activated, work.dtype, ffn.width);
            gpu.act_mul(spec.act, place(0), place(1), rows, ffn.width, activated)?;
            activated
        } else {
            gpu.act(spec.act, place(0), rows, ffn.width)?;
            place(0)
        };
        ffn.down.multiply(gpu, activated, rows, &work.quantized, ends, (out, work.dtype))
    }
}

impl Weights {
    /// Bytes on the device.
    pub(super) fn bytes(&self) -> usize {
        let layers: usize = self.layers.iter().map(DeviceLayer::bytes).sum();
        let ends = self.head.iter().chain(&self.positions).map(DeviceLinear::bytes).sum::<usize>();
        layers + ends + self.embedding.bytes() + self.final_norm.bytes()
    }
}
