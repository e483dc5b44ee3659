//! A mixture of experts: its rows' choices, sorted for the experts' products, and the outputs added up again. All
//! on the device: nobody waits for the choices.

use super::{EachDtype, Rows, count, each_dtype, elements_shape};
use crate::cuda::gpu::{Kernel, Modules, Shape, arguments};
use crate::cuda::{Buffer, DeviceRows, Gpu, GpuError};

/// Rows of a block, and the most experts whose probabilities fit beside each other in its shared memory.
const ROUTE_ROWS: usize = 4;
const EXPERTS_MAX: usize = 2048;

/// A warp keeps a row's choices.
const USED_MAX: usize = 32;

pub(super) struct ExpertKernels {
    route: EachDtype,
    combine: EachDtype,
    sort: Kernel,
}

impl ExpertKernels {
    pub(super) fn load(modules: &Modules) -> Result<Self, GpuError> {
        Ok(Self {
            route: each_dtype(modules, "experts", "route")?,
            combine: each_dtype(modules, "experts", "combine")?,
            sort: modules.kernel("experts", "sort_choices", 0)?,
        })
    }
}

/// How a layer's rows choose their experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertChoice {
    /// Experts there are, at most 2,048.
    pub count: usize,
    /// Experts a row takes, at most 32: the most likely, of equal ones the first.
    pub used: usize,
    /// Whether a row's weights are divided by their sum.
    pub normalized: bool,
}

/// The choices of up to `rows` rows.
pub struct DeviceRouting {
    choice: ExpertChoice,
    rows: usize,
    /// (rows, used), a row's ascending: its experts, their weights (f32), their places in the experts' order.
    experts: Buffer,
    weights: Buffer,
    places: Buffer,
    /// (rows * used): the row of each place.
    rows_of: Buffer,
    /// (count)
    ends: Buffer,
}

impl DeviceRouting {
    /// The row of each place, u32: the places of an expert lie together and ascend by row. What
    /// [`Gpu::gather_rows`] takes as its list, with rows * used entries.
    pub fn rows_of(&self) -> &Buffer {
        &self.rows_of
    }

    /// The first place after each expert's, u32, by expert.
    pub fn ends(&self) -> &Buffer {
        &self.ends
    }

    /// (rows, used) u32, a row's experts ascending.
    pub fn experts(&self) -> &Buffer {
        &self.experts
    }

    /// (rows, used) f32, in the experts' order.
    pub fn weights(&self) -> &Buffer {
        &self.weights
    }
}

impl Gpu {
    /// Room for the choices of up to `rows` rows.
    ///
    /// # Errors
    /// When the device has no memory for it.
    ///
    /// # Panics
    /// When a row takes no expert, more than there are, or there are too many.
    pub fn routing(&self, rows: usize, choice: ExpertChoice) -> Result<DeviceRouting, GpuError> {
        let ExpertChoice { count, used, .. } = choice;
        assert!((1..=count.min(USED_MAX)).contains(&used), "{used} of {count} experts");
        assert!(count <= EXPERTS_MAX, "{count} experts are too many");
        let each = || self.allocate(rows * used * 4);
        Ok(DeviceRouting {
            choice,
            rows,
            experts: each()?,
            weights: each()?,
            places: each()?,
            rows_of: each()?,
            ends: self.allocate(count * 4)?,
        })
    }

    /// Chooses by the softmax of the router's logits (rows, count).
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When shapes do not fit.
    pub fn route(
        &self,
        routing: &DeviceRouting,
        logits: DeviceRows<'_>,
        rows: usize,
    ) -> Result<(), GpuError> {
        let ExpertChoice { count: experts, used, normalized } = routing.choice;
        assert!(rows <= routing.rows, "routing: {rows} rows; there is room for {}", routing.rows);
        logits.check("routing", rows, experts);
        let kernels = &self.kernels().rows.experts;
        let shape = Shape {
            grid: [count("routing", rows.div_ceil(ROUTE_ROWS)), 1, 1],
            block: [32, ROUTE_ROWS as u32, 1],
            shared: (ROUTE_ROWS * experts * 4) as u32,
        };
        let (many, has, takes) = (count("routing", rows), count("routing", experts), count("routing", used));
        let (from, is_normalized) = (Rows::of(logits), u32::from(normalized));
        let (chosen, weights) = (routing.experts.address(), routing.weights.address());
        let mut arguments = arguments![from, many, has, takes, is_normalized, chosen, weights];
        // SAFETY: these are the kernel's arguments; logits, experts and weights have so many rows.
        unsafe { self.launch(kernels.route[logits.dtype as usize], shape, &mut arguments)? };

        let len = count("routing", rows * used);
        let (places, rows_of, ends) =
            (routing.places.address(), routing.rows_of.address(), routing.ends.address());
        let mut arguments = arguments![len, takes, chosen, places, rows_of, ends];
        // SAFETY: as above; places are under `len`, as each choice has its own.
        unsafe { self.launch(kernels.sort, Shape::new([has, 1, 1], 256), &mut arguments) }
    }

    /// out (rows, width) = the weighted sum of each row's outputs, its experts ascending, where y (rows * used,
    /// width) are the experts' outputs by place, in the same type.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Panics
    /// When shapes or types do not fit.
    pub fn combine_experts(
        &self,
        routing: &DeviceRouting,
        y: DeviceRows<'_>,
        rows: usize,
        width: usize,
        out: DeviceRows<'_>,
    ) -> Result<(), GpuError> {
        assert!(rows <= routing.rows, "experts: {rows} rows; there is room for {}", routing.rows);
        assert_eq!(y.dtype, out.dtype, "experts: different types");
        y.check("experts: outputs", rows * routing.choice.used, width);
        out.check("experts: out", rows, width);
        let (wide, used) = (count("experts", width), count("experts", routing.choice.used));
        let (places, weights) = (routing.places.address(), routing.weights.address());
        let (y, to) = (Rows::of(y), Rows::of(out));
        let shape = elements_shape("experts", rows, width, 16 / out.dtype.bytes());
        let kernel = self.kernels().rows.experts.combine[out.dtype as usize];
        let len = count("experts", rows * routing.choice.used);
        // SAFETY: these are the kernel's arguments; places that are not under `len` are passed over.
        unsafe { self.launch(kernel, shape, &mut arguments![wide, used, len, places, weights, y, to]) }
    }
}
