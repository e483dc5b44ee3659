//! A model's weights on a device: made on the host layer by layer, as for the CPU, and sent over.

use std::cell::RefCell;

use obol_kernels::cuda::{
    Buffer, DeviceActivations, DeviceDense, DeviceNorm, DevicePacked, DevicePick, DeviceRows, DeviceTable,
    Dtype, ExpertChoice, Gpu, GpuError, NormKind,
};

use super::not_loaded;
use crate::decoder::layer::{Layer, Norm, QkNorms};
use crate::decoder::mlp::{Ffn, Mlp};
use crate::error::LoadError;
use crate::linear::Linear;
use crate::spec;
use crate::weight::Weight;

/// As [`Linear`], on a device; or the same matrices of several experts.
pub(super) struct DeviceLinear {
    pub(super) in_features: usize,
    products: Vec<Product>,
    outputs: Vec<Output>,
}

struct Product {
    weight: DeviceWeight,
    bias: Option<Buffer>,
    /// Its first column among all columns.
    first: usize,
    columns: usize,
}

/// Where one matrix's columns are.
struct Output {
    /// First column of its product among all columns.
    first: usize,
    /// First column inside its product.
    column: usize,
    /// Columns of its product.
    stride: usize,
}

enum DeviceWeight {
    Packed(DevicePacked),
    Dense(DeviceDense),
}

impl DeviceLinear {
    /// `linear` reads `in_features` and has `outputs` matrices; dense ones become `dtype`.
    pub(super) fn upload(
        gpu: &Gpu,
        linear: &Linear,
        outputs: usize,
        in_features: usize,
        dtype: Dtype,
    ) -> Result<Self, GpuError> {
        let products = linear
            .products()
            .map(|(weight, bias, first)| {
                let columns = weight.out_features();
                let weight = match weight {
                    Weight::Packed(weight) => DeviceWeight::Packed(gpu.upload_packed(weight)?),
                    Weight::Dense(weight) => DeviceWeight::Dense(gpu.upload_dense(weight, dtype)?),
                };
                let bias = bias.map(|bias| upload_vector(gpu, bias)).transpose()?;
                Ok(Product { weight, bias, first, columns })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { in_features, products, outputs: outputs_of(linear, outputs) })
    }

    /// The matrices of all experts, which have the same shapes and, product by product, the same kind of weights.
    ///
    /// # Errors
    /// When the device has no memory, or the kinds differ.
    pub(super) fn upload_experts(
        gpu: &Gpu,
        experts: &[&Linear],
        outputs: usize,
        in_features: usize,
        dtype: Dtype,
    ) -> Result<Self, LoadError> {
        let differ = || LoadError::Device("experts of different kinds of weights need --device cpu".into());
        let mut products = Vec::new();
        for (at, (weight, bias, first)) in experts[0].products().enumerate() {
            let all = || experts.iter().filter_map(|linear| linear.products().nth(at));
            if all().count() != experts.len() || all().any(|(other, ..)| !other.is_alike(weight)) {
                return Err(differ());
            }
            let packed = || all().filter_map(|(weight, ..)| weight.packed()).collect::<Vec<_>>();
            let dense = || all().filter_map(|(weight, ..)| weight.dense()).collect::<Vec<_>>();
            let columns = weight.out_features();
            let weight = match weight {
                Weight::Packed(_) => gpu.upload_packed_experts(&packed()).map(DeviceWeight::Packed),
                Weight::Dense(_) => gpu.upload_dense_experts(&dense(), dtype).map(DeviceWeight::Dense),
            };
            let biases: Vec<f32> = all().filter_map(|(_, bias, _)| bias).flatten().copied().collect();
            let bias = bias.map(|_| upload_vector(gpu, &biases)).transpose().map_err(not_loaded)?;
            products.push(Product { weight: weight.map_err(not_loaded)?, bias, first, columns });
        }
        Ok(Self { in_features, products, outputs: outputs_of(experts[0], outputs) })
    }

    /// Columns of all outputs together.
    pub(super) fn out_features(&self) -> usize {
        self.products.last().map_or(0, |product| product.first + product.columns)
    }

    /// Bytes of weights and biases on the device.
    pub(super) fn bytes(&self) -> usize {
        let bytes = |product: &Product| {
            let weight = match &product.weight {
                DeviceWeight::Packed(weight) => weight.bytes(),
                DeviceWeight::Dense(weight) => weight.bytes(),
            };
            weight + product.bias.as_ref().map_or(0, Buffer::bytes)
        };
        self.products.iter().map(bytes).sum()
    }

    /// Where output `output` of `rows` rows lies in the buffer that [`DeviceLinear::forward`] fills.
    pub(super) fn place<'a>(
        &self,
        output: usize,
        rows: usize,
        buffer: &'a Buffer,
        dtype: Dtype,
    ) -> DeviceRows<'a> {
        let Output { first, column, stride } = self.outputs[output];
        DeviceRows { buffer, dtype, start: rows * first + column, stride }
    }

    /// Computes all outputs of `x` (rows, in_features) into `y`, each at its place, as `dtype`.
    pub(super) fn forward(
        &self,
        gpu: &Gpu,
        x: DeviceRows<'_>,
        rows: usize,
        quantized: &RefCell<DeviceActivations>,
        y: (&Buffer, Dtype),
    ) -> Result<(), GpuError> {
        self.multiply(gpu, x, rows, quantized, None, y)
    }

    /// As [`DeviceLinear::forward`]; of experts, the rows of each of which end where `ends` says.
    pub(super) fn multiply(
        &self,
        gpu: &Gpu,
        x: DeviceRows<'_>,
        rows: usize,
        quantized: &RefCell<DeviceActivations>,
        ends: Option<&Buffer>,
        (y, dtype): (&Buffer, Dtype),
    ) -> Result<(), GpuError> {
        if self.products.iter().any(|product| matches!(product.weight, DeviceWeight::Packed(_))) {
            gpu.quantize(x, rows, self.in_features, &mut quantized.borrow_mut())?;
        }
        for product in &self.products {
            let y = DeviceRows { buffer: y, dtype, start: rows * product.first, stride: product.columns };
            let bias = product.bias.as_ref();
            match (&product.weight, ends) {
                (DeviceWeight::Packed(weight), None) => {
                    gpu.matmul_packed(&quantized.borrow(), rows, weight, bias, y)?;
                }
                (DeviceWeight::Packed(weight), Some(ends)) => {
                    gpu.matmul_packed_experts(&quantized.borrow(), rows, ends, weight, bias, y)?;
                }
                (DeviceWeight::Dense(weight), None) => gpu.matmul_dense(x, rows, weight, bias, y)?,
                (DeviceWeight::Dense(weight), Some(ends)) => {
                    gpu.matmul_dense_experts(x, rows, ends, weight, bias, y)?;
                }
            }
        }
        Ok(())
    }

    /// The first matrix's rows at these indices, u32.
    pub(super) fn pick<'a>(&'a self, indices: &'a Buffer) -> DevicePick<'a> {
        let table = match &self.products[0].weight {
            DeviceWeight::Packed(weight) => DeviceTable::Packed(weight),
            DeviceWeight::Dense(weight) => DeviceTable::Dense(weight),
        };
        DevicePick { table, indices, start: 0 }
    }
}

fn outputs_of(linear: &Linear, outputs: usize) -> Vec<Output> {
    let output = |output| {
        let (none, one) = (linear.place(output, 0), linear.place(output, 1));
        Output { first: one.start - none.start, column: none.start, stride: none.stride }
    };
    (0..outputs).map(output).collect()
}

fn upload_vector(gpu: &Gpu, values: &[f32]) -> Result<Buffer, GpuError> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    gpu.upload(&bytes)
}

/// A norm's weights on the device.
pub(super) struct NormWeights {
    kind: NormKind,
    weight: Buffer,
    bias: Option<Buffer>,
    width: usize,
    eps: f32,
}

impl NormWeights {
    pub(super) fn upload(gpu: &Gpu, norm: &Norm, eps: f32) -> Result<Self, GpuError> {
        let kind = match norm.kind {
            spec::Norm::Rms => NormKind::Rms,
            spec::Norm::Layer => NormKind::Layer,
        };
        let bias = norm.bias.as_deref().map(|bias| upload_vector(gpu, bias)).transpose()?;
        Ok(Self { kind, weight: upload_vector(gpu, &norm.weight)?, bias, width: norm.weight.len(), eps })
    }

    fn rms(gpu: &Gpu, weight: &[f32], eps: f32) -> Result<Self, GpuError> {
        let (kind, bias, width) = (NormKind::Rms, None, weight.len());
        Ok(Self { kind, weight: upload_vector(gpu, weight)?, bias, width, eps })
    }

    pub(super) fn get(&self) -> DeviceNorm<'_> {
        let Self { kind, weight, bias, width, eps } = self;
        DeviceNorm { kind: *kind, weight, bias: bias.as_ref(), width: *width, eps: *eps }
    }

    pub(super) fn width(&self) -> usize {
        self.width
    }

    pub(super) fn bytes(&self) -> usize {
        self.weight.bytes() + self.bias.as_ref().map_or(0, Buffer::bytes)
    }
}

/// As [`Layer`], on a device.
pub(super) struct DeviceLayer {
    pub(super) attention_norm: Option<NormWeights>,
    pub(super) qkv: DeviceLinear,
    /// Of q and of k.
    pub(super) qk_norm: Option<[NormWeights; 2]>,
    pub(super) attention_out: DeviceLinear,
    pub(super) attention_post_norm: Option<NormWeights>,
    pub(super) ffn_norm: Option<NormWeights>,
    pub(super) ffn: DeviceMlp,
    /// The MLP is of several experts, and this chooses among them: the router, and how.
    pub(super) router: Option<(DeviceLinear, ExpertChoice)>,
    pub(super) ffn_post_norm: Option<NormWeights>,
}

/// As [`Mlp`], on a device.
pub(super) struct DeviceMlp {
    pub(super) width: usize,
    pub(super) up: DeviceLinear,
    pub(super) down: DeviceLinear,
}

impl DeviceLayer {
    /// # Errors
    /// When the device has no memory, or the layer has experts, which this device does not run yet.
    pub(super) fn upload(
        gpu: &Gpu,
        layer: &Layer,
        spec: &spec::ModelSpec,
        dtype: Dtype,
    ) -> Result<Self, LoadError> {
        let norm = |norm: &Option<Norm>| {
            norm.as_ref()
                .map(|norm| NormWeights::upload(gpu, norm, spec.norm_eps))
                .transpose()
                .map_err(not_loaded)
        };
        let linear = |linear, outputs, in_features| {
            DeviceLinear::upload(gpu, linear, outputs, in_features, dtype).map_err(not_loaded)
        };
        let qk_norm = |QkNorms { q, k }: &QkNorms| -> Result<_, GpuError> {
            Ok([NormWeights::rms(gpu, q, spec.norm_eps)?, NormWeights::rms(gpu, k, spec.norm_eps)?])
        };
        let (ffn, router) = match &layer.ffn {
            Ffn::Dense(Mlp { width, up, down, .. }) => {
                let up = linear(up, 1 + usize::from(spec.gated), spec.hidden)?;
                (DeviceMlp { width: *width, up, down: linear(down, 1, *width)? }, None)
            }
            Ffn::Experts(experts) => {
                let spec::ExpertsSpec { count, used, width, normalized } = experts.spec;
                let all = |part: fn(&Mlp) -> &Linear| experts.experts.iter().map(part).collect::<Vec<_>>();
                let (up, down) = (all(|expert| &expert.up), all(|expert| &expert.down));
                let outputs = 1 + usize::from(spec.gated);
                let up = DeviceLinear::upload_experts(gpu, &up, outputs, spec.hidden, dtype)?;
                let down = DeviceLinear::upload_experts(gpu, &down, 1, width, dtype)?;
                let router = linear(&experts.router, 1, spec.hidden)?;
                (DeviceMlp { width, up, down }, Some((router, ExpertChoice { count, used, normalized })))
            }
        };
        Ok(Self {
            attention_norm: norm(&layer.attention_norm)?,
            qkv: linear(&layer.qkv, 3, spec.hidden)?,
            qk_norm: layer.qk_norm.as_ref().map(qk_norm).transpose().map_err(not_loaded)?,
            attention_out: linear(&layer.attention_out, 1, spec.q_width())?,
            attention_post_norm: norm(&layer.attention_post_norm)?,
            ffn_norm: norm(&layer.ffn_norm)?,
            ffn,
            router,
            ffn_post_norm: norm(&layer.ffn_post_norm)?,
        })
    }

    /// Experts that a row takes; 1 without experts.
    pub(super) fn used(&self) -> usize {
        self.router.as_ref().map_or(1, |(_, choice)| choice.used)
    }

    pub(super) fn bytes(&self) -> usize {
        let norms = [&self.attention_norm, &self.attention_post_norm, &self.ffn_norm, &self.ffn_post_norm];
        let norms = norms.into_iter().flatten().chain(self.qk_norm.iter().flatten());
        let linears = [&self.qkv, &self.attention_out, &self.ffn.up, &self.ffn.down];
        let router = self.router.as_ref().map_or(0, |(router, _)| router.bytes());
        router
            + norms.map(NormWeights::bytes).sum::<usize>()
            + linears.map(DeviceLinear::bytes).iter().sum::<usize>()
    }
}
